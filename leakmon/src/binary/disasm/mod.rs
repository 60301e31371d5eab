//! Machine code of one function as a short, architecture-neutral list: where
//! each instruction starts, where it may go next, what memory it names and which
//! registers it changes.
//!
//! Only what a question about a compiled function needs is kept: a data
//! address, a probe address, the value of a register at a call. Whatever an
//! instruction does beyond that errs on the safe side: a register that may be
//! written counts as written, an operand that is not understood is absent.
//!
//! The decoders are total: any bytes give a list, in time proportional to their
//! number.

use crate::binary::addr::Vaddr;

pub mod aarch64;
pub mod addresses;
pub mod values;
pub mod x86_64;

/// Functions beyond this many bytes are not decoded to their end. The largest
/// function of Go's runtime that matters here has under 10 KiB.
pub const MAX_CODE: usize = 64 << 10;

use super::elf::Arch;

/// A general-purpose register by its number in instruction encodings: RAX 0,
/// RCX 1, RDX 2, RBX 3, RSP 4, ..., R15 15; X0 to X30, SP 31. AArch64's zero
/// register is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register(u8);

impl Register {
    /// The register with this number.
    ///
    /// Numbers are taken modulo 32.
    pub const fn new(number: u8) -> Self {
        Register(number & 31)
    }

    /// Its number, below 32.
    pub const fn number(self) -> usize {
        self.0 as usize
    }
}

/// A set of registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Registers(u32);

impl Registers {
    /// No register.
    pub const NONE: Registers = Registers(0);
    /// Every register.
    pub const ALL: Registers = Registers(!0);

    /// Adds one.
    pub fn insert(&mut self, register: Register) {
        self.0 |= 1 << register.0;
    }

    /// Whether `register` is among them.
    pub fn contains(self, register: Register) -> bool {
        self.0 & (1 << register.0) != 0
    }
}

/// Where an instruction hands control to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Calls a fixed address.
    Call(Vaddr),
    /// Calls through a register or memory.
    CallIndirect,
    /// Goes to a fixed address.
    Jump(Vaddr),
    /// Goes to wherever a register or memory says.
    JumpIndirect,
    /// Goes to a fixed address or on.
    CondJump(Vaddr),
    /// Returns to the caller.
    Ret,
    /// Pushes a register.
    Push,
    /// Does nothing.
    Nop,
    /// Never completes: a breakpoint or an undefined instruction, as compilers
    /// put between functions.
    Trap,
    /// Cannot be decoded. On x86-64 the list ends here, for nothing says where
    /// the next instruction would start.
    Invalid,
    /// Anything else; goes on to the next instruction.
    Other,
}

impl Kind {
    /// The instruction behind may be executed next, if only after a call.
    pub fn goes_on(self) -> bool {
        !matches!(
            self,
            Kind::Jump(_) | Kind::JumpIndirect | Kind::Ret | Kind::Trap | Kind::Invalid
        )
    }
}

/// What an instruction does to the memory that it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads it.
    Load,
    /// Writes it.
    Store,
    /// Reads and writes it, in a way not told apart (`inc`, a plain `add`).
    Modify,
    /// Replaces its content at once and in order for other processors (`xchg`,
    /// `stlr`, `swp`): Go's atomic stores.
    AtomicStore,
    /// Adds to it at once (`lock xadd`, `ldadd`).
    AtomicAdd(Addend),
}

/// What an atomic addition adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addend {
    /// The value of a register.
    Register(Register),
    /// A constant.
    Constant(i64),
}

/// The base of a memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// An address known from the instruction alone (RIP-relative).
    Absolute(Vaddr),
    /// A register's value, plus an offset.
    Register(Register, i64),
}

/// A memory operand without index register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Where it lies.
    pub base: Base,
    /// How many bytes of it are accessed.
    pub width: u8,
    /// What is done to it.
    pub access: Access,
}

/// A value that an instruction gives to a register, where it is simple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assignment {
    /// `to` becomes a constant, or an address of the file.
    Constant {
        /// The register.
        to: Register,
        /// Its new value.
        value: u64,
    },
    /// `to` becomes `from` plus a constant, in 64 bits.
    Sum {
        /// The register.
        to: Register,
        /// The other register.
        from: Register,
        /// What is added.
        addend: i64,
    },
}

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Where it starts.
    pub addr: Vaddr,
    /// How many bytes it has.
    pub len: u8,
    /// Where control goes.
    pub kind: Kind,
    /// Every supported kernel (5.10 and later) emulates it when a uprobe is on
    /// it, so that a hit costs one trap: the others are executed out of line
    /// and single-stepped, at ten times the cost, or refused.
    pub emulated: bool,
    /// It starts a load-exclusive / store-exclusive sequence, which a trap in
    /// its midst keeps from ever succeeding.
    pub exclusive: bool,
    /// Registers that it may change; of a call, only those changed by the call
    /// instruction itself.
    pub writes: Registers,
    /// The simple value that it gives to a register, if any.
    pub assigns: Option<Assignment>,
    /// The memory that it names, if it is understood.
    pub memory: Option<Memory>,
}

