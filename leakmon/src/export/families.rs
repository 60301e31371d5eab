//! Metrics of everything that is watched, as families of points: what Prometheus
//! and OpenTelemetry are given is the same.
//!
//! Names are OpenTelemetry's where it has one, and leakmon's own otherwise;
//! `docs/metrics.md` lists them all. Every family's points are bounded: a process
//! has as many sites as the configuration says, and no more than [`MAX_REASONS`]
//! wait reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::otlp::Sendings;
use crate::report::{FlowTotals, Runtime, RuntimeReport, Tasks};
use crate::task::{Histogram, SiteState};
use crate::watch::system::{ProcessSnapshot, Snapshot};

/// Wait reasons of a process and runtime that have a histogram of their own; what
/// comes behind them in the alphabet is together `other`. Go has 40 of them.
const MAX_REASONS: usize = 128;

/// Most bytes of a label's value that come from a process: whoever makes its
/// names longer does not make the metrics longer.
const MAX_VALUE: usize = 200;

/// Histogram buckets that are exported: those that end at 2^i nanoseconds, 1 us to
/// 73 min.
const BUCKETS: std::ops::RangeInclusive<u32> = 10..=42;
const BUCKET_STEP: usize = 2;

/// How the points of a family are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What is now.
    Gauge,
    /// What only grows.
    Counter,
    /// Durations.
    Histogram,
}

/// A label: its key is leakmon's, its value may be a process's.
pub type Label = (&'static str, Arc<str>);

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Int(i64),
    /// Another.
    Float(f64),
    /// Durations in seconds.
    Histogram {
        /// Of all.
        sum: f64,
        /// How many.
        count: u64,
        /// Upper bound, and how many are in this bucket alone; the last bound is
        /// infinite.
        buckets: Vec<(f64, u64)>,
    },
}

/// One point of a family.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Index in [`Snapshot::processes`]; `None`: leakmon itself.
    pub process: Option<usize>,
    /// What tells it from the family's other points.
    pub labels: Vec<Label>,
    /// Its value.
    pub value: Value,
}

/// All points of one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// With dots, as OpenTelemetry writes it.
    pub name: &'static str,
    /// As UCUM writes it: `s`, `By`, `1`, `{goroutine}`.
    pub unit: &'static str,
    /// One sentence without its full stop.
    pub help: &'static str,
    /// How the points are to be read.
    pub kind: Kind,
    /// The points.
    pub points: Vec<Point>,
}

