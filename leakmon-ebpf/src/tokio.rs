//! tokio's tasks: each call of a vtable's `poll`, from its start to its return.
//!
//! `tokio_poll_session` sees both ends (kernel 6.13 and later); `tokio_poll` and
//! `tokio_poll_returned` are the same for other kernels.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns, bpf_probe_read_user},
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use aya_log_ebpf::warn;
use leakmon_common::{
    Dropped, NO_SLOT, SiteKey, WAIT_FRAMES, parked_key,
    tokio::{
        COMPLETE, HEADER_WORDS, Layout, MAX_REFERENCES, NESTED_POLLS, Polls, REFERENCES_SHIFT,
        SESSION_COOKIE, SESSION_IS_RETURN, TaskEntry, header_of, owner, slot,
    },
};

use crate::hit::{End, Hit, count_park, count_resume, exchange};
use crate::maps::{POLLING, TASKS};

/// First argument of a function in C's calling convention.
#[inline(always)]
fn first(ctx: &ProbeContext) -> u64 {
    // SAFETY: the context is the program's own.
    let regs = unsafe { &*ctx.regs };
    #[cfg(bpf_target_arch = "x86_64")]
    return regs.rdi;
    #[cfg(bpf_target_arch = "aarch64")]
    return regs.regs[0];
}

/// `bpf_session_is_return`: whether the function returns.
#[inline(always)]
fn session_is_return(ctx: *mut c_void) -> bool {
    // SAFETY: user space names the kernel's function before it loads this.
    let call: unsafe extern "C" fn(*mut c_void) -> u64 =
        unsafe { core::mem::transmute(SESSION_IS_RETURN as usize) };
    // SAFETY: as above. The result is a bool: its upper bits mean nothing.
    unsafe { call(ctx) as u8 != 0 }
}

/// `bpf_session_cookie`: a word from the call's start to its return.
#[inline(always)]
fn session_cookie(ctx: *mut c_void) -> *mut u64 {
    // SAFETY: as in `session_is_return`.
    let call: unsafe extern "C" fn(*mut c_void) -> *mut u64 =
        unsafe { core::mem::transmute(SESSION_COOKIE as usize) };
    // SAFETY: as above.
    unsafe { call(ctx) }
}

/// A call of `poll`, and its return. 1 asks the kernel not to see the return.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn tokio_poll_session(context: *mut c_void) -> u32 {
    let ctx = ProbeContext::new(context);
    let cookie = session_cookie(context);
    if session_is_return(context) {
        // SAFETY: the session's own word.
        let owner = unsafe { *cookie };
        // SAFETY: the context is the program's own.
        if let Some(hit) = unsafe { Hit::returned(context) } {
            end(&ctx, &hit, owner);
        }
        return 0;
    }
    // SAFETY: the context is the program's own.
    let Some(hit) = (unsafe { Hit::new::<{ slot::POLL }>(context) }) else {
        return 1;
    };
    let Some(owner) = begin(&ctx, &hit, first(&ctx)) else {
        return 1;
    };
    // SAFETY: the session's own word.
    unsafe { *cookie = owner };
    0
}

/// A call of `poll`.
#[uprobe]
pub fn tokio_poll(ctx: ProbeContext) -> u32 {
    // SAFETY: the context is the program's own.
    let Some(hit) = (unsafe { Hit::new::<{ slot::POLL }>(ctx.as_ptr()) }) else {
        return 0;
    };
    let owner = begin(&ctx, &hit, first(&ctx)).unwrap_or(0);
    let thread = bpf_get_current_pid_tgid();
    if let Some(polls) = POLLING.get_ptr_mut(thread) {
        // SAFETY: the thread's own entry.
        let polls = unsafe { &mut *polls };
        if let Some(place) = polls.owners.get_mut(polls.depth as usize) {
            *place = owner;
        }
        polls.depth += 1;
        return 0;
    }
    let mut polls = Polls {
        depth: 1,
        ..Polls::default()
    };
    polls.owners[0] = owner;
    if POLLING.insert(thread, polls, 0).is_err() && hit.dropped(Dropped::ThreadsFull) {
        warn!(&ctx, "the map of polling threads is full");
    }
    0
}

/// The return of a `poll`.
#[uretprobe]
pub fn tokio_poll_returned(ctx: RetProbeContext) -> u32 {
    // SAFETY: the context is the program's own.
    let Some(hit) = (unsafe { Hit::returned(ctx.as_ptr()) }) else {
        return 0;
    };
    let Some(polls) = POLLING.get_ptr_mut(bpf_get_current_pid_tgid()) else {
        return 0;
    };
    // SAFETY: the thread's own entry.
    let polls = unsafe { &mut *polls };
    if polls.depth == 0 {
        return 0;
    }
    polls.depth -= 1;
    let index = polls.depth as usize;
    if index < NESTED_POLLS {
        end(&ctx, &hit, polls.owners[index]);
    }
    0
}

/// Where a task was spawned, as far as its memory tells: its `poll`.
#[inline(always)]
fn site(poll: u64) -> SiteKey {
    SiteKey {
        created_at: 0,
        entry: poll,
    }
}

