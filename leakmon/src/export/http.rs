//! The HTTP server: figures, lists and stacks, for processes that have no such
//! endpoint.
//!
//! It is read-only, and whoever asks cannot make leakmon work without bounds:
//! connections, their time, the size of a request ([`connection`](super::connection)),
//! the dumps that are taken at once and the memory of answers are limited.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use bytes::Bytes;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;
use subtle::ConstantTimeEq as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::otlp::Sendings;
use super::{families, prometheus};
use crate::config::{Http, MAX_TOKEN};
use crate::process::identity::Process;
use crate::report::stacks::Format;
use crate::report::{json, overview};
use crate::runtime::{Cache, Kind};
use crate::watch::KernelSide;
use crate::watch::dump::{DumpError, Dumped};
use crate::watch::system::{ProcessSnapshot, Snapshot};

/// How old a reading may be beyond ten intervals: one of many processes, or of a
/// large one, takes its time.
const STALE: Duration = Duration::from_secs(60);

/// Dumps that are taken at once.
const DUMPS: usize = 2;

/// Most bytes of all answers that are being written or sent. One dump of a million
/// goroutines has some 500 MB: it is taken with `leakmon stacks`.
const MAX_ANSWERS: usize = 192 << 20;

/// What an answer takes of them at once, at least.
const STEP: usize = 64 << 10;

/// What all requests share.
pub struct Shared {
    /// What was read last; `None` before the first time.
    pub snapshot: watch::Receiver<Option<Arc<Snapshot>>>,
    /// What tells the registers of threads.
    pub kernel: Arc<KernelSide>,
    /// What was found in programs.
    pub cache: Arc<Cache>,
    /// Sites of a process that have series of their own.
    pub top_sites: usize,
    /// Whether stacks are given out.
    pub stacks: bool,
    /// What became of what was sent by OTLP; `None`: nothing is.
    pub sendings: Option<Arc<Sendings>>,
    token: Option<Vec<u8>>,
    /// Only names of this machine are answered to: it listens on loopback, and a
    /// page out of the web must not reach it by a name of its own.
    local: bool,
    dumps: Arc<Semaphore>,
    /// Bytes that answers may still take, in [`STEP`]s.
    answers: Arc<Semaphore>,
    /// A reading that is older says that nobody reads any more.
    stale_after: Duration,
    started: Instant,
}

impl Shared {
    /// As `config` says.
    ///
    /// # Errors
    /// The token cannot be read, or others can read it.
    pub fn new(
        config: &Http,
        interval: Duration,
        top_sites: usize,
        snapshot: watch::Receiver<Option<Arc<Snapshot>>>,
        kernel: Arc<KernelSide>,
        cache: Arc<Cache>,
        sendings: Option<Arc<Sendings>>,
    ) -> io::Result<Shared> {
        let token = config.token_file.as_deref().map(read_token).transpose()?;
        Ok(Shared {
            snapshot,
            kernel,
            cache,
            top_sites,
            stacks: config.stacks,
            sendings,
            token,
            local: config.listen.ip().to_canonical().is_loopback(),
            dumps: Arc::new(Semaphore::new(DUMPS)),
            answers: Arc::new(Semaphore::new(MAX_ANSWERS / STEP)),
            stale_after: STALE + interval * 10,
            started: Instant::now(),
        })
    }

    fn latest(&self) -> Result<Arc<Snapshot>, Refused> {
        let latest = self.snapshot.borrow().clone();
        latest.ok_or(Refused(
            StatusCode::SERVICE_UNAVAILABLE,
            "nothing has been read yet".to_owned(),
        ))
    }
}

/// A token of a file that nobody else can read.
fn read_token(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    use std::os::unix::fs::MetadataExt as _;
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let file = std::fs::File::open(path).map_err(named)?;
    let mode = file.metadata().map_err(named)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(invalid(format!(
            "{}: others can read it (mode {mode:04o}): chmod 0600",
            path.display()
        )));
    }
    let mut token = Vec::new();
    file.take(MAX_TOKEN + 1)
        .read_to_end(&mut token)
        .map_err(named)?;
    let token = token.trim_ascii();
    if token.len() < 16 || token.len() as u64 > MAX_TOKEN {
        let path = path.display();
        return Err(invalid(format!(
            "{path}: a token has 16 to {MAX_TOKEN} bytes"
        )));
    }
    Ok(token.to_vec())
}

