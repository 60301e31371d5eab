//! The kernel side: loading, attaching, reading, and the budget.

mod counts;
mod error;
mod kernel;
mod plan;
mod sys;

pub use counts::{Counts, Drops, Hits, WaitCounts};
pub use error::Error;
pub use kernel::{Attached, Empty, Kernel, Way};
pub use plan::{Place, Plan, Role, TargetLayout, Tier};
