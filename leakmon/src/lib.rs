//! leakmon watches goroutines, tokio tasks and threads of running processes
//! from outside: what lives, where it was spawned, what it is blocked on and
//! for how long, and which of it leaks.

pub mod binary;
pub mod cli;
pub mod config;
pub mod export;
pub mod leak;
pub mod probe;
pub mod process;
pub mod report;
pub mod runtime;
pub mod task;
pub mod watch;
