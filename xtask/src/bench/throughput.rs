//! Operations a second that programs keep while they are watched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::bpftrace;
use super::sample::Sample;
use super::system::cpu_seconds;
use super::table::Table;
use super::watcher::Watcher;
use super::{Bench, Report, Verdict, field};
use crate::command::Run;
use crate::fixtures;
use crate::program::Program;
use crate::progress::note;
use crate::workspace;

/// What watches, by the table's column. The first one, nobody, is what the others are compared with; the second one,
/// nobody again, shows how far the machine agrees with itself.
const WATCHERS: &[(&str, By)] = &[
    ("alone", By::Nobody),
    ("alone again", By::Nobody),
    (CENSUS, By::Leakmon(&["--tier", "census"])),
    ("lifecycle", By::Leakmon(&["--tier", "lifecycle"])),
    ("blocking", By::Leakmon(&["--tier", "blocking"])),
    (DEFAULT, By::Leakmon(&[])),
    (
        "another's, blocking",
        By::Elsewhere(&["--tier", "blocking"]),
    ),
    (ANOTHER, By::Elsewhere(&[])),
    (BPFTRACE, By::Bpftrace),
];

const CENSUS: &str = "census";
const DEFAULT: &str = "default (5 %)";
const ANOTHER: &str = "another's, default";
const BPFTRACE: &str = "bpftrace";

/// Who watches.
enum By {
    Nobody,
    /// leakmon, with these arguments.
    Leakmon(&'static [&'static str]),
    /// leakmon, with these arguments, and another process: a program with threads in every wait.
    Elsewhere(&'static [&'static str]),
    /// At the places of a Go program; the others are not for it.
    Bpftrace,
}

/// The loops of the fixture `pingpong`.
const LOOPS: &[&str] = &["pingpong", "spawn", "buffered"];

/// The server's, which is the one that targets are set for.
const HTTP: &str = "HTTP";

/// Two threads that wake each other, on one CPU: of all loads the one with the most switches.
const FUTEX: &str = "futex pingpong, by CPU";

/// The least that a server is to keep under the default governor.
pub(super) const WANTED: f64 = 0.95;

/// The least that threads are to keep while those of another process are watched.
const WANTED_ELSEWHERE: f64 = 0.97;

/// How far the server may differ from itself between two measurements alone.
const MOST_NOISE: f64 = 0.05;

/// How long a program runs before it is measured, for a governor to get to know it.
const WARM_UP: Duration = Duration::from_millis(500);

/// Measures and adds the table.
pub(super) fn run(bench: &mut Bench<'_>) -> Result<()> {
    let no_bpftrace = bpftrace::ensure().err();
    let pingpong = stripped(bench, "pingpong")?;
    let heavy = stripped(bench, "heavy")?;
    let mut columns = vec!["load", "alone, op/s"];
    columns.extend(WATCHERS[1..].iter().map(|(name, _)| *name));
    let mut table = Table::new(&columns);
    let mut loads: Vec<(&str, Load)> = LOOPS
        .iter()
        .map(|name| (*name, Load::Loop(pingpong.clone(), name)))
        .collect();
    loads.push((HTTP, Load::Http(heavy)));
    let tokio = fixtures::newest_tokio("pingpong")?;
    let threads = fixtures::threads("c-release", "fthreads")?;
    loads.push(("tokio pingpong", Load::Loop(tokio.clone(), "pingpong")));
    loads.push(("tokio spawn", Load::Loop(tokio, "spawn")));
    loads.push(("futex pingpong", Load::Loop(threads.clone(), "pingpong")));
    loads.push((FUTEX, Load::OneCpu(threads.clone(), "pingpong")));
    loads.push(("thread spawn", Load::Loop(threads, "spawn")));
    for (name, load) in &loads {
        note(*name);
        let go = LOOPS.contains(name) || *name == HTTP;
        let (alone, kept) = measure(bench, load, go && no_bpftrace.is_none())?;
        let mut row = vec![(*name).to_owned(), format!("{:.0}", alone.median())];
        for ((column, _), kept) in WATCHERS.iter().zip(&kept).skip(1) {
            row.push(match (&no_bpftrace, *column) {
                (Some(why), BPFTRACE) if go => why.clone(),
                _ => kept.percent(),
            });
        }
        table.add(row);
        targets(&mut bench.report, name, &kept);
    }
    bench.report.tables.push((
        "Throughput kept, of that alone (median, least–most of the rounds)",
        table,
    ));
    Ok(())
}

/// A fixture without symbols, as programs are in production.
fn stripped(bench: &Bench<'_>, name: &str) -> Result<PathBuf> {
    let folder = workspace::target().join("bench");
    workspace::create(&folder)?;
    let path = folder.join(name);
    Run::new("strip")
        .arg("-o")
        .arg(&path)
        .arg(fixtures::one(&bench.go, name)?)
        .capture()?;
    Ok(path)
}

