use std::time::{Duration, SystemTime};

use super::*;
use crate::leak::History;
use crate::report::sample::{Census, frame_in, site, wait_kind};
use crate::report::{Observation, Probed, Process, Runtime, When};
use crate::task::{
    Coverage, Flow, Histogram, Overhead, Population, Rates, Reconciliation, Site, SiteFlow,
    SiteKey, Tier, WaitFlow,
};

fn process() -> Process {
    Process {
        pid: 4242,
        start_time: 123_456,
        executable: "/usr/local/bin/sumserver".into(),
        command: vec!["sumserver".into(), "--addr".into(), ":8080".into()],
    }
}

fn when(seconds: u64) -> When {
    When {
        at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds),
        elapsed: Duration::from_secs(seconds),
        interval: Duration::from_secs(2),
    }
}

fn conn_site() -> Site {
    let created_by = frame_in(
        "net/http.(*Server).Serve",
        "/usr/local/go/src/net/http/server.go",
        3464,
    );
    let entry = frame_in(
        "net/http.(*conn).serve",
        "/usr/local/go/src/net/http/server.go",
        1907,
    );
    Site {
        doubt: None,
        key: SiteKey {
            created_at: created_by.pc,
            entry: entry.entry,
        },
        created_by: Some(created_by),
        entry: Some(entry),
    }
}

fn census(leaked: u64, before: u64, seconds: u64) -> Population {
    let mut census = Census::new();
    let sum = site("main.(*server).sum", 14, "main.(*server).sum.func1");
    if leaked > 0 {
        census.group(
            &sum,
            "chan send",
            "main.(*server).sum.func1",
            17,
            leaked,
            before,
        );
        census.aged(seconds);
    }
    let deep = "github.com/example/organisation/deep/down/worker.(*Pool[go.shape.int]).run";
    let pool = site(
        "github.com/example/organisation/deep/down/worker.New",
        40,
        deep,
    );
    census.group(&pool, "select", deep, 55, 48, 48);
    census.group(&pool, "chan receive", deep, 61, 2, 2);
    let conns = conn_site();
    census.group(&conns, "IO wait", "internal/poll.(*FD).Read", 165, 9, 3);
    census.done()
}

/// The report of a server that leaks 40 a minute.
pub(crate) fn leaking() -> Report {
    let mut history = History::new();
    let runtime = Runtime {
        name: "go",
        tasks: "goroutines",
        version: "go1.26.8".to_owned(),
    };
    let sum = site("main.(*server).sum", 14, "main.(*server).sum.func1");
    let conns = conn_site();
    let mut last = None;
    for i in 0..=65u64 {
        let leaked = |i: u64| i * 86 / 65;
        let population = census(leaked(i), leaked(i.saturating_sub(1)), i * 2);
        let mut durations = Histogram::default();
        durations.buckets[16] = 900;
        durations.buckets[20] = 90;
        durations.buckets[28] = 10;
        let flow = Flow {
            sites: vec![
                (
                    sum.clone(),
                    SiteFlow {
                        runs: None,
                        spawned: 86,
                        exited: 0,
                    },
                ),
                (
                    conns.clone(),
                    SiteFlow {
                        runs: None,
                        spawned: 5200,
                        exited: 5191,
                    },
                ),
            ],
            waits: vec![WaitFlow {
                site: conns.key,
                reason: "IO wait".into(),
                stack: crate::report::sample::stack("IO wait", "internal/poll.(*FD).Read", 165),
                parks: 1009,
                resumes: 1000,
                durations,
            }],
            ..Flow::default()
        };
        last = Some(Tasks::new(
            when(i * 2).elapsed,
            Observation {
                classify: wait_kind,
                tier: Tier::Blocking,
                tier_reason: &TierReason::Governed,
                population: &population,
                probed: Some(Probed {
                    flow: &flow,
                    rates: Rates {
                        spawned_per_second: 41.2,
                        exited_per_second: 40.6,
                    },
                    reconciliation: Some(Reconciliation {
                        difference: 0,
                        uncertainty: 3,
                    }),
                    coverage: Coverage {
                        spawns: 1.0,
                        waits: 1.0,
                        all_spawns: true,
                        all_waits: true,
                    },
                    overhead: Overhead {
                        core_percent: 0.4,
                        hits: 12_345,
                        cost_ns: 8_000_000,
                        target_cpu_ns: 1_000_000_000,
                        percent: 0.8,
                        budget_percent: Some(5.0),
                        attached: 1.0,
                    },
                }),
            },
            &mut history,
        ));
    }
    Report {
        when: when(130),
        process: process(),
        threads: 14,
        runtimes: vec![RuntimeReport {
            runtime,
            tasks: Ok(last.unwrap()),
        }],
    }
}

