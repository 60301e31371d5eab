//! tokio, 1.18 to 1.54 and what comes with the same layout.
//!
//! In the order in which they are used: [`layout`] says where a version keeps
//! things, [`vtables`] finds the vtables of a program's tasks.

pub mod layout;
pub mod vtables;
