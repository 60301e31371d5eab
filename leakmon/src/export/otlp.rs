//! OpenTelemetry's protocol: what `/metrics` has, each process as a resource of
//! its own, sent to a collector.
//!
//! opentelemetry-otlp's exporter has one resource for everything that it sends
//! and nothing that keeps what was not taken. So its messages are made here and
//! carried by the libraries beneath it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
    ResourceMetrics, ScopeMetrics, Sum, metric, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message as _;
use tokio::sync::watch;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use super::families::{self, Family, Kind, Point, Value, bounded};
use crate::config::{Otlp, Protocol};
use crate::watch::system::{ProcessSnapshot, Snapshot};

/// How long a collector may take for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// First wait after a failure; each one after it is twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// Most bytes of an answer.
const MAX_ANSWER: usize = 1 << 20;

/// What became of what was to be sent.
#[derive(Debug, Default)]
pub struct Sendings {
    /// Taken by the collector.
    pub sent: AtomicU64,
    /// Not sent, because the queue was full or the collector refused it for good.
    pub dropped: AtomicU64,
    /// Waiting.
    pub queued: AtomicU64,
}

/// Sends what is read, every interval, until nothing is read any more; then what
/// is left, once.
pub async fn send(
    config: Otlp,
    top_sites: usize,
    mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    sendings: Arc<Sendings>,
) {
    let mut collector = match Collector::new(&config) {
        Ok(collector) => collector,
        Err(error) => {
            tracing::error!("OTLP to {}: {error}", config.endpoint);
            return;
        }
    };
    let mut queue: VecDeque<ExportMetricsServiceRequest> = VecDeque::new();
    let mut last: Option<Arc<Snapshot>> = None;
    let mut ticks = tokio::time::interval(config.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut retry = FIRST_RETRY;
    let mut failing = false;
    loop {
        let mut over = false;
        let wait = match failing {
            true => retry,
            // Nothing is left to send.
            false => Duration::from_secs(3600),
        };
        tokio::select! {
            _ = ticks.tick() => {
                let latest = snapshots.borrow_and_update().clone();
                // What was sent is not sent again as if it were new.
                let is_new = |snapshot: &Arc<Snapshot>| {
                    last.as_ref().is_none_or(|last| !Arc::ptr_eq(last, snapshot))
                };
                if let Some(snapshot) = latest.filter(is_new) {
                    if queue.len() >= config.queue {
                        queue.pop_front();
                        sendings.dropped.fetch_add(1, Ordering::Relaxed);
                    }
                    let families = families::of(&snapshot, top_sites, Some(&sendings));
                    queue.push_back(request(&snapshot, families));
                    last = Some(snapshot);
                }
            }
            () = tokio::time::sleep(wait) => {}
            // Whoever reads has ended.
            () = closed(&mut snapshots) => over = true,
        }
        while let Some(first) = queue.front() {
            match collector.export(first).await {
                Ok(()) => {
                    sendings.sent.fetch_add(1, Ordering::Relaxed);
                    queue.pop_front();
                    if std::mem::take(&mut failing) {
                        tracing::info!("OTLP to {}: taken again", config.endpoint);
                    }
                    retry = FIRST_RETRY;
                }
                Err(Failed::ForGood(why)) => {
                    tracing::error!("OTLP to {}: refused: {why}", config.endpoint);
                    sendings.dropped.fetch_add(1, Ordering::Relaxed);
                    queue.pop_front();
                }
                Err(Failed::ForNow(why)) => {
                    if !failing {
                        tracing::warn!("OTLP to {}: {why}", config.endpoint);
                    }
                    retry = match failing {
                        true => (retry * 2).min(LONGEST_RETRY),
                        false => FIRST_RETRY,
                    };
                    failing = true;
                    break;
                }
            }
        }
        sendings.queued.store(queue.len() as u64, Ordering::Relaxed);
        if over {
            return;
        }
    }
}

/// Waits until nothing will be read any more.
async fn closed(snapshots: &mut watch::Receiver<Option<Arc<Snapshot>>>) {
    while snapshots.changed().await.is_ok() {}
}

/// Why something was not taken.
enum Failed {
    /// It may be, later.
    ForNow(String),
    /// It never will.
    ForGood(String),
}

enum Collector {
    Grpc(MetricsServiceClient<Channel>),
    Http {
        client: Client<HttpsConnector<HttpConnector>, Full<bytes::Bytes>>,
        endpoint: hyper::Uri,
    },
}

impl Collector {
    fn new(config: &Otlp) -> Result<Collector, String> {
        match config.protocol {
            Protocol::Grpc => {
                let mut endpoint = Endpoint::from_shared(config.endpoint.clone())
                    .map_err(|error| error.to_string())?
                    .timeout(TIMEOUT)
                    .connect_timeout(TIMEOUT);
                if config.endpoint.starts_with("https://") {
                    endpoint = endpoint
                        .tls_config(ClientTlsConfig::new().with_native_roots())
                        .map_err(|error| error.to_string())?;
                }
                Ok(Collector::Grpc(MetricsServiceClient::new(
                    endpoint.connect_lazy(),
                )))
            }
            Protocol::Http => {
                let provider = rustls::crypto::ring::default_provider();
                let builder = HttpsConnectorBuilder::new();
                // A container that holds nothing but leakmon has no certificates, and
                // needs none without TLS.
                let builder = match config.endpoint.starts_with("https://") {
                    true => builder
                        .with_provider_and_native_roots(provider)
                        .map_err(|error| error.to_string())?,
                    false => {
                        let config =
                            rustls::ClientConfig::builder_with_provider(Arc::new(provider))
                                .with_safe_default_protocol_versions()
                                .map_err(|error| error.to_string())?
                                .with_root_certificates(rustls::RootCertStore::empty())
                                .with_no_client_auth();
                        builder.with_tls_config(config)
                    }
                };
                let connector = builder.https_or_http().enable_http1().build();
                Ok(Collector::Http {
                    client: Client::builder(TokioExecutor::new()).build(connector),
                    endpoint: config
                        .endpoint
                        .parse()
                        .map_err(|error| format!("no URL: {error}"))?,
                })
            }
        }
    }

    async fn export(&mut self, request: &ExportMetricsServiceRequest) -> Result<(), Failed> {
        let answer = match self {
            Collector::Grpc(client) => {
                let answered = client.export(request.clone()).await;
                answered.map_err(|status| of_status(&status))?.into_inner()
            }
            Collector::Http { client, endpoint } => {
                let posted = post(client, endpoint, request);
                let answered = tokio::time::timeout(TIMEOUT, posted).await;
                answered.map_err(|_| Failed::ForNow("no answer in time".to_owned()))??
            }
        };
        if let Some(partial) = answer.partial_success
            && partial.rejected_data_points > 0
        {
            tracing::warn!(
                "OTLP: {} points were rejected: {}",
                partial.rejected_data_points,
                partial.error_message
            );
        }
        Ok(())
    }
}

/// Which failures pass: OTLP specification, "Failures" of OTLP/gRPC.
fn of_status(status: &tonic::Status) -> Failed {
    use tonic::Code;
    let why = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::ResourceExhausted
        // What a connection that breaks looks like.
        | Code::Unknown
        | Code::Internal => Failed::ForNow(why),
        _ => Failed::ForGood(why),
    }
}

