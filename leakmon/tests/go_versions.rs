//! What leakmon reads of the zoo is what the zoo says of itself: the count,
//! every goroutine's stack, and the profiles, in every Go version that is read
//! and in every way of building that is known.
//!
//! Goroutine 1 is left out of what is compared: it carries out the command that
//! makes the program's own dump.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Fixture, Running};

/// Every zoo of a variant, in these modes.
const MODES: [&[&str]; 3] = [&[], &["-gc"], &["-block-finalizer"]];

#[test]
fn plain() {
    every_version("plain", true);
}

#[test]
fn stripped() {
    every_version("stripped", true);
}

#[test]
fn position_independent() {
    every_version("pie", true);
}

#[test]
fn with_c_and_stripped() {
    every_version("cgo-stripped", true);
}

#[test]
fn guided_by_a_profile() {
    // Go 1.20 has no `-pgo=auto`, and the fixtures none before 1.21.
    every_version("pgo", false);
}

/// Compares the zoos of this variant, and panics with every difference.
fn every_version(variant: &str, oldest: bool) {
    if common::fixtures().is_none() {
        return;
    }
    let zoos = common::all("zoo", variant);
    let first = if oldest { 18 } else { 21 };
    let expected: Vec<String> = match std::env::var("LEAKMON_GO_VERSIONS") {
        Ok(some) => {
            eprintln!("of the versions of Go only {some}: the others are not tested");
            some.split(' ').map(str::to_owned).collect()
        }
        Err(_) => (first..=27).map(|minor| format!("1.{minor}")).collect(),
    };
    let found: Vec<String> = zoos.iter().map(|zoo| zoo.go.clone()).collect();
    assert_eq!(found, expected, "zoos of {variant}");
    let mut wrong = Vec::new();
    for zoo in &zoos {
        for mode in MODES {
            let what = format!("{} {variant} {}", zoo.go_version, mode.join(" "));
            let differences = compare(zoo, mode);
            eprintln!(
                "{what}: count {}, {} goroutines, {} groups, {} differences",
                differences.count,
                differences.goroutines,
                differences.groups,
                differences.found.len()
            );
            wrong.extend(
                differences
                    .found
                    .iter()
                    .map(|found| format!("{what}: {found}")),
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a comparison found.
struct Differences {
    count: u64,
    goroutines: usize,
    groups: usize,
    found: Vec<String>,
}

impl Differences {
    fn equal(&mut self, what: &str, ours: &str, theirs: &str) {
        if ours != theirs {
            let difference = difference(ours, theirs);
            self.found.push(format!("{what}: {difference}"));
        }
    }
}

fn compare(zoo: &Fixture, mode: &[&str]) -> Differences {
    let scratch = common::scratch();
    let mut target = Running::command(Command::new(&zoo.path).args(mode));
    let pid = target.pid().to_string();
    let mut differences = Differences {
        count: target.count(),
        goroutines: 0,
        groups: 0,
        found: Vec::new(),
    };

    let report = common::run(&mut common::leakmon([
        "--pid", &pid, "--once", "--format", "json",
    ]));
    let report = report.expect_code(0).json().remove(0);
    let live = report["tasks"]["live"].as_u64().unwrap_or(0);
    differences.equal("count", &live.to_string(), &differences.count.to_string());

    let stacks = |format: &str| {
        let mut command = common::leakmon(["stacks", "--pid", &pid, "--format", format]);
        common::run(&mut command).expect_code(0).out.clone()
    };
    let theirs = String::from_utf8(target.text("stacks2")).expect("a dump in UTF-8");
    let (ours, theirs) = (dump(&stacks("debug2")), dump(&theirs));
    differences.goroutines = theirs.len();
    differences.groups = groups(&theirs);
    differences.equal("debug=2", &ours.join("\n"), &theirs.join("\n"));
    if !mode.is_empty() {
        return differences;
    }

    let theirs = String::from_utf8(target.text("stacks1")).expect("a dump in UTF-8");
    differences.equal("debug=1", &counted(&stacks("debug1")), &counted(&theirs));

    let ours = scratch.path().join("ours");
    let theirs = scratch.path().join("theirs");
    let command = ["stacks", "--pid", &pid, "--format", "pprof"];
    let profile = common::leakmon(command).output().expect("a profile");
    assert!(profile.status.success(), "{profile:?}");
    std::fs::write(&ours, profile.stdout).expect("a profile");
    target.ask(&format!("pprof {}", theirs.display()));
    for listing in ["-top", "-traces"] {
        differences.equal(listing, &pprof(listing, &ours), &pprof(listing, &theirs));
    }
    differences
}

/// The goroutines of a debug=2 dump but goroutine 1.
fn dump(text: &str) -> Vec<String> {
    let mut goroutines = common::goroutines(text);
    goroutines.retain(|goroutine| !goroutine.starts_with("goroutine 1 ["));
    goroutines
}

/// How many different states, stacks and creators there are.
fn groups(dump: &[String]) -> usize {
    let without_id = |goroutine: &String| {
        let id = goroutine.find('[').unwrap_or_default();
        goroutine[id..].to_owned()
    };
    let groups: std::collections::BTreeSet<String> = dump.iter().map(without_id).collect();
    groups.len()
}

/// A debug=1 dump without goroutine 1: the only one that has main.main on its
/// stack.
fn counted(text: &str) -> String {
    let others = text
        .split("\n\n")
        .filter(|stack| !stack.contains("\tmain.main+"));
    others.collect::<Vec<_>>().join("\n\n")
}

/// What `go tool pprof` says of a profile without goroutine 1.
fn pprof(listing: &str, profile: &Path) -> String {
    let output = Command::new(common::go())
        .args([
            "tool",
            "pprof",
            "-ignore=^main\\.main$",
            "-nodefraction=0",
            "-nodecount=10000",
        ])
        .arg(listing)
        .arg(profile)
        .output()
        .expect("go tool pprof");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("a listing in UTF-8");
    text.lines()
        .filter(|line| !line.starts_with("Time: "))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The first line in which two texts differ, with what leads to it.
fn difference(ours: &str, theirs: &str) -> String {
    let (ours, theirs): (Vec<_>, Vec<_>) = (ours.lines().collect(), theirs.lines().collect());
    let equal = ours
        .iter()
        .zip(&theirs)
        .take_while(|(ours, theirs)| ours == theirs)
        .count();
    let around = |lines: &[&str]| {
        let end = lines.len().min(equal + 4);
        lines[equal.saturating_sub(4).min(end)..end].join("\n    ")
    };
    format!(
        "line {} of {} and {}\n  leakmon:\n    {}\n  the program:\n    {}",
        equal + 1,
        ours.len(),
        theirs.len(),
        around(&ours),
        around(&theirs)
    )
}
