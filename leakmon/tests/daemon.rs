//! `leakmon daemon`, as a Prometheus server, a person with curl, systemd and an
//! attacker meet it.
//!
//! Needs root, and the fixtures (see `common`).

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::prometheus::Prometheus;
use common::{Connection, Owned, Running, fixture, leakmon, real, run, scratch, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A server with an endpoint of its own to compare with.
struct Sum {
    server: Owned,
    connection: Connection,
}

fn sum() -> Option<Sum> {
    let path = fixture("sum", "plain")?.path;
    let mut command = Command::new(path);
    let mut server = Owned::spawn(command.arg("-debug").stdout(Stdio::piped()));
    let out = server.0.stdout.take().expect("its output");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(out));
    let address = loop {
        let line = lines.next().expect("a line").expect("its output");
        if let Some(address) = line.strip_prefix("listening ") {
            break address.to_owned();
        }
    };
    let connection = Connection::open(&address).expect("a connection");
    Some(Sum { server, connection })
}

impl Sum {
    fn leak(&mut self, count: usize) {
        for _ in 0..count {
            self.connection.get("/sum?n=10");
        }
    }
}

#[test]
fn what_people_ask_for() {
    let Some(path) = fixture("zoo", "plain") else {
        return;
    };
    let mut zoo = Running::start(&path.path);
    let count = zoo.count();
    let daemon = Daemon::start("", "", "");
    let pid = zoo.pid();
    wait_until("the zoo is read", || {
        daemon.metric("go_goroutine_count", pid) == Some(count as f64)
    });
    assert_eq!(daemon.get("/healthz"), "ok\n");
    assert_eq!(
        daemon.get(&format!("/processes/{pid}/count")),
        format!("{count}\n")
    );
    let stacks = daemon.get(&format!("/processes/{pid}/stacks"));
    let headers = stacks.lines().filter(|line| line.starts_with("goroutine "));
    assert_eq!(headers.count() as u64, count);
    let threads = daemon.get(&format!(
        "/processes/{pid}/stacks?runtime=threads&format=json"
    ));
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("threads")
        .count();
    assert_eq!(threads.lines().count(), tasks);
    let list = daemon.json("/processes");
    let all = list["processes"].as_array().expect("processes");
    let found = all
        .iter()
        .find(|process| process["pid"] == pid)
        .expect("the zoo");
    assert_eq!(found["runtimes"][0]["live"], count);
    let report = daemon.json(&format!("/processes/{pid}"));
    assert_eq!(report["runtimes"][0]["tasks"]["live"], count);
    let id = report["runtimes"][0]["sites"][0]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let site = daemon.json(&format!("/processes/{pid}/sites/{id}"));
    assert_eq!(site[0]["id"], id.as_str());
    assert!(
        !daemon
            .json(&format!("/processes/{pid}/past"))
            .as_array()
            .expect("points")
            .is_empty()
    );
    // Every answer is closed to other pages.
    let answer = daemon.raw("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert!(
        answer.contains("content-security-policy: default-src 'none'"),
        "{answer}"
    );
    assert!(answer.contains("<!doctype html>"), "{answer}");
    assert!(answer.contains("<form id=\"token\" hidden>"), "{answer}");
    // Both formats of the metrics.
    let open = daemon.raw("GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: application/openmetrics-text\r\nConnection: close\r\n\r\n");
    assert!(open.trim_end().ends_with("# EOF"), "{open}");
    // Nothing is left of a process that has ended.
    drop(zoo);
    wait_until("it is gone", || {
        !daemon.get("/metrics").contains(&format!("pid=\"{pid}\""))
    });
}

