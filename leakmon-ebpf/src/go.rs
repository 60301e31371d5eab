//! Go's goroutines: spawn, exit, park and resume.
//!
//! One program for each role, since the verifier refuses a register chosen at
//! run time. Each hit costs the target, so each path makes as few helper calls
//! as it can: array maps and attach cookies are cheap, a read of user memory
//! and a hash lookup cost about 20 to 50 ns each.

use core::arch::asm;

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_attach_cookie, bpf_ktime_get_ns, bpf_probe_read_user},
    macros::uprobe,
    programs::ProbeContext,
};
use aya_log_ebpf::warn;
use leakmon_common::{
    Cookie, Counters, Dropped, NO_SLOT, Parked, SiteCount, SiteKey, Target, TargetSite,
    WAIT_FRAMES, WaitKey, histogram_bucket, parked_key,
};

use crate::maps::{COUNTERS, FREE_SLOTS, PARKED, SITES, TARGETS, WAIT_COUNTS, WAITS};

/// Registers by what Go's calling convention (ABIInternal) keeps in them.
#[cfg(bpf_target_arch = "x86_64")]
mod regs {
    use aya_ebpf::bindings::pt_regs;

    /// First argument and result.
    #[inline(always)]
    pub fn first(regs: &pt_regs) -> u64 {
        regs.rax
    }
    /// Second argument.
    #[inline(always)]
    pub fn second(regs: &pt_regs) -> u64 {
        regs.rbx
    }
    /// Third argument.
    #[inline(always)]
    pub fn third(regs: &pt_regs) -> u64 {
        regs.rcx
    }
    /// The current goroutine.
    #[inline(always)]
    pub fn g(regs: &pt_regs) -> u64 {
        regs.r14
    }
    /// Frame pointer.
    #[inline(always)]
    pub fn frame(regs: &pt_regs) -> u64 {
        regs.rbp
    }
}

/// Registers by what Go's calling convention (ABIInternal) keeps in them.
#[cfg(bpf_target_arch = "aarch64")]
mod regs {
    use aya_ebpf::bindings::pt_regs;

    /// First argument and result.
    #[inline(always)]
    pub fn first(regs: &pt_regs) -> u64 {
        regs.regs[0]
    }
    /// Second argument.
    #[inline(always)]
    pub fn second(regs: &pt_regs) -> u64 {
        regs.regs[1]
    }
    /// Third argument.
    #[inline(always)]
    pub fn third(regs: &pt_regs) -> u64 {
        regs.regs[2]
    }
    /// The current goroutine.
    #[inline(always)]
    pub fn g(regs: &pt_regs) -> u64 {
        regs.regs[28]
    }
    /// Frame pointer.
    #[inline(always)]
    pub fn frame(regs: &pt_regs) -> u64 {
        regs.regs[29]
    }
}

/// Positions of the roles in [`Counters::hits`]; user space has the same order.
mod role {
    pub const SPAWN: usize = 0;
    pub const SPAWN_RETURNED: usize = 1;
    pub const EXIT: usize = 2;
    pub const PARK: usize = 3;
    pub const RESUME: usize = 4;
    pub const PARK_UNIVERSAL: usize = 5;
    pub const READY: usize = 6;
}

/// `go` statement, at the call of `runqput`.
#[uprobe]
pub fn go_spawn(ctx: ProbeContext) -> u32 {
    let g = regs::second(unsafe { &*ctx.regs });
    count_site::<{ role::SPAWN }>(&ctx, g)
}

/// `go` statement, behind the call of `newproc1`.
#[uprobe]
pub fn go_spawn_returned(ctx: ProbeContext) -> u32 {
    let g = regs::first(unsafe { &*ctx.regs });
    count_site::<{ role::SPAWN_RETURNED }>(&ctx, g)
}

/// A goroutine's end.
#[uprobe]
pub fn go_exit(ctx: ProbeContext) -> u32 {
    let g = regs::first(unsafe { &*ctx.regs });
    count_site::<{ role::EXIT }>(&ctx, g)
}

/// A goroutine is about to wait, at a call of `gopark`.
#[uprobe]
pub fn go_park(ctx: ProbeContext) -> u32 {
    let Some(hit) = Hit::new::<{ role::PARK }>(&ctx) else {
        return 0;
    };
    let regs = unsafe { &*ctx.regs };
    let reason = regs::third(regs) as u8;
    park(&ctx, &hit, regs::g(regs), reason, regs::frame(regs));
    0
}

/// A goroutine waits, in `park_m`.
#[uprobe]
pub fn go_park_universal(ctx: ProbeContext) -> u32 {
    let Some(hit) = Hit::new::<{ role::PARK_UNIVERSAL }>(&ctx) else {
        return 0;
    };
    let g = regs::first(unsafe { &*ctx.regs });
    let Some(reason) = hit.read::<u8>(g, hit.target.waitreason) else {
        return 0;
    };
    if reason >= 64 || hit.target.reasons & (1 << reason) == 0 {
        return 0;
    }
    let Some(frame) = hit.read::<u64>(g, hit.target.sched_bp) else {
        return 0;
    };
    park(&ctx, &hit, g, reason, frame);
    0
}

