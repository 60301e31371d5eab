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
