//! tokio's programs that lie, end or change: a clear message and the threads, or
//! the right numbers, and never others.
//!
//! Needs root, and the fixtures (see `common`).

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Done, Running, Started, leakmon, patched, run, scratch};
use nix::sys::signal::Signal;
use serde_json::Value;

fn zoo(build: &str) -> Option<PathBuf> {
    let path = common::fixtures()?.join(build).join("zoo");
    if !path.exists() {
        eprintln!("there is no {}: it is not tested", path.display());
        return None;
    }
    Some(std::fs::canonicalize(path).expect("the fixture"))
}

/// What the zoo says of itself: the runtimes' own numbers, and the tasks of its
/// LocalSet.
fn count(zoo: &mut Running) -> u64 {
    let number = |answer: &str, wanted: &dyn Fn(&str) -> bool| -> u64 {
        let words = answer.split(' ').filter_map(|word| word.split_once('='));
        words
            .filter(|(key, _)| wanted(key))
            .map(|(_, number)| number.parse::<u64>().expect("a number"))
            .sum()
    };
    number(&zoo.ask("alive"), &|_| true) + number(&zoo.ask("count"), &|key| key == "local")
}

/// leakmon's only report, and tokio's part of it.
#[track_caller]
fn once(pid: u32) -> (Done, Value) {
    let pid = pid.to_string();
    let done = run(&mut leakmon(["--pid", &pid, "--once", "--format", "json"]));
    let report: Value = serde_json::from_str(&done.out).expect("one report");
    let runtimes = report["runtimes"].as_array().expect("runtimes");
    let tokio = runtimes.iter().find(|r| r["runtime"]["name"] == "tokio");
    let tokio = tokio.cloned().unwrap_or_default();
    (done, tokio)
}

/// Its tasks cannot be read for this reason; its threads are told all the same.
#[track_caller]
fn refused(pid: u32, program: &Path, reason: &str) {
    let (done, tokio) = once(pid);
    assert_eq!(done.err, "");
    done.expect_code(6);
    assert_eq!(tokio["refusal"], reason);
    assert!(tokio["tasks"].is_null(), "{tokio:#}");
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let report: Value = serde_json::from_str(&done.out).expect("one report");
    assert_eq!(report["threads"], threads.count());
    let stacks = ["stacks", "--runtime", "tokio", "--pid", &pid.to_string()];
    let done = run(&mut leakmon(stacks));
    assert_eq!(
        done.err,
        format!("leakmon: pid {pid} ({}): {reason}\n", program.display())
    );
    done.expect_code(6);
}

#[test]
fn versions_that_are_too_old_or_not_true() {
    let Some(path) = zoo("tokio-1.54/release") else {
        return;
    };
    let folder = scratch();
    let program = patched(&path, folder.path(), b"tokio-1.54.1", b"tokio-1.15.1");
    let running = Running::start(&program);
    refused(
        running.pid(),
        &program,
        "built with tokio 1.15.1; leakmon reads 1.18 and later",
    );
    // Versions whose vtables look otherwise.
    for claimed in ["1.19.1", "1.22.1"] {
        let version = format!("tokio-{claimed}");
        let program = patched(&path, folder.path(), b"tokio-1.54.1", version.as_bytes());
        let running = Running::start(&program);
        refused(
            running.pid(),
            &program,
            &format!(
                "says that it is built with tokio {claimed}, but its task vtables are those of \
                 1.23 or later; leakmon does not guess which is true"
            ),
        );
    }
    // Versions with the same layout, of which one does not exist yet.
    for claimed in ["1.23.9", "1.99.1"] {
        let version = format!("tokio-{claimed}");
        let program = patched(&path, folder.path(), b"tokio-1.54.1", version.as_bytes());
        let mut running = Running::start(&program);
        let alive = count(&mut running);
        let (done, tokio) = once(running.pid());
        done.expect_code(0);
        assert_eq!(tokio["tasks"]["live"], alive, "{claimed}: {tokio:#}");
    }
    // The reverse: what has not the vtables that its version has.
    let Some(old) = zoo("tokio-1.20/release") else {
        return;
    };
    let text = std::fs::read(&old).expect("the fixture");
    let at = position(&text, b"tokio-1.20.");
    let known = text[at..at + "tokio-1.20.6".len()].to_vec();
    let program = patched(&old, folder.path(), &known, b"tokio-1.54.6");
    let running = Running::start(&program);
    refused(
        running.pid(),
        &program,
        "has tokio's runtime, but no task vtable that leakmon knows (tokio 1.54.6)",
    );
}