/// A goroutine goes on, behind a call of `gopark`.
#[uprobe]
pub fn go_resume(ctx: ProbeContext) -> u32 {
    let g = regs::g(unsafe { &*ctx.regs });
    resume::<{ role::RESUME }>(&ctx, g)
}

/// A goroutine is made ready to run, in `runtime.ready`.
#[uprobe]
pub fn go_ready(ctx: ProbeContext) -> u32 {
    let g = regs::first(unsafe { &*ctx.regs });
    resume::<{ role::READY }>(&ctx, g)
}

/// Adds to a counter that other programs add to as well. The address is taken
/// as a pointer, since no reference to it is exclusive.
///
/// # Safety
///
/// `counter` must point into a map's value and be aligned to 8 bytes.
#[inline(always)]
unsafe fn add(counter: *mut u64, value: u64) {
    // The BPF target has no atomic types; this is the one instruction of theirs
    // that is needed.
    // SAFETY: one aligned 8-byte write to what the caller vouches for.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {value}",
            counter = in(reg) counter,
            value = in(reg) value,
            options(nostack),
        );
    }
}

/// What every program needs to count one hit.
struct Hit<'a> {
    cookie: Cookie,
    target: &'a Target,
    counters: *mut Counters,
}

impl Hit<'_> {
    /// Counts a hit; `None` when that is all there is to do.
    #[inline(always)]
    fn new<const ROLE: usize>(ctx: &ProbeContext) -> Option<Self> {
        // SAFETY: the context is the program's own.
        let cookie = Cookie::unpack(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) });
        let index = u32::from(cookie.target);
        let target = TARGETS.get(index)?;
        if target.epoch != cookie.epoch {
            return None;
        }
        let counters = COUNTERS.get_ptr_mut(index)?;
        // SAFETY: the map's value.
        unsafe { add(&raw mut (*counters).hits[ROLE], 1) };
        let since = match ROLE {
            role::SPAWN | role::SPAWN_RETURNED | role::EXIT => target.lifecycle_since,
            _ => target.blocking_since,
        };
        (since != 0).then_some(Self {
            cookie,
            target,
            counters,
        })
    }

    /// Counts a hit that is not counted otherwise. True for the first ones of
    /// their kind on this CPU.
    #[inline(always)]
    fn dropped(&self, reason: Dropped) -> bool {
        // SAFETY: the map's value.
        unsafe {
            let counter = &raw mut (*self.counters).dropped[reason as usize];
            let first = counter.read_volatile() == 0;
            add(counter, 1);
            first
        }
    }

    /// Reads a field of a `runtime.g`.
    #[inline(always)]
    fn read<T>(&self, g: u64, offset: u16) -> Option<T> {
        let at = g.wrapping_add(u64::from(offset)) as *const T;
        // SAFETY: the helper checks the address and reports a fault.
        let value = unsafe { bpf_probe_read_user(at) }.ok();
        if value.is_none() {
            self.dropped(Dropped::Unreadable);
        }
        value
    }

    /// Where `g` was spawned.
    #[inline(always)]
    fn site(&self, g: u64) -> Option<SiteKey> {
        let [created_at, _ancestors, entry] = self.read::<[u64; 3]>(g, self.target.gopc)?;
        Some(SiteKey { created_at, entry })
    }
}

#[inline(always)]
fn count_site<const ROLE: usize>(ctx: &ProbeContext, g: u64) -> u32 {
    let Some(hit) = Hit::new::<ROLE>(ctx) else {
        return 0;
    };
    let Some(site) = hit.site(g) else {
        return 0;
    };
    let key = TargetSite {
        target: u64::from(hit.cookie.target),
        site,
    };
    let mut count = SITES.get_ptr_mut(key);
    if count.is_none() {
        // Only when nobody else did meanwhile: theirs may have counted already.
        let _ = SITES.insert(key, SiteCount::default(), u64::from(BPF_NOEXIST));
        count = SITES.get_ptr_mut(key);
    }
    let Some(count) = count else {
        if hit.dropped(Dropped::SitesFull) {
            warn!(ctx, "the map of spawn sites is full");
        }
        return 0;
    };
    // SAFETY: the map's value; entries are removed after the last program of
    // their target.
    unsafe {
        if ROLE == role::EXIT {
            add(&raw mut (*count).exited, 1);
        } else {
            add(&raw mut (*count).spawned, 1);
        }
    }
    0
}

