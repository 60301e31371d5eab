//! `leakmon --pid N`: watches processes and reports every interval.
//!
//! Each process has a thread that takes the censuses, and one that governs its
//! probes ([`Driver`]). Reports meet on the main thread, which prints them and
//! waits for signals.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::UnboundedSender;

use crate::leak::History;
use crate::probe::{self, Counts, Driver, Error, Governor, Kernel, Tier};
use crate::process::identity::Process;
use crate::process::memory::{MemoryError, ProcessMemory};
use crate::report::{self, Observation, Probed, Report, TierReason, When, json, table};
use crate::runtime::go::census::Census;
use crate::runtime::go::probes;
use crate::runtime::go::{self, program::Refusal};
use crate::task::{Checkpoint, Coverage, Flow, rates, reconcile};

use super::{Colour, Exit, Failure, Format, TierArg, WatchArgs, exit_of};

/// The kernel side, loaded once for all processes while the first census is
/// taken.
type KernelSlot = Arc<OnceLock<Result<(Kernel, probe::Cost), Error>>>;

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
    let kernel = KernelSlot::default();
    if !args.once && args.tier != Some(TierArg::Census) {
        let kernel = Arc::clone(&kernel);
        std::thread::spawn(move || {
            // Watchers wait for it, whatever happens here.
            let loaded = std::panic::catch_unwind(probe::load)
                .unwrap_or_else(|_| Err(Error::Object("loading it panicked".to_owned())));
            kernel.set(loaded)
        });
    }
    let (events, mut reports) = tokio::sync::mpsc::unbounded_channel();
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
            started: Instant::now(),
            last: None,
            history: History::new(),
            process,
        };
        watchers.push(std::thread::spawn(move || watcher.run()));
    }
    drop(events);
    let mut screen = Screen::new(&args);
    let mut outcome = Ok(Exit::Success);
    loop {
        let event = tokio::select! {
            event = reports.recv() => event,
            _ = interrupt.recv() => None,
            _ = terminate.recv() => None,
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
    kernel: KernelSlot,
    events: UnboundedSender<Event>,
    /// Its other end is dropped when the watch is to end.
    stopped: mpsc::Receiver<()>,
    started: Instant,
    /// When the last report was made.
    last: Option<Instant>,
    history: History,
    process: Process,
}

/// What the probes of one process need between two intervals.
struct Probing {
    driver: Driver,
    highest: Tier,
    unavailable: Option<String>,
    /// A census since which spawns and exits were counted without a break.
    base: Option<(Checkpoint, u64)>,
    /// What had been counted at the last report, and when that was.
    before: Flow,
    counted_at: Instant,
}

/// Why a process has no probes, or its probes.
enum Attachment {
    /// Not tried yet.
    Pending,
    /// It stays at the census, for this reason.
    None(TierReason),
    Probing(Box<Probing>),
}

impl Watcher {
    fn run(mut self) {
        let over = self.watch();
        // Nobody listens any more when the main thread is ending.
        let _ = self
            .events
            .send(Event::Over(self.process.identity.pid, over));
    }

    fn watch(&mut self) -> Result<Exit, Failure> {
        match go::census(&self.process) {
            Ok(census) => self.watch_goroutines(census),
            Err(refusal) if ends_a_watch(&refusal) => Err(self.failure(&refusal)),
            Err(refusal) => self.watch_threads(&refusal),
        }
    }

    fn watch_goroutines(&mut self, mut census: Census<ProcessMemory>) -> Result<Exit, Failure> {
        let runtime = report::Runtime {
            name: "go",
            tasks: "goroutines",
            version: census.program().version.text.clone(),
        };
        let mut attachment = match self.args.tier {
            Some(TierArg::Census) => Attachment::None(TierReason::Fixed),
            _ if self.args.once => Attachment::None(TierReason::Once),
            _ => Attachment::Pending,
        };
        loop {
            let observed = self.observe(&runtime, &mut census, &mut attachment);
            let report = match observed {
                Ok(report) => report,
                Err(refusal) if ends_a_watch(&refusal) => return Err(self.failure(&refusal)),
                Err(refusal) => {
                    drop(attachment);
                    return self.watch_threads(&refusal);
                }
            };
            self.send(report);
            if matches!(attachment, Attachment::Pending) {
                attachment = self.attach(&census)?;
            }
            let Some(due) = self.next_due() else {
                break;
            };
            if self.wait(due.saturating_sub(self.args.interval / 2)) {
                break;
            }
            match census.sample() {
                Err(refusal) if ends_a_watch(&refusal) => return Err(self.failure(&refusal)),
                // The next census finds out whether it lasts.
                Err(_) | Ok(()) => {}
            }
            if self.wait(due) {
                break;
            }
        }
        Ok(Exit::Success)
    }

    /// One interval's report.
    fn observe(
        &mut self,
        runtime: &report::Runtime,
        census: &mut Census<ProcessMemory>,
        attachment: &mut Attachment,
    ) -> Result<Report, Refusal> {
        let when = self.when();
        let Attachment::Probing(probing) = attachment else {
            let population = census.population()?;
            let pending = TierReason::Pending;
            let tier_reason = match attachment {
                Attachment::None(reason) => reason,
                _ => &pending,
            };
            let observation = Observation {
                runtime,
                tier: Tier::Census,
                tier_reason,
                population: &population,
                probed: None,
            };
            return self.report(when, observation);
        };
        let before_status = probing.driver.status();
        let before = probing.driver.counts();
        let population = census.population()?;
        let after = probing.driver.counts();
        let status = probing.driver.status();
        let interval = probing.driver.take_interval();
        let failed = match (&before, &after) {
            (Ok(_), Ok(_)) => status.failed.clone(),
            (Err(error), _) | (_, Err(error)) => Some(error.to_string()),
        };
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        if let Some(error) = failed {
            let reason = TierReason::Unavailable(error);
            let observation = Observation {
                runtime,
                tier: Tier::Census,
                tier_reason: &reason,
                population: &population,
                probed: None,
            };
            let report = self.report(when, observation)?;
            *attachment = Attachment::None(reason);
            return Ok(report);
        }
        let unbroken = before_status.attached >= Tier::Lifecycle
            && status.attached >= Tier::Lifecycle
            && before_status.gaps == status.gaps;
        let totals = |counts: &Counts| probes::totals(census, counts);
        let checkpoint = Checkpoint::new(&population, totals(&before), totals(&after));
        let reconciliation = match &probing.base {
            Some((base, gaps)) if unbroken && *gaps == status.gaps => {
                Some(reconcile(base, &checkpoint))
            }
            _ => {
                probing.base = unbroken.then_some((checkpoint, status.gaps));
                None
            }
        };
        let flow = probes::flow(census, &after);
        let counted_at = Instant::now();
        let since = counted_at.duration_since(probing.counted_at);
        probing.counted_at = counted_at;
        let attached = since.mul_f64(interval.lifecycle.clamp(0.0, 1.0));
        let probed = Probed {
            flow: &flow,
            rates: rates(&probing.before, &flow, attached),
            reconciliation,
            overhead: interval.overhead,
            coverage: Coverage {
                spawns: interval.lifecycle,
                waits: interval.blocking,
                all_spawns: status.gaps == 0,
                all_waits: status.wait_gaps == 0 && status.tier >= Tier::Blocking,
            },
        };
        let tier_reason = match (&probing.unavailable, self.args.tier) {
            _ if status.tier < probing.highest => TierReason::SteppedDown,
            (_, Some(_)) => TierReason::Fixed,
            (Some(why), None) => TierReason::Unavailable(why.clone()),
            (None, None) => TierReason::Governed,
        };
        let observation = Observation {
            runtime,
            tier: status.tier,
            tier_reason: &tier_reason,
            population: &population,
            probed: (status.tier > Tier::Census || interval.lifecycle > 0.0).then_some(probed),
        };
        let report = self.report(when, observation)?;
        probing.before = flow;
        Ok(report)
    }

    fn report(&mut self, when: When, observation: Observation<'_>) -> Result<Report, Refusal> {
        let threads = self.threads()?;
        Ok(Report::new(
            when,
            self.about(),
            threads,
            observation,
            &mut self.history,
        ))
    }

    /// Threads of the process, which still runs the same program.
    fn threads(&self) -> Result<u64, Refusal> {
        self.process.still_runs()?;
        Ok(self.process.identity.threads().ok_or(MemoryError::Gone)?)
    }

    /// Attaches what the command line asks for.
    fn attach(&self, census: &Census<ProcessMemory>) -> Result<Attachment, Failure> {
        let fixed = self.args.tier.map(TierArg::tier);
        let unavailable = |exit: Exit, message: String| {
            // Perhaps because the process is not there any more.
            let runs = self.process.still_runs();
            runs.map_err(|ended| self.failure(&Refusal::Memory(ended)))?;
            match fixed {
                // Somebody who asks for a tier gets it or an error.
                Some(_) => Err(Failure {
                    message: format!("{}: {message}", self.process.identity.describe()),
                    exit,
                }),
                None => Ok(Attachment::None(TierReason::Unavailable(message))),
            }
        };
        let probes = match probes::find(census.program()) {
            Ok(probes) => probes,
            Err(refusal) => return unavailable(Exit::Refused, refusal.to_string()),
        };
        let highest = fixed.unwrap_or(Tier::Blocking).min(probes.highest_tier());
        if let (Some(Tier::Blocking), Some(why)) = (fixed, &probes.blocking_refused) {
            return unavailable(Exit::Refused, why.clone());
        }
        let (kernel, cost) = match self.kernel.wait() {
            Ok(loaded) => loaded,
            Err(error) => return unavailable(exit_of_probe(error), error.to_string()),
        };
        let pid = self.process.identity.pid;
        let attached = match kernel.attach(pid, &probes.plan, Tier::Census) {
            Ok(attached) => attached,
            Err(error) => return unavailable(exit_of_probe(&error), error.to_string()),
        };
        let governor = match fixed {
            Some(tier) => Governor::fixed(*cost, tier),
            None => Governor::governed(*cost, self.args.max_overhead, highest),
        };
        Ok(Attachment::Probing(Box::new(Probing {
            driver: Driver::start(attached, governor, pid),
            highest,
            unavailable: probes.blocking_refused,
            base: None,
            before: Flow::default(),
            counted_at: Instant::now(),
        })))
    }

    /// Reports threads alone, of a process whose goroutines cannot be read.
    fn watch_threads(&mut self, refusal: &Refusal) -> Result<Exit, Failure> {
        let reason = format!("{refusal}; threads are still counted");
        loop {
            let threads = self.threads().map_err(|ended| self.failure(&ended))?;
            let when = self.when();
            self.send(Report::refused(when, self.about(), threads, reason.clone()));
            let Some(due) = self.next_due() else {
                break;
            };
            if self.wait(due) {
                break;
            }
        }
        Ok(Exit::Refused)
    }

    fn send(&self, report: Report) {
        // Nobody listens any more when the main thread is ending.
        let _ = self.events.send(Event::Report(Box::new(report)));
    }

    /// When the next report is due, after the start; `None` when there is none.
    /// Those that were due meanwhile, during a long census, are passed over.
    fn next_due(&self) -> Option<Duration> {
        if self.args.once {
            return None;
        }
        let interval = self.args.interval.as_nanos();
        let next = (self.started.elapsed().as_nanos() / interval + 1).saturating_mul(interval);
        let next = Duration::from_nanos(u64::try_from(next).unwrap_or(u64::MAX));
        (self.args.duration.is_none_or(|duration| next <= duration)).then_some(next)
    }

    /// Waits until `at` after the start; whether the watch is over instead.
    fn wait(&self, at: Duration) -> bool {
        let left = at.saturating_sub(self.started.elapsed());
        !matches!(
            self.stopped.recv_timeout(left),
            Err(RecvTimeoutError::Timeout)
        )
    }

    fn when(&mut self) -> When {
        let now = Instant::now();
        let last = self.last.replace(now);
        When {
            at: SystemTime::now(),
            elapsed: now.duration_since(self.started),
            interval: last.map_or(Duration::ZERO, |last| now.duration_since(last)),
        }
    }

    fn about(&self) -> report::Process {
        let identity = &self.process.identity;
        report::Process {
            pid: identity.pid,
            start_time: identity.start_time,
            executable: identity.executable.clone(),
            command: identity.command_line.clone(),
        }
    }

    fn failure(&self, refusal: &Refusal) -> Failure {
        let watched =
            humantime::format_duration(Duration::from_secs(self.started.elapsed().as_secs()));
        let more = match refusal {
            Refusal::Memory(MemoryError::Gone) => format!(" (watched for {watched})"),
            Refusal::Memory(MemoryError::Replaced) => {
                format!(" (watched for {watched}); start leakmon again to watch the new one")
            }
            _ => String::new(),
        };
        Failure {
            message: format!("{}: {refusal}{more}", self.process.identity.describe()),
            exit: exit_of(refusal),
        }
    }
}

/// Whether nothing more can be said of a process, not even its threads.
fn ends_a_watch(refusal: &Refusal) -> bool {
    matches!(
        refusal,
        Refusal::Memory(MemoryError::Gone | MemoryError::Replaced | MemoryError::NotPermitted)
    )
}

fn exit_of_probe(error: &Error) -> Exit {
    match error {
        Error::Permission { .. } => Exit::NotPermitted,
        _ => Exit::Failure,
    }
}

/// Where reports are printed.
struct Screen {
    format: Format,
    options: table::Options,
    /// Redrawn in place, on the terminal's second screen.
    live: bool,
    entered: bool,
    latest: BTreeMap<u32, Report>,
    /// What ended, shown under the table and again at the end.
    notes: Vec<String>,
}

impl Screen {
    fn new(args: &WatchArgs) -> Screen {
        let terminal = io::stdout().is_terminal();
        let colour = match args.color {
            Colour::Always => true,
            Colour::Never => false,
            Colour::Auto => terminal && std::env::var_os("NO_COLOR").is_none(),
        };
        Screen {
            format: args.format,
            options: table::Options {
                colour,
                top: args.top,
                ..table::Options::default()
            },
            live: terminal && args.format == Format::Table && !args.once,
            entered: false,
            latest: BTreeMap::new(),
            notes: Vec::new(),
        }
    }

    fn show(&mut self, report: Report) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match self.format {
            Format::Json => json::write(&report, Some(self.options.top), &mut out)?,
            Format::Table if self.live => {
                self.latest.insert(report.process.pid, report);
                return self.redraw();
            }
            Format::Table => writeln!(out, "{}", table::render(&report, &self.options))?,
        }
        out.flush()
    }

    fn redraw(&mut self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let size = terminal_size::terminal_size();
        let (width, height) = size.map_or((80, usize::MAX), |(w, h)| (w.0.into(), h.0.into()));
        self.options.width = width;
        // Each process has its share of the screen.
        let share = (height.saturating_sub(self.notes.len()) / self.latest.len().max(1)).max(2);
        let mut lines: Vec<String> = Vec::new();
        for report in self.latest.values() {
            let text = table::render(report, &self.options) + "\n";
            let all: Vec<&str> = text.lines().collect();
            if all.len() <= share {
                lines.extend(all.iter().map(|line| (*line).to_owned()));
            } else {
                let shown = &all[..share - 1];
                lines.extend(shown.iter().map(|line| (*line).to_owned()));
                lines.push(format!("… {} more lines", all.len() - shown.len()));
            }
        }
        lines.extend(self.notes.iter().cloned());
        lines.truncate(height);
        let mut frame = String::new();
        if !self.entered {
            // The second screen, without a cursor.
            frame.push_str("\x1b[?1049h\x1b[?25l");
            self.entered = true;
        }
        frame.push_str("\x1b[H");
        for (i, line) in lines.iter().enumerate() {
            let end = if i + 1 == height { "" } else { "\r\n" };
            let _ = write!(frame, "{line}\x1b[K{end}");
        }
        frame.push_str("\x1b[J");
        out.write_all(frame.as_bytes())?;
        out.flush()
    }

    /// The process is no longer watched.
    fn forget(&mut self, pid: u32) {
        if self.latest.len() > 1 {
            self.latest.remove(&pid);
        }
    }

    fn note(&mut self, message: &str) {
        if self.live {
            self.notes.push(format!("leakmon: {message}"));
        } else {
            eprintln!("leakmon: {message}");
        }
    }

    /// Leaves the second screen; the last reports stay to be read.
    fn finish(&mut self) {
        if !self.entered {
            return;
        }
        let mut out = io::stdout().lock();
        let _ = write!(out, "\x1b[?25h\x1b[?1049l");
        for report in self.latest.values() {
            let _ = writeln!(out, "{}", table::render(report, &self.options));
        }
        for note in &self.notes {
            let _ = writeln!(out, "{note}");
        }
        let _ = out.flush();
    }
}