#[test]
fn signals() {
    let Some(path) = fixture("zoo", "plain") else {
        return;
    };
    let mut zoo = Running::start(&path.path);
    let count = zoo.count();
    let pid = zoo.pid();
    let daemon = Daemon::start(
        "",
        "",
        "[[rules]]\nexecutable = \"*/zoo\"\nwatch = \"lifecycle\"",
    );
    wait_until("probes are attached", || {
        daemon.metric("leakmon_task_spawned_total", pid) == Some(0.0)
    });
    // SIGUSR1: a dump that nobody else can read, and no more than are kept.
    let folder = daemon.folder.path().join("dumps");
    let dumps = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
        paths.sort();
        paths
    };
    for round in 1..=3 {
        let before = dumps();
        daemon.child.signal(Signal::SIGUSR1);
        wait_until("there is a dump", || {
            dumps().iter().any(|path| !before.contains(path))
        });
        wait_until("only two are kept", || dumps().len() == round.min(2));
    }
    let dump = dumps().pop().expect("a dump");
    let mode = std::fs::metadata(&dump)
        .expect("a dump")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let mode = std::fs::metadata(&folder)
        .expect("a folder")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
    let text = std::fs::read_to_string(&dump).expect("a dump");
    let headers = text.lines().filter(|line| line.starts_with("goroutine "));
    assert!(headers.count() as u64 >= count);
    // SIGHUP: a bad configuration changes nothing, a good one does.
    let good = std::fs::read_to_string(daemon.config()).expect("the configuration");
    std::fs::write(daemon.config(), "intervall = 1").expect("a configuration");
    daemon.child.signal(Signal::SIGHUP);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(daemon.metric("go_goroutine_count", pid), Some(count as f64));
    std::fs::write(daemon.config(), good.replace("lifecycle", "off")).expect("a configuration");
    daemon.child.signal(Signal::SIGHUP);
    wait_until("it is not watched any more", || {
        daemon.metric("process_thread_count", pid).is_none()
    });
    std::fs::write(daemon.config(), good).expect("a configuration");
    daemon.child.signal(Signal::SIGHUP);
    wait_until("it is watched again", || {
        daemon.metric("leakmon_task_spawned_total", pid) == Some(0.0)
    });
    // SIGTERM ends it, and the target goes on.
    daemon.child.signal(Signal::SIGTERM);
    let Daemon { child, folder, .. } = daemon;
    let done = child.finish();
    done.expect_code(0);
    assert!(
        done.err.contains("the old configuration stays"),
        "{}",
        done.err
    );
    assert!(
        done.err
            .contains("leakmon.toml:1: unknown field `intervall`"),
        "{}",
        done.err
    );
    assert_eq!(zoo.count(), count);
    drop(folder);
}

/// Rules that were not there at first.
#[test]
fn other_rules_take_effect() {
    let Some(path) = fixture("zoo", "plain") else {
        return;
    };
    let mut zoo = Running::start(&path.path);
    let count = zoo.count() as f64;
    let pid = zoo.pid();
    let off = "[[rules]]\nexecutable = \"*/zoo\"\nwatch = \"off\"\n";
    let daemon = Daemon::start("", "", off);
    assert_eq!(daemon.metric("process_thread_count", pid), None);
    let text = std::fs::read_to_string(daemon.config()).expect("the configuration");
    // It was never looked into before.
    std::fs::write(daemon.config(), text.replace(off, "")).expect("a configuration");
    daemon.child.signal(Signal::SIGHUP);
    wait_until("it is read", || {
        daemon.metric("go_goroutine_count", pid) == Some(count)
    });
    // Probes are loaded at start only, and nothing waits for them for ever.
    let probes = off.replace("off", "lifecycle");
    std::fs::write(daemon.config(), text.replace(off, &probes)).expect("a configuration");
    daemon.child.signal(Signal::SIGHUP);
    wait_until("it says why there are none", || {
        let report = daemon.json(&format!("/processes/{pid}"));
        report["runtimes"][0]["tier"]["reason"] == "unavailable"
    });
    let before = daemon.json("/processes")["elapsed_seconds"].as_f64();
    wait_until("it is read again", || {
        daemon.json("/processes")["elapsed_seconds"].as_f64() > before
    });
    assert_eq!(daemon.metric("go_goroutine_count", pid), Some(count));
}

