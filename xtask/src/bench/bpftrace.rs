//! bpftrace at leakmon's own probe places, counting in maps: what anybody can have today.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::{Bench, hits};
use crate::command::Run;
use crate::debian;
use crate::progress::note;

/// What each role does in bpftrace's language, with the registers' names replaced. It counts spawns and exits by site,
/// and parks by site; and puts the time of a wait into a histogram.
const ACTIONS: &[(&str, &str)] = &[
    ("spawn", "@spawned[*(uint64 *)(SECOND + GOPC)] = count();"),
    (
        "spawn (returned)",
        "@spawned[*(uint64 *)(FIRST + GOPC)] = count();",
    ),
    ("exit", "@exited[*(uint64 *)(FIRST + GOPC)] = count();"),
    (
        "park",
        "@since[G] = nsecs; @parked[*(uint64 *)(G + GOPC)] = count();",
    ),
    ("resume", RESUME),
    (
        "park (universal)",
        "@since[FIRST] = nsecs; @parked[*(uint64 *)(FIRST + GOPC)] = count();",
    ),
    ("ready", READY),
];

const RESUME: &str =
    "$since = @since[G]; if ($since != 0) { @waited = hist(nsecs - $since); delete(@since[G]); }";

const READY: &str = "$since = @since[FIRST]; if ($since != 0) { @waited = hist(nsecs - $since); delete(@since[FIRST]); }";

/// Go's registers by their role, in bpftrace's words.
#[cfg(target_arch = "x86_64")]
const REGISTERS: &[(&str, &str)] = &[
    ("FIRST", "reg(\"ax\")"),
    ("SECOND", "reg(\"bx\")"),
    ("G", "reg(\"r14\")"),
];

/// Go's registers by their role, in bpftrace's words.
#[cfg(target_arch = "aarch64")]
const REGISTERS: &[(&str, &str)] = &[
    ("FIRST", "reg(\"r0\")"),
    ("SECOND", "reg(\"r1\")"),
    ("G", "reg(\"r28\")"),
];

/// Installs bpftrace where it is missing. The reason when it cannot be had.
pub(super) fn ensure() -> Result<(), String> {
    let present = || Run::new("bpftrace").arg("--version").succeeds();
    if present() {
        return Ok(());
    }
    if !debian::is_debian() {
        return Err("bpftrace is not installed, and this system has no apt-get".to_owned());
    }
    note("bpftrace, to compare with");
    if let Err(error) = debian::install(&["bpftrace"]) {
        return Err(format!("bpftrace cannot be installed: {error:#}"));
    }
    if present() {
        Ok(())
    } else {
        Err("bpftrace does not start".to_owned())
    }
}

/// The script that watches a running program, which must be stripped: bpftrace takes an offset in the file only where
/// there are no symbols.
pub(super) fn script(bench: &Bench<'_>, program: &Path, pid: u32) -> Result<String> {
    let places = hits::places(bench, pid)?;
    let gopc = places
        .lines()
        .find_map(|line| line.strip_prefix("gopc "))
        .context("no offset of gopc")?;
    let mut script = String::new();
    for (role, action) in ACTIONS {
        let points: Vec<String> = places
            .lines()
            .filter_map(|line| line.strip_prefix(role)?.strip_prefix(": "))
            .map(|offset| format!("uprobe:{}:{offset}", program.display()))
            .collect();
        if points.is_empty() {
            continue;
        }
        // GOPC first, which has a G in it.
        let action = REGISTERS
            .iter()
            .fold(action.replace("GOPC", gopc), |action, (name, register)| {
                action.replace(name, register)
            });
        script += &format!("{} {{ {action} }}\n", points.join(","));
    }
    Ok(script)
}
