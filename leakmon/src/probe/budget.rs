//! Keeps the cost of probes within a share of what the target uses.
//!
//! [`Governor`] is a state machine over readings: it knows no kernel. A token
//! bucket in nanoseconds of CPU time is filled by what the user allows (a share
//! of the target's own CPU time, and at least a share of one core) and emptied
//! by what hits cost: as much as in leakmon's own loops, and [`COLD`] more the
//! more the target does between two of them. While there are tokens the wanted tier
//! is attached; without tokens it is detached until there are enough for a
//! useful window. Each tier's cost is known from its own windows, so that:
//!
//! - a tier that fits stays attached without a break, and its figures are exact;
//! - a tier that does not fit is attached for part of the time, and its figures
//!   are samples; if the tier below fits, that one stays attached meanwhile;
//! - a tier that would fit for less than [`MIN_SHARE`] of the time is given up
//!   for the tier below, and tried again later, ever more rarely.
//!
//! The bucket holds [`BURST`] of the allowance: so over any second the cost is
//! at most 1.5 times the budget, and on the average it is within it.

use std::io;
use std::time::Duration;

use super::calibrate::Cost;
use super::counts::Hits;
use super::plan::{Role, Tier};
use crate::task::Overhead;

/// Share of one core that probes may always use, in percent.
pub const FLOOR_PERCENT: f64 = 0.5;

/// The bucket's size: what is allowed over this time.
const BURST: Duration = Duration::from_millis(500);

/// A window shorter than this says too little for what its two switches cost.
const MIN_WINDOW: Duration = Duration::from_millis(10);

/// The window for which tokens are saved up, where the bucket holds as much.
const WINDOW: Duration = Duration::from_millis(100);

/// Below this share of time a tier is given up: [`MIN_WINDOW`] would cost more
/// than the bucket holds.
pub const MIN_SHARE: f64 = MIN_WINDOW.as_millis() as f64 / BURST.as_millis() as f64;

/// First window of a tier whose cost is not known.
const PROBE: Duration = Duration::from_millis(20);

/// Ticks come at least so far apart, and at most so far.
const TICK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));

/// A tier is not given up before the target was seen for so long.
const ACQUAINTED: Duration = Duration::from_secs(1);

/// Before a tier that was given up is tried again: first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(320));

/// Time constant of the averages of CPU use and cost.
const AVERAGE: Duration = Duration::from_millis(500);

/// What a hit costs more, in parts of its cost in a loop, where the program does
/// so much between two hits that nothing of the kernel's is in the caches any
/// more, and where the hit takes the program's own from them. Of two copies of a
/// server that were asked in turn, one watched and one not, the watched one needed
/// so much more: a tokio server with 12 us between two hits 1.0 to 1.9, a Go server
/// with 3 us 0.1 to 0.6.
const COLD: f64 = 1.75;

/// Where a program does so much of its own between two hits, they cost half of
/// that more; in nanoseconds of CPU time.
const COOLING_NS: f64 = 3000.0;

/// CPU time that attaching and detaching once takes from the target: page
/// faults on the pages of code that are changed, in nanoseconds.
const SWITCH_NS: f64 = 200_000.0;

/// What is to be attached now, and when to ask again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The tier to have attached until the next tick.
    pub tier: Tier,
    /// Tick again after this time; later than that the budget may be exceeded.
    pub after: Duration,
}

/// One reading of a target.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    /// Any clock that only goes on.
    pub now: Duration,
    /// What has been attached since the last reading: [`Step::tier`], or less
    /// where others have a say in it.
    pub attached: Tier,
    /// Hits so far ([`super::Attached::hits`]).
    pub hits: Hits,
    /// CPU time that the target has used so far ([`cpu_time`]), where it is known.
    pub cpu: Option<Duration>,
    /// Spawns and exits are not counted yet, though their probes are attached
    /// ([`super::Attached::is_learning`]).
    pub learning: bool,
    /// The highest tier costs programs too much that nobody watches
    /// ([`super::Attached::is_too_dear_for_others`]).
    pub others_pay: bool,
}

/// What the governor did in an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Interval {
    /// Cost and use; `attached` is that of the tier in force.
    pub overhead: Overhead,
    /// Share of the interval in which spawn and exit were attached, 0 to 1.
    pub lifecycle: f64,
    /// Share of the interval in which they counted, 0 to 1.
    pub counted: f64,
    /// Share of the interval in which park and resume were attached, 0 to 1.
    pub blocking: f64,
}

