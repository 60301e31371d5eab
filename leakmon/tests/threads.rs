//! Threads, held against what the kernel and the programs themselves say.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Owned, Running, fixtures, wait_until};
use leakmon::probe::Kernel;
use leakmon::process::identity::Process;
use leakmon::runtime::RegisterSource;
use leakmon::runtime::threads::census::{Census, Detail};
use leakmon::task::{Dump, State, Task};

/// Every build of the program with a thread in each wait.
fn zoos() -> Vec<(String, PathBuf)> {
    let Some(folder) = fixtures() else {
        return Vec::new();
    };
    let mut found: Vec<(String, PathBuf)> = std::fs::read_dir(folder.join("threads"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, entry.path().join("threadzoo"))
        })
        .filter(|(_, path)| path.exists())
        .collect();
    found.sort();
    if found.is_empty() {
        eprintln!("there is no fixture threads/*/threadzoo: it is not tested");
    }
    found
}

fn zoo(build: &str) -> Option<Running> {
    let (_, path) = zoos().into_iter().find(|(name, _)| name == build)?;
    Some(Running::start(&path))
}

fn census(pid: u32) -> Census {
    let process = Process::open(pid).expect("a process");
    Census::open(&process, Detail::Stacks).expect("its threads")
}

/// `Threads:` of its status.
fn kernel_count(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Threads:"));
    line.and_then(|count| count.trim().parse().ok())
        .expect("a count of threads")
}

/// What the zoo says of one of its threads.
#[derive(Debug)]
struct Expected {
    tid: u64,
    name: String,
    function: String,
    wait: String,
    on: Option<String>,
    line: u32,
}

fn table(running: &mut Running) -> Vec<Expected> {
    let text = String::from_utf8(running.text("threads")).expect("a table");
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [tid, name, function, wait, on, place, ..] = fields[..] else {
            panic!("a line of the table: {line:?}");
        };
        Expected {
            tid: tid.parse().expect("a thread id"),
            name: name.chars().take(15).collect(),
            function: function.to_owned(),
            wait: wait.to_owned(),
            on: (on != "-").then(|| on.to_owned()),
            line: place
                .rsplit(':')
                .next()
                .and_then(|line| line.parse().ok())
                .expect("a line number"),
        }
    };
    let expected = text.lines().map(parse).collect();
    // It answers first, and then waits for the next command.
    let pid = running.pid();
    wait_until("it sleeps", || common::state(pid) == Some('S'));
    std::thread::sleep(Duration::from_millis(5));
    expected
}

/// leakmon's word for what the zoo calls a wait.
fn reason(wait: &str) -> &str {
    match wait {
        "mutex" | "pi mutex" => "mutex lock",
        "condvar" | "condvar timed" => "condvar wait",
        "rwlock read" | "rwlock write" => "rwlock",
        "park timed" => "park",
        "epoll" => "epoll wait",
        "signal" => "rt_sigtimedwait",
        same => same,
    }
}

/// How much of what was expected was told.
#[derive(Debug, Default)]
struct Score {
    right: u32,
    unknown: u32,
    wrong: Vec<String>,
}

impl Score {
    fn add(&mut self, right: bool, unknown: bool, what: impl FnOnce() -> String) {
        match (right, unknown) {
            (true, _) => self.right += 1,
            (_, true) => self.unknown += 1,
            _ => self.wrong.push(what()),
        }
    }
}

