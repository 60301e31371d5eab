//! What the programs of all runtimes do alike: count a hit, a spawn, an exit, a
//! wait.

use core::arch::asm;
use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_pid_tgid, bpf_probe_read_user},
};
use aya_log_ebpf::warn;
use leakmon_common::{
    Cookie, Counters, Dropped, NO_SLOT, SiteCount, SiteKey, Target, TargetSite, WAIT_FRAMES,
    WaitKey, histogram_bucket, member_key,
};

use crate::maps::{COUNTERS, FREE_SLOTS, LOCKS, MEMBERS, SITES, TARGETS, WAIT_COUNTS, WAITS};

/// Adds to a counter that other programs add to as well. The address is taken
/// as a pointer, since no reference to it is exclusive.
///
/// # Safety
///
/// `counter` must point into a map's value and be aligned to 8 bytes.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, value: u64) {
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

/// Sets `*word` to `new` if it is `old`, at once; what it was.
///
/// # Safety
///
/// `word` must point into a map's value and be aligned to 8 bytes.
#[inline(always)]
unsafe fn exchange(word: *mut u64, old: u64, new: u64) -> u64 {
    let mut result = old;
    // SAFETY: one aligned 8-byte access to what the caller vouches for.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word,
            new = in(reg) new,
            inout("r0") result,
            options(nostack),
        );
    }
    result
}

/// As [`exchange`] of a word that other processors change as well. `OLD`: without
/// the instruction, which came with kernel 5.12: by [`LOCKS`], and `None` when
/// somebody else had the word for too long.
///
/// # Safety
///
/// As [`exchange`].
#[inline(always)]
pub unsafe fn exchange_shared<const OLD: bool>(word: *mut u64, old: u64, new: u64) -> Option<u64> {
    /// Each takes about 0.1 us, and who has the word is not preempted.
    const TRIES: u32 = 128;
    if !OLD {
        // SAFETY: as the caller says.
        return Some(unsafe { exchange(word, old, new) });
    }
    let key = word as u64;
    for _ in 0..TRIES {
        if LOCKS.insert(key, 0, u64::from(BPF_NOEXIST)).is_ok() {
            // SAFETY: as the caller says, and nobody else does the same now.
            let found = unsafe { exchange_here(word, old, new) };
            let _ = LOCKS.remove(key);
            return Some(found);
        }
    }
    None
}

/// As [`exchange`], where nothing comes between on other processors. `OLD`: before
/// kernel 5.12 nothing does on this one either, for programs are not preempted.
///
/// # Safety
///
/// As [`exchange`].
#[inline(always)]
pub unsafe fn exchange_own<const OLD: bool>(word: *mut u64, old: u64, new: u64) -> u64 {
    // SAFETY: as the caller says.
    unsafe {
        if OLD {
            exchange_here(word, old, new)
        } else {
            exchange(word, old, new)
        }
    }
}

#[inline(always)]
unsafe fn exchange_here(word: *mut u64, old: u64, new: u64) -> u64 {
    // SAFETY: as the caller says.
    unsafe {
        let found = word.read_volatile();
        if found == old {
            word.write_volatile(new);
        }
        found
    }
}

/// Keeps a program of uprobes on its thread's own stack.
///
/// From kernel 6.13 on (x86_64) a program with more than 64 bytes of stack has
/// them in a place of its own for each CPU, unless it calls other programs
/// (`bpf_enable_priv_stack` and `check_max_stack_depth` of
/// kernel/bpf/verifier.c). A thread that is preempted in a program of uprobes
/// loses them to the next one that runs it on that CPU: the kernel then follows
/// pointers that are none, and crashes. So there is a call of `bpf_tail_call`
/// (12), which is never reached.
#[inline(always)]
fn keep_own_stack() {
    // SAFETY: sets a register, and jumps over the call.
    unsafe {
        asm!(
            "r0 = 0",
            "if r0 == 0 goto 1f",
            "call 12",
            "1:",
            out("r0") _,
            options(nomem, nostack),
        );
    }
}

