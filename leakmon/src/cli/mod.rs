//! The command line: one file a command.

pub mod daemon;
pub mod doctor;
mod keys;
mod screen;
pub mod stacks;
pub mod system;
pub mod watch;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use globset::GlobMatcher;

use crate::probe;
use crate::process::discovery;
use crate::process::identity::ProcessError;
use crate::process::memory::MemoryError;
use crate::runtime::Refusal;

/// Exit codes, as the manual lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Exit {
    /// Everything that was asked for was done.
    Success = 0,
    /// Something failed that no other code describes.
    Failure = 1,
    /// The command line is wrong (clap's own code).
    Usage = 2,
    /// There is no such process, or it is none that can be watched.
    NoProcess = 3,
    /// A capability is missing, or the kernel forbids it.
    NotPermitted = 4,
    /// The process ended or replaced its program while it was watched.
    Ended = 5,
    /// The process runs, but its goroutines or tasks cannot be read.
    Refused = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// A failure that ends a command: its message, and its exit code.
#[derive(Debug)]
pub struct Failure {
    /// What failed, in which process, and what to do about it.
    pub message: String,
    /// The exit code.
    pub exit: Exit,
}

impl Failure {
    /// A failure to write what was asked for.
    fn output(error: &io::Error) -> Failure {
        Failure {
            message: format!("writing the report: {error}"),
            exit: Exit::Failure,
        }
    }
}

impl From<ProcessError> for Failure {
    fn from(error: ProcessError) -> Failure {
        let exit = match &error {
            ProcessError::NotPermitted(..) => Exit::NotPermitted,
            ProcessError::Other(..) => Exit::Failure,
            _ => Exit::NoProcess,
        };
        Failure {
            message: error.to_string(),
            exit,
        }
    }
}

/// The exit code that a refusal to read goroutines leads to.
fn exit_of(refusal: &Refusal) -> Exit {
    match refusal {
        Refusal::Memory(MemoryError::Gone | MemoryError::Replaced) => Exit::Ended,
        Refusal::Memory(MemoryError::NotPermitted) => Exit::NotPermitted,
        _ => Exit::Refused,
    }
}

/// Watches goroutines, tokio tasks and threads of running programs from outside,
/// and names those that leak.
#[derive(Debug, Parser)]
#[command(
    name = "leakmon",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = EXIT_CODES
)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    watch: WatchArgs,
}

/// How long the end waits for what is being detached: the kernel takes up to a
/// tenth of a second for each process.
const DETACHING: Duration = Duration::from_secs(60);

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  something else failed
  2  the command line is wrong
  3  no such process, or none that can be watched
  4  a capability is missing, or the kernel forbids it (see leakmon doctor)
  5  the process ended, or replaced its program by exec
  6  the process runs, but its goroutines or tokio tasks cannot be read";

#[derive(Debug, Subcommand)]
enum Command {
    /// Print every goroutine, tokio task or thread of a process, as Go's own dumps
    /// do.
    Stacks(StacksArgs),
    /// Watch the whole machine for good, and export what is seen: Prometheus, HTTP
    /// (see deploy/leakmon.toml).
    Daemon(DaemonArgs),
    /// Say what this kernel and these capabilities allow, and what to do about
    /// the rest.
    Doctor,
}

