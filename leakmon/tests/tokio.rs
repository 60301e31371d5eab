//! The tasks that leakmon finds in running programs, against what tokio says of
//! itself and what the programs know of their tasks.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::Running;
use leakmon::process::identity::Process;
use leakmon::process::memory::ProcessMemory;
use leakmon::runtime::tokio::census::Census;
use leakmon::runtime::tokio::{Cache, census};
use leakmon::task::{Dump, Frame, State};

/// Every `program` of `tokio-VERSION/CONFIGURATION`, with that as its name.
fn programs(program: &str) -> Vec<(String, PathBuf)> {
    let Some(root) = common::fixtures() else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for version in fs::read_dir(root).unwrap().flatten() {
        let name = version.file_name().into_string().unwrap();
        if !name.starts_with("tokio-") {
            continue;
        }
        for variant in fs::read_dir(version.path()).unwrap().flatten() {
            let path = variant.path().join(program);
            if path.exists() {
                let variant = variant.file_name().into_string().unwrap();
                found.push((format!("{name}/{variant}"), path));
            }
        }
    }
    found.sort();
    found
}

fn open(pid: u32) -> Census<ProcessMemory> {
    let process = Process::open(pid).unwrap();
    census(&process, &Cache::default())
        .unwrap()
        .expect("it has tokio")
}

/// One line of the zoo's own table.
#[derive(Clone, Debug)]
#[allow(dead_code)]
struct Row {
    runtime: String,
    id: Option<u64>,
    alive: bool,
    held: bool,
    name: String,
    wait: String,
    waits_at: String,
    spawned_at: String,
}

fn rows(zoo: &mut Running) -> Vec<Row> {
    let text = String::from_utf8(zoo.text("tasks")).unwrap();
    let row = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        Row {
            runtime: fields[0].to_owned(),
            id: fields[1].parse().ok(),
            alive: fields[2] == "alive",
            held: fields[3] == "held",
            name: fields[4].to_owned(),
            wait: fields[5].to_owned(),
            waits_at: fields[6].to_owned(),
            spawned_at: fields[7].to_owned(),
        }
    };
    text.lines().map(row).collect()
}

/// `word multi=44 second=3`: the sum of the numbers.
fn numbers(answer: &str) -> BTreeMap<String, u64> {
    answer
        .split(' ')
        .filter_map(|word| word.split_once('='))
        .map(|(key, number)| (key.to_owned(), number.parse().unwrap()))
        .collect()
}

/// What must be found alive: the runtimes' tasks by tokio's own number, and
/// those of the LocalSet.
fn expected(zoo: &mut Running) -> u64 {
    let alive: u64 = numbers(&zoo.ask("alive")).values().sum();
    alive + numbers(&zoo.ask("count"))["local"]
}

#[test]
fn every_task_of_the_zoo_is_found_and_no_other() {
    for (name, path) in programs("zoo") {
        let mut zoo = Running::start(&path);
        let mut census = open(zoo.pid());
        let expected = expected(&mut zoo);
        let first = census.population().unwrap();
        assert_eq!(first.count, expected, "{name}: {:?}", census.lists());
        assert_eq!(first.unstable, 0, "{name}");
        let second = census.population().unwrap();
        assert_eq!(second.count, expected, "{name}");
        let not_run: u64 = second.groups.iter().map(|group| group.not_run).sum();
        println!(
            "{name}: {} tasks, {} of tokio itself, {:?}, first {:?}, then {:?}, {not_run} not run, {:?}",
            first.count,
            first.system,
            first.states,
            first.took,
            second.took,
            census.lists()
        );
        assert_eq!(not_run, expected, "{name}");
        let rows = rows(&mut zoo);
        let dump = census.dump().unwrap();
        same_tasks(&name, &rows, &dump);
        for command in ["spawn 50", "free", "churn 5000"] {
            zoo.ask(command);
            agree(&name, &mut zoo, &mut census);
        }
    }
}

/// Holds the census against the zoo, which may not have come to rest.
fn agree(name: &str, zoo: &mut Running, census: &mut Census<ProcessMemory>) {
    let started = Instant::now();
    loop {
        let (expected, population) = (expected(zoo), census.population().unwrap());
        if population.count == expected {
            return;
        }
        assert!(
            started.elapsed() < Duration::from_secs(3),
            "{name}: {} tasks of {expected}, {:?}",
            population.count,
            census.lists()
        );
    }
}