/// The attach cookie of the place that is hit. Behind the call of
/// `bpf_get_attach_cookie` (174) there is room for a second instruction: for
/// kernels without it, user space puts the cookie itself there, a constant of two.
///
/// # Safety
///
/// `ctx` is the context of a program of uprobes.
#[inline(always)]
unsafe fn attach_cookie(ctx: *mut c_void) -> u64 {
    let cookie;
    // SAFETY: a helper's call, which leaves none of its arguments' registers.
    unsafe {
        asm!(
            "call 174",
            "goto +0",
            inlateout("r1") ctx => _,
            lateout("r0") cookie,
            lateout("r2") _,
            lateout("r3") _,
            lateout("r4") _,
            lateout("r5") _,
            options(nostack),
        );
    }
    cookie
}

/// What every program needs to count one hit.
pub struct Hit<'a> {
    pub cookie: Cookie,
    pub target: &'a Target,
    counters: *mut Counters,
}

impl Hit<'_> {
    /// Counts a hit of the program with this slot; `None` when the link is not
    /// of the target that has the cookie's index now.
    ///
    /// # Safety
    ///
    /// `ctx` is the context of a program that has attach cookies.
    #[inline(always)]
    pub unsafe fn new<const SLOT: usize>(ctx: *mut c_void) -> Option<Self> {
        // SAFETY: as the caller says.
        let hit = unsafe { Self::uncounted(ctx) }?;
        hit.counted::<SLOT>();
        Some(hit)
    }

    /// As [`Hit::new`], without counting a hit: for the return of a call, which
    /// was counted, and for programs that have several slots.
    ///
    /// # Safety
    ///
    /// As [`Hit::new`].
    #[inline(always)]
    pub unsafe fn uncounted(ctx: *mut c_void) -> Option<Self> {
        keep_own_stack();
        // SAFETY: as the caller says.
        Self::find(Cookie::unpack(unsafe { attach_cookie(ctx) }))
    }

    /// As [`Hit::new`], for a target that is known otherwise than by a link.
    #[inline(always)]
    pub fn of<const SLOT: usize>(cookie: Cookie) -> Option<Self> {
        let hit = Self::find(cookie)?;
        hit.counted::<SLOT>();
        Some(hit)
    }

    /// Counts it as a hit of the program with this slot.
    #[inline(always)]
    pub fn counted<const SLOT: usize>(&self) {
        // SAFETY: the map's value.
        unsafe { add(&raw mut (*self.counters).hits[SLOT], 1) };
    }

    #[inline(always)]
    fn find(link: Cookie) -> Option<Self> {
        let mut cookie = link;
        let mut target = Self::target(cookie)?;
        if target.pool != 0 {
            let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
            // SAFETY: user space alone writes it, before and after the target's
            // programs.
            let member = unsafe { MEMBERS.get(member_key(tgid, link.target)) };
            if let Some(&member) = member {
                if member == 0 {
                    return None;
                }
                cookie = Cookie {
                    argument: link.argument,
                    ..Cookie::unpack(member)
                };
                target = Self::target(cookie)?;
            }
        }
        let counters = COUNTERS.get_ptr_mut(u32::from(cookie.target))?;
        Some(Self {
            cookie,
            target,
            counters,
        })
    }

    #[inline(always)]
    fn target(cookie: Cookie) -> Option<&'static Target> {
        let target = TARGETS.get(u32::from(cookie.target))?;
        (target.epoch == cookie.epoch).then_some(target)
    }

    /// Counts a hit that is not counted otherwise. True for the first ones of
    /// their kind on this CPU.
    #[inline(always)]
    pub fn dropped(&self, reason: Dropped) -> bool {
        // SAFETY: the map's value.
        unsafe {
            let counter = &raw mut (*self.counters).dropped[reason as usize];
            let first = counter.read_volatile() == 0;
            add(counter, 1);
            first
        }
    }

    /// Reads a field of a struct of the target.
    #[inline(always)]
    pub fn read<T>(&self, base: u64, offset: u16) -> Option<T> {
        let at = base.wrapping_add(u64::from(offset)) as *const T;
        // SAFETY: the helper checks the address and reports a fault.
        let value = unsafe { bpf_probe_read_user(at) }.ok();
        if value.is_none() {
            self.dropped(Dropped::Unreadable);
        }
        value
    }

    /// Counts a spawn or exit at a site.
    #[inline(always)]
    pub fn count<C: EbpfContext>(&self, ctx: &C, site: SiteKey, end: End) {
        let key = TargetSite {
            target: u64::from(self.cookie.target),
            site,
        };
        let mut count = SITES.get_ptr_mut(key);
        if count.is_none() {
            // Only when nobody else did meanwhile: theirs may have counted already.
            let _ = SITES.insert(key, SiteCount::default(), u64::from(BPF_NOEXIST));
            count = SITES.get_ptr_mut(key);
        }
        let Some(count) = count else {
            if self.dropped(Dropped::SitesFull) {
                warn!(ctx, "the map of spawn sites is full");
            }
            return;
        };
        // SAFETY: the map's value; entries are removed after the last program of
        // their target.
        unsafe {
            match end {
                End::Spawned => add(&raw mut (*count).spawned, 1),
                End::Exited => add(&raw mut (*count).exited, 1),
            }
        }
    }

    /// The slot of a kind of wait; [`NO_SLOT`] when there is none free.
    #[inline(always)]
    pub fn wait_slot<C: EbpfContext>(
        &self,
        ctx: &C,
        site: SiteKey,
        reason: u32,
        pcs: [u64; WAIT_FRAMES],
    ) -> u32 {
        let key = WaitKey {
            target: u32::from(self.cookie.target),
            reason,
            site,
            pcs,
        };
        // SAFETY: values of this map never change; entries are removed after the
        // last program of their target.
        if let Some(slot) = unsafe { WAITS.get(key) } {
            return *slot;
        }
        if let Ok(Some(slot)) = FREE_SLOTS.pop() {
            if WAITS.insert(key, slot, u64::from(BPF_NOEXIST)).is_ok() {
                return slot;
            }
            // Somebody else was faster, or the map is full.
            let _ = FREE_SLOTS.push(slot, 0);
            // SAFETY: as above.
            if let Some(slot) = unsafe { WAITS.get(key) } {
                return *slot;
            }
        }
        if self.dropped(Dropped::WaitsFull) {
            warn!(ctx, "the map of waits is full");
        }
        NO_SLOT
    }
}