/// Cost of a tier's own probes, in CPU time for wall time.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    /// `None` until a window has shown it.
    average: Option<f64>,
}

impl Rate {
    fn add(&mut self, rate: f64, time: Duration) {
        let weight = weight(time);
        self.average = Some(match self.average {
            Some(average) => average + (rate - average) * weight,
            None => rate,
        });
    }
}

/// Weight of a sample over `time` in an average.
fn weight(time: Duration) -> f64 {
    1.0 - (-time.as_secs_f64() / AVERAGE.as_secs_f64()).exp()
}

/// What was given up, and is tried again ever more rarely.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Retry {
    pub(super) at: Duration,
    pub(super) pause: Duration,
}

impl Retry {
    /// It is given up now, after it was `before`.
    pub(super) fn after(before: Option<Retry>, now: Duration) -> Retry {
        let pause = before.map_or(RETRY.0, |retry| (retry.pause * 2).min(RETRY.1));
        Retry {
            at: now + pause,
            pause,
        }
    }
}

/// Decides what is attached to one target. See the module's documentation.
#[derive(Clone, Debug)]
pub struct Governor {
    cost: Cost,
    /// Of the target's CPU time, 0 to 1; `None`: whatever it costs.
    share: Option<f64>,
    /// The highest tier that the plan and the user allow.
    highest: Tier,
    /// The tier in force: what is attached when there are tokens.
    wanted: Tier,
    attached: Tier,
    last: Option<Reading>,
    tokens: f64,
    /// Allowed cost, in CPU time for wall time.
    allowance: f64,
    /// The target's own use in the same measure, an average: between two readings
    /// a process's clock may stand still though its threads run.
    own: Option<f64>,
    /// The same averages by tier; the census costs nothing.
    lifecycle: Rate,
    blocking: Rate,
    /// For the tiers above `wanted`.
    retry: Option<Retry>,
    /// [`Tier::Blocking`] is given up for the others' sake.
    yields: bool,
    /// How long the target has been seen.
    seen: Duration,
    interval: Sums,
}

/// Sums over a report's interval.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    time: f64,
    lifecycle: f64,
    counted: f64,
    blocking: f64,
    hits: u64,
    cost_ns: f64,
    cpu_ns: f64,
}

impl Governor {
    /// Keeps the cost under `percent` of the target's CPU use (and of
    /// [`FLOOR_PERCENT`] of one core, whichever is more), in tiers up to
    /// `highest`.
    pub fn governed(cost: Cost, percent: f64, highest: Tier) -> Governor {
        Governor::new(cost, Some(percent / 100.0), highest)
    }

    /// Keeps `tier` attached whatever it costs, and says what it costs.
    pub fn fixed(cost: Cost, tier: Tier) -> Governor {
        Governor::new(cost, None, tier)
    }

    fn new(cost: Cost, share: Option<f64>, highest: Tier) -> Governor {
        Governor {
            cost,
            share,
            highest,
            wanted: highest,
            attached: Tier::Census,
            last: None,
            // A full bucket of the floor, to begin with.
            tokens: FLOOR_PERCENT / 100.0 * BURST.as_nanos() as f64,
            allowance: FLOOR_PERCENT / 100.0,
            own: None,
            lifecycle: Rate::default(),
            blocking: Rate::default(),
            retry: None,
            yields: false,
            seen: Duration::ZERO,
            interval: Sums::default(),
        }
    }

    /// For processes that are hit by the same probes, and that nobody watches:
    /// together they may lose what one may that is idle.
    pub fn of_others(&self) -> Governor {
        Governor::new(self.cost, Some(0.0), self.highest)
    }

    /// The highest tier that it can decide for.
    pub fn highest(&self) -> Tier {
        self.highest
    }

    /// The tier in force. It is attached all the time or, when it does not fit,
    /// part of it.
    pub fn tier(&self) -> Tier {
        self.wanted
    }

    /// Whether the highest tier is given up for the sake of programs that nobody
    /// watches.
    pub fn yields(&self) -> bool {
        self.yields
    }