#[test]
fn configurations_are_checked() {
    let folder = scratch();
    let path = folder.path().join("leakmon.toml");
    let check = |text: &str| {
        std::fs::write(&path, text).expect("a configuration");
        run(leakmon(["daemon", "--check-config", "--config"]).arg(&path))
    };
    check("interval = \"5s\"").expect_code(0);
    let done = check("[http]\nlisten = \"0.0.0.0:9464\"\n");
    done.expect_code(2);
    assert!(done.err.contains("which others can reach"), "{}", done.err);
    // The one that is shipped says what the defaults are.
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/leakmon.toml");
    run(leakmon(["daemon", "--check-config", "--config"]).arg(shipped)).expect_code(0);
    // A token that others can read is none.
    let token = folder.path().join("token");
    std::fs::write(&token, "0123456789abcdef").expect("a token");
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o644)).expect("its mode");
    std::fs::write(
        &path,
        format!(
            "[http]\nlisten = \"127.0.0.1:0\"\ntoken_file = \"{}\"\n",
            token.display()
        ),
    )
    .expect("a configuration");
    let done = run(leakmon(["daemon", "--config"]).arg(&path));
    done.expect_code(1);
    assert!(done.err.contains("others can read it"), "{}", done.err);
}

#[test]
fn a_token_is_asked_for() {
    let folder = scratch();
    let token = folder.path().join("token");
    std::fs::write(&token, "0123456789abcdef\n").expect("a token");
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o600)).expect("its mode");
    let daemon = Daemon::start("", &format!("token_file = \"{}\"", token.display()), "");
    let status = |path: &str, authorization: &str| {
        let answer = daemon.raw(&format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\n{authorization}Connection: close\r\n\r\n"
        ));
        answer[9..12].to_owned()
    };
    for path in ["/metrics", "/processes", "/processes/1/stacks", "/nothing"] {
        assert_eq!(status(path, ""), "401", "{path}");
        assert_eq!(
            status(path, "Authorization: Bearer 0123456789abcdeg\r\n"),
            "401",
            "{path}"
        );
        assert_eq!(
            status(path, "Authorization: Bearer 0123456789abcdefg\r\n"),
            "401",
            "{path}"
        );
        assert_eq!(
            status(path, "Authorization: Basic 0123456789abcdef\r\n"),
            "401",
            "{path}"
        );
    }
    assert_eq!(
        status("/metrics", "Authorization: Bearer 0123456789abcdef\r\n"),
        "200"
    );
    for path in ["/", "/healthz", "/readyz", "/page.js"] {
        assert_eq!(status(path, ""), "200", "{path}");
    }
    assert!(daemon.get("/").contains("<form id=\"token\">"));
}