/// A poll begins; the task's [`owner`] when it is followed.
#[inline(always)]
fn begin<C: EbpfContext>(ctx: &C, hit: &Hit<'_>, header: u64) -> Option<u64> {
    if hit.target.lifecycle_since == 0 {
        return None;
    }
    let id_offset = hit.cookie.argument << 3;
    let id = if id_offset == 0 {
        None
    } else {
        Some(hit.read::<u64>(header, id_offset)?)
    };
    // SAFETY: reads the clock.
    let now = unsafe { bpf_ktime_get_ns() };
    let key = parked_key(hit.cookie.target, header);
    let entry = TASKS.get_ptr_mut(key);
    if let Some(entry) = entry {
        // SAFETY: the map's value; only the thread that polls the task writes it,
        // apart from `owner`.
        let entry = unsafe { &mut *entry };
        let same = id.is_none_or(|id| id == entry.id);
        if same && entry.owner != 0 {
            if entry.last_end >= hit.target.blocking_since
                && hit.target.blocking_since != 0
                && entry.slot != NO_SLOT
            {
                count_resume(entry.slot, now.wrapping_sub(entry.last_end));
            }
            entry.polling_since = now;
            return Some(entry.owner);
        }
        if same && id.is_some() {
            // It has ended, and is polled once more: tokio sees that, too.
            return None;
        }
    }
    let words: [u64; HEADER_WORDS] = hit.read(header, 0)?;
    if words[0] & COMPLETE != 0 {
        return None;
    }
    let vtable = vtable(hit, &words);
    let poll: u64 = hit.read(vtable, 0)?;
    let id = id.unwrap_or(now);
    let fresh = TaskEntry {
        owner: owner(header, id),
        id,
        vtable,
        poll,
        first_seen: now,
        polling_since: now,
        slot: NO_SLOT,
        known: hit.target.learning,
        ..TaskEntry::default()
    };
    match entry {
        Some(entry) => {
            // SAFETY: as above.
            unsafe {
                let before = (*entry).owner;
                // The one of the two that ends the task counts its end.
                if before != 0
                    && exchange(&raw mut (*entry).owner, before, 0) == before
                    && hit.target.learning == 0
                {
                    hit.count(ctx, site((*entry).poll), End::Exited);
                }
                *entry = fresh;
            }
        }
        None => {
            if TASKS.insert(key, fresh, u64::from(BPF_NOEXIST)).is_err() {
                if hit.dropped(Dropped::TasksFull) {
                    warn!(ctx, "the map of tasks is full");
                }
                return None;
            }
        }
    }
    if hit.target.learning == 0 {
        hit.count(ctx, site(poll), End::Spawned);
    }
    Some(fresh.owner)
}

/// The vtable's address, of a header's words.
#[inline(always)]
fn vtable(hit: &Hit<'_>, words: &[u64; HEADER_WORDS]) -> u64 {
    if Layout::of(&hit.target.layout).vtable == 4 {
        words[4]
    } else {
        words[2]
    }
}

/// A poll ends.
#[inline(always)]
fn end<C: EbpfContext>(ctx: &C, hit: &Hit<'_>, owner: u64) {
    let since = hit.target.lifecycle_since;
    if owner == 0 || since == 0 {
        return;
    }
    let header = header_of(owner);
    let Some(entry) = TASKS.get_ptr_mut(parked_key(hit.cookie.target, header)) else {
        return;
    };
    // SAFETY: as in `begin`.
    let entry = unsafe { &mut *entry };
    if entry.owner != owner || entry.polling_since < since {
        // Its memory already is another task's, whose first poll counted its end;
        // or the probes were away meanwhile.
        return;
    }
    // SAFETY: reads the clock.
    let now = unsafe { bpf_ktime_get_ns() };
    let nanos = now.wrapping_sub(entry.polling_since);
    entry.polls += 1;
    entry.busy_ns += nanos;
    if nanos > entry.longest_ns {
        entry.longest_ns = nanos;
    }
    entry.last_end = now;
    entry.polling_since = 0;
    if has_ended(hit, header, entry) {
        // SAFETY: the map's value.
        let ended = unsafe { exchange(&raw mut entry.owner, owner, 0) } == owner;
        if ended && hit.target.learning == 0 {
            hit.count(ctx, site(entry.poll), End::Exited);
        }
        return;
    }
    if hit.target.blocking_since == 0 {
        return;
    }
    if entry.slot == NO_SLOT {
        entry.slot = hit.wait_slot(ctx, site(entry.poll), 0, [0; WAIT_FRAMES]);
    }
    count_park(entry.slot);
}

/// Whether a task that was polled is complete. Its memory may be gone by now,
/// or be used for something else.
#[inline(always)]
fn has_ended(hit: &Hit<'_>, header: u64, entry: &TaskEntry) -> bool {
    // SAFETY: the helper checks the address and reports a fault.
    let words = unsafe { bpf_probe_read_user(header as *const [u64; HEADER_WORDS]) };
    let Ok(words) = words else {
        return true;
    };
    let references = words[0] >> REFERENCES_SHIFT;
    if words[0] & COMPLETE != 0
        || references == 0
        || references > MAX_REFERENCES
        || vtable(hit, &words) != entry.vtable
    {
        return true;
    }
    let id_offset = u64::from(hit.cookie.argument) << 3;
    if id_offset == 0 {
        return false;
    }
    // SAFETY: as above.
    let id = unsafe { bpf_probe_read_user(header.wrapping_add(id_offset) as *const u64) };
    id != Ok(entry.id)
}
