//! What deploy/ ships does what it says: the systemd unit, the DaemonSet, and the
//! dashboard.
//!
//! Needs root, and the fixtures (see `common`).

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr as _;

use caps::{CapSet, Capability};
use common::daemon::Daemon;
use common::prometheus::Prometheus;
use common::{Owned, Running, all, fixture, real, run, scratch, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A user that nobody is.
const USER: u32 = 64_123;

/// The exposure that `systemd-analyze security` reckons with: what is left is what
/// leakmon is for.
const EXPOSURE: f64 = 2.1;

fn shipped(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(name);
    std::fs::read_to_string(path).expect("what is shipped")
}

/// The fixture under a name that no other test's daemon has a rule for.
fn churner(folder: &Path, name: &str) -> Option<Running> {
    let path = folder.join(name);
    std::fs::copy(fixture("churner", "plain")?.path, &path).expect("a copy");
    Some(Running::start(
        &std::fs::canonicalize(path).expect("the copy"),
    ))
}

/// It counts and probes `target`, and writes a dump below `dumps`.
fn expect_work(daemon: &Daemon, target: &mut Running, token: &str, dumps: &Path) {
    let pid = target.pid();
    let value = |name: &str| -> Option<f64> {
        let answer = daemon.raw(&format!(
            "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Authorization: Bearer {token}\r\n\r\n"
        ));
        let start = format!("{name}{{pid=\"{pid}\"");
        let line = answer.lines().find(|line| line.starts_with(&start))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    wait_until("probes are attached", || {
        value("leakmon_task_spawned_total") == Some(0.0)
    });
    target.ask("churn 1000");
    let count = target.count() as f64;
    wait_until("it is counted", || {
        value("leakmon_task_spawned_total") == Some(1000.0)
            && value("leakmon_task_exited_total") == Some(1000.0)
            && value("go_goroutine_count") == Some(count)
    });
    daemon.child.signal(Signal::SIGUSR1);
    wait_until("there is a dump", || {
        let entries = std::fs::read_dir(dumps).into_iter().flatten().flatten();
        let texts = entries.filter(|entry| entry.path().extension().is_some_and(|e| e == "txt"));
        let text = texts
            .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
            .next();
        text.is_some_and(|text| text.contains("goroutine 1 ["))
    });
}

/// Its capabilities now, as bits, and whether it can gain none.
fn privileges(pid: u32) -> (u64, bool) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.expect("a field").trim().to_owned()
    };
    let effective = u64::from_str_radix(&field("CapEff:"), 16).expect("bits");
    (effective, field("NoNewPrivs:") == "1")
}

fn bits(capabilities: &[Capability]) -> u64 {
    capabilities.iter().map(|one| 1 << one.index()).sum()
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    if !Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_ok_and(|done| done.status.success())
    {
        eprintln!("there is no systemd-analyze: the unit is not verified");
        return;
    }
    let folder = scratch();
    let unit = folder.path().join("leakmon.service");
    // It looks for the program, which is not installed here.
    let text =
        shipped("leakmon.service").replace("/usr/bin/leakmon", env!("CARGO_BIN_EXE_leakmon"));
    std::fs::write(&unit, text).expect("a unit");
    let done = run(Command::new("systemd-analyze").arg("verify").arg(&unit));
    done.expect_code(0);
    assert_eq!((done.out.trim(), done.err.trim()), ("", ""));
    let security = ["security", "--offline=true", "--no-pager"];
    let done = run(Command::new("systemd-analyze")
        .args(security)
        .arg(&unit)
        .env("SYSTEMD_COLORS", "0"));
    done.expect_code(0);
    let (_, overall) = done
        .out
        .split_once("exposure level for leakmon.service: ")
        .expect("a score");
    let score: f64 = overall
        .split_whitespace()
        .next()
        .and_then(|s| s.parse().ok())
        .expect("a number");
    assert!(score <= EXPOSURE, "{}", done.out);
}

