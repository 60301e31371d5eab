//! What a file says: ELF headers, the bridges between its three kinds of
//! address, and the instructions of its functions.

pub mod addr;
pub mod disasm;
pub mod elf;
pub mod shared;
pub mod symbols;
pub mod unwind;
