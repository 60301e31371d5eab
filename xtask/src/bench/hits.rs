//! CPU time of a hit, against that of a program which does nothing at the same place. leakmon's own bench measures it,
//! with leakmon's library.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::sample::Sample;
use super::table::Table;
use super::{Bench, Report};
use crate::command::Run;
use crate::fixtures;
use crate::setup;

/// What a hit may cost, in those of an empty program.
const WANTED: f64 = 1.3;

/// Measures and adds the table.
pub(super) fn run(bench: &mut Bench<'_>) -> Result<()> {
    let pingpong = fixtures::one(&bench.go, "pingpong")?;
    let rounds = (2 * bench.rounds).to_string();
    let text = Run::new(&bench.hits)
        .arg("cost")
        .arg(&pingpong)
        .arg(&rounds)
        .capture()?;
    let mut table = Table::new(&[
        "programs of",
        "empty program, ns",
        "leakmon's, ns",
        "leakmon's : empty",
    ]);
    for tier in ["lifecycle", "blocking"] {
        let lines: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix(tier))
            .collect();
        let values = |name: &str| -> Result<Sample> {
            lines.iter().map(|line| super::field(line, name)).collect()
        };
        let ratio = values("ratio")?;
        table.add([
            tier.to_owned(),
            format!("{:.0}", values("empty_ns")?.median()),
            format!("{:.0}", values("probed_ns")?.median()),
            ratio.ratio(),
        ]);
        target(&mut bench.report, tier, &ratio);
    }
    bench.report.tables.push((
        "CPU time of a hit (a Go program's own process clock; median, least–most)",
        table,
    ));
    Ok(())
}

fn target(report: &mut Report, tier: &str, ratio: &Sample) {
    report.target(
        &format!("hit of {tier} : hit of an empty program"),
        &format!("at most {WANTED}"),
        ratio.ratio(),
        ratio.median() <= WANTED,
    );
}

/// What leakmon would probe in a process.
pub(super) fn places(bench: &Bench<'_>, pid: u32) -> Result<String> {
    Run::new(&bench.hits)
        .arg("places")
        .arg(pid.to_string())
        .capture()
}

/// Compiles leakmon's bench and gives the program's path.
pub(super) fn build() -> Result<PathBuf> {
    let built = setup::cargo()
        .args(["bench", "--quiet", "--no-run", "--package", "leakmon"])
        .args(["--bench", "hits", "--message-format", "json"])
        .capture()?;
    built
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "hits")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo named no program of leakmon's bench")
}
