//! The report that programs read: one JSON object per interval, on one line.
//! `docs/json.md` describes every field.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde_json::ser::Formatter;

use super::{FlowTotals, Report, RuntimeReport, SiteReport, Tasks};
use crate::task::{Cycle, CycleMember, Frame, Histogram, Runs, WaitState};

/// Version of the schema. It grows when a field changes or goes, not when one
/// is added.
pub const SCHEMA_VERSION: u32 = 2;

#[derive(Serialize)]
struct ReportJson<'a> {
    schema_version: u32,
    time_unix_seconds: f64,
    elapsed_seconds: f64,
    interval_seconds: f64,
    process: ProcessJson<'a>,
    threads: u64,
    runtimes: Vec<RuntimeReportJson<'a>>,
}

#[derive(Serialize)]
struct RuntimeReportJson<'a> {
    runtime: RuntimeJson<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<TierJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tasks: Option<TasksJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probes: Option<ProbesJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cycles: Option<Vec<CycleJson<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warnings: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sites: Option<Vec<SiteJson<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sites_omitted: Option<u64>,
}

#[derive(Serialize)]
struct ProcessJson<'a> {
    pid: u32,
    start_time_ticks: u64,
    executable: std::borrow::Cow<'a, str>,
    command: &'a [String],
}

#[derive(Serialize)]
struct RuntimeJson<'a> {
    name: &'a str,
    version: &'a str,
}

#[derive(Serialize)]
struct TierJson<'a> {
    name: &'a str,
    reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
}

#[derive(Serialize)]
struct TasksJson {
    live: u64,
    system: u64,
    unstable: u64,
    untold: u64,
    by_state: BTreeMap<&'static str, u64>,
    census_seconds: f64,
    judged: bool,
    untracked_waits: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    schedulers: Vec<SchedulerJson>,
}

#[derive(Serialize)]
struct SchedulerJson {
    id: u64,
    live: u64,
}

#[derive(Serialize)]
struct ProbesJson<'a> {
    sampled: bool,
    attached_ratio: f64,
    spawns_attached_ratio: f64,
    waits_attached_ratio: f64,
    spawns_complete: bool,
    waits_complete: bool,
    spawned: u64,
    exited: u64,
    runs: Option<RunsJson>,
    spawned_per_second: f64,
    exited_per_second: f64,
    dropped_hits: &'a BTreeMap<&'static str, u64>,
    census_difference: Option<i64>,
    census_uncertainty: Option<u64>,
    overhead: OverheadJson,
}

#[derive(Serialize)]
struct RunsJson {
    count: u64,
    busy_seconds: f64,
    longest_seconds: f64,
}

impl RunsJson {
    fn new(runs: &Runs) -> RunsJson {
        RunsJson {
            count: runs.count,
            busy_seconds: runs.busy_ns as f64 / 1e9,
            longest_seconds: runs.longest_ns as f64 / 1e9,
        }
    }
}

#[derive(Serialize)]
struct CycleJson<'a> {
    members: Vec<CycleMemberJson<'a>>,
    doubt: Option<&'a str>,
}

#[derive(Serialize)]
struct CycleMemberJson<'a> {
    task_id: u64,
    name: Option<&'a str>,
    lock: Option<String>,
    place: Option<FrameJson<'a>>,
}

impl<'a> CycleJson<'a> {
    fn new(cycle: &'a Cycle) -> CycleJson<'a> {
        let member = |member: &'a CycleMember| CycleMemberJson {
            task_id: member.task,
            name: member.name.as_deref(),
            lock: member.lock.map(|lock| format!("{lock:#x}")),
            place: member.place.as_ref().map(FrameJson::new),
        };
        CycleJson {
            members: cycle.members.iter().map(member).collect(),
            doubt: cycle.doubt.as_deref(),
        }
    }
}

#[derive(Serialize)]
struct OverheadJson {
    hits: u64,
    cost_seconds: f64,
    target_cpu_seconds: f64,
    ratio: f64,
    core_ratio: f64,
    budget_ratio: Option<f64>,
}

