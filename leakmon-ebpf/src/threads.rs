//! Threads: made, ended, and switched; and what becomes of processes.
//!
//! Tracepoints see every process of the machine: a process that is not watched
//! pays for one look at a bit.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_current_task_btf, bpf_ktime_get_ns,
        bpf_probe_read_user, bpf_probe_read_user_buf, generated::bpf_task_pt_regs,
    },
    macros::{raw_tracepoint, uprobe},
    programs::{ProbeContext, RawTracePointContext},
};
use aya_log_ebpf::warn;
use leakmon_common::{
    Cookie, Dropped, NO_SLOT, SiteKey, TargetSite, WAIT_FRAMES,
    threads::{Layout, NO_SYSCALL, STACK_BYTES, ThreadEntry, blocked_place, event, reason, slot},
};

use crate::hit::{End, Hit, add, count_park, count_resume, exchange_own};
use crate::maps::{
    BLOCKED, CREATING, EVENTS, EVENTS_LOST, KERNEL_OFFSETS, PROCESSES, SCRATCH, STACKS, SWITCHES,
    THREADS, WATCHED,
};
use crate::registers::{kernel, registers, user};

/// `CLONE_THREAD` of include/uapi/linux/sched.h.
const CLONE_THREAD: u64 = 0x10000;

/// `TASK_DEAD` of include/linux/sched.h: it will not come back.
const TASK_DEAD: u64 = 0x80;

/// `__NR_futex`.
#[cfg(bpf_target_arch = "x86_64")]
const FUTEX: u32 = 202;
/// `__NR_futex`.
#[cfg(bpf_target_arch = "aarch64")]
const FUTEX: u32 = 98;

/// What `pthread_create` is called with.
struct Call {
    created_at: u64,
    start: u64,
    argument: u64,
    ip: u64,
    sp: u64,
    frame: u64,
    link: u64,
}

#[cfg(bpf_target_arch = "x86_64")]
#[inline(always)]
fn call(ctx: &ProbeContext) -> Option<Call> {
    // SAFETY: the context is the program's own.
    let regs = unsafe { &*ctx.regs };
    // SAFETY: the helper checks the address and reports a fault.
    let created_at = unsafe { bpf_probe_read_user(regs.rsp as *const u64) }.ok()?;
    Some(Call {
        created_at,
        start: regs.rdx,
        argument: regs.rcx,
        ip: regs.rip,
        sp: regs.rsp,
        frame: regs.rbp,
        link: 0,
    })
}

#[cfg(bpf_target_arch = "aarch64")]
#[inline(always)]
fn call(ctx: &ProbeContext) -> Option<Call> {
    // SAFETY: the context is the program's own.
    let regs = unsafe { &*ctx.regs };
    Some(Call {
        created_at: regs.regs[30],
        start: regs.regs[2],
        argument: regs.regs[3],
        ip: regs.pc,
        sp: regs.sp,
        frame: regs.regs[29],
        link: regs.regs[30],
    })
}

/// A call of `pthread_create`, at its first instruction: the thread that it
/// makes has this site.
#[uprobe]
pub fn thread_create(ctx: ProbeContext) -> u32 {
    create::<false>(ctx)
}

/// The same before kernel 5.12.
#[uprobe]
pub fn thread_create_old(ctx: ProbeContext) -> u32 {
    create::<true>(ctx)
}

#[inline(always)]
fn create<const OLD: bool>(ctx: ProbeContext) -> u32 {
    // SAFETY: the context is the program's own.
    let Some(hit) = (unsafe { Hit::new::<{ slot::CREATE }>(ctx.as_ptr()) }) else {
        return 0;
    };
    if hit.target.lifecycle_since == 0 {
        return 0;
    }
    let Some(call) = call(&ctx) else {
        hit.dropped(Dropped::Unreadable);
        return 0;
    };
    let mut entry = call.start;
    for shared in Layout::of(&hit.target.layout).shared {
        if shared.start != 0 && shared.start == call.start {
            let at = call.argument.wrapping_add(shared.offset) as *const u64;
            // SAFETY: the helper checks the address and reports a fault.
            entry = unsafe { bpf_probe_read_user(at) }.unwrap_or(entry);
        }
    }
    let site = SiteKey {
        created_at: call.created_at,
        entry,
    };
    if CREATING
        .insert(bpf_get_current_pid_tgid(), site, 0)
        .is_err()
        && hit.dropped(Dropped::ThreadsFull)
    {
        warn!(&ctx, "the map of threads being made is full");
    }
    copy_stack::<OLD>(&hit, site, &call);
    0
}

