//! `cargo xtask bench`: what leakmon costs the programs that it watches, as ratios taken side by side.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::fixtures;
use crate::program::Program;
use crate::progress::{note, step};
use crate::setup;

/// How the benches are run.
#[derive(Args)]
pub(crate) struct Options {
    /// How many seconds each measurement takes
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// How often each is repeated; the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// The loops of the fixture `pingpong`.
const LOOPS: &[&str] = &["pingpong", "spawn", "buffered"];

/// What leakmon is told, by the name of the table's column.
const WATCHERS: &[(&str, &[&str])] = &[
    ("census", &["--tier", "census", "--max-overhead", "100"]),
    (
        "lifecycle",
        &["--tier", "lifecycle", "--max-overhead", "100"],
    ),
    ("blocking", &["--tier", "blocking", "--max-overhead", "100"]),
    ("default", &[]),
];

/// How long a watcher has to find its way into the target.
const ATTACH: Duration = Duration::from_secs(1);

/// Measures and prints the tables.
pub(crate) fn run(options: &Options) -> Result<()> {
    let go = setup::run()?;
    let leakmon = setup::build_leakmon()?;
    let pingpong = step("fixtures", || fixtures::one(&go, "pingpong"))?;
    let table = step("throughput, watched against not watched", || {
        throughput(&leakmon, &pingpong, options)
    })?;
    table.print();
    Ok(())
}

/// The share of its operations a second that each loop keeps under each watcher.
fn throughput(leakmon: &Path, pingpong: &Path, options: &Options) -> Result<Table> {
    let mut columns = vec!["loop", "alone, op/s"];
    columns.extend(WATCHERS.iter().map(|(name, _)| *name));
    let mut table = Table::new(&columns);
    for name in LOOPS {
        note(*name);
        let mut alone = Vec::new();
        let mut watched = vec![Vec::new(); WATCHERS.len()];
        for _ in 0..options.rounds {
            // Every round measures all of them, so that a machine that slows down slows all of them.
            let mut program = Program::start(pingpong, &[])?;
            alone.push(rate(&mut program, name, options.seconds)?);
            for ((_, arguments), rates) in WATCHERS.iter().zip(&mut watched) {
                let watcher = Watcher::start(leakmon, program.pid(), arguments)?;
                rates.push(rate(&mut program, name, options.seconds)?);
                drop(watcher);
            }
        }
        let alone = median(&mut alone);
        let mut row = vec![(*name).to_owned(), format!("{alone:.0}")];
        row.extend(
            watched
                .iter_mut()
                .map(|rates| format!("{:.1} %", 100.0 * median(rates) / alone)),
        );
        table.add(row);
    }
    Ok(table)
}

/// Operations a second of one loop.
fn rate(program: &mut Program, name: &str, seconds: u32) -> Result<f64> {
    let answer = program.ask(&format!("run {name} {seconds}s"))?;
    answer
        .split_whitespace()
        .find_map(|word| word.strip_prefix("rate=")?.parse().ok())
        .with_context(|| format!("no rate in the fixture's answer: {answer}"))
}

/// The middle of the values; the upper one of two.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A leakmon that watches, ended when dropped.
struct Watcher(Child);

impl Watcher {
    fn start(leakmon: &Path, pid: u32, arguments: &[&str]) -> Result<Self> {
        let child = Command::new(leakmon)
            .args(["--pid", &pid.to_string(), "--interval", "1s"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", leakmon.display()))?;
        let mut watcher = Self(child);
        sleep(ATTACH);
        if let Some(status) = watcher.0.try_wait()? {
            anyhow::bail!("leakmon ended instead of watching pid {pid} ({status})");
        }
        Ok(watcher)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // It may have ended by itself, which the measurement shows.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A table of text, printed with its columns aligned.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(columns: &[&str]) -> Self {
        Self {
            rows: vec![columns.iter().map(|&column| column.to_owned()).collect()],
        }
    }

    fn add(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    fn print(&self) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        for row in &self.rows {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .enumerate()
                .map(|(column, (cell, &width))| match column {
                    0 => format!("{cell:<width$}"),
                    _ => format!("{cell:>width$}"),
                })
                .collect();
            println!("{}", cells.join("  ").trim_end());
        }
    }
}