/// The tasks of a report's first runtime.
fn tasks_of(report: &mut Report) -> &mut Tasks {
    report.runtimes[0].tasks.as_mut().unwrap()
}

/// The report on a process that leakmon does not understand.
pub(crate) fn refused() -> Report {
    let why = "this Go binary was obfuscated (garble): function names cannot be trusted";
    Report {
        when: when(4),
        process: process(),
        threads: 12,
        runtimes: vec![RuntimeReport {
            runtime: Runtime {
                name: "go",
                tasks: "goroutines",
                version: String::new(),
            },
            tasks: Err(why.to_owned()),
        }],
    }
}

/// A snapshot, its lines flush left.
fn snapshot(text: &str) -> String {
    let mut out = String::new();
    for line in text.trim_start_matches('\n').trim_end().lines() {
        out.push_str(line.strip_prefix('|').unwrap_or(line));
        out.push('\n');
    }
    out
}

#[test]
fn a_leaking_server() {
    let expected = r"
|sumserver  pid 4242  go1.26.8  14 threads  watched for 2m10s
|command     sumserver --addr :8080
|tier        blocking  costs the target 0.8% of its CPU (allowed: 5.0%)
|goroutines  145  145 waiting  (and 5 of the runtime's own)
|flow        41.2/s spawned  40.6/s ended  (5,286 and 5,191 in all)
|census      and probes agree
|suspects    1 of 3 sites looks like a leak
|
|     LIVE    +/MIN   BLOCKED   OLDEST     P50     P99  WAITS FOR
|!      86      +40        86    2m10s       -       -  chan send
|           spawn  main.(*server).sum  app/main.go:14
|           wait   main.(*server).sum.func1  app/main.go:17
|           LEAK?  +40/min for 2m8s, none of the 86 has run since it blocked in
|                  chan send at main.go:17; nobody received
|       50        0        50        -       -       -  select
|           spawn  github.com/example/organisation/…/worker.New  app/main.go:40
|           wait   github.com/example/…/worker.(*Pool[...]).run  app/main.go:55
|           also   2 in chan receive  …/worker.(*Pool[...]).run  app/main.go:61
|        9        0         9        -    96µs     2ms  IO wait
|           spawn  net/http.(*Server).Serve  http/server.go:3464
|           wait   internal/poll.(*FD).Read  app/main.go:165
";
    assert_eq!(render(&leaking(), &Options::default()), snapshot(expected));
}

#[test]
fn a_refused_process() {
    let expected = r"
|sumserver  pid 4242  12 threads  watched for 4s
|command     sumserver --addr :8080
|goroutines  not read: this Go binary was obfuscated (garble): function names
|            cannot be trusted
";
    assert_eq!(render(&refused(), &Options::default()), snapshot(expected));
}

/// The head of a report, without the rows that do not matter.
fn head_rows(report: &Report, labels: &[&str]) -> Vec<String> {
    let text = render(report, &Options::default());
    text.lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| labels.iter().any(|label| line.starts_with(label)))
        .map(str::to_owned)
        .collect()
}

