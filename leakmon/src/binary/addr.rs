//! Three kinds of address that must never be mixed.
//!
//! | type | what it counts | where it is met |
//! |---|---|---|
//! | [`FileOffset`] | bytes from the start of a file | what a uprobe is attached to |
//! | [`Vaddr`] | the ELF file's own virtual addresses | symbols, pclntab, disassembly |
//! | [`RuntimeAddr`] | addresses in a running process | registers, stacks, memory reads |
//!
//! [`LoadBias`] is the only bridge between the last two; the program headers
//! ([`crate::binary::elf`]) are the only bridge between the first two.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on; `None` past the end of the address space.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// The address `bytes` further on, wrapping.
            pub fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// Bytes from `base` up to this address; `None` when it lies below.
            pub fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// Bytes from the start of a file.
    FileOffset
);
address!(
    /// A virtual address as the ELF file states it, before relocation.
    Vaddr
);
address!(
    /// An address in a running process.
    RuntimeAddr
);

/// What the kernel added to every [`Vaddr`] of a file when it mapped it: 0 for
/// a position-dependent executable.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct LoadBias(pub u64);

impl LoadBias {
    /// Where `vaddr` lies in the process.
    pub fn runtime(self, vaddr: Vaddr) -> RuntimeAddr {
        RuntimeAddr(vaddr.0.wrapping_add(self.0))
    }

    /// Which of the file's addresses lies at `addr` in the process.
    pub fn vaddr(self, addr: RuntimeAddr) -> Vaddr {
        Vaddr(addr.0.wrapping_sub(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bias_round_trips_also_when_it_wraps() {
        for bias in [0, 0x5555_5555_4000, u64::MAX - 0xfff] {
            let bias = LoadBias(bias);
            let vaddr = Vaddr(0x40_1000);
            assert_eq!(bias.vaddr(bias.runtime(vaddr)), vaddr);
        }
    }

    #[test]
    fn addresses_say_what_they_are() {
        assert_eq!(
            format!("{:?} {}", Vaddr(16), FileOffset(255)),
            "Vaddr(0x10) 0xff"
        );
    }
}
