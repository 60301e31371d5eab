//! leakmon and its tests, as they run in a guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::suite::Suite;
use crate::arch::Arch;
use crate::command::Run;
use crate::cross::{Compiler, Libc};
use crate::go::{Go, RELEASES};
use crate::progress::step;
use crate::setup;
use crate::workspace;

/// What was built for guests of one architecture.
pub(super) struct Built {
    /// leakmon itself.
    pub(super) leakmon: PathBuf,
    /// The tests, by name.
    pub(super) tests: BTreeMap<String, PathBuf>,
    /// What stands for `go build` and `go tool pprof`, by the name of its file.
    pub(super) go: Vec<PathBuf>,
}

/// Sources of Go programs that tests build.
const GO_SOURCES: &[&str] = &[
    "leakmon/tests/probe/target.go",
    "leakmon/tests/flow/forks.go",
];

/// Builds leakmon, its tests, and what the tests ask of Go.
pub(super) fn build(arch: Arch, driver: &Go, suite: &Suite) -> Result<Built> {
    let (leakmon, tests) = step(
        &format!("leakmon and its tests for {}", arch.name()),
        || binaries(arch, suite),
    )?;
    let go = step(&format!("Go programs for {}", arch.name()), || {
        go_programs(arch, driver)
    })?;
    Ok(Built { leakmon, tests, go })
}

/// cargo's command line for leakmon and the tests: for this machine's processor, the ones that run here too; else linked
/// so that they need no library, in a folder of their own, so that neither waits for the other.
fn cargo(arch: Arch, suite: &Suite) -> Result<Run> {
    let cargo = if arch.is_native() {
        setup::cargo().arg("test")
    } else {
        Compiler::ensure(arch, Libc::Gnu)?
            .cargo("test", &["-Ctarget-feature=+crt-static"])
            .args(["--package", "leakmon"])
            .env("CARGO_TARGET_DIR", workspace::target().join("vm/cargo"))
    };
    let wanted = suite.binaries().into_iter();
    Ok(cargo
        .args(["--release", "--no-run"])
        .args(wanted.flat_map(|test| ["--test", test]))
        .arg("--message-format=json-render-diagnostics"))
}

/// Compilers that work while this machine waits for something else. Who needs what they make starts the same cargo, which
/// waits for them, does the rest, and tells what they failed at. Dropped, they end after the crates that they are at.
pub(crate) struct Ahead(Vec<Child>);

impl Ahead {
    /// Starts one for each of the other processors.
    pub(super) fn start(archs: impl Iterator<Item = Arch>, suite: &Suite) -> Result<Self> {
        let mut ahead = Self(Vec::new());
        for arch in archs.filter(|arch| !arch.is_native()) {
            ahead.0.push(cargo(arch, suite)?.behind()?);
        }
        Ok(ahead)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Builds leakmon and the tests, and finds them.
fn binaries(arch: Arch, suite: &Suite) -> Result<(PathBuf, BTreeMap<String, PathBuf>)> {
    let said = cargo(arch, suite)?.capture()?;
    let (mut leakmon, mut tests) = (None, BTreeMap::new());
    for line in said.lines() {
        let message: Value = serde_json::from_str(line)?;
        let Some(path) = message["executable"].as_str().map(PathBuf::from) else {
            continue;
        };
        let name = message["target"]["name"].as_str().unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        match (kind, message["profile"]["test"] == true) {
            ("bin", false) => leakmon = Some(path),
            ("test", _) => drop(tests.insert(name.to_owned(), path)),
            _ => {}
        }
    }
    let leakmon = leakmon.context("cargo names no program leakmon")?;
    Ok((leakmon, tests))
}

/// The programs that tests build with `go build`, and pprof, which is one of Go's tools.
fn go_programs(arch: Arch, driver: &Go) -> Result<Vec<PathBuf>> {
    let folder = workspace::target().join("vm").join(arch.name()).join("go");
    workspace::create(&folder)?;
    let &(minor, patch) = RELEASES.last().context("no Go releases are listed")?;
    let newest = Go::of(driver, minor, patch)?;
    let build = |go: &Go, what: &Path, name: &str| {
        let path = folder.join(name);
        go.command()
            .args(["build", "-buildvcs=false", "-o"])
            .arg(&path)
            .arg(what)
            .dir(&folder)
            .env("CGO_ENABLED", "0")
            .env("GOWORK", "off")
            .env("GOOS", "linux")
            .env("GOARCH", arch.debian())
            .capture()
            .map(|_| path)
    };
    let mut programs = vec![build(&newest, Path::new("cmd/pprof"), "pprof")?];
    for source in GO_SOURCES {
        let source = workspace::root().join(source);
        let name = source.file_stem().and_then(|name| name.to_str());
        programs.push(build(driver, &source, name.context("a source's name")?)?);
    }
    Ok(programs)
}