#[test]
fn whoever_asks_cannot_hurt_it() {
    let daemon = Daemon::start("", "connections = 32", "");
    let status =
        |request: &str| -> String { daemon.raw(request).chars().skip(9).take(3).collect() };
    let host = "Host: localhost\r\nConnection: close\r\n";
    for (request, wanted) in [
        (format!("POST /metrics HTTP/1.1\r\n{host}\r\n"), "405"),
        (format!("DELETE /processes/1 HTTP/1.1\r\n{host}\r\n"), "405"),
        (
            format!("GET /metrics HTTP/1.1\r\n{host}Content-Length: 99999999999\r\n\r\n"),
            "413",
        ),
        (
            format!(
                "GET /metrics HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\nffffffff\r\n"
            ),
            "413",
        ),
        (
            format!("GET /../../etc/passwd HTTP/1.1\r\n{host}\r\n"),
            "404",
        ),
        (
            format!("GET /processes/..%2f..%2fetc/stacks HTTP/1.1\r\n{host}\r\n"),
            "404",
        ),
        (format!("GET /processes/-1 HTTP/1.1\r\n{host}\r\n"), "404"),
        (
            format!("GET /processes/99999999999999999999/count HTTP/1.1\r\n{host}\r\n"),
            "404",
        ),
        (
            format!("GET /processes/1/stacks?format=x HTTP/1.1\r\n{host}\r\n"),
            "400",
        ),
        (
            format!("GET /processes/1/stacks?other=x HTTP/1.1\r\n{host}\r\n"),
            "400",
        ),
        // A page that has let its own name point here.
        (
            "GET /metrics HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".to_owned(),
            "421",
        ),
        (
            format!("GET /{} HTTP/1.1\r\n{host}\r\n", "x".repeat(1 << 20)),
            "431",
        ),
        (
            format!("GET / HTTP/1.1\r\n{host}X: {}\r\n\r\n", "x".repeat(1 << 20)),
            "431",
        ),
        (
            format!("GET / HTTP/1.1\r\n{host}{}\r\n", "A: b\r\n".repeat(1000)),
            "431",
        ),
        ("\u{0}\u{1}\u{2}\r\n\r\n".to_owned(), "400"),
    ] {
        let got = status(&request);
        let short: String = request.chars().take(60).collect();
        // What is too large may be cut off without a word.
        assert!(
            got == wanted || got.is_empty() && wanted.starts_with("4") && request.len() > 100_000,
            "{short:?}: {got}, not {wanted}"
        );
    }
    // Those who say nothing hold no place for long, and the others wait their turn.
    let address: SocketAddr = daemon.address.parse().expect("an address");
    let silent: Vec<TcpStream> = (0..300)
        .filter_map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(50)).ok())
        .collect();
    let mut slow = TcpStream::connect(address).expect("a connection");
    slow.write_all(b"GET / HT").expect("a part of a request");
    let started = Instant::now();
    drop(silent);
    assert_eq!(daemon.get("/healthz"), "ok\n");
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    assert!(!daemon.get("/metrics").is_empty());
}