    /// Takes a reading and decides. The caller attaches [`Step::tier`] before
    /// the next tick; if that fails it makes a new governor with a lower
    /// `highest`.
    pub fn tick(&mut self, reading: Reading) -> Step {
        let last = self.last.replace(reading);
        if let Some(last) = last {
            if reading.attached > last.attached && self.share.is_some() {
                self.tokens -= SWITCH_NS;
            }
            self.attached = reading.attached;
            self.account(last, reading);
        }
        let Some(_) = self.share else {
            return self.step(self.wanted, TICK.1);
        };
        self.choose_tier(reading);
        if self.wanted == Tier::Census {
            return self.step(Tier::Census, TICK.1);
        }
        if self.attached == self.wanted {
            return self.while_attached();
        }
        self.while_saving()
    }

    /// Moves the readings' differences into the bucket and the averages.
    fn account(&mut self, last: Reading, now: Reading) {
        let time = now.now.saturating_sub(last.now);
        if time.is_zero() {
            return;
        }
        let seconds = time.as_secs_f64();
        let nanos = seconds * 1e9;
        let hits = now.hits.total().saturating_sub(last.hits.total());
        let cpu_ns = now.cpu.zip(last.cpu).map(|(now, last)| {
            let used = now.saturating_sub(last);
            used.as_nanos() as f64
        });
        let own_ns = self.own.map(|own| own * nanos).or(cpu_ns);
        let cold = coldness(own_ns, hits);
        let cost_of = |tier: Tier| -> f64 {
            Role::all()
                .filter(|role| role.tier() == tier)
                .map(|role| {
                    let hits = now.hits.of(role).saturating_sub(last.hits.of(role));
                    let each = self.cost.of(role) + COLD * cold * self.cost.cached(role);
                    hits as f64 * each
                })
                .sum()
        };
        let lifecycle_ns = cost_of(Tier::Lifecycle);
        let blocking_ns = cost_of(Tier::Blocking);
        let cost_ns = lifecycle_ns + blocking_ns;
        let cpu_ns = cpu_ns.unwrap_or(0.0);

        // What the probes cost is part of what the target used, but not its own.
        let used = (cpu_ns - cost_ns).max(0.0) / nanos;
        let allowed = (used * self.share.unwrap_or(0.0)).max(FLOOR_PERCENT / 100.0);
        let weight = if self.seen.is_zero() {
            1.0
        } else {
            weight(time)
        };
        self.allowance += (allowed - self.allowance) * weight;
        if now.cpu.is_some() {
            let own = self.own.get_or_insert(used);
            *own += (used - *own) * weight;
        }
        self.seen += time;
        if self.attached >= Tier::Lifecycle {
            self.lifecycle.add(lifecycle_ns / nanos, time);
            self.interval.lifecycle += seconds;
            if !now.learning {
                self.interval.counted += seconds;
            }
        }
        if self.attached >= Tier::Blocking {
            self.blocking.add(blocking_ns / nanos, time);
            self.interval.blocking += seconds;
        }
        self.tokens = (self.tokens + self.allowance * nanos - cost_ns).min(self.bucket());
        self.interval.time += seconds;
        self.interval.hits += hits;
        self.interval.cost_ns += cost_ns;
        self.interval.cpu_ns += cpu_ns;
    }

    /// What the bucket holds, in nanoseconds.
    fn bucket(&self) -> f64 {
        self.allowance * BURST.as_nanos() as f64
    }

    /// Cost of everything that `tier` attaches, in CPU time for wall time;
    /// `None` when a part of it was not seen yet.
    fn rate(&self, tier: Tier) -> Option<f64> {
        match tier {
            Tier::Census => Some(0.0),
            Tier::Lifecycle => self.lifecycle.average,
            Tier::Blocking => Some(self.lifecycle.average? + self.blocking.average?),
        }
    }

    /// Steps down when the tier in force is too dear, and up again when it is
    /// time to try.
    fn choose_tier(&mut self, reading: Reading) {
        let now = reading.now;
        let by_itself = self.retry.is_some();
        if self.yields && !reading.others_pay && !by_itself {
            self.wanted = self.highest;
            self.blocking = Rate::default();
        }
        self.yields = reading.others_pay && self.highest == Tier::Blocking;
        let highest = match self.yields {
            true => below(self.highest),
            false => self.highest,
        };
        self.wanted = self.wanted.min(highest);
        if let Some(rate) = self.rate(self.wanted)
            && rate * MIN_SHARE > self.allowance
            && self.seen >= ACQUAINTED
        {
            self.retry = Some(Retry::after(self.retry, now));
            self.wanted = below(self.wanted);
            return;
        }
        let Some(retry) = self.retry else {
            return;
        };
        if now < retry.at {
            return;
        }
        if self.wanted < highest {
            self.wanted = above(self.wanted);
            // What it cost then says nothing of now.
            match self.wanted {
                Tier::Blocking => self.blocking = Rate::default(),
                _ => self.lifecycle = Rate::default(),
            }
            self.retry = Some(Retry {
                at: now + retry.pause,
                ..retry
            });
        } else {
            // It has kept the highest tier for a whole pause.
            self.retry = None;
        }
    }