/// Holds the dump against the zoo's own table.
fn same_tasks(name: &str, rows: &[Row], dump: &Dump) {
    // Before 1.23 tokio does not say where a task's id is.
    let by_id: BTreeMap<u64, &leakmon::task::Task> =
        dump.tasks.iter().map(|task| (task.id, task)).collect();
    let in_lists = rows.iter().filter(|row| row.runtime != "blocking");
    let alive = in_lists.clone().filter(|row| row.alive).count();
    let complete = in_lists.filter(|row| !row.alive && row.held).count();
    let of = |state| dump.tasks.iter().filter(|task| task.state == state).count();
    assert_eq!(dump.tasks.len() - of(State::Complete), alive, "{name}");
    assert_eq!(of(State::Complete), complete, "{name}");
    if by_id.len() < dump.tasks.len() {
        println!("{name}: ids are not known");
        return;
    }
    let (mut right, mut unknown, mut doubted) = (0, Vec::new(), 0);
    for row in rows.iter().filter(|row| row.runtime != "blocking") {
        let Some(id) = row.id else { continue };
        let task = by_id.get(&id).unwrap_or_else(|| panic!("{name}: {row:?}"));
        let held = task
            .labels
            .iter()
            .any(|(key, value)| &**key == "handle" && &**value == "held");
        assert_eq!(held, row.held, "{name}: {row:?}");
        assert_eq!(task.state == State::Complete, !row.alive, "{name}: {row:?}");
        let site = &dump.sites[task.site.0 as usize];
        let entry = site.entry.as_ref().unwrap();
        let short = row.name.rsplit("::").next().unwrap();
        match names(row, entry) {
            Some(true) => {
                right += 1;
                doubted += u32::from(site.doubt.is_some());
            }
            Some(false) => panic!("{name}: {short} is {entry:?} {:?}", site.doubt),
            None => unknown.push(short.to_owned()),
        }
    }
    let symbols = !name.contains("stripped");
    assert!(
        unknown.is_empty() || !symbols,
        "{name}: {unknown:?} have no name"
    );
    println!("{name}: {right} names right, {doubted} of them doubted; unknown {unknown:?}");
}

/// The lines of a function in the zoo's source.
fn lines(function: &str) -> Range<u32> {
    let source = include_str!("../../fixtures/tokio/src/bin/zoo/waits.rs");
    let mut lines = (1..).zip(source.lines());
    let starts = ["(", "<"].map(|behind| format!(" fn {function}{behind}"));
    let is = |line: &str| starts.iter().any(|start| line.contains(start));
    let (first, _) = lines.find(|(_, line)| is(line)).expect(function);
    let (last, _) = lines.find(|(_, line)| *line == "}").expect(function);
    first..last + 1
}

/// Whether `entry` is what the task of `row` runs; `None` where it has no name.
fn names(row: &Row, entry: &Frame) -> Option<bool> {
    let short = row.name.rsplit("::").next().unwrap();
    let aliases: &[&str] = match short {
        "hand_written" => &["HandWritten"],
        "boxed_dyn" => &["dyn core::future"],
        _ => &[],
    };
    if entry.function.starts_with("unnamed") {
        return None;
    }
    if entry.function.starts_with("task at") {
        let (file, _) = row.waits_at.rsplit_once(':').unwrap();
        return Some(entry.file.ends_with(file) && lines(short).contains(&entry.line));
    }
    // Several were folded into one, and only the line tells them apart.
    if entry.function.contains(" or ") {
        return lines(short).contains(&entry.line).then_some(true);
    }
    let full = format!("waits::{short}");
    let named = entry.function.match_indices(&full).any(|(at, _)| {
        let behind = entry.function[at + full.len()..].chars().next();
        behind.is_none_or(|c| !c.is_alphanumeric() && c != '_')
    });
    Some(named || aliases.iter().any(|alias| entry.function.contains(alias)))
}

/// What a task waits for now is among what is told of it, whatever else its code
/// waits for.
#[test]
fn what_a_task_waits_for_after_something_else() {
    for (name, path) in programs("sequel") {
        let mut sequel = Running::start(&path);
        let dump = open(sequel.pid()).dump().unwrap();
        let waits = String::from_utf8(sequel.text("waits")).unwrap();
        let mut counts: BTreeMap<Told, usize> = BTreeMap::new();
        for (function, wait) in waits.lines().filter_map(|line| line.split_once('\t')) {
            let is = |task: &&leakmon::task::Task| {
                let entry = dump.sites[task.site.0 as usize].entry.as_ref().unwrap();
                let full = format!("sequel::{function}::");
                entry.function.contains(&full) && !entry.function.contains(" or ")
            };
            let Some(task) = dump.tasks.iter().find(is) else {
                continue;
            };
            let told = told(wait, task.reason.as_deref(), task.on.as_deref());
            println!("{name}: {function} ({wait}): {:?} {told:?}", task.reason);
            let is_true = !matches!(told, Told::Wrong | Told::Unknown);
            assert!(is_true, "{name}: {function}: {:?}", task.reason);
            *counts.entry(told).or_default() += 1;
        }
        println!("{name}: {counts:?}");
        if name.contains("stripped") {
            continue;
        }
        let named: usize = counts.values().sum();
        assert!(
            named + 3 >= waits.lines().count(),
            "{name}: {named} have names"
        );
        assert!(counts.contains_key(&Told::Right), "{name}: {counts:?}");
    }
}

