//! Go, 1.18 to 1.27.
//!
//! In the order in which they are used: [`buildinfo`] tells whether a program
//! is Go and which, [`layout`] where that version keeps things, [`pclntab`]
//! reads its functions and lines, [`program`] puts these together for one
//! executable, [`symbols`] turns program counters into source positions,
//! [`stack`] unwinds, and [`census`] reads every goroutine of a process.

pub mod buildinfo;
pub mod census;
pub mod layout;
pub mod pclntab;
pub mod program;
pub mod stack;
pub mod symbols;
