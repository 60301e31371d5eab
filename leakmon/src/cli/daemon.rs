//! `leakmon daemon`: watches the machine for months, and exports what it sees.
//!
//! One thread reads the processes; a runtime with one worker answers requests and
//! hears signals. What was read last is handed from the one to the other whole.

use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use caps::{CapSet, Capability};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch as latest;

use crate::config::{Config, Dumps};
use crate::export::otlp::{self, Sendings};
use crate::export::{connection, http};
use crate::process::identity::Process;
use crate::report::stacks::Format;
use crate::report::{json, overview};
use crate::runtime::{Cache, Kind};
use crate::watch::KernelSide;
use crate::watch::dump::Dumped;
use crate::watch::rules::Depth;
use crate::watch::system::{Options, Snapshot, System};

use super::{DaemonArgs, Exit, Failure};

/// How often the kernel's word of new processes is heard.
const LISTEN_EVERY: Duration = Duration::from_millis(100);

/// How long the end waits for what is detached and flushed.
const FAREWELL: Duration = Duration::from_secs(5);

/// All that is needed once everything is open.
const NEEDED: [Capability; 4] = [
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
];

/// What the main thread tells the one that reads.
enum Order {
    Configuration(Box<Config>),
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure {
        message: error.to_string(),
        exit: Exit::Failure,
    }
}

/// Runs the command.
///
/// # Errors
/// [`Failure`] when the configuration is wrong, or the address is taken.
pub fn run(args: &DaemonArgs) -> Result<Exit, Failure> {
    let wrong = |error: crate::config::ConfigError| Failure {
        message: error.to_string(),
        exit: Exit::Usage,
    };
    let config = match &args.config {
        Some(path) => Config::read(path).map_err(wrong)?,
        None => Config::default(),
    };
    if args.check_config {
        println!("the configuration is good");
        return Ok(Exit::Success);
    }
    super::system::prepare();
    let tls = http::tls(&config.http).map_err(failed)?;
    let address = config.http.listen;
    let listener = std::net::TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|error| {
            failed(format!(
                "listening on {address}: {error}; `listen` in [http] of the configuration says where"
            ))
        })?;
    let bound = listener.local_addr().map_err(failed)?;
    let cache = Arc::new(Cache::default());
    let kernel = Arc::new(KernelSide::new(probes(&config)));
    let (publish, snapshots) = latest::channel(None);
    let sendings = config.otlp.as_ref().map(|_| Arc::new(Sendings::default()));
    let shared = http::Shared::new(
        &config.http,
        config.interval,
        config.top_sites,
        snapshots.clone(),
        Arc::clone(&kernel),
        Arc::clone(&cache),
        sendings.clone(),
    );
    let shared = Arc::new(shared.map_err(failed)?);
    // Before there are other threads, which have capabilities of their own.
    drop_capabilities();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .map_err(failed)?;
    let (orders, received) = mpsc::channel();
    let alive = Arc::new(AtomicBool::new(true));
    let reader = std::thread::spawn({
        let alive = Arc::clone(&alive);
        let config = config.clone();
        let cache = Arc::clone(&cache);
        let kernel = Arc::clone(&kernel);
        move || read(config, kernel, cache, &publish, &received, &alive)
    });
    println!("listening on {bound}");
    let ended = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        let time = config.http.timeout;
        let router = http::router(shared, time);
        let connections = config.http.connections;
        tokio::spawn(connection::serve(listener, tls, connections, time, router));
        let sending = config.otlp.clone().zip(sendings);
        let sender = sending.map(|(otlp, sendings)| {
            let snapshots = snapshots.clone();
            tokio::spawn(otlp::send(otlp, config.top_sites, snapshots, sendings))
        });
        let ended = serve_signals(
            args.config.as_deref(),
            config,
            &orders,
            snapshots,
            &alive,
            &kernel,
            &cache,
        )
        .await;
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        // The reader waits for orders: it ends, and detaches what it has attached,
        // and with it ends who sends what it reads.
        drop(orders);
        if let Some(sender) = sender {
            let _ = tokio::time::timeout(FAREWELL, sender).await;
        }
        ended
    });
    let limit = Instant::now() + FAREWELL;
    while !reader.is_finished() && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(5));
    }
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended
}

