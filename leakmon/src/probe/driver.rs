//! Carries out what the governor decides, on a thread of its own: a window of
//! 20 ms must not wait for a census that takes a second.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::budget::{Governor, Interval, Reading, cpu_time};
use super::counts::{Counts, CreationStack, KnownTask};
use super::error::Error;
use super::kernel::Attached;
use super::plan::Tier;

/// A process whose probes are governed until this is dropped.
pub struct Driver {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled to end the thread.
    wake: Condvar,
}

struct State {
    attached: Attached,
    governor: Governor,
    /// Why nothing is attached any more.
    failed: Option<String>,
    /// Times that spawn and exit were detached.
    gaps: u64,
    /// Times that park and resume were detached.
    wait_gaps: u64,
    stop: bool,
}

/// What is attached, as the governor sees it.
#[derive(Clone, Debug)]
pub struct Status {
    /// The tier in force.
    pub tier: Tier,
    /// What is attached at this moment; less than `tier` while the budget is
    /// saved up.
    pub attached: Tier,
    /// They do not count spawns yet: [`Driver::learned`] is waited for.
    pub learning: bool,
    /// The tier above it costs programs too much that nobody watches.
    pub yields: bool,
    /// Why the probes are gone, if they are.
    pub failed: Option<String>,
    /// Grows with every detaching: between two equal values the spawns and
    /// exits were counted without a break.
    pub gaps: u64,
    /// The same for the timing of waits.
    pub wait_gaps: u64,
}

impl Driver {
    /// Governs what is attached to process `pid`.
    pub fn start(attached: Attached, governor: Governor, pid: u32) -> Driver {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                attached,
                governor,
                failed: None,
                gaps: 0,
                wait_gaps: 0,
                stop: false,
            }),
            wake: Condvar::new(),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.govern(pid)
        });
        Driver {
            shared,
            thread: Some(thread),
        }
    }

    /// Everything that was counted since the process was first attached.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn counts(&self) -> Result<Counts, Error> {
        self.shared.lock().attached.read()
    }

    /// See [`Attached::creation_stacks`].
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn creation_stacks(&self) -> Result<Vec<CreationStack>, Error> {
        self.shared.lock().attached.creation_stacks()
    }

    /// See [`Attached::learned`].
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn learned(&self, known: &[KnownTask]) -> Result<(), Error> {
        self.shared.lock().attached.learned(known)
    }

    /// What happened since the last call.
    pub fn take_interval(&self) -> Interval {
        self.shared.lock().governor.take_interval()
    }

    /// What is attached.
    pub fn status(&self) -> Status {
        let state = self.shared.lock();
        Status {
            tier: state.governor.tier(),
            attached: state.attached.tier(),
            learning: state.attached.is_learning(),
            yields: state.governor.yields(),
            failed: state.failed.clone(),
            gaps: state.gaps,
            wait_gaps: state.wait_gaps,
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of it was printed where it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No change of the state is left half done by a panic.
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn govern(&self, pid: u32) {
        let started = Instant::now();
        let mut state = self.lock();
        while !state.stop {
            let after = match state.tick(pid, started.elapsed()) {
                Ok(after) => after,
                Err(error) => {
                    state.failed = Some(error);
                    // What is left is detached when the driver is dropped.
                    break;
                }
            };
            state = self
                .wake
                .wait_timeout(state, after)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }
}

impl State {
    /// Reads, decides and attaches; the time to the next tick.
    fn tick(&mut self, pid: u32, now: Duration) -> Result<Duration, String> {
        let hits = self.attached.hits().map_err(|error| error.to_string())?;
        let cpu = cpu_time(pid).map_err(|error| format!("its CPU time: {error}"))?;
        let others_pay = self.attached.is_too_dear_for_others();
        let step = self.governor.tick(Reading {
            now,
            hits,
            cpu,
            learning: self.attached.is_learning(),
            others_pay: others_pay.map_err(|error| error.to_string())?,
        });
        let before = self.attached.tier();
        if step.tier != before {
            self.attached
                .set_tier(step.tier)
                .map_err(|error| error.to_string())?;
            self.gaps += u64::from(before >= Tier::Lifecycle && step.tier < Tier::Lifecycle);
            self.wait_gaps += u64::from(before >= Tier::Blocking && step.tier < Tier::Blocking);
        }
        Ok(step.after)
    }
}