    fn while_attached(&mut self) -> Step {
        let rate = self.rate(self.attached);
        if self.tokens <= 0.0 {
            let rest = self.rest();
            return self.step(rest, self.pause(rest));
        }
        let after = match rate {
            Some(rate) if rate > self.allowance => self.until_empty(rate),
            _ => TICK.1,
        };
        self.step(self.attached, after)
    }

    /// How long the tokens last.
    fn until_empty(&self, rate: f64) -> Duration {
        let left = self.tokens.max(0.0) / (rate - self.allowance);
        Duration::from_nanos(left.min(TICK.1.as_nanos() as f64) as u64).clamp(TICK.0, TICK.1)
    }

    /// What stays attached while tokens are saved for the tier in force: the
    /// tier below, if that leaves something to save.
    fn rest(&self) -> Tier {
        let below = below(self.wanted);
        match self.rate(below) {
            Some(rate) if rate < 0.7 * self.allowance => below,
            _ => Tier::Census,
        }
    }

    /// The time to the next decision while `rest` is attached.
    fn pause(&self, rest: Tier) -> Duration {
        let missing = (self.price() - self.tokens).max(0.0);
        let saved = self.allowance - self.rate(rest).unwrap_or(0.0);
        if saved <= 0.0 {
            return TICK.1;
        }
        Duration::from_nanos((missing / saved).min(TICK.1.as_nanos() as f64) as u64)
            .clamp(TICK.0, TICK.1)
    }

    /// Tokens that a window of the tier in force is begun with.
    fn price(&self) -> f64 {
        match self.rate(self.wanted) {
            Some(rate) => {
                let excess = (rate - self.allowance).max(0.0);
                (excess * WINDOW.as_nanos() as f64 + SWITCH_NS).min(0.9 * self.bucket())
            }
            None => SWITCH_NS.min(0.9 * self.bucket()),
        }
    }

    fn while_saving(&mut self) -> Step {
        if self.tokens < self.price() {
            let rest = if self.attached == Tier::Census || self.tokens <= 0.0 {
                self.rest()
            } else {
                self.attached
            };
            return self.step(rest, self.pause(rest));
        }
        let after = match self.rate(self.wanted) {
            Some(rate) if rate > self.allowance => self.until_empty(rate),
            Some(_) => TICK.1,
            None => PROBE,
        };
        self.step(self.wanted, after)
    }

    fn step(&mut self, tier: Tier, after: Duration) -> Step {
        self.attached = tier;
        Step { tier, after }
    }

    /// What happened since the last call, for a report.
    pub fn take_interval(&mut self) -> Interval {
        let sums = std::mem::take(&mut self.interval);
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        // Without a reading in it, it is as it was at the last one.
        let of_time = |part: f64, tier: Tier| match sums.time > 0.0 {
            true => part / sums.time,
            false => f64::from(u8::from(self.attached >= tier)),
        };
        let lifecycle = of_time(sums.lifecycle, Tier::Lifecycle);
        let blocking = of_time(sums.blocking, Tier::Blocking);
        let learning = self.last.is_some_and(|last| last.learning);
        let counted = match sums.time > 0.0 || learning {
            true => share(sums.counted, sums.time),
            false => lifecycle,
        };
        Interval {
            overhead: Overhead {
                hits: sums.hits,
                cost_ns: sums.cost_ns as u64,
                target_cpu_ns: sums.cpu_ns as u64,
                percent: 100.0 * share(sums.cost_ns, sums.cpu_ns),
                core_percent: 100.0 * share(sums.cost_ns, sums.time * 1e9),
                budget_percent: self.share.map(|share| 100.0 * share),
                attached: match self.wanted {
                    Tier::Census => 0.0,
                    Tier::Lifecycle => lifecycle,
                    Tier::Blocking => blocking,
                },
            },
            lifecycle,
            counted,
            blocking,
        }
    }
}

