//! What `leakmon daemon` sends by OTLP, as a real OpenTelemetry Collector takes it.
//!
//! The Collector hands on what it has taken, in OTLP's JSON, to a server of the
//! test's own.
//!
//! Needs root, the fixtures and the Collector (see `common`).

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::{Owned, Running, fixture, real, run, scratch, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

/// An address that nobody listens at.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

/// Takes what a Collector hands on.
struct Sink {
    address: SocketAddr,
    messages: Arc<Mutex<Vec<Value>>>,
}

impl Sink {
    fn start() -> Sink {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let messages = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&messages);
        // It ends with the test.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let all = Arc::clone(&all);
                std::thread::spawn(move || while take(&stream, &all).is_some() {});
            }
        });
        Sink { address, messages }
    }

    fn messages(&self) -> Vec<Value> {
        self.messages.lock().expect("the messages").clone()
    }
}

/// One request; `None` when the connection is over.
fn take(stream: &TcpStream, all: &Mutex<Vec<Value>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut len = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        let length = line.strip_prefix("content-length: ");
        len = length.and_then(|len| len.parse().ok()).unwrap_or(len);
    }
    let mut body = vec![0; len];
    reader.read_exact(&mut body).ok()?;
    let message = serde_json::from_slice(&body).expect("JSON from the Collector");
    all.lock().expect("the messages").push(message);
    let answer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    reader.into_inner().write_all(answer.as_bytes()).ok()
}

/// A Collector that runs with these configurations, one over the other.
fn collector(program: &Path, configs: &[&Path], listens: SocketAddr) -> Owned {
    let configs = configs
        .iter()
        .map(|path| format!("--config={}", path.display()));
    let child = Owned::spawn(
        Command::new(program)
            .args(configs)
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    );
    wait_until("the Collector listens", || {
        TcpStream::connect(listens).is_ok()
    });
    child
}

/// An exporter to a sink, which says at once what became of it.
fn to_sink(name: &str, sink: &Sink) -> String {
    format!(
        "  {name}:\n    metrics_endpoint: http://{}/\n    encoding: json\n    compression: none\n    \
         sending_queue: {{enabled: false}}\n    retry_on_failure: {{enabled: false}}\n",
        sink.address
    )
}

/// A point as Prometheus has it: name and labels. Buckets are points of their own.
type Key = (String, BTreeMap<String, String>);

#[derive(Debug, Default, PartialEq)]
struct Points {
    values: BTreeMap<Key, f64>,
    /// `gauge`, `counter` or `histogram`, by name.
    kinds: BTreeMap<String, String>,
}

/// The bound of a bucket, however it is written.
fn bound(le: f64) -> String {
    le.to_string()
}

/// What `/metrics` says.
fn of_text(text: &str) -> Points {
    let mut points = Points::default();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a name and a kind");
            points.kinds.insert(name.to_owned(), kind.to_owned());
        }
        if line.starts_with('#') {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let (name, mut rest) = series.split_once('{').unwrap_or((series, ""));
        let mut labels = BTreeMap::new();
        while let Some((key, quoted)) = rest.split_once("=\"") {
            let mut text = String::new();
            let mut chars = quoted.char_indices();
            let end = loop {
                match chars.next().expect("a closing quote") {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next().expect("what is escaped").1 {
                        'n' => text.push('\n'),
                        other => text.push(other),
                    },
                    (_, other) => text.push(other),
                }
            };
            if key == "le" {
                text = bound(text.parse().expect("a bound"));
            }
            labels.insert(key.to_owned(), text);
            rest = quoted[end + 1..].trim_start_matches([',', '}']);
        }
        let value = value.parse().expect("a number");
        let twice = points.values.insert((name.to_owned(), labels), value);
        assert_eq!(twice, None, "{line}");
    }
    points
}

fn attributes(of: &Value) -> BTreeMap<String, String> {
    let attributes = of["attributes"].as_array().into_iter().flatten();
    let pair = |attribute: &Value| {
        let value = &attribute["value"];
        let text = value["stringValue"].as_str().or(value["intValue"].as_str());
        let key = attribute["key"].as_str().expect("a key");
        (key.to_owned(), text.expect("a value").to_owned())
    };
    let pairs: Vec<(String, String)> = attributes.map(pair).collect();
    let len = pairs.len();
    let map: BTreeMap<String, String> = pairs.into_iter().collect();
    assert_eq!(map.len(), len, "keys are unique: {of}");
    map
}

