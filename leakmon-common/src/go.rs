//! What the programs of Go's goroutines share with user space.

use crate::LAYOUT_WORDS;

/// Slots of the programs in [`crate::Counters::hits`].
pub mod slot {
    /// `go` statement, at the call of `runqput`.
    pub const SPAWN: usize = 0;
    /// `go` statement, behind the call of `newproc1`.
    pub const SPAWN_RETURNED: usize = 1;
    /// A goroutine's end.
    pub const EXIT: usize = 2;
    /// At a call of `gopark`.
    pub const PARK: usize = 3;
    /// Behind a call of `gopark`.
    pub const RESUME: usize = 4;
    /// In `park_m`.
    pub const PARK_UNIVERSAL: usize = 5;
    /// In `runtime.ready`.
    pub const READY: usize = 6;
}

/// Bytes between `g.gopc` and `g.startpc`, in every Go version from 1.18 to
/// 1.27 (`g.ancestors` lies between them): both are read at once.
pub const STARTPC_FROM_GOPC: u16 = 16;

/// Where the fields of a `runtime.g` lie, in bytes from its start.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// Wait reasons (bit `n` for Go's reason number `n`) that the universal
    /// park counts; the other programs count every reason.
    pub reasons: u64,
    /// `g.goid`, the goroutine's id (u64).
    pub goid: u16,
    /// `g.gopc`, the return address of the `go` statement; `g.startpc` lies
    /// [`STARTPC_FROM_GOPC`] after it.
    pub gopc: u16,
    /// `g.waitreason` (u8). Read by the universal park only.
    pub waitreason: u16,
    /// `g.sched.bp`, the saved frame pointer. Read by the universal park only.
    pub sched_bp: u16,
}

impl Layout {
    /// As a plan carries it.
    pub const fn words(self) -> crate::Layout {
        let offsets = self.goid as u64
            | (self.gopc as u64) << 16
            | (self.waitreason as u64) << 32
            | (self.sched_bp as u64) << 48;
        let mut words = [0; LAYOUT_WORDS];
        words[0] = self.reasons;
        words[1] = offsets;
        words
    }

    /// The reverse of [`Layout::words`].
    #[inline(always)]
    pub const fn of(words: &crate::Layout) -> Self {
        let offsets = words[1];
        Layout {
            reasons: words[0],
            goid: offsets as u16,
            gopc: (offsets >> 16) as u16,
            waitreason: (offsets >> 32) as u16,
            sched_bp: (offsets >> 48) as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_round_trip() {
        let layout = Layout {
            reasons: 1 << 63 | 5,
            goid: 152,
            gopc: 288,
            waitreason: 0xffff,
            sched_bp: 96,
        };
        assert_eq!(Layout::of(&layout.words()), layout);
    }
}