/// What `leakmon --pid N` takes.
#[derive(Clone, Debug, Args)]
pub struct WatchArgs {
    /// Process to watch; may be given several times. Without it, every process
    /// of the machine is watched, by censuses alone.
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<u32>,
    /// Only processes of this name (of the executable, or the kernel's); `*`
    /// and `?` match anything.
    #[arg(long, value_name = "PATTERN", value_parser = discovery::pattern, conflicts_with = "pids")]
    name: Option<GlobMatcher>,
    /// Only processes of this user, a name or a number.
    #[arg(long, value_name = "USER", value_parser = discovery::uid, conflicts_with = "pids")]
    user: Option<u32>,
    /// Only processes in control groups of this path, as in /proc/PID/cgroup.
    #[arg(long, value_name = "PATTERN", value_parser = discovery::pattern, conflicts_with = "pids")]
    cgroup: Option<GlobMatcher>,
    /// Time between two reports: 500ms, 5s, 1m; a bare number is seconds.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration)]
    interval: Duration,
    /// Stop after this time.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    duration: Option<Duration>,
    /// Print one report, from a census alone, and stop.
    #[arg(long, conflicts_with_all = ["duration", "tier", "max_overhead"])]
    once: bool,
    /// Sites of a process to show, or processes; suspects are shown in any case.
    /// Without it, 10 sites and as many processes as the terminal has room for.
    #[arg(long, value_name = "N")]
    top: Option<usize>,
    /// Watch and show the threads of a process that has goroutines or tokio
    /// tasks as closely as these.
    #[arg(long)]
    all_runtimes: bool,
    /// How to print the reports.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Attach exactly this much, whatever it costs the process, instead of
    /// what the budget allows.
    #[arg(long, value_enum, conflicts_with = "max_overhead", requires = "pids")]
    tier: Option<TierArg>,
    /// CPU time that the probes may cost the process, in percent of what it
    /// uses itself (0.5 % of one core are always allowed).
    #[arg(long, value_name = "PCT", default_value_t = 5.0, value_parser = percent, requires = "pids")]
    max_overhead: f64,
    /// Colours in the table.
    #[arg(long, value_enum, default_value_t = Colour::Auto)]
    color: Colour,
}

/// What `leakmon stacks` takes.
#[derive(Clone, Debug, Args)]
pub struct StacksArgs {
    /// Process to dump.
    #[arg(long, value_name = "PID")]
    pid: u32,
    /// Whose tasks to print, in a process that has several; without it, the
    /// goroutines or else the tokio tasks or else the threads.
    #[arg(long, value_enum)]
    runtime: Option<RuntimeArg>,
    /// How to print them.
    #[arg(long, value_enum, default_value_t = StacksFormat::Debug2)]
    format: StacksFormat,
}

/// What `leakmon daemon` takes.
#[derive(Clone, Debug, Args)]
pub struct DaemonArgs {
    /// Its configuration, in TOML; without it everything is at its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say whether the configuration is good, and do nothing else.
    #[arg(long)]
    check_config: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RuntimeArg {
    /// Goroutines.
    Go,
    /// tokio's tasks.
    Tokio,
    /// The kernel's threads.
    Threads,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table for people; redrawn in place on a terminal.
    Table,
    /// One JSON object an interval and process, one a line (docs/json.md).
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StacksFormat {
    /// As `pprof.Lookup("goroutine").WriteTo(w, 2)` and a crash print them.
    Debug2,
    /// Counted by stack, as `WriteTo(w, 1)` prints them.
    Debug1,
    /// One JSON object a goroutine, one a line (docs/json.md).
    Json,
    /// Folded stacks, for flame graphs.
    Folded,
    /// A goroutine profile for `go tool pprof`.
    Pprof,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TierArg {
    /// Nothing: the runtime's tables are read.
    Census,
    /// Spawn and exit.
    Lifecycle,
    /// Spawn, exit, and channel and sync park and resume.
    Blocking,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Colour {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// A time as people write it; a bare number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let parsed = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?,
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string())?,
    };
    if parsed < Duration::from_millis(10) {
        return Err("must be at least 10ms".to_owned());
    }
    Ok(parsed)
}

fn percent(text: &str) -> Result<f64, String> {
    let value: f64 = text
        .trim_end_matches('%')
        .parse()
        .map_err(|_| "not a number".to_owned())?;
    if !(0.0..=1000.0).contains(&value) {
        return Err("must be from 0 to 1000".to_owned());
    }
    Ok(value)
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Some(Command::Stacks(args)) => stacks::run(&args),
        Some(Command::Daemon(args)) => daemon::run(&args),
        Some(Command::Doctor) => doctor::run(),
        None if cli.watch.pids.is_empty() => system::run(cli.watch),
        None => watch::run(cli.watch),
    };
    probe::settle(DETACHING);
    match done {
        Ok(exit) => exit.into(),
        Err(failure) => {
            eprintln!("leakmon: {}", failure.message);
            failure.exit.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn times_as_people_write_them() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "1ms", "NaN", "inf", "x", "1e300"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn budgets() {
        assert_eq!(percent("5"), Ok(5.0));
        assert_eq!(percent("0.5%"), Ok(0.5));
        assert!(percent("-1").is_err() && percent("NaN").is_err());
    }
}