#[test]
fn what_is_sampled_lost_or_contradictory_is_said() {
    let mut report = leaking();
    let tasks = tasks_of(&mut report);
    let flow = tasks.flow.as_mut().unwrap();
    flow.overhead.attached = 0.25;
    (flow.coverage.spawns, flow.coverage.all_spawns) = (0.25, false);
    flow.dropped.insert("site map full", 1200);
    flow.reconciliation = Some(Reconciliation {
        difference: -12,
        uncertainty: 3,
    });
    tasks.tier_reason = TierReason::SteppedDown;
    assert_eq!(
        head_rows(&report, &["tier", "  ", "flow", "census", "dropped"]),
        [
            "tier        blocking  costs the target 0.8% of its CPU (allowed: 5.0%)",
            "            sampled: attached 25% of the time",
            "            stepped down to stay within the budget",
            "flow        about 41.2/s spawned  about 40.6/s ended  (5,286 and 5,191 counted)",
            "census      and probes DISAGREE by -12 (±3)",
            "dropped     1,200 hits: site map full",
        ]
    );
}

#[test]
fn durations_with_gaps_are_marked() {
    let mut report = leaking();
    let marked = |report: &Report| {
        let text = render(report, &Options::default());
        text.lines().filter(|line| line.contains('~')).count()
    };
    assert_eq!(marked(&report), 0);
    tasks_of(&mut report)
        .flow
        .as_mut()
        .unwrap()
        .coverage
        .all_waits = false;
    assert_eq!(marked(&report), 1);
}

#[test]
fn without_probes_it_costs_nothing() {
    let mut report = leaking();
    let tasks = tasks_of(&mut report);
    tasks.flow = None;
    tasks.tier = Tier::Census;
    tasks.tier_reason = TierReason::Unavailable("CAP_BPF is missing".to_owned());
    assert_eq!(
        head_rows(&report, &["tier", "  ", "flow", "census"]),
        ["tier        census  costs the target nothing  no higher tier: CAP_BPF is missing",]
    );
}

#[test]
fn nothing_is_wider_than_the_terminal() {
    let mut report = leaking();
    report.process.command.push("-x".repeat(300));
    {
        let tasks = tasks_of(&mut report);
        tasks.tier_reason = TierReason::Unavailable("no-kernel".repeat(40));
        tasks.sites[0].state.waits[0].reason = "a reason ".repeat(20).into();
        if let Some(frame) = &mut tasks.sites[1].state.site.created_by {
            frame.function = "f".repeat(300).into();
            frame.file = "/d/".repeat(100).into();
        }
    }
    for columns in 0..200 {
        let options = Options {
            width: columns,
            ..Options::default()
        };
        for line in render(&report, &options).lines() {
            assert!(width(line) <= columns.max(LEAST_WIDTH), "{columns}: {line}");
        }
    }
}

#[test]
fn suspects_are_shown_beyond_the_top() {
    let options = Options {
        top: 0,
        ..Options::default()
    };
    let text = render(&leaking(), &options);
    assert!(text.contains("LEAK?"), "{text}");
    assert!(text.contains("… and 59 in 2 more sites"), "{text}");
}

#[test]
fn colours_only_dress_the_text() {
    let plain = render(&leaking(), &Options::default());
    let options = Options {
        colour: true,
        ..Options::default()
    };
    let mut bare = String::new();
    let dressed = render(&leaking(), &options);
    for (i, part) in dressed.split("\x1b[").enumerate() {
        bare.push_str(if i == 0 {
            part
        } else {
            part.split_once('m').unwrap().1
        });
    }
    let trimmed: Vec<&str> = bare.lines().map(str::trim_end).collect();
    assert_eq!(trimmed, plain.lines().collect::<Vec<_>>());
}

#[test]
fn a_hostile_name_cannot_act_on_the_terminal() {
    let mut report = leaking();
    let evil = "main.\u{1b}]0;x\u{7}\r\u{9b}2J";
    report.process.executable = evil.into();
    report.process.command = vec![evil.to_owned()];
    report.runtimes[0].runtime.version = evil.to_owned();
    {
        let tasks = tasks_of(&mut report);
        let site = &mut tasks.sites[0];
        site.state.waits[0].reason = evil.into();
        for frame in [
            &mut site.state.site.created_by,
            &mut site.state.waits[0].place,
        ] {
            let frame = frame.as_mut().unwrap();
            frame.function = evil.into();
            frame.file = evil.into();
        }
        site.verdict.as_mut().unwrap().sentence = evil.to_owned();
    }
    let text = render(&report, &Options::default());
    assert!(
        !text.chars().any(|c| c.is_control() && c != '\n'),
        "{text:?}"
    );
}