/// Certificate and key, as `config` names them; `None`: no TLS.
///
/// # Errors
/// They cannot be read, or do not fit.
pub fn tls(config: &Http) -> io::Result<Option<TlsAcceptor>> {
    let (Some(certificate), Some(key)) = (&config.certificate, &config.key) else {
        return Ok(None);
    };
    let pem = |path: &Path, error: &dyn std::fmt::Display| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: {error}", path.display()),
        )
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| pem(certificate, &error))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| pem(key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| pem(certificate, &error))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| pem(certificate, &error))?;
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// What answers requests, each within `request_time`.
pub fn router(shared: Arc<Shared>, request_time: Duration) -> Router {
    Router::new()
        .route("/", get(front))
        .route("/page.js", get(|| part("text/javascript", SCRIPT)))
        .route("/page.css", get(|| part("text/css", STYLE)))
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/processes", get(processes))
        .route("/processes/{pid}", get(process))
        .route("/processes/{pid}/count", get(count))
        .route("/processes/{pid}/past", get(past))
        .route("/processes/{pid}/stacks", get(stacks))
        .route("/processes/{pid}/sites/{site}", get(site))
        .layer(middleware::from_fn_with_state(
            (Arc::clone(&shared), request_time),
            guard,
        ))
        .with_state(shared)
}

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/page.js");
const STYLE: &str = include_str!("page/page.css");

/// The page, which asks for the token where one is needed.
async fn front(State(shared): State<Arc<Shared>>) -> Response {
    let page = match shared.token {
        Some(_) => PAGE.replacen(ASKS, "<form id=\"token\">", 1),
        None => PAGE.to_owned(),
    };
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response()
}

/// What the page asks for a token with, as it is where none is needed.
const ASKS: &str = "<form id=\"token\" hidden>";

async fn part(kind: &'static str, text: &'static str) -> Response {
    let kind = format!("{kind}; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// What is not answered, and why.
struct Refused(StatusCode, String);

impl axum::response::IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Refused(status, mut why) = self;
        why.push('\n');
        let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
        (status, kind, why).into_response()
    }
}

/// Paths that everybody may ask for: they say nothing of any process.
fn is_open(path: &str) -> bool {
    matches!(
        path,
        "/" | "/page.js" | "/page.css" | "/healthz" | "/readyz"
    )
}

/// Turns away what no handler should see, and marks every answer.
async fn guard(
    State((shared, request_time)): State<(Arc<Shared>, Duration)>,
    request: Request,
    next: Next,
) -> Response {
    let mut response = match refusal(&shared, &request) {
        Some(refused) => refused.into_response(),
        None => match tokio::time::timeout(request_time, next.run(request)).await {
            Ok(response) => response,
            Err(_) => {
                Refused(StatusCode::GATEWAY_TIMEOUT, "it took too long".to_owned()).into_response()
            }
        },
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn refusal(shared: &Shared, request: &Request) -> Option<Refused> {
    let refused = |status, why: &str| Some(Refused(status, why.to_owned()));
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return refused(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET and HEAD are answered",
        );
    }
    let headers = request.headers();
    let has_body = headers.contains_key(header::TRANSFER_ENCODING)
        || headers
            .get(header::CONTENT_LENGTH)
            .is_some_and(|length| length != "0");
    if has_body {
        return refused(StatusCode::PAYLOAD_TOO_LARGE, "requests have no body here");
    }
    if shared.local && !names_this_machine(headers) {
        return refused(
            StatusCode::MISDIRECTED_REQUEST,
            "this server answers on loopback only, to localhost or an address",
        );
    }
    if let Some(token) = &shared.token
        && !is_open(request.uri().path())
        && !bears(headers, token)
    {
        return refused(StatusCode::UNAUTHORIZED, "a bearer token is needed");
    }
    None
}

/// Whether the request was sent to an address or to `localhost`, not to a name
/// that somebody else can let point here.
fn names_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else {
        // HTTP/1.0, which no browser speaks.
        return true;
    };
    let Ok(host) = host.to_str() else {
        return false;
    };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    name.is_some_and(|name| {
        name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
    })
}

fn bears(headers: &HeaderMap, token: &[u8]) -> bool {
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    given.is_some_and(|given| given.ct_eq(token).into())
}

/// Whether processes are still being read.
async fn healthy(State(shared): State<Arc<Shared>>) -> Result<&'static str, Refused> {
    let since = match &*shared.snapshot.borrow() {
        Some(snapshot) => snapshot.taken.elapsed(),
        None => shared.started.elapsed(),
    };
    match since <= shared.stale_after {
        true => Ok("ok\n"),
        false => Err(Refused(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("nothing has been read for {} s", since.as_secs()),
        )),
    }
}