#[test]
fn names_that_are_meant_to_break_something() {
    let folder = scratch();
    let evil = "a\"b\\c\nd\u{1b}[31m<script>alert(1)</script>";
    let Some(zoo) = fixture("zoo", "plain") else {
        return;
    };
    let program = folder.path().join(evil.replace('/', "|"));
    std::fs::copy(zoo.path, &program).expect("a copy");
    let mut command = Command::new(&program);
    command.arg0("x".repeat(100_000));
    command.env(
        "OTEL_SERVICE_NAME",
        format!("{evil}{}", "y".repeat(100_000)),
    );
    let mut running = Running::command(&mut command);
    let count = running.count();
    let pid = running.pid();
    let daemon = Daemon::start("otel_environment = true", "", "");
    wait_until("it is read", || {
        daemon.metric("go_goroutine_count", pid) == Some(count as f64)
    });
    let metrics = daemon.get("/metrics");
    let line = metrics
        .lines()
        .find(|line| line.starts_with(&format!("go_goroutine_count{{pid=\"{pid}\"")))
        .expect("its line");
    assert!(line.contains(r#"executable="a\"b\\c\nd"#), "{line}");
    assert!(line.len() < 1000, "{}", line.len());
    for line in metrics.lines() {
        let value = line.rsplit(' ').next().expect("a value");
        assert!(
            line.starts_with('#') || value.parse::<f64>().is_ok(),
            "{line:?}"
        );
    }
    let list = daemon.get("/processes");
    assert!(!list.contains('\u{1b}'), "an escape sequence");
    let list: Value = serde_json::from_str(&list).expect("JSON");
    assert!(
        list["processes"]
            .as_array()
            .expect("processes")
            .iter()
            .any(|p| p["pid"] == pid)
    );
}

#[test]
fn promtool_finds_nothing_wrong() {
    let Some(promtool) = real("promtool") else {
        return;
    };
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus-rules.yml");
    let done = run(Command::new(&promtool).args(["check", "rules"]).arg(rules));
    done.expect_code(0);
    let Some(zoo) = fixture("zoo", "plain") else {
        return;
    };
    let zoo = Running::start(&zoo.path);
    let daemon = Daemon::start(
        "",
        "",
        "[[rules]]\nexecutable = \"*/zoo\"\nwatch = \"blocking\"",
    );
    wait_until("it is read", || {
        daemon
            .metric("leakmon_task_spawned_total", zoo.pid())
            .is_some()
    });
    let text = daemon.get("/metrics");
    let mut check = Command::new(&promtool);
    let mut child = check
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    child
        .stdin
        .take()
        .expect("its input")
        .write_all(text.as_bytes())
        .expect("it reads");
    let output = child.wait_with_output().expect("promtool");
    let said = String::from_utf8_lossy(&output.stderr);
    let said = format!("{said}{}", String::from_utf8_lossy(&output.stdout));
    // OpenTelemetry's own names end so, whatever Prometheus's lint thinks of it.
    let ours: Vec<&str> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .filter(|line| {
            !["go_goroutine_count ", "process_thread_count "]
                .iter()
                .any(|name| line.starts_with(name) && line.contains("\"_count\" suffix"))
        })
        .collect();
    assert!(ours.is_empty(), "{said}");
}

#[test]
fn a_real_prometheus_sees_the_leak_and_alerts() {
    let Some(server) = real("prometheus") else {
        return;
    };
    let Some(mut sum) = sum() else { return };
    let daemon = Daemon::start("", "", "");
    // The shipped rules, with the patience of a test.
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus-rules.yml");
    let rules = std::fs::read_to_string(rules).expect("the rules");
    let rules = rules.replace("for: 1m", "for: 1s");
    let prometheus = Prometheus::start(&server, &daemon.address, &rules);
    let pid = sum.server.pid();
    let count = || -> Option<u64> {
        let found = prometheus.query(&format!("go_goroutine_count{{pid=\"{pid}\"}}"));
        found.first()?["value"][1].as_str()?.parse().ok()
    };
    let mut before = 0;
    for _ in 0..3 {
        sum.leak(50);
        // The server's own count has the goroutine of the connection that asks, and
        // the one that reads it while the handler runs.
        let own: u64 = sum
            .connection
            .get("/_count")
            .trim()
            .parse()
            .expect("a number");
        wait_until("Prometheus has the program's own number", || {
            count() == Some(own - 1) || count() == Some(own)
        });
        let now = count().expect("a number");
        assert!(now >= before + 50, "{now} after {before}");
        before = now;
    }
    // It goes on leaking until the alert fires.
    wait_until("the alert fires", || {
        sum.leak(20);
        std::thread::sleep(Duration::from_millis(300));
        let alerts = prometheus.ask("/api/v1/alerts");
        let alerts = alerts["data"]["alerts"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        alerts.iter().any(|alert| {
            alert["labels"]["alertname"] == "LeakSuspected"
                && alert["state"] == "firing"
                && alert["labels"]["pid"].as_str() == Some(&pid.to_string())
        })
    });
}

/// The least that it needs, and nothing else: not even root's id.
#[test]
fn capabilities_are_dropped() {
    let daemon = Daemon::start("", "", "");
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.pid()))
        .expect("its status");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let line = status
            .lines()
            .find(|line| line.starts_with(set))
            .expect("a set");
        let bits =
            u64::from_str_radix(line.split_whitespace().nth(1).expect("bits"), 16).expect("bits");
        // CAP_DAC_READ_SEARCH 2, CAP_SYS_PTRACE 19, CAP_PERFMON 38, CAP_BPF 39.
        assert_eq!(bits & !(1 << 2 | 1 << 19 | 1 << 38 | 1 << 39), 0, "{line}");
    }
}