async fn post(
    client: &Client<HttpsConnector<HttpConnector>, Full<bytes::Bytes>>,
    endpoint: &hyper::Uri,
    request: &ExportMetricsServiceRequest,
) -> Result<ExportMetricsServiceResponse, Failed> {
    let body = Full::new(bytes::Bytes::from(request.encode_to_vec()));
    let kind = HeaderValue::from_static("application/x-protobuf");
    let posted = hyper::Request::post(endpoint)
        .header(CONTENT_TYPE, kind)
        .body(body)
        .map_err(|error| Failed::ForGood(error.to_string()))?;
    let answer = client
        .request(posted)
        .await
        .map_err(|error| Failed::ForNow(error.to_string()))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    let body = body
        .map_err(|error| Failed::ForNow(error.to_string()))?
        .to_bytes();
    match status.as_u16() {
        200..=299 => Ok(ExportMetricsServiceResponse::decode(body).unwrap_or_default()),
        // OTLP specification, "Retryable Response Codes".
        429 | 502 | 503 | 504 => Err(Failed::ForNow(status.to_string())),
        _ => Err(Failed::ForGood(status.to_string())),
    }
}

/// Everything that is known, as one message.
pub fn request(snapshot: &Snapshot, families: Vec<Family>) -> ExportMetricsServiceRequest {
    let now = nanos(snapshot.at);
    let mut by_process: BTreeMap<Option<usize>, Vec<Metric>> = BTreeMap::new();
    for family in families {
        let mut points: BTreeMap<Option<usize>, Vec<&Point>> = BTreeMap::new();
        for point in &family.points {
            points.entry(point.process).or_default().push(point);
        }
        for (process, points) in points {
            let watched = process.and_then(|index| snapshot.processes.get(index));
            let since = watched.map_or(snapshot.started_at, |watched| watched.counted_since);
            let start = nanos(since);
            let metric = metric(&family, &points, start, now);
            by_process.entry(process).or_default().push(metric);
        }
    }
    let host = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok());
    let scope = InstrumentationScope {
        name: "leakmon".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let resources = by_process.into_iter().map(|(process, metrics)| {
        let process = process.and_then(|index| snapshot.processes.get(index));
        let mut attributes: Vec<KeyValue> =
            host.iter().map(|host| text("host.name", host)).collect();
        match process {
            Some(process) => describe(process, &mut attributes),
            None => attributes.push(text("service.name", "leakmon")),
        }
        ResourceMetrics {
            resource: Some(Resource {
                attributes,
                ..Resource::default()
            }),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(scope.clone()),
                metrics,
                schema_url: String::new(),
            }],
            schema_url: String::new(),
        }
    });
    ExportMetricsServiceRequest {
        resource_metrics: resources.collect(),
    }
}