async fn ready(State(shared): State<Arc<Shared>>) -> Result<&'static str, Refused> {
    shared.latest().map(|_| "ready\n")
}

async fn metrics(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    let snapshot = shared.latest()?;
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    let format = prometheus::Format::wanted(accept.unwrap_or(""));
    let families = families::of(&snapshot, shared.top_sites, shared.sendings.as_deref());
    let mut answer = Answer::new(&shared);
    prometheus::write(families, format, &mut answer).map_err(|_| too_much())?;
    Ok(answer.respond(format.content_type()))
}

fn json_of(
    shared: &Shared,
    write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
) -> Result<Response, Refused> {
    let mut answer = Answer::new(shared);
    // Nothing else goes wrong when memory is written to.
    write(&mut answer).map_err(|_| too_much())?;
    Ok(answer.respond("application/json"))
}

fn too_much() -> Refused {
    let why = "as much as may be at once is being sent: ask again, or take less";
    Refused(StatusCode::SERVICE_UNAVAILABLE, why.to_owned())
}

/// An answer while it is written and until it has been sent: what it takes of the
/// memory of all.
struct Answer {
    bytes: Vec<u8>,
    answers: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
}

impl Answer {
    fn new(shared: &Shared) -> Answer {
        Answer {
            bytes: Vec::new(),
            answers: Arc::clone(&shared.answers),
            taken: None,
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Option<()> {
        let room = self.bytes.capacity() - self.bytes.len();
        if room < bytes.len() {
            // More at once than is needed, so that large ones are not moved often.
            let more = (bytes.len() - room).max(self.bytes.capacity() / 4);
            let steps = more.div_ceil(STEP);
            let permits = u32::try_from(steps).ok()?;
            let permit = Arc::clone(&self.answers).try_acquire_many_owned(permits);
            let permit = permit.ok()?;
            match &mut self.taken {
                Some(taken) => taken.merge(permit),
                None => self.taken = Some(permit),
            }
            self.bytes.reserve_exact(room + steps * STEP);
        }
        self.bytes.extend_from_slice(bytes);
        Some(())
    }

    fn respond(self, kind: &'static str) -> Response {
        // The bytes go when the last of them has been sent, and with them what they
        // took.
        let body = Body::from(Bytes::from_owner(self));
        ([(header::CONTENT_TYPE, kind)], body).into_response()
    }
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl io::Write for Answer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.push(bytes) {
            Some(()) => Ok(bytes.len()),
            None => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Write for Answer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes()).ok_or(fmt::Error)
    }
}

async fn processes(State(shared): State<Arc<Shared>>) -> Result<Response, Refused> {
    let snapshot = shared.latest()?;
    json_of(&shared, |out| {
        overview::write_json(&snapshot.overview(), usize::MAX, out)
    })
}

/// The process of a request.
fn find<'a>(snapshot: &'a Snapshot, pid: &str) -> Result<&'a ProcessSnapshot, Refused> {
    let found = pid.parse().ok().and_then(|pid: u32| {
        snapshot
            .processes
            .iter()
            .find(|process| process.row.pid == pid)
    });
    found.ok_or_else(|| {
        Refused(
            StatusCode::NOT_FOUND,
            "no such process is watched".to_owned(),
        )
    })
}

async fn process(
    State(shared): State<Arc<Shared>>,
    UrlPath(pid): UrlPath<String>,
) -> Result<Response, Refused> {
    let snapshot = shared.latest()?;
    let process = find(&snapshot, &pid)?;
    match &process.report {
        Some(report) => json_of(&shared, |out| json::write(report, None, out)),
        None => Err(unread(process)),
    }
}

fn unread(process: &ProcessSnapshot) -> Refused {
    let why = process.row.not_read.as_deref();
    let why = why.unwrap_or("it has no tasks but its threads");
    Refused(StatusCode::NOT_FOUND, why.to_owned())
}

/// Goroutines, or else tokio's tasks, or else threads: a number.
async fn count(
    State(shared): State<Arc<Shared>>,
    UrlPath(pid): UrlPath<String>,
) -> Result<String, Refused> {
    let snapshot = shared.latest()?;
    let process = find(&snapshot, &pid)?;
    let runtimes = process.report.iter().flat_map(|report| &report.runtimes);
    let mut counts = runtimes.filter_map(|runtime| Some(runtime.tasks.as_ref().ok()?.count));
    let count = match (counts.next(), &process.row.not_read) {
        (Some(count), _) => count,
        (None, None) => process.row.threads,
        (None, Some(_)) => return Err(unread(process)),
    };
    Ok(format!("{count}\n"))
}

