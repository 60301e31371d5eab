//! A fixture that runs, spoken to through its standard input and output.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout};

use anyhow::{Context as _, Result, bail};

use crate::command::Run;

/// A running fixture, ended when dropped.
pub(crate) struct Program {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Program {
    /// Starts a fixture and waits until it says that it is ready.
    pub(crate) fn start(path: &Path, arguments: &[&str]) -> Result<Self> {
        let mut child = Run::new(path).args(arguments).start()?;
        let answers = child.stdout.take().context("the fixture has no output")?;
        let mut program = Self {
            child,
            answers: BufReader::new(answers),
        };
        let line = program.line()?;
        if line != format!("ready {}", program.pid()) {
            bail!("{} began with `{line}`, not with `ready`", path.display());
        }
        Ok(program)
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints.
    pub(crate) fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the fixture with pid {} ended early", self.pid());
        }
        Ok(line.trim_end().to_owned())
    }

    /// Where a server listens, which it prints when it is ready.
    pub(crate) fn address(&mut self) -> Result<String> {
        let line = self.line()?;
        let address = line.strip_prefix("listening ");
        Ok(address.context("the server says no address")?.to_owned())
    }

    /// Sends a command and gives the one line that answers it.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String> {
        let input = self
            .child
            .stdin
            .as_mut()
            .context("the fixture has no input")?;
        writeln!(input, "{command}")?;
        let answer = self.line()?;
        if answer.starts_with("error ") {
            bail!("the fixture answered `{command}` with: {answer}");
        }
        Ok(answer)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
