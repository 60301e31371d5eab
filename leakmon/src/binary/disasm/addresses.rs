//! Addresses that code names.
//!
//! On x86-64 one instruction names an address. On AArch64 `adrp` names its page,
//! and the rest is in an instruction behind, nearly always the next one: in
//! `add`, where the address itself is wanted, or in a load or store.

use super::{Assignment, Base, Instruction, Kind, Register};
use crate::binary::addr::Vaddr;
use crate::binary::elf::Arch;

/// The registers that a callee may change without keeping them, X0 to X18 and
/// X30 (Procedure Call Standard for the Arm 64-bit Architecture, 6.1.1).
const NOT_KEPT: u32 = ((1 << 19) - 1) | (1 << 30);

/// What one instruction names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// An address, which is now in a register.
    Address(Vaddr),
    /// What lies at this address.
    Memory(Vaddr),
}

/// Follows code in the order of its addresses.
#[derive(Clone, Debug)]
pub struct Addresses {
    arch: Arch,
    /// The pages that registers hold, on AArch64.
    pages: [Option<u64>; 32],
}

impl Addresses {
    /// At the start of a function.
    pub fn new(arch: Arch) -> Addresses {
        Addresses {
            arch,
            pages: [None; 32],
        }
    }

    /// What the next instruction names, if all that were before it were executed
    /// one behind the other.
    pub fn step(&mut self, instruction: &Instruction) -> Option<Named> {
        let named = self.named(instruction);
        if self.arch == Arch::Aarch64 {
            self.update(instruction);
        }
        named
    }

    fn named(&self, instruction: &Instruction) -> Option<Named> {
        let memory = instruction.memory.and_then(|memory| match memory.base {
            Base::Absolute(addr) => Some(addr),
            Base::Register(register, offset) => {
                let page = self.pages[register.number()]?;
                Some(Vaddr(page.wrapping_add_signed(offset)))
            }
        });
        if memory.is_some() {
            return memory.map(Named::Memory);
        }
        match instruction.assigns? {
            Assignment::Constant { value, .. } => (self.arch == Arch::X86_64 || !is_page(value))
                .then_some(Named::Address(Vaddr(value))),
            Assignment::Sum { from, addend, .. } => {
                let page = self.pages[from.number()]?;
                Some(Named::Address(Vaddr(page.wrapping_add_signed(addend))))
            }
        }
    }

    fn update(&mut self, instruction: &Instruction) {
        for (number, page) in (0u8..).zip(self.pages.iter_mut()) {
            if instruction.writes.contains(Register::new(number)) {
                *page = None;
            }
        }
        match instruction.kind {
            Kind::Call(_) | Kind::CallIndirect => {
                for (number, page) in self.pages.iter_mut().enumerate() {
                    if NOT_KEPT >> number & 1 == 1 {
                        *page = None;
                    }
                }
            }
            // What stands behind is reached from elsewhere.
            kind if !kind.goes_on() => self.pages = [None; 32],
            _ => {}
        }
        if let Some(Assignment::Constant { to, value }) = instruction.assigns
            && is_page(value)
        {
            self.pages[to.number()] = Some(value);
        }
    }
}

/// Whether an address may be what `adrp` names. Where it is of something that
/// starts on a page, `add` with 0 follows.
fn is_page(value: u64) -> bool {
    value & 0xfff == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binary::disasm::Code;

    fn named(words: &[u32]) -> Vec<Option<Named>> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let code = Code::decode(Arch::Aarch64, Vaddr(0x5004), &bytes);
        let mut addresses = Addresses::new(Arch::Aarch64);
        let each = code.instructions().iter();
        each.map(|instruction| addresses.step(instruction))
            .collect()
    }

    /// `adrp x3, -1` at 0x5004.
    const PAGE: u32 = 0x9000_0003 | 3 << 29 | 0x7_ffff << 5;

    fn address(addr: u64) -> Option<Named> {
        Some(Named::Address(Vaddr(addr)))
    }

    #[test]
    fn a_page_and_what_lies_in_it() {
        // add x2, x3, #8; ldr x1, [x3, #16]
        assert_eq!(
            named(&[PAGE, 0x9100_2062, 0xf940_0861]),
            [None, address(0x4008), Some(Named::Memory(Vaddr(0x4010)))]
        );
    }

    #[test]
    fn a_field_is_no_address_in_a_page() {
        // add x3, x3, #8; add x2, x3, #16
        assert_eq!(
            named(&[PAGE, 0x9100_2063, 0x9100_4062]),
            [None, address(0x4008), None]
        );
    }

    #[test]
    fn a_page_is_forgotten() {
        // bl: X3 is not kept; b: the next instruction is another path's; ldr x3,
        // [x0]: another value. Behind each, add x2, x3, #8.
        for other in [0x9400_0000, 0x1400_0002, 0xf940_0003] {
            assert_eq!(named(&[PAGE, other, 0x9100_2062])[2], None, "{other:x}");
        }
        // str x3, [x0] keeps it.
        assert_eq!(named(&[PAGE, 0xf900_0003, 0x9100_2062])[2], address(0x4008));
    }

    #[test]
    fn an_address_nearby() {
        // adr x3, -12; adr x0, 1048575
        let behind = 0x1000_0003 | 0x7_fffd << 5;
        let ahead = 0x1000_0000 | 3 << 29 | 0x3_ffff << 5;
        assert_eq!(
            named(&[behind, ahead]),
            [address(0x4ff8), address(0x5008 + 0xf_ffff)]
        );
    }
}