/// What lived over the last hour.
async fn past(
    State(shared): State<Arc<Shared>>,
    UrlPath(pid): UrlPath<String>,
) -> Result<Response, Refused> {
    #[derive(serde::Serialize)]
    struct Point {
        time_unix_seconds: f64,
        threads: u64,
        tasks: u64,
    }
    let snapshot = shared.latest()?;
    let process = find(&snapshot, &pid)?;
    let points: Vec<Point> = process
        .past
        .iter()
        .map(|past| Point {
            time_unix_seconds: past
                .at
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs_f64(),
            threads: past.threads,
            tasks: past.tasks,
        })
        .collect();
    json_of(&shared, |out| Ok(serde_json::to_writer(out, &points)?))
}

/// A site by its id: everything that its report has.
async fn site(
    State(shared): State<Arc<Shared>>,
    UrlPath((pid, site)): UrlPath<(String, String)>,
) -> Result<Response, Refused> {
    let snapshot = shared.latest()?;
    let process = find(&snapshot, &pid)?;
    let report = process.report.as_ref().ok_or_else(|| unread(process))?;
    let mut found = false;
    let answer = json_of(&shared, |out| {
        found = json::write_site(report, &site, out)?;
        Ok(())
    })?;
    match found {
        true => Ok(answer),
        false => Err(Refused(StatusCode::NOT_FOUND, "no such site".to_owned())),
    }
}

/// What `/processes/PID/stacks` takes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct StacksQuery {
    format: Option<String>,
    runtime: Option<String>,
}

async fn stacks(
    State(shared): State<Arc<Shared>>,
    UrlPath(pid): UrlPath<String>,
    query: Result<Query<StacksQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Refused> {
    let bad = |why: String| Refused(StatusCode::BAD_REQUEST, why);
    let Query(query) = query.map_err(|error| bad(error.body_text()))?;
    if !shared.stacks {
        let why = "stacks are switched off: http.stacks in the configuration";
        return Err(Refused(StatusCode::FORBIDDEN, why.to_owned()));
    }
    let format = query.format.as_deref().unwrap_or("debug2");
    let (format, kind) = match format {
        "debug2" => (Format::Debug2, "text/plain; charset=utf-8"),
        "debug1" => (Format::Debug1, "text/plain; charset=utf-8"),
        "json" => (Format::Json, "application/jsonl"),
        "folded" => (Format::Folded, "text/plain; charset=utf-8"),
        "pprof" => (Format::Pprof, "application/octet-stream"),
        other => return Err(bad(format!("there is no format {other:?}"))),
    };
    let runtime = match query.runtime.as_deref() {
        None => None,
        Some(name) => {
            let found = Kind::named(name);
            Some(found.ok_or_else(|| bad(format!("there is no runtime {name:?}")))?)
        }
    };
    let (pid, start_time) = {
        let snapshot = shared.latest()?;
        let process = find(&snapshot, &pid)?;
        (process.row.pid, process.row.start_time)
    };
    let Ok(permit) = Arc::clone(&shared.dumps).try_acquire_owned() else {
        let why = "as many dumps as are taken at once are being taken: ask again";
        return Err(Refused(StatusCode::SERVICE_UNAVAILABLE, why.to_owned()));
    };
    let reader = Arc::clone(&shared);
    let read = tokio::task::spawn_blocking(move || {
        // Whoever asked may be gone: the place is taken until this ends.
        let _permit = permit;
        let conflict = |why: String| Refused(StatusCode::CONFLICT, why);
        let process = Process::open(pid).map_err(|error| conflict(error.to_string()))?;
        if process.identity.start_time != start_time {
            return Err(conflict(format!("pid {pid}: is another process now")));
        }
        let kernel = Arc::clone(&reader.kernel);
        let failed =
            |error: DumpError| conflict(format!("{}: {error}", process.identity.describe()));
        let dumped = Dumped::read(&process, runtime, kernel, &reader.cache).map_err(failed)?;
        let mut answer = Answer::new(&reader);
        let written = dumped.write(format, &mut answer);
        written.map_err(|error| match error.kind() {
            io::ErrorKind::OutOfMemory => {
                let why = "too large for what may be sent at once: take it with `leakmon stacks`";
                Refused(StatusCode::SERVICE_UNAVAILABLE, why.to_owned())
            }
            _ => conflict(error.to_string()),
        })?;
        Ok(answer)
    });
    match read.await {
        Ok(answer) => Ok(answer?.respond(kind)),
        Err(_) => Err(Refused(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the dump failed by an error of leakmon's own".to_owned(),
        )),
    }
}
