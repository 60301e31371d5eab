//! Types on both sides of leakmon's kernel boundary.
//!
//! The kernel side aggregates in maps whose keys and values are defined here,
//! once, `repr(C)` and free of padding, so that user space reads exactly what
//! the kernel wrote.
#![no_std]

/// Buckets of a blocked-duration histogram.
///
/// Bucket `i` counts durations of `2^i` to `2^(i+1) - 1` nanoseconds; the last
/// one counts everything from 2^47 ns (39 hours) on.
pub const HISTOGRAM_BUCKETS: usize = 48;

/// Return addresses kept of a park's stack, innermost first.
pub const WAIT_FRAMES: usize = 4;

/// Where a task was spawned, as the kernel side sees it: two addresses of the
/// running process, symbolised in user space.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord)]
pub struct SiteKey {
    /// Return address of the `go` statement (`runtime.g.gopc`).
    pub created_at: u64,
    /// Entry of the function that the task runs (`runtime.g.startpc`).
    pub entry: u64,
}

/// Bucket of [`HISTOGRAM_BUCKETS`] that a duration in nanoseconds falls into.
#[inline(always)]
pub const fn histogram_bucket(nanos: u64) -> usize {
    let bucket = (63 - (nanos | 1).leading_zeros()) as usize;
    if bucket < HISTOGRAM_BUCKETS {
        bucket
    } else {
        HISTOGRAM_BUCKETS - 1
    }
}
