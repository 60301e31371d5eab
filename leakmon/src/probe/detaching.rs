//! What is being detached, for which the kernel takes its time.
//!
//! A process must not end meanwhile: threads that are killed while they close a
//! link leave the breakpoints behind, which stay in the target's code until it
//! ends ("failed to unregister, leaking uprobe", `uprobe_unregister_nosync` of
//! kernel/events/uprobes.c: the page is not had when a fatal signal is pending).
//! Links that nobody is closing are closed by the end of the process, whatever it
//! is that ends it.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

static COUNT: Mutex<usize> = Mutex::new(0);
static DONE: Condvar = Condvar::new();

/// Something that is being detached until this is dropped.
pub(super) struct Detaching(());

impl Detaching {
    pub(super) fn begin() -> Detaching {
        *COUNT.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Detaching(())
    }
}

impl Drop for Detaching {
    fn drop(&mut self) {
        *COUNT.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        DONE.notify_all();
    }
}

/// Waits until nothing is being detached, and for `limit` at the most. To be
/// called before leakmon ends.
pub fn settle(limit: Duration) {
    let count = COUNT.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = DONE.wait_timeout_while(count, limit, |count| *count > 0);
    if let Ok((count, _)) = waited
        && *count > 0
    {
        log::warn!("probes are still being detached: breakpoints may stay behind");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_waits_for_what_is_detached() {
        let one = Detaching::begin();
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(one);
        });
        settle(Duration::from_secs(10));
        assert!(other.is_finished() || other.join().is_ok());
    }
}
