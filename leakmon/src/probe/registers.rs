//! The registers of a process's threads: read by the kernel itself, without
//! ptrace and without stopping anything.

use std::io::Read as _;

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
