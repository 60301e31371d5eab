//! A program with tokio that nobody here wrote, mini-redis's server: what
//! leakmon counts of it, with and without its symbols, is what a debugger reads
//! in tokio's own memory.
//!
//! Needs root, gdb, and the fixtures (see `common`).

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Owned, leakmon, run, scratch};
use serde_json::Value;

/// The program, in release mode with full debug information.
fn program() -> Option<PathBuf> {
    let path = common::fixtures()?.join("tokio-1.54/debug2/mini-redis-server");
    assert!(path.exists(), "{} is not built", path.display());
    Some(path)
}

/// An address on which nobody listens.
fn port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

/// What the debugger evaluates: `OwnedTasks`'s own count of the runtime whose
/// `block_on` the main thread is in. The names are those of tokio 1.54
/// (runtime/scheduler/mod.rs, runtime/task/list.rs, util/sharded_list.rs).
const COUNT: &str = "
import gdb
frame = gdb.selected_frame()
while 'MultiThread::block_on' not in (frame.name() or ''):
    frame = frame.older()
frame.select()
count = gdb.parse_and_eval('(*handle).0.ptr.pointer.data.shared.owned.list.count.value.v.value')
print('alive', int(count))
";

/// tokio's number of live tasks. `symbols` is the program that has them.
fn alive(pid: u32, symbols: &Path, folder: &Path) -> u64 {
    let script = folder.join("count.py");
    std::fs::write(&script, COUNT).expect("a script");
    let output = Command::new("gdb")
        .args(["-nx", "-batch"])
        .arg(symbols)
        .args(["-p", &pid.to_string(), "-ex", "thread 1", "-x"])
        .arg(&script)
        .stdin(Stdio::null())
        .output()
        .expect("gdb");
    let text = String::from_utf8_lossy(&output.stdout);
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("alive ")?.parse().ok());
    count.unwrap_or_else(|| panic!("gdb: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// tokio's tasks in leakmon's report.
#[track_caller]
fn report(pid: u32) -> Value {
    let done = run(&mut leakmon([
        "--once",
        "--format",
        "json",
        "--pid",
        &pid.to_string(),
    ]));
    done.expect_code(0);
    let report: Value = serde_json::from_str(&done.out).expect("a report");
    let runtimes = report["runtimes"].as_array().expect("runtimes");
    let found = runtimes.iter().find(|r| r["runtime"]["name"] == "tokio");
    found
        .unwrap_or_else(|| panic!("no tokio: {}", done.out))
        .clone()
}

/// Connects, and has an answer to a request, after which the connection's task
/// is at rest.
fn connect(port: u16, request: &str, answer: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream
        .set_read_timeout(Some(common::limit()))
        .expect("a limit");
    stream.write_all(request.as_bytes()).expect("a request");
    let mut read = vec![0; answer.len()];
    stream.read_exact(&mut read).expect("an answer");
    assert_eq!(String::from_utf8_lossy(&read), answer);
    stream
}

#[test]
fn the_tasks_of_a_server_are_those_that_a_debugger_finds() {
    let Some(program) = program() else {
        return;
    };
    let folder = scratch();
    let stripped = folder.path().join("stripped");
    let strip = Command::new("strip")
        .arg("--strip-all")
        .arg("-o")
        .args([&stripped, &program])
        .status();
    assert!(strip.expect("strip").success());
    for path in [&program, &stripped] {
        let port = port();
        let server = Owned::spawn(
            Command::new(path)
                .args(["--port", &port.to_string()])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        common::wait_until("it listens", || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        let check = |what: &str| {
            // The last connection's end may be on its way.
            let mut seen = (0, Value::Null);
            common::wait_until(what, || {
                let before = alive(server.pid(), &program, folder.path());
                let report = report(server.pid());
                let after = alive(server.pid(), &program, folder.path());
                seen = (before, report);
                before == after
            });
            let (alive, report) = seen;
            println!("{}: {what}: {alive} tasks", path.display());
            assert_eq!(report["tasks"]["live"], alive, "{what}: {report:#}");
            assert_eq!(report["tasks"]["unstable"], 0, "{what}: {report:#}");
            (alive, report)
        };
        let (resting, _) = check("at rest");
        let getters: Vec<TcpStream> = (0..40)
            .map(|_| connect(port, "*2\r\n$3\r\nGET\r\n$1\r\nx\r\n", "$-1\r\n"))
            .collect();
        let (with_getters, report) = check("with 40 connections");
        assert_eq!(with_getters, resting + 40);
        // They are of one line of the program, and more than any others.
        let site = &report["sites"][0];
        assert_eq!(site["live"], 40, "{report:#}");
        let subscribers: Vec<TcpStream> = (0..25)
            .map(|_| {
                connect(
                    port,
                    "*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\nc\r\n",
                    "*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n",
                )
            })
            .collect();
        let (with_all, _) = check("with 25 subscribers");
        assert_eq!(with_all, resting + 65);
        drop((getters, subscribers));
        let mut left = 0;
        common::wait_until("they are gone", || {
            left = alive(server.pid(), &program, folder.path());
            left == resting
        });
        let (at_end, _) = check("when they are gone");
        assert_eq!(at_end, resting);
    }
}
