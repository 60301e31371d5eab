//! The kernel side: loading, attaching, reading, and the budget.
//!
//! [`load`] loads the programs once for a leakmon process and proves that they
//! fire; [`Calibration`] measures what hits cost. A runtime describes a process by a
//! [`Plan`]; [`Kernel::attach`] attaches a tier of it, and [`Attached::read`]
//! reads what was counted. A [`Driver`] does so under a [`Governor`], which
//! keeps the cost within what the user allows.
//!
//! The kernel side counts in maps and sends nothing for a hit. It only reads
//! the target's memory. All that leakmon holds in the kernel hangs on its file
//! descriptors: when it ends, in whatever way, the target is as it was.

mod btf;
mod budget;
mod calibrate;
mod counts;
mod detaching;
mod driver;
mod error;
mod events;
mod features;
mod kernel;
mod object;
mod others;
mod plan;
mod pool;
mod registers;
mod sys;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use budget::{FLOOR_PERCENT, Governor, Interval, MIN_SHARE, Reading, Step, cpu_time};
pub use calibrate::{Calibration, Cost, calibrate, load};
pub use counts::{
    Counts, CreationStack, Drops, Hits, KnownTask, KnownThread, TaskRun, ThreadRun, WaitCounts,
};
pub use detaching::settle;
pub use driver::{Driver, Drivers, Status};
pub use error::Error;
pub use events::{ProcessEvent, ProcessEvents};
pub use features::{Feature, Features};
pub use kernel::{Attached, Empty, Kernel, Limits, Way};
pub use plan::{Code, Layout, Place, Plan, Role, Tier};
pub use registers::ThreadRegisters;

/// Locks what no panic leaves half changed: every change of it is complete before
/// it can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
