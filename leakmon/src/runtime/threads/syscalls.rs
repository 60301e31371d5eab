//! What a blocked thread called: `/proc/PID/task/TID/syscall`, and the system
//! calls that block.

use crate::binary::elf::Arch;

/// What the kernel says of a thread that is not running (man 5 proc,
/// fs/proc/base.c: proc_pid_syscall).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// In a system call.
    Call {
        /// Its number.
        number: i64,
        /// Its arguments.
        args: [u64; 6],
        /// The stack pointer at the call.
        sp: u64,
        /// Where it goes on.
        ip: u64,
    },
    /// Blocked all the same, in a page fault or for a signal.
    Outside {
        /// The stack pointer.
        sp: u64,
        /// The instruction that it goes on with.
        ip: u64,
    },
    /// It runs, or is about to.
    Running,
}

impl Blocked {
    /// Reads the file's text; `None` when it is none of the three forms.
    pub(super) fn parse(text: &[u8]) -> Option<Blocked> {
        let text = std::str::from_utf8(text).ok()?.trim_end();
        if text == "running" {
            return Some(Blocked::Running);
        }
        let mut words = text.split(' ');
        let number: i64 = words.next()?.parse().ok()?;
        let mut hex = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        if number == -1 {
            return Some(Blocked::Outside {
                sp: hex()?,
                ip: hex()?,
            });
        }
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = hex()?;
        }
        Some(Blocked::Call {
            number,
            args,
            sp: hex()?,
            ip: hex()?,
        })
    }

    /// Stack and instruction pointer.
    pub(super) fn registers(self) -> Option<(u64, u64)> {
        match self {
            Blocked::Call { sp, ip, .. } | Blocked::Outside { sp, ip } => Some((sp, ip)),
            Blocked::Running => None,
        }
    }
}

/// A system call that may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// The kernel's name.
    pub(super) name: &'static str,
    /// Its first argument is a file descriptor.
    pub(super) fd: bool,
}

impl Call {
    /// The call with this number; `None` for one that is not listed.
    pub(super) fn of(arch: Arch, number: i64) -> Option<Call> {
        CALLS
            .iter()
            .find(|(x86_64, aarch64, ..)| {
                number
                    == match arch {
                        Arch::X86_64 => *x86_64,
                        Arch::Aarch64 => *aarch64,
                    }
            })
            .map(|(.., name, fd)| Call { name, fd: *fd })
    }

    /// Why a thread in this call waits: the call's own name, but for the two
    /// whose names are many.
    pub(super) fn reason(self) -> &'static str {
        match self.name {
            "nanosleep" | "clock_nanosleep" => "sleep",
            "epoll_wait" | "epoll_pwait" | "epoll_pwait2" => "epoll wait",
            "pselect6" => "select",
            "ppoll" => "poll",
            name => name,
        }
    }
}

/// Not on this architecture.
const NONE: i64 = -2;