/// Keeps the stack of a site's first thread.
#[inline(always)]
fn copy_stack<const OLD: bool>(hit: &Hit<'_>, site: SiteKey, call: &Call) {
    const CHUNK: usize = 1024;
    let key = TargetSite {
        target: u64::from(hit.cookie.target),
        site,
    };
    if STACKS.get_ptr(key).is_some() {
        return;
    }
    let Some(copy) = SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: the map's value. Whoever has its lock is the only one that uses it.
    unsafe {
        // Another thread may be probed on this CPU before this program ends.
        if exchange_own::<OLD>(&raw mut (*copy).lock, 0, 1) != 0 {
            return;
        }
        (*copy).ip = call.ip;
        (*copy).sp = call.sp;
        (*copy).frame = call.frame;
        (*copy).link = call.link;
        let mut length = 0;
        for chunk in (*copy).bytes.chunks_exact_mut(CHUNK) {
            let from = call.sp.wrapping_add(length) as *const u8;
            if bpf_probe_read_user_buf(from, chunk).is_err() {
                break;
            }
            length += CHUNK as u64;
        }
        (*copy).length = length;
        let _ = STACKS.insert(key, &*copy, 0);
        exchange_own::<OLD>(&raw mut (*copy).lock, 1, 0);
    }
}

/// The cookie of a watched process.
#[inline(always)]
fn watched(tgid: u32) -> Option<Cookie> {
    let word = WATCHED.get((tgid & 0xffff) >> 6)?;
    if *word >> (tgid & 63) & 1 == 0 {
        return None;
    }
    // SAFETY: user space alone writes it, before and after the target's programs.
    unsafe { PROCESSES.get(tgid) }.map(|&cookie| Cookie::unpack(cookie))
}

/// `task_newtask`, in the thread that makes the new one.
#[raw_tracepoint]
pub fn thread_start(ctx: RawTracePointContext) -> i32 {
    start(&ctx);
    0
}

#[inline(always)]
fn start(ctx: &RawTracePointContext) -> Option<()> {
    if ctx.arg::<u64>(1) & CLONE_THREAD == 0 {
        return None;
    }
    let current = bpf_get_current_pid_tgid();
    let cookie = watched((current >> 32) as u32)?;
    let hit = Hit::of::<{ slot::START }>(cookie)?;
    if hit.target.lifecycle_since == 0 {
        return None;
    }
    let mut site = SiteKey::default();
    if let Some(creating) = CREATING.get_ptr(current) {
        // SAFETY: the thread's own entry.
        site = unsafe { *creating };
        let _ = CREATING.remove(current);
    }
    hit.count(ctx, site, End::Spawned);
    let task = ctx.arg::<*const c_void>(0);
    let offsets = KERNEL_OFFSETS.get(0)?;
    let tid: u32 = kernel(task, offsets.pid)?;
    let entry = ThreadEntry {
        site,
        born: kernel(task, offsets.start_time)?,
        slot: NO_SLOT,
        target: u64::from(cookie.target),
        ..ThreadEntry::default()
    };
    if THREADS.insert(tid, entry, 0).is_err() && hit.dropped(Dropped::ThreadsFull) {
        warn!(ctx, "the map of threads is full");
    }
    Some(())
}

/// Whether an entry is of the thread `task`, and not of one of another target,
/// or of one that had its id and ended while the probes were away.
#[inline(always)]
fn is_of(hit: &Hit<'_>, thread: &ThreadEntry, task: *const c_void) -> bool {
    if thread.target != u64::from(hit.cookie.target) {
        return false;
    }
    // One that was there before the probes is forgotten when they go.
    if thread.born == 0 || thread.born >= hit.target.lifecycle_since {
        return true;
    }
    let offsets = KERNEL_OFFSETS.get(0);
    offsets.and_then(|offsets| kernel(task, offsets.start_time)) == Some(thread.born)
}

