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
        Argument, COMPLETE, HEADER_WORDS, Layout, MAX_REFERENCES, NESTED_POLLS, NOTIFIED, Polls,
        REFERENCES_SHIFT, RUNNING, SESSION_COOKIE, SESSION_IS_RETURN, TaskEntry, header_of, owner,
        slot,
    },
};

use crate::hit::{End, Hit, count_park, count_resume, count_run, exchange_shared};
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

/// The hit of a call of `poll`, counted by what it costs.
#[inline(always)]
fn call<'a>(context: *mut c_void) -> Option<Hit<'a>> {
    // SAFETY: the context is the program's own.
    let hit = unsafe { Hit::uncounted(context) }?;
    if Argument::unpack(hit.cookie.argument).stepped {
        hit.counted::<{ slot::POLL_STEPPED }>();
    } else {
        hit.counted::<{ slot::POLL }>();
    }
    // Nothing is kept of a process that nobody watches.
    (hit.target.pool == 0).then_some(hit)
}

/// A call of `poll`, and its return. 1 asks the kernel not to see the return.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn tokio_poll_session(context: *mut c_void) -> u32 {
    let ctx = ProbeContext::new(context);
    let cookie = session_cookie(context);
    if session_is_return(context) {
        // SAFETY: the session's own word.
        let poll = unsafe { *cookie };
        // SAFETY: the context is the program's own.
        if let Some(hit) = unsafe { Hit::uncounted(context) } {
            end::<false, _>(&ctx, &hit, poll);
        }
        return 0;
    }
    let Some(hit) = call(context) else {
        return 1;
    };
    let Some(poll) = begin::<false, _>(&ctx, &hit, first(&ctx)) else {
        return 1;
    };
    // SAFETY: the session's own word.
    unsafe { *cookie = poll };
    0
}

/// A call of `poll`.
#[uprobe]
pub fn tokio_poll(ctx: ProbeContext) -> u32 {
    called::<false>(ctx)
}

/// The same before kernel 5.12.
#[uprobe]
pub fn tokio_poll_old(ctx: ProbeContext) -> u32 {
    called::<true>(ctx)
}

/// What a thread has before its first poll. It is not made on the stack, of which
/// this program needs nearly all there is.
static NO_POLLS: Polls = Polls {
    since: 0,
    depth: 0,
    polls: [0; NESTED_POLLS],
};

#[inline(always)]
fn called<const OLD: bool>(ctx: ProbeContext) -> u32 {
    let Some(hit) = call(ctx.as_ptr()) else {
        return 0;
    };
    let poll = begin::<OLD, _>(&ctx, &hit, first(&ctx)).unwrap_or(0);
    let thread = bpf_get_current_pid_tgid();
    let since = hit.target.lifecycle_since;
    let mut polls = POLLING.get_ptr_mut(thread);
    if polls.is_none() {
        if POLLING.insert(thread, &NO_POLLS, 0).is_err() && hit.dropped(Dropped::ThreadsFull) {
            warn!(&ctx, "the map of polling threads is full");
        }
        polls = POLLING.get_ptr_mut(thread);
    }
    let Some(polls) = polls else {
        return 0;
    };
    // SAFETY: the thread's own entry.
    let polls = unsafe { &mut *polls };
    if polls.since != since {
        // Those returned while the probes were away.
        polls.since = since;
        polls.depth = 0;
    }
    if let Some(place) = polls.polls.get_mut(polls.depth as usize) {
        *place = poll;
    }
    polls.depth += 1;
    0
}

/// The return of a `poll`.
#[uretprobe]
pub fn tokio_poll_returned(ctx: RetProbeContext) -> u32 {
    returned::<false>(ctx)
}

/// The same before kernel 5.12.
#[uretprobe]
pub fn tokio_poll_returned_old(ctx: RetProbeContext) -> u32 {
    returned::<true>(ctx)
}

#[inline(always)]
fn returned<const OLD: bool>(ctx: RetProbeContext) -> u32 {
    // SAFETY: the context is the program's own.
    let Some(hit) = (unsafe { Hit::uncounted(ctx.as_ptr()) }) else {
        return 0;
    };
    let Some(polls) = POLLING.get_ptr_mut(bpf_get_current_pid_tgid()) else {
        return 0;
    };
    // SAFETY: the thread's own entry.
    let polls = unsafe { &mut *polls };
    if polls.depth == 0 || polls.since != hit.target.lifecycle_since {
        return 0;
    }
    polls.depth -= 1;
    // Read anew: kernels before 6.13 do not see that a bound of the depth before is
    // one of the depth now.
    // SAFETY: the thread's own entry.
    let index = unsafe { (&raw const polls.depth).read_volatile() } as usize;
    if index < NESTED_POLLS {
        end::<OLD, _>(&ctx, &hit, polls.polls[index]);
    }
    0
}

