//! The daemon on a machine with hundreds of processes that come and go all the
//! time.
//!
//! Needs root, and the fixtures (see `common`).

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::{Owned, all, fixtures};
use leakmon::process::discovery::TICKS;

/// Processes that start each second, and as many that end.
const CHURN: u64 = 50;

/// How long those live that come and go.
const LIVES: [Duration; 4] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(20),
];

/// Time between two scrapes, as Prometheus does them at the most often.
const SCRAPE: Duration = Duration::from_secs(5);

/// What leakmon takes, so far.
#[derive(Clone, Copy, Debug)]
struct Use {
    at: Instant,
    cpu: Duration,
    /// Bytes.
    resident: u64,
}

impl Use {
    fn of(pid: u32) -> Use {
        let process = procfs::process::Process::new(pid.cast_signed());
        let stat = process.and_then(|process| process.stat()).expect("it runs");
        Use {
            at: Instant::now(),
            cpu: Duration::from_millis((stat.utime + stat.stime) * 1000 / TICKS),
            resident: stat.rss * procfs::page_size(),
        }
    }

    /// Percent of one core since then.
    fn percent_since(&self, before: &Use) -> f64 {
        let cpu = (self.cpu - before.cpu).as_secs_f64();
        100.0 * cpu / (self.at - before.at).as_secs_f64()
    }
}

fn start(command: &mut Command) -> Owned {
    Owned::spawn(
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    )
}

/// The processes that a scrape has series of, and how many series there are.
fn scrape(daemon: &Daemon) -> (BTreeSet<u32>, usize) {
    let text = daemon.get("/metrics");
    let series = text.lines().filter(|line| line.contains('{'));
    let mut pids = BTreeSet::new();
    let mut count = 0;
    for line in series {
        count += 1;
        let pid = line.split_once("pid=\"").map(|(_, rest)| rest);
        let pid = pid.and_then(|rest| rest.split_once('"')?.0.parse::<u32>().ok());
        pids.extend(pid);
    }
    (pids, count)
}

/// 500 processes, 200 of them in Go and 50 with tokio, and 50 more that start each
/// second and end: all are seen, and those that are gone are gone from the metrics
/// two readings later. Gives leakmon's use after each scrape.
fn fleet(time: Duration, interval: Duration) -> Option<Vec<Use>> {
    let go: Vec<PathBuf> = all("churner", "plain")
        .into_iter()
        .rev()
        .take(2)
        .map(|churner| churner.path)
        .collect();
    let tokio = fixtures()?.join("tokio-1.54/release/zoo");
    let sleep = || {
        let mut sleep = Command::new("sleep");
        sleep.arg("100000");
        sleep
    };
    let kind = |number: usize| match number % 5 {
        0 | 1 => Command::new(&go[number % 5 % go.len()]),
        2 => Command::new(&tokio),
        _ => sleep(),
    };
    let mut base: Vec<Owned> = Vec::new();
    base.extend((0..200).map(|number| start(&mut Command::new(&go[number % go.len()]))));
    base.extend((0..50).map(|_| start(&mut Command::new(&tokio))));
    base.extend((0..250).map(|_| start(&mut sleep())));
    let daemon = Daemon::every(&format!("{}s", interval.as_secs()), "", "", "");
    let began = Instant::now();
    let (mut started, mut alive, mut uses) = (0, Vec::new(), Vec::new());
    let mut ended: BTreeMap<u32, Instant> = BTreeMap::new();
    // Those that live long enough to be in a reading for certain.
    let mut unseen: BTreeMap<u32, Instant> = BTreeMap::new();
    let mut left_since: BTreeMap<u32, Instant> = BTreeMap::new();
    let mut next = began + SCRAPE;
    while began.elapsed() < time {
        while started < began.elapsed().as_millis() as u64 * CHURN / 1000 {
            let child = start(&mut kind(started as usize));
            let life = LIVES[started as usize / 5 % LIVES.len()];
            ended.remove(&child.pid());
            if life > 3 * interval {
                unseen.insert(child.pid(), Instant::now());
            }
            alive.push((Instant::now() + life, child));
            started += 1;
        }
        for (_, mut child) in alive.extract_if(.., |(until, _)| *until < Instant::now()) {
            child.kill();
            ended.insert(child.pid(), Instant::now());
        }
        if Instant::now() > next {
            next += SCRAPE;
            let (pids, series) = scrape(&daemon);
            unseen.retain(|pid, _| !pids.contains(pid));
            let late = |since: &Instant| since.elapsed() > 3 * interval;
            let missed: Vec<_> = unseen.iter().filter(|(_, since)| late(since)).collect();
            assert!(missed.is_empty(), "never seen: {missed:?}");
            // Another process of the machine may have the id by now, or have had it
            // since: what it leaves is gone a reading later.
            let is_gone = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
            let left = pids.iter().copied();
            let left = left.filter(|pid| ended.get(pid).is_some_and(late) && is_gone(*pid));
            let left: BTreeSet<u32> = left.collect();
            left_since.retain(|pid, _| left.contains(pid));
            for pid in left {
                let since = *left_since.entry(pid).or_insert_with(Instant::now);
                let stays = since.elapsed() > interval + SCRAPE / 2;
                assert!(!stays, "{pid} is gone, and still told of");
            }
            // What one process can have, by docs/metrics.md, and leakmon's own.
            assert!(series < 100 * pids.len() + 1000, "{series} series");
            uses.push(Use::of(daemon.child.pid()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let came = daemon.own_metric("leakmon_process_started_total");
    let lost = daemon.own_metric("leakmon_process_lost_total");
    assert_eq!(lost, Some(0.0));
    // The machine has others. The last reading is an interval old.
    let told = started - CHURN * 2 * interval.as_secs();
    assert!(came >= Some(told as f64), "{came:?} of {started}");
    Some(uses)
}

#[test]
fn processes_that_come_and_go_are_all_seen() {
    fleet(Duration::from_secs(20), Duration::from_secs(2));
}

#[test]
#[ignore = "takes ten minutes"]
fn ten_minutes_of_them_take_little() {
    let Some(uses) = fleet(Duration::from_secs(600), Duration::from_secs(10)) else {
        return;
    };
    let minute = uses[60 / SCRAPE.as_secs() as usize];
    let last = uses[uses.len() - 1];
    let percent = last.percent_since(&minute);
    let largest = uses.iter().map(|at| at.resident).max().expect("some");
    eprintln!(
        "{percent:.2} % of a core, {} MiB after a minute, {} MiB at the most, {} at the end",
        minute.resident >> 20,
        largest >> 20,
        last.resident >> 20
    );
    assert!(percent < 3.0, "{percent} %");
    // A twentieth: the kernel counts what was touched, and a heap has holes.
    assert!(last.resident < minute.resident + minute.resident / 20);
}