/// Bytes of its code that a process does not have as its file has them.
fn changed_code(pid: u32) -> usize {
    let maps = std::fs::read(format!("/proc/{pid}/maps")).expect("its mappings");
    let mappings = leakmon::process::maps::executable(&maps);
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).expect("its program");
    let file = std::fs::read(format!("/proc/{pid}/exe")).expect("its file");
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).expect("its memory");
    let mut changed = 0;
    for mapping in &mappings {
        if Path::new(&mapping.name) != program {
            continue;
        }
        let mut code = vec![0; (mapping.end - mapping.start) as usize];
        let read = memory.read_exact_at(&mut code, mapping.start);
        read.expect("its code");
        let pairs = code.iter().zip(&file[mapping.offset as usize..]);
        changed += pairs.filter(|(now, file)| now != file).count();
    }
    changed
}

/// What a process has in the kernel: the ids of its BPF programs and links.
fn in_the_kernel(pid: u32) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let (mut programs, mut links) = (BTreeSet::new(), BTreeSet::new());
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("its files") {
        let text = std::fs::read_to_string(entry.expect("a file").path()).unwrap_or_default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let id = value.trim().parse::<u32>();
            match key {
                "prog_id" => programs.extend(id),
                "link_id" => links.extend(id),
                _ => {}
            }
        }
    }
    (programs, links)
}

/// Killed, it leaves no probe in the kernel, and every target goes on; another one
/// takes up where it was.
#[test]
fn killed_it_leaves_nothing() {
    let Some(churner) = fixture("churner", "plain") else {
        return;
    };
    let tokio = common::fixtures().map(|folder| folder.join("tokio-1.54/release/zoo"));
    let tokio = tokio.filter(|path| path.exists()).expect("a fixture");
    // By names of their own, which no other test's daemon has a rule for.
    let folder = scratch();
    let copy = |path: &Path, name: &str| {
        let copied = folder.path().join(name);
        std::fs::copy(path, &copied).expect("a copy");
        std::fs::canonicalize(copied).expect("the copy")
    };
    let churner = copy(&churner.path, "to-go-on");
    let mut targets: Vec<Running> = (0..3).map(|_| Running::start(&churner)).collect();
    let mut zoo = Running::start(&copy(&tokio, "to-go-on-too"));
    let pids: Vec<u32> = targets
        .iter()
        .map(Running::pid)
        .chain([zoo.pid()])
        .collect();
    assert!(pids.iter().all(|pid| changed_code(*pid) == 0));
    let rules = "[[rules]]\nexecutable = \"*/to-go-on*\"\nwatch = \"blocking\"\n";
    let attached = |daemon: &Daemon| {
        wait_until("probes are attached", || {
            // All of them: who is killed while it attaches or detaches may leave some to
            // the kernel.
            let attached = |pid| {
                let report = daemon.json(&format!("/processes/{pid}"));
                let runtime = &report["runtimes"][0];
                runtime["tier"]["name"] == "blocking"
                    && runtime["probes"]["waits_attached_ratio"] == 1.0
            };
            let read = |pid| daemon.metric("leakmon_task_spawned_total", pid).is_some();
            pids.iter().all(|pid| read(*pid) && attached(*pid))
        });
    };
    let daemon = Daemon::start("max_overhead = 50.0", "", rules);
    attached(&daemon);
    assert!(pids.iter().all(|pid| changed_code(*pid) > 0));
    let (programs, links) = in_the_kernel(daemon.child.pid());
    assert!(!programs.is_empty() && !links.is_empty());
    let left = || {
        let loaded = aya::programs::loaded_programs().filter_map(|info| Some(info.ok()?.id()));
        let linked = aya::programs::loaded_links().filter_map(|info| Some(info.ok()?.id()));
        let programs = loaded.filter(|id| programs.contains(id)).count();
        (programs, linked.filter(|id| links.contains(id)).count())
    };
    assert_eq!(left(), (programs.len(), links.len()));
    // In the middle of it, but of nothing for which the budget would detach just now.
    for target in &mut targets {
        target.tell("waits 20 2");
    }
    zoo.ask("spin 300");
    std::thread::sleep(Duration::from_millis(50));
    daemon.child.signal(Signal::SIGKILL);
    assert_eq!(daemon.child.finish().code, None);
    wait_until("nothing is left in the kernel", || left() == (0, 0));
    let changed = || {
        pids.iter()
            .map(|pid| (*pid, changed_code(*pid)))
            .collect::<Vec<_>>()
    };
    let until = Instant::now() + common::limit();
    while changed().iter().any(|(_, changed)| *changed > 0) {
        assert!(Instant::now() < until, "still changed: {:?}", changed());
        std::thread::sleep(Duration::from_millis(5));
    }
    for target in &mut targets {
        assert!(target.line().contains("waits=40"));
        let churned = target.ask("churn 20000");
        assert!(churned.contains("spawned=20004 exited=20004"), "{churned}");
    }
    assert_eq!(zoo.ask("churn 20000"), "churned total=20000");
    let daemon = Daemon::start("max_overhead = 50.0", "", rules);
    attached(&daemon);
    for target in &mut targets {
        target.ask("churn 1000");
    }
    for target in &targets {
        wait_until("the next one counts", || {
            daemon.metric("leakmon_task_spawned_total", target.pid()) == Some(1000.0)
        });
    }
}

