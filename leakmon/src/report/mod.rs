//! Pure views of the model.
//!
//! A [`Report`] is everything that one interval's report shows; [`table`] and
//! [`json`] draw it. [`stacks`] draws a [`Dump`](crate::task::Dump) of every
//! task. Nothing here reads a process.

pub mod json;
pub mod overview;
pub mod stacks;
pub mod table;

#[cfg(test)]
pub(crate) mod sample;
mod text;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::leak::{History, Verdict};
use crate::task::{
    Classify, Coverage, Cycle, Flow, Overhead, Population, Rates, Reconciliation, Runs, Scheduler,
    SiteFlow, SiteState, State, Tier, merge,
};

/// The process that a report is about.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its id in leakmon's own PID namespace.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat).
    /// With `pid` it names the process for ever.
    pub start_time: u64,
    /// The file it runs, as the process sees it.
    pub executable: PathBuf,
    /// Its command line.
    pub command: Vec<String>,
}

/// A runtime found in a process.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// `go`.
    pub name: &'static str,
    /// What it calls its tasks, in the plural: `goroutines`.
    pub tasks: &'static str,
    /// The runtime's version as it prints itself: `go1.26.8`; empty where it has
    /// none.
    pub version: String,
}

/// Why a process is watched at its tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TierReason {
    /// Nothing has been attached yet.
    Pending,
    /// A single census was asked for.
    Once,
    /// The user asked for it.
    Fixed,
    /// It is the highest, and it stays within the budget.
    Governed,
    /// A higher one would exceed the budget.
    SteppedDown,
    /// A higher one would look at every switch of the machine's threads, and
    /// programs that nobody watches switch so often that they would pay for it.
    OthersPay,
    /// A higher one is not possible here, for this reason.
    Unavailable(String),
}

impl TierReason {
    /// The word in machine-readable reports.
    pub fn name(&self) -> &'static str {
        match self {
            TierReason::Pending => "pending",
            TierReason::Once => "once",
            TierReason::Fixed => "fixed",
            TierReason::Governed => "governed",
            TierReason::SteppedDown => "stepped_down",
            TierReason::OthersPay => "others_pay",
            TierReason::Unavailable(_) => "unavailable",
        }
    }
}

/// What probes measured, for a [`Report`].
#[derive(Clone, Copy, Debug)]
pub struct Probed<'a> {
    /// Everything counted since they were attached.
    pub flow: &'a Flow,
    /// Spawns and exits a second over the last interval.
    pub rates: Rates,
    /// Census against probes; `None` when there is nothing to compare yet.
    pub reconciliation: Option<Reconciliation>,
    /// What they cost the target over the last interval.
    pub overhead: Overhead,
    /// How much they saw.
    pub coverage: Coverage,
}

/// What was seen of a process's tasks in one interval.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// How much is attached.
    pub tier: Tier,
    /// Why so much.
    pub tier_reason: &'a TierReason,
    /// The census.
    pub population: &'a Population,
    /// What its wait reasons let one conclude.
    pub classify: Classify,
    /// What the probes measured; `None` at [`Tier::Census`].
    pub probed: Option<Probed<'a>>,
}

/// When a report was made.
#[derive(Clone, Copy, Debug)]
pub struct When {
    /// Wall clock.
    pub at: SystemTime,
    /// Since the watch of this process began.
    pub elapsed: Duration,
    /// Between two reports.
    pub interval: Duration,
}

/// One interval's report on one process.
#[derive(Clone, Debug)]
pub struct Report {
    /// When it was made.
    pub when: When,
    /// On which process.
    pub process: Process,
    /// Threads of the process.
    pub threads: u64,
    /// Every runtime found in it.
    pub runtimes: Vec<RuntimeReport>,
}

/// One runtime in a [`Report`].
#[derive(Clone, Debug)]
pub struct RuntimeReport {
    /// Which.
    pub runtime: Runtime,
    /// Its tasks; or why they cannot be read, and what would help.
    pub tasks: Result<Tasks, String>,
}

