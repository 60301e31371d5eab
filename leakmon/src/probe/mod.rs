//! The kernel side: loading, attaching, reading, and the budget.

mod budget;
mod calibrate;
mod counts;
mod driver;
mod error;
mod kernel;
mod plan;
mod sys;

pub use budget::{FLOOR_PERCENT, Governor, Interval, MIN_SHARE, Reading, Step, cpu_time};
pub use calibrate::{Cost, calibrate, load};
pub use counts::{Counts, Drops, Hits, WaitCounts};
pub use driver::{Driver, Status};
pub use error::Error;
pub use kernel::{Attached, Empty, Kernel, Way};
pub use plan::{Place, Plan, Role, TargetLayout, Tier};
