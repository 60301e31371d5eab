//! Carries out what the governors decide, on a thread of its own: a window of
//! 20 ms must not wait for a census that takes a second.
//!
//! Processes that share their probes ([`Attached::pool`]) share the thread, too:
//! what one of them attaches all pay for, so as much is attached as the governors
//! of all agree on.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use super::budget::{Governor, Interval, Reading, Step, cpu_time};
use super::counts::{Counts, CreationStack, KnownTask};
use super::error::Error;
use super::kernel::Attached;
use super::lock;
use super::plan::Tier;

/// The time to the next tick where nothing is governed.
const IDLE: Duration = Duration::from_secs(1);

/// Before what was counted for somebody who has left is forgotten.
const GRACE: Duration = Duration::from_millis(100);

/// Starts [`Driver`]s, and knows those that share a thread.
#[derive(Default)]
pub struct Drivers {
    pools: Mutex<HashMap<u32, Weak<Shared>>>,
}

/// A process whose probes are governed until this is dropped; they are detached
/// soon after.
pub struct Driver {
    shared: Arc<Shared>,
    number: u64,
}

struct Shared {
    started: Instant,
    state: Mutex<State>,
    /// Signalled when somebody has come or wants to go.
    wake: Condvar,
}

struct State {
    seats: Vec<Seat>,
    /// Of those who share the probes and whom nobody watches.
    others: Option<Governor>,
    /// Numbers that were given.
    numbers: u64,
    /// The thread is at its end, nobody may come any more.
    over: bool,
}

/// One process.
struct Seat {
    number: u64,
    pid: u32,
    attached: Attached,
    governor: Governor,
    /// Why nothing is attached any more.
    failed: Option<String>,
    /// Times that spawn and exit were detached.
    gaps: u64,
    /// Times that park and resume were detached.
    wait_gaps: u64,
    /// Its driver was dropped.
    left: bool,
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

impl Drivers {
    /// Governs what is attached to process `pid`.
    pub fn start(&self, attached: Attached, governor: Governor, pid: u32) -> Driver {
        let pool = attached.pool();
        let mut pools = lock(&self.pools);
        let mut seat = Seat {
            number: 0,
            pid,
            attached,
            governor,
            failed: None,
            gaps: 0,
            wait_gaps: 0,
            left: false,
        };
        if let Some(shared) = pool.and_then(|pool| pools.get(&pool)?.upgrade()) {
            match shared.seat(seat) {
                Ok(number) => return Driver { shared, number },
                Err(rejected) => seat = *rejected,
            }
        }
        let others = pool.map(|_| seat.governor.of_others());
        let shared = Arc::new(Shared {
            started: Instant::now(),
            state: Mutex::new(State {
                seats: vec![seat],
                others,
                numbers: 0,
                over: false,
            }),
            wake: Condvar::new(),
        });
        if let Some(pool) = pool {
            pools.retain(|_, shared| shared.strong_count() > 0);
            pools.insert(pool, Arc::downgrade(&shared));
        }
        drop(pools);
        std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.govern()
        });
        Driver { shared, number: 0 }
    }
}

impl Driver {
    fn with<T>(&self, look: impl FnOnce(&mut Seat) -> T) -> T {
        look(lock(&self.shared.state).seat(self.number))
    }

    /// Everything that was counted since the process was first attached.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn counts(&self) -> Result<Counts, Error> {
        self.with(|seat| seat.attached.read())
    }

    /// See [`Attached::creation_stacks`].
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn creation_stacks(&self) -> Result<Vec<CreationStack>, Error> {
        self.with(|seat| seat.attached.creation_stacks())
    }

    /// See [`Attached::learned`].
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn learned(&self, known: &[KnownTask]) -> Result<(), Error> {
        self.with(|seat| seat.attached.learned(known))
    }

    /// What happened since the last call.
    pub fn take_interval(&self) -> Interval {
        self.with(|seat| seat.governor.take_interval())
    }

    /// What is attached.
    pub fn status(&self) -> Status {
        let mut state = lock(&self.shared.state);
        let in_force = state.in_force();
        let seat = state.seat(self.number);
        Status {
            tier: seat.governor.tier().min(in_force),
            attached: seat.attached.tier(),
            learning: seat.attached.is_learning(),
            yields: seat.governor.yields(),
            failed: seat.failed.clone(),
            gaps: seat.gaps,
            wait_gaps: seat.wait_gaps,
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.with(|seat| {
            // Another one of the process can be attached at once; what the kernel
            // takes its time for is done by the thread.
            seat.attached.leave();
            seat.left = true;
        });
        self.shared.wake.notify_all();
    }
}