/// Whether any rule wants probes.
fn probes(config: &Config) -> bool {
    let depths = config.rules.iter().map(|rule| rule.watch);
    depths.into_iter().any(|depth| depth > Depth::Census)
}

fn options(config: &Config, kernel: &Arc<KernelSide>) -> Options {
    Options {
        rules: config.rules.clone(),
        otherwise: Depth::Census,
        max_overhead: config.max_overhead,
        otel_environment: config.otel_environment,
        all_runtimes: false,
        kernel: Arc::clone(kernel),
    }
}

/// Keeps the least that reading processes and attaching probes takes. Without the
/// right to do so it runs with what it has.
fn drop_capabilities() {
    let wanted: caps::CapsHashSet = NEEDED.into_iter().collect();
    let dropped = (|| {
        let has = caps::read(None, CapSet::Permitted)?;
        let kept: caps::CapsHashSet = has.intersection(&wanted).copied().collect();
        if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
            for capability in caps::read(None, CapSet::Bounding)? {
                if !wanted.contains(&capability) {
                    caps::drop(None, CapSet::Bounding, capability)?;
                }
            }
        }
        caps::clear(None, CapSet::Ambient)?;
        caps::set(None, CapSet::Inheritable, &caps::CapsHashSet::new())?;
        caps::set(None, CapSet::Effective, &kept)?;
        caps::set(None, CapSet::Permitted, &kept)
    })();
    if let Err(error) = dropped {
        tracing::warn!("capabilities that are not needed stay: {error}");
    }
}

/// Reads the machine until nobody gives orders any more.
fn read(
    config: Config,
    kernel: Arc<KernelSide>,
    cache: Arc<Cache>,
    publish: &latest::Sender<Option<Arc<Snapshot>>>,
    orders: &mpsc::Receiver<Order>,
    alive: &AtomicBool,
) {
    kernel.load();
    let mut interval = config.interval;
    let mut system = System::sharing(options(&config, &kernel), cache);
    let mut events = None;
    let mut listening = false;
    let started = Instant::now();
    let mut due = Duration::ZERO;
    loop {
        match system.refresh(interval) {
            Ok(()) => {
                alive.store(true, Ordering::Relaxed);
                publish.send_replace(Some(Arc::new(system.snapshot())));
            }
            Err(error) => tracing::error!("listing the processes: {error}"),
        }
        if !listening {
            // The first reading does not wait for it.
            events = super::system::listen(&kernel);
            listening = true;
        }
        while due <= started.elapsed() {
            due += interval;
        }
        loop {
            let left = due.saturating_sub(started.elapsed());
            if left.is_zero() {
                break;
            }
            match orders.recv_timeout(left.min(LISTEN_EVERY)) {
                Ok(Order::Configuration(config)) => {
                    interval = config.interval;
                    due = started.elapsed();
                    system.set_options(options(&config, &kernel));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            let told = events.as_mut().map(crate::probe::ProcessEvents::read);
            match told {
                // What was lost is found by the next look.
                Some(Ok((told, lost))) => {
                    system.take(&told);
                    system.lose(lost);
                }
                Some(Err(error)) => {
                    tracing::warn!("processes are found every interval only: {error}");
                    system.untold();
                    events = None;
                }
                None => {}
            }
        }
    }
}

/// Carries out what signals ask for, and tells systemd that all is well.
async fn serve_signals(
    path: Option<&Path>,
    mut config: Config,
    orders: &mpsc::Sender<Order>,
    mut snapshots: latest::Receiver<Option<Arc<Snapshot>>>,
    alive: &AtomicBool,
    kernel: &Arc<KernelSide>,
    cache: &Arc<Cache>,
) -> Result<Exit, Failure> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut reload = signal(SignalKind::hangup()).map_err(failed)?;
    let mut dump = signal(SignalKind::user_defined1()).map_err(failed)?;
    let patience = sd_notify::watchdog_enabled();
    let mut watchdog =
        tokio::time::interval(patience.map_or(Duration::from_secs(3600), |patience| patience / 3));
    let mut ready = false;
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(Exit::Success),
            _ = terminate.recv() => return Ok(Exit::Success),
            changed = snapshots.changed() => {
                if changed.is_err() {
                    return Err(failed("the watch ended by an error of leakmon's own; please report it"));
                }
                if !ready && snapshots.borrow_and_update().is_some() {
                    ready = true;
                    let _ = sd_notify::notify(&[NotifyState::Ready]);
                }
            }
            _ = watchdog.tick() => {
                // The reader has finished a round since the last time.
                if patience.is_some() && alive.swap(false, Ordering::Relaxed) {
                    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                }
            }
            _ = reload.recv() => {
                let Some(path) = path else {
                    tracing::warn!("there is no configuration file to read again");
                    continue;
                };
                match Config::read(path) {
                    Ok(new) => {
                        let fixed = |config: &Config| {
                            (config.http.clone(), config.otlp.clone(), config.top_sites)
                        };
                        if fixed(&new) != fixed(&config) {
                            tracing::warn!("changes of http, otlp and top_sites take effect at the next start");
                        }
                        if probes(&new) && !probes(&config) {
                            tracing::warn!("probes are loaded at start only: rules that want them take effect at the next one");
                        }
                        let _ = orders.send(Order::Configuration(Box::new(new.clone())));
                        config = new;
                        tracing::info!("the configuration was read again");
                    }
                    Err(error) => tracing::error!("the old configuration stays: {error}"),
                }
            }
            _ = dump.recv() => {
                let Some(snapshot) = snapshots.borrow().clone() else {
                    continue;
                };
                let dumps = config.dumps.clone();
                let (kernel, cache) = (Arc::clone(kernel), Arc::clone(cache));
                tokio::task::spawn_blocking(move || {
                    match write_dump(&dumps, &snapshot, &kernel, &cache) {
                        Ok(path) => tracing::info!("dumped to {}", path.display()),
                        Err(error) => tracing::error!("dumping to {}: {error}", dumps.folder.display()),
                    }
                });
            }
        }
    }
}

