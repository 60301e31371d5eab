//! The probes of one runtime in one process, and what they saw between two
//! censuses.

use std::time::{Duration, Instant};

use crate::probe::{Counts, Driver, Governor, Tier};
use crate::report::{self, Observation, Probed, TierReason};
use crate::runtime::{Refusal, Tasks};
use crate::task::{Checkpoint, Coverage, Flow, rates, reconcile};

use super::{KernelSide, Live, Options, WatchError};

/// What is to be attached.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// The tier that was asked for.
    pub(super) fixed: Option<Tier>,
    /// The highest that is sensible.
    pub(super) highest: Tier,
    /// In percent of the process's CPU time.
    pub(super) max_overhead: f64,
}

/// Why a runtime has no probes, or its probes.
pub(super) enum Attachment {
    /// Not tried yet.
    Pending,
    /// It stays at the census, for this reason.
    None(TierReason),
    Probing(Box<Probing>),
}

/// What probes need between two intervals.
pub(super) struct Probing {
    driver: Driver,
    highest: Tier,
    unavailable: Option<String>,
    /// A census since which spawns and exits were counted without a break.
    base: Option<(Checkpoint, u64)>,
    /// What had been counted at the last report, and when that was.
    before: Flow,
    counted_at: Instant,
}

impl Attachment {
    pub(super) fn attach(
        tasks: &mut dyn Tasks,
        pid: u32,
        wanted: Wanted,
        kernel: &KernelSide,
    ) -> Result<Attachment, WatchError> {
        let probes = tasks.probes().map_err(|refusal| match refusal {
            Refusal::Unreadable(why) => WatchError::NoPlaces(why),
            refusal => WatchError::Refusal(refusal),
        })?;
        let highest = wanted.highest.min(probes.highest_tier());
        if let (Some(Tier::Blocking), Some(why)) = (wanted.fixed, &probes.blocking_refused) {
            return Err(WatchError::NoPlaces(why.clone()));
        }
        let drivers = kernel.drivers();
        let (kernel, calibration) = kernel.probing()?;
        let roles = probes.plan.places.iter().map(|place| place.role);
        let cost = calibration.of(kernel, roles);
        let attached = match wanted.fixed {
            // Whatever it costs, it costs this process alone.
            Some(_) => kernel.attach(pid, &probes.plan, Tier::Census),
            None => kernel.join(pid, &probes.plan),
        };
        let mut attached = attached.map_err(|error| WatchError::from(&error))?;
        attached
            .know_threads(&tasks.known_threads())
            .map_err(|error| WatchError::from(&error))?;
        let governor = match wanted.fixed {
            Some(tier) => Governor::fixed(cost, tier.min(highest)),
            None => Governor::governed(cost, wanted.max_overhead, highest),
        };
        Ok(Attachment::Probing(Box::new(Probing {
            driver: drivers.start(attached, governor, pid),
            highest: wanted.fixed.map_or(highest, |tier| tier.min(highest)),
            unavailable: probes
                .blocking_refused
                .filter(|_| wanted.highest == Tier::Blocking),
            base: None,
            before: Flow::default(),
            counted_at: Instant::now(),
        })))
    }
}

impl Live {
    /// A census, held against what the probes counted.
    pub(super) fn observe(
        &mut self,
        elapsed: Duration,
        options: &Options,
    ) -> Result<report::Tasks, Refusal> {
        let classify = self.tasks.classify();
        let Attachment::Probing(probing) = &mut self.attachment else {
            let population = self.tasks.population(None)?;
            let pending = TierReason::Pending;
            let tier_reason = match &self.attachment {
                Attachment::None(reason) => reason,
                _ => &pending,
            };
            let observation = Observation {
                tier: Tier::Census,
                tier_reason,
                population: &population,
                classify,
                probed: None,
            };
            return Ok(report::Tasks::new(elapsed, observation, &mut self.history));
        };
        let before_status = probing.driver.status();
        let before = probing.driver.counts();
        let mut stacks = || match probing.driver.creation_stacks() {
            Ok(stacks) => stacks,
            Err(error) => {
                tracing::info!("where threads are made stays unknown: {error}");
                Vec::new()
            }
        };
        if let Ok(before) = &before {
            self.tasks.use_stacks(before, &mut stacks);
        }
        let population = self.tasks.population(before.as_ref().ok())?;
        let after = probing.driver.counts();
        let status = probing.driver.status();
        let interval = probing.driver.take_interval();
        let mut learned = Ok(());
        // What was there before the probes has now been seen while they were.
        if status.learning
            && before_status.attached >= Tier::Lifecycle
            && before_status.gaps == status.gaps
        {
            learned = probing.driver.learned(&self.tasks.known());
        }
        let failed = match (&before, &after, &learned) {
            (Ok(_), Ok(_), Ok(())) => status.failed.clone(),
            (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => Some(error.to_string()),
        };
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        if let Some(error) = failed {
            let reason = TierReason::Unavailable(error);
            let observation = Observation {
                tier: Tier::Census,
                tier_reason: &reason,
                population: &population,
                classify,
                probed: None,
            };
            let tasks = report::Tasks::new(elapsed, observation, &mut self.history);
            self.attachment = Attachment::None(reason);
            return Ok(tasks);
        }
        let unbroken = !before_status.learning
            && before_status.attached >= Tier::Lifecycle
            && status.attached >= Tier::Lifecycle
            && before_status.gaps == status.gaps;
        let totals = |counts: &Counts| self.tasks.totals(counts);
        let checkpoint = Checkpoint::new(&population, totals(&before), totals(&after))
            .less_certain_by(before.moved + after.moved);
        let reconciliation = match &probing.base {
            Some((base, gaps)) if unbroken && *gaps == status.gaps => {
                Some(reconcile(base, &checkpoint))
            }
            _ => {
                probing.base = unbroken.then_some((checkpoint, status.gaps));
                None
            }
        };
        self.tasks.use_stacks(&after, &mut stacks);
        let flow = self.tasks.flow(&after);
        let counted_at = Instant::now();
        let since = counted_at.duration_since(probing.counted_at);
        probing.counted_at = counted_at;
        let attached = since.mul_f64(interval.counted.clamp(0.0, 1.0));
        let probed = Probed {
            flow: &flow,
            rates: rates(&probing.before, &flow, attached),
            reconciliation,
            overhead: interval.overhead,
            coverage: Coverage {
                spawns: interval.counted,
                waits: interval.blocking,
                all_spawns: status.gaps == 0,
                all_waits: status.wait_gaps == 0 && status.tier >= Tier::Blocking,
            },
        };
        let tier_reason = match (&probing.unavailable, options.tier) {
            _ if status.yields && status.tier == Tier::Lifecycle => TierReason::OthersPay,
            _ if status.tier < probing.highest => TierReason::SteppedDown,
            (_, Some(_)) => TierReason::Fixed,
            (Some(why), None) => TierReason::Unavailable(why.clone()),
            (None, None) => TierReason::Governed,
        };
        let observation = Observation {
            tier: status.tier,
            tier_reason: &tier_reason,
            population: &population,
            classify,
            probed: (status.tier > Tier::Census || interval.lifecycle > 0.0).then_some(probed),
        };
        let tasks = report::Tasks::new(elapsed, observation, &mut self.history);
        probing.before = flow;
        Ok(tasks)
    }
}
