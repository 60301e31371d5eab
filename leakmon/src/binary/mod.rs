//! What a file says: ELF, load bias, symbols, safe probe addresses.

pub mod addr;
pub mod disasm;
