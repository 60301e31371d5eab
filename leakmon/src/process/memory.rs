//! The only reader of a target's memory.
//!
//! Reads go through `process_vm_readv`, which neither stops nor touches the
//! target. It names the process by pid, and a pid can come to mean another
//! program: by `exec`, or by reuse. So [`ProcessMemory`] also keeps
//! `/proc/PID/mem` open, which stays bound to the address space it was opened
//! on: as long as a byte can be read through it, the pid still means the same
//! program.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

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
    #[error("reading its memory is not permitted; leakmon needs CAP_SYS_PTRACE, or to run as root")]
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

/// The memory of a live process.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: Pid,
    /// `/proc/PID/mem`: bound to one address space for ever.
    witness: File,
    /// An address that the program has mapped for as long as it lives: its ELF
    /// header or any page of its text.
    anchor: RuntimeAddr,
}

impl ProcessMemory {
    /// Opens the memory of `pid`, which must have `anchor` mapped.
    ///
    /// # Errors
    /// [`MemoryError::Gone`] and [`MemoryError::NotPermitted`] among others.
    pub fn open(pid: u32, anchor: RuntimeAddr) -> Result<ProcessMemory, MemoryError> {
        let witness = File::open(format!("/proc/{pid}/mem")).map_err(|e| from_io(&e))?;
        let memory = ProcessMemory {
            pid: Pid::from_raw(pid.cast_signed()),
            witness,
            anchor,
        };
        memory.still_the_same()?;
        Ok(memory)
    }

    fn gone_or_replaced(&self) -> MemoryError {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        let alive = stat.is_ok_and(|stat| {
            let state = stat
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next());
            !matches!(state, Some('Z' | 'X' | 'x') | None)
        });
        if alive {
            MemoryError::Replaced
        } else {
            MemoryError::Gone
        }
    }
}

fn from_io(error: &io::Error) -> MemoryError {
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
        // A read of an address space that nobody uses any more returns 0 bytes:
        // fs/proc/base.c, mem_rw.
        match self.witness.read_at(&mut [0], self.anchor.0) {
            Ok(1..) => Ok(()),
            Ok(_) => Err(self.gone_or_replaced()),
            Err(error) => Err(from_io(&error)),
        }
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
                Err(Errno::ESRCH) => return Err(self.gone_or_replaced()),
                Err(errno) => return Err(from_errno(errno)),
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(anchor: &[u8]) -> ProcessMemory {
        ProcessMemory::open(std::process::id(), RuntimeAddr(anchor.as_ptr() as u64)).unwrap()
    }

    #[test]
    fn reads_ranges_in_order_and_says_where_it_stopped() {
        let bytes: Vec<u8> = (0..200).collect();
        let memory = own(&bytes);
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
        let memory = own(&bytes);
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
        let sleep = |child: &std::process::Child| {
            let auxv = std::fs::read(format!("/proc/{}/auxv", child.id())).unwrap();
            crate::process::identity::auxv_entry(&auxv, crate::process::identity::AT_ENTRY)
        };
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "read line; exec sleep 100"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let wait_for = |name: &str, pid: u32| {
            for _ in 0..1000 {
                if std::fs::read_to_string(format!("/proc/{pid}/comm"))
                    .unwrap()
                    .trim()
                    == name
                {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        };
        wait_for("sh", child.id());
        let memory = ProcessMemory::open(child.id(), RuntimeAddr(sleep(&child).unwrap())).unwrap();
        assert_eq!(memory.still_the_same(), Ok(()));
        drop(child.stdin.take());
        wait_for("sleep", child.id());
        assert_eq!(memory.still_the_same(), Err(MemoryError::Replaced));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(memory.still_the_same(), Err(MemoryError::Gone));
    }
}
