//! The registers of a process's threads: read by the kernel itself, without
//! ptrace and without stopping anything.

use std::io::{PipeWriter, Read as _};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use leakmon_common::threads::ThreadRecord;

use super::error::Error;

/// One thread, as the kernel saw it for a moment.
///
/// The registers are those with which it last entered the kernel. They hold for
/// as long as it is there: of a thread that runs in user space they are old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadRegisters {
    /// Thread id.
    pub tid: u32,
    /// `TASK_RUNNING` is 0, `TASK_INTERRUPTIBLE` 1, `TASK_UNINTERRUPTIBLE` 2; the
    /// kernel has more bits (include/linux/sched.h).
    pub state: u32,
    /// Times that it gave up its CPU: equal in two readings of a blocked thread,
    /// it was blocked all the time.
    pub voluntary_switches: u64,
    /// Times that its CPU was taken.
    pub involuntary_switches: u64,
    /// Instruction pointer: RIP / PC.
    pub ip: u64,
    /// Stack pointer: RSP / SP.
    pub sp: u64,
    /// Frame pointer: RBP / X29.
    pub frame: u64,
    /// X30; 0 on x86_64.
    pub link: u64,
    /// Number of the system call that it is in.
    pub syscall: Option<u32>,
}

impl ThreadRegisters {
    /// It was not running, nor ready to: its registers hold.
    pub fn is_blocked(&self) -> bool {
        self.state != 0
    }
}

impl From<ThreadRecord> for ThreadRegisters {
    fn from(record: ThreadRecord) -> ThreadRegisters {
        ThreadRegisters {
            tid: record.tid,
            state: record.state,
            voluntary_switches: record.voluntary,
            involuntary_switches: record.involuntary,
            ip: record.ip,
            sp: record.sp,
            frame: record.frame,
            link: record.link,
            syscall: u32::try_from(record.syscall).ok(),
        }
    }
}

/// Reads every record.
pub(super) fn read(mut file: std::fs::File) -> Result<Vec<ThreadRegisters>, Error> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|source| Error::Map {
        what: "read the threads' registers",
        source,
    })?;
    Ok(bytes
        .chunks_exact(size_of::<ThreadRecord>())
        .map(|bytes| {
            // SAFETY: as many bytes, and every bit pattern is a value.
            let record: ThreadRecord =
                unsafe { bytes.as_ptr().cast::<ThreadRecord>().read_unaligned() };
            ThreadRegisters::from(record)
        })
        .collect())
}

/// Sizes of a thread's stack in the kernel (`THREAD_SIZE`), the usual one first:
/// x86_64 has 16 KiB, or 32 with KASAN; arm64 16, or 64 with pages of that size.
pub(super) const STACK_SIZES: [u32; 3] = [16 << 10, 32 << 10, 64 << 10];

/// A thread of leakmon's own that waits in read(2), by which registers are proven
/// to be a thread's.
pub(super) struct Witness {
    /// What it waits for; `None` ends it.
    pipe: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
    tid: u32,
    /// What `/proc` says of it.
    ip: u64,
    sp: u64,
}

impl Witness {
    /// Starts it, and waits until it waits.
    ///
    /// # Errors
    ///
    /// [`Error::File`], also when it does not come to wait within a second.
    pub(super) fn start() -> Result<Witness, Error> {
        let failed = |source| Error::File {
            path: "/proc/self/task".into(),
            source,
        };
        let (mut read, write) = std::io::pipe().map_err(failed)?;
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            // Nobody may want to know any more.
            let _ = tell.send(nix::unistd::gettid());
            let _ = read.read(&mut [0]);
        });
        let tid = told
            .recv()
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let mut witness = Witness {
            pipe: Some(write),
            thread: Some(thread),
            tid: tid.as_raw().cast_unsigned(),
            ip: 0,
            sp: 0,
        };
        let path = format!("/proc/self/task/{tid}/syscall");
        let until = Instant::now() + Duration::from_secs(1);
        loop {
            let text = std::fs::read_to_string(&path).map_err(failed)?;
            if let Some((ip, sp)) = waits_in_read(&text) {
                (witness.ip, witness.sp) = (ip, sp);
                return Ok(witness);
            }
            if Instant::now() > until {
                return Err(failed(std::io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether its registers are among these.
    pub(super) fn is_in(&self, registers: &[ThreadRegisters]) -> bool {
        registers.iter().any(|registers| {
            registers.tid == self.tid
                && registers.ip == self.ip
                && registers.sp == self.sp
                && registers.syscall.map(i64::from) == Some(libc::SYS_read)
        })
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.pipe = None;
        if let Some(thread) = self.thread.take() {
            // It did not panic: it only reads.
            let _ = thread.join();
        }
    }
}

/// Instruction and stack pointer of a thread that is in read(2), of its
/// `/proc/PID/task/TID/syscall` (fs/proc/base.c, `proc_pid_syscall`).
fn waits_in_read(text: &str) -> Option<(u64, u64)> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [number, .., sp, ip] = words[..] else {
        return None;
    };
    let hexadecimal = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    if number.parse() != Ok(libc::SYS_read) {
        return None;
    }
    Some((hexadecimal(ip)?, hexadecimal(sp)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_in_read_is_told_from_others() {
        let read = libc::SYS_read;
        let line = format!("{read} 0x3 0x7f 0x1 0x0 0x0 0x0 0x7ffd10 0x7f8a20\n");
        assert_eq!(waits_in_read(&line), Some((0x7f8a20, 0x7ffd10)));
        for other in ["running\n", "", "-1 0x7ffd10 0x7f8a20", "999 0x1 0x2"] {
            assert_eq!(waits_in_read(other), None, "{other}");
        }
    }

    #[test]
    fn a_witness_waits() {
        let witness = Witness::start().unwrap();
        let right = ThreadRegisters {
            tid: witness.tid,
            state: 1,
            voluntary_switches: 1,
            involuntary_switches: 0,
            ip: witness.ip,
            sp: witness.sp,
            frame: 0,
            link: 0,
            syscall: u32::try_from(libc::SYS_read).ok(),
        };
        assert!(witness.is_in(&[right]));
        let wrong = ThreadRegisters { sp: 0, ..right };
        assert!(!witness.is_in(&[wrong]));
    }
}