#[derive(Serialize)]
struct SiteJson<'a> {
    id: String,
    created_by: Option<FrameJson<'a>>,
    entry: Option<FrameJson<'a>>,
    live: u64,
    change_per_minute: Option<f64>,
    blocked: u64,
    not_run: u64,
    oldest_wait_seconds: Option<f64>,
    by_state: BTreeMap<&'static str, u64>,
    spawned: Option<u64>,
    exited: Option<u64>,
    runs: Option<RunsJson>,
    doubt: Option<&'a str>,
    blocked_durations: Option<DurationsJson>,
    waits: Vec<WaitJson<'a>>,
    verdict: Option<VerdictJson<'a>>,
}

#[derive(Serialize)]
struct WaitJson<'a> {
    reason: &'a str,
    place: Option<FrameJson<'a>>,
    count: u64,
    not_run: u64,
    leaked: u64,
    oldest_wait_seconds: Option<f64>,
    sample_task_id: Option<u64>,
    resumes: Option<u64>,
    blocked_durations: Option<DurationsJson>,
}

#[derive(Serialize)]
pub(super) struct FrameJson<'a> {
    pub(super) function: &'a str,
    pub(super) file: &'a str,
    pub(super) line: u32,
}

#[derive(Serialize)]
struct DurationsJson {
    count: u64,
    total_seconds: f64,
    median_seconds: Option<f64>,
    p99_seconds: Option<f64>,
    log2_nanoseconds: BTreeMap<u32, u64>,
}

#[derive(Serialize)]
struct VerdictJson<'a> {
    kind: &'static str,
    sentence: &'a str,
    wait: usize,
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}