/// Adds what OpenTelemetry's semantic conventions call the parts of a process, and
/// what it says of itself beyond that.
fn describe(process: &ProcessSnapshot, attributes: &mut Vec<KeyValue>) {
    let row = &process.row;
    attributes.extend([
        int("process.pid", i64::from(row.pid)),
        text("process.executable.name", &bounded(&row.name)),
        text("process.owner", &bounded(&row.user)),
    ]);
    for (key, value) in [
        ("service.name", process.service.as_deref()),
        ("container.id", process.placement.container.as_deref()),
        ("k8s.pod.uid", process.placement.pod.as_deref()),
    ] {
        attributes.extend(value.map(|value| text(key, &bounded(value))));
    }
    for (key, value) in &process.attributes {
        if attributes.iter().all(|known| known.key != *key) {
            attributes.push(text(key, &bounded(value)));
        }
    }
}

/// Labels that are attributes of the resource.
const OF_RESOURCE: [&str; 5] = ["pid", "executable", "service", "container", "pod_uid"];

fn metric(family: &Family, points: &[&Point], start: u64, now: u64) -> Metric {
    let labels = |point: &Point| -> Vec<KeyValue> {
        let labels = point.labels.iter();
        labels
            .filter(|(key, _)| point.process.is_none() || !OF_RESOURCE.contains(key))
            .map(|(key, value)| text(key, value))
            .collect()
    };
    let numbers = || {
        let number = |point: &&Point| {
            let value = match &point.value {
                Value::Int(value) => number_data_point::Value::AsInt(*value),
                Value::Float(value) => number_data_point::Value::AsDouble(*value),
                Value::Histogram { .. } => return None,
            };
            Some(NumberDataPoint {
                attributes: labels(point),
                start_time_unix_nano: start,
                time_unix_nano: now,
                value: Some(value),
                ..NumberDataPoint::default()
            })
        };
        points.iter().filter_map(number).collect()
    };
    let cumulative = AggregationTemporality::Cumulative as i32;
    let sum = |is_monotonic| {
        metric::Data::Sum(Sum {
            data_points: numbers(),
            aggregation_temporality: cumulative,
            is_monotonic,
        })
    };
    let data = match family.kind {
        Kind::Counter => sum(true),
        // By the semantic conventions an UpDownCounter.
        Kind::Gauge if family.name.starts_with("leakmon.") => metric::Data::Gauge(Gauge {
            data_points: numbers(),
        }),
        Kind::Gauge => sum(false),
        Kind::Histogram => metric::Data::Histogram(Histogram {
            data_points: points
                .iter()
                .filter_map(|point| histogram(point, labels(point), start, now))
                .collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: family.name.to_owned(),
        description: family.help.to_owned(),
        unit: family.unit.to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

fn histogram(
    point: &Point,
    attributes: Vec<KeyValue>,
    start: u64,
    now: u64,
) -> Option<HistogramDataPoint> {
    let Value::Histogram {
        sum,
        count,
        buckets,
    } = &point.value
    else {
        return None;
    };
    let bounds = buckets.iter().map(|(bound, _)| *bound);
    Some(HistogramDataPoint {
        attributes,
        start_time_unix_nano: start,
        time_unix_nano: now,
        count: *count,
        sum: Some(*sum),
        bucket_counts: buckets.iter().map(|(_, count)| *count).collect(),
        explicit_bounds: bounds.filter(|bound| bound.is_finite()).collect(),
        ..HistogramDataPoint::default()
    })
}

fn text(key: &str, value: &str) -> KeyValue {
    key_value(key, any_value::Value::StringValue(value.to_owned()))
}

fn int(key: &str, value: i64) -> KeyValue {
    key_value(key, any_value::Value::IntValue(value))
}

fn key_value(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

fn nanos(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
