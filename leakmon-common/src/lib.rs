//! Types on both sides of leakmon's kernel boundary.
//!
//! The kernel side aggregates in maps whose keys and values are defined here,
//! once, `repr(C)` and free of padding, so that user space reads exactly what
//! the kernel wrote.
#![no_std]

pub mod go;
pub mod threads;
pub mod tokio;

/// Buckets of a blocked-duration histogram.
///
/// Bucket `i` counts durations of `2^i` to `2^(i+1) - 1` nanoseconds; the last
/// one counts everything from 2^47 ns (39 hours) on.
pub const HISTOGRAM_BUCKETS: usize = 48;

/// Return addresses kept of a park's stack, innermost first.
pub const WAIT_FRAMES: usize = 4;

/// Plans that one leakmon attaches at once, at most: three runtimes of 500
/// processes. User space makes the maps smaller when it loads the object.
pub const MAX_TARGETS: u32 = 1536;

/// Places of [`Counters::hits`]. Each runtime numbers its programs from 0: one
/// target has one runtime.
pub const SLOTS: usize = 8;

/// Words of [`Target::layout`].
pub const LAYOUT_WORDS: usize = 4;

/// What one runtime's programs must know of a process: the runtime's own type
/// (`go::Layout`, ...) as words.
pub type Layout = [u64; LAYOUT_WORDS];

/// Where a task was spawned, as the kernel side sees it: two addresses of the
/// running process, symbolised in user space.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord)]
pub struct SiteKey {
    /// Return address of the `go` statement (`runtime.g.gopc`). tokio: address of
    /// the `Location` of the spawn, 0 where it keeps none.
    pub created_at: u64,
    /// Entry of the function that the task runs (`runtime.g.startpc`). tokio: the
    /// task's vtable.
    pub entry: u64,
}

/// What the kernel side knows of a watched process. `TARGETS` holds one for
/// each index; an index that is not in use is all zero.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Target {
    /// Since when spawns and exits are counted, CLOCK_MONOTONIC nanoseconds. 0:
    /// they are not; their hits are counted and otherwise ignored.
    pub lifecycle_since: u64,
    /// The same for parks and resumes. Parks recorded before it are stale.
    pub blocking_since: u64,
    /// What the runtime's programs alone understand.
    pub layout: Layout,
    /// Must equal the cookie's, so that a link of an earlier user of this index
    /// can never count for this one.
    pub epoch: u32,
    /// 1: it is not known yet which tasks there were before the probes came: one
    /// that is seen for the first time is taken for such, and no end is counted.
    pub learning: u32,
    /// 1: no process, but a pool of them, which have the same probes. Hits of its
    /// links are those of the member that [`member_key`] finds; this index has
    /// those of processes that nobody watches.
    pub pool: u64,
}

/// What a link passes to its program, packed in an attach cookie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cookie {
    /// Index in `TARGETS`.
    pub target: u16,
    /// The place's own, as its program understands it.
    pub argument: u16,
    /// Of the target, see [`Target::epoch`].
    pub epoch: u32,
}

impl Cookie {
    /// As the kernel keeps it.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        self.target as u64 | (self.argument as u64) << 16 | (self.epoch as u64) << 32
    }

    /// The reverse of [`Cookie::pack`].
    #[inline(always)]
    pub const fn unpack(raw: u64) -> Self {
        Cookie {
            target: raw as u16,
            argument: (raw >> 16) as u16,
            epoch: (raw >> 32) as u32,
        }
    }
}

/// Key of `MEMBERS`: a process, by its id, in the pool with this index in
/// `TARGETS`. The value is the cookie of the process's own index in there; 0: the
/// process has links of its own, which count its hits.
#[inline(always)]
pub const fn member_key(tgid: u32, pool: u16) -> u64 {
    (tgid as u64) << 16 | pool as u64
}

/// Key of `SITES`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct TargetSite {
    /// Index in `TARGETS`.
    pub target: u64,
    /// Where the task was spawned.
    pub site: SiteKey,
}

/// Value of `SITES`, one for each CPU.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SiteCount {
    /// Tasks spawned.
    pub spawned: u64,
    /// Tasks that ended.
    pub exited: u64,
}

