//! Operations a second that programs keep while they are watched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::bpftrace;
use super::sample::Sample;
use super::table::Table;
use super::watcher::Watcher;
use super::{Bench, Report, field};
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
    (BPFTRACE, By::Bpftrace),
];

const CENSUS: &str = "census";
const DEFAULT: &str = "default (5 %)";
const BPFTRACE: &str = "bpftrace";

/// Who watches.
enum By {
    Nobody,
    /// leakmon, with these arguments.
    Leakmon(&'static [&'static str]),
    Bpftrace,
}

/// The loops of the fixture `pingpong`.
const LOOPS: &[&str] = &["pingpong", "spawn", "buffered"];

/// The server's, which is the one that targets are set for.
const HTTP: &str = "HTTP";

/// The least that HTTP is to keep under the default governor.
const WANTED: f64 = 0.95;

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
    for (name, load) in &loads {
        note(*name);
        let (alone, kept) = measure(bench, load, no_bpftrace.is_none())?;
        let mut row = vec![(*name).to_owned(), format!("{:.0}", alone.median())];
        for ((column, _), kept) in WATCHERS.iter().zip(&kept).skip(1) {
            row.push(match (&no_bpftrace, *column) {
                (Some(why), BPFTRACE) => why.clone(),
                _ => kept.percent(),
            });
        }
        table.add(row);
        if *name == HTTP {
            targets(&mut bench.report, &kept);
        }
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

fn targets(report: &mut Report, kept: &[Sample]) {
    let of = |wanted: &str| {
        let columns = WATCHERS.iter().zip(kept);
        columns
            .filter(|((name, _), _)| *name == wanted)
            .map(|(_, sample)| sample)
            .next()
    };
    if let (Some(again), Some(census)) = (of("alone again"), of(CENSUS)) {
        let least = again.min().min(0.99);
        report.target(
            "HTTP at census",
            &format!("100 %, within noise ({:.1} % alone)", 100.0 * again.min()),
            census.percent(),
            census.median() >= least,
        );
    }
    if let Some(governed) = of(DEFAULT) {
        report.target(
            "HTTP under the default governor",
            &format!("at least {:.0} %", 100.0 * WANTED),
            governed.percent(),
            governed.median() >= WANTED,
        );
    }
}

/// A program, and what it is made to do.
enum Load {
    /// A loop of `pingpong`, which is at this path.
    Loop(PathBuf, &'static str),
    /// The server at this path, with its client in another process.
    Http(PathBuf),
}

impl Load {
    fn program(&self) -> &Path {
        match self {
            Self::Loop(path, _) | Self::Http(path) => path,
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
            Load::Http(_) => {
                let line = program.line()?;
                let address = line.strip_prefix("listening ");
                address.context("the server says no address")?.to_owned()
            }
        };
        Ok(Self {
            load,
            program,
            address,
        })
    }

    /// Operations a second over this time.
    fn rate(&mut self, time: Duration) -> Result<f64> {
        let time = format!("{}ms", time.as_millis());
        let answer = match self.load {
            Load::Loop(_, name) => self.program.ask(&format!("run {name} {time}"))?,
            Load::Http(path) => Run::new(path)
                .args(["-client", &self.address, "-d", &time])
                .capture()?,
        };
        field(&answer, "rate")
    }
}
