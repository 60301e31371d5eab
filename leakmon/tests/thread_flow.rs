//! What the probes count of threads is what happened: births and ends, where
//! threads were made, and since when they wait.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Owned, Running, Started, fixtures, leakmon};
use nix::sys::signal::Signal;
use serde_json::Value;

const TIERS: [&str; 2] = ["lifecycle", "blocking"];

/// Builds of the program with threads, and whether their functions have names
/// and lines.
const BUILDS: [(&str, Names); 8] = [
    ("c-debug", Names::Lines),
    ("c-release", Names::Functions),
    ("c-static", Names::Functions),
    ("c-musl", Names::Functions),
    ("c-stripped", Names::None),
    ("rust-dev", Names::Lines),
    ("rust-release", Names::Functions),
    ("rust-stripped", Names::None),
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Names {
    None,
    Functions,
    Lines,
}

/// A build of the program with threads; `None`, which says so, where it is not.
fn zoo(build: &str) -> Option<PathBuf> {
    let path = fixtures()?.join("threads").join(build).join("threadzoo");
    if !path.exists() {
        eprintln!("there is no fixture threads/{build}/threadzoo: it is not tested");
        return None;
    }
    Some(path)
}

/// The line of the fixture in C or Rust that has `text`.
fn line_of(build: &str, text: &str) -> u64 {
    let source = match build.starts_with("c-") {
        true => include_str!("../../fixtures/threads/c/threadzoo.c"),
        false => include_str!("../../fixtures/threads/src/bin/threadzoo.rs"),
    };
    let index = source.lines().position(|line| line.contains(text));
    index.unwrap_or_else(|| panic!("no line has {text}")) as u64 + 1
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

/// What a report says of the process's threads.
fn threads(report: &Value) -> &Value {
    let runtimes = report["runtimes"].as_array().expect("runtimes");
    let threads = runtimes
        .iter()
        .find(|runtime| runtime["runtime"]["name"] == "threads");
    threads.unwrap_or_else(|| panic!("no threads: {report:#}"))
}

/// leakmon as it watches processes.
struct Watch {
    leakmon: Started,
}

impl Watch {
    /// Watches `pids`, and returns once the probes of all are attached and a
    /// census was held against them.
    fn start(pids: &[u32], args: &[&str]) -> Watch {
        let mut all: Vec<String> = ["--format", "json", "--top", "1000"]
            .map(str::to_owned)
            .into();
        for pid in pids {
            all.extend(["--pid".to_owned(), pid.to_string()]);
        }
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let watch = Watch {
            leakmon: Started::start(&mut leakmon(all)),
        };
        for pid in pids {
            watch.report_that(*pid, "says that probes are attached", |report| {
                threads(report)["probes"]["census_difference"].is_i64()
            });
        }
        watch
    }

    /// The next report on any process.
    fn report(&self) -> Value {
        let line = self.leakmon.wait_for_line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// The first report on `pid` that is so.
    #[track_caller]
    fn report_that(&self, pid: u32, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let until = Instant::now() + common::limit();
        while Instant::now() < until {
            let report = self.report();
            if report["process"]["pid"] != pid {
                continue;
            }
            last = report;
            if is_so(&last) {
                return last;
            }
        }
        panic!("no report {what}: {last:#}");
    }

    /// The first report on `pid` that was begun after this call.
    fn fresh_report(&self, pid: u32) -> Value {
        let since = common::now();
        self.report_that(pid, "is new", |report| {
            // Its time is that of its end, its census lies before it.
            let took = threads(report)["tasks"]["census_seconds"].as_f64();
            report["time_unix_seconds"].as_f64() > Some(since + took.unwrap_or(0.0) + 0.2)
        })
    }

    /// Ends leakmon as Ctrl-C does.
    #[track_caller]
    fn stop(self) {
        self.leakmon.signal(Signal::SIGINT);
        self.leakmon.finish().expect_code(0);
    }
}

/// The totals of a report are `spawned` and `exited`, and nothing is missing.
#[track_caller]
fn expect_totals(report: &Value, spawned: u64, exited: u64, what: &str) {
    let probes = &threads(report)["probes"];
    let totals = (probes["spawned"].as_u64(), probes["exited"].as_u64());
    assert_eq!(totals, (Some(spawned), Some(exited)), "{what}: {probes:#}");
    assert_eq!(probes["census_difference"], 0, "{what}: {probes:#}");
    assert_eq!(probes["spawns_complete"], true, "{what}: {probes:#}");
    assert_eq!(probes["sampled"], false, "{what}: {probes:#}");
    let _ = not_seen_to_go_on(probes);
}

/// How many waits ended unseen: nothing else may have been lost. The kernel of a
/// virtual machine may keep the switches of its own agent from programs: a thread
/// that is put on a CPU right after the agent is not seen to go on.
fn not_seen_to_go_on(probes: &Value) -> u64 {
    let dropped = probes["dropped_hits"].as_object().expect("drops");
    let others: Vec<_> = dropped.keys().filter(|key| *key != UNSEEN).collect();
    assert!(others.is_empty(), "{probes:#}");
    let unseen = dropped.get(UNSEEN).and_then(Value::as_u64).unwrap_or(0);
    // Each thread waits, and few of them right behind the agent.
    let spawned = probes["spawned"].as_u64().unwrap_or(0);
    assert!(unseen <= 5 + spawned / 10, "{probes:#}");
    unseen
}

const UNSEEN: &str = "resume not seen";

fn sites(report: &Value) -> &[Value] {
    threads(report)["sites"].as_array().expect("sites")
}

/// The one site at which so many threads were made.
#[track_caller]
fn site_of(report: &Value, spawned: u64) -> &Value {
    let found: Vec<&Value> = sites(report)
        .iter()
        .filter(|site| site["spawned"] == spawned)
        .collect();
    let [site] = found[..] else {
        panic!("{} sites with {spawned} threads: {report:#}", found.len());
    };
    site
}

/// Births, ends and live threads, in total and by site.
#[test]
fn births_and_ends_are_counted_exactly() {
    for (build, names) in BUILDS {
        let Some(path) = zoo(build) else {
            continue;
        };
        for &tier in common::alike(&TIERS) {
            let what = format!("{build} {tier}");
            let mut target = Running::start(&path);
            let pid = target.pid();
            let watch = Watch::start(&[pid], &["--interval", "200ms", "--tier", tier]);
            let total = common::so_many(3000);
            target.ask(&format!("churn {total} 0"));
            target.ask("leak 7");
            let report = watch.fresh_report(pid);
            expect_totals(&report, total + 7, total, &what);
            let live = threads(&report)["tasks"]["live"].as_u64();
            assert_eq!(live, Some(kernel_count(pid)), "{what}");
            assert_eq!(report["threads"].as_u64(), live, "{what}");
            if build == "rust-stripped" {
                // Nothing tells the closures apart, and it is said.
                let site = site_of(&report, total + 7);
                assert!(site["doubt"].is_string(), "{what}: {site:#}");
                let leaked = sites(&report).iter().find(|site| site["live"] == 7);
                assert!(leaked.is_some(), "{what}: {report:#}");
                watch.stop();
                continue;
            }
            let (churned, leaked) = (site_of(&report, total), site_of(&report, 7));
            assert_eq!(
                (&churned["exited"], &churned["live"]),
                (&total.into(), &0.into())
            );
            // Census and probes speak of one site.
            assert_eq!((&leaked["exited"], &leaked["live"]), (&0.into(), &7.into()));
            let place = |site: &Value, of: &str| {
                let frame = &site[of];
                (
                    frame["function"].as_str().unwrap_or_default().to_owned(),
                    frame["line"].as_u64(),
                )
            };
            let c = build.starts_with("c-");
            let made = |text| Some(line_of(build, text));
            match (c, names) {
                (true, Names::Lines) => {
                    let line = made("pthread_create(&thread, &small, churned");
                    assert_eq!(place(churned, "created_by"), ("churn".to_owned(), line));
                    let line = made("pthread_create(&entry->thread");
                    assert_eq!(place(leaked, "created_by"), ("start".to_owned(), line));
                    let line = made("static void *leaked(");
                    assert_eq!(place(leaked, "entry"), ("leaked".to_owned(), line));
                }
                (true, Names::Functions) => {
                    assert_eq!(place(churned, "entry").0, "churned", "{what}");
                    assert_eq!(place(leaked, "entry").0, "leaked", "{what}");
                    assert_eq!(place(leaked, "created_by").0, "start", "{what}");
                }
                (false, Names::Lines) => {
                    let line = made("thread::spawn(|| ())");
                    let function = "threadzoo::churn".to_owned();
                    assert_eq!(place(churned, "created_by"), (function, line));
                    assert_eq!(place(churned, "entry").0, "threadzoo::churn::{{closure}}");
                    let line = made("thread.spawn(body)");
                    let function = "threadzoo::start".to_owned();
                    assert_eq!(place(leaked, "created_by"), (function, line));
                }
                // What was inlined into what is not known.
                (false, _) => {
                    let creator = place(churned, "created_by").0;
                    assert!(creator.starts_with("threadzoo::"), "{what}: {churned:#}");
                }
                (true, Names::None) => {
                    assert!(place(leaked, "entry").0.contains("+0x"), "{what}");
                }
            }
            if names == Names::Lines {
                assert!(leaked["doubt"].is_null(), "{what}: {leaked:#}");
            }
            watch.stop();
        }
    }
}

/// A leak is named by the line that makes the threads, with their exact number.
#[test]
fn a_leak_has_its_line_and_number() {
    for (build, line) in [
        ("c-debug", "pthread_create(&entry->thread"),
        ("rust-dev", "thread.spawn(body)"),
    ] {
        let Some(path) = zoo(build) else {
            continue;
        };
        let mut target = Running::start(&path);
        let pid = target.pid();
        let watch = Watch::start(&[pid], &["--interval", "200ms"]);
        let mut suspect = None;
        let mut leaked = 0;
        while suspect.is_none() && leaked < 600 {
            target.ask("leak 10");
            leaked += 10;
            let report = watch.fresh_report(pid);
            expect_totals(&report, leaked, 0, build);
            let site = site_of(&report, leaked);
            if site["live"] != leaked && common::slowness() > 1 {
                // One that has not run yet has no site in a census.
                eprintln!(
                    "{build}: {} of {leaked} are known by their site",
                    site["live"]
                );
                continue;
            }
            assert_eq!(site["live"], leaked, "{site:#}");
            assert_eq!(site["created_by"]["line"], line_of(build, line), "{site:#}");
            suspect = (!site["verdict"].is_null()).then(|| site.clone());
        }
        let suspect = suspect.unwrap_or_else(|| panic!("{build}: {leaked} leaked, and no verdict"));
        let sentence = suspect["verdict"]["sentence"].as_str().expect("a sentence");
        assert!(sentence.contains(&leaked.to_string()), "{sentence}");
        eprintln!("{build}: {sentence}");
        watch.stop();
    }
}

/// A wait's age is that since it began, and not since a census saw it.
#[test]
fn waits_are_as_old_as_they_are() {
    let Some(path) = zoo("c-release") else {
        return;
    };
    let mut target = Running::start(&path);
    let pid = target.pid();
    let watch = Watch::start(&[pid], &["--interval", "2s", "--tier", "blocking"]);
    watch.report();
    let before = common::now();
    target.ask("leak 3");
    let after = common::now();
    let waits_since = |report: &Value| {
        let site = site_of(report, 3);
        let age = site["oldest_wait_seconds"].as_f64().unwrap_or(0.0);
        (report["time_unix_seconds"].as_f64().expect("a time"), age)
    };
    let (seen, _) = waits_since(&watch.report());
    let (at, age) = waits_since(&watch.report());
    // A report's time is that of its beginning, and ages are as of a moment later.
    let longest = common::now() - before;
    assert!(age <= longest, "{age} s of {longest}");
    // A census alone would know of it since it first saw it.
    let half = (seen - after) / 2.0;
    assert!(
        age > at - seen + half,
        "{age} s of {} and {half}",
        at - seen
    );
    watch.stop();
}

/// Every thread of the program in Python sleeps once, for 30 ms: each is
/// counted and timed, but for those of which it is said that they were not seen
/// to go on.
#[test]
fn waits_are_counted_and_timed() {
    let Some(mut target) = language("python3", &["churn.py"]) else {
        return;
    };
    let pid = target.pid();
    let watch = Watch::start(&[pid], &["--interval", "300ms", "--tier", "blocking"]);
    target.ask("churn 100 200");
    let report = watch.fresh_report(pid);
    expect_totals(&report, 100, 100, "python");
    let site = site_of(&report, 100);
    let waits = site["waits"].as_array().expect("waits");
    let sleep = waits.iter().find(|wait| wait["reason"] == "sleep");
    let sleep = sleep.unwrap_or_else(|| panic!("{site:#}"));
    let resumes = sleep["resumes"].as_u64().expect("resumes");
    let unseen = not_seen_to_go_on(&threads(&report)["probes"]);
    // The first thread's waits may be among them.
    assert!(
        resumes <= 100 && resumes + unseen >= 100,
        "{unseen} not seen of {site:#}"
    );
    let durations = &sleep["blocked_durations"];
    assert_eq!(durations["count"], resumes);
    // 2^24 ns are 17 ms, and none is shorter.
    let buckets = durations["log2_nanoseconds"].as_object().expect("buckets");
    let shortest = buckets
        .keys()
        .filter_map(|key| key.parse::<u32>().ok())
        .min();
    assert_eq!(shortest, Some(24), "{durations:#}");
    watch.stop();
}

/// What was there before the probes came has the sites that the census found,
/// its waits and its ends too.
#[test]
fn threads_that_were_there_keep_their_sites() {
    let Some(path) = zoo("c-debug") else {
        return;
    };
    let mut target = Running::start(&path);
    let pid = target.pid();
    let watch = Watch::start(&[pid], &["--interval", "200ms", "--tier", "blocking"]);
    target.ask("report");
    target.ask("report");
    let report = watch.fresh_report(pid);
    expect_totals(&report, 0, 0, "nothing was made");
    let main = sites(&report)
        .iter()
        .find(|site| site["entry"]["function"] == "main");
    let main = main.expect("the first thread");
    let waits = main["waits"].as_array().expect("waits");
    let resumes: u64 = waits
        .iter()
        .filter(|wait| wait["reason"] == "sleep")
        .filter_map(|wait| wait["resumes"].as_u64())
        .sum();
    // It looks four times, 10 ms apart, at whether all are at rest.
    let unseen = not_seen_to_go_on(&threads(&report)["probes"]);
    assert!(resumes + unseen >= 8, "{unseen} not seen of {main:#}");
    for site in sites(&report) {
        assert!(!site["entry"].is_null(), "{site:#}");
    }
    watch.stop();
}

/// A C library that was deleted while a process runs it is probed all the same.
#[test]
fn a_deleted_library_is_probed() {
    let Some(path) = zoo("c-release") else {
        return;
    };
    let own = std::fs::read_to_string("/proc/self/maps").expect("own maps");
    let libc = own
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .find(|path| path.ends_with("/libc.so.6"));
    let Some(libc) = libc else {
        eprintln!("these tests run without glibc: a deleted library is not tested");
        return;
    };
    let scratch = common::scratch();
    let copy = scratch.path().join("libc.so.6");
    std::fs::copy(libc, &copy).expect("a copy of libc");
    let mut target = Running::command(Command::new(&path).env("LD_LIBRARY_PATH", scratch.path()));
    let pid = target.pid();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
    assert!(maps.contains(&*copy.to_string_lossy()), "{maps}");
    // Another file takes its place: the one that is mapped is probed.
    std::fs::remove_file(&copy).expect("to delete it");
    std::fs::write(&copy, b"not a library").expect("to replace it");
    let watch = Watch::start(&[pid], &["--interval", "200ms", "--tier", "lifecycle"]);
    target.ask("churn 500 0");
    let report = watch.fresh_report(pid);
    expect_totals(&report, 500, 500, "a deleted library");
    assert_eq!(site_of(&report, 500)["entry"]["function"], "churned");
    watch.stop();
}

/// Where `pthread_create` is not found, threads are counted, and it is said why
/// their site is not known.
#[test]
fn threads_without_a_known_site_are_counted() {
    let Some(path) = zoo("c-static-stripped") else {
        return;
    };
    for tier in TIERS {
        let mut target = Running::start(&path);
        let pid = target.pid();
        let watch = Watch::start(&[pid], &["--interval", "200ms", "--tier", tier]);
        target.ask("churn 500 0");
        let report = watch.fresh_report(pid);
        expect_totals(&report, 500, 500, tier);
        let site = site_of(&report, 500);
        let doubt = site["doubt"].as_str().expect("a doubt");
        assert!(doubt.contains("without symbols"), "{doubt}");
        assert!(site["entry"].is_null() && site["created_by"].is_null());
        watch.stop();
    }
}

/// Of a program that has tasks of another kind, threads are counted and not
/// timed, unless that is asked for.
#[test]
fn beside_goroutines_threads_are_counted_and_not_timed() {
    let Some(churner) = common::fixture("churner", "plain") else {
        return;
    };
    for (args, tier) in [
        (&[][..], "lifecycle"),
        (&["--all-runtimes"][..], "blocking"),
    ] {
        let mut target = Running::start(&churner.path);
        let pid = target.pid();
        let args = [&["--interval", "200ms", "--max-overhead", "50"], args].concat();
        let watch = Watch::start(&[pid], &args);
        target.ask("churn 2000");
        let report = watch.fresh_report(pid);
        let seen = threads(&report);
        assert_eq!(seen["tier"]["name"], tier, "{seen:#}");
        assert_eq!(seen["tasks"]["live"], kernel_count(pid));
        assert_eq!(seen["probes"]["census_difference"], 0, "{seen:#}");
        // Its runtime makes threads when it wants some, by clone.
        for site in sites(&report) {
            if site["spawned"].as_u64() > Some(0) {
                assert!(
                    site["created_by"].is_null() && site["doubt"].is_string(),
                    "{site:#}"
                );
            }
        }
        watch.stop();
    }
}

/// While other programs' threads wake each other without end, nobody's waits are
/// timed: they would pay for it. It begins again when they are done.
#[test]
fn others_do_not_pay_for_a_watch() {
    let Some(path) = zoo("c-release") else {
        return;
    };
    let target = Running::start(&path);
    let pid = target.pid();
    let mut storm = Running::start(&path.with_file_name("fthreads"));
    // In nobody's way: the other tests' work would make room between its switches.
    keep_on_one_cpu_before_others(storm.pid());
    let watch = Watch::start(&[pid], &["--interval", "200ms"]);
    let fixed = Watch::start(&[pid], &["--interval", "200ms", "--tier", "blocking"]);
    let tier = |report: &Value| {
        let tier = &threads(report)["tier"];
        (
            tier["name"].as_str().map(str::to_owned),
            tier["reason"].as_str().map(str::to_owned),
        )
    };
    let some = |name: &str, reason: &str| (Some(name.to_owned()), Some(reason.to_owned()));
    let governed = some("blocking", "governed");
    watch.report_that(pid, "times waits", |report| tier(report) == governed);
    std::thread::scope(|scope| {
        let storm = scope.spawn(|| storm.ask("run pingpong 3s"));
        let report = watch.report_that(pid, "lets others alone", |report| {
            tier(report) == some("lifecycle", "others_pay")
        });
        // Births and ends are counted all the same.
        assert_eq!(threads(&report)["probes"]["census_difference"], 0);
        assert_eq!(
            threads(&report)["probes"]["spawns_complete"],
            true,
            "{report:#}"
        );
        // What is asked for is done.
        assert_eq!(tier(&fixed.fresh_report(pid)), some("blocking", "fixed"));
        assert!(!storm.is_finished(), "the storm was over too soon");
        storm.join().expect("the storm");
    });
    watch.report_that(pid, "times waits again", |report| tier(report) == governed);
    fixed.stop();
    watch.stop();
}

/// Keeps a process's main thread, and those that it makes, on one CPU, of which
/// it has as much as it wants.
fn keep_on_one_cpu_before_others(pid: u32) {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(1).expect("a CPU");
    let target = nix::unistd::Pid::from_raw(pid.cast_signed());
    nix::sched::sched_setaffinity(target, &cpus).expect("a second CPU");
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads the parameter.
    let set = unsafe { libc::sched_setscheduler(target.as_raw(), libc::SCHED_FIFO, &parameter) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// A process that dies while its threads come and go, and one that becomes
/// another program.
#[test]
fn what_ends_a_watch_is_told() {
    let Some(path) = zoo("c-release") else {
        return;
    };
    for tier in TIERS {
        let mut target = Running::start(&path);
        let pid = target.pid();
        let watch = Watch::start(&[pid], &["--interval", "100ms", "--tier", tier]);
        target.tell("churn 100000 0");
        std::thread::sleep(Duration::from_millis(300));
        target.child.kill();
        let done = watch.leakmon.finish();
        let said = "the process has ended (watched for ";
        assert!(done.err.contains(said), "{}", done.err);
        assert!(
            done.err.starts_with(&format!("leakmon: pid {pid} (")),
            "{}",
            done.err
        );
        assert_eq!(done.code, Some(5));
        assert_eq!(done.err.lines().count(), 1, "{}", done.err);

        let mut shell = Owned::spawn(
            Command::new("sh")
                .args(["-c", "read line; exec sleep 1000"])
                .stdin(std::process::Stdio::piped()),
        );
        let watch = Watch::start(&[shell.pid()], &["--interval", "100ms", "--tier", tier]);
        drop(shell.0.stdin.take());
        let done = watch.leakmon.finish();
        assert!(
            done.err
                .contains("start leakmon again to watch the new one"),
            "{done:?}"
        );
    }
}

/// A program of fixtures/threads/languages; `None`, which says so, where the
/// language is not installed.
fn language(program: &str, args: &[&str]) -> Option<Running> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/threads/languages");
    let there = Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !there {
        eprintln!(
            "there is no {program}: ITS THREADS ARE NOT TESTED (`cargo xtask setup` installs it)"
        );
        return None;
    }
    Some(Running::command(
        Command::new(program).args(args).current_dir(folder),
    ))
}

/// A process that nobody prepared, whose threads come and go.
struct Churning {
    name: String,
    target: Running,
    /// Threads that it makes a second.
    rate: u64,
    /// It makes no others of its own accord.
    exact: bool,
}

/// Twenty processes in five languages, which make about 1,000 threads a second
/// together.
fn twenty() -> Vec<Churning> {
    let mut all = Vec::new();
    let mut add = |name: &str, target: Option<Running>, rate, exact| {
        if let Some(target) = target {
            all.push(Churning {
                name: name.to_owned(),
                target,
                rate,
                exact,
            });
        }
    };
    for _ in 0..2 {
        add("java", language("java", &["Churn.java"]), 50, false);
        add("node", language("node", &["churn.js"]), 2, false);
    }
    for _ in 0..4 {
        add("python", language("python3", &["churn.py"]), 40, true);
    }
    for (build, number) in [
        ("c-debug", 1),
        ("c-release", 2),
        ("c-static", 1),
        ("c-musl", 1),
        ("c-stripped", 1),
        ("rust-dev", 2),
        ("rust-release", 2),
        ("rust-stripped", 2),
    ] {
        for _ in 0..number {
            let target = zoo(build).map(|path| Running::start(&path));
            add(build, target, 62, true);
        }
    }
    all
}

/// Census and probes agree while threads come and go, and at rest both are what
/// the kernel says.
fn no_drift(seconds: u64, tier: &str) {
    let mut all = twenty();
    if all.is_empty() {
        return;
    }
    // The JVM and node have begun with what they compile and collect.
    std::thread::sleep(Duration::from_secs(3));
    let pids: Vec<u32> = all.iter().map(|one| one.target.pid()).collect();
    let watch = Watch::start(&pids, &["--interval", "500ms", "--tier", tier]);
    let mut births = 0;
    for one in &mut all {
        let total = one.rate * seconds;
        births += total;
        one.target.tell(&format!("churn {total} {}", one.rate));
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut reports, mut widest) = (0, 0);
    while Instant::now() < until {
        let report = watch.report();
        let probes = &threads(&report)["probes"];
        let difference = probes["census_difference"].as_i64().expect("a difference");
        let uncertainty = probes["census_uncertainty"].as_i64();
        let uncertainty = uncertainty.expect("an uncertainty");
        assert!(
            difference.abs() <= uncertainty,
            "{}: {probes:#}",
            report["process"]["executable"]
        );
        reports += 1;
        widest = widest.max(uncertainty);
    }
    let mut exact = 0;
    for one in &mut all {
        let answer = one.target.line();
        assert!(
            answer.starts_with("report spawned="),
            "{}: {answer}",
            one.name
        );
        let pid = one.target.pid();
        let total = one.rate * seconds;
        // A JVM may start or end a thread of its own at any time.
        let at_rest = (0..20).find_map(|_| {
            let before = kernel_count(pid);
            let report = watch.fresh_report(pid);
            let quiet = threads(&report)["probes"]["census_uncertainty"] == 0;
            (quiet && before == kernel_count(pid)).then_some((before, report))
        });
        let (live, report) = at_rest.unwrap_or_else(|| panic!("{} does not rest", one.name));
        let seen = threads(&report);
        assert_eq!(seen["tasks"]["live"], live, "{}: {report:#}", one.name);
        assert_eq!(report["threads"], live, "{}", one.name);
        assert_eq!(seen["probes"]["census_difference"], 0, "{}", one.name);
        let _ = not_seen_to_go_on(&seen["probes"]);
        if one.exact {
            expect_totals(&report, total, total, &one.name);
            exact += 1;
        } else {
            let spawned = seen["probes"]["spawned"].as_u64();
            assert!(
                spawned >= Some(total),
                "{}: {spawned:?} of {total}",
                one.name
            );
        }
    }
    eprintln!(
        "{tier}: {} processes, {births} births in {seconds} s, difference 0 in each; {exact} with \
         exact totals; {reports} reports meanwhile, none off by more than its uncertainty, which \
         was {widest} at the most",
        all.len()
    );
    watch.stop();
}

/// A census that finds a thread on its way in or out does not take it for a
/// difference.
#[test]
fn threads_on_their_way_are_no_difference() {
    for build in ["c-release", "c-static"] {
        let Some(path) = zoo(build) else {
            continue;
        };
        let mut target = Running::start(&path);
        let pid = target.pid();
        let watch = Watch::start(&[pid], &["--interval", "10ms", "--tier", "lifecycle"]);
        let total = 15_000;
        target.tell(&format!("churn {total} 3000"));
        let (mut reports, mut unsure) = (0, 0);
        loop {
            let report = watch.report();
            let probes = &threads(&report)["probes"];
            let difference = probes["census_difference"].as_i64().expect("a difference");
            let uncertainty = probes["census_uncertainty"].as_i64();
            let uncertainty = uncertainty.expect("an uncertainty");
            assert!(difference.abs() <= uncertainty, "{build}: {probes:#}");
            reports += 1;
            unsure += u64::from(uncertainty > 0);
            if probes["exited"] == total {
                break;
            }
        }
        eprintln!("{build}: {reports} reports, {unsure} with an uncertainty");
        watch.stop();
    }
}

#[test]
fn counts_do_not_drift() {
    no_drift(7, "blocking");
}

#[test]
#[ignore = "takes two minutes"]
fn counts_do_not_drift_over_a_minute() {
    for tier in TIERS {
        no_drift(60, tier);
    }
}
