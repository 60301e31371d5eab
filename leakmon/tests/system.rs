//! `leakmon` without a pid: every process in one table, none too many and none
//! missing.
//!
//! Needs root, and the fixtures (see `common`).

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Owned, Running, Started, fixture, leakmon, run, scratch};
use serde_json::Value;

/// A copy of a fixture under a name that no other process has.
fn named(folder: &Path, program: &str, name: &str) -> Option<PathBuf> {
    let fixture = fixture(program, "plain")?;
    let copy = folder.join(name);
    fs::copy(fixture.path, &copy).expect("a copy");
    Some(copy)
}

/// The processes in one table of those with names that fit `pattern`.
#[track_caller]
fn once(args: &[&str]) -> Vec<Value> {
    let mut all = vec!["--once", "--format", "json"];
    all.extend(args);
    let done = run(&mut leakmon(all));
    done.expect_code(0);
    let tables = done.json();
    assert_eq!(tables.len(), 1);
    processes(&tables[0])
}

fn processes(table: &Value) -> Vec<Value> {
    table["processes"].as_array().expect("processes").clone()
}

fn of(processes: &[Value], pid: u32) -> Option<&Value> {
    processes.iter().find(|process| process["pid"] == pid)
}

/// On a terminal of its own, which `script` gives it, with what is typed there.
#[test]
fn q_ends_a_live_table() {
    let own = format!("--pid {} --tier census", std::process::id());
    for what in ["", &own] {
        let leakmon = env!("CARGO_BIN_EXE_leakmon");
        let line = format!(
            "stty rows 60 cols 150; timeout --foreground --kill-after 5 60 {leakmon} {what}; echo said $?; stty -a"
        );
        let mut script = Command::new("script");
        let script = script.args(["--quiet", "--command", &line, "/dev/null"]);
        let mut script = Owned::spawn(script.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut input = script.0.stdin.take().expect("its input");
        let mut output = script.0.stdout.take().expect("its output");
        let mut said = Vec::new();
        let mut typed = false;
        let mut some = [0; 4096];
        while let Ok(length @ 1..) = output.read(&mut some) {
            said.extend(&some[..length]);
            // Keys are listened to before the first table is drawn.
            if !typed && String::from_utf8_lossy(&said).contains("\x1b[?1049h") {
                input.write_all(b"zq").expect("it is typed");
                typed = true;
            }
        }
        let said = String::from_utf8_lossy(&said);
        let (table, rest) = said.split_once("\x1b[?1049l").expect("it left its screen");
        assert!(!table.contains("zq"), "{said}");
        assert!(rest.contains("said 0"), "{said}");
        for mode in [" icanon", " echo "] {
            assert!(rest.contains(mode), "{mode}: {said}");
        }
    }
}

#[test]
fn every_process_has_its_counts() {
    let folder = scratch();
    let Some(zoo) = named(folder.path(), "zoo", "system-zoo") else {
        return;
    };
    let senders = named(folder.path(), "senders", "system-senders").expect("the fixture");
    let mut zoos = [Running::start(&zoo), Running::start(&zoo)];
    let mut leak = Running::start(&senders);
    leak.ask("call 3");
    let mut sleep = Command::new("sleep");
    let sleep = Owned::spawn(sleep.arg("1000"));

    let all = once(&[]);
    for running in zoos.iter_mut().chain([&mut leak]) {
        let process = of(&all, running.pid()).expect("it is in the table");
        let go = &process["runtimes"][0];
        assert_eq!(go["name"], "go");
        assert_eq!(go["live"], running.count(), "{process:#}");
        assert!(
            go["version"]
                .as_str()
                .is_some_and(|v| v.starts_with("go1."))
        );
    }
    let plain = of(&all, sleep.pid()).expect("it is in the table");
    assert_eq!(plain["runtimes"], Value::Array(vec![]));
    assert_eq!(
        (&plain["threads"], &plain["name"]),
        (&1.into(), &"sleep".into())
    );

    // /proc has no other processes that run programs than the table.
    for process in &all {
        let pid = process["pid"].as_u64().expect("a pid");
        // Those that have ended meanwhile say nothing.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
            continue;
        };
        let uid = status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next())
            .expect("a user");
        if uid == "0" {
            assert_eq!(process["user"], "root");
        }
    }
}

