//! The registers of a process's threads, by a task iterator: one record a
//! thread, written when user space reads.

use core::ffi::c_void;

use aya_ebpf::helpers::{
    bpf_probe_read_kernel,
    generated::{bpf_seq_write, bpf_task_pt_regs},
};
use leakmon_common::threads::ThreadRecord;

use crate::maps::{ITERATED, KERNEL_OFFSETS};

/// `struct bpf_iter__task` (kernel/bpf/task_iter.c).
#[repr(C)]
struct Context {
    meta: *const Meta,
    task: *mut c_void,
}

/// `struct bpf_iter_meta` (include/linux/bpf.h), as far as it is read.
#[repr(C)]
struct Meta {
    seq: *mut c_void,
}

/// Positions in `struct pt_regs` (arch/x86/include/asm/ptrace.h), in words.
#[cfg(bpf_target_arch = "x86_64")]
pub mod user {
    /// Words of the struct.
    pub const WORDS: usize = 21;
    pub const FRAME: usize = 4;
    pub const SYSCALL: usize = 15;
    pub const IP: usize = 16;
    pub const SP: usize = 19;
    /// None.
    pub const LINK: Option<usize> = None;

    /// The system call that a thread is in, and its first two arguments: orig_ax,
    /// rdi, rsi.
    #[inline(always)]
    pub fn call(regs: *const core::ffi::c_void) -> Option<[u64; 3]> {
        let [rsi, rdi, orig_ax] = super::kernel::<[u64; 3]>(regs, 13 * 8)?;
        Some([orig_ax, rdi, rsi])
    }

    /// `orig_ax`.
    #[inline(always)]
    pub fn syscall(regs: &[u64; WORDS]) -> i64 {
        regs[SYSCALL] as i64
    }
}

/// Positions in `struct pt_regs` (arch/arm64/include/asm/ptrace.h), in words.
#[cfg(bpf_target_arch = "aarch64")]
pub mod user {
    /// Words of the struct that are read.
    pub const WORDS: usize = 36;
    pub const FRAME: usize = 29;
    pub const LINK: Option<usize> = Some(30);
    pub const SP: usize = 31;
    pub const IP: usize = 32;
    pub const SYSCALL: usize = 35;

    /// The system call that a thread is in, and its first two arguments:
    /// syscallno, orig_x0, x1.
    #[inline(always)]
    pub fn call(regs: *const core::ffi::c_void) -> Option<[u64; 3]> {
        let x1: u64 = super::kernel(regs, 8)?;
        let [orig_x0, syscall] = super::kernel::<[u64; 2]>(regs, 34 * 8)?;
        Some([syscall, orig_x0, x1])
    }

    /// `syscallno`, an s32.
    #[inline(always)]
    pub fn syscall(regs: &[u64; WORDS]) -> i64 {
        i64::from(regs[SYSCALL] as i32)
    }
}

/// Reads a field of a struct of the kernel's.
#[inline(always)]
pub fn kernel<T>(base: *const c_void, offset: u32) -> Option<T> {
    let at = base.wrapping_byte_add(offset as usize).cast::<T>();
    // SAFETY: the helper checks the address and reports a fault.
    unsafe { bpf_probe_read_kernel(at) }.ok()
}

/// Where a thread's registers are that it entered the kernel with, at the end of
/// its stack there; `None` where that is not known.
#[inline(always)]
pub fn registers(task: *const c_void) -> Option<*const c_void> {
    let offsets = KERNEL_OFFSETS.get(0)?;
    if offsets.registers == 0 {
        return None;
    }
    let stack = kernel::<*const c_void>(task, offsets.stack)?;
    Some(stack.wrapping_byte_add(offsets.registers as usize))
}

/// Writes one record for each thread of the process in `ITERATED`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn thread_registers(context: *mut c_void) -> u32 {
    each::<false>(context)
}

/// The same for kernels without `bpf_task_pt_regs` (before 5.15).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn thread_registers_old(context: *mut c_void) -> u32 {
    each::<true>(context)
}

#[inline(always)]
fn each<const OLD: bool>(context: *mut c_void) -> u32 {
    // SAFETY: the kernel passes this struct.
    let context = unsafe { &*context.cast::<Context>() };
    if !context.task.is_null() {
        write::<OLD>(context);
    }
    0
}

#[inline(always)]
fn write<const OLD: bool>(context: &Context) -> Option<()> {
    let offsets = KERNEL_OFFSETS.get(0)?;
    let [tid, tgid] = kernel::<[u32; 2]>(context.task, offsets.pid)?;
    if tgid != *ITERATED.get(0)? {
        return None;
    }
    let regs = if OLD {
        registers(context.task)?
    } else {
        // SAFETY: the iterator's own task.
        unsafe { bpf_task_pt_regs(context.task.cast()) as *const c_void }
    };
    let regs = kernel::<[u64; user::WORDS]>(regs, 0)?;
    let record = ThreadRecord {
        voluntary: kernel(context.task, offsets.nvcsw)?,
        involuntary: kernel(context.task, offsets.nivcsw)?,
        ip: regs[user::IP],
        sp: regs[user::SP],
        frame: regs[user::FRAME],
        link: user::LINK.map_or(0, |link| regs[link]),
        syscall: user::syscall(&regs),
        tid,
        state: kernel(context.task, offsets.state)?,
    };
    // SAFETY: the iterator's own file, and a record on the stack.
    unsafe {
        bpf_seq_write(
            (*context.meta).seq.cast(),
            (&raw const record).cast_mut().cast(),
            size_of::<ThreadRecord>() as u32,
        );
    }
    Some(())
}