/// What became of a task.
#[derive(Clone, Copy)]
pub enum End {
    Spawned,
    Exited,
}

/// Counts that a task blocked.
#[inline(always)]
pub fn count_park(slot: u32) {
    if let Some(count) = WAIT_COUNTS.get_ptr_mut(slot) {
        // SAFETY: the map's value.
        unsafe { add(&raw mut (*count).parks, 1) };
    }
}

/// Counts that a task went on that was blocked for so long.
#[inline(always)]
pub fn count_resume(slot: u32, nanos: u64) {
    let Some(count) = WAIT_COUNTS.get_ptr_mut(slot) else {
        return;
    };
    // SAFETY: the map's value; the bucket is below the histogram's length.
    unsafe {
        add(&raw mut (*count).resumes, 1);
        add(&raw mut (*count).total_ns, nanos);
        add(&raw mut (*count).histogram[histogram_bucket(nanos)], 1);
    }
}

/// Counts that a task ran for so long.
#[inline(always)]
pub fn count_run<const OLD: bool>(slot: u32, nanos: u64) {
    let Some(count) = WAIT_COUNTS.get_ptr_mut(slot) else {
        return;
    };
    // SAFETY: the map's value.
    unsafe {
        add(&raw mut (*count).runs, 1);
        add(&raw mut (*count).busy_ns, nanos);
        let longest = &raw mut (*count).longest_ns;
        let before = longest.read_volatile();
        if nanos > before {
            let found = exchange_own::<OLD>(longest, before, nanos);
            // Another program on this CPU came between; a third one does not.
            if found != before && nanos > found {
                exchange_own::<OLD>(longest, found, nanos);
            }
        }
    }
}