/// A call of `shutdown`, by which a runtime that ends, or a `LocalSet`, ends a task
/// without a poll. One that is being polled ends with that poll.
#[uprobe]
pub fn tokio_shutdown(ctx: ProbeContext) -> u32 {
    shut_down::<false>(ctx)
}

/// The same before kernel 5.12.
#[uprobe]
pub fn tokio_shutdown_old(ctx: ProbeContext) -> u32 {
    shut_down::<true>(ctx)
}

#[inline(always)]
fn shut_down<const OLD: bool>(ctx: ProbeContext) -> u32 {
    // SAFETY: the context is the program's own.
    let Some(hit) = (unsafe { Hit::new::<{ slot::SHUTDOWN }>(ctx.as_ptr()) }) else {
        return 0;
    };
    if hit.target.lifecycle_since == 0 {
        return 0;
    }
    let header = first(&ctx);
    let Some(entry) = TASKS.get_ptr_mut(parked_key(hit.cookie.target, header)) else {
        return 0;
    };
    let Some(state) = hit.read::<u64>(header, 0) else {
        return 0;
    };
    let id = Argument::unpack(hit.cookie.argument).id;
    // SAFETY: the map's value.
    let entry = unsafe { &mut *entry };
    if state & (RUNNING | COMPLETE) != 0 || (id != 0 && hit.read(header, id) != Some(entry.id)) {
        return 0;
    }
    ended::<OLD, _>(&ctx, &hit, entry, entry.owner);
    0
}

/// Where a task was spawned, as far as its memory tells.
#[inline(always)]
fn site(entry: &TaskEntry) -> SiteKey {
    SiteKey {
        created_at: entry.created_at,
        entry: entry.vtable,
    }
}

/// Counts the end of the task that had `owner`, unless somebody else does.
#[inline(always)]
fn ended<const OLD: bool, C: EbpfContext>(
    ctx: &C,
    hit: &Hit<'_>,
    entry: &mut TaskEntry,
    owner: u64,
) {
    // Before the exchange: behind it, the entry may be written anew.
    let site = site(entry);
    if owner != 0 && change::<OLD>(hit, &raw mut entry.owner, owner, 0) && hit.target.learning == 0
    {
        hit.count(ctx, site, End::Exited);
    }
}

/// Sets a word of an entry if it is `old`; whether it was.
#[inline(always)]
fn change<const OLD: bool>(hit: &Hit<'_>, word: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the map's value.
    let found = unsafe { exchange_shared::<OLD>(word, old, new) };
    if found.is_none() {
        hit.dropped(Dropped::Contended);
    }
    found == Some(old)
}

/// Counts the run of the poll that began at `since`, unless somebody else does: its
/// return, and the start of the next poll of the task, or of another one in its
/// memory, may come at once on two threads.
#[inline(always)]
fn settle<const OLD: bool>(hit: &Hit<'_>, entry: &mut TaskEntry, since: u64, now: u64) -> bool {
    // Before the exchange: who begins the next poll reads the one behind it, and
    // may write the entry anew.
    entry.last_end = now;
    let slot = entry.slot;
    let ours = change::<OLD>(hit, &raw mut entry.polling_since, since, 0);
    if ours {
        count_run::<OLD>(slot, now.wrapping_sub(since));
    }
    ours
}

