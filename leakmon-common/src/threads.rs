//! What the programs of threads share with user space.

/// Where the kernel's own structs have the fields that are read, in bytes, by
/// its BTF. Value of `KERNEL_OFFSETS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct KernelOffsets {
    /// `task_struct.pid`; `tgid` lies 4 bytes after it.
    pub pid: u32,
    /// `task_struct.__state` (`state` before 5.14).
    pub state: u32,
    /// `task_struct.nvcsw`.
    pub nvcsw: u32,
    /// `task_struct.nivcsw`.
    pub nivcsw: u32,
    /// `task_struct.signal`.
    pub signal: u32,
    /// `signal_struct.live`, the threads that have not begun to exit.
    pub live: u32,
    /// `task_struct.start_time`.
    pub start_time: u32,
    /// `task_struct.stack`.
    pub stack: u32,
    /// `task_pt_regs`: the user's registers on that stack, from its lowest
    /// address; 0: not known.
    pub registers: u32,
}

/// One thread's registers and state, as the task iterator writes it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ThreadRecord {
    /// `task_struct.nvcsw`: times that it gave up its CPU.
    pub voluntary: u64,
    /// `task_struct.nivcsw`: times that its CPU was taken.
    pub involuntary: u64,
    /// User instruction pointer.
    pub ip: u64,
    /// User stack pointer.
    pub sp: u64,
    /// Frame pointer: RBP / X29.
    pub frame: u64,
    /// X30; 0 on x86_64.
    pub link: u64,
    /// Number of the system call that it is in; negative: in none.
    pub syscall: i64,
    /// Thread id, of the initial pid namespace.
    pub tid: u32,
    /// `TASK_RUNNING` (0), `TASK_INTERRUPTIBLE` (1), `TASK_UNINTERRUPTIBLE` (2),
    /// and the kernel's other bits (include/linux/sched.h).
    pub state: u32,
}

/// Slots of the programs in [`crate::Counters::hits`].
pub mod slot {
    /// A call of `pthread_create`.
    pub const CREATE: usize = 0;
    /// A thread was made.
    pub const START: usize = 1;
    /// A thread's end.
    pub const EXIT: usize = 2;
    /// A thread is put on a CPU or taken from it.
    pub const SWITCH: usize = 3;
}

/// A start routine that many kinds of threads share, and where the argument's
/// object has a word that tells them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shared {
    /// Its runtime address; 0: none.
    pub start: u64,
    /// Of the word, in bytes from `pthread_create`'s fourth argument.
    pub offset: u64,
}

/// What the program of `pthread_create` must know of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// Start routines of languages' runtimes: such a thread's site has that word
    /// in place of the start routine.
    pub shared: [Shared; 2],
}

impl Layout {
    /// As a plan carries it.
    pub const fn words(self) -> crate::Layout {
        let [a, b] = self.shared;
        [a.start, a.offset, b.start, b.offset]
    }

    /// The reverse of [`Layout::words`].
    #[inline(always)]
    pub const fn of(words: &crate::Layout) -> Self {
        let [start, offset, other, behind] = *words;
        Layout {
            shared: [
                Shared { start, offset },
                Shared {
                    start: other,
                    offset: behind,
                },
            ],
        }
    }
}

/// Words of `WATCHED`: a bit for each value of a process id's low 16 bits.
pub const WATCHED_WORDS: u32 = (1 << 16) / 64;

/// Places of `BLOCKED`, a power of two.
pub const BLOCKED_PLACES: u32 = 1 << 16;

/// Place in `BLOCKED` of the thread whose `task_struct` lies at `task`.
#[inline(always)]
pub const fn blocked_place(task: u64) -> u32 {
    // Fibonacci hashing: neighbours in one slab are spread.
    (task.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u32
}

/// [`reason`] of a thread that blocks outside of any system call.
pub const NO_SYSCALL: u32 = 0xffff;

/// What a thread blocks in, as a wait's reason: the number of the system call
/// and, of futex(2), its operation.
#[inline(always)]
pub const fn reason(syscall: u32, operation: u32) -> u32 {
    (syscall & 0xffff) | operation << 16
}

/// Value of `THREADS`, by thread id.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ThreadEntry {
    /// Where it was made; all 0: it was there before the probes came, or made
    /// without `pthread_create`.
    pub site: crate::SiteKey,
    /// `task_struct.start_time`: when it was made, CLOCK_MONOTONIC nanoseconds.
    /// 0: it was there before the probes came.
    pub born: u64,
    /// Since when it is blocked; 0: it is not.
    pub since: u64,
    /// First argument of the system call that it blocks or last blocked in.
    pub argument: u64,
    /// Times that it blocked.
    pub voluntary: u64,
    /// Times that its CPU was taken.
    pub involuntary: u64,
    /// [`reason`] of the latest block.
    pub reason: u32,
    /// Slot of it in `WAIT_COUNTS`, or [`crate::NO_SLOT`].
    pub slot: u32,
    /// Index in `TARGETS`.
    pub target: u64,
}

/// Bytes of a stack that are copied.
pub const STACK_BYTES: usize = 8192;

/// Value of `STACKS`, by [`crate::TargetSite`]: the caller's stack at the first
/// `pthread_create` of a site.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StackCopy {
    /// Instruction pointer, in `pthread_create`.
    pub ip: u64,
    /// Stack pointer: the address of `bytes`.
    pub sp: u64,
    /// Frame pointer: RBP / X29.
    pub frame: u64,
    /// X30; 0 on x86_64.
    pub link: u64,
    /// Bytes that were read.
    pub length: u64,
    /// Not 0 while it is being written.
    pub lock: u64,
    /// From the stack pointer on.
    pub bytes: [u8; STACK_BYTES],
}

impl Default for StackCopy {
    fn default() -> Self {
        StackCopy {
            ip: 0,
            sp: 0,
            frame: 0,
            link: 0,
            length: 0,
            lock: 0,
            bytes: [0; STACK_BYTES],
        }
    }
}

/// Kinds of process events, in the upper half of an event; the process id is
/// the lower.
pub mod event {
    /// A process was made.
    pub const FORK: u32 = 1;
    /// A process runs another program.
    pub const EXEC: u32 = 2;
    /// A process's last thread ends.
    pub const EXIT: u32 = 3;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_round_trip() {
        let layout = Layout {
            shared: [
                Shared {
                    start: 1,
                    offset: 2,
                },
                Shared {
                    start: 3,
                    offset: 4,
                },
            ],
        };
        assert_eq!(Layout::of(&layout.words()), layout);
    }

    #[test]
    fn every_task_has_a_place() {
        for task in [0, 8, 0xffff_8881_0123_4500, u64::MAX] {
            assert!(blocked_place(task) < BLOCKED_PLACES);
        }
        assert_ne!(
            blocked_place(0xffff_8881_0123_4500),
            blocked_place(0xffff_8881_0123_4580)
        );
    }

    #[test]
    fn reasons_differ_by_operation() {
        assert_ne!(reason(202, 0x80), reason(202, 0x89));
        assert_eq!(reason(202, 0x80) & 0xffff, 202);
    }
}