/// As no user and with the unit's capabilities only.
#[test]
fn it_works_with_what_the_unit_gives() {
    let folder = scratch();
    let unit = shipped("leakmon.service");
    let list = |key: &str| -> Vec<Capability> {
        let line = unit
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .expect("a line");
        let names = line.split_whitespace();
        names
            .map(|name| Capability::from_str(name).expect("a capability"))
            .collect()
    };
    let given = list("AmbientCapabilities=");
    assert_eq!(given, list("CapabilityBoundingSet="));
    let set: String = given
        .iter()
        .map(|one| {
            format!(
                ",+{}",
                one.to_string().trim_start_matches("CAP_").to_lowercase()
            )
        })
        .collect();
    let dumps = folder.path().join("dumps");
    std::fs::create_dir(&dumps).expect("a folder");
    std::os::unix::fs::chown(&dumps, Some(USER), Some(USER)).expect("its owner");
    let Some(mut target) = churner(folder.path(), "of-the-unit") else {
        return;
    };
    let config = folder.path().join("leakmon.toml");
    let text = format!(
        "interval = \"1s\"\n[http]\nlisten = \"127.0.0.1:0\"\n[dumps]\nfolder = \"{}\"\n\
         [[rules]]\nexecutable = \"*/of-the-unit\"\nwatch = \"blocking\"\n",
        dumps.display()
    );
    std::fs::write(&config, text).expect("a configuration");
    let daemon = Daemon::run(
        folder,
        Command::new("setpriv")
            .args([format!("--reuid={USER}"), format!("--regid={USER}")])
            .args(["--clear-groups", "--no-new-privs"])
            .arg(format!("--bounding-set=-all{set}"))
            .arg(format!("--inh-caps=-all{set}"))
            .arg(format!("--ambient-caps=-all{set}"))
            .args([env!("CARGO_BIN_EXE_leakmon"), "daemon", "--config"])
            .arg(&config),
    );
    assert_eq!(privileges(daemon.child.pid()), (bits(&given), true));
    expect_work(&daemon, &mut target, "", &dumps);
}

/// The lines of a block `key: |` of a YAML file.
fn block(text: &str, key: &str) -> String {
    let mut lines = text
        .lines()
        .skip_while(|line| line.trim() != format!("{key}: |"));
    let indent = lines
        .next()
        .expect("the block")
        .find(|c| c != ' ')
        .expect("a key");
    let inside = |line: &&str| line.trim().is_empty() || line.find(|c| c != ' ') > Some(indent);
    lines
        .take_while(inside)
        .map(|line| format!("{}\n", line.trim()))
        .collect()
}

const ROOT: &str = "LEAKMON_TEST_ROOT";
const CAPABILITIES: &str = "LEAKMON_TEST_CAPABILITIES";

/// What a container's runtime does last, for the test below.
#[test]
#[ignore = "a part of another test"]
fn enters_the_container() {
    let Some(root) = std::env::var_os(ROOT) else {
        return;
    };
    let given = std::env::var(CAPABILITIES).expect("capabilities");
    let given: Vec<Capability> = given
        .split(' ')
        .map(|name| Capability::from_str(name).expect("a capability"))
        .collect();
    nix::unistd::chroot(Path::new(&root)).expect("another root");
    nix::unistd::chdir("/").expect("its top");
    for capability in caps::read(None, CapSet::Bounding).expect("the bounding set") {
        if !given.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).expect("one less");
        }
    }
    nix::sys::prctl::set_no_new_privs().expect("no new privileges");
    let arguments = ["daemon", "--config", "/etc/leakmon/leakmon.toml"];
    panic!(
        "{}",
        Command::new("/leakmon").args(arguments).env_clear().exec()
    );
}

/// Copies leakmon and the libraries that it needs, if it is not static, into the root
/// of a container.
fn install(root: &Path) {
    let program = env!("CARGO_BIN_EXE_leakmon");
    std::fs::copy(program, root.join("leakmon")).expect("a copy");
    let needed = Command::new("ldd").arg(program).output().expect("ldd");
    let needed = String::from_utf8(needed.stdout).expect("text");
    for library in needed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let to = root.join(library.trim_start_matches('/'));
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        std::fs::copy(library, to).expect("a copy");
    }
}