/// Key of `WAITS`: a kind of wait. The value is a slot, the index of its
/// [`WaitCount`] in `WAIT_COUNTS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct WaitKey {
    /// Index in `TARGETS`.
    pub target: u32,
    /// The runtime's number of the wait reason.
    pub reason: u32,
    /// Where the waiting task was spawned.
    pub site: SiteKey,
    /// Return addresses, innermost first; 0 from the first that was not kept.
    pub pcs: [u64; WAIT_FRAMES],
}

/// Value of `WAIT_COUNTS`, one for each CPU.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WaitCount {
    /// Times a task blocked.
    pub parks: u64,
    /// Times one that was seen to block went on.
    pub resumes: u64,
    /// Sum of the blocked durations of `resumes`, in nanoseconds.
    pub total_ns: u64,
    /// tokio: polls that ended, whatever became of the task then.
    pub runs: u64,
    /// Sum of their durations, in nanoseconds.
    pub busy_ns: u64,
    /// The longest of them, in nanoseconds.
    pub longest_ns: u64,
    /// The blocked durations, see [`histogram_bucket`].
    pub histogram: [u64; HISTOGRAM_BUCKETS],
}

impl Default for WaitCount {
    fn default() -> Self {
        WaitCount {
            parks: 0,
            resumes: 0,
            total_ns: 0,
            runs: 0,
            busy_ns: 0,
            longest_ns: 0,
            histogram: [0; HISTOGRAM_BUCKETS],
        }
    }
}

/// [`Parked::slot`] of a wait that found no free slot.
pub const NO_SLOT: u32 = u32::MAX;

/// Value of `PARKED`: the latest park of one `runtime.g`. The runtime uses its
/// g structs again, and so is the entry: it is written in place.
///
/// 56 bytes: with the kernel's own header it fits a 128 byte allocation.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Parked {
    /// When it parked, CLOCK_MONOTONIC nanoseconds; 0: it has gone on.
    pub since: u64,
    /// The goroutine's id: `slot` holds for this goroutine only.
    pub goid: u64,
    /// Slot of the wait in `WAIT_COUNTS`, or [`NO_SLOT`].
    pub slot: u32,
    /// The runtime's number of the wait reason.
    pub reason: u32,
    /// As [`WaitKey::pcs`].
    pub pcs: [u64; WAIT_FRAMES],
}

/// Key of `PARKED`: the address of a `runtime.g` (user addresses have at most
/// 48 bits) and the target's index.
#[inline(always)]
pub const fn parked_key(target: u16, g: u64) -> u64 {
    (g & ((1 << 48) - 1)) | (target as u64) << 48
}

/// Why a hit was not counted: index in [`Counters::dropped`].
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dropped {
    /// `SITES` is full: a spawn or exit was not counted.
    SitesFull = 0,
    /// `PARKED` is full: a wait was not followed.
    ParkedFull = 1,
    /// `WAITS` or `WAIT_COUNTS` is full: a wait was not counted.
    WaitsFull = 2,
    /// The target's memory could not be read without a page fault.
    Unreadable = 3,
    /// A goroutine went on that was not seen to park in this window. This is no
    /// loss: it parked before leakmon came.
    UnmatchedResume = 4,
    /// A goroutine parked, or a thread was taken from its CPU or ended, that was
    /// not seen to go on: its earlier wait's duration is lost.
    LostResume = 5,
    /// The map of tasks, or of threads' births, is full: one is not followed.
    TasksFull = 6,
    /// A map by thread is full: what one does is not counted.
    ThreadsFull = 7,
    /// Before kernel 5.12: another CPU had the entry for too long. Something of a
    /// task is not counted.
    Contended = 8,
}

/// Variants of [`Dropped`].
pub const DROP_REASONS: usize = 9;

/// Value of `COUNTERS`, one for each CPU and target.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Hits by program, in the runtime's own numbers.
    pub hits: [u64; SLOTS],
    /// Hits not counted otherwise, by [`Dropped`].
    pub dropped: [u64; DROP_REASONS],
}

