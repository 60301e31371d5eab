//! Who a process is: its executable, start time and threads, by `/proc`.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use procfs::ProcError;
use procfs::process::{Process as ProcfsProcess, Stat};

use super::capabilities;
use super::memory::{MemoryError, Witness};
use crate::binary::addr::{LoadBias, Vaddr};
use crate::task::human::safe;

/// `AT_ENTRY` of the auxiliary vector: include/uapi/linux/auxvec.h.
pub(crate) const AT_ENTRY: u64 = 9;

/// Why a process cannot be watched at all.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// No process has this pid.
    #[error("pid {0}: no such process")]
    NoSuchProcess(u32),
    /// It ended, and its parent has not noticed yet.
    #[error("pid {0} ({1}): has ended; its parent has yet to reap it")]
    Zombie(u32, String),
    /// It is part of the kernel.
    #[error("pid {0} ({1}): a kernel thread, it runs no program")]
    KernelThread(u32, String),
    /// The kernel refuses to say.
    #[error("pid {0} ({1}): {2} is not permitted: {why}", why = capabilities::why_not_read())]
    NotPermitted(u32, String, &'static str),
    /// Its first thread has ended and others run on, which only C can do. The
    /// kernel then shows neither its executable nor its memory.
    #[error(
        "pid {0} ({1}): its main thread has ended while others run on; such a process cannot be read"
    )]
    MainThreadEnded(u32, String),
    /// Anything else.
    #[error("pid {0}: {1}")]
    Other(u32, String),
}

/// A process, told from every other that had or will have its pid.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Process id, in leakmon's pid namespace.
    pub pid: u32,
    /// Clock ticks from boot to its start: `/proc/PID/stat` field 22.
    pub start_time: u64,
    /// The real user id, as leakmon's own user namespace has it.
    pub uid: u32,
    /// What `/proc/PID/exe` points to; ends in ` (deleted)` when the file is.
    pub executable: PathBuf,
    /// The command line, one string an argument.
    pub command_line: Vec<String>,
}

/// A process that was there when it was opened.
#[derive(Debug)]
pub struct Process {
    /// Who it is.
    pub identity: Identity,
    /// The program that it runs, whatever has become of its path since.
    pub executable: File,
    /// `AT_ENTRY`: where its program starts, after relocation.
    entry: u64,
    /// Tells whether it still runs that program.
    pub(super) witness: Arc<Witness>,
}

/// Times a process that replaces its program while it is opened is opened
/// again.
const RETRIES: usize = 16;

/// How long the kernel may take to put a new program into memory. It reads the
/// program's first pages from its file system meanwhile.
const EXEC: Duration = Duration::from_millis(200);

/// Most bytes of a command line that are kept. A process can make its own as
/// long as its memory.
const MAX_COMMAND_LINE: u64 = 1 << 16;

impl Process {
    /// Opens process `pid`.
    ///
    /// # Errors
    /// [`ProcessError`], which names the process.
    pub fn open(pid: u32) -> Result<Process, ProcessError> {
        let until = Instant::now() + EXEC;
        for _ in 0..RETRIES {
            let mut process = Process::look(pid)?;
            while process.witness.is_amid_exec() {
                if Instant::now() > until {
                    let why = "its program is not loaded, as amid an exec";
                    return Err(ProcessError::Other(pid, why.to_owned()));
                }
                std::thread::sleep(Duration::from_millis(1));
                process = Process::look(pid)?;
            }
            // All of it was read of one program when that one still runs.
            match process.still_runs() {
                Ok(()) => return Ok(process),
                Err(MemoryError::Gone | MemoryError::Replaced) => {}
                Err(error) => return Err(ProcessError::Other(pid, error.to_string())),
            }
        }
        let why = "it replaces its program faster than it can be looked at";
        Err(ProcessError::Other(pid, why.to_owned()))
    }

