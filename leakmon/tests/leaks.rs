//! Leaks are reported exactly and where they are; what is healthy is not.

mod common;

use std::process::Command;

use common::{Connection, Running, all, fixture, leakmon, run};
use serde_json::Value;

/// Sites of a report that it says look like leaks.
fn suspects(report: &Value) -> Vec<&Value> {
    let sites = report["sites"].as_array().expect("sites");
    sites
        .iter()
        .filter(|site| !site["verdict"].is_null())
        .collect()
}

/// Reports of a watch of `pid`.
fn watch(pid: u32, args: &[&str]) -> Vec<Value> {
    let pid = pid.to_string();
    let mut args = args.to_vec();
    args.extend(["--pid", &pid, "--format", "json"]);
    run(&mut leakmon(args)).expect_code(0).json()
}

/// The number of the line of a fixture's source that has `text`.
fn line_of(source: &str, text: &str) -> u64 {
    let path = format!("{}/../fixtures/go/{source}", env!("CARGO_MANIFEST_DIR"));
    let source = std::fs::read_to_string(&path).expect("a fixture's source");
    let index = source.lines().position(|line| line.contains(text));
    index.unwrap_or_else(|| panic!("{path} has no {text}")) as u64 + 1
}

#[track_caller]
fn expect_place(place: &Value, file: &str, line: u64) {
    let found = place["file"].as_str().unwrap_or_default();
    assert!(found.ends_with(file), "{place} is not in {file}");
    assert_eq!(place["line"], line, "{place}");
}

/// Three senders, one receiver: every call leaks two. All versions are watched
/// by one leakmon.
#[test]
fn senders_are_named_within_two_intervals() {
    let line = line_of("senders/main.go", "results <- i");
    for variant in common::alike(&["pgo", "plain"]) {
        let senders = all("senders", variant);
        let mut targets: Vec<Running> = senders
            .iter()
            .map(|senders| Running::start(&senders.path))
            .collect();
        // A slow machine may leave out an interval.
        let slowness = common::slowness();
        let times = [slowness, 2 * slowness * slowness.min(2)];
        let times = times.map(|seconds| format!("{seconds}s"));
        let mut args = vec!["--interval", &times[0], "--duration", &times[1]];
        args.extend(["--format", "json"]);
        let pids: Vec<String> = targets
            .iter_mut()
            .map(|target| {
                target.ask("call 4");
                target.pid().to_string()
            })
            .collect();
        for pid in &pids {
            args.extend(["--pid", pid]);
        }
        if targets.is_empty() {
            return;
        }
        let reports = run(&mut leakmon(args)).expect_code(0).json();
        for (senders, target) in senders.iter().zip(&targets) {
            let reports: Vec<&Value> = reports
                .iter()
                .filter(|report| report["process"]["pid"] == target.pid())
                .collect();
            for report in &reports {
                assert_eq!(report["tasks"]["live"], 9, "{senders:?}: {report:#}");
                let site = &report["sites"][0];
                assert_eq!((&site["live"], &site["blocked"]), (&8.into(), &8.into()));
                let waits = site["waits"].as_array().expect("waits");
                assert_eq!(waits.len(), 1, "{site:#}");
                assert_eq!(waits[0]["count"], 8);
                assert_eq!(waits[0]["reason"], "chan send");
                expect_place(&waits[0]["place"], "senders/main.go", line);
            }
            let last = reports.last().expect("a report");
            let suspects = suspects(last);
            assert_eq!(suspects.len(), 1, "{senders:?}: {last:#}");
            assert_eq!(
                (&suspects[0]["live"], &suspects[0]["not_run"]),
                (&8.into(), &8.into())
            );
        }
    }
}

/// A running HTTP server of the fixtures, and a connection to it that is kept.
struct Server {
    target: Running,
    connection: Connection,
}

impl Server {
    fn start(variant: &str, args: &[&str]) -> Option<Server> {
        let sum = fixture("sum", variant)?;
        let mut target = Running::command(Command::new(sum.path).args(args));
        let line = target.line();
        let address = line.strip_prefix("listening ").expect("an address");
        let connection = Connection::open(address).expect("a connection");
        Some(Server { target, connection })
    }
}

