//! What is being detached, for which the kernel takes its time.
//!
//! A process must not end meanwhile: threads that are killed while they close a
//! link leave the breakpoints behind, which stay in the target's code until it
//! ends ("failed to unregister, leaking uprobe", `uprobe_unregister_nosync` of
//! kernel/events/uprobes.c: the page is not had when a fatal signal is pending).
//! Links that nobody is closing are closed by the end of the process, whatever it
//! is that ends it.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::lock;

/// How many are detaching, and whether leakmon ends.
static STATE: Mutex<(usize, bool)> = Mutex::new((0, false));
static DONE: Condvar = Condvar::new();

/// Something is being detached until this is dropped.
pub(super) struct Detaching(());

impl Detaching {
    /// `None` when leakmon ends: nothing is to be detached any more.
    pub(super) fn begin() -> Option<Detaching> {
        let mut state = lock(&STATE);
        if state.1 {
            return None;
        }
        state.0 += 1;
        Some(Detaching(()))
    }
}

impl Drop for Detaching {
    fn drop(&mut self) {
        lock(&STATE).0 -= 1;
        DONE.notify_all();
    }
}

/// Waits until nothing is being detached, and for `limit` at the most; from then on
/// nothing is. To be called before leakmon ends.
pub fn settle(limit: Duration) {
    let mut state = lock(&STATE);
    state.1 = true;
    let waited = DONE.wait_timeout_while(state, limit, |state| state.0 > 0);
    if let Ok((state, _)) = waited
        && state.0 > 0
    {
        log::warn!("probes are still being detached: breakpoints may stay behind");
    }
}
