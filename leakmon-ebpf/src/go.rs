//! Go's goroutines: spawn, exit, park and resume.
//!
//! One program for each role, since the verifier refuses a register chosen at
//! run time. Each hit costs the target, so each path makes as few helper calls
//! as it can: array maps and attach cookies are cheap, a read of user memory
//! and a hash lookup cost about 20 to 50 ns each.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_ktime_get_ns, bpf_probe_read_user},
    macros::uprobe,
    programs::ProbeContext,
};
use aya_log_ebpf::warn;
use leakmon_common::{
    Dropped, Parked, SiteKey, WAIT_FRAMES,
    go::{Layout, slot},
    parked_key,
};

use crate::hit::{End, Hit, count_park, count_resume};
use crate::maps::PARKED;

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

/// `go` statement, at the call of `runqput`.
#[uprobe]
pub fn go_spawn(ctx: ProbeContext) -> u32 {
    let g = regs::second(unsafe { &*ctx.regs });
    count_site::<{ slot::SPAWN }>(&ctx, g)
}

/// `go` statement, behind the call of `newproc1`.
#[uprobe]
pub fn go_spawn_returned(ctx: ProbeContext) -> u32 {
    let g = regs::first(unsafe { &*ctx.regs });
    count_site::<{ slot::SPAWN_RETURNED }>(&ctx, g)
}

/// A goroutine's end.
#[uprobe]
pub fn go_exit(ctx: ProbeContext) -> u32 {
    let g = regs::first(unsafe { &*ctx.regs });
    count_site::<{ slot::EXIT }>(&ctx, g)
}

/// A goroutine is about to wait, at a call of `gopark`.
#[uprobe]
pub fn go_park(ctx: ProbeContext) -> u32 {
    let Some(hit) = blocking::<{ slot::PARK }>(&ctx) else {
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
    let Some(hit) = blocking::<{ slot::PARK_UNIVERSAL }>(&ctx) else {
        return 0;
    };
    let g = regs::first(unsafe { &*ctx.regs });
    let Some(reason) = hit.read::<u8>(g, Layout::of(&hit.target.layout).waitreason) else {
        return 0;
    };
    if reason >= 64 || Layout::of(&hit.target.layout).reasons & (1 << reason) == 0 {
        return 0;
    }
    let Some(frame) = hit.read::<u64>(g, Layout::of(&hit.target.layout).sched_bp) else {
        return 0;
    };
    park(&ctx, &hit, g, reason, frame);
    0
}

/// A goroutine goes on, behind a call of `gopark`.
#[uprobe]
pub fn go_resume(ctx: ProbeContext) -> u32 {
    let g = regs::g(unsafe { &*ctx.regs });
    resume::<{ slot::RESUME }>(&ctx, g)
}

/// A goroutine is made ready to run, in `runtime.ready`.
#[uprobe]
pub fn go_ready(ctx: ProbeContext) -> u32 {
    let g = regs::first(unsafe { &*ctx.regs });
    resume::<{ slot::READY }>(&ctx, g)
}

/// Where `g` was spawned.
#[inline(always)]
fn site(hit: &Hit<'_>, g: u64) -> Option<SiteKey> {
    let gopc = Layout::of(&hit.target.layout).gopc;
    let [created_at, _ancestors, entry] = hit.read::<[u64; 3]>(g, gopc)?;
    Some(SiteKey { created_at, entry })
}

/// A hit of a program of the tier `lifecycle`.
#[inline(always)]
fn lifecycle<const SLOT: usize>(ctx: &ProbeContext) -> Option<Hit<'static>> {
    // SAFETY: the context is the program's own.
    let hit = unsafe { Hit::new::<SLOT>(ctx.as_ptr()) }?;
    (hit.target.lifecycle_since != 0).then_some(hit)
}

/// A hit of a program of the tier `blocking`.
#[inline(always)]
fn blocking<const SLOT: usize>(ctx: &ProbeContext) -> Option<Hit<'static>> {
    // SAFETY: the context is the program's own.
    let hit = unsafe { Hit::new::<SLOT>(ctx.as_ptr()) }?;
    (hit.target.blocking_since != 0).then_some(hit)
}

#[inline(always)]
fn count_site<const SLOT: usize>(ctx: &ProbeContext, g: u64) -> u32 {
    let Some(hit) = lifecycle::<SLOT>(ctx) else {
        return 0;
    };
    let Some(site) = site(&hit, g) else {
        return 0;
    };
    hit.count(
        ctx,
        site,
        if SLOT == slot::EXIT {
            End::Exited
        } else {
            End::Spawned
        },
    );
    0
}

/// Records that `g` waits, for `reason`, with the frame pointer `frame`.
#[inline(always)]
fn park(ctx: &ProbeContext, hit: &Hit<'_>, g: u64, reason: u8, frame: u64) {
    let Some(goid) = hit.read::<u64>(g, Layout::of(&hit.target.layout).goid) else {
        return;
    };
    let reason = u32::from(reason);
    let pcs = return_addresses(frame, hit.cookie.argument);
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
    count_park(slot);
}

/// Up to `depth` return addresses of the stack whose innermost frame pointer is
/// `frame`. A frame pointer points at the caller's, and the return address lies
/// 8 bytes above it, on both architectures.
#[inline(always)]
fn return_addresses(frame: u64, depth: u16) -> [u64; WAIT_FRAMES] {
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

/// The slot of a kind of wait, see [`Hit::wait_slot`]. `None` when the
/// goroutine could not be read.
#[inline(always)]
fn wait_slot(
    ctx: &ProbeContext,
    hit: &Hit<'_>,
    g: u64,
    reason: u32,
    pcs: [u64; WAIT_FRAMES],
) -> Option<u32> {
    Some(hit.wait_slot(ctx, site(hit, g)?, reason, pcs))
}

#[inline(always)]
fn resume<const SLOT: usize>(ctx: &ProbeContext, g: u64) -> u32 {
    let Some(hit) = blocking::<SLOT>(ctx) else {
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
    // SAFETY: reads the clock.
    count_resume(
        parked.slot,
        unsafe { bpf_ktime_get_ns() }.wrapping_sub(since),
    );
    0
}
