//! Time from leakmon's start to its first report, on a program as large as big servers are.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::Bench;
use super::sample::Sample;
use super::table::Table;
use crate::big;
use crate::fixtures;
use crate::program::Program;

/// What it may take, in seconds.
const WANTED: f64 = 0.3;

/// Measures and adds the table.
pub(super) fn run(bench: &mut Bench<'_>) -> Result<()> {
    let path = big::build(&bench.go, &fixtures::folder().join("big"))?;
    let size = std::fs::metadata(&path)?.len() >> 20;
    let program = Program::start(&path, &[])?;
    let mut times = Sample::default();
    for _ in 0..2 * bench.rounds {
        let start = Instant::now();
        let mut leakmon = Command::new(&bench.leakmon)
            .args(["--pid", &program.pid().to_string(), "--interval", "2s"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start leakmon")?;
        let output = leakmon.stdout.take().context("leakmon has no output")?;
        let read = BufReader::new(output).read_line(&mut String::new());
        times.add(start.elapsed().as_secs_f64());
        // It has been heard; how it ends does not matter.
        let _ = leakmon.kill();
        leakmon.wait()?;
        read.context("leakmon printed nothing")?;
    }
    let mut table = Table::new(&["program", "first line of output"]);
    table.add([format!("Go, {size} MB"), times.milliseconds()]);
    bench
        .report
        .tables
        .push(("From start to first report (median, least–most)", table));
    bench.report.target(
        &format!("first report on a Go program of {size} MB"),
        &format!("within {:.0} ms", 1000.0 * WANTED),
        times.milliseconds(),
        times.median() <= WANTED,
    );
    Ok(())
}