/// A poll begins; the word that its return needs, when the task is followed.
#[inline(always)]
fn begin<const OLD: bool, C: EbpfContext>(ctx: &C, hit: &Hit<'_>, header: u64) -> Option<u64> {
    if hit.target.lifecycle_since == 0 {
        return None;
    }
    let argument = Argument::unpack(hit.cookie.argument);
    let id = match argument.id {
        0 => None,
        offset => Some(hit.read::<u64>(header, offset)?),
    };
    // SAFETY: reads the clock.
    let now = unsafe { bpf_ktime_get_ns() };
    let key = parked_key(hit.cookie.target, header);
    let entry = TASKS.get_ptr_mut(key);
    if let Some(entry) = entry {
        // SAFETY: the map's value. Only the thread that polls the task writes it,
        // and the one that polled it before: see `settle`.
        let entry = unsafe { &mut *entry };
        let same = id.is_none_or(|id| id == entry.id);
        let blocking = hit.target.blocking_since;
        if entry.owner != 0 {
            // SAFETY: as above.
            let since = unsafe { (&raw const entry.polling_since).read_volatile() };
            // Its return has not come yet.
            if since >= hit.target.lifecycle_since
                && settle::<OLD>(hit, entry, since, now)
                && same
                && blocking != 0
            {
                count_park(entry.slot);
            }
        }
        if same && entry.owner != 0 {
            if entry.slot == NO_SLOT {
                entry.slot = hit.wait_slot(ctx, site(entry), 0, [0; WAIT_FRAMES]);
            } else if entry.last_end >= blocking && blocking != 0 {
                count_resume(entry.slot, now.wrapping_sub(entry.last_end));
            }
            entry.polling_since = now;
            return Some(owner(header, now));
        }
        if same && id.is_some() {
            // It has ended, and is polled once more: tokio sees that, too.
            return None;
        }
        // Its memory is another's by now. The one of the two that ends the task
        // counts its end.
        ended::<OLD, _>(ctx, hit, entry, entry.owner);
    }
    let words: [u64; HEADER_WORDS] = hit.read(header, 0)?;
    let (vtable, list) = identity(hit, &words);
    // What is in no list is a closure on a blocking thread, no task: a worker of
    // the runtime, too, is one.
    if words[0] & COMPLETE != 0 || list == 0 {
        return None;
    }
    let created_at = if argument.located {
        hit.read(header, argument.id + 8)?
    } else {
        0
    };
    let id = id.unwrap_or(now);
    let place = SiteKey {
        created_at,
        entry: vtable,
    };
    let fresh = TaskEntry {
        owner: owner(header, id),
        id,
        vtable,
        created_at,
        first_seen: now,
        last_end: 0,
        polling_since: now,
        slot: hit.wait_slot(ctx, place, 0, [0; WAIT_FRAMES]),
        known: hit.target.learning,
    };
    match entry {
        // SAFETY: as above.
        Some(entry) => unsafe { *entry = fresh },
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
        hit.count(ctx, place, End::Spawned);
    }
    Some(owner(header, now))
}

/// The vtable's address and the number of the list of tasks that it is in, of a
/// header's words.
#[inline(always)]
fn identity(hit: &Hit<'_>, words: &[u64; HEADER_WORDS]) -> (u64, u64) {
    if Layout::of(&hit.target.layout).vtable == 4 {
        (words[4], words[5])
    } else {
        (words[2], words[3])
    }
}

/// A poll ends, which [`begin`] gave.
#[inline(always)]
fn end<const OLD: bool, C: EbpfContext>(ctx: &C, hit: &Hit<'_>, poll: u64) {
    if poll == 0 || hit.target.lifecycle_since == 0 {
        return;
    }
    let header = header_of(poll);
    let Some(entry) = TASKS.get_ptr_mut(parked_key(hit.cookie.target, header)) else {
        return;
    };
    // SAFETY: as in `begin`.
    let entry = unsafe { &mut *entry };
    // SAFETY: the map's value.
    let (task, since) = unsafe {
        (
            (&raw const entry.owner).read_volatile(),
            (&raw const entry.polling_since).read_volatile(),
        )
    };
    // SAFETY: reads the clock.
    let now = unsafe { bpf_ktime_get_ns() };
    // Otherwise the next poll has begun, of this task or of another in its memory,
    // and counted what there was to count; or the probes were away meanwhile.
    if since < hit.target.lifecycle_since
        || owner(header, since) != poll
        || !settle::<OLD>(hit, entry, since, now)
    {
        return;
    }
    // `task` was the task of this poll: the next one's is written after it is
    // settled.
    if has_ended(hit, header, entry) {
        ended::<OLD, _>(ctx, hit, entry, task);
    } else if hit.target.blocking_since != 0 {
        count_park(entry.slot);
    }
}

/// Whether a header's word may be the address of another, or none.
#[inline(always)]
fn may_be_link(word: u64) -> bool {
    /// The lowest page that can be mapped, and the end of user space.
    const ADDRESSES: core::ops::Range<u64> = 0x1000..1 << 48;
    word == 0 || (word & 7 == 0 && ADDRESSES.contains(&word))
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
        || identity(hit, &words).0 != entry.vtable
    {
        return true;
    }
    // An allocator writes its own words to the start of what was freed: there they
    // may look like a state with many references.
    let old = Layout::of(&hit.target.layout).vtable == 4;
    let next = if old { words[3] } else { words[1] };
    if !may_be_link(next) || old && !(may_be_link(words[1]) && may_be_link(words[2])) {
        return true;
    }
    if next != 0 && words[0] & NOTIFIED == 0 {
        // SAFETY: as above.
        let state = unsafe { bpf_probe_read_user(header as *const u64) };
        // Unless it was queued just while it was read.
        if state == Ok(words[0]) {
            return true;
        }
    }
    let id = u64::from(Argument::unpack(hit.cookie.argument).id);
    if id == 0 {
        return false;
    }
    // SAFETY: as above.
    let id = unsafe { bpf_probe_read_user(header.wrapping_add(id) as *const u64) };
    id != Ok(entry.id)
}