fn targets(report: &mut Report, load: &str, kept: &[Sample]) {
    let of = |wanted: &str| {
        let columns = WATCHERS.iter().zip(kept);
        columns
            .filter(|((name, _), _)| *name == wanted)
            .map(|(_, sample)| sample)
            .next()
    };
    let (Some(again), Some(census), Some(governed), Some(another)) =
        (of("alone again"), of(CENSUS), of(DEFAULT), of(ANOTHER))
    else {
        return;
    };
    // What differs by so much from itself says nothing of small differences.
    let noisy = (again.min() - 1.0).abs().max((again.max() - 1.0).abs()) > MOST_NOISE;
    let verdict = |reached: bool| match noisy {
        true => Verdict::Noisy,
        false => reached.into(),
    };
    if load == HTTP {
        report.target(
            &format!("{load} at census"),
            &format!("100 %, within noise (alone: {})", again.percent()),
            census.percent(),
            verdict(census.median() >= again.min().min(0.99)),
        );
        report.target(
            &format!("{load} under the default governor"),
            &format!("at least {:.0} %", 100.0 * WANTED),
            governed.percent(),
            verdict(governed.median() >= WANTED),
        );
    }
    if load == FUTEX {
        report.target(
            &format!("{load} while the threads of another process are watched"),
            &format!("at least {:.0} %", 100.0 * WANTED_ELSEWHERE),
            another.percent(),
            verdict(another.median() >= WANTED_ELSEWHERE),
        );
    }
}

/// Keeps a process's main thread, and those that it makes, on the last CPU that it may run on.
fn pin(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(pid.cast_signed());
    let allowed = sched_getaffinity(pid)?;
    let last = (0..CpuSet::count()).rfind(|cpu| allowed.is_set(*cpu) == Ok(true));
    let mut one = CpuSet::new();
    one.set(last.context("no CPU is allowed")?)?;
    Ok(sched_setaffinity(pid, &one)?)
}

/// A program, and what it is made to do.
enum Load {
    /// A loop of `pingpong`, which is at this path.
    Loop(PathBuf, &'static str),
    /// The same, with all its threads on one CPU.
    OneCpu(PathBuf, &'static str),
    /// The server at this path, with its client in another process.
    Http(PathBuf),
}

impl Load {
    fn program(&self) -> &Path {
        match self {
            Self::Loop(path, _) | Self::OneCpu(path, _) | Self::Http(path) => path,
        }
    }
}

/// Operations a second alone, and the share of them under each of [`WATCHERS`].
fn measure(bench: &Bench<'_>, load: &Load, with_bpftrace: bool) -> Result<(Sample, Vec<Sample>)> {
    let script = if with_bpftrace {
        let running = Running::start(load)?;
        let pid = running.program.pid();
        Some(bpftrace::script(bench, load.program(), pid)?)
    } else {
        None
    };
    let other = Program::start(&fixtures::threads("c-release", "threadzoo")?, &[])?;
    let mut alone = Sample::default();
    let mut kept = vec![Sample::default(); WATCHERS.len()];
    for round in 0..bench.rounds {
        let mut running = Running::start(load)?;
        let mut rates = vec![f64::NAN; WATCHERS.len()];
        // Every round measures all of them, each time beginning with another one: a machine that slows down slows all.
        for turn in 0..WATCHERS.len() {
            let which = (round + turn) % WATCHERS.len();
            let pid = running.program.pid();
            let watcher = match &WATCHERS[which].1 {
                By::Nobody => None,
                By::Leakmon(arguments) => Some(Watcher::leakmon(&bench.leakmon, pid, arguments)?),
                By::Elsewhere(arguments) => {
                    Some(Watcher::leakmon(&bench.leakmon, other.pid(), arguments)?)
                }
                By::Bpftrace => match &script {
                    Some(script) => Some(Watcher::bpftrace(pid, script)?),
                    None => continue,
                },
            };
            running.rate(WARM_UP)?;
            rates[which] = running.rate(Duration::from_secs(bench.seconds.into()))?;
            drop(watcher);
        }
        alone.add(rates[0]);
        for (sample, rate) in kept.iter_mut().zip(&rates) {
            if !rate.is_nan() {
                sample.add(rate / rates[0]);
            }
        }
    }
    Ok((alone, kept))
}

/// A load's program, running.
struct Running<'a> {
    load: &'a Load,
    program: Program,
    /// Of the server.
    address: String,
}

impl<'a> Running<'a> {
    fn start(load: &'a Load) -> Result<Self> {
        let mut program = Program::start(load.program(), &[])?;
        let address = match load {
            Load::Loop(..) => String::new(),
            Load::OneCpu(..) => {
                // Before it makes the threads of the loop.
                pin(program.pid())?;
                String::new()
            }
            Load::Http(_) => program.address()?,
        };
        Ok(Self {
            load,
            program,
            address,
        })
    }

    /// Operations a second over this time; of [`Load::OneCpu`], a second of the program's CPU time.
    fn rate(&mut self, time: Duration) -> Result<f64> {
        let text = format!("{}ms", time.as_millis());
        let answer = match self.load {
            Load::Loop(_, name) => self.program.ask(&format!("run {name} {text}"))?,
            Load::OneCpu(_, name) => {
                let before = cpu_seconds(self.program.pid())?;
                let answer = self.program.ask(&format!("run {name} {text}"))?;
                let spent = cpu_seconds(self.program.pid())? - before;
                return Ok(field(&answer, "ops")? / spent);
            }
            Load::Http(path) => Run::new(path)
                .args(["-client", &self.address, "-d", &text])
                .capture()?,
        };
        field(&answer, "rate")
    }
}