#[test]
fn filters_choose() {
    let folder = scratch();
    let Some(path) = named(folder.path(), "senders", "filtered-senders") else {
        return;
    };
    let running = Running::start(&path);
    let pids = |args: &[&str]| -> Vec<u64> {
        let pid = |process: &Value| process["pid"].as_u64().expect("a pid");
        once(args).iter().map(pid).collect()
    };
    let own = [u64::from(running.pid())];
    assert_eq!(pids(&["--name", "filtered-senders"]), own);
    assert_eq!(pids(&["--name", "tered-send"]), own);
    assert_eq!(pids(&["--name", "filtered*", "--user", "root"]), own);
    let none: [u64; 0] = [];
    assert_eq!(pids(&["--name", "filtered*", "--user", "12345"]), none);
    assert_eq!(pids(&["--name", "filtered"]), own);
    assert_eq!(
        pids(&["--name", "senders*"]),
        none,
        "the pattern is for the whole name"
    );
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", running.pid())).expect("it lives");
    let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    if let Some(cgroup) = cgroup {
        assert_eq!(pids(&["--name", "filtered*", "--cgroup", cgroup]), own);
    }
    assert_eq!(
        pids(&["--name", "filtered*", "--cgroup", "no such group"]),
        none
    );

    for (args, says) in [
        (&["--name", "["][..], "--name"),
        (&["--user", "nobody-by-this-name"], "no such user"),
        (&["--name", "x", "--pid", "1"], "cannot be used with"),
        (&["--tier", "blocking"], "--pid"),
    ] {
        let done = run(&mut leakmon(args));
        done.expect_code(2);
        assert!(done.err.contains(says), "{done:#?}");
    }
}

/// A table of the processes with this name that `fits`.
fn table_that(watch: &Started, what: &str, fits: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    for _ in 0..400 {
        let table: Value = serde_json::from_str(&watch.wait_for_line()).expect("a table");
        let processes = processes(&table);
        if fits(&processes) {
            return processes;
        }
    }
    panic!("no table ever {what}");
}

#[test]
fn processes_come_go_and_change() {
    let folder = scratch();
    let Some(path) = named(folder.path(), "senders", "coming-senders") else {
        return;
    };
    let args = [
        "--name",
        "coming-*",
        "--interval",
        "100ms",
        "--format",
        "json",
    ];
    let watch = Started::start(&mut leakmon(args));
    table_that(&watch, "is empty", <[Value]>::is_empty);
    let mut first = Running::start(&path);
    first.ask("call 2");
    let count = first.count();
    table_that(&watch, "shows the new process", |processes| {
        of(processes, first.pid()).is_some_and(|it| it["runtimes"][0]["live"] == count)
    });
    let second = Running::start(&path);
    table_that(&watch, "shows both", |processes| processes.len() == 2);

    // By exec, the same pid becomes another program, of another name.
    let other = folder.path().join("gone-sleep");
    fs::copy("/bin/sleep", &other).expect("a copy");
    first.tell(&format!("exec {} 1000", other.display()));
    table_that(&watch, "lacks what was replaced", |processes| {
        processes.len() == 1 && of(processes, second.pid()).is_some()
    });
    drop(second);
    table_that(&watch, "is empty again", <[Value]>::is_empty);
    watch.signal(nix::sys::signal::Signal::SIGINT);
    watch.finish().expect_code(0);
}

#[test]
fn a_leak_is_marked_in_the_table() {
    let folder = scratch();
    let Some(path) = named(folder.path(), "senders", "marked-senders") else {
        return;
    };
    let mut running = Running::start(&path);
    running.ask("call 4");
    let args = [
        "--name",
        "marked-*",
        "--interval",
        "200ms",
        "--format",
        "json",
    ];
    let watch = Started::start(&mut leakmon(args));
    let processes = table_that(&watch, "marks it", |processes| {
        processes
            .iter()
            .any(|process| !process["verdict"].is_null())
    });
    let verdict = &processes[0]["verdict"];
    assert_eq!(verdict["kind"], "stuck");
    let sentence = verdict["sentence"].as_str().expect("a sentence");
    assert!(sentence.contains("chan send at main.go:"), "{sentence}");
    watch.signal(nix::sys::signal::Signal::SIGTERM);
    watch.finish().expect_code(0);
}
