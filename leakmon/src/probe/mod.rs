//! The kernel side: loading, attaching, reading, and the budget.

mod plan;

pub use plan::{Place, Plan, Role, TargetLayout, Tier};
