//! The stack of a thread at rest, read in one go and unwound.

use crate::binary::addr::RuntimeAddr;
use crate::binary::elf::Arch;
use crate::binary::unwind::{End, Registers, step};
use crate::process::memory::{Memory, MemoryError, Range};

use super::modules::{Modules, Pc};

/// Frames of a stack that are kept; deeper ones are cut.
const MAX_FRAMES: usize = 256;

/// Bytes of a stack that are read first, and at the most: a blocked thread's
/// live part is seldom more than a few KiB.
const FIRST: usize = 4 << 10;
const MOST: usize = 1 << 20;

/// Bits of an address of AArch64 that are no part of it where pointers are
/// signed: all above a 48 bit address.
const ADDRESS: u64 = (1 << 48) - 1;

/// A stack, unwound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unwound {
    /// Innermost first.
    pub(super) pcs: Vec<Pc>,
    /// The last one is the outermost: the stack is whole.
    pub(super) whole: bool,
    /// Bytes from the stack pointer to the last frame.
    pub(super) depth: u64,
}

/// Unwinds from `registers`, reading the stack from `memory` into `buffer`.
///
/// # Errors
/// As [`Memory::read_ranges`].
pub(super) fn unwind<M: Memory>(
    modules: &mut Modules,
    registers: &Registers,
    arch: Arch,
    memory: &M,
    buffer: &mut Vec<u8>,
) -> Result<Unwound, MemoryError> {
    let base = registers.sp();
    let mut len = FIRST;
    loop {
        buffer.resize(len, 0);
        let range = Range {
            addr: RuntimeAddr(base),
            len,
        };
        let read = memory.read_ranges(&[range], buffer)?;
        let whole = read == len;
        let (unwound, end) = unwind_bytes(modules, registers, arch, &buffer[..read]);
        match end {
            // Further up than was read, and there may be more.
            End::Memory(at) if whole && len < MOST && at.wrapping_sub(base) < MOST as u64 => {
                len *= 4;
            }
            _ => return Ok(unwound),
        }
    }
}

/// Unwinds a copy of a stack: `stack` starts at the stack pointer.
pub(super) fn unwind_bytes(
    modules: &mut Modules,
    registers: &Registers,
    arch: Arch,
    stack: &[u8],
) -> (Unwound, End) {
    let base = registers.sp();
    let mut read = |at: u64| {
        let start = usize::try_from(at.checked_sub(base)?).ok()?;
        let word = stack.get(start..start.checked_add(8)?)?;
        Some(u64::from_le_bytes(word.try_into().ok()?))
    };
    let mut registers = registers.clone();
    let mut unwound = Unwound::default();
    let mut exact = true;
    let end = loop {
        let mut pc = Pc {
            addr: registers.ip(),
            exact,
        };
        if arch == Arch::Aarch64 && !modules.is_code(pc.addr) {
            pc.addr &= ADDRESS;
        }
        // What is no code is no return address.
        if !modules.is_code(pc.addr) {
            break End::Damaged;
        }
        unwound.pcs.push(pc);
        unwound.depth = registers.sp().wrapping_sub(base);
        if unwound.pcs.len() == MAX_FRAMES {
            break End::Damaged;
        }
        let Some(rule) = modules.rule(pc) else {
            break End::Damaged;
        };
        match step(&registers, &rule, &mut read) {
            Ok(caller) => registers = caller,
            Err(End::Top) => {
                unwound.whole = true;
                break End::Top;
            }
            Err(end) => break end,
        }
        exact = rule.signal;
    };
    (unwound, end)
}