/// leakmon with what it needs alone in a root that cannot be written, with the
/// DaemonSet's configuration and capabilities.
#[test]
fn it_works_in_a_container() {
    let folder = scratch();
    let Some(mut target) = churner(folder.path(), "of-the-container") else {
        return;
    };
    let manifest = shipped("daemonset.yaml");
    let list = manifest
        .lines()
        .find_map(|line| line.trim().strip_prefix("add: ["));
    let given: Vec<Capability> = list
        .expect("capabilities")
        .split(['"', ',', ' ', ']'])
        .filter(|name| !name.is_empty())
        .map(|name| Capability::from_str(&format!("CAP_{name}")).expect("a capability"))
        .collect();
    let names: Vec<String> = given.iter().map(ToString::to_string).collect();
    // Nothing of TLS is in the image, and nothing of it is needed here.
    let collector = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = collector.local_addr().expect("an address");
    let root = folder.path().join("root");
    for place in [
        "proc",
        "sys",
        "etc/leakmon",
        "run/leakmon",
        "var/log/leakmon",
    ] {
        std::fs::create_dir_all(root.join(place)).expect("a folder");
    }
    install(&root);
    let config = block(&manifest, "leakmon.toml");
    for default in ["interval = \"10s\"", ":9464\""] {
        assert!(config.contains(default), "{config}");
    }
    let config = config.replace("10s", "1s").replace(":9464\"", ":0\"");
    let more = format!(
        "[[rules]]\nexecutable = \"*/of-the-container\"\nwatch = \"blocking\"\n\
         [otlp]\nendpoint = \"http://{endpoint}/v1/metrics\"\nprotocol = \"http\"\ninterval = \"1s\"\n"
    );
    std::fs::write(root.join("etc/leakmon/leakmon.toml"), config + &more).expect("a configuration");
    let token = root.join("run/leakmon/token");
    std::fs::write(&token, "0123456789abcdef").expect("a token");
    std::fs::set_permissions(token, std::fs::Permissions::from_mode(0o600)).expect("its mode");
    let mounts = "mount --bind \"$1\" \"$1\" && mount -t proc proc \"$1/proc\" \
                  && mount -t sysfs -o ro sysfs \"$1/sys\" && mount -t tmpfs tmpfs \"$1/var/log/leakmon\" \
                  && mount -o remount,bind,ro \"$1\" && shift && exec \"$@\"";
    let daemon = Daemon::run(
        folder,
        Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", mounts, "sh"])
            .arg(&root)
            .arg(std::env::current_exe().expect("this program"))
            .args([
                "--exact",
                "enters_the_container",
                "--ignored",
                "--nocapture",
            ])
            .env(ROOT, &root)
            .env(CAPABILITIES, names.join(" ")),
    );
    let pid = daemon.child.pid();
    assert_eq!(privileges(pid), (bits(&given), true));
    let inside = PathBuf::from(format!("/proc/{pid}/root"));
    let written = std::fs::write(inside.join("x"), "").expect_err("it is read-only");
    assert_eq!(written.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    expect_work(
        &daemon,
        &mut target,
        "0123456789abcdef",
        &inside.join("var/log/leakmon"),
    );
    let (mut stream, _) = collector.accept().expect("a connection");
    let mut head = [0; 21];
    stream.read_exact(&mut head).expect("a request");
    assert_eq!(&head, b"POST /v1/metrics HTTP");
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
}

/// Every panel of the dashboard has something to show, by the names that its
/// legend has.
#[test]
fn the_dashboard_shows_data() {
    let Some(server) = real("prometheus") else {
        return;
    };
    let folder = scratch();
    let Some(mut target) = churner(folder.path(), "of-the-dashboard") else {
        return;
    };
    let sum = fixture("sum", "plain").expect("a fixture").path;
    // A leak, a program of 32 bits, which is not read, and tokio.
    let leaks = Owned::spawn(
        Command::new(sum)
            .args(["-load", "20"])
            .stdout(Stdio::null()),
    );
    let senders = all("senders", "386").pop().expect("a fixture").path;
    let _refused = Running::start(&senders);
    let tokio = common::fixtures()
        .expect("fixtures")
        .join("tokio-1.54/release/zoo");
    let _zoo = Running::start(&tokio);
    let rules = "[[rules]]\nexecutable = \"*/of-the-dashboard\"\nwatch = \"blocking\"\n";
    let daemon = Daemon::start("", "", rules);
    let prometheus = Prometheus::start(&server, &daemon.address, "");
    wait_until("the leak is seen", || {
        let list = daemon.json("/processes");
        let all = list["processes"].as_array().expect("processes");
        let leaking = all.iter().find(|process| process["pid"] == leaks.pid());
        leaking.is_some_and(|process| !process["verdict"].is_null())
    });
    let dashboard: Value =
        serde_json::from_str(&shipped("grafana-dashboard.json")).expect("a dashboard in JSON");
    let variables = dashboard["templating"]["list"]
        .as_array()
        .expect("variables");
    // As Grafana does for those of which all are chosen.
    let fill = |text: &str| {
        let mut text = text.replace("$__rate_interval", "4s");
        for variable in variables {
            let name = variable["name"].as_str().expect("a name");
            text = text.replace(&format!("${name}"), ".*");
        }
        assert!(!text.contains('$'), "{text}");
        text
    };
    for variable in variables.iter().filter(|one| one["type"] == "query") {
        let query = fill(variable["query"]["query"].as_str().expect("a query"));
        let inner = query
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'));
        let (series, label) = inner
            .and_then(|inner| inner.rsplit_once(", "))
            .expect("two parts");
        wait_until("the variable has values", || {
            let found = prometheus.query(series);
            found.iter().any(|one| one["metric"][label].is_string())
        });
    }
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut ids = std::collections::BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64()), "ids are unique: {panel}");
        for asked in panel["targets"].as_array().expect("targets") {
            let expression = fill(asked["expr"].as_str().expect("an expression"));
            let mut found = Vec::new();
            wait_until(&format!("there is something by {expression}"), || {
                target.ask("waits 1 5");
                found = prometheus.query(&expression);
                let number = |one: &Value| one["value"][1].as_str().is_some_and(|n| n != "NaN");
                found.retain(number);
                !found.is_empty()
            });
            let legend = asked["legendFormat"].as_str().expect("a legend");
            for part in legend.split("{{").skip(1) {
                let label = part.split("}}").next().expect("a label").trim();
                let has = |one: &Value| one["metric"][label].is_string();
                assert!(found.iter().all(has), "{label} of {legend}: {found:?}");
            }
        }
    }
}