/// 64-bit integers are strings in OTLP's JSON.
fn integer(value: &Value) -> u64 {
    let text = value.as_str().unwrap_or_else(|| panic!("{value}"));
    text.parse().expect("a number")
}

/// What a message says, in Prometheus's words as docs/metrics.md has them.
fn of_message(message: &Value) -> Points {
    const LABELS: [(&str, &str); 5] = [
        ("process.pid", "pid"),
        ("process.executable.name", "executable"),
        ("service.name", "service"),
        ("container.id", "container"),
        ("k8s.pod.uid", "pod_uid"),
    ];
    let mut points = Points::default();
    for resource in message["resourceMetrics"].as_array().expect("resources") {
        let about = attributes(&resource["resource"]);
        let mut base = BTreeMap::new();
        if about.contains_key("process.pid") {
            for (attribute, label) in LABELS {
                if let Some(value) = about.get(attribute) {
                    base.insert(label.to_owned(), value.clone());
                }
            }
        } else {
            assert_eq!(about["service.name"], "leakmon");
        }
        let scope = &resource["scopeMetrics"][0];
        assert_eq!(scope["scope"]["name"], "leakmon");
        for metric in scope["metrics"].as_array().expect("metrics") {
            add_metric(&mut points, &base, metric);
        }
    }
    points
}

fn add_metric(points: &mut Points, base: &BTreeMap<String, String>, metric: &Value) {
    // Protocol's AGGREGATION_TEMPORALITY_CUMULATIVE.
    const CUMULATIVE: u64 = 2;
    let name = metric["name"].as_str().expect("a name").replace('.', "_");
    let unit = match metric["unit"].as_str().expect("a unit") {
        "s" => "_seconds",
        "By" => "_bytes",
        "1" => "_ratio",
        _ => "",
    };
    let (kind, data, end) = if metric["gauge"].is_object() {
        ("gauge", &metric["gauge"], "")
    } else if metric["sum"].is_object() {
        let sum = &metric["sum"];
        assert_eq!(sum["aggregationTemporality"], CUMULATIVE, "{name}");
        match sum["isMonotonic"].as_bool() {
            Some(true) => ("counter", sum, "_total"),
            _ => ("gauge", sum, ""),
        }
    } else {
        let histogram = &metric["histogram"];
        assert_eq!(histogram["aggregationTemporality"], CUMULATIVE, "{name}");
        ("histogram", histogram, "")
    };
    let name = format!("{name}{unit}{end}");
    points.kinds.insert(name.clone(), kind.to_owned());
    for point in data["dataPoints"].as_array().expect("points") {
        let start = integer(&point["startTimeUnixNano"]);
        assert!(0 < start && start <= integer(&point["timeUnixNano"]));
        let mut labels = base.clone();
        labels.extend(attributes(point));
        let mut add = |name: String, labels: BTreeMap<String, String>, value: f64| {
            let twice = points.values.insert((name, labels), value);
            assert_eq!(twice, None, "{point}");
        };
        if kind != "histogram" {
            let value = match point["asDouble"].as_f64() {
                Some(value) => value,
                None => point["asInt"]
                    .as_str()
                    .map_or_else(|| panic!("{point}"), |text| text.parse().expect("a number")),
            };
            add(name.clone(), labels, value);
            continue;
        }
        let bounds = point["explicitBounds"].as_array().expect("bounds");
        let bounds = bounds.iter().map(|bound| bound.as_f64().expect("a bound"));
        let counts = point["bucketCounts"].as_array().expect("counts");
        assert_eq!(counts.len(), bounds.len() + 1);
        let mut so_far = 0;
        for (le, count) in bounds.chain([f64::INFINITY]).zip(counts) {
            so_far += integer(count);
            let mut labels = labels.clone();
            labels.insert("le".to_owned(), bound(le));
            add(format!("{name}_bucket"), labels, so_far as f64);
        }
        assert_eq!(so_far, integer(&point["count"]));
        add(format!("{name}_count"), labels.clone(), so_far as f64);
        let sum = point["sum"].as_f64().expect("a sum");
        add(format!("{name}_sum"), labels, sum);
    }
}

