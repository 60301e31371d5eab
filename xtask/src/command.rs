//! Other programs, run so that a failure names the command, what it said and how it ended.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// How many of a failed command's last lines an error repeats.
const LAST_LINES: usize = 12;

/// A command line that is about to be run.
pub(crate) struct Run {
    command: Command,
    limit: Option<Duration>,
}

impl Run {
    /// The program to run, by name or by path.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            command: Command::new(program),
            limit: None,
        }
    }

    /// Adds one argument.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub(crate) fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Takes a variable out of the environment.
    pub(crate) fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Runs in a folder.
    pub(crate) fn dir(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Gives up after this long, for what may hang without a network.
    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Runs it in the user's sight.
    pub(crate) fn run(self) -> Result<()> {
        let (mut command, line) = self.ready();
        let status = command.status().with_context(|| cannot_start(&line))?;
        if !status.success() {
            bail!("`{line}` failed ({status}); its own messages are above");
        }
        Ok(())
    }

    /// Runs it unseen and gives its standard output.
    pub(crate) fn capture(self) -> Result<String> {
        // A backtrace would push what a failed tool has to say out of the error's few lines.
        let (mut command, line) = self.env_remove("RUST_BACKTRACE").ready();
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| cannot_start(&line))?;
        if !output.status.success() {
            bail!(
                "`{line}` failed ({}):\n{}",
                output.status,
                last_lines(&output)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs it unseen; whether it succeeded is all that matters.
    pub(crate) fn succeeds(self) -> bool {
        self.capture().is_ok()
    }

    /// Starts it with its input and output held by the caller.
    pub(crate) fn start(self) -> Result<Child> {
        let (mut command, line) = self.ready();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| cannot_start(&line))
    }

    /// Starts it unseen, and unheard, where it has only what time nobody else wants.
    pub(crate) fn behind(self) -> Result<Child> {
        let (command, line) = self.ready();
        let mut idle = wrapped("chrt", &["--idle", "0"], &command);
        idle.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| cannot_start(&format!("chrt --idle 0 {line}")))
    }

    /// The command with its time limit, and the line that names it.
    fn ready(self) -> (Command, String) {
        let line = line_of(&self.command);
        let Some(limit) = self.limit else {
            return (self.command, line);
        };
        let seconds = limit.as_secs().to_string();
        let limited = wrapped("timeout", &[&seconds], &self.command);
        (limited, line)
    }
}

/// The command as an argument of another, which starts it.
fn wrapped(by: &str, arguments: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(by);
    wrapped
        .args(arguments)
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        wrapped.current_dir(folder);
    }
    wrapped
}

/// The command as one would type it.
fn line_of(command: &Command) -> String {
    let mut line = OsString::from(command.get_program());
    for argument in command.get_args() {
        line.push(" ");
        line.push(argument);
    }
    line.to_string_lossy().into_owned()
}

fn cannot_start(line: &str) -> String {
    format!("cannot start `{line}`: is it installed and in PATH?")
}

/// The end of what a failed command said, standard error first.
fn last_lines(output: &Output) -> String {
    let said = if output.stderr.trim_ascii().is_empty() {
        &output.stdout
    } else {
        &output.stderr
    };
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}
