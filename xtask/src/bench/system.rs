//! All processes of a machine in one table: how soon, and what it takes, with 500 more processes than there were.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Bench;
use super::sample::Sample;
use super::table::Table;
use crate::fixtures;
use crate::program::Program;

/// Processes that are started.
const GO: usize = 100;
const TOKIO: usize = 50;
const OTHERS: usize = 350;

/// What the first table may take, in seconds.
const FIRST: f64 = 2.0;

/// What leakmon may use of one core once it has begun.
const CPU: f64 = 0.02;

/// What its resident set may reach, in MiB.
const MEMORY: f64 = 150.0;

/// How long it has to settle, and how long it is measured then.
const SETTLE: Duration = Duration::from_secs(5);
const MEASURE: Duration = Duration::from_secs(20);

/// Processes that do nothing, ended when dropped.
struct Idle(Vec<Child>);

impl Drop for Idle {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended by itself is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Measures and adds the table.
pub(super) fn run(bench: &mut Bench<'_>) -> Result<()> {
    let go = zoos(|folder| folder.starts_with("go1."))?;
    let tokio = zoos(|folder| folder.starts_with("tokio-"))?;
    let mut programs = Vec::new();
    for (paths, number) in [(&go, GO), (&tokio, TOKIO)] {
        for path in paths.iter().cycle().take(number) {
            programs.push(Program::start(path, &[])?);
        }
    }
    let mut idle = Idle(Vec::new());
    for _ in 0..OTHERS {
        let mut sleep = Command::new("sleep");
        idle.0
            .push(sleep.arg("100000").spawn().context("cannot start sleep")?);
    }
    let mut first = Sample::default();
    for _ in 0..bench.rounds {
        let started = Instant::now();
        let mut leakmon = start(bench, &["--once"])?;
        let mut lines = BufReader::new(leakmon.stdout.take().context("leakmon has no output")?);
        let read = lines.read_line(&mut String::new());
        first.add(started.elapsed().as_secs_f64());
        let _ = leakmon.kill();
        leakmon.wait()?;
        read.context("leakmon printed nothing")?;
    }
    let mut leakmon = Idle(vec![start(bench, &[])?]);
    let pid = leakmon.0[0].id();
    let output = leakmon.0[0]
        .stdout
        .take()
        .context("leakmon has no output")?;
    let drain = std::thread::spawn(move || {
        std::io::copy(&mut BufReader::new(output), &mut std::io::sink())
    });
    sleep(SETTLE);
    let before = cpu_seconds(pid)?;
    let since = Instant::now();
    sleep(MEASURE);
    let cpu = (cpu_seconds(pid)? - before) / since.elapsed().as_secs_f64();
    let memory = peak_mib(pid)?;
    drop(leakmon);
    // Its output has ended with it.
    let _ = drain.join();

    let mut table = Table::new(&["all processes", ""]);
    let processes = format!("{GO} Go, {TOKIO} tokio, {OTHERS} others and the machine's own");
    table.add(["processes".to_owned(), processes]);
    table.add(["from start to first table".to_owned(), first.milliseconds()]);
    table.add([
        "CPU use, a table every 2 s".to_owned(),
        format!("{:.2} % of a core", 100.0 * cpu),
    ]);
    table.add(["memory at its peak".to_owned(), format!("{memory:.1} MiB")]);
    bench
        .report
        .tables
        .push(("`leakmon` without a pid (median, least–most)", table));
    bench.report.target(
        "first table of 500 processes",
        &format!("within {FIRST:.0} s"),
        first.milliseconds(),
        first.median() <= FIRST,
    );
    bench.report.target(
        "CPU use with 500 processes",
        &format!("under {:.0} % of a core", 100.0 * CPU),
        format!("{:.2} %", 100.0 * cpu),
        cpu < CPU,
    );
    bench.report.target(
        "memory with 500 processes",
        &format!("under {MEMORY:.0} MiB"),
        format!("{memory:.1} MiB"),
        memory < MEMORY,
    );
    Ok(())
}

fn start(bench: &Bench<'_>, arguments: &[&str]) -> Result<Child> {
    Command::new(&bench.leakmon)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start leakmon")
}

/// Every build of the zoo for this computer, in folders that are `wanted`.
fn zoos(wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let folder = fixtures::folder();
    let list = |folder: &Path| -> Result<Vec<PathBuf>> {
        let read = fs::read_dir(folder).with_context(|| format!("{}", folder.display()))?;
        read.map(|entry| Ok(entry?.path())).collect()
    };
    let mut found = Vec::new();
    for built in list(&folder)? {
        if !wanted(&built.file_name().unwrap_or_default().to_string_lossy()) {
            continue;
        }
        let zoos = list(&built)?.into_iter().map(|variant| variant.join("zoo"));
        found.extend(zoos.filter(|zoo| zoo.exists()));
    }
    found.sort();
    anyhow::ensure!(
        !found.is_empty(),
        "no zoo is built: run `cargo xtask fixtures`"
    );
    Ok(found)
}

/// CPU time of a process, ended threads included: fields 14 and 15 of /proc/PID/stat, in hundredths of a second.
pub(super) fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(')').context("stat has no name")?;
    let ticks = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<f64>().context("stat is not numbers"))
        .sum::<Result<f64>>()?;
    Ok(ticks / 100.0)
}

/// The most memory that a process has had resident.
fn peak_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))
        .context("no VmHWM")?;
    Ok(peak.trim().parse::<f64>()? / 1024.0)
}
