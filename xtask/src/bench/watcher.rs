//! A program that watches another one while that is measured.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a watcher has to find its way into the target.
const ATTACH: Duration = Duration::from_millis(700);

/// How long a watcher may take to end.
const END: Duration = Duration::from_secs(5);

/// How long bpftrace may take to begin.
const BEGIN: Duration = Duration::from_secs(20);

/// A watcher, ended when dropped.
pub(super) struct Watcher(Child);

impl Watcher {
    /// leakmon with these arguments.
    pub(super) fn leakmon(leakmon: &Path, pid: u32, arguments: &[&str]) -> Result<Self> {
        let child = Command::new(leakmon)
            .args(["--pid", &pid.to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", leakmon.display()))?;
        Self(child).attached("leakmon")
    }

    /// bpftrace with a script.
    pub(super) fn bpftrace(pid: u32, script: &str) -> Result<Self> {
        let mut child = Command::new("bpftrace")
            // Unsafe: it cannot prove that a place is an instruction's start. leakmon has.
            .args(["--unsafe", "-p", &pid.to_string(), "-e", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start bpftrace")?;
        let output = child.stdout.take().context("bpftrace has no output")?;
        let watcher = Self(child);
        // "Attaching N probes...", then nothing until it ends.
        let started = Instant::now();
        let mut line = String::new();
        let mut lines = BufReader::new(output);
        while !line.starts_with("Attaching") && started.elapsed() < BEGIN {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                break;
            }
        }
        // What it prints at its end is not wanted, and must not block it.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        watcher.attached("bpftrace")
    }

    fn attached(mut self, name: &str) -> Result<Self> {
        sleep(ATTACH);
        if let Some(status) = self.0.try_wait()? {
            let mut why = String::new();
            if let Some(errors) = &mut self.0.stderr {
                errors.read_to_string(&mut why)?;
            }
            bail!("{name} ended instead of watching ({status}) {}", why.trim());
        }
        Ok(self)
    }

    /// The watcher's process.
    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Killed, it might leave a breakpoint that costs what is measured next. It may have ended by itself, which the
        // measurement shows.
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGINT);
        let asked = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) && asked.elapsed() < END {
            sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
