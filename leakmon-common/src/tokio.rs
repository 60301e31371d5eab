//! What the programs of tokio's tasks share with user space.
//!
//! A task is a heap object that begins with its `Header`
//! (tokio/src/runtime/task/core.rs), and its vtable's `poll` takes the header's
//! address. Names and numbers are those of tokio 1.18 to 1.54.

use crate::LAYOUT_WORDS;

/// Slots of the programs in [`crate::Counters::hits`].
pub mod slot {
    /// A call of a vtable's `poll`.
    pub const POLL: usize = 0;
    /// None: never hit.
    pub const IDLE: usize = 1;
    /// As [`POLL`], at an instruction that the kernel does not emulate.
    pub const POLL_STEPPED: usize = 2;
    /// A call of a vtable's `shutdown`.
    pub const SHUTDOWN: usize = 3;
}

/// `RUNNING` of tokio/src/runtime/task/state.rs.
pub const RUNNING: u64 = 1;

/// `COMPLETE` of the same.
pub const COMPLETE: u64 = 2;

/// `NOTIFIED` of the same. Only a task that has it is in a queue, and so has a
/// `Header.queue_next`.
pub const NOTIFIED: u64 = 4;

/// `REF_COUNT_SHIFT` of the same.
pub const REFERENCES_SHIFT: u32 = 6;

/// More references than this has no task: its memory was used for something
/// else since.
pub const MAX_REFERENCES: u64 = 1 << 24;

/// Words of a header that are looked at, up to `owner_id` of tokio 1.20. Every
/// cell has as many.
pub const HEADER_WORDS: usize = 6;

/// Where the fields lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// `Header.vtable`, in words: 2, or 4 up to tokio 1.20. `Header.owner_id`
    /// lies behind it in all versions.
    pub vtable: u8,
}

impl Layout {
    /// As a plan carries it.
    pub const fn words(self) -> crate::Layout {
        let mut words = [0; LAYOUT_WORDS];
        words[0] = self.vtable as u64;
        words
    }

    /// The reverse of [`Layout::words`].
    #[inline(always)]
    pub const fn of(words: &crate::Layout) -> Self {
        Layout {
            vtable: words[0] as u8,
        }
    }
}

/// What the programs must know of the tasks at one place: a place's argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Argument {
    /// Where the task's id lies in the cell, in bytes, a multiple of 8; 0 where
    /// it is not known (before tokio 1.23).
    pub id: u16,
    /// The word behind the id is the address of the place of the spawn (from
    /// tokio 1.46 on, with `tokio_unstable`).
    pub located: bool,
    /// The kernel does not emulate the place's instruction.
    pub stepped: bool,
}

impl Argument {
    const LOCATED: u16 = 1 << 14;
    const STEPPED: u16 = 1 << 15;

    /// As a cookie carries it.
    #[inline(always)]
    pub const fn pack(self) -> u16 {
        let mut packed = self.id >> 3;
        if self.located {
            packed |= Self::LOCATED;
        }
        if self.stepped {
            packed |= Self::STEPPED;
        }
        packed
    }

    /// The reverse of [`Argument::pack`].
    #[inline(always)]
    pub const fn unpack(packed: u16) -> Self {
        Argument {
            id: (packed & (Self::LOCATED - 1)) << 3,
            located: packed & Self::LOCATED != 0,
            stepped: packed & Self::STEPPED != 0,
        }
    }
}

/// Value of `TASKS`, by [`crate::parked_key`] of the header's address: the
/// latest task that had its header there. tokio uses memory again, and so is the
/// entry: it is written in place.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TaskEntry {
    /// [`owner`] of the task; 0: it has ended.
    pub owner: u64,
    /// tokio's task id; where there is none, the time of the first poll.
    pub id: u64,
    /// The vtable's address.
    pub vtable: u64,
    /// The address of the place where it was spawned; 0 where that is not known.
    pub created_at: u64,
    /// Time of the first poll that was seen, CLOCK_MONOTONIC nanoseconds; 0: none
    /// was.
    pub first_seen: u64,
    /// When the latest poll ended; 0: none was seen to.
    pub last_end: u64,
    /// Since when it is being polled; 0: it is not.
    pub polling_since: u64,
    /// Slot of its site's polls and idle time in `WAIT_COUNTS`, or
    /// [`crate::NO_SLOT`].
    pub slot: u32,
    /// 1: it was there before the probes came, or may have been.
    pub known: u32,
}

/// Bits of a header's address: it is aligned to 8 bytes and has at most 48.
const ADDRESS_BITS: u32 = 45;

/// A task in one word: its header's address and the low bits of its id. And a poll
/// in one word, which is what its return knows of it: with the low bits of the time
/// of its start.
#[inline(always)]
pub const fn owner(header: u64, id: u64) -> u64 {
    (header >> 3 & ((1 << ADDRESS_BITS) - 1)) | id << ADDRESS_BITS
}

/// The header's address.
#[inline(always)]
pub const fn header_of(owner: u64) -> u64 {
    (owner & ((1 << ADDRESS_BITS) - 1)) << 3
}

/// Polls within polls that are told apart on one thread.
pub const NESTED_POLLS: usize = 8;

/// Value of `POLLING`, by thread: the polls that it is in, the outermost first.
/// For kernels that cannot hand a word from a call's probe to its return's.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Polls {
    /// [`crate::Target::lifecycle_since`] of their time.
    pub since: u64,
    /// How many there are; those beyond [`NESTED_POLLS`] are not kept.
    pub depth: u64,
    /// The word of each, see [`owner`]; 0: the poll is not counted.
    pub polls: [u64; NESTED_POLLS],
}

/// Numbers that no helper has, for calls of `bpf_session_is_return` and
/// `bpf_session_cookie`: user space puts the running kernel's in their place.
pub const SESSION_IS_RETURN: u32 = 0x6c65_6101;
/// See [`SESSION_IS_RETURN`].
pub const SESSION_COOKIE: u32 = 0x6c65_6102;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_round_trip() {
        let header = 0x7fff_1234_5680;
        assert_eq!(header_of(owner(header, u64::MAX)), header);
        assert_ne!(owner(header, 1), owner(header, 2));
        assert_ne!(owner(header, 1), owner(header + 128, 1));
        assert_ne!(owner(header, 0), 0);
    }

    #[test]
    fn arguments_round_trip() {
        for id in [0, 0x20, 0x1008, 0xfff8] {
            for (located, stepped) in [(false, false), (true, false), (false, true), (true, true)] {
                let argument = Argument {
                    id,
                    located,
                    stepped,
                };
                assert_eq!(Argument::unpack(argument.pack()), argument);
            }
        }
    }

    #[test]
    fn layouts_round_trip() {
        let layout = Layout { vtable: 4 };
        assert_eq!(Layout::of(&layout.words()), layout);
    }
}