/// The tasks that a runtime keeps in a process, in a [`Report`].
#[derive(Clone, Debug)]
pub struct Tasks {
    /// How much is attached.
    pub tier: Tier,
    /// Why so much.
    pub tier_reason: TierReason,
    /// Live tasks, by the runtime's own definition.
    pub count: u64,
    /// Tasks of the runtime itself, not in `count`.
    pub system: u64,
    /// Tasks that changed while they were read.
    pub unstable: u64,
    /// Tasks whose place is not told, because there are too many stacks.
    pub untold: u64,
    /// `count` by state.
    pub states: BTreeMap<State, u64>,
    /// How long the census took.
    pub census_took: Duration,
    /// What the probes measured; `None` at [`Tier::Census`].
    pub flow: Option<FlowTotals>,
    /// Whether there have been enough censuses to tell a leak.
    pub judged: bool,
    /// Waits whose past is not followed, because too many are.
    pub untracked_waits: u64,
    /// Tasks that wait for each other in a circle.
    pub cycles: Vec<Cycle>,
    /// What keeps the tasks, where a process may have several.
    pub schedulers: Vec<Scheduler>,
    /// What else is wrong, in sentences.
    pub warnings: Vec<String>,
    /// Sites, those with the most live tasks first.
    pub sites: Vec<SiteReport>,
}

/// What the probes measured, all sites together.
#[derive(Clone, Debug)]
pub struct FlowTotals {
    /// Tasks spawned since the probes were attached.
    pub spawned: u64,
    /// Tasks that ended since then.
    pub exited: u64,
    /// Times that tasks ran, where the probes count it.
    pub runs: Option<Runs>,
    /// Spawns and exits a second, over the last interval.
    pub rates: Rates,
    /// Hits that could not be counted, by reason.
    pub dropped: BTreeMap<&'static str, u64>,
    /// Census against probes.
    pub reconciliation: Option<Reconciliation>,
    /// What the probes cost the target.
    pub overhead: Overhead,
    /// How much they saw.
    pub coverage: Coverage,
}

impl FlowTotals {
    /// The probes were attached for only a part of the interval, so that their
    /// counts are a sample.
    pub fn sampled(&self) -> bool {
        self.overhead.attached < 1.0
    }
}

/// One site in a [`Report`].
#[derive(Clone, Debug)]
pub struct SiteReport {
    /// What is known of it now.
    pub state: SiteState,
    /// Change of the live count since the watch began, a minute: what was
    /// gained or lost since, over the time. `None` in the first interval.
    pub per_minute: Option<f64>,
    /// Why it looks like a leak, if it does.
    pub verdict: Option<Verdict>,
}

impl Tasks {
    /// The tasks of an interval; `history` takes the interval in, `elapsed`
    /// after the watch began.
    pub fn new(elapsed: Duration, observation: Observation<'_>, history: &mut History) -> Tasks {
        let population = observation.population;
        let flow = observation.probed.map(|probed| probed.flow);
        let sites = merge(population, flow, observation.classify);
        history.observe(elapsed, &sites);
        let flow = observation.probed.map(|probed| {
            let mut totals = SiteFlow::default();
            for (_, counts) in &probed.flow.sites {
                totals.add(*counts);
            }
            FlowTotals {
                spawned: totals.spawned,
                exited: totals.exited,
                runs: totals.runs,
                rates: probed.rates,
                dropped: probed.flow.dropped.clone(),
                reconciliation: probed.reconciliation,
                overhead: probed.overhead,
                coverage: probed.coverage,
            }
        });
        Tasks {
            tier: observation.tier,
            tier_reason: observation.tier_reason.clone(),
            count: population.count,
            system: population.system,
            unstable: population.unstable,
            untold: population.untold,
            states: population.states.clone(),
            census_took: population.took,
            flow,
            judged: history.can_judge(),
            untracked_waits: history.untracked(),
            cycles: population.cycles.clone(),
            schedulers: population.schedulers.clone(),
            warnings: population.warnings.clone(),
            sites: sites
                .into_iter()
                .map(|state| SiteReport {
                    per_minute: history.per_minute(&state),
                    verdict: history.judge(&state),
                    state,
                })
                .collect(),
        }
    }

    /// Sites that look like a leak.
    pub fn suspects(&self) -> impl Iterator<Item = &SiteReport> {
        self.sites.iter().filter(|site| site.verdict.is_some())
    }

    /// Whether there is anything that a person should look at.
    pub fn is_suspicious(&self) -> bool {
        !self.cycles.is_empty() || !self.warnings.is_empty() || self.suspects().next().is_some()
    }
}
