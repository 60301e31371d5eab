//! What probes of a Go program cost it, hit by hit. `cargo xtask bench` runs
//! this and makes a table of it.
//!
//! `cost PROGRAM ROUNDS` measures with the fixture `pingpong` at PROGRAM: its
//! CPU time with leakmon's programs, with programs that do nothing at the same
//! places, and without any. `places PID` lists what leakmon would probe in a
//! process, for another tool to be compared with.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use leakmon::probe::{self, Kernel, Plan, Tier};
use leakmon::process::identity::Process;
use leakmon::runtime::go;
use leakmon::runtime::go::probes;
use leakmon_common::go::Layout;

/// How long each measurement takes.
const WINDOW: &str = "400ms";

/// A tier, and the fixture's loop that has little but hits of its places.
const LOOPS: [(Tier, &str); 2] = [(Tier::Lifecycle, "spawn"), (Tier::Blocking, "pingpong")];

fn main() -> Result<()> {
    // cargo bench adds --bench.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["cost", program, rounds] => cost(Path::new(program), rounds.parse()?),
        ["places", pid] => places(pid.parse()?),
        [] => {
            println!("nothing to measure; `cargo xtask bench` says what");
            Ok(())
        }
        _ => bail!("unknown arguments: {}", arguments.join(" ")),
    }
}

/// What leakmon would probe in a process that runs Go.
fn plan(pid: u32) -> Result<Plan> {
    let census = go::census(&Process::open(pid)?, &go::Cache::default())?;
    Ok(probes::find(census.program())?.plan)
}

/// Prints the places, one a line: role, and offset in the executable.
fn places(pid: u32) -> Result<()> {
    let plan = plan(pid)?;
    println!("gopc {}", Layout::of(&plan.layout).gopc);
    for place in &plan.places {
        println!("{}: {:#x}", place.role.name(), place.offset.0);
    }
    Ok(())
}

/// Prints for each tier what a hit costs, one line a round.
fn cost(program: &Path, rounds: usize) -> Result<()> {
    let (kernel, _) = probe::load()?;
    let mut target = Target::start(program)?;
    let plan = plan(target.pid())?;
    for (tier, mode) in LOOPS {
        let own = Plan {
            places: plan
                .places
                .iter()
                .filter(|place| place.role.tier() == tier)
                .cloned()
                .collect(),
            ..plan.clone()
        };
        for round in 0..rounds {
            let hit = measure(&kernel, &mut target, tier, mode, &own, round)?;
            println!(
                "{} empty_ns={:.1} probed_ns={:.1} ratio={:.4} hits_per_op={:.2}",
                tier.name(),
                hit.empty,
                hit.probed,
                hit.probed / hit.empty,
                hit.per_op,
            );
        }
    }
    Ok(())
}

/// Nanoseconds of a hit, of either kind of program.
struct Hit {
    empty: f64,
    probed: f64,
    /// Hits in one operation of the loop.
    per_op: f64,
}

fn measure(
    kernel: &Kernel,
    target: &mut Target,
    tier: Tier,
    mode: &str,
    plan: &Plan,
    round: usize,
) -> Result<Hit> {
    let pid = target.pid();
    let (mut bare, mut empty, mut probed, mut per_op) = (0.0, 0.0, 0.0, 0.0);
    // Each is the first in some rounds: a machine that slows down slows all.
    for turn in 0..3 {
        match (round + turn) % 3 {
            0 => bare = target.run(mode)?.nanos(),
            1 => {
                let attached = kernel.attach_empty(pid, &plan.places)?;
                empty = target.run(mode)?.nanos();
                drop(attached);
            }
            _ => {
                let attached = kernel.attach(pid, plan, tier)?;
                let before = attached.hits()?.total();
                let ran = target.run(mode)?;
                let hits = attached.hits()?.total() - before;
                drop(attached);
                probed = ran.nanos();
                per_op = hits as f64 / ran.ops as f64;
            }
        }
    }
    Ok(Hit {
        empty: (empty - bare) / per_op,
        probed: (probed - bare) / per_op,
        per_op,
    })
}

/// Operations, and the CPU time that they took.
struct Ran {
    ops: u64,
    cpu: Duration,
}

impl Ran {
    /// Nanoseconds of CPU time of one operation.
    fn nanos(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.ops as f64
    }
}

/// The fixture, running.
struct Target {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Target {
    fn start(program: &Path) -> Result<Target> {
        let mut child = Command::new(program)
            // One thread at a time: else idle ones burn CPU looking for work.
            .env("GOMAXPROCS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut target = Target {
            child,
            input,
            output,
        };
        let ready = target.line()?;
        if !ready.starts_with("ready ") {
            bail!("the fixture began with: {ready}");
        }
        Ok(target)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line)
    }

    fn run(&mut self, mode: &str) -> Result<Ran> {
        let before = probe::cpu_time(self.pid())?;
        writeln!(self.input, "run {mode} {WINDOW}")?;
        let answer = self.line()?;
        let cpu = probe::cpu_time(self.pid())? - before;
        let ops = answer
            .split_whitespace()
            .find_map(|word| word.strip_prefix("ops=")?.parse().ok())
            .with_context(|| format!("the fixture answered: {answer}"))?;
        Ok(Ran { ops, cpu })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