impl<'a> FrameJson<'a> {
    pub(super) fn new(frame: &'a Frame) -> FrameJson<'a> {
        FrameJson {
            function: &frame.function,
            file: &frame.file,
            line: frame.line,
        }
    }
}

impl DurationsJson {
    fn new(histogram: &Histogram) -> DurationsJson {
        DurationsJson {
            count: histogram.count(),
            total_seconds: histogram.total_ns as f64 / 1e9,
            median_seconds: histogram.quantile(0.5).map(seconds),
            p99_seconds: histogram.quantile(0.99).map(seconds),
            log2_nanoseconds: (0..)
                .zip(histogram.buckets)
                .filter(|(_, count)| *count > 0)
                .collect(),
        }
    }
}

impl<'a> WaitJson<'a> {
    fn new(wait: &'a WaitState) -> WaitJson<'a> {
        WaitJson {
            reason: &wait.reason,
            place: wait.place.as_ref().map(FrameJson::new),
            count: wait.count,
            not_run: wait.not_run,
            leaked: wait.leaked,
            oldest_wait_seconds: wait.oldest.map(seconds),
            sample_task_id: wait.sample,
            resumes: wait.resumes,
            blocked_durations: wait.durations.as_ref().map(DurationsJson::new),
        }
    }
}

impl<'a> SiteJson<'a> {
    fn new(site: &'a SiteReport) -> SiteJson<'a> {
        let state = &site.state;
        SiteJson {
            id: state.id.to_string(),
            created_by: state.site.created_by.as_ref().map(FrameJson::new),
            entry: state.site.entry.as_ref().map(FrameJson::new),
            live: state.live,
            change_per_minute: site.per_minute,
            blocked: state.blocked,
            not_run: state.not_run,
            oldest_wait_seconds: state.oldest.map(seconds),
            by_state: state.states.iter().map(|(s, n)| (s.name(), *n)).collect(),
            spawned: state.spawned,
            exited: state.exited,
            runs: state.runs.as_ref().map(RunsJson::new),
            doubt: state.site.doubt.as_deref(),
            blocked_durations: state.durations().as_ref().map(DurationsJson::new),
            waits: state.waits.iter().map(WaitJson::new).collect(),
            verdict: site.verdict.as_ref().map(|verdict| VerdictJson {
                kind: verdict.kind.name(),
                sentence: &verdict.sentence,
                wait: verdict.wait,
            }),
        }
    }
}

impl<'a> ProbesJson<'a> {
    fn new(flow: &'a FlowTotals) -> ProbesJson<'a> {
        let overhead = &flow.overhead;
        ProbesJson {
            sampled: flow.sampled(),
            attached_ratio: overhead.attached,
            spawns_attached_ratio: flow.coverage.spawns,
            waits_attached_ratio: flow.coverage.waits,
            spawns_complete: flow.coverage.all_spawns,
            waits_complete: flow.coverage.all_waits,
            spawned: flow.spawned,
            exited: flow.exited,
            runs: flow.runs.as_ref().map(RunsJson::new),
            spawned_per_second: flow.rates.spawned_per_second,
            exited_per_second: flow.rates.exited_per_second,
            dropped_hits: &flow.dropped,
            census_difference: flow.reconciliation.map(|held| held.difference),
            census_uncertainty: flow.reconciliation.map(|held| held.uncertainty),
            overhead: OverheadJson {
                hits: overhead.hits,
                cost_seconds: overhead.cost_ns as f64 / 1e9,
                target_cpu_seconds: overhead.target_cpu_ns as f64 / 1e9,
                ratio: overhead.percent / 100.0,
                core_ratio: overhead.core_percent / 100.0,
                budget_ratio: overhead.budget_percent.map(|percent| percent / 100.0),
            },
        }
    }
}

impl TasksJson {
    fn new(tasks: &Tasks) -> TasksJson {
        TasksJson {
            live: tasks.count,
            system: tasks.system,
            unstable: tasks.unstable,
            untold: tasks.untold,
            by_state: tasks.states.iter().map(|(s, n)| (s.name(), *n)).collect(),
            census_seconds: seconds(tasks.census_took),
            judged: tasks.judged,
            untracked_waits: tasks.untracked_waits,
            schedulers: tasks
                .schedulers
                .iter()
                .map(|scheduler| SchedulerJson {
                    id: scheduler.id,
                    live: scheduler.live,
                })
                .collect(),
        }
    }
}

/// JSON on one line in which no character of a string can act on a terminal:
/// DEL and the C1 controls are escaped, as JSON escapes the others.
pub(super) struct Line;

impl Formatter for Line {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        let mut rest = fragment;
        while let Some((at, c)) = rest
            .char_indices()
            .find(|(_, c)| matches!(c, '\u{7f}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'))
        {
            let (before, after) = rest.split_at(at);
            writer.write_all(before.as_bytes())?;
            write!(writer, "\\u{:04x}", u32::from(c))?;
            rest = &after[c.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

impl<'a> RuntimeReportJson<'a> {
    fn new(report: &'a RuntimeReport, top: usize) -> RuntimeReportJson<'a> {
        let tasks = report.tasks.as_ref().ok();
        let sites: Option<Vec<SiteJson<'_>>> = tasks.map(|tasks| {
            tasks
                .sites
                .iter()
                .enumerate()
                .filter(|(i, site)| *i < top || site.verdict.is_some())
                .map(|(_, site)| SiteJson::new(site))
                .collect()
        });
        RuntimeReportJson {
            runtime: RuntimeJson {
                name: report.runtime.name,
                version: &report.runtime.version,
            },
            refusal: report.tasks.as_ref().err().map(String::as_str),
            tier: tasks.map(|tasks| TierJson {
                name: tasks.tier.name(),
                reason: tasks.tier_reason.name(),
                detail: match &tasks.tier_reason {
                    super::TierReason::Unavailable(why) => Some(why),
                    _ => None,
                },
            }),
            tasks: tasks.map(TasksJson::new),
            probes: tasks.and_then(|tasks| tasks.flow.as_ref().map(ProbesJson::new)),
            cycles: tasks.map(|tasks| tasks.cycles.iter().map(CycleJson::new).collect()),
            warnings: tasks.map(|tasks| tasks.warnings.as_slice()),
            sites_omitted: tasks
                .zip(sites.as_ref())
                .map(|(tasks, sites)| (tasks.sites.len() - sites.len()) as u64),
            sites,
        }
    }
}

/// Writes the sites with this id, of whatever runtimes, as a JSON array and a line
/// feed; `false`, and nothing, when there are none.
///
/// # Errors
/// Of `out`.
pub fn write_site(report: &Report, id: &str, out: &mut dyn io::Write) -> io::Result<bool> {
    let tasks = report.runtimes.iter().flat_map(|runtime| &runtime.tasks);
    let sites: Vec<SiteJson<'_>> = tasks
        .flat_map(|tasks| &tasks.sites)
        .filter(|site| site.state.id.to_string() == id)
        .map(SiteJson::new)
        .collect();
    if sites.is_empty() {
        return Ok(false);
    }
    line(&sites, out).map(|()| true)
}

/// Writes a report as one JSON object and a line feed. `top` leaves out all
/// but so many sites of each runtime (and the suspects, which stay in any
/// case).
pub fn write(report: &Report, top: Option<usize>, out: &mut dyn io::Write) -> io::Result<()> {
    let top = top.unwrap_or(usize::MAX);
    let object = ReportJson {
        schema_version: SCHEMA_VERSION,
        time_unix_seconds: report
            .when
            .at
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0.0, seconds),
        elapsed_seconds: seconds(report.when.elapsed),
        interval_seconds: seconds(report.when.interval),
        process: ProcessJson {
            pid: report.process.pid,
            start_time_ticks: report.process.start_time,
            executable: report.process.executable.to_string_lossy(),
            command: &report.process.command,
        },
        threads: report.threads,
        runtimes: report
            .runtimes
            .iter()
            .map(|runtime| RuntimeReportJson::new(runtime, top))
            .collect(),
    };
    line(&object, out)
}

/// Writes one object and a line feed.
pub(super) fn line<T: Serialize>(object: &T, out: &mut dyn io::Write) -> io::Result<()> {
    let mut out = out;
    object.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Line))?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::table::tests::{leaking, refused};