impl Shared {
    /// Takes in one more process; gives it back when the thread is at its end.
    fn seat(&self, mut seat: Seat) -> Result<u64, Box<Seat>> {
        let mut state = lock(&self.state);
        if state.over {
            return Err(Box::new(seat));
        }
        state.numbers += 1;
        let number = state.numbers;
        seat.number = number;
        state.seats.push(seat);
        drop(state);
        self.wake.notify_all();
        Ok(number)
    }

    fn govern(&self) {
        let mut state = lock(&self.state);
        loop {
            let (mut gone, kept): (Vec<Seat>, Vec<Seat>) = std::mem::take(&mut state.seats)
                .into_iter()
                .partition(|seat| seat.left);
            state.seats = kept;
            if !gone.is_empty() {
                state.over = state.seats.is_empty();
                let over = state.over;
                drop(state);
                for seat in &mut gone {
                    seat.attached.close();
                }
                // A program that was in the middle of a hit of theirs is done by then:
                // links that others share are not waited for.
                std::thread::sleep(GRACE);
                drop(gone);
                if over {
                    return;
                }
                state = lock(&self.state);
                continue;
            }
            let after = state.tick(self.started.elapsed());
            state = self
                .wake
                .wait_timeout(state, after)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }
}

impl State {
    /// The seat with this number, which its driver has.
    fn seat(&mut self, number: u64) -> &mut Seat {
        let seat = self.seats.iter_mut().find(|seat| seat.number == number);
        seat.expect("a seat is taken away after its driver alone")
    }

    /// Reads, decides and attaches; the time to the next tick.
    fn tick(&mut self, now: Duration) -> Duration {
        let mut agreed = Step {
            tier: Tier::Blocking,
            after: IDLE,
        };
        let mut agree = |governor: &Governor, step: Step| {
            // Who has all that it may have does not mind what others have.
            if step.tier < governor.highest() {
                agreed.tier = agreed.tier.min(step.tier);
            }
            agreed.after = agreed.after.min(step.after);
        };
        for seat in self.seats.iter_mut().filter(|seat| seat.failed.is_none()) {
            match seat.tick(now) {
                Ok(step) => agree(&seat.governor, step),
                Err(error) => seat.fail(error),
            }
        }
        let attached = self.seats.iter().map(|seat| seat.attached.tier()).max();
        let mut seats = self.seats.iter_mut().filter(|seat| seat.failed.is_none());
        if let (Some(others), Some(seat)) = (&mut self.others, seats.next()) {
            match seat.attached.hits_of_others() {
                Ok(hits) => {
                    let step = others.tick(Reading {
                        now,
                        attached: attached.unwrap_or_default(),
                        hits,
                        ..Reading::default()
                    });
                    agree(others, step);
                }
                Err(error) => seat.fail(error.to_string()),
            }
        }
        for seat in self.seats.iter_mut().filter(|seat| seat.failed.is_none()) {
            let tier = agreed.tier.min(seat.governor.highest());
            if let Err(error) = seat.set_tier(tier) {
                seat.fail(error.to_string());
            }
        }
        agreed.after
    }

    /// The tier that is in force for those who share probes.
    fn in_force(&self) -> Tier {
        let seats = self.seats.iter().filter(|seat| seat.failed.is_none());
        let governors = seats.map(|seat| &seat.governor).chain(&self.others);
        let minding = governors.filter(|governor| governor.tier() < governor.highest());
        let tiers = minding.map(Governor::tier);
        tiers.min().unwrap_or(Tier::Blocking)
    }
}

impl Seat {
    fn tick(&mut self, now: Duration) -> Result<Step, String> {
        let hits = self.attached.hits().map_err(|error| error.to_string())?;
        let cpu = cpu_time(self.pid).map_err(|error| format!("its CPU time: {error}"))?;
        let others_pay = self.attached.is_too_dear_for_others();
        Ok(self.governor.tick(Reading {
            now,
            attached: self.attached.tier(),
            hits,
            cpu: Some(cpu),
            learning: self.attached.is_learning(),
            others_pay: others_pay.map_err(|error| error.to_string())?,
        }))
    }

    /// Nothing is attached any more.
    fn fail(&mut self, why: String) {
        self.failed = Some(why);
        self.attached.close();
    }

    fn set_tier(&mut self, tier: Tier) -> Result<(), Error> {
        let before = self.attached.tier();
        if tier != before {
            self.attached.set_tier(tier)?;
            self.gaps += u64::from(before >= Tier::Lifecycle && tier < Tier::Lifecycle);
            self.wait_gaps += u64::from(before >= Tier::Blocking && tier < Tier::Blocking);
        }
        Ok(())
    }
}
