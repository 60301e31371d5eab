//! The only reader of a target's memory.
//!
//! Reads go through `process_vm_readv`, which neither stops nor touches the
//! target. It names the process by pid, and a pid can come to mean another
//! program: by `exec`, or by reuse. So there is a [`Witness`], which tells.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::capabilities;
use super::identity::{self, Process};
use crate::binary::addr::RuntimeAddr;

/// Most ranges that the kernel takes in one call: `UIO_MAXIOV`,
/// include/uapi/linux/uio.h.
const MAX_RANGES: usize = 1024;

/// Why a target's memory could not be read.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum MemoryError {
    /// The process has ended.
    #[error("the process has ended")]
    Gone,
    /// The pid runs another program now.
    #[error("the process replaced its program by exec")]
    Replaced,
    /// The kernel refuses.
    #[error(
        "reading its memory is not permitted: {}",
        capabilities::why_not_read()
    )]
    NotPermitted,
    /// Nothing is mapped at the address.
    #[error("nothing is mapped at {0}")]
    Unmapped(RuntimeAddr),
    /// Anything else.
    #[error("reading its memory: {0}")]
    Other(Errno),
}

/// A range of a target's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where it starts.
    pub addr: RuntimeAddr,
    /// Bytes.
    pub len: usize,
}

