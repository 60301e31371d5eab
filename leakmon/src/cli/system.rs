//! `leakmon` without a pid: every process of the machine, in one table.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::probe::ProcessEvents;
use crate::report::overview::{self, Overview};
use crate::watch::KernelSide;
use crate::watch::rules::{Depth, Rule};
use crate::watch::system::{Options, System};

use super::keys::Keys;
use super::screen::{Terminal, coloured, size};
use super::{Exit, Failure, Format, WatchArgs};

/// How often the kernel's word of new processes is heard.
const LISTEN_EVERY: Duration = Duration::from_millis(100);

/// Processes that are shown when nobody says how many and no terminal has a
/// size.
const ROWS: usize = 40;

/// Runs the command.
///
/// # Errors
/// [`Failure`] when processes cannot be listed, or nothing can be printed.
pub fn run(args: WatchArgs) -> Result<Exit, Failure> {
    prepare();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| failed(&error))?;
    runtime.block_on(watch(args))
}

fn failed(error: &io::Error) -> Failure {
    Failure {
        message: error.to_string(),
        exit: Exit::Failure,
    }
}

/// Prepares this process for what thousands of others need of it: open files, two
/// for each that is read, and memory.
pub(super) fn prepare() {
    one_heap();
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    if let Ok((_, hard)) = limit
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
}

/// One heap for all threads. Nearly everything is kept by the thread that reads;
/// what others leave in heaps of their own is never used again: with 500
/// processes that come and go, a sixth of the memory.
#[cfg(target_env = "gnu")]
fn one_heap() {
    // SAFETY: sets a number, while there is only this thread.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        tracing::warn!("the C library keeps a heap for each thread");
    }
}

/// musl has only one.
#[cfg(not(target_env = "gnu"))]
fn one_heap() {}

async fn watch(args: WatchArgs) -> Result<Exit, Failure> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| failed(&error))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| failed(&error))?;
    let (send, mut overviews) = tokio::sync::mpsc::channel(1);
    let (stop, stopped) = mpsc::channel::<()>();
    let watcher = std::thread::spawn({
        let args = args.clone();
        move || refresh(&args, &send, &stopped)
    });
    let mut screen = Screen::new(&args);
    let mut keys = screen.keys();
    let mut outcome = Ok(Exit::Success);
    loop {
        let overview = tokio::select! {
            overview = overviews.recv() => overview,
            _ = interrupt.recv() => None,
            _ = terminate.recv() => None,
            () = keys.quit() => None,
        };
        match overview {
            Some(Ok(overview)) => match screen.show(overview) {
                Ok(()) => {}
                // The reader has seen enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                Err(error) => {
                    outcome = Err(Failure::output(&error));
                    break;
                }
            },
            Some(Err(error)) => {
                outcome = Err(Failure {
                    message: format!("listing the processes: {error}"),
                    exit: Exit::Failure,
                });
                break;
            }
            None => break,
        }
    }
    drop((stop, overviews));
    screen.finish();
    // It may be in a read that a process holds up; nothing is attached.
    if watcher.is_finished() && watcher.join().is_err() && outcome.is_ok() {
        outcome = Err(Failure {
            message: "the watch ended by an error of leakmon's own; please report it".to_owned(),
            exit: Exit::Failure,
        });
    }
    outcome
}

/// Looks at the machine every interval until nobody wants it any more.
fn refresh(
    args: &WatchArgs,
    overviews: &tokio::sync::mpsc::Sender<io::Result<Overview>>,
    stopped: &mpsc::Receiver<()>,
) {
    let kernel = Arc::new(KernelSide::new(false));
    let mut system = System::new(Options {
        rules: vec![Rule {
            executable: args.name.clone(),
            user: args.user,
            cgroup: args.cgroup.clone(),
            ..Rule::default()
        }],
        otherwise: Depth::Off,
        max_overhead: 0.0,
        otel_environment: false,
        all_runtimes: args.all_runtimes,
        kernel: Arc::clone(&kernel),
    });
    let started = Instant::now();
    let mut due = Duration::ZERO;
    let mut events = None;
    loop {
        let overview = system.refresh(args.interval).map(|()| system.overview());
        let over = overview.is_err();
        if overviews.blocking_send(overview).is_err() || over || args.once {
            return;
        }
        if due.is_zero() {
            // The first table does not wait for it.
            events = listen(&kernel);
        }
        while due <= started.elapsed() {
            due += args.interval;
        }
        if args.duration.is_some_and(|duration| due > duration) {
            return;
        }
        loop {
            let left = due.saturating_sub(started.elapsed());
            let nap = match &events {
                Some(_) => left.min(LISTEN_EVERY),
                None => left,
            };
            if !matches!(stopped.recv_timeout(nap), Err(RecvTimeoutError::Timeout)) {
                return;
            }
            if let Some(listening) = &mut events {
                match listening.read() {
                    // What was lost is found by the next look.
                    Ok((told, _lost)) => system.take(&told),
                    Err(error) => {
                        tracing::warn!("processes are found every interval only: {error}");
                        events = None;
                    }
                }
            }
            if started.elapsed() >= due {
                break;
            }
        }
    }
}

/// The kernel's word of processes that come, go and change; `None` where it
/// does not give it. They are found every interval then.
pub(super) fn listen(kernel: &KernelSide) -> Option<ProcessEvents> {
    match kernel.reading()?.events() {
        Ok(events) => Some(events),
        Err(error) => {
            tracing::info!("processes are found every interval only: {error}");
            None
        }
    }
}

struct Screen {
    format: Format,
    top: Option<usize>,
    colour: bool,
    live: bool,
    terminal: Terminal,
    last: Option<Overview>,
}

impl Screen {
    fn new(args: &WatchArgs) -> Screen {
        Screen {
            format: args.format,
            top: args.top,
            colour: coloured(args.color),
            live: io::stdout().is_terminal() && args.format == Format::Table && !args.once,
            terminal: Terminal::default(),
            last: None,
        }
    }

    /// What is typed while it is redrawn.
    fn keys(&self) -> Keys {
        Keys::listen(self.live)
    }

    fn show(&mut self, overview: Overview) -> io::Result<()> {
        if self.live {
            let (_, height) = size();
            let text = self.render(&overview, height);
            self.last = Some(overview);
            let lines: Vec<&str> = text.lines().collect();
            return self.terminal.draw(&lines, height);
        }
        let mut out = io::stdout().lock();
        match self.format {
            Format::Json => {
                overview::write_json(&overview, self.top.unwrap_or(usize::MAX), &mut out)?;
            }
            Format::Table => writeln!(out, "{}", self.render(&overview, usize::MAX))?,
        }
        out.flush()
    }

    fn render(&self, overview: &Overview, height: usize) -> String {
        let (width, _) = size();
        let room = match height {
            usize::MAX => ROWS,
            // The head, and the line of those that are not shown.
            height => height.saturating_sub(6),
        };
        let options = overview::Options {
            width,
            colour: self.colour,
            top: self.top.unwrap_or(room),
        };
        overview::render(overview, &options)
    }

    fn finish(&mut self) {
        if self.terminal.leave()
            && let Some(last) = &self.last
        {
            let _ = writeln!(io::stdout(), "{}", self.render(last, size().1));
        }
    }
}