/// How much of [`COLD`] hits cost in a program that has used `own_ns` of its own
/// meanwhile, 0 to 1; half of it where that is not known.
fn coldness(own_ns: Option<f64>, hits: u64) -> f64 {
    let Some(own_ns) = own_ns else {
        return 0.5;
    };
    let cooling = (hits as f64 * COOLING_NS).max(1.0);
    own_ns / (own_ns + cooling)
}

fn below(tier: Tier) -> Tier {
    match tier {
        Tier::Blocking => Tier::Lifecycle,
        Tier::Lifecycle | Tier::Census => Tier::Census,
    }
}

fn above(tier: Tier) -> Tier {
    match tier {
        Tier::Census => Tier::Lifecycle,
        Tier::Lifecycle | Tier::Blocking => Tier::Blocking,
    }
}

/// CPU time that all threads of a process have used so far, to the nanosecond.
/// It needs no permission.
///
/// # Errors
///
/// The process is gone.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(pid))?;
    Ok(Duration::from(nix::time::clock_gettime(clock)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Cost = Cost {
        lifecycle_ns: 500.0,
        blocking_ns: 600.0,
        empty_ns: 450.0,
        poll_ns: 1100.0,
        poll_stepped_ns: 12000.0,
        switch_ns: 100.0,
    };

    /// A target that does what it does, and the governor over it.
    struct Simulation {
        governor: Governor,
        reading: Reading,
        /// Of its own CPU use, in cores.
        cores: f64,
        /// Hits a second of spawn and exit, and of park and resume.
        lifecycle: f64,
        blocking: f64,
        switches: u64,
    }

    impl Simulation {
        fn new(governor: Governor, cores: f64, lifecycle: f64, blocking: f64) -> Self {
            Simulation {
                governor,
                reading: Reading {
                    now: Duration::from_secs(1000),
                    cpu: Some(Duration::ZERO),
                    ..Reading::default()
                },
                cores,
                lifecycle,
                blocking,
                switches: 0,
            }
        }

        /// Runs, and says the cost over the target's own use in the worst second.
        fn run(&mut self, time: Duration) -> f64 {
            let end = self.reading.now + time;
            let mut attached = Tier::Census;
            let mut spent = Vec::new();
            while self.reading.now < end {
                let step = self.governor.tick(self.reading);
                self.switches += u64::from(step.tier != attached);
                attached = step.tier;
                assert!(step.after >= TICK.0 && step.after <= TICK.1);
                let seconds = step.after.as_secs_f64();
                let on = |tier| f64::from(u8::from(attached >= tier));
                let spawns = on(Tier::Lifecycle) * self.lifecycle * seconds;
                let parks = on(Tier::Blocking) * self.blocking * seconds;
                let mut hits = self.reading.hits;
                hits.0[Role::Spawn.index()] += spawns as u64;
                hits.0[Role::Park.index()] += parks as u64;
                let own = self.cores * seconds;
                let cold = own / (own + (spawns + parks) * COOLING_NS / 1e9);
                let cost = (spawns * 500.0 + parks * 600.0) / 1e9 * (1.0 + COLD * cold);
                self.reading = Reading {
                    now: self.reading.now + step.after,
                    attached: step.tier,
                    hits,
                    cpu: (self.reading.cpu).map(|cpu| cpu + Duration::from_secs_f64(own + cost)),
                    ..self.reading
                };
                spent.push((self.reading.now, cost));
            }
            let mut worst = 0.0f64;
            for (index, &(start, _)) in spent.iter().enumerate() {
                let second: f64 = spent[index..]
                    .iter()
                    .take_while(|(now, _)| *now < start + Duration::from_secs(1))
                    .map(|(_, cost)| cost)
                    .sum();
                worst = worst.max(second);
            }
            worst
        }
    }

    fn governed() -> Governor {
        Governor::governed(COST, 5.0, Tier::Blocking)
    }

    #[test]
    fn what_fits_stays_attached_without_a_break() {
        // 2 cores allow 10 % of one: 100 000 us a second; this costs 11 000 in a
        // loop, and 2.7 times as much where 100 us lie between two hits.
        let mut target = Simulation::new(governed(), 2.0, 10_000.0, 10_000.0);
        target.run(Duration::from_secs(10));
        assert_eq!(target.governor.tier(), Tier::Blocking);
        assert_eq!(target.switches, 1);
        let interval = target.governor.take_interval();
        assert_eq!((interval.lifecycle, interval.blocking), (1.0, 1.0));
        let percent = interval.overhead.percent;
        assert!((1.4..1.5).contains(&percent), "{percent}");
    }

    #[test]
    fn an_idle_target_stays_attached_within_the_floor() {
        // No CPU use worth a word: 0.5 % of a core is 5000 us; this costs 780.
        let mut target = Simulation::new(governed(), 0.001, 500.0, 500.0);
        target.run(Duration::from_secs(10));
        assert_eq!(target.switches, 1);
        assert_eq!(target.governor.take_interval().overhead.attached, 1.0);
    }

    #[test]
    fn what_does_not_fit_is_sampled_within_the_budget() {
        // 50 000 requests a second with 18 blocks and 2 spawns' hits each.
        let mut target = Simulation::new(governed(), 2.0, 100_000.0, 900_000.0);
        let worst = target.run(Duration::from_secs(30));
        // The budget is 0.1 s a second; the first windows come on top.
        assert!(worst < 0.17, "{worst}");
        let interval = target.governor.take_interval();
        assert_eq!(target.governor.tier(), Tier::Blocking);
        assert!(
            interval.blocking > 0.05 && interval.blocking < 0.25,
            "{interval:?}"
        );
        assert!(interval.overhead.percent < 5.2, "{interval:?}");
        assert!(interval.overhead.percent > 3.0, "{interval:?}");
    }

    #[test]
    fn the_tier_below_stays_attached_when_it_fits() {
        let mut target = Simulation::new(governed(), 2.0, 10_000.0, 900_000.0);
        target.run(Duration::from_secs(5));
        target.governor.take_interval();
        target.run(Duration::from_secs(20));
        let interval = target.governor.take_interval();
        assert!(interval.lifecycle > 0.999, "{interval:?}");
        assert!(
            interval.blocking > 0.05 && interval.blocking < 0.5,
            "{interval:?}"
        );
        assert!(interval.overhead.percent < 5.2, "{interval:?}");
    }

    #[test]
    fn what_hardly_fits_steps_down_and_comes_back() {
        // Blocking would cost 6 cores, of which 0.1 is allowed.
        let mut target = Simulation::new(governed(), 2.0, 10_000.0, 10_000_000.0);
        target.run(Duration::from_secs(5));
        assert_eq!(target.governor.tier(), Tier::Lifecycle);
        target.governor.take_interval();
        target.run(Duration::from_secs(60));
        let interval = target.governor.take_interval();
        assert_eq!(target.governor.tier(), Tier::Lifecycle);
        assert!(interval.lifecycle > 0.9, "{interval:?}");
        assert!(interval.overhead.percent < 5.2, "{interval:?}");
        // It calms down.
        target.blocking = 1000.0;
        target.run(Duration::from_secs(400));
        assert_eq!(target.governor.tier(), Tier::Blocking);
        target.governor.take_interval();
        target.run(Duration::from_secs(10));
        assert_eq!(target.governor.take_interval().blocking, 1.0);
    }

    #[test]
    fn nothing_fits_a_storm_of_spawns() {
        let mut target = Simulation::new(governed(), 0.1, 5_000_000.0, 5_000_000.0);
        target.run(Duration::from_secs(8));
        assert_eq!(target.governor.tier(), Tier::Census);
        let mut probed = 0;
        for _ in 0..60 {
            target.run(Duration::from_secs(1));
            probed += u64::from(target.governor.take_interval().overhead.hits > 0);
        }
        assert!(probed <= 6, "{probed}");
    }

    #[test]
    fn an_interval_without_a_reading_is_as_the_last_one_was() {
        let mut target = Simulation::new(governed(), 2.0, 1000.0, 1000.0);
        target.run(Duration::from_secs(2));
        let known = target.governor.take_interval();
        let empty = target.governor.take_interval();
        for interval in [known, empty] {
            let shares = (interval.lifecycle, interval.counted, interval.blocking);
            assert_eq!(shares, (1.0, 1.0, 1.0));
            assert_eq!(interval.overhead.attached, 1.0);
        }
        assert_eq!(empty.overhead.hits, 0);
        let mut new = governed();
        assert_eq!(new.take_interval().overhead.attached, 0.0);
    }

    #[test]
    fn what_others_pay_for_is_left_alone_while_they_do() {
        let mut target = Simulation::new(governed(), 2.0, 10_000.0, 10_000.0);
        target.run(Duration::from_secs(10));
        target.reading.others_pay = true;
        target.governor.take_interval();
        target.run(Duration::from_secs(60));
        assert_eq!(target.governor.tier(), Tier::Lifecycle);
        assert!(target.governor.yields());
        let interval = target.governor.take_interval();
        assert!(
            interval.blocking < 0.01 && interval.lifecycle > 0.99,
            "{interval:?}"
        );
        target.reading.others_pay = false;
        target.run(Duration::from_secs(1));
        assert_eq!(target.governor.tier(), Tier::Blocking);
        assert!(!target.governor.yields());
        assert_eq!(target.switches, 3);
    }

    #[test]
    fn what_was_given_up_does_not_come_back_for_the_others_sake() {
        // Nothing fits, and others pay now and then.
        let mut target = Simulation::new(governed(), 0.1, 5_000_000.0, 5_000_000.0);
        target.run(Duration::from_secs(8));
        assert_eq!(target.governor.tier(), Tier::Census);
        for others_pay in [true, false, true] {
            target.reading.others_pay = others_pay;
            target.run(Duration::from_millis(200));
            assert_eq!(target.governor.tier(), Tier::Census);
        }
    }

    #[test]
    fn a_fixed_tier_is_kept_though_others_pay() {
        let governor = Governor::fixed(COST, Tier::Blocking);
        let mut target = Simulation::new(governor, 0.1, 1e3, 1e3);
        target.reading.others_pay = true;
        target.run(Duration::from_secs(5));
        assert_eq!(
            (target.switches, target.governor.tier()),
            (1, Tier::Blocking)
        );
    }

    #[test]
    fn a_sudden_load_is_let_go_within_the_burst() {
        let mut target = Simulation::new(governed(), 2.0, 100.0, 100.0);
        target.run(Duration::from_secs(10));
        assert_eq!(target.governor.take_interval().blocking, 1.0);
        target.blocking = 900_000.0;
        let worst = target.run(Duration::from_secs(5));
        assert!(worst < 0.19, "{worst}");
    }

    #[test]
    fn a_fixed_tier_is_never_detached() {
        let governor = Governor::fixed(COST, Tier::Blocking);
        let mut target = Simulation::new(governor, 0.1, 1e6, 1e6);
        target.run(Duration::from_secs(5));
        assert_eq!(target.switches, 1);
        let interval = target.governor.take_interval();
        assert_eq!(interval.blocking, 1.0);
        assert_eq!(interval.overhead.budget_percent, None);
        assert!(interval.overhead.percent > 90.0);
    }

    #[test]
    fn hits_are_the_dearer_the_less_there_are() {
        for (own_each, part) in [(0.0, 0.0), (3e3, 0.5), (3e6, 0.999)] {
            let found = coldness(Some(1e3 * own_each), 1000);
            assert!((found - part).abs() < 0.001, "{found} for {part}");
        }
        assert_eq!(coldness(None, 1000), 0.5);
        assert_eq!(coldness(Some(0.0), 0), 0.0);
    }

    #[test]
    fn a_clock_that_stands_still_makes_no_hit_cheaper() {
        let mut governor = Governor::fixed(COST, Tier::Blocking);
        let mut reading = Reading {
            now: Duration::from_secs(1000),
            attached: Tier::Blocking,
            cpu: Some(Duration::ZERO),
            ..Reading::default()
        };
        governor.tick(reading);
        // It shows every second what the target has used of a core, and nothing between.
        for tick in 1..=100 {
            reading.now += Duration::from_millis(50);
            reading.hits.0[Role::Park.index()] += 500;
            if tick % 20 == 0 {
                reading.cpu = reading.cpu.map(|cpu| cpu + Duration::from_secs(1));
            }
            governor.tick(reading);
            if tick == 60 {
                governor.take_interval();
            }
        }
        let overhead = governor.take_interval().overhead;
        let each = overhead.cost_ns as f64 / overhead.hits as f64;
        assert!(each > 600.0 * (1.0 + COLD * 0.6), "{each}");
    }

    #[test]
    fn own_cpu_time_grows() {
        let before = cpu_time(std::process::id()).unwrap();
        let mut sum = 0u64;
        for value in 0..1_000_000u64 {
            sum = std::hint::black_box(sum ^ value);
        }
        assert!(cpu_time(std::process::id()).unwrap() > before);
        assert!(cpu_time(0x7fff_fff0).is_err());
    }
}