/// Holds one dump against the zoo's table: reasons, what is waited for, lines,
/// and where threads started.
fn score(dump: &Dump, expected: &[Expected]) -> BTreeMap<&'static str, Score> {
    let mut scores: BTreeMap<&'static str, Score> = BTreeMap::new();
    for expected in expected {
        let found = dump.tasks.iter().find(|task| task.id == expected.tid);
        let task: &Task = found.unwrap_or_else(|| panic!("no thread {expected:?}"));
        assert_eq!(task.name.as_deref(), Some(&*expected.name), "{expected:?}");
        assert_eq!(task.state, State::Sleeping, "{expected:?}");
        let told = task.reason.as_deref();
        scores.entry("reason").or_default().add(
            told == Some(reason(&expected.wait)),
            // What a channel or a barrier is made of is true of it, too.
            matches!(told, None | Some("futex"))
                || expected.wait.starts_with("mpsc") && told == Some("park")
                || expected.wait == "barrier" && told == Some("condvar wait"),
            || format!("{expected:?}: {told:?}"),
        );
        let on = task.on.as_deref().unwrap_or("");
        if let Some(tid) = &expected.on {
            scores.entry("on").or_default().add(
                on.contains(&format!("thread {tid} (")),
                !on.contains("thread "),
                || format!("{expected:?}: {on:?}"),
            );
        }
        // The main thread is in a function of the protocol, called at the line.
        let main = expected.function.ends_with("main");
        let place = task.stack.and_then(|id| dump.stacks[id.0 as usize].place());
        let place = place.filter(|_| !main);
        let function = place.map_or("", |frame| &frame.function);
        let own = |function: &str| function == expected.function;
        // A function that was inlined into its closure, and one without a name.
        let vague = |function: &str| {
            function.is_empty()
                || function.contains("+0x")
                || function.ends_with('}')
                // One function with the names of two.
                || function.split(" or ").count() > 1 && function.split(" or ").any(own)
                || function.starts_with("thread \"")
                || function.contains("std::")
                || function.contains("core::")
                || !function.contains("threadzoo::") && expected.function.contains("::")
        };
        scores
            .entry("function")
            .or_default()
            .add(own(function), vague(function), || {
                format!("{expected:?}: {function:?}")
            });
        let line = place.map_or(0, |frame| frame.line);
        scores.entry("line").or_default().add(
            own(function) && line == expected.line,
            line == 0 || vague(function),
            || format!("{expected:?}: {place:?}"),
        );
        let site = &dump.sites[task.site.0 as usize];
        let entry = site.entry.as_ref().map_or("", |frame| &frame.function);
        scores.entry("entry").or_default().add(
            own(entry) || main && entry == "main",
            vague(entry) || site.doubt.is_some(),
            || format!("{expected:?}: {entry:?}"),
        );
    }
    scores
}

/// The kernel side, which knows more registers than `/proc`; `None` where it
/// cannot be loaded.
fn kernel() -> Option<Arc<Kernel>> {
    let loaded = Kernel::load().and_then(|kernel| {
        kernel.registers(std::process::id())?;
        Ok(Arc::new(kernel))
    });
    loaded
        .inspect_err(|error| eprintln!("without all registers: {error}"))
        .ok()
}

fn source(kernel: &Arc<Kernel>) -> RegisterSource {
    let kernel = Arc::clone(kernel);
    Box::new(move |pid| kernel.registers(pid).unwrap_or_default())
}