/// How what leakmon says of a wait stands to the zoo's own word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Right,
    /// True, but it leaves something open.
    LessExact,
    Unknown,
    Wrong,
}

/// Judges `reason`, as it is for a task that waits for `wait`.
fn told(wait: &str, reason: Option<&str>, on: Option<&str>) -> Told {
    let (wait, joined) = match wait.strip_prefix("join ").filter(|rest| *rest != "set") {
        Some(id) => ("join", Some(format!("task {id}"))),
        // Nobody holds its waker.
        None if wait == "hand-written" => ("pending", None),
        None => (wait, None),
    };
    let Some(reason) = reason else {
        return Told::Unknown;
    };
    // Before 1.23 tokio does not say where a task's id is.
    let on_right = match (&joined, on) {
        (Some(joined), Some(on)) => on == joined || joined == "task -",
        (_, on) => on.is_none(),
    };
    if reason == wait && on_right {
        return Told::Right;
    }
    let parts: Vec<&str> = wait.split('|').collect();
    let mut open = parts.clone();
    for said in reason.split('|') {
        let fits = |part: &&str| said.split(" or ").any(|word| word == *part);
        match open.iter().position(fits) {
            Some(index) => drop(open.remove(index)),
            None if said == "?" || (said.starts_with("io") && on_right) => {}
            None => return Told::Wrong,
        }
    }
    match on_right && (open.is_empty() || reason.contains('?') || reason.contains("io")) {
        true => Told::LessExact,
        false => Told::Wrong,
    }
}

#[test]
fn judges_what_is_told() {
    for (wait, reason, on, expected) in [
        ("mutex", Some("mutex"), None, Told::Right),
        ("mutex", Some("mutex or semaphore"), None, Told::LessExact),
        ("mutex", Some("semaphore"), None, Told::Wrong),
        ("mutex", None, None, Told::Unknown),
        (
            "mpsc recv|sleep",
            Some("mpsc recv|sleep"),
            None,
            Told::Right,
        ),
        (
            "mpsc recv|sleep",
            Some("mpsc recv|?"),
            None,
            Told::LessExact,
        ),
        ("mpsc recv|sleep", Some("mpsc recv"), None, Told::Wrong),
        ("mpsc recv", Some("mpsc recv|sleep"), None, Told::Wrong),
        ("join 7", Some("join"), Some("task 7"), Told::Right),
        ("join 7", Some("join"), Some("task 8"), Told::Wrong),
        ("tcp read", Some("io read"), None, Told::LessExact),
        ("hand-written", Some("pending"), None, Told::Right),
    ] {
        assert_eq!(told(wait, reason, on), expected, "{wait} {reason:?} {on:?}");
    }
}