/// The current thread runs. When it was not seen to be put on its CPU, how long
/// its latest wait took is lost: programs do not run in every thread of every
/// kernel (a virtual machine's may keep its own agent's from them), and so not in
/// each switch from one thread to another.
#[inline(always)]
fn runs(hit: &Hit<'_>, thread: &mut ThreadEntry) {
    let since = thread.since;
    if since != 0 {
        thread.since = 0;
        if hit.target.blocking_since != 0 && since >= hit.target.blocking_since {
            hit.dropped(Dropped::LostResume);
        }
    }
}

/// `sched_process_exit`, in the thread that ends.
#[raw_tracepoint]
pub fn thread_exit(ctx: RawTracePointContext) -> i32 {
    exit(&ctx);
    0
}

#[inline(always)]
fn exit(ctx: &RawTracePointContext) -> Option<()> {
    let current = bpf_get_current_pid_tgid();
    let cookie = watched((current >> 32) as u32)?;
    let hit = Hit::of::<{ slot::EXIT }>(cookie)?;
    if hit.target.lifecycle_since == 0 {
        return None;
    }
    let tid = current as u32;
    let mut site = SiteKey::default();
    if let Some(thread) = THREADS.get_ptr_mut(tid) {
        // SAFETY: the thread's own entry.
        unsafe {
            if is_of(&hit, &*thread, ctx.arg(0)) {
                site = (*thread).site;
                runs(&hit, &mut *thread);
            }
        }
        let _ = THREADS.remove(tid);
    }
    let _ = CREATING.remove(current);
    hit.count(ctx, site, End::Exited);
    Some(())
}

/// `sched_switch`, in the thread that is taken from the CPU.
#[raw_tracepoint]
pub fn thread_switch(ctx: RawTracePointContext) -> i32 {
    switch::<false>(&ctx)
}

/// The same for kernels whose tracepoint does not tell the state (before 5.18), or
/// that have no `bpf_task_pt_regs` (before 5.15).
#[raw_tracepoint]
pub fn thread_switch_old(ctx: RawTracePointContext) -> i32 {
    switch::<true>(&ctx)
}

#[inline(always)]
fn switch<const OLD: bool>(ctx: &RawTracePointContext) -> i32 {
    if let Some(switches) = SWITCHES.get_ptr_mut(0) {
        // SAFETY: the map's value: no other program writes it, and a CPU switches
        // one thread at a time.
        unsafe { *switches += 1 };
    }
    off::<OLD>(ctx);
    on(ctx);
    0
}

/// In which state the current thread is taken from its CPU. It has none other
/// before it is off, for the lock of the CPU's queue is held.
#[inline(always)]
fn state<const OLD: bool>(ctx: &RawTracePointContext) -> Option<u64> {
    /// `TASK_INTERRUPTIBLE` of include/linux/sched.h, for a thread that is none:
    /// see `run_tracepoint` in user space.
    const INTERRUPTIBLE: u32 = 1;
    if OLD {
        let task = ctx.arg::<*const c_void>(1);
        let state = kernel::<u32>(task, KERNEL_OFFSETS.get(0)?.state);
        return Some(u64::from(state.unwrap_or(INTERRUPTIBLE)));
    }
    // An unsigned int: its upper half means nothing.
    Some(ctx.arg::<u64>(3) & 0xffff_ffff)
}

/// The registers with which the current thread entered the kernel.
#[inline(always)]
fn own_registers<const OLD: bool>() -> Option<*const c_void> {
    if OLD {
        // SAFETY: gives an address.
        return registers(unsafe { bpf_get_current_task() } as *const c_void);
    }
    // SAFETY: the current thread's.
    Some(unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as *const c_void)
}