/// What is not of the reading, but of the moment at which it is asked for: taken out.
fn of_the_moment(points: &mut Points) -> BTreeMap<Key, f64> {
    let is_of_it = |(name, _): &Key, _: &mut f64| {
        name.starts_with("leakmon_otlp_") || name == "leakmon_census_age_seconds"
    };
    points.values.extract_if(.., is_of_it).collect()
}

/// Values, names, labels and kinds are those of `/metrics`, by gRPC and by HTTP;
/// and through the shipped configuration Prometheus reads them by the same names.
#[test]
fn a_real_collector_is_told_what_prometheus_reads() {
    let Some(program) = real("otelcol") else {
        return;
    };
    let (Some(churner), Some(zoo)) = (fixture("churner", "plain"), fixture("zoo", "plain")) else {
        return;
    };
    let mut zoo =
        Running::command(Command::new(&zoo.path).env("OTEL_SERVICE_NAME", "é".repeat(1000)));
    let count = zoo.count();
    let folder = scratch();
    let sink = Sink::start();
    let (grpc, http, scraped) = (free_address(), free_address(), free_address());
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/otel-collector.yaml");
    run(Command::new(&program)
        .arg("validate")
        .arg(format!("--config={}", shipped.display())))
    .expect_code(0);
    let mut text = std::fs::read_to_string(shipped).expect("the configuration");
    for (port, address) in [("4317", grpc), ("4318", http), ("9465", scraped)] {
        let of_port = format!("endpoint: 127.0.0.1:{port}\n");
        assert!(text.contains(&of_port));
        text = text.replace(&of_port, &format!("endpoint: {address}\n"));
    }
    let shipped = folder.path().join("shipped.yaml");
    std::fs::write(&shipped, text).expect("a configuration");
    let more = folder.path().join("more.yaml");
    let text = format!(
        "exporters:\n{}service:\n  telemetry: {{metrics: {{level: none}}}}\n  pipelines:\n    metrics/sink:\n      \
         receivers: [otlp]\n      exporters: [otlp_http]\n",
        to_sink("otlp_http", &sink)
    );
    std::fs::write(&more, text).expect("a configuration");
    let _collector = collector(&program, &[&shipped, &more], grpc);
    for (protocol, endpoint) in [
        ("grpc", format!("http://{grpc}")),
        ("http", format!("http://{http}/v1/metrics")),
    ] {
        let mut target = Running::command(
            Command::new(&churner.path)
                .env("OTEL_SERVICE_NAME", "orders")
                .env(
                    "OTEL_RESOURCE_ATTRIBUTES",
                    "team=a%20b,process.pid=1,host.name=x",
                ),
        );
        let pid = target.pid();
        // Between two readings there is time to send one and to ask for it.
        let daemon = Daemon::every(
            "3s",
            "otel_environment = true",
            "",
            &format!(
                "[[rules]]\nexecutable = \"*/churner\"\nwatch = \"blocking\"\n\
                 [otlp]\nendpoint = \"{endpoint}\"\nprotocol = \"{protocol}\"\ninterval = \"1s\"\n"
            ),
        );
        wait_until("probes are attached", || {
            daemon.metric("leakmon_task_spawned_total", pid) == Some(0.0)
        });
        target.ask("waits 10 2");
        target.ask("churn 1000");
        let spawned = ("leakmon_task_spawned_total", 1004.0);
        wait_until("it is counted", || {
            daemon
                .metric(spawned.0, pid)
                .is_some_and(|now| now >= spawned.1)
        });
        let before = sink.messages().len();
        let mut said = (Points::default(), Points::default());
        let until = Instant::now() + common::limit();
        let message = loop {
            let told = sink
                .messages()
                .get(before..)
                .and_then(<[Value]>::last)
                .cloned();
            if let Some(message) = told {
                said = (of_text(&daemon.get("/metrics")), of_message(&message));
                let moments = (of_the_moment(&mut said.0), of_the_moment(&mut said.1));
                if said.0 == said.1 {
                    let keys: (Vec<_>, Vec<_>) =
                        (moments.0.keys().collect(), moments.1.keys().collect());
                    assert_eq!(keys.0, keys.1);
                    break message;
                }
            }
            if Instant::now() > until {
                let (text, told) = &said;
                let keys = text.values.keys().chain(told.values.keys());
                let differ = keys.filter(|key| text.values.get(*key) != told.values.get(*key));
                for key in differ.take(20) {
                    let (text, told) = (text.values.get(key), told.values.get(key));
                    eprintln!("{key:?}: {text:?} by /metrics, {told:?} by OTLP");
                }
                assert_eq!(text.kinds, told.kinds);
                panic!("the values differ");
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let points = said.1;
        let value = |name: &str, more: &[(&str, &str)]| {
            let found = points.values.iter().find(|((known, labels), _)| {
                let of = |key: &str, value: &str| labels.get(key).is_some_and(|is| is == value);
                known == name && of("pid", &pid.to_string()) && more.iter().all(|(k, v)| of(k, v))
            });
            found.map(|(_, value)| *value)
        };
        assert_eq!(
            value("go_goroutine_count", &[]),
            Some(target.count() as f64)
        );
        assert_eq!(value(spawned.0, &[]), Some(spawned.1));
        // All sites together, and the one whose waits the program counts.
        let report = daemon.json(&format!("/processes/{pid}"));
        let mut waits = BTreeMap::new();
        for site in report["runtimes"][0]["sites"].as_array().expect("sites") {
            for wait in site["waits"].as_array().expect("waits") {
                if wait["reason"] == "chan receive" {
                    let count = wait["blocked_durations"]["count"].as_u64();
                    let name = site["entry"]["function"].as_str().expect("a name");
                    waits.insert(name.to_owned(), count.unwrap_or(0));
                }
            }
        }
        assert_eq!(waits["main.receiver"], 20);
        let waited = value(
            "leakmon_task_wait_duration_seconds_count",
            &[("reason", "chan receive")],
        );
        assert_eq!(waited, Some(waits.values().sum::<u64>() as f64));
        // What the semantic conventions call them, and what the process says of itself.
        let resources = message["resourceMetrics"].as_array().expect("resources");
        let of = |pid: u32| {
            let mut all = resources
                .iter()
                .map(|one| (one, attributes(&one["resource"])));
            let found = all.find(|(_, about)| about.get("process.pid") == Some(&pid.to_string()));
            found.unwrap_or_else(|| panic!("no resource of {pid}"))
        };
        let (resource, about) = of(pid);
        let host = nix::unistd::gethostname().expect("a name");
        for (key, wanted) in [
            ("process.executable.name", "churner"),
            ("process.owner", "root"),
            ("service.name", "orders"),
            ("team", "a b"),
            ("host.name", host.to_str().expect("a name")),
        ] {
            assert_eq!(about.get(key).map(String::as_str), Some(wanted), "{key}");
        }
        let metrics = resource["scopeMetrics"][0]["metrics"]
            .as_array()
            .expect("metrics");
        let goroutines = metrics
            .iter()
            .find(|metric| metric["name"] == "go.goroutine.count");
        // An UpDownCounter.
        let goroutines = goroutines.expect("goroutines");
        assert!(goroutines["sum"].is_object() && goroutines["unit"] == "{goroutine}");
        let long = &of(zoo.pid()).1["service.name"];
        assert_eq!(long, &"é".repeat(100));
        // Prometheus, of the shipped configuration.
        let own: BTreeSet<String> = points.kinds.keys().cloned().collect();
        wait_until("Prometheus can read it", || {
            let text = common::Connection::open(&scraped.to_string())
                .expect("a connection")
                .get("/metrics");
            let read = of_text(&text);
            let names: BTreeSet<String> = read.kinds.keys().cloned().collect();
            let found = read.values.iter().find(|((name, labels), _)| {
                name == "go_goroutine_count"
                    && labels.get("process_pid") == Some(&zoo.pid().to_string())
            });
            own.is_subset(&names) && found.is_some_and(|(_, value)| *value == count as f64)
        });
    }
}

/// What leakmon says of its own sendings when it makes this message.
fn dropped_before(message: &Value) -> u64 {
    let points = of_message(message);
    let key = ("leakmon_otlp_dropped_total".to_owned(), BTreeMap::new());
    points.values[&key] as u64
}

/// When this message was made, in nanoseconds.
fn made_at(message: &Value) -> u64 {
    let metrics = &message["resourceMetrics"][0]["scopeMetrics"][0]["metrics"];
    let metric = metrics[0].as_object().expect("a metric");
    let data = ["gauge", "sum", "histogram"].iter();
    let data = data.filter_map(|kind| metric.get(*kind)).next();
    integer(&data.expect("points")["dataPoints"][0]["timeUnixNano"])
}

/// A Collector that is down for a minute: a queue that is long enough loses
/// nothing, a short one keeps the newest, and both go on by themselves.
#[test]
fn a_collector_is_down_for_a_minute() {
    const SHORT: u64 = 3;
    let Some(program) = real("otelcol") else {
        return;
    };
    if common::fixtures().is_none() {
        return;
    }
    let folder = scratch();
    let (grpc, http) = (free_address(), free_address());
    let (long, short) = (Sink::start(), Sink::start());
    let config = folder.path().join("collector.yaml");
    let text = format!(
        "receivers:\n  otlp/grpc: {{protocols: {{grpc: {{endpoint: \"{grpc}\"}}}}}}\n  \
         otlp/http: {{protocols: {{http: {{endpoint: \"{http}\"}}}}}}\n\
         exporters:\n{}{}service:\n  telemetry: {{metrics: {{level: none}}}}\n  pipelines:\n    \
         metrics/grpc: {{receivers: [otlp/grpc], exporters: [otlp_http/long]}}\n    \
         metrics/http: {{receivers: [otlp/http], exporters: [otlp_http/short]}}\n",
        to_sink("otlp_http/long", &long),
        to_sink("otlp_http/short", &short)
    );
    std::fs::write(&config, text).expect("a configuration");
    // Nothing else is watched: what is said of one process is enough.
    let daemon = |endpoint: String, protocol: &str, queue: u64| {
        let rest = format!(
            "[[rules]]\nexecutable = \"*/leakmon\"\nwatch = \"census\"\n[[rules]]\nwatch = \"off\"\n\
             [otlp]\nendpoint = \"{endpoint}\"\nprotocol = \"{protocol}\"\ninterval = \"1s\"\nqueue = {queue}\n"
        );
        Daemon::start("", "", &rest)
    };
    let mut first = collector(&program, &[&config], grpc);
    let over_grpc = daemon(format!("http://{grpc}"), "grpc", 100);
    let over_http = daemon(format!("http://{http}/v1/metrics"), "http", SHORT);
    let number = |sink: &Sink| sink.messages().len();
    wait_until("both are taken", || number(&long) > 2 && number(&short) > 2);
    first.signal(Signal::SIGTERM);
    assert!(first.0.wait().expect("its end").success());
    std::thread::sleep(Duration::from_secs(60));
    let before = (number(&long), number(&short));
    let _second = collector(&program, &[&config], grpc);
    wait_until("both are taken again", || {
        number(&long) > before.0 && number(&short) > before.1
    });
    // What waited, and what came since.
    for (daemon, sink) in [(&over_grpc, &long), (&over_http, &short)] {
        wait_until("nothing waits any more", || {
            let sent = daemon.own_metric("leakmon_otlp_sent_total ");
            daemon.own_metric("leakmon_otlp_queued ") == Some(0.0)
                && sent == Some(number(sink) as f64)
        });
        let times: Vec<u64> = sink.messages().iter().map(made_at).collect();
        assert!(
            times.is_sorted_by(|a, b| a < b),
            "each once, in their order"
        );
    }
    assert_eq!(
        over_grpc.own_metric("leakmon_otlp_dropped_total "),
        Some(0.0)
    );
    let times: Vec<u64> = long.messages().iter().map(made_at).collect();
    let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max();
    assert!(
        longest < Some(10_000_000_000),
        "none of a minute is missing"
    );
    let lost = over_http
        .own_metric("leakmon_otlp_dropped_total ")
        .expect("a number") as u64;
    assert!(lost > 0);
    let told: Vec<u64> = short.messages().iter().map(dropped_before).collect();
    // The last that were dropped made room for those that were kept.
    let mut wanted = vec![0; before.1];
    wanted.extend(lost + 1 - SHORT..=lost);
    wanted.resize(told.len(), lost);
    assert_eq!(told, wanted);
}