#[test]
fn what_every_task_of_the_zoo_waits_for() {
    let mut wrong = Vec::new();
    for (name, path) in programs("zoo") {
        let mut zoo = Running::start(&path);
        let mut census = open(zoo.pid());
        let started = Instant::now();
        let population = census.population().unwrap();
        let dump = census.dump().unwrap();
        let rows = rows(&mut zoo);
        let mut counts: BTreeMap<Told, Vec<String>> = BTreeMap::new();
        let idle = |row: &&Row| row.runtime != "blocking" && row.alive;
        let mut left: Vec<&leakmon::task::Task> = dump.tasks.iter().collect();
        left.retain(|task| task.state != State::Complete);
        let mut unnamed = Vec::new();
        let judge = |task: &leakmon::task::Task, row: &Row| {
            told(&row.wait, task.reason.as_deref(), task.on.as_deref())
        };
        let mut count = |task: &leakmon::task::Task, row: &Row| {
            let short = row.name.rsplit("::").next().unwrap();
            let said = format!("{short} ({}): {:?} {:?}", row.wait, task.reason, task.on);
            counts.entry(judge(task, row)).or_default().push(said);
        };
        for row in rows.iter().filter(idle) {
            let function = |task: &leakmon::task::Task| {
                let site = &dump.sites[task.site.0 as usize];
                names(row, site.entry.as_ref().unwrap()) == Some(true)
            };
            let is = |task: &&leakmon::task::Task| match task.id {
                // Before 1.23 tokio does not say where a task's id is.
                0 => function(task),
                id => Some(id) == row.id,
            };
            match left.iter().position(is) {
                Some(index) => count(left.remove(index), row),
                None => unnamed.push(row),
            }
        }
        // What has neither id nor a name of its own may be any of those that are left. No name
        // is of none of the tasks, and with symbols all but one have theirs.
        assert!(
            left.len() <= 1 || name.contains("stripped"),
            "{name}: {left:?}"
        );
        for task in left {
            let entry = dump.sites[task.site.0 as usize].entry.as_ref().unwrap();
            println!("{name}: {} may be {unnamed:?}", entry.function);
            let best = (0..unnamed.len()).min_by_key(|index| judge(task, unnamed[*index]));
            let row = unnamed.remove(best.expect("as many tasks as rows"));
            let told = entry.function.starts_with("unnamed")
                || entry
                    .function
                    .split(" or ")
                    .any(|one| one.contains(row.name.as_str()));
            assert!(told, "{name}: {entry:?}");
            count(task, row);
        }
        assert!(unnamed.is_empty(), "{name}: {unnamed:?}");
        for (told, said) in &counts {
            println!("{name}: {} {told:?}", said.len());
            for said in said.iter().filter(|_| *told != Told::Right) {
                println!("    {said}");
            }
        }
        println!(
            "{name}: first {:?}, in all {:?}",
            population.took,
            started.elapsed()
        );
        // What its symbols do not tell, a stripped program may leave open.
        let right = counts.remove(&Told::Right).unwrap_or_default();
        assert!(!right.is_empty(), "{name}");
        let less = counts.remove(&Told::LessExact).unwrap_or_default();
        let unknown = counts.remove(&Told::Unknown).unwrap_or_default();
        if !name.contains("stripped") {
            let inexact = less.into_iter().chain(unknown);
            wrong.extend(inexact.map(|said| format!("{name}: not exact: {said}")));
        }
        wrong.extend(
            counts
                .remove(&Told::Wrong)
                .into_iter()
                .flatten()
                .map(|said| format!("{name}: {said}")),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_hundred_thousand_tasks() {
    for (name, path) in programs("manytasks") {
        let mut many = Running::command(Command::new(&path).args(["-n", "100000"]));
        let expected: u64 = numbers(&many.ask("alive")).values().sum();
        let mut census = open(many.pid());
        let first = census.population().unwrap();
        assert_eq!(first.count, expected, "{name}: {:?}", census.lists());
        let second = census.population().unwrap();
        let third = census.population().unwrap();
        assert_eq!(third.count, expected, "{name}");
        println!(
            "{name}: {expected} tasks, first {:?}, then {:?}, {:?}",
            first.took, second.took, third.took
        );
        assert!(
            third.took < Duration::from_secs(2),
            "{name}: {:?}",
            third.took
        );
    }
}

#[test]
fn tasks_that_end_while_they_are_read_are_never_counted_wrong() {
    for (name, path) in programs("zoo") {
        let mut zoo = Running::start(&path);
        let mut census = open(zoo.pid());
        let resting = expected(&mut zoo);
        zoo.tell("churn 200000");
        let started = Instant::now();
        let mut most = 0;
        let mut censuses = 0;
        let mut unstable = 0;
        while started.elapsed() < Duration::from_millis(400) {
            let population = census.population().unwrap();
            // At most a thousand live at once, and of either worker one that has
            // ended and is in the list for a moment more. What is counted may be
            // wrong by what is said to be unstable, and no more.
            assert!(
                population.count <= resting + 1000 + 2 + population.unstable,
                "{name}: {} and {} unstable",
                population.count,
                population.unstable
            );
            assert!(
                population.count + population.unstable >= resting,
                "{name}: {} and {} unstable of {resting}",
                population.count,
                population.unstable
            );
            most = most.max(population.count);
            unstable += population.unstable;
            censuses += 1;
        }
        println!("{name}: {censuses} censuses, at most {most} tasks, {unstable} unstable in all");
        let answer = zoo.line();
        assert!(answer.starts_with("churned"), "{answer}");
        agree(&name, &mut zoo, &mut census);
    }
}