/// Bucket of [`HISTOGRAM_BUCKETS`] that a duration in nanoseconds falls into.
#[inline(always)]
pub const fn histogram_bucket(nanos: u64) -> usize {
    // The BPF instruction set cannot count leading zeros: this is a binary
    // search in 6 steps.
    let mut rest = nanos;
    let mut bucket = 0;
    if rest >> 32 != 0 {
        rest >>= 32;
        bucket += 32;
    }
    if rest >> 16 != 0 {
        rest >>= 16;
        bucket += 16;
    }
    if rest >> 8 != 0 {
        rest >>= 8;
        bucket += 8;
    }
    if rest >> 4 != 0 {
        rest >>= 4;
        bucket += 4;
    }
    if rest >> 2 != 0 {
        rest >>= 2;
        bucket += 2;
    }
    if rest >> 1 != 0 {
        bucket += 1;
    }
    if bucket < HISTOGRAM_BUCKETS {
        bucket
    } else {
        HISTOGRAM_BUCKETS - 1
    }
}

#[cfg(feature = "user")]
mod user {
    use super::threads::{KernelOffsets, StackCopy, ThreadEntry, ThreadRecord};
    use super::tokio::{Polls, TaskEntry};
    use super::{Counters, Parked, SiteCount, SiteKey, Target, TargetSite, WaitCount, WaitKey};

    macro_rules! pod {
        ($($name:ty),+) => {
            $(
                // SAFETY: repr(C), made of integers only and free of padding
                // (checked by a test), so every bit pattern is a value.
                unsafe impl aya::Pod for $name {}
            )+
        };
    }

    pod!(
        Counters,
        KernelOffsets,
        Parked,
        Polls,
        SiteCount,
        SiteKey,
        StackCopy,
        Target,
        TargetSite,
        TaskEntry,
        ThreadEntry,
        ThreadRecord,
        WaitCount,
        WaitKey
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two() {
        assert_eq!(histogram_bucket(0), 0);
        assert_eq!(histogram_bucket(1), 0);
        for bit in 1..64 {
            let expected = if bit < HISTOGRAM_BUCKETS {
                bit
            } else {
                HISTOGRAM_BUCKETS - 1
            };
            assert_eq!(histogram_bucket(1 << bit), expected);
            assert_eq!(histogram_bucket((1 << bit) | ((1 << bit) - 1)), expected);
            assert_eq!(
                histogram_bucket((1 << bit) - 1),
                (bit - 1).min(HISTOGRAM_BUCKETS - 1)
            );
        }
    }

    #[test]
    fn cookies_round_trip() {
        for cookie in [
            Cookie {
                target: 0,
                argument: 0,
                epoch: 0,
            },
            Cookie {
                target: 255,
                argument: 4,
                epoch: 7,
            },
            Cookie {
                target: u16::MAX,
                argument: u16::MAX,
                epoch: u32::MAX,
            },
        ] {
            assert_eq!(Cookie::unpack(cookie.pack()), cookie);
        }
    }

    #[test]
    fn types_have_no_padding() {
        assert_eq!(size_of::<SiteKey>(), 2 * 8);
        assert_eq!(size_of::<Target>(), 3 * 8 + LAYOUT_WORDS * 8 + 2 * 4);
        assert_eq!(size_of::<TargetSite>(), 3 * 8);
        assert_eq!(size_of::<SiteCount>(), 2 * 8);
        assert_eq!(size_of::<WaitKey>(), 2 * 4 + 2 * 8 + WAIT_FRAMES * 8);
        assert_eq!(size_of::<WaitCount>(), (6 + HISTOGRAM_BUCKETS) * 8);
        assert_eq!(size_of::<Parked>(), 2 * 8 + 2 * 4 + WAIT_FRAMES * 8);
        assert_eq!(size_of::<threads::KernelOffsets>(), 9 * 4);
        assert_eq!(size_of::<threads::ThreadRecord>(), 7 * 8 + 2 * 4);
        assert_eq!(size_of::<tokio::TaskEntry>(), 7 * 8 + 2 * 4);
        assert_eq!(size_of::<tokio::Polls>(), 10 * 8);
        assert_eq!(size_of::<threads::ThreadEntry>(), 8 * 8 + 2 * 4);
        assert_eq!(
            size_of::<threads::StackCopy>(),
            6 * 8 + threads::STACK_BYTES
        );
        assert_eq!(size_of::<Counters>(), (SLOTS + DROP_REASONS) * 8);
    }

    #[test]
    fn parked_keys_of_two_targets_differ() {
        let g = 0xc0_0000_01a0;
        assert_ne!(parked_key(0, g), parked_key(1, g));
        assert_eq!(parked_key(3, g) >> 48, 3);
        assert_eq!(parked_key(3, g) & 0xffff_ffff_ffff, g);
    }
}