/// Something whose memory can be read: a process, or a test's byte array.
pub trait Memory {
    /// Fills `buf` from `addr`.
    ///
    /// # Errors
    /// [`MemoryError`]; nothing is promised of `buf` then.
    fn read(&self, addr: RuntimeAddr, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Fills `buf` with the ranges one after the other, in their order.
    ///
    /// Returns how many bytes were read before the first that could not be.
    /// The later ranges are read after the earlier ones: a caller that reads a
    /// stack and then its goroutine's state relies on it.
    ///
    /// # Errors
    /// [`MemoryError`], when nothing at all could be read for a reason other
    /// than an unmapped address.
    fn read_ranges(&self, ranges: &[Range], buf: &mut [u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        for range in ranges {
            let Some(part) = buf.get_mut(done..done + range.len) else {
                break;
            };
            match self.read(range.addr, part) {
                Ok(()) => done += range.len,
                Err(MemoryError::Unmapped(_)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Tells whether everything read so far came from the same program.
    ///
    /// # Errors
    /// [`MemoryError::Gone`] or [`MemoryError::Replaced`].
    fn still_the_same(&self) -> Result<(), MemoryError>;

    /// The little-endian word at `addr`.
    ///
    /// # Errors
    /// As [`Memory::read`].
    fn u64_at(&self, addr: RuntimeAddr) -> Result<u64, MemoryError> {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// `len` bytes at `addr`. The caller bounds `len`.
    ///
    /// # Errors
    /// As [`Memory::read`].
    fn bytes(&self, addr: RuntimeAddr, len: usize) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; len];
        self.read(addr, &mut bytes)?;
        Ok(bytes)
    }
}

/// Bound to one program of one process for as long as it runs.
///
/// `/proc/PID/mem` stays bound to the address space that it was opened on,
/// which nobody uses any more after an end or an `exec`. The auxiliary vector
/// says so too, of a process whose memory may not be read: it holds addresses
/// that the kernel chooses afresh at each `exec`.
#[derive(Debug)]
pub(super) struct Witness {
    pid: u32,
    start_time: u64,
    memory: Result<File, MemoryError>,
    auxv: Vec<u8>,
}

impl Witness {
    /// A witness of what process `pid` runs now.
    ///
    /// # Errors
    /// When its auxiliary vector cannot be read. That its memory cannot is an
    /// error of [`ProcessMemory::open`] only.
    pub(super) fn open(pid: u32, start_time: u64) -> io::Result<Witness> {
        Ok(Witness {
            pid,
            start_time,
            memory: File::open(format!("/proc/{pid}/mem")).map_err(|error| from_io(&error)),
            auxv: read_auxv(pid)?,
        })
    }

    /// The program's auxiliary vector.
    pub(super) fn auxv(&self) -> &[u8] {
        &self.auxv
    }

    /// Tells whether the process has its new memory and not yet its new program
    /// in it: the kernel writes the vector when it has loaded the program
    /// (`create_elf_tables`, fs/binfmt_elf.c).
    pub(super) fn is_amid_exec(&self) -> bool {
        self.auxv.iter().all(|byte| *byte == 0)
    }

    /// Tells whether the process still runs the program.
    pub(super) fn check(&self) -> Result<(), MemoryError> {
        // A read of an address space that nobody uses any more returns 0 bytes,
        // one of an address that is not mapped fails: fs/proc/base.c, mem_rw.
        if let Ok(memory) = &self.memory
            && let Ok(0) = memory.read_at(&mut [0], 0)
        {
            return Err(self.gone_or_replaced());
        }
        match read_auxv(self.pid) {
            Ok(auxv) if auxv == self.auxv => Ok(()),
            Err(error) if from_io(&error) == MemoryError::NotPermitted => {
                Err(MemoryError::NotPermitted)
            }
            _ => Err(self.gone_or_replaced()),
        }
    }

    /// Which of both, of a process of which one is true.
    fn gone_or_replaced(&self) -> MemoryError {
        let lives = identity::stat(self.pid)
            .is_some_and(|stat| stat.starttime == self.start_time && !identity::has_ended(&stat));
        // An ending process gives up its memory before it counts as ended.
        if lives && read_auxv(self.pid).is_ok_and(|auxv| !auxv.is_empty()) {
            MemoryError::Replaced
        } else {
            MemoryError::Gone
        }
    }
}

fn read_auxv(pid: u32) -> io::Result<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/auxv"))
}

/// The memory of a live process.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: Pid,
    witness: Arc<Witness>,
}

impl ProcessMemory {
    /// The memory of `process`.
    ///
    /// # Errors
    /// [`MemoryError::Gone`] and [`MemoryError::NotPermitted`] among others.
    pub fn open(process: &Process) -> Result<ProcessMemory, MemoryError> {
        let witness = Arc::clone(&process.witness);
        if let Err(error) = &witness.memory {
            return Err(error.clone());
        }
        witness.check()?;
        Ok(ProcessMemory {
            pid: Pid::from_raw(process.identity.pid.cast_signed()),
            witness,
        })
    }

    /// Of the process.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }
}

pub(super) fn from_io(error: &io::Error) -> MemoryError {
    error
        .raw_os_error()
        .map_or(MemoryError::Other(Errno::EIO), |e| {
            from_errno(Errno::from_raw(e))
        })
}

fn from_errno(errno: Errno) -> MemoryError {
    match errno {
        Errno::ESRCH | Errno::ENOENT => MemoryError::Gone,
        Errno::EPERM | Errno::EACCES => MemoryError::NotPermitted,
        other => MemoryError::Other(other),
    }
}

impl Memory for ProcessMemory {
    fn still_the_same(&self) -> Result<(), MemoryError> {
        self.witness.check()
    }

    fn read(&self, addr: RuntimeAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = buf.len();
        let done = self.read_ranges(&[Range { addr, len }], buf)?;
        if done < len {
            return Err(MemoryError::Unmapped(addr.wrapping_add(done as u64)));
        }
        Ok(())
    }

    fn read_ranges(&self, ranges: &[Range], buf: &mut [u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        for batch in ranges.chunks(MAX_RANGES) {
            let remote: Vec<RemoteIoVec> = batch
                .iter()
                .map(|r| RemoteIoVec {
                    base: r.addr.0 as usize,
                    len: r.len,
                })
                .collect();
            let wanted: usize = batch.iter().map(|r| r.len).sum();
            let Some(part) = buf.get_mut(done..done + wanted) else {
                return Err(MemoryError::Other(Errno::EINVAL));
            };
            match process_vm_readv(self.pid, &mut [IoSliceMut::new(part)], &remote) {
                Ok(n) => {
                    done += n;
                    if n < wanted {
                        break;
                    }
                }
                Err(Errno::EFAULT) => break,
                Err(Errno::ESRCH) => return Err(self.witness.gone_or_replaced()),
                Err(errno) => return Err(from_errno(errno)),
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn memory_of(pid: u32) -> ProcessMemory {
        ProcessMemory::open(&Process::open(pid).unwrap()).unwrap()
    }

    fn own() -> ProcessMemory {
        memory_of(std::process::id())
    }

    #[test]
    fn reads_ranges_in_order_and_says_where_it_stopped() {
        let bytes: Vec<u8> = (0..200).collect();
        let memory = own();
        let at = |i: usize| RuntimeAddr(bytes[i..].as_ptr() as u64);
        let ranges = [
            Range {
                addr: at(100),
                len: 3,
            },
            Range {
                addr: at(0),
                len: 2,
            },
            Range {
                addr: RuntimeAddr(8),
                len: 2,
            },
            Range {
                addr: at(5),
                len: 2,
            },
        ];
        let mut buf = [0; 9];
        assert_eq!(memory.read_ranges(&ranges, &mut buf), Ok(5));
        assert_eq!(buf[..5], [100, 101, 102, 0, 1]);
        assert_eq!(
            memory.u64_at(RuntimeAddr(8)),
            Err(MemoryError::Unmapped(RuntimeAddr(8)))
        );
    }

    #[test]
    fn more_ranges_than_one_call_takes() {
        let bytes: Vec<u8> = (0..3000u32).map(|i| (i % 251) as u8).collect();
        let memory = own();
        let ranges: Vec<Range> = (0..3000)
            .map(|i| Range {
                addr: RuntimeAddr(bytes[i..].as_ptr() as u64),
                len: 1,
            })
            .collect();
        let mut buf = vec![0; 3000];
        assert_eq!(memory.read_ranges(&ranges, &mut buf), Ok(3000));
        assert_eq!(buf, bytes);
    }

    #[test]
    fn exec_and_death_are_told_apart() {
        // Another program, then itself: each reads a line and goes on.
        let script = "read line; exec sh -c 'read line; exec sh -c \"read line\"'";
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        for _ in 0..2 {
            let memory = memory_of(child.id());
            assert_eq!(memory.still_the_same(), Ok(()));
            input.write_all(b"\n").unwrap();
            let end = loop {
                match memory.still_the_same() {
                    Ok(()) => std::thread::yield_now(),
                    Err(end) => break end,
                }
            };
            assert_eq!(end, MemoryError::Replaced);
        }
        let memory = memory_of(child.id());
        drop(input);
        let end = loop {
            match memory.still_the_same() {
                Ok(()) => std::thread::yield_now(),
                Err(end) => break end,
            }
        };
        assert_eq!(end, MemoryError::Gone);
        child.wait().unwrap();
        assert_eq!(memory.still_the_same(), Err(MemoryError::Gone));
        assert_eq!(memory.u64_at(RuntimeAddr(8)), Err(MemoryError::Gone));
    }
}
