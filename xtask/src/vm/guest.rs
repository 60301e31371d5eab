//! One kernel, booted in qemu without KVM, and what its tests said.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::initramfs::MARK;
use super::kernels::Kernel;
use crate::arch::Arch;
use crate::command::Run;

/// How long a guest may run, from its boot to its end.
const LIMIT: Duration = Duration::from_secs(1500);

/// A guest's memory, for the initramfs twice, the tests and 10,000 threads.
const MEMORY: &str = "1536";

/// A guest's processors: what is counted on one is seen from another.
const CPUS: &str = "2";

/// Both processors on one thread of the emulator. On two, one may find code half changed that the other patches, which
/// the kernel does to its tracepoints when something is attached to them: a guest panicked in `__schedule`, one byte
/// into an instruction.
const TCG: &str = "tcg,thread=single";

/// The kernel's parameters. Before 6.6 each place of a probe waits for two of RCU's grace periods when it is detached,
/// one place after the other, and a grace period is many switches between two slow processors: expedited, hundreds of
/// places take half the time.
const GRACE_PERIODS: &str = "rcupdate.rcu_expedited=1";

/// One page table for the kernel and its processes on aarch64. The emulated Neoverse N1 does not say, as real ones do,
/// that it needs no second one, and to change it at every system call takes an emulator a quarter of all its time.
const ONE_TABLE: &str = "kpti=off";

/// Lines of a guest's console that are shown when it did not come to its end.
const LAST_LINES: usize = 30;

/// What became of one test.
pub(super) struct Outcome {
    /// Its binary and name.
    pub(super) name: String,
    pub(super) passed: bool,
    /// Seconds by the guest's clock.
    pub(super) seconds: f64,
    /// Everything that it wrote.
    pub(super) output: String,
}

impl Outcome {
    /// What it says that it did not test.
    pub(super) fn untested(&self) -> impl Iterator<Item = &str> {
        self.output
            .lines()
            .filter(|line| line.to_lowercase().contains("not tested"))
    }
}

/// What became of a guest.
pub(super) struct Report {
    /// As the kernel calls itself; empty when it did not get so far.
    pub(super) release: String,
    pub(super) outcomes: Vec<Outcome>,
    /// How many tests it was to run.
    tests: usize,
    /// What the kernel complained of: its own bugs and warnings.
    pub(super) complaints: Vec<String>,
    /// Why not every test ran, with the end of the console.
    pub(super) cut_short: Option<String>,
    /// From its start to its end, by this machine's clock.
    pub(super) took: Duration,
}

impl Report {
    pub(super) fn passed(&self) -> usize {
        let passed = self.outcomes.iter().filter(|outcome| outcome.passed);
        passed.count()
    }

    /// Those that failed, or did not run.
    pub(super) fn failed(&self) -> usize {
        self.tests - self.passed()
    }

    /// Whether everything ran, and as it should.
    pub(super) fn is_good(&self) -> bool {
        self.cut_short.is_none()
            && self.complaints.is_empty()
            && self.passed() == self.tests
            && self.outcomes.len() == self.tests
    }
}

/// What boots, and what is in it.
pub(super) struct Guest {
    pub(super) arch: Arch,
    pub(super) kernel: Kernel,
    pub(super) initramfs: PathBuf,
    /// How many tests it runs.
    pub(super) tests: usize,
}

impl Guest {
    /// Where everything goes that its console shows.
    pub(super) fn log(&self) -> PathBuf {
        self.initramfs
            .with_file_name(format!("{}.log", self.kernel.series))
    }
}

/// Boots a guest, and waits for its end.
pub(super) fn run(guest: &Guest) -> Result<Report> {
    let start = Instant::now();
    let log = guest.log();
    let mut qemu = qemu(guest).limit(LIMIT).start()?;
    let console = qemu.stdout.take().context("qemu has no output")?;
    let mut file =
        std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut reading = Reading::default();
    for line in BufReader::new(console).split(b'\n') {
        let line = line?;
        file.write_all(&line)?;
        file.write_all(b"\n")?;
        reading.line(String::from_utf8_lossy(&line).trim_end_matches('\r'));
    }
    qemu.wait()?;
    Ok(reading.report(guest.tests, start.elapsed()))
}

/// The emulator's command line. The kernel ends the guest when it panics.
fn qemu(guest: &Guest) -> Run {
    let (program, machine, console): (_, &[&str], _) = match guest.arch {
        Arch::X86_64 => (
            "qemu-system-x86_64",
            &["-M", "q35", "-accel", TCG, "-cpu", "max"],
            "ttyS0",
        ),
        // A server's, which notes by itself that a page is used: one before Armv8.1, as the Cortex-A72, faults there, which
        // a program of a probe cannot afford. `-cpu max` is slower.
        Arch::Aarch64 => (
            "qemu-system-aarch64",
            &["-M", "virt", "-accel", TCG, "-cpu", "neoverse-n1"],
            "ttyAMA0",
        ),
    };
    Run::new(program)
        .args(machine)
        .args(["-m", MEMORY, "-smp", CPUS])
        .args(["-display", "none", "-monitor", "none", "-nic", "none"])
        .args(["-serial", "stdio", "-no-reboot", "-kernel"])
        .arg(&guest.kernel.image)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .arg("-append")
        .arg(format!(
            "console={console} panic=-1 quiet loglevel=3 {GRACE_PERIODS} {ONE_TABLE}"
        ))
}

