//! `cargo xtask bench`: what leakmon costs the programs that it watches, and what it takes itself, as ratios taken side
//! by side. docs/benchmarks.md says how to read them.

mod bpftrace;
mod census;
mod hits;
mod sample;
mod servers;
mod start;
mod system;
mod table;
mod throughput;
mod watcher;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::fixtures;
use crate::go::Go;
use crate::privilege;
use crate::progress::{note, step};
use crate::setup;
use crate::workspace;

use table::Table;

/// How the benches are run.
#[derive(Args)]
pub(crate) struct Options {
    /// Run this part only; may be repeated [default: all]
    #[arg(long, value_name = "NAME")]
    only: Vec<Part>,
    /// How many seconds each measurement of throughput and of servers takes
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// How often each measurement is repeated; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// A part of the benches.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Operations a second that a program keeps while it is watched
    Throughput,
    /// CPU time of a request to servers, one watched and one not
    Servers,
    /// CPU time of a probe's hit
    Hits,
    /// Time, memory and CPU use of censuses of very many goroutines
    Census,
    /// Time to the first report on a large program
    Start,
    /// Time to the first table of 500 processes, and what watching them takes
    System,
}

/// What every part needs.
struct Bench<'a> {
    go: Go,
    leakmon: PathBuf,
    /// leakmon's own bench.
    hits: PathBuf,
    seconds: u32,
    rounds: usize,
    report: Report,
    options: &'a Options,
}

/// Measures one part and adds what it found to the report.
type Measure = fn(&mut Bench<'_>) -> Result<()>;

/// What has been found so far.
#[derive(Default)]
struct Report {
    tables: Vec<(&'static str, Table)>,
    targets: Vec<Target>,
}

/// One figure that was to be reached.
struct Target {
    what: String,
    wanted: String,
    measured: String,
    verdict: Verdict,
}

/// Whether a figure is what it was to be.
#[derive(Clone, Copy)]
enum Verdict {
    Reached,
    Missed,
    /// The machine does not agree with itself well enough.
    Noisy,
}

impl From<bool> for Verdict {
    fn from(reached: bool) -> Self {
        if reached { Self::Reached } else { Self::Missed }
    }
}

impl Report {
    /// Adds a figure that was to be reached.
    fn target(&mut self, what: &str, wanted: &str, measured: String, verdict: impl Into<Verdict>) {
        self.targets.push(Target {
            what: what.to_owned(),
            wanted: wanted.to_owned(),
            measured,
            verdict: verdict.into(),
        });
    }

    /// Everything as Markdown that reads well as it is.
    fn render(&self) -> String {
        let mut text = String::new();
        for (title, table) in &self.tables {
            text += &format!("## {title}\n\n{}\n", table.render());
        }
        let mut table = Table::new(&["target", "wanted", "measured", ""]);
        for target in &self.targets {
            let verdict = match target.verdict {
                Verdict::Reached => "reached",
                Verdict::Missed => "NOT REACHED",
                Verdict::Noisy => "too noisy to tell",
            };
            table.add([
                target.what.clone(),
                target.wanted.clone(),
                target.measured.clone(),
                verdict.to_owned(),
            ]);
        }
        if !self.targets.is_empty() {
            text += &format!("## Targets\n\n{}\n", table.render());
        }
        text
    }
}

impl Bench<'_> {
    /// Whether the user wants this part.
    fn wants(&self, part: Part) -> bool {
        self.options.only.is_empty() || self.options.only.contains(&part)
    }
}

/// Measures and prints the tables.
pub(crate) fn run(options: &Options) -> Result<()> {
    privilege::require_bpf("bench")?;
    let mut bench = Bench {
        go: setup::run()?,
        leakmon: setup::build_leakmon()?,
        hits: step("leakmon's bench", hits::build)?,
        seconds: options.seconds.max(1),
        rounds: options.rounds.max(1),
        report: Report::default(),
        options,
    };
    let with_fixtures = [Part::Throughput, Part::Servers, Part::System];
    if with_fixtures.iter().any(|part| bench.wants(*part)) {
        fixtures::build(&bench.go, &fixtures::Options::default())?;
    }
    let machine = machine();
    let parts: [(Part, &str, Measure); 6] = [
        (
            Part::Throughput,
            "throughput, watched against not watched",
            throughput::run,
        ),
        (
            Part::Servers,
            "servers, one watched and one not",
            servers::run,
        ),
        (Part::Hits, "CPU time of a hit", hits::run),
        (
            Part::Census,
            "censuses of 100,000 and 1,000,000 goroutines",
            census::run,
        ),
        (Part::Start, "first report on a large program", start::run),
        (Part::System, "all processes of the machine", system::run),
    ];
    for (part, title, measure) in parts {
        if bench.wants(part) {
            step(title, || measure(&mut bench))?;
        }
    }
    let text = format!("{machine}\n\n{}", bench.report.render());
    println!("\n{text}");
    let path = workspace::target().join("bench.md");
    std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    note(format!("also in {}", path.display()));
    Ok(())
}

/// What was measured on, and how busy it was with other things.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let load = read("/proc/loadavg");
    format!(
        "{cpus} CPUs, Linux {}, {}; load average of the minute before: {}",
        read("/proc/sys/kernel/osrelease").trim(),
        std::env::consts::ARCH,
        load.split(' ').next().unwrap_or("?"),
    )
}

/// The value of `NAME=VALUE` among the words of a line.
fn field(line: &str, name: &str) -> Result<f64> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
        .with_context(|| format!("no {name} in: {line}"))
}