/// A handler that leaks one goroutine a request.
#[test]
fn handlers_that_leak_are_counted_exactly_and_grow_old() {
    let line = line_of("sum/main.go", "audit <- s");
    for variant in ["plain", "stripped"] {
        let Some(mut server) = Server::start(variant, &[]) else {
            return;
        };
        let began = std::time::Instant::now();
        for _ in 0..250 {
            assert_eq!(server.connection.get("/sum?n=10"), "55\n");
        }
        let reports = watch(
            server.target.pid(),
            &["--interval", "500ms", "--duration", "1500ms"],
        );
        let mut ages = Vec::new();
        for report in &reports {
            let site = &report["sites"][0];
            assert_eq!(
                (&site["live"], &site["blocked"]),
                (&250.into(), &250.into())
            );
            assert_eq!(site["waits"].as_array().map(Vec::len), Some(1), "{site:#}");
            let wait = &site["waits"][0];
            assert_eq!(
                (&wait["count"], &wait["reason"]),
                (&250.into(), &"chan send".into())
            );
            expect_place(&wait["place"], "sum/main.go", line);
            ages.push(wait["oldest_wait_seconds"].as_f64().expect("an age"));
        }
        assert!(ages.windows(2).all(|pair| pair[0] < pair[1]), "{ages:?}");
        // It is known since the first report at least, and since the requests at
        // most; the runtime's own clock may add that it was so before.
        let elapsed = |report: &Value| report["elapsed_seconds"].as_f64().expect("a time");
        let watched = elapsed(&reports[reports.len() - 1]) - elapsed(&reports[0]);
        let last = ages[ages.len() - 1];
        assert!(ages.len() >= 2, "{ages:?}");
        assert!(
            (watched - 0.1..began.elapsed().as_secs_f64()).contains(&last),
            "{ages:?}"
        );
        let last = reports.last().expect("a report");
        let suspects = suspects(last);
        assert_eq!(suspects.len(), 1, "{last:#}");
        assert_eq!(
            (&suspects[0]["live"], &suspects[0]["not_run"]),
            (&250.into(), &250.into())
        );
    }
}

/// While it leaks, as fast as a server of real life does.
#[test]
fn a_handler_that_leaks_now_is_marked_as_growing() {
    let Some(server) = Server::start("plain", &["-load", "50"]) else {
        return;
    };
    let reports = watch(
        server.target.pid(),
        &["--interval", "500ms", "--duration", "4s"],
    );
    let last = reports.last().expect("a report");
    let suspects = suspects(last);
    assert_eq!(suspects.len(), 1, "{last:#}");
    let line = line_of("sum/main.go", "audit <- s");
    expect_place(&suspects[0]["waits"][0]["place"], "sum/main.go", line);
    let rate = suspects[0]["change_per_minute"].as_f64().expect("a rate");
    assert!((2000.0..4000.0).contains(&rate), "{rate}");
}

/// Programs that wait for input, for connections, for requests and for work,
/// and one that is busy: nothing of it is a leak. Of the zoo, in which nothing
/// ever moves, only the sends are never meant to be.
#[test]
fn what_is_idle_or_busy_is_not_suspected() {
    let Some(mut server) = Server::start("plain", &["-debug"]) else {
        return;
    };
    server.connection.get("/_count");
    let programs = ["senders", "churner", "pingpong", "heavy", "zoo"];
    let mut targets: Vec<Running> = programs
        .iter()
        .filter_map(|program| fixture(program, "plain"))
        .map(|program| Running::start(&program.path))
        .collect();
    assert_eq!(targets.len(), programs.len());
    let line = targets[3].line();
    let address = line.strip_prefix("listening ").expect("an address");
    let heavy = fixture("heavy", "plain").expect("a program");
    let _client = common::Owned::spawn(
        Command::new(heavy.path)
            .args(["-client", address, "-c", "8", "-d", "30s"])
            .stdout(std::process::Stdio::null()),
    );
    let zoo = targets[4].pid();
    let mut args: Vec<String> = [
        "--interval",
        "500ms",
        "--duration",
        "5s",
        "--format",
        "json",
    ]
    .map(str::to_owned)
    .into();
    for target in targets.iter().chain([&server.target]) {
        args.extend(["--pid".to_owned(), target.pid().to_string()]);
    }
    let reports = run(&mut leakmon(args)).expect_code(0).json();
    // On a slow machine an interval may be left out.
    assert!(reports.len() > 6 * 5);
    for report in &reports {
        for suspect in suspects(report) {
            let place = &suspect["waits"][0]["place"]["function"];
            let send = report["process"]["pid"] == zoo && place == "main.sendPlain";
            assert!(send, "{} {suspect:#}", report["process"]);
        }
    }
    assert!(reports.iter().any(|report| !suspects(report).is_empty()));
}