#[test]
fn every_wait_of_the_zoo_and_none_wrong() {
    let kernel = kernel();
    let mut wrong = Vec::new();
    for (build, path) in zoos() {
        let mut running = Running::start(&path);
        let expected = table(&mut running);
        let mut census = census(running.pid());
        let mut scores = BTreeMap::new();
        for with in [None, kernel.as_ref()] {
            if let Some(kernel) = with {
                census.use_registers(source(kernel));
            }
            let dump = census.dump().expect("a dump");
            assert_eq!(dump.tasks.len(), expected.len(), "{build}");
            scores = score(&dump, &expected);
            for (what, score) in &scores {
                eprintln!(
                    "{build}{}: {what}: {} right, {} unknown, {} wrong",
                    with.map_or("", |_| " with all registers"),
                    score.right,
                    score.unknown,
                    score.wrong.len()
                );
                wrong.extend(score.wrong.iter().map(|w| format!("{build}: {what}: {w}")));
            }
        }
        let unknown = |what: &str| scores.get(what).map_or(0, |score| score.unknown);
        let known = |what: &str| assert_eq!(unknown(what), 0, "{build}: {what}: {scores:#?}");
        // The main thread's function and line are not looked at.
        let but_main = |what: &str| assert_eq!(unknown(what), 1, "{build}: {what}: {scores:#?}");
        match &*build {
            "c-debug" => {
                known("reason");
                known("on");
                but_main("line");
            }
            "c-release" | "c-static" => {
                known("reason");
                known("on");
                known("entry");
                but_main("function");
            }
            "c-stripped" | "c-no-eh-frame" => {
                known("reason");
                known("on");
            }
            _ => {}
        }
        if kernel.is_some() {
            match &*build {
                "c-debug" => known("entry"),
                "rust-debug" => {
                    known("reason");
                    // Nor that of a closure within a function.
                    assert!(unknown("line") <= 2, "{build}: {scores:#?}");
                }
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_deadlock_is_named_with_both_threads_lock_and_lines() {
    let kernel = kernel();
    for (build, path) in zoos() {
        let mut running = Running::start(&path);
        let expected = table(&mut running);
        let of = |name: &str| {
            let found = expected.iter().find(|expected| expected.name == name);
            found.unwrap_or_else(|| panic!("no thread {name}"))
        };
        let (left, right) = (of("deadlock-left"), of("deadlock-right"));
        let mut census = census(running.pid());
        if let Some(kernel) = &kernel {
            census.use_registers(source(kernel));
        }
        let population = census.population().expect("a census");
        let pair: Vec<_> = population
            .cycles
            .iter()
            .filter(|cycle| cycle.members.iter().any(|m| m.task == left.tid))
            .collect();
        // Whoever is no part of it is in none.
        assert_eq!(pair.len(), population.cycles.len(), "{build}");
        if build == "c-386" || build == "c-musl" {
            assert!(population.cycles.is_empty(), "{build}");
            continue;
        }
        if !build.starts_with("c-") {
            eprintln!("{build}: {} cycles", population.cycles.len());
            let named = kernel.is_some() && matches!(&*build, "rust-debug" | "rust-release");
            if !named {
                continue;
            }
        }
        let [cycle] = pair[..] else {
            panic!("{build}: {:#?}", population.cycles);
        };
        // Rust's locks do not say who holds them.
        assert_eq!(cycle.doubt.is_none(), build.starts_with("c-"));
        let mut tids: Vec<u64> = cycle.members.iter().map(|member| member.task).collect();
        tids.sort_unstable();
        assert_eq!(tids, [left.tid.min(right.tid), left.tid.max(right.tid)]);
        assert_ne!(cycle.members[0].lock, cycle.members[1].lock);
        if build.ends_with("-debug") {
            for member in &cycle.members {
                let expected = if member.task == left.tid { left } else { right };
                let place = member.place.as_ref().expect("its place");
                assert_eq!(*place.function, expected.function);
                assert_eq!(place.line, expected.line);
                assert!(place.file.contains("threadzoo."), "{place:?}");
            }
        }
        // And again, where nothing has moved.
        let again = census.population().expect("a census");
        assert_eq!(again.cycles, population.cycles);
    }
}

#[test]
fn what_has_not_run_is_told_from_what_has() {
    let Some(mut running) = zoo("c-release") else {
        return;
    };
    let expected = table(&mut running);
    let mut census = census(running.pid());
    let threads = expected.len() as u64;
    let first = census.population().expect("a census");
    assert_eq!(first.count, threads);
    assert_eq!(first.groups.iter().map(|g| g.not_run).sum::<u64>(), 0);
    std::thread::sleep(Duration::from_millis(60));
    let second = census.population().expect("a census");
    assert_eq!(
        second.groups.iter().map(|g| g.not_run).sum::<u64>(),
        threads
    );
    for group in &second.groups {
        let age = group.oldest.expect("an age").at_least;
        assert!(age >= Duration::from_millis(60), "{age:?}");
    }
    // The main thread runs, and nobody else.
    running.ask("report");
    wait_until("it sleeps again", || {
        common::state(running.pid()) == Some('S')
    });
    let third = census.population().expect("a census");
    assert_eq!(third.count, threads);
    assert_eq!(
        third.groups.iter().map(|g| g.not_run).sum::<u64>(),
        threads - 1
    );
    let main = third
        .groups
        .iter()
        .find(|g| g.sample == u64::from(running.pid()));
    assert_eq!(main.expect("the main thread").not_run, 0);
    assert_eq!(third.states, BTreeMap::from([(State::Sleeping, threads)]));
}

#[test]
fn counts_are_the_kernels_under_churn() {
    let Some(mut running) = zoo("c-release") else {
        return;
    };
    let mut census = census(running.pid());
    let live = table(&mut running).len() as u64;
    running.tell("churn 2000 1000");
    let started = Instant::now();
    let mut seen = 0;
    while started.elapsed() < Duration::from_millis(1900) {
        let population = census.population().expect("a census");
        let count = population.count;
        assert!((live..=live + 1).contains(&count), "{count} of {live}");
        assert_eq!(population.states.values().sum::<u64>(), count);
        let groups = population.groups.iter().map(|group| group.count);
        assert_eq!(groups.sum::<u64>(), count);
        seen += 1;
    }
    assert!(running.line().starts_with("report "));
    assert_eq!(census.population().expect("a census").count, live);
    assert_eq!(census.count(), Ok(kernel_count(running.pid())));
    eprintln!("{seen} censuses under churn");
}

#[test]
fn ten_thousand_threads() {
    let Some(mut running) = zoo("c-release") else {
        return;
    };
    let before = table(&mut running).len() as u64;
    let answer = running.ask("leak 10000");
    let live = before + 10_000;
    assert!(answer.ends_with(&format!("live={live}")), "{answer}");
    let mut census = census(running.pid());
    let first = census.population().expect("a census");
    let second = census.population().expect("a census");
    eprintln!(
        "10,000 threads: {:?}, unmoved {:?}",
        first.took, second.took
    );
    assert_eq!((first.count, second.count), (live, live));
    assert_eq!(first.count, kernel_count(running.pid()));
    // Wakes the main thread: the others are looked at one by one.
    running.ask("report");
    let third = census.population().expect("a census");
    eprintln!("10,000 threads, one of which moved: {:?}", third.took);
    let leaked = third.groups.iter().find(|group| group.count >= 10_000);
    let leaked = leaked.expect("one group of all leaked threads");
    assert_eq!(leaked.reason.as_deref(), Some("semaphore"));
    let entry = third.site(leaked.site).entry.as_ref().expect("its entry");
    assert_eq!(&*entry.function, "leaked");
    assert_eq!(leaked.not_run, 10_000);
}

#[test]
fn programs_that_nobody_prepared() {
    let sleeps: [&[&str]; 4] = [
        &["sleep", "1000"],
        &[
            "python3",
            "-c",
            "import threading,time\nfor _ in range(3): threading.Thread(target=time.sleep,args=(1000,),daemon=True).start()\ntime.sleep(1000)",
        ],
        &["node", "-e", "setInterval(()=>{}, 100000)"],
        &["sh", "-c", "read line"],
    ];
    for command in sleeps {
        let spawned = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let Ok(child) = spawned else {
            eprintln!("there is no {}: it is not tested", command[0]);
            continue;
        };
        let child = Owned(child);
        std::thread::sleep(Duration::from_millis(700));
        let mut census = census(child.pid());
        let dump = census.dump().expect("a dump");
        assert_eq!(dump.tasks.len() as u64, kernel_count(child.pid()));
        for task in &dump.tasks {
            if task.state == State::Sleeping {
                assert!(task.reason.is_some(), "{}: {task:?}", command[0]);
            }
        }
    }
}

#[test]
fn a_census_of_what_is_gone_says_so() {
    let mut child = Owned::spawn(Command::new("sleep").arg("1000"));
    let mut census = census(child.pid());
    assert_eq!(census.population().expect("a census").count, 1);
    child.kill();
    let error = census.population().expect_err("it is gone");
    assert!(error.ends_the_watch(), "{error}");
    assert!(census.count().is_err());
    assert!(census.dump().is_err());
}

/// A machine's worth of processes at rest.
#[test]
fn many_processes_cost_little_while_nothing_moves() {
    let Some((_, path)) = zoos().into_iter().find(|(name, _)| name == "c-release") else {
        return;
    };
    let running: Vec<Running> = (0..20).map(|_| Running::start(&path)).collect();
    let mut all: Vec<Census> = running.iter().map(|r| census(r.pid())).collect();
    let mut round = || {
        let started = Instant::now();
        for census in &mut all {
            let population = census.population().expect("a census");
            assert!(Arc::strong_count(&population.stacks) > 1);
        }
        started.elapsed()
    };
    let first = round();
    let best = (0..5).map(|_| round()).min().expect("a round");
    eprintln!("20 processes of 19 threads: {first:?}, unmoved {best:?}");
    assert!(best < Duration::from_millis(5), "{best:?}");
}