/// The current thread is taken from its CPU.
#[inline(always)]
fn off<const OLD: bool>(ctx: &RawTracePointContext) -> Option<()> {
    let current = bpf_get_current_pid_tgid();
    let cookie = watched((current >> 32) as u32)?;
    let hit = Hit::of::<{ slot::SWITCH }>(cookie)?;
    let state = state::<OLD>(ctx)?;
    if hit.target.blocking_since == 0 || state & TASK_DEAD != 0 {
        return None;
    }
    let tid = current as u32;
    let target = u64::from(cookie.target);
    let mut thread = THREADS.get_ptr_mut(tid);
    // SAFETY: the thread's own entry.
    if thread.is_none_or(|thread| unsafe { !is_of(&hit, &*thread, ctx.arg(1)) }) {
        let entry = ThreadEntry {
            slot: NO_SLOT,
            target,
            ..ThreadEntry::default()
        };
        if THREADS.insert(tid, entry, 0).is_err() && hit.dropped(Dropped::ThreadsFull) {
            warn!(ctx, "the map of threads is full");
        }
        thread = THREADS.get_ptr_mut(tid);
    }
    // SAFETY: the thread's own entry: it is written in its own switches alone,
    // one after the other.
    let thread = unsafe { &mut *thread? };
    runs(&hit, thread);
    // As the kernel counts them (`__schedule`, kernel/sched/core.c).
    if ctx.arg::<u64>(0) as u8 != 0 || state == 0 {
        thread.involuntary += 1;
        return None;
    }
    thread.voluntary += 1;
    let [syscall, first, second] = user::call(own_registers::<OLD>()?)?;
    let syscall = syscall as u32;
    let why = if syscall == FUTEX {
        reason(syscall, second as u32)
    } else if syscall == u32::MAX {
        NO_SYSCALL
    } else {
        reason(syscall, 0)
    };
    thread.argument = first;
    if thread.slot == NO_SLOT || thread.reason != why {
        thread.reason = why;
        thread.slot = hit.wait_slot(ctx, thread.site, why, [0; WAIT_FRAMES]);
    }
    count_park(thread.slot);
    if let Some(blocked) = BLOCKED.get_ptr_mut(blocked_place(ctx.arg::<u64>(1))) {
        // SAFETY: the map's value: whoever writes it writes the same.
        unsafe { *blocked = 1 };
    }
    // SAFETY: reads the clock.
    thread.since = unsafe { bpf_ktime_get_ns() };
    None
}

/// Another thread is put on the CPU.
#[inline(always)]
fn on(ctx: &RawTracePointContext) -> Option<()> {
    // Nearly all of the machine's switches end here.
    if *BLOCKED.get(blocked_place(ctx.arg::<u64>(2)))? == 0 {
        return None;
    }
    let task = ctx.arg::<*const c_void>(2);
    let [tid, tgid] = kernel::<[u32; 2]>(task, KERNEL_OFFSETS.get(0)?.pid)?;
    let cookie = watched(tgid)?;
    let hit = Hit::of::<{ slot::SWITCH }>(cookie)?;
    // SAFETY: as in `off`.
    let thread = unsafe { &mut *THREADS.get_ptr_mut(tid)? };
    let since = thread.since;
    thread.since = 0;
    if since != 0 && hit.target.blocking_since != 0 && since >= hit.target.blocking_since {
        // SAFETY: reads the clock.
        let now = unsafe { bpf_ktime_get_ns() };
        count_resume(thread.slot, now.wrapping_sub(since));
    }
    Some(())
}

/// Tells user space of a process. It is woken when it had read everything.
#[inline(always)]
fn tell(kind: u32, tgid: u32) {
    let event = u64::from(kind) << 32 | u64::from(tgid);
    if EVENTS.output::<u64>(event, 0).is_err()
        && let Some(lost) = EVENTS_LOST.get_ptr_mut(0)
    {
        // SAFETY: the map's value.
        unsafe { add(lost, 1) };
    }
}

/// `task_newtask`, for processes.
#[raw_tracepoint]
pub fn process_fork(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<u64>(1) & CLONE_THREAD == 0
        && let Some(offsets) = KERNEL_OFFSETS.get(0)
        && let Some(tgid) = kernel(ctx.arg::<*const c_void>(0), offsets.pid + 4)
    {
        tell(event::FORK, tgid);
    }
    0
}

/// `sched_process_exec`.
#[raw_tracepoint]
pub fn process_exec(_ctx: RawTracePointContext) -> i32 {
    tell(event::EXEC, (bpf_get_current_pid_tgid() >> 32) as u32);
    0
}

/// `sched_process_exit`, for the last thread of a process.
#[raw_tracepoint]
pub fn process_exit(ctx: RawTracePointContext) -> i32 {
    let live = || {
        let offsets = KERNEL_OFFSETS.get(0)?;
        let signal: *const c_void = kernel(ctx.arg::<*const c_void>(0), offsets.signal)?;
        kernel::<u32>(signal, offsets.live)
    };
    if live() == Some(0) {
        tell(event::EXIT, (bpf_get_current_pid_tgid() >> 32) as u32);
    }
    0
}

const _: () = assert!(STACK_BYTES % 1024 == 0);
