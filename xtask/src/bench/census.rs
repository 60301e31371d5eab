//! Censuses of very many goroutines: how long they take, against the program's own dumps; what they take of the program;
//! and what leakmon itself uses.

use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::sample::Sample;
use super::table::Table;
use super::watcher::Watcher;
use super::{Bench, field};
use crate::command::Run;
use crate::fixtures;
use crate::program::Program;
use crate::progress::note;

/// How many goroutines, how long a first census of them and the next one may take in all, and the census's target in
/// seconds.
const SIZES: &[(u32, Duration, f64)] = &[
    (100_000, Duration::from_millis(400), 0.1),
    (1_000_000, Duration::from_millis(1500), 1.0),
];

/// The most that leakmon may use of memory while it watches the smaller number, in MiB.
const WANTED_MEMORY: f64 = 64.0;

/// How often the program dumps itself, which takes it seconds.
const OWN_DUMPS: usize = 2;

/// How long the program's longest stop is looked for.
const STILL: &str = "still 2s";

/// The program's own dumps, by the fixture's command.
const DUMPS: &[(&str, &str)] = &[
    ("debug1", "its own debug=1"),
    ("debug2", "its own debug=2, cut at 64 MB"),
    ("debug2full", "its own debug=2, whole"),
];

/// Measures and adds the table.
pub(super) fn run(bench: &mut Bench<'_>) -> Result<()> {
    let holder = fixtures::one(&bench.go, "holder")?;
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    for (column, size) in SIZES.iter().enumerate() {
        for (row, value) in measure(bench, &holder, *size)? {
            match rows.iter_mut().find(|(name, _)| *name == row) {
                Some((_, values)) => values.push(value),
                None => rows.push((row, [vec![String::new(); column], vec![value]].concat())),
            }
        }
    }
    let mut table = Table::new(&["", "100,000 goroutines", "1,000,000 goroutines"]);
    for (name, values) in rows {
        table.add([vec![name], values].concat());
    }
    bench
        .report
        .tables
        .push(("Censuses, with every stack (median, least–most)", table));
    Ok(())
}

/// The rows of one size, and its targets.
fn measure(
    bench: &mut Bench<'_>,
    holder: &Path,
    (count, interval, wanted): (u32, Duration, f64),
) -> Result<Vec<(String, String)>> {
    note(format!("{count} goroutines"));
    let mut program = Program::start(holder, &["-n", &count.to_string()])?;
    let pid = program.pid();
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));

    let (mut first, mut next, mut dump) = Default::default();
    for _ in 0..bench.rounds {
        censuses(&bench.leakmon, pid, interval, &mut first, &mut next)?;
        stacks(&bench.leakmon, pid, &mut dump)?;
    }
    row("leakmon's first census", first.milliseconds());
    row("leakmon's next ones", next.milliseconds());
    row("`leakmon stacks --format debug2`", dump.milliseconds());

    for (command, name) in DUMPS {
        let (mut took, mut stop) = (Sample::default(), Sample::default());
        for _ in 0..OWN_DUMPS {
            let answer = program.ask(command)?;
            took.add(field(&answer, "seconds")?);
            stop.add(field(&answer, "stop")?);
        }
        row(name, took.milliseconds());
        row(&format!("{name}: it stands still for"), stop.milliseconds());
        row(
            &format!("{name} : leakmon's first census"),
            format!("{:.1}", took.median() / first.median()),
        );
    }

    let mut stop = |watched: bool| -> Result<String> {
        let mut longest = Sample::default();
        for _ in 0..bench.rounds.min(3) {
            let watcher = watched
                .then(|| {
                    let arguments = ["--tier", "census", "--interval", "250ms"];
                    Watcher::leakmon(&bench.leakmon, pid, &arguments)
                })
                .transpose()?;
            longest.add(field(&program.ask(STILL)?, "stop")?);
            drop(watcher);
        }
        Ok(longest.milliseconds())
    };
    row("longest pause of a goroutine, not watched", stop(false)?);
    row("the same, a census every 250 ms", stop(true)?);

    let (memory, cpu) = resources(&bench.leakmon, pid, interval)?;
    row("leakmon's memory at its peak", format!("{memory:.1} MiB"));
    row(
        "leakmon's CPU use, a report a second",
        format!("{cpu:.1} % of a core"),
    );

    bench.report.target(
        &format!("first census of {count} goroutines"),
        &format!("within {:.0} ms", 1000.0 * wanted),
        first.milliseconds(),
        first.median() <= wanted,
    );
    if count == SIZES[0].0 {
        bench.report.target(
            &format!("leakmon's memory with {count} goroutines"),
            &format!("under {WANTED_MEMORY:.0} MiB"),
            format!("{memory:.1} MiB"),
            memory < WANTED_MEMORY,
        );
    }
    Ok(rows)
}

/// Times four censuses of a leakmon that has just been started.
fn censuses(
    leakmon: &Path,
    pid: u32,
    interval: Duration,
    first: &mut Sample,
    next: &mut Sample,
) -> Result<()> {
    let milliseconds = |time: Duration| format!("{}ms", time.as_millis());
    let reports = Run::new(leakmon)
        .args(["--pid", &pid.to_string(), "--tier", "census"])
        .args(["--format", "json"])
        .args(["--interval", &milliseconds(interval)])
        .args(["--duration", &milliseconds(3 * interval)])
        .capture()?;
    for (n, line) in reports.lines().enumerate() {
        let report: serde_json::Value = serde_json::from_str(line)?;
        let took = report["runtimes"][0]["tasks"]["census_seconds"].as_f64();
        let sample = if n == 0 { &mut *first } else { &mut *next };
        sample.add(took.context("a report says no time of its census")?);
    }
    Ok(())
}

/// Times a dump of every goroutine, from leakmon's start to its end.
fn stacks(leakmon: &Path, pid: u32, dump: &mut Sample) -> Result<()> {
    let start = Instant::now();
    let status = std::process::Command::new(leakmon)
        .args(["stacks", "--pid", &pid.to_string(), "--format", "debug2"])
        .stdout(Stdio::null())
        .status()?;
    dump.add(start.elapsed().as_secs_f64());
    anyhow::ensure!(status.success(), "leakmon stacks failed ({status})");
    Ok(())
}

/// What leakmon, as anybody starts it, uses: MiB at its peak, and percent of one core once it knows the program.
fn resources(leakmon: &Path, pid: u32, settle: Duration) -> Result<(f64, f64)> {
    let watcher = Watcher::leakmon(leakmon, pid, &["--interval", "1s"])?;
    sleep(2 * settle);
    let (start, before) = (Instant::now(), cpu_seconds(watcher.pid())?);
    sleep(Duration::from_secs(4));
    let used = cpu_seconds(watcher.pid())? - before;
    let share = used / start.elapsed().as_secs_f64();
    Ok((peak_mib(watcher.pid())?, 100.0 * share))
}

/// CPU time that a process has used, in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?;
    Ok(Duration::from(clock_gettime(clock)?).as_secs_f64())
}

/// The most memory that a process has had, in MiB.
fn peak_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kilobytes: f64 = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmHWM:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .context("/proc names no peak of memory")?;
    Ok(kilobytes / 1024.0)
}