/// Number on x86-64 (arch/x86/entry/syscalls/syscall_64.tbl) and on AArch64
/// (include/uapi/asm-generic/unistd.h), name, and whether the first argument is
/// a file descriptor. Linux 6.18; numbers never change.
#[rustfmt::skip]
const CALLS: [(i64, i64, &str, bool); 72] = [
    (0, 63, "read", true),
    (1, 64, "write", true),
    (2, NONE, "open", false),
    (3, 57, "close", true),
    (7, NONE, "poll", false),
    (9, 222, "mmap", false),
    (10, 226, "mprotect", false),
    (11, 215, "munmap", false),
    (16, 29, "ioctl", true),
    (17, 67, "pread64", true),
    (18, 68, "pwrite64", true),
    (19, 65, "readv", true),
    (20, 66, "writev", true),
    (23, NONE, "select", false),
    (24, 124, "sched_yield", false),
    (26, 227, "msync", false),
    (28, 233, "madvise", false),
    (34, NONE, "pause", false),
    (35, 101, "nanosleep", false),
    (40, 71, "sendfile", true),
    (42, 203, "connect", true),
    (43, 202, "accept", true),
    (44, 206, "sendto", true),
    (45, 207, "recvfrom", true),
    (46, 211, "sendmsg", true),
    (47, 212, "recvmsg", true),
    (56, 220, "clone", false),
    (58, NONE, "vfork", false),
    (60, 93, "exit", false),
    (61, 260, "wait4", false),
    (65, 193, "semop", false),
    (69, 189, "msgsnd", false),
    (70, 188, "msgrcv", false),
    (72, 25, "fcntl", true),
    (73, 32, "flock", true),
    (74, 82, "fsync", true),
    (75, 83, "fdatasync", true),
    (101, 117, "ptrace", false),
    (128, 137, "rt_sigtimedwait", false),
    (130, 133, "rt_sigsuspend", false),
    (162, 81, "sync", false),
    (202, 98, "futex", false),
    (208, 4, "io_getevents", false),
    (219, 128, "restart_syscall", false),
    (220, 192, "semtimedop", false),
    (230, 115, "clock_nanosleep", false),
    (231, 94, "exit_group", false),
    (232, NONE, "epoll_wait", true),
    (242, 182, "mq_timedsend", true),
    (243, 183, "mq_timedreceive", true),
    (247, 95, "waitid", false),
    (257, 56, "openat", false),
    (270, 72, "pselect6", false),
    (271, 73, "ppoll", false),
    (275, 76, "splice", true),
    (276, 77, "tee", true),
    (278, 75, "vmsplice", true),
    (281, 22, "epoll_pwait", true),
    (285, 47, "fallocate", true),
    (288, 242, "accept4", true),
    (295, 69, "preadv", true),
    (296, 70, "pwritev", true),
    (299, 243, "recvmmsg", true),
    (306, 267, "syncfs", true),
    (307, 269, "sendmmsg", true),
    (318, 278, "getrandom", false),
    (326, 285, "copy_file_range", true),
    (333, 292, "io_pgetevents", false),
    (426, 426, "io_uring_enter", true),
    (441, 441, "epoll_pwait2", true),
    (449, 449, "futex_waitv", false),
    (455, 455, "futex_wait", false),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms() {
        assert_eq!(Blocked::parse(b"running\n"), Some(Blocked::Running));
        assert_eq!(
            Blocked::parse(b"-1 0x7ffc 0x55aa\n"),
            Some(Blocked::Outside {
                sp: 0x7ffc,
                ip: 0x55aa
            })
        );
        assert_eq!(
            Blocked::parse(b"202 0x1 0x80 0x2 0x0 0x0 0xffffffffffffffff 0x7ffc 0x55aa\n"),
            Some(Blocked::Call {
                number: 202,
                args: [1, 0x80, 2, 0, 0, u64::MAX],
                sp: 0x7ffc,
                ip: 0x55aa
            })
        );
        for wrong in ["", "x", "202", "202 0x1", "-1 0x1", "0 1 2 3 4 5 6 7 8"] {
            assert_eq!(Blocked::parse(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn numbers_agree_with_the_kernels_headers() {
        for (number, name) in [
            (libc::SYS_read, "read"),
            (libc::SYS_futex, "futex"),
            (libc::SYS_clock_nanosleep, "clock_nanosleep"),
            (libc::SYS_epoll_pwait, "epoll_pwait"),
            (libc::SYS_wait4, "wait4"),
            (libc::SYS_accept4, "accept4"),
            (libc::SYS_ppoll, "ppoll"),
            (libc::SYS_recvmsg, "recvmsg"),
            (libc::SYS_rt_sigtimedwait, "rt_sigtimedwait"),
            (libc::SYS_io_getevents, "io_getevents"),
            (libc::SYS_semtimedop, "semtimedop"),
            (libc::SYS_flock, "flock"),
        ] {
            assert_eq!(Call::of(Arch::NATIVE, number).unwrap().name, name);
        }
        assert_eq!(Call::of(Arch::Aarch64, 98).unwrap().name, "futex");
        assert_eq!(Call::of(Arch::X86_64, 98), None);
    }

    #[test]
    fn no_number_has_two_names() {
        for (i, a) in CALLS.iter().enumerate() {
            for b in &CALLS[i + 1..] {
                assert!(a.0 != b.0 || a.0 == NONE, "{a:?} {b:?}");
                assert!(a.1 != b.1 || a.1 == NONE, "{a:?} {b:?}");
            }
        }
    }
}
