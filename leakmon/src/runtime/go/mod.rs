//! Go, 1.18 to 1.27.

pub mod places;
pub mod variables;