/// Records that `g` waits, for `reason`, with the frame pointer `frame`.
#[inline(always)]
fn park(ctx: &ProbeContext, hit: &Hit<'_>, g: u64, reason: u8, frame: u64) {
    let Some(goid) = hit.read::<u64>(g, hit.target.goid) else {
        return;
    };
    let reason = u32::from(reason);
    let pcs = return_addresses(frame, hit.cookie.depth);
    let key = parked_key(hit.cookie.target, g);
    let slot = match PARKED.get_ptr_mut(key) {
        Some(parked) => {
            // SAFETY: a goroutine parks and goes on by turns, so nobody else
            // writes its entry; entries are removed after the last program of
            // their target.
            let parked = unsafe { &mut *parked };
            if parked.since >= hit.target.blocking_since {
                hit.dropped(Dropped::LostResume);
            }
            if parked.goid != goid || parked.reason != reason || parked.pcs != pcs {
                parked.since = 0;
                let Some(slot) = wait_slot(ctx, hit, g, reason, pcs) else {
                    return;
                };
                parked.goid = goid;
                parked.slot = slot;
                parked.reason = reason;
                parked.pcs = pcs;
            }
            // SAFETY: reads the clock.
            parked.since = unsafe { bpf_ktime_get_ns() };
            parked.slot
        }
        None => {
            let Some(slot) = wait_slot(ctx, hit, g, reason, pcs) else {
                return;
            };
            let parked = Parked {
                // SAFETY: reads the clock.
                since: unsafe { bpf_ktime_get_ns() },
                goid,
                slot,
                reason,
                pcs,
            };
            if PARKED.insert(key, parked, 0).is_err() {
                if hit.dropped(Dropped::ParkedFull) {
                    warn!(ctx, "the map of waiting goroutines is full");
                }
                return;
            }
            slot
        }
    };
    if let Some(count) = WAIT_COUNTS.get_ptr_mut(slot) {
        // SAFETY: the map's value.
        unsafe { add(&raw mut (*count).parks, 1) };
    }
}

/// Up to `depth` return addresses of the stack whose innermost frame pointer is
/// `frame`. A frame pointer points at the caller's, and the return address lies
/// 8 bytes above it, on both architectures.
#[inline(always)]
fn return_addresses(frame: u64, depth: u8) -> [u64; WAIT_FRAMES] {
    let mut pcs = [0; WAIT_FRAMES];
    let mut frame = frame;
    for (index, pc) in pcs.iter_mut().enumerate() {
        if index >= usize::from(depth) || frame == 0 {
            break;
        }
        // SAFETY: the helper checks the address and reports a fault.
        let Ok([next, address]) = (unsafe { bpf_probe_read_user(frame as *const [u64; 2]) }) else {
            break;
        };
        *pc = address;
        frame = next;
    }
    pcs
}

/// The slot of a kind of wait; [`NO_SLOT`] when there is none free. `None` when
/// the goroutine could not be read.
#[inline(always)]
fn wait_slot(
    ctx: &ProbeContext,
    hit: &Hit<'_>,
    g: u64,
    reason: u32,
    pcs: [u64; WAIT_FRAMES],
) -> Option<u32> {
    let key = WaitKey {
        target: u32::from(hit.cookie.target),
        reason,
        site: hit.site(g)?,
        pcs,
    };
    // SAFETY: values of this map never change; entries are removed after the
    // last program of their target.
    if let Some(slot) = unsafe { WAITS.get(key) } {
        return Some(*slot);
    }
    if let Ok(Some(slot)) = FREE_SLOTS.pop() {
        if WAITS.insert(key, slot, u64::from(BPF_NOEXIST)).is_ok() {
            return Some(slot);
        }
        // Somebody else was faster, or the map is full.
        let _ = FREE_SLOTS.push(slot, 0);
        // SAFETY: as above.
        if let Some(slot) = unsafe { WAITS.get(key) } {
            return Some(*slot);
        }
    }
    if hit.dropped(Dropped::WaitsFull) {
        warn!(ctx, "the map of waits is full");
    }
    Some(NO_SLOT)
}

#[inline(always)]
fn resume<const ROLE: usize>(ctx: &ProbeContext, g: u64) -> u32 {
    let Some(hit) = Hit::new::<ROLE>(ctx) else {
        return 0;
    };
    let Some(parked) = PARKED.get_ptr_mut(parked_key(hit.cookie.target, g)) else {
        hit.dropped(Dropped::UnmatchedResume);
        return 0;
    };
    // SAFETY: as in `park`.
    let parked = unsafe { &mut *parked };
    let since = parked.since;
    parked.since = 0;
    if since < hit.target.blocking_since {
        hit.dropped(Dropped::UnmatchedResume);
        return 0;
    }
    let Some(count) = WAIT_COUNTS.get_ptr_mut(parked.slot) else {
        return 0;
    };
    // SAFETY: reads the clock.
    let nanos = unsafe { bpf_ktime_get_ns() }.wrapping_sub(since);
    // SAFETY: the map's value; the bucket is below the histogram's length.
    unsafe {
        add(&raw mut (*count).resumes, 1);
        add(&raw mut (*count).total_ns, nanos);
        add(&raw mut (*count).histogram[histogram_bucket(nanos)], 1);
    }
    0
}