    fn object(report: &Report, top: Option<usize>) -> serde_json::Value {
        let mut out = Vec::new();
        write(report, top, &mut out).unwrap();
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn figures_are_in_base_units() {
        let object = object(&leaking(), None);
        assert_eq!(object["schema_version"], 2);
        assert_eq!(object["elapsed_seconds"], 130.0);
        let go = &object["runtimes"][0];
        assert_eq!(go["runtime"]["name"], "go");
        assert_eq!(go["tasks"]["live"], 145);
        assert_eq!(go["probes"]["overhead"]["ratio"], 0.008);
        let site = &go["sites"][0];
        assert_eq!(site["live"], 86);
        assert_eq!(site["waits"][0]["reason"], "chan send");
        assert_eq!(site["waits"][0]["place"]["line"], 17);
        assert_eq!(site["verdict"]["kind"], "growing");
    }

    #[test]
    fn suspects_stay_when_sites_are_left_out() {
        let object = object(&leaking(), Some(0));
        let go = &object["runtimes"][0];
        let sites = go["sites"].as_array().unwrap();
        assert!(sites.iter().all(|site| !site["verdict"].is_null()));
        assert_eq!(go["sites_omitted"], 2);
    }

    #[test]
    fn refusal_leaves_the_threads() {
        let object = object(&refused(), None);
        assert_eq!(object["threads"], 12);
        let go = &object["runtimes"][0];
        assert!(go["refusal"].is_string());
        assert!(go.get("sites").is_none());
    }

    #[test]
    fn strings_cannot_act_on_a_terminal() {
        let mut report = refused();
        report.process.command = vec!["\u{1b}[2J\u{7f}\u{9b}31m\u{202e}".to_owned()];
        let mut out = Vec::new();
        write(&report, None, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(!text.trim_end().chars().any(char::is_control));
        assert!(text.contains(r"\u001b[2J\u007f\u009b31m\u202e"));
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            back["process"]["command"][0],
            "\u{1b}[2J\u{7f}\u{9b}31m\u{202e}"
        );
    }
}
