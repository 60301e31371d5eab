//! What the system says of a process: who it is, and what is in its memory.

pub mod capabilities;
pub mod container;
pub mod discovery;
pub mod environment;
pub mod identity;
pub mod maps;
pub mod memory;
