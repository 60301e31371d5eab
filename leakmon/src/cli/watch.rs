//! `leakmon --pid N`: watches processes and reports every interval.
//!
//! Each process has a thread that takes the censuses, and one for each of its
//! runtimes that governs its probes ([`crate::probe::Driver`]). Reports meet on
//! the main thread, which prints them and waits for signals.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::UnboundedSender;

use crate::probe::Tier;
use crate::process::identity::Process;
use crate::process::memory::MemoryError;
use crate::report::Report;
use crate::runtime::{Cache, Refusal};
use crate::watch::{KernelSide, Options, Watch, WatchError};

use super::screen::Screen;
use super::{Exit, Failure, TierArg, WatchArgs, exit_of};

/// How long the end waits for a watcher. One may be in the middle of a census,
/// or in a read that the target holds up; what it has attached goes with the
/// process in any case.
const FAREWELL: Duration = Duration::from_secs(3);

impl TierArg {
    fn tier(self) -> Tier {
        match self {
            TierArg::Census => Tier::Census,
            TierArg::Lifecycle => Tier::Lifecycle,
            TierArg::Blocking => Tier::Blocking,
        }
    }
}

/// What a watcher tells the main thread.
enum Event {
    Report(Box<Report>),
    /// The watch of a process is over.
    Over(u32, Result<Exit, Failure>),
}

/// Runs the command.
///
/// # Errors
/// [`Failure`] when none of the processes can be watched, or not any more.
pub fn run(args: WatchArgs) -> Result<Exit, Failure> {
    let mut args = args;
    args.pids.sort_unstable();
    args.pids.dedup();
    let processes = args
        .pids
        .iter()
        .map(|pid| Process::open(*pid))
        .collect::<Result<Vec<_>, _>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure {
            message: error.to_string(),
            exit: Exit::Failure,
        })?;
    runtime.block_on(watch(args, processes))
}

async fn watch(args: WatchArgs, processes: Vec<Process>) -> Result<Exit, Failure> {
    let failed = |error: io::Error| Failure {
        message: error.to_string(),
        exit: Exit::Failure,
    };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let probes = !args.once && args.tier != Some(TierArg::Census);
    let kernel = Arc::new(KernelSide::new(probes));
    if probes {
        let kernel = Arc::clone(&kernel);
        std::thread::spawn(move || kernel.load());
    }
    let (events, mut reports) = tokio::sync::mpsc::unbounded_channel();
    let cache = Arc::new(Cache::default());
    let mut stops = Vec::new();
    let mut watchers = Vec::new();
    for process in processes {
        let (stop, stopped) = mpsc::channel::<()>();
        stops.push(stop);
        let watcher = Watcher {
            args: args.clone(),
            kernel: Arc::clone(&kernel),
            events: events.clone(),
            stopped,
            process,
            cache: Arc::clone(&cache),
        };
        watchers.push(std::thread::spawn(move || watcher.run()));
    }
    drop(events);
    let mut screen = Screen::new(&args);
    let mut keys = screen.keys();
    let mut outcome = Ok(Exit::Success);
    loop {
        let event = tokio::select! {
            event = reports.recv() => event,
            _ = interrupt.recv() => None,
            _ = terminate.recv() => None,
            () = keys.quit() => None,
        };
        match event {
            Some(Event::Report(report)) => match screen.show(*report) {
                Ok(()) => {}
                // The reader has seen enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                Err(error) => {
                    outcome = Err(Failure::output(&error));
                    break;
                }
            },
            Some(Event::Over(pid, over)) => {
                screen.forget(pid);
                match over {
                    Ok(exit) => outcome = outcome.map(|so_far| so_far.max(exit)),
                    Err(failure) if args.pids.len() == 1 => outcome = Err(failure),
                    Err(failure) => {
                        screen.note(&failure.message);
                        outcome = outcome.map(|so_far| so_far.max(failure.exit));
                    }
                }
            }
            None => break,
        }
    }
    // Watchers wait on these: dropping them ends each, and detaches its probes.
    drop(stops);
    let limit = Instant::now() + FAREWELL;
    for watcher in watchers {
        while !watcher.is_finished() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
        // A panic was printed where it happened.
        if watcher.is_finished() && watcher.join().is_err() && outcome.is_ok() {
            outcome = Err(Failure {
                message: "a watch ended by an error of leakmon's own; please report it".to_owned(),
                exit: Exit::Failure,
            });
        }
    }
    screen.finish();
    outcome
}