/// Sockets that a process has open.
fn sockets(pid: u32) -> usize {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its files");
    let links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    links
        .filter(|link| link.to_string_lossy().starts_with("socket:"))
        .count()
}

/// How many those are while nobody is connected: connections that have just ended
/// go at their own pace.
fn own_sockets(pid: u32) -> usize {
    let looks = (0..50).map(|_| {
        std::thread::sleep(Duration::from_millis(10));
        sockets(pid)
    });
    looks.min().expect("a look")
}

/// Its resident memory, in bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("its memory") << 10
}

/// One that says nothing, a part, or little at a time, does not read, or asks again
/// and again.
async fn hostile(address: SocketAddr, kind: usize) -> std::io::Result<()> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    const REQUEST: &[u8] = b"GET /processes HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let mut buffer = [0; 4096];
    match kind % 5 {
        0 => {}
        1 => stream.write_all(&REQUEST[..10]).await?,
        2 => {
            for byte in REQUEST {
                stream.write_all(&[*byte]).await?;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
        3 => {
            stream.write_all(REQUEST).await?;
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        _ => loop {
            stream.write_all(REQUEST).await?;
            if stream.read(&mut buffer).await? == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        },
    }
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Ten thousand who mean no good: what they take of leakmon is bounded, and who asks
/// whether it is well is told.
#[test]
fn ten_thousand_connections() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    const CLIENTS: usize = 10_000;
    const CONNECTIONS: usize = 64;
    if common::fixtures().is_none() {
        return;
    }
    let daemon = Daemon::start("", &format!("connections = {CONNECTIONS}"), "");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let wanted = CLIENTS as u64 + 2000;
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).expect("more files");
    let address: SocketAddr = daemon.address.parse().expect("an address");
    let pid = daemon.child.pid();
    assert!(!daemon.get("/processes").is_empty());
    let (memory, open) = (resident(pid), own_sockets(pid));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    for kind in 0..CLIENTS {
        runtime.spawn(async move {
            loop {
                // Whatever becomes of it, there is another one.
                let _ = hostile(address, kind).await;
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        });
    }
    let until = Instant::now() + Duration::from_secs(15);
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    while Instant::now() < until {
        let asked = Instant::now();
        let answer =
            daemon.raw("GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        longest = longest.max(asked.elapsed());
        let status = answer.lines().next().unwrap_or_default().to_owned();
        *answers.entry(status).or_default() += 1;
        let (now, grown) = (sockets(pid), resident(pid).saturating_sub(memory));
        // One comes while another goes.
        assert!(
            now <= open + CONNECTIONS + 8,
            "{now} sockets, {open} before"
        );
        assert!(grown < 64 << 20, "{grown} bytes more than {memory}");
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!("{answers:?}, the longest after {longest:?}");
    let good = answers.get("HTTP/1.1 200 OK").copied().unwrap_or(0);
    let refused = answers
        .get("HTTP/1.1 503 Service Unavailable")
        .copied()
        .unwrap_or(0);
    assert_eq!(
        good + refused,
        answers.values().sum::<usize>(),
        "{answers:?}"
    );
    assert!(good > 0, "{answers:?}");
    runtime.shutdown_background();
    wait_until("they are gone", || sockets(pid) <= open);
    assert_eq!(daemon.get("/healthz"), "ok\n");
}

/// A program whose dump takes a client its time, read by a daemon with these lines for
/// HTTP; `None` without the fixture.
fn with_long_dumps(http: &str) -> Option<(Running, Daemon)> {
    let holder = fixture("holder", "plain")?;
    let target = Running::command(Command::new(&holder.path).args(["-n", "150000"]));
    let daemon = Daemon::start("", http, "");
    wait_until("it is read", || {
        daemon.metric("go_goroutine_count", target.pid()).is_some()
    });
    Some((target, daemon))
}

/// Whoever asks for a dump and does not take it holds up nobody, takes no more
/// memory than there is for all, and is sent away.
#[test]
fn dumps_that_nobody_takes() {
    let Some((target, daemon)) = with_long_dumps("connections = 12\ntimeout = \"15s\"") else {
        return;
    };
    let pid = target.pid();
    let address: SocketAddr = daemon.address.parse().expect("an address");
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream
            .set_read_timeout(Some(common::limit()))
            .expect("a limit");
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("a request");
        let mut status = [0; 12];
        stream.read_exact(&mut status).expect("an answer");
        (stream, String::from_utf8_lossy(&status[9..]).into_owned())
    };
    let dump = format!("/processes/{pid}/stacks?format=debug2");
    let counted = format!("/processes/{pid}/stacks?format=debug1");
    let (memory, open) = (
        resident(daemon.child.pid()),
        own_sockets(daemon.child.pid()),
    );
    // Of some 27 MB each, and 192 MiB are there for all.
    let mut slow = Vec::new();
    loop {
        let (stream, status) = ask(&dump);
        if status == "503" {
            break;
        }
        assert_eq!(status, "200");
        slow.push(stream);
        assert!(slow.len() <= 8, "they take more than there is");
    }
    assert!(slow.len() > 2, "{} have taken all", slow.len());
    let taken = resident(daemon.child.pid()).saturating_sub(memory);
    assert!(taken < 320 << 20, "{taken} bytes");
    assert!(
        daemon
            .get(&counted)
            .contains("goroutine profile: total 15000")
    );
    wait_until("they are sent away", || sockets(daemon.child.pid()) <= open);
    assert_eq!(ask(&dump).1, "200");
    for mut stream in slow {
        let mut taken = Vec::new();
        let end = stream.read_to_end(&mut taken);
        let head = String::from_utf8_lossy(&taken[..500.min(taken.len())]).to_ascii_lowercase();
        let (_, len) = head.split_once("content-length: ").expect("a length");
        let len: usize = len
            .lines()
            .next()
            .and_then(|len| len.parse().ok())
            .expect("a length");
        assert!(
            taken.len() < len && len > 20_000_000,
            "{end:?}: {} of {len}",
            taken.len()
        );
    }
}

/// Where every connection is being answered, a new one is told so.
#[test]
fn no_place_is_a_clear_answer() {
    let Some((target, daemon)) = with_long_dumps("connections = 1\ntimeout = \"15s\"") else {
        return;
    };
    let pid = target.pid();
    let mut slow = TcpStream::connect(&daemon.address).expect("a connection");
    let request = format!("GET /processes/{pid}/stacks HTTP/1.1\r\nHost: localhost\r\n\r\n");
    slow.write_all(request.as_bytes()).expect("a request");
    let mut first = [0; 12];
    slow.read_exact(&mut first).expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 200");
    let health = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let answer = daemon.raw(health);
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("kept at once: ask again\n"), "{answer}");
    wait_until("it is sent away", || {
        daemon.raw(health).starts_with("HTTP/1.1 200")
    });
}