/// Every name. The order is that of `/metrics`.
#[rustfmt::skip]
const FAMILIES: &[(&str, &str, Kind, &str)] = &[
    ("go.goroutine.count", "{goroutine}", Kind::Gauge, "Live goroutines, as runtime.NumGoroutine counts them"),
    ("process.thread.count", "{thread}", Kind::Gauge, "Threads of the process"),
    ("leakmon.tasks", "{task}", Kind::Gauge, "Live tasks by runtime and state"),
    ("leakmon.task.wait.oldest", "s", Kind::Gauge, "The longest that a task of the runtime has been blocked, at least"),
    ("leakmon.task.spawned", "{task}", Kind::Counter, "Tasks spawned while probes were attached"),
    ("leakmon.task.exited", "{task}", Kind::Counter, "Tasks that ended while probes were attached"),
    ("leakmon.task.wait.duration", "s", Kind::Histogram, "How long tasks were blocked, by wait reason"),
    ("leakmon.site.live", "{task}", Kind::Gauge, "Live tasks of a site, for the sites with the most live or blocked tasks"),
    ("leakmon.site.blocked", "{task}", Kind::Gauge, "Blocked tasks of a site, for the sites with the most live or blocked tasks"),
    ("leakmon.suspects", "{site}", Kind::Gauge, "Sites that look like a leak, by verdict"),
    ("leakmon.deadlocks", "{cycle}", Kind::Gauge, "Circles of tasks that wait for each other"),
    ("leakmon.census.duration", "s", Kind::Gauge, "How long the latest census took"),
    ("leakmon.census.age", "s", Kind::Gauge, "Since the latest census"),
    ("leakmon.census.difference", "{task}", Kind::Gauge, "Live tasks by census less what the probes expect"),
    ("leakmon.probe.hits", "{hit}", Kind::Gauge, "Probe hits in the latest interval"),
    ("leakmon.probe.overhead", "1", Kind::Gauge, "What the probes cost the process, of the CPU time that it uses itself"),
    ("leakmon.probe.dropped", "{hit}", Kind::Counter, "Probe hits that could not be counted, by reason"),
    ("leakmon.refused", "{process}", Kind::Gauge, "Processes that are not read, or not all of their runtimes, by reason"),
    ("leakmon.processes", "{process}", Kind::Gauge, "Processes that are watched"),
    ("leakmon.process.started", "{process}", Kind::Counter, "Processes of the machine that came since leakmon started"),
    ("leakmon.process.ended", "{process}", Kind::Counter, "Processes of the machine that went since leakmon started"),
    ("leakmon.process.lost", "{event}", Kind::Counter, "Words of the kernel that were lost: who came and went is not all counted"),
    ("leakmon.otlp.sent", "{message}", Kind::Counter, "Messages that the collector has taken"),
    ("leakmon.otlp.dropped", "{message}", Kind::Counter, "Messages that were given up, because the queue was full or the collector refused them"),
    ("leakmon.otlp.queued", "{message}", Kind::Gauge, "Messages that wait for the collector"),
    ("leakmon.self.cpu", "s", Kind::Counter, "CPU time that leakmon itself has used"),
    ("leakmon.self.memory", "By", Kind::Gauge, "Resident memory of leakmon itself"),
];

/// Puts points into families.
struct Builder {
    families: Vec<Family>,
    index: BTreeMap<&'static str, usize>,
    process: Option<usize>,
    base: Vec<Label>,
}

impl Builder {
    fn new() -> Builder {
        let families: Vec<Family> = FAMILIES
            .iter()
            .map(|&(name, unit, kind, help)| Family {
                name,
                unit,
                help,
                kind,
                points: Vec::new(),
            })
            .collect();
        let index = families
            .iter()
            .enumerate()
            .map(|(i, f)| (f.name, i))
            .collect();
        Builder {
            families,
            index,
            process: None,
            base: Vec::new(),
        }
    }

    fn add(&mut self, name: &'static str, labels: &[Label], value: Value) {
        // Every name that is used is in the table; a test sees to it.
        if let Some(index) = self.index.get(name) {
            let labels = self.base.iter().chain(labels).cloned().collect();
            self.families[*index].points.push(Point {
                process: self.process,
                labels,
                value,
            });
        }
    }

    fn int(&mut self, name: &'static str, labels: &[Label], value: u64) {
        self.add(
            name,
            labels,
            Value::Int(i64::try_from(value).unwrap_or(i64::MAX)),
        );
    }

    fn float(&mut self, name: &'static str, labels: &[Label], value: f64) {
        self.add(name, labels, Value::Float(value));
    }
}

