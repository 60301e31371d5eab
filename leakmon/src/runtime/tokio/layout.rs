//! What is dated: where tokio keeps things, by version.
//!
//! Everything is of tokio's `runtime/task/{core,raw,state,list}.rs`, read in
//! 1.18 to 1.54; the file:line of the newest is not given, since they move.

use std::fmt;

/// Oldest minor version of tokio 1 that is read.
pub const OLDEST: u32 = 18;

/// A version of tokio, `1.44.2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The 44 of 1.44.2; the major version is always 1.
    pub minor: u32,
    /// The 2 of 1.44.2.
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "1.{}.{}", self.minor, self.patch)
    }
}

/// How a task's vtable and header look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// 1.18 to 1.20: eight functions; the list's pointers lie in the header.
    V18,
    /// 1.21 and 1.22: eight functions and the trailer's offset.
    V21,
    /// 1.23 and later: seven functions and the offsets of trailer, scheduler
    /// and id.
    V23,
}

impl Layout {
    /// The layout of a version; `None` before [`OLDEST`].
    pub fn of(version: Version) -> Option<Layout> {
        match version.minor {
            ..OLDEST => None,
            OLDEST..=20 => Some(Layout::V18),
            21..=22 => Some(Layout::V21),
            23.. => Some(Layout::V23),
        }
    }

    /// Functions of a vtable; the last one is `shutdown`.
    pub fn functions(self) -> usize {
        match self {
            Layout::V18 | Layout::V21 => 8,
            Layout::V23 => 7,
        }
    }

    /// Index of `drop_abort_handle` among them.
    pub const DROP_ABORT_HANDLE: usize = 5;

    /// Index of `dealloc` among them; `poll` is the first.
    pub fn dealloc(self) -> usize {
        match self {
            Layout::V18 | Layout::V21 => 1,
            Layout::V23 => 2,
        }
    }

    /// `Header.vtable`, in bytes.
    pub fn vtable(self) -> u64 {
        match self {
            // state, owned (two words), queue_next, vtable, owner_id
            Layout::V18 => 0x20,
            // state, queue_next, vtable, owner_id
            Layout::V21 | Layout::V23 => 0x10,
        }
    }

    /// `Header.owner_id`, in bytes: the id of the list of tasks that the task
    /// was put into, 0 before.
    pub fn owner_id(self) -> u64 {
        self.vtable() + 8
    }

    /// `Header.owned`, in bytes, where it is not in the trailer.
    pub fn owned_in_header(self) -> Option<u64> {
        (self == Layout::V18).then_some(8)
    }

    /// Bytes of a header that are read.
    pub fn header(self) -> u64 {
        self.owner_id() + 8
    }
}

/// `Header.state`, in bytes: the first field of every layout.
pub const STATE: u64 = 0;

/// The state word: runtime/task/state.rs, the same from 0.2.25 to 1.54.
pub mod state {
    /// A worker polls it.
    pub const RUNNING: u64 = 1;
    /// It has ended.
    pub const COMPLETE: u64 = 1 << 1;
    /// It was woken and waits for a worker.
    pub const NOTIFIED: u64 = 1 << 2;
    /// Somebody has its JoinHandle.
    pub const JOIN_INTEREST: u64 = 1 << 3;
    /// Somebody awaits its JoinHandle.
    pub const JOIN_WAKER: u64 = 1 << 4;
    /// It was aborted.
    pub const CANCELLED: u64 = 1 << 5;
    /// One reference; the count is in the bits from here on.
    pub const REFERENCE: u64 = 1 << 6;

    /// Most references that are believed. Wakers, handles and queues hold
    /// them; each takes memory of its own.
    const MOST_REFERENCES: u64 = 1 << 24;

    /// Whether a live cell can have this state word.
    pub fn is_sane(word: u64) -> bool {
        let references = word / REFERENCE;
        let both = RUNNING | COMPLETE;
        (1..=MOST_REFERENCES).contains(&references) && word & both != both
    }
}

/// Largest cell that is believed, in bytes: tokio boxes futures of more than
/// 16 KiB (2 KiB in debug builds) itself from 1.41 on, and no stack could
/// build one of this size.
pub const MAX_CELL: u64 = 16 << 20;

/// Ids of lists are below: they are counted from 1, one for each runtime and
/// `LocalSet` that was ever made.
pub const MAX_OWNER: u64 = 1 << 40;

/// Largest scheduler offset that is believed, in bytes: the header has 0x20 to
/// 0x40, and its end is aligned as the future is.
pub const MAX_SCHEDULER_OFFSET: u64 = 0x1000;

/// Most bytes that a scheduler takes in the cell: a pointer, or what
/// `BlockingSchedule` has (a handle and hooks).
pub const MAX_SCHEDULER: u64 = 0x100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states() {
        // As met in a program: new, idle with handle, complete, cancelled.
        for word in [0xcc, 0xc8, 0x40, 0x4a, 0x6a, 0x98, 0x81] {
            assert!(state::is_sane(word), "{word:#x}");
        }
        for word in [0, 0x3f, 0x43, u64::MAX, 0x7fa1_c400_1180] {
            assert!(!state::is_sane(word), "{word:#x}");
        }
    }

    #[test]
    fn layouts() {
        let of = |minor| Layout::of(Version { minor, patch: 0 });
        assert_eq!(of(17), None);
        assert_eq!(of(18), Some(Layout::V18));
        assert_eq!(of(22), Some(Layout::V21));
        assert_eq!(of(54), Some(Layout::V23));
        assert_eq!(
            Version {
                minor: 44,
                patch: 2
            }
            .to_string(),
            "1.44.2"
        );
    }
}