/// Where `needle` first is.
fn position(text: &[u8], needle: &[u8]) -> usize {
    let mut windows = text.windows(needle.len());
    windows
        .position(|window| window == needle)
        .expect("it is there")
}

#[test]
fn it_dies_while_it_is_watched() {
    for build in ["tokio-1.20/release", "tokio-1.54/fat-stripped"] {
        let Some(path) = zoo(build) else { return };
        for tier in ["census", "lifecycle", "blocking"] {
            let mut running = Running::start(&path);
            let alive = count(&mut running);
            let pid = running.pid().to_string();
            let watch = Started::start(&mut leakmon([
                "--pid",
                &pid,
                "--interval",
                "50ms",
                "--format",
                "json",
                "--tier",
                tier,
            ]));
            for _ in 0..3 {
                watch.wait_for_line();
            }
            running.child.signal(Signal::SIGKILL);
            let done = watch.finish();
            done.expect_code(5);
            assert!(done.err.contains(": the process has ended"), "{done:#?}");
            for line in done.out.lines() {
                let report: Value = serde_json::from_str(line).expect("a report");
                let tokio = &report["runtimes"][0];
                assert_eq!(tokio["runtime"]["name"], "tokio", "{report:#}");
                assert_eq!(tokio["tasks"]["live"], alive, "{build} {tier}: {tokio:#}");
            }
        }
    }
}

/// Death at any moment of a census or a dump: the right numbers, or none.
#[test]
fn it_dies_in_the_middle_of_a_census() {
    let Some(path) = zoo("tokio-1.54/release") else {
        return;
    };
    let mut ended = 0;
    for round in 0..40 {
        let mut running = Running::start(&path);
        running.ask("spawn 3000");
        let alive = count(&mut running);
        let pid = running.pid().to_string();
        let census = ["--pid", &pid, "--once", "--format", "json"];
        let started = Started::start(&mut leakmon(census));
        std::thread::sleep(Duration::from_micros(3000 * round));
        running.child.signal(Signal::SIGKILL);
        let done = started.finish();
        match done.code {
            Some(0) => {
                let report: Value = serde_json::from_str(&done.out).expect("a report");
                assert_eq!(report["runtimes"][0]["tasks"]["live"], alive, "{report:#}");
            }
            Some(3) => assert!(done.out.is_empty(), "{done:#?}"),
            Some(5) => {
                ended += 1;
                assert!(done.out.is_empty(), "{done:#?}");
                assert!(done.err.contains(": the process has ended"), "{done:#?}");
            }
            _ => panic!("{done:#?}"),
        }
    }
    eprintln!("{ended} of 40 ended in the middle");
}

#[test]
fn its_executable_is_deleted_or_another_now() {
    let (Some(path), Some(other)) = (zoo("tokio-1.54/release"), zoo("tokio-1.20/release")) else {
        return;
    };
    let folder = scratch();
    let program = folder.path().join("program");
    std::fs::copy(&path, &program).expect("a copy");
    let mut running = Running::start(&program);
    let alive = count(&mut running);
    let mut check = |what: &str| {
        let (done, tokio) = once(running.pid());
        done.expect_code(0);
        assert_eq!(tokio["tasks"]["live"], alive, "{what}: {tokio:#}");
        let pid = running.pid().to_string();
        let watch = Started::start(&mut leakmon([
            "--pid",
            &pid,
            "--tier",
            "lifecycle",
            "--interval",
            "100ms",
            "--format",
            "json",
        ]));
        for _ in 0..4 {
            watch.wait_for_line();
        }
        running.ask("churn 500");
        for _ in 0..3 {
            watch.wait_for_line();
        }
        watch.signal(Signal::SIGINT);
        let done = watch.finish();
        done.expect_code(0);
        let last = done.out.lines().last().expect("a report");
        let last: Value = serde_json::from_str(last).expect("a report");
        let probes = &last["runtimes"][0]["probes"];
        assert_eq!(probes["spawned"], 500, "{what}: {last:#}");
        assert_eq!(probes["exited"], 500, "{what}: {last:#}");
    };
    std::fs::remove_file(&program).expect("its file");
    check("deleted");
    std::fs::copy(other, &program).expect("another");
    check("replaced");
}