impl Instruction {
    /// An instruction at `addr` of which nothing is known.
    fn unknown(addr: Vaddr, len: u8, kind: Kind) -> Self {
        Instruction {
            addr,
            len,
            kind,
            emulated: false,
            exclusive: false,
            writes: Registers::ALL,
            assigns: None,
            memory: None,
        }
    }

    /// Where the next instruction starts.
    pub fn end(&self) -> Vaddr {
        self.addr.wrapping_add(u64::from(self.len))
    }
}

/// A function's instructions, from its entry.
#[derive(Clone, Debug)]
pub struct Code {
    instructions: Vec<Instruction>,
    targets: Vec<Vaddr>,
    whole: bool,
}

impl Code {
    /// Decodes the function whose bytes are `code` and whose entry is `entry`.
    pub fn decode(architecture: Arch, entry: Vaddr, code: &[u8]) -> Code {
        let whole = code.len() <= MAX_CODE;
        let code = &code[..code.len().min(MAX_CODE)];
        let instructions = match architecture {
            Arch::X86_64 => x86_64::decode(entry, code),
            Arch::Aarch64 => aarch64::decode(entry, code),
        };
        let mut targets: Vec<Vaddr> = instructions
            .iter()
            .filter_map(|instruction| match instruction.kind {
                Kind::Jump(target) | Kind::CondJump(target) => Some(target),
                _ => None,
            })
            .collect();
        targets.sort_unstable();
        targets.dedup();
        let whole = whole
            && instructions
                .iter()
                .all(|instruction| instruction.kind != Kind::Invalid);
        Code {
            instructions,
            targets,
            whole,
        }
    }

    /// The instructions, in the order of their addresses.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }

    /// All bytes were decoded: every branch of the function is in the list.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// A jump of the function goes where a register or memory says, so that
    /// its targets are unknown.
    pub fn jumps_indirectly(&self) -> bool {
        self.instructions
            .iter()
            .any(|instruction| instruction.kind == Kind::JumpIndirect)
    }

    /// A jump of the function with a fixed target goes to `addr`.
    pub fn is_target(&self, addr: Vaddr) -> bool {
        self.targets.binary_search(&addr).is_ok()
    }

    /// For each instruction, whether it may be executed on a path that starts at
    /// one of the indices `from` and goes on beyond none of which `ends` is true.
    ///
    /// Computed jumps are not followed.
    pub fn reachable(
        &self,
        from: impl IntoIterator<Item = usize>,
        ends: impl Fn(usize) -> bool,
    ) -> Vec<bool> {
        let mut seen = vec![false; self.instructions.len()];
        let mut next: Vec<usize> = from.into_iter().collect();
        while let Some(index) = next.pop() {
            let Some(instruction) = self.instructions.get(index) else {
                continue;
            };
            if std::mem::replace(&mut seen[index], true) || ends(index) {
                continue;
            }
            if instruction.kind.goes_on() {
                next.push(index + 1);
            }
            if let Kind::Jump(target) | Kind::CondJump(target) = instruction.kind {
                next.extend(self.index_of(target));
            }
        }
        seen
    }

    /// Index of the instruction that starts at `addr`; `None` within or
    /// outside of one.
    pub fn index_of(&self, addr: Vaddr) -> Option<usize> {
        self.instructions
            .binary_search_by_key(&addr, |instruction| instruction.addr)
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator: the tests are the same in every run.
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn any_bytes_give_a_list_of_adjacent_instructions() {
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for round in 0..4000 {
            let len = (random(&mut state) % 400) as usize;
            let mut bytes: Vec<u8> = (0..len).map(|_| random(&mut state) as u8).collect();
            if round % 2 == 0 {
                // Make prefixes and branches frequent.
                let common = [0x0f, 0x66, 0x48, 0xe8, 0xeb, 0xf0, 0x90, 0x14];
                for byte in bytes.iter_mut().step_by(3) {
                    *byte = common[(random(&mut state) % 8) as usize];
                }
            }
            let entry = Vaddr(match round % 3 {
                0 => 0x40_1000,
                1 => 0,
                _ => u64::MAX - 200,
            });
            for architecture in [Arch::X86_64, Arch::Aarch64] {
                let code = Code::decode(architecture, entry, &bytes);
                let mut next = entry;
                for instruction in code.instructions() {
                    assert_eq!(instruction.addr, next);
                    assert!(instruction.len > 0);
                    next = instruction.end();
                }
                assert!(next.0.wrapping_sub(entry.0) <= len as u64);
            }
        }
    }

    #[test]
    fn empty_code_has_no_instruction() {
        for architecture in [Arch::X86_64, Arch::Aarch64] {
            let code = Code::decode(architecture, Vaddr(4096), &[]);
            assert!(code.instructions().is_empty());
            assert!(code.is_whole());
        }
    }
}