    fn look(pid: u32) -> Result<Process, ProcessError> {
        let failed = |error: ProcError| match error {
            ProcError::NotFound(_) => ProcessError::NoSuchProcess(pid),
            // It ended while its files were open.
            ProcError::Io(error, _) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {
                ProcessError::NoSuchProcess(pid)
            }
            other => ProcessError::Other(pid, other.to_string()),
        };
        let signed = i32::try_from(pid).map_err(|_| ProcessError::NoSuchProcess(pid))?;
        if pid == 0 {
            return Err(ProcessError::NoSuchProcess(pid));
        }
        let process = ProcfsProcess::new(signed).map_err(failed)?;
        let stat = process.stat().map_err(failed)?;
        let comm = safe(&stat.comm).into_owned();
        if has_ended(&stat) {
            return Err(match stat.num_threads {
                ..=1 => ProcessError::Zombie(pid, comm),
                _ => ProcessError::MainThreadEnded(pid, comm),
            });
        }
        // PF_KTHREAD, include/linux/sched.h.
        if stat.flags & 0x0020_0000 != 0 {
            return Err(ProcessError::KernelThread(pid, comm));
        }
        let link = format!("/proc/{pid}/exe");
        // An ending process gives up its files before it counts as ended.
        let ended = || match self::stat(pid) {
            Some(now) if now.starttime == stat.starttime => ProcessError::Zombie(pid, comm.clone()),
            _ => ProcessError::NoSuchProcess(pid),
        };
        let on_io = |what: &'static str| {
            let (comm, ended) = (comm.clone(), &ended);
            move |error: io::Error| match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EACCES | Errno::EPERM) => ProcessError::NotPermitted(pid, comm, what),
                Some(Errno::ESRCH | Errno::ENOENT) => ended(),
                _ => ProcessError::Other(pid, format!("{what}: {error}")),
            }
        };
        let witness =
            Witness::open(pid, stat.starttime).map_err(on_io("reading its auxiliary vector"))?;
        if witness.auxv().is_empty() {
            return Err(ended());
        }
        let path = std::fs::read_link(&link).map_err(on_io("reading /proc/PID/exe"))?;
        let executable = File::open(&link).map_err(on_io("opening its executable"))?;
        let uid = process.status().map_err(failed)?.ruid;
        let entry = auxv_entry(witness.auxv(), AT_ENTRY).unwrap_or(0);
        Ok(Process {
            identity: Identity {
                pid,
                start_time: stat.starttime,
                uid,
                executable: path,
                command_line: command_line(pid).unwrap_or_default(),
            },
            executable,
            entry,
            witness: Arc::new(witness),
        })
    }

    /// Tells whether it lives and still runs the program that it ran when it
    /// was opened.
    ///
    /// # Errors
    /// [`MemoryError::Gone`] and [`MemoryError::Replaced`] among others.
    pub fn still_runs(&self) -> Result<(), MemoryError> {
        self.witness.check()
    }

    /// How far the program was moved from the addresses in its file, given the
    /// file's `e_entry`.
    pub fn load_bias(&self, e_entry: Vaddr) -> LoadBias {
        LoadBias(self.entry.wrapping_sub(e_entry.0))
    }
}

/// The value of `key` in an auxiliary vector of 64-bit words.
pub(crate) fn auxv_entry(auxv: &[u8], key: u64) -> Option<u64> {
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_le_bytes);
    auxv.chunks_exact(16)
        .find_map(|pair| (word(&pair[..8])? == key).then(|| word(&pair[8..]))?)
}

impl Identity {
    /// `pid 4242 (/usr/bin/x)`: how messages name a process.
    pub fn describe(&self) -> String {
        format!(
            "pid {} ({})",
            self.pid,
            safe(&self.executable.to_string_lossy())
        )
    }

    /// What is added to the process's CLOCK_MONOTONIC to get leakmon's own, in
    /// nanoseconds: 0 unless one of them runs in a time namespace.
    pub fn clock_offset_ns(&self) -> i64 {
        let own = monotonic_offset_ns("self");
        own.saturating_sub(monotonic_offset_ns(&self.pid.to_string()))
    }

    /// Live threads, by `/proc/PID/stat`; `None` when it is gone.
    pub fn threads(&self) -> Option<u64> {
        let stat = stat(self.pid).filter(|stat| stat.starttime == self.start_time)?;
        u64::try_from(stat.num_threads).ok()
    }
}

/// The command line, as much of it as is kept.
fn command_line(pid: u32) -> io::Result<Vec<String>> {
    let mut bytes = Vec::new();
    let file = File::open(format!("/proc/{pid}/cmdline"))?;
    file.take(MAX_COMMAND_LINE).read_to_end(&mut bytes)?;
    let arguments = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    if arguments.is_empty() {
        return Ok(Vec::new());
    }
    let text = |argument: &[u8]| String::from_utf8_lossy(argument).into_owned();
    Ok(arguments.split(|byte| *byte == 0).map(text).collect())
}