/// The families of everything in `snapshot`, with `top` sites of each process and
/// runtime by live and as many by blocked tasks, and what became of the messages to
/// a collector, where there is one.
pub fn of(snapshot: &Snapshot, top: usize, sendings: Option<&Sendings>) -> Vec<Family> {
    let mut builder = Builder::new();
    let mut refused: BTreeMap<Arc<str>, u64> = BTreeMap::new();
    for (index, process) in snapshot.processes.iter().enumerate() {
        builder.process = Some(index);
        builder.base = labels_of(process);
        builder.int("process.thread.count", &[], process.row.threads);
        if let Some(why) = &process.row.not_read {
            *refused.entry(reason_of(why)).or_default() += 1;
        }
        let Some(report) = &process.report else {
            continue;
        };
        // Until now, not until the snapshot: who reads may have stopped.
        let age = snapshot.taken.elapsed()
            + snapshot
                .at
                .duration_since(report.when.at)
                .unwrap_or_default();
        builder.float("leakmon.census.age", &[], age.as_secs_f64());
        for RuntimeReport { runtime, tasks } in &report.runtimes {
            if let Ok(tasks) = tasks {
                runtime_of(&mut builder, runtime, tasks, top);
            }
        }
    }
    builder.process = None;
    builder.base.clear();
    for (reason, count) in refused {
        builder.int("leakmon.refused", &[("reason", reason)], count);
    }
    let processes = snapshot.processes.len() as u64;
    builder.int("leakmon.processes", &[], processes);
    builder.int("leakmon.process.started", &[], snapshot.came);
    builder.int("leakmon.process.ended", &[], snapshot.went);
    builder.int("leakmon.process.lost", &[], snapshot.lost);
    if let Some(own) = &snapshot.own {
        builder.float("leakmon.self.cpu", &[], own.cpu.as_secs_f64());
        builder.int("leakmon.self.memory", &[], own.resident);
    }
    if let Some(sendings) = sendings {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        builder.int("leakmon.otlp.sent", &[], value(&sendings.sent));
        builder.int("leakmon.otlp.dropped", &[], value(&sendings.dropped));
        builder.int("leakmon.otlp.queued", &[], value(&sendings.queued));
    }
    builder.families
}

/// What tells a process from every other, and what people group by.
fn labels_of(process: &ProcessSnapshot) -> Vec<Label> {
    let mut labels: Vec<Label> = vec![
        ("pid", process.row.pid.to_string().into()),
        ("executable", bounded(&process.row.name)),
    ];
    let placement = &process.placement;
    for (key, value) in [
        ("service", process.service.as_deref()),
        ("container", placement.container.as_deref()),
        ("pod_uid", placement.pod.as_deref()),
    ] {
        if let Some(value) = value {
            labels.push((key, bounded(value)));
        }
    }
    labels
}

fn runtime_of(builder: &mut Builder, runtime: &Runtime, tasks: &Tasks, top: usize) {
    let name: Label = ("runtime", runtime.name.into());
    let only = std::slice::from_ref(&name);
    if runtime.name == "go" {
        builder.int("go.goroutine.count", &[], tasks.count);
    }
    for (state, count) in &tasks.states {
        let labels = [name.clone(), ("state", state.name().into())];
        builder.int("leakmon.tasks", &labels, *count);
    }
    let oldest = tasks
        .sites
        .iter()
        .filter_map(|site| site.state.oldest)
        .max();
    builder.float(
        "leakmon.task.wait.oldest",
        only,
        oldest.map_or(0.0, |oldest| oldest.as_secs_f64()),
    );
    builder.float(
        "leakmon.census.duration",
        only,
        tasks.census_took.as_secs_f64(),
    );
    builder.int("leakmon.deadlocks", only, tasks.cycles.len() as u64);
    let mut verdicts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for verdict in tasks.suspects().filter_map(|site| site.verdict.as_ref()) {
        *verdicts.entry(verdict.kind.name()).or_default() += 1;
    }
    for kind in crate::leak::VerdictKind::ALL {
        let labels = [name.clone(), ("verdict", kind.name().into())];
        let count = verdicts.get(kind.name()).copied().unwrap_or(0);
        builder.int("leakmon.suspects", &labels, count);
    }
    let states: Vec<&SiteState> = tasks.sites.iter().map(|site| &site.state).collect();
    for site in top_sites(&states, top) {
        let function = site.site.entry.as_ref().map_or("", |frame| &frame.function);
        let labels = [
            name.clone(),
            ("site", site.id.to_string().into()),
            ("function", bounded(function)),
        ];
        builder.int("leakmon.site.live", &labels, site.live);
        builder.int("leakmon.site.blocked", &labels, site.blocked);
    }
    if let Some(flow) = &tasks.flow {
        flow_of(builder, &name, flow);
        waits_of(builder, &name, &states);
    }
}