/// The thread that watches one process.
struct Watcher {
    args: WatchArgs,
    kernel: Arc<KernelSide>,
    events: UnboundedSender<Event>,
    /// Its other end is dropped when the watch is to end.
    stopped: mpsc::Receiver<()>,
    process: Process,
    cache: Arc<Cache>,
}

impl Watcher {
    fn run(self) {
        let pid = self.process.identity.pid;
        let name = self.process.identity.describe();
        let events = self.events.clone();
        let started = Instant::now();
        let over = self
            .watch()
            .map_err(|error| failure(&name, started, &error));
        // Nobody listens any more when the main thread is ending.
        let _ = events.send(Event::Over(pid, over));
    }

    fn watch(self) -> Result<Exit, WatchError> {
        let Watcher {
            args,
            kernel,
            events,
            stopped,
            process,
            cache,
        } = self;
        let options = Options {
            tier: args.tier.map(TierArg::tier),
            once: args.once,
            max_overhead: args.max_overhead,
            all_runtimes: args.all_runtimes,
            threads: true,
            highest: Tier::Blocking,
        };
        let mut watch = Watch::open(process, options, kernel, &cache)?;
        let started = watch.started();
        // Whether it is over before the time has come, after the start.
        let wait = |until: Duration| {
            let left = until.saturating_sub(started.elapsed());
            !matches!(stopped.recv_timeout(left), Err(RecvTimeoutError::Timeout))
        };
        let mut attached = args.once;
        loop {
            let report = watch.observe()?;
            // As above.
            let _ = events.send(Event::Report(Box::new(report)));
            if !attached {
                watch.attach()?;
                attached = true;
            }
            let Some(due) = next_due(&args, started) else {
                break;
            };
            if wait(due.saturating_sub(args.interval / 2)) {
                break;
            }
            watch.sample()?;
            if wait(due) {
                break;
            }
        }
        Ok(match watch.is_refused() {
            true => Exit::Refused,
            false => Exit::Success,
        })
    }
}

/// When the next report is due, after the start; `None` when there is none.
/// Those that were due meanwhile, during a long census, are passed over.
fn next_due(args: &WatchArgs, started: Instant) -> Option<Duration> {
    if args.once {
        return None;
    }
    let interval = args.interval.as_nanos();
    let next = (started.elapsed().as_nanos() / interval + 1).saturating_mul(interval);
    let next = Duration::from_nanos(u64::try_from(next).unwrap_or(u64::MAX));
    (args.duration.is_none_or(|duration| next <= duration)).then_some(next)
}

fn failure(name: &str, started: Instant, error: &WatchError) -> Failure {
    let watched = humantime::format_duration(Duration::from_secs(started.elapsed().as_secs()));
    let (exit, more) = match error {
        WatchError::Refusal(refusal) => (
            exit_of(refusal),
            match refusal {
                Refusal::Memory(MemoryError::Gone) => format!(" (watched for {watched})"),
                Refusal::Memory(MemoryError::Replaced) => {
                    format!(" (watched for {watched}); start leakmon again to watch the new one")
                }
                _ => String::new(),
            },
        ),
        WatchError::NoPlaces(_) => (Exit::Refused, String::new()),
        WatchError::Probe {
            not_permitted: true,
            ..
        } => (Exit::NotPermitted, String::new()),
        WatchError::Probe { .. } => (Exit::Failure, String::new()),
    };
    Failure {
        message: format!("{name}: {error}{more}"),
        exit,
    }
}