/// What `/proc/PID/stat` says of `pid`; `None` when there is no such process.
pub(super) fn stat(pid: u32) -> Option<Stat> {
    ProcfsProcess::new(pid.cast_signed()).ok()?.stat().ok()
}

/// Whether a process's main thread has ended.
pub(super) fn has_ended(stat: &Stat) -> bool {
    matches!(stat.state, 'Z' | 'X' | 'x')
}

/// How far the time namespace of a process moves its CLOCK_MONOTONIC, in
/// nanoseconds (man 7 time_namespaces); 0 before kernel 5.6, which has none.
fn monotonic_offset_ns(process: &str) -> i64 {
    std::fs::read_to_string(format!("/proc/{process}/timens_offsets"))
        .ok()
        .and_then(|text| parse_monotonic_offset(&text))
        .unwrap_or(0)
}

/// The offset in the line `monotonic SECONDS NANOSECONDS`.
fn parse_monotonic_offset(text: &str) -> Option<i64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("monotonic"))?;
    let mut numbers = line.split_whitespace().map(str::parse::<i64>);
    let (seconds, nanos) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_of_time_namespaces() {
        let text = "monotonic      172800         5\nboottime            -3         0\n";
        assert_eq!(parse_monotonic_offset(text), Some(172_800_000_000_005));
        assert_eq!(
            parse_monotonic_offset("monotonic -1 0"),
            Some(-1_000_000_000)
        );
        assert_eq!(parse_monotonic_offset("monotonic 99999999999999 0"), None);
        assert_eq!(parse_monotonic_offset("boottime 1 0"), None);
    }

    #[test]
    fn opens_itself() {
        let own = Process::open(std::process::id()).unwrap();
        assert_eq!(own.identity.executable, std::env::current_exe().unwrap());
        assert_eq!(own.still_runs(), Ok(()));
        assert!(own.identity.threads().unwrap() >= 1);
        let elf = crate::binary::elf::Elf::parse(&own.executable).unwrap();
        let here = opens_itself as fn() as usize as u64;
        let vaddr = own
            .load_bias(elf.entry)
            .vaddr(crate::binary::addr::RuntimeAddr(here));
        assert!(
            elf.file_offset(vaddr).is_some(),
            "{vaddr} is not in the file"
        );
    }

    #[test]
    fn names_what_cannot_be_watched() {
        assert!(matches!(
            Process::open(0),
            Err(ProcessError::NoSuchProcess(0))
        ));
        assert!(matches!(
            Process::open(u32::MAX),
            Err(ProcessError::NoSuchProcess(u32::MAX))
        ));
        // kthreadd is always pid 2 outside of a pid namespace.
        if std::fs::read_to_string("/proc/2/comm").is_ok_and(|c| c == "kthreadd\n") {
            let error = Process::open(2).unwrap_err();
            assert_eq!(
                error.to_string(),
                "pid 2 (kthreadd): a kernel thread, it runs no program"
            );
        }
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let error = loop {
            if let Err(error) = Process::open(child.id()) {
                break error;
            }
        };
        assert!(matches!(error, ProcessError::Zombie(..)), "{error}");
        child.wait().unwrap();
        assert!(matches!(
            Process::open(child.id()),
            Err(ProcessError::NoSuchProcess(_))
        ));
    }

    /// The parent goes on when the child has its new memory, which is before
    /// the kernel put the program into it.
    #[test]
    fn what_is_opened_amid_an_exec_is_the_new_program() {
        let mut was = Vec::new();
        for _ in 0..30 {
            let mut opened = Vec::new();
            for _ in 0..10 {
                let child = std::process::Command::new("/bin/sleep")
                    .arg("100")
                    .spawn()
                    .unwrap();
                opened.push((Process::open(child.id()), child));
            }
            for (process, mut child) in opened {
                let still = process.as_ref().map(|p| (p.still_runs(), p.entry != 0));
                was.push(format!("{still:?}"));
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
        was.retain(|told| told != "Ok((Ok(()), true))");
        assert!(was.is_empty(), "{} of 300: {was:?}", was.len());
    }
}