/// What dumps are called: in the order of their times.
const DUMP: &str = "leakmon-";

/// Writes every watched process's suspects and stacks, and removes the oldest
/// dumps.
fn write_dump(
    dumps: &Dumps,
    snapshot: &Snapshot,
    kernel: &Arc<KernelSide>,
    cache: &Arc<Cache>,
) -> io::Result<PathBuf> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dumps.folder)?;
    let now = SystemTime::now();
    let stamp = humantime::format_rfc3339_millis(now)
        .to_string()
        .replace(':', "");
    let path = dumps.folder.join(format!("{DUMP}{stamp}.txt"));
    let partial = dumps.folder.join(format!(".{DUMP}{stamp}.partial"));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)?;
    let mut out = io::BufWriter::new(file);
    let written = (|| {
        overview::write_json(&snapshot.overview(), usize::MAX, &mut out)?;
        for process in &snapshot.processes {
            let Some(report) = &process.report else {
                continue;
            };
            json::write(report, Some(0), &mut out)?;
            let Ok(opened) = Process::open(process.row.pid) else {
                continue;
            };
            if opened.identity.start_time != process.row.start_time {
                continue;
            }
            for runtime in &report.runtimes {
                let name = runtime.runtime.name;
                let Some(kind) = Kind::named(name) else {
                    continue;
                };
                match Dumped::read(&opened, Some(kind), Arc::clone(kernel), cache) {
                    Ok(dumped) => dumped.write(Format::Debug2, &mut out)?,
                    Err(error) => writeln!(out, "{}: {error}", opened.identity.describe())?,
                }
            }
        }
        out.flush()
    })();
    if let Err(error) = written {
        let _ = std::fs::remove_file(&partial);
        return Err(error);
    }
    std::fs::rename(&partial, &path)?;
    remove_oldest(&dumps.folder, dumps.keep)?;
    Ok(path)
}

fn remove_oldest(folder: &Path, keep: usize) -> io::Result<()> {
    let mut dumps: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(DUMP) && name.ends_with(".txt"))
        })
        .collect();
    dumps.sort();
    let extra = dumps.len().saturating_sub(keep);
    dumps.iter().take(extra).try_for_each(std::fs::remove_file)
}