/// A console as it is read.
#[derive(Default)]
struct Reading {
    release: String,
    outcomes: Vec<Outcome>,
    complaints: Vec<String>,
    /// The test that runs, and what it wrote so far.
    running: Option<(String, String)>,
    last: Vec<String>,
    done: bool,
}

impl Reading {
    fn line(&mut self, line: &str) {
        self.last.push(line.to_owned());
        if self.last.len() > LAST_LINES {
            self.last.remove(0);
        }
        // The kernel may have written before it on the same line.
        let Some((before, said)) = line.split_once(MARK) else {
            self.keep(line);
            return;
        };
        self.keep(before);
        let words: Vec<&str> = said.split_whitespace().collect();
        match words[..] {
            ["boot", release, _] => self.release = release.to_owned(),
            ["begin", binary, test] => {
                self.running = Some((format!("{binary}::{test}"), String::new()));
            }
            ["end", code, begun, ended] => self.end(code, begun, ended),
            ["kernel", ..] => self.complaints.push(said.to_owned()),
            ["done", _] => self.done = true,
            _ => self.keep(said),
        }
    }

    fn keep(&mut self, text: &str) {
        if let Some((_, output)) = &mut self.running
            && !text.is_empty()
        {
            output.push_str(text);
            output.push('\n');
        }
    }

    fn end(&mut self, code: &str, begun: &str, ended: &str) {
        let Some((name, mut output)) = self.running.take() else {
            return;
        };
        let seconds = |text: &str| text.parse::<f64>().unwrap_or_default();
        // A name that no test has is no success.
        let passed = code == "0" && output.contains("test result: ok. 1 passed");
        // SIGKILL, of timeout(1).
        if code == "137" {
            output.push_str("it took too long, and was killed\n");
        }
        self.outcomes.push(Outcome {
            name,
            passed,
            seconds: seconds(ended) - seconds(begun),
            output,
        });
    }

    fn report(mut self, tests: usize, took: Duration) -> Report {
        let cut_short = (!self.done).then(|| {
            let during = match &self.running {
                Some((name, _)) => format!("during {name}"),
                None if self.outcomes.is_empty() => "before the first test".to_owned(),
                None => "between two tests".to_owned(),
            };
            let how = if took >= LIMIT { "it hung" } else { "it ended" };
            format!("{how} {during}; its last lines:\n{}", self.last.join("\n"))
        });
        if let Some((name, output)) = self.running.take() {
            self.outcomes.push(Outcome {
                name,
                passed: false,
                seconds: 0.0,
                output,
            });
        }
        Report {
            release: self.release,
            outcomes: self.outcomes,
            tests,
            complaints: self.complaints,
            cut_short,
            took,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest that was to run so many tests wrote.
    fn read(tests: usize, console: &str) -> Report {
        let mut reading = Reading::default();
        console.lines().for_each(|line| reading.line(line));
        reading.report(tests, Duration::from_secs(1))
    }

    const PASSED: &str = "test result: ok. 1 passed; 0 failed";

    #[test]
    fn a_guest_that_comes_to_its_end_is_read() {
        let console = format!(
            "booting\n@@ boot 6.1.0 3.5\n@@ begin flow a\n{PASSED}\n@@ end 0 3.50 5.75\n\
             @@ begin flow b\npanicked\n@@ end 101 6.00 6.25\n@@ begin flow c\n\
             test result: ok. 0 passed\n[  7.1] noise @@ end 0 6.25 6.50\n@@ done 7.0\n"
        );
        let report = read(3, &console);
        assert_eq!(report.release, "6.1.0");
        assert!(report.cut_short.is_none());
        let told: Vec<_> = report
            .outcomes
            .iter()
            .map(|outcome| (outcome.name.as_str(), outcome.passed, outcome.seconds))
            .collect();
        assert_eq!(
            told,
            [
                ("flow::a", true, 2.25),
                ("flow::b", false, 0.25),
                ("flow::c", false, 0.25)
            ]
        );
        assert!(report.outcomes[2].output.contains("noise"));
        assert!(!report.is_good());
    }

    #[test]
    fn a_guest_is_good_when_each_test_passed_and_the_kernel_did_not_complain() {
        let console = |last: &str| {
            format!("@@ boot 6.1.0 3.5\n@@ begin flow a\n{PASSED}\n@@ end 0 3.5 5.7\n{last}")
        };
        let done = console("@@ done 9.5\n");
        assert!(read(1, &done).is_good());
        // One did not run, it ended too early, the kernel complained.
        assert!(!read(2, &done).is_good());
        assert!(!read(1, &console("")).is_good());
        let complained = read(
            1,
            &console("@@ kernel [ 9.1] WARNING: CPU: 0\n@@ done 9.5\n"),
        );
        assert_eq!(complained.complaints.len(), 1);
        assert!(!complained.is_good());
    }

    #[test]
    fn a_guest_that_panics_failed_in_the_test_that_ran() {
        let report = read(
            1,
            "@@ boot 6.1.0 3.5\n@@ begin flow a\nKernel panic - not syncing\n",
        );
        let why = report.cut_short.expect("a reason");
        assert!(why.starts_with("it ended during flow::a"), "{why}");
        assert!(why.contains("Kernel panic"), "{why}");
        assert_eq!(report.outcomes.len(), 1);
        assert!(!report.outcomes[0].passed);
        let report = read(1, "no boot\n").cut_short.expect("a reason");
        assert!(report.contains("before the first test"), "{report}");
    }
}
