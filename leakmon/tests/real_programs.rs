//! Programs that nobody here wrote, stripped, as Debian ships them: what leakmon
//! reads of them is what they say of themselves.
//!
//! Each is asked over one connection that is kept. While it answers, two
//! goroutines are not as they are at rest: the one that serves the connection
//! makes the dump, where at rest it waits for the next request; and net/http has
//! one more, which reads the connection for as long as the handler runs. All
//! others must be equal, and so must be the number.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Connection, Owned, leakmon, run};

/// How often a program is read until it is found at rest.
const ATTEMPTS: usize = 20;

fn program(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("LEAKMON_REAL") else {
        eprintln!("LEAKMON_REAL names no folder of real programs: nothing is tested");
        return None;
    };
    Some(PathBuf::from(folder).join(name))
}

/// An address on which nobody listens.
fn address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

/// Starts a program with its home in `home`, waits until it listens at each of
/// `addresses`, and connects to the first.
fn start(command: &mut Command, home: &Path, addresses: &[&str]) -> (Owned, Connection) {
    let command = command
        .current_dir(home)
        .env("HOME", home)
        .env("XDG_CONFIG_HOME", home)
        .env("XDG_DATA_HOME", home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let target = Owned::spawn(command);
    for address in addresses {
        common::wait_until("it listens", || Connection::open(address).is_ok());
    }
    let connection = Connection::open(addresses[0]).expect("a connection");
    (target, connection)
}

/// What a program says of itself, without what the question brought with it.
#[derive(Debug, PartialEq)]
struct Own {
    /// Goroutines at rest.
    others: Vec<String>,
    /// The start of the line `goroutine 7 [...]` of the one that answered.
    served_by: String,
    /// How many it counts.
    count: usize,
}

impl Own {
    fn ask(connection: &mut Connection) -> Own {
        let mut others = common::goroutines(&connection.get("/debug/pprof/goroutine?debug=2"));
        let count = others.len();
        // A dump starts with the goroutine that makes it.
        let answering = others.remove(0);
        assert!(
            answering.contains("\nnet/http/pprof.handler.ServeHTTP("),
            "{answering}"
        );
        assert!(
            answering.contains("\nnet/http.(*conn).serve("),
            "{answering}"
        );
        let reads = |goroutine: &String| {
            goroutine.contains("\ncreated by net/http.(*connReader).startBackgroundRead\n")
        };
        let readers = others.iter().filter(|goroutine| reads(goroutine)).count();
        assert_eq!(readers, 1, "{others:#?}");
        others.retain(|goroutine| !reads(goroutine));
        let served_by = answering.split('[').next().unwrap_or_default().to_owned();
        Own {
            others,
            served_by,
            count,
        }
    }
}

/// Compares what leakmon reads with what the program said right before and
/// says right after. These programs have timers, so something may have run in
/// between: then everything is read again.
#[track_caller]
fn compare(name: &str, target: &Owned, connection: &mut Connection) {
    let mut difference = String::new();
    for attempt in 1..=ATTEMPTS {
        match compare_once(target, connection) {
            Ok(count) => {
                eprintln!("{name}: {count} goroutines, equal at attempt {attempt}");
                return;
            }
            Err(found) => difference = found,
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{name}: {difference}");
}

/// How many goroutines both saw at rest, or how they differ.
fn compare_once(target: &Owned, connection: &mut Connection) -> Result<usize, String> {
    let pid = target.pid().to_string();
    let before = Own::ask(connection);
    // Its connection comes to rest.
    std::thread::sleep(Duration::from_millis(20));
    let dump = run(&mut leakmon(["stacks", "--pid", &pid]));
    let mut ours = common::goroutines(&dump.expect_code(0).out);
    let once = run(&mut leakmon(["--pid", &pid, "--once", "--format", "json"]));
    let once = once.expect_code(0).json().remove(0);
    let after = Own::ask(connection);
    if before != after {
        return Err(format!("{before:#?}\nis not\n{after:#?}"));
    }
    let count = ours.len();
    // All of its own but the reader of the connection.
    let counts = (once["tasks"]["live"].as_u64(), count + 1);
    if counts != (Some(count as u64), before.count) {
        return Err(format!("counts {counts:?} of {}: {ours:#?}", before.count));
    }
    let serving = ours
        .iter()
        .position(|goroutine| goroutine.starts_with(&before.served_by))
        .ok_or("the goroutine that serves the connection is missing")?;
    let serving = ours.remove(serving);
    if !serving.contains(" [IO wait]") || !serving.contains("\nnet/http.(*conn).serve(") {
        return Err(serving);
    }
    // The dump lists its own goroutine first, and all others in order.
    if ours != before.others {
        return Err(format!("{ours:#?}\nis not\n{:#?}", before.others));
    }
    Ok(count)
}

#[test]
fn node_exporter() {
    let Some(program) = program("prometheus-node-exporter") else {
        return;
    };
    let home = common::scratch();
    let address = address();
    let mut command = Command::new(program);
    command.arg(format!("--web.listen-address={address}"));
    let (target, mut connection) = start(&mut command, home.path(), &[&address]);
    compare("prometheus-node-exporter", &target, &mut connection);
}

#[test]
fn etcd() {
    let Some(program) = program("etcd") else {
        return;
    };
    let home = common::scratch();
    let (client, peer) = (address(), address());
    let (client_url, peer_url) = (format!("http://{client}"), format!("http://{peer}"));
    let mut command = Command::new(program);
    command
        .args(["--enable-pprof", "--data-dir"])
        .arg(home.path().join("data"));
    command.args(["--listen-client-urls", &client_url]);
    command.args(["--advertise-client-urls", &client_url]);
    command.args(["--listen-peer-urls", &peer_url]);
    command.args(["--initial-advertise-peer-urls", &peer_url]);
    command.args(["--initial-cluster", &format!("default={peer_url}")]);
    let (target, mut connection) = start(&mut command, home.path(), &[&client]);
    compare("etcd", &target, &mut connection);
}

#[test]
fn caddy() {
    let Some(program) = program("caddy") else {
        return;
    };
    let home = common::scratch();
    let (admin, site) = (address(), address());
    let config = serde_json::json!({
        "admin": { "listen": admin },
        "apps": { "http": { "servers": { "one": {
            "listen": [site],
            "routes": [{ "handle": [{ "handler": "static_response", "body": "here" }] }],
        } } } },
    });
    let file = home.path().join("caddy.json");
    std::fs::write(&file, config.to_string()).expect("a configuration");
    let mut command = Command::new(program);
    command.args(["run", "--config"]).arg(file);
    // It listens for its administrator before it is told how, and then anew.
    let (target, mut connection) = start(&mut command, home.path(), &[&admin, &site]);
    compare("caddy", &target, &mut connection);
}