fn flow_of(builder: &mut Builder, name: &Label, flow: &FlowTotals) {
    let only = std::slice::from_ref(name);
    builder.int("leakmon.task.spawned", only, flow.spawned);
    builder.int("leakmon.task.exited", only, flow.exited);
    builder.int("leakmon.probe.hits", only, flow.overhead.hits);
    builder.float(
        "leakmon.probe.overhead",
        only,
        flow.overhead.percent / 100.0,
    );
    for (reason, count) in &flow.dropped {
        let labels = [name.clone(), ("reason", (*reason).into())];
        builder.int("leakmon.probe.dropped", &labels, *count);
    }
    if let Some(reconciliation) = &flow.reconciliation {
        // What the uncertainty explains is no difference.
        let beyond = reconciliation.difference.unsigned_abs() > reconciliation.uncertainty;
        let difference = if beyond { reconciliation.difference } else { 0 };
        builder.add("leakmon.census.difference", only, Value::Int(difference));
    }
}

/// Durations by reason, all sites together.
fn waits_of(builder: &mut Builder, name: &Label, sites: &[&SiteState]) {
    let mut by_reason: BTreeMap<Arc<str>, Histogram> = BTreeMap::new();
    for wait in sites.iter().flat_map(|site| &site.waits) {
        if let Some(durations) = &wait.durations {
            by_reason
                .entry(Arc::clone(&wait.reason))
                .or_default()
                .add(durations);
        }
    }
    // By name, so that the choice stays the same while they grow.
    let mut other: Option<Histogram> = None;
    let mut told: Vec<(Arc<str>, Histogram)> = Vec::new();
    for (reason, histogram) in by_reason {
        match told.len() < MAX_REASONS {
            true => told.push((reason, histogram)),
            false => other.get_or_insert_default().add(&histogram),
        }
    }
    told.extend(other.map(|other| ("other".into(), other)));
    for (reason, histogram) in told {
        let labels = [name.clone(), ("reason", bounded(&reason))];
        builder.add("leakmon.task.wait.duration", &labels, seconds(&histogram));
    }
}

/// The sites with the most live, and those with the most blocked tasks.
fn top_sites<'a>(sites: &[&'a SiteState], top: usize) -> Vec<&'a SiteState> {
    let mut chosen = BTreeSet::new();
    let keys: [fn(&SiteState) -> u64; 2] = [|site| site.live, |site| site.blocked];
    for key in keys {
        let mut order: Vec<usize> = (0..sites.len()).filter(|i| key(sites[*i]) > 0).collect();
        order.sort_by_key(|i| std::cmp::Reverse(key(sites[*i])));
        chosen.extend(order.into_iter().take(top));
    }
    // Two sites with one name would be two points with the same labels.
    let mut seen = BTreeSet::new();
    chosen
        .into_iter()
        .map(|i| sites[i])
        .filter(|site| seen.insert(site.id))
        .collect()
}

fn seconds(histogram: &Histogram) -> Value {
    let mut buckets = Vec::new();
    let mut from = 0;
    for end in BUCKETS.step_by(BUCKET_STEP) {
        let end_index = end as usize;
        let count = histogram.buckets[from..end_index].iter().sum();
        buckets.push((f64::from(end).exp2() / 1e9, count));
        from = end_index;
    }
    buckets.push((f64::INFINITY, histogram.buckets[from..].iter().sum()));
    Value::Histogram {
        sum: histogram.total_ns as f64 / 1e9,
        count: histogram.count(),
        buckets,
    }
}

/// A label's value, from a process's own words.
pub(super) fn bounded(text: &str) -> Arc<str> {
    let mut end = text.len().min(MAX_VALUE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].into()
}

/// The kind of a refusal: without the figures and names that make each its own.
fn reason_of(why: &str) -> Arc<str> {
    const KINDS: [(&str, &str); 8] = [
        ("32-bit", "32-bit program"),
        ("obfuscated", "obfuscated"),
        ("does not know", "unknown version"),
        ("or older", "version too old"),
        ("not permitted", "not permitted"),
        ("CAP_", "capability missing"),
        ("no task vtable", "unknown version"),
        ("kernel thread", "kernel thread"),
    ];
    let kind = KINDS.iter().find(|(words, _)| why.contains(words));
    kind.map_or("other", |(_, kind)| kind).into()
}
