//! x86-64.

use iced_x86::{
    Code as Opcode, Decoder, DecoderOptions, FlowControl, Instruction as Decoded,
    InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register as Name,
    UsedRegister,
};

use super::{Access, Addend, Assignment, Base, Instruction, Kind, Memory, Register, Registers};
use crate::binary::addr::Vaddr;

/// Decodes `code`, which lies at `entry`, up to its end or to the first
/// instruction that is invalid or cut off.
pub fn decode(entry: Vaddr, code: &[u8]) -> Vec<Instruction> {
    let mut decoder = Decoder::with_ip(64, code, entry.0, DecoderOptions::NONE);
    let mut info = InstructionInfoFactory::new();
    let mut list = Vec::with_capacity(code.len() / 4);
    let mut decoded = Decoded::default();
    while decoder.can_decode() {
        let start = decoder.position();
        decoder.decode_out(&mut decoded);
        let addr = Vaddr(decoded.ip());
        let bytes = code
            .get(start..start + decoded.len())
            .filter(|bytes| !bytes.is_empty());
        let Some(bytes) = bytes.filter(|_| !decoded.is_invalid()) else {
            let len = (code.len() - start).clamp(1, 15) as u8;
            list.push(Instruction::unknown(addr, len, Kind::Invalid));
            break;
        };
        let used = info.info_options(&decoded, InstructionInfoOptions::NO_MEMORY_USAGE);
        list.push(Instruction {
            addr,
            len: decoded.len() as u8,
            kind: kind(&decoded),
            emulated: emulated(bytes),
            exclusive: false,
            writes: writes(used.used_registers()),
            assigns: assigns(&decoded),
            memory: memory(&decoded, |operand| used.op_access(operand)),
        });
    }
    list
}

fn kind(decoded: &Decoded) -> Kind {
    let near = || {
        matches!(decoded.op0_kind(), OpKind::NearBranch64)
            .then(|| Vaddr(decoded.near_branch_target()))
    };
    match decoded.flow_control() {
        FlowControl::Call => near().map_or(Kind::CallIndirect, Kind::Call),
        FlowControl::IndirectCall => match decoded.mnemonic() {
            Mnemonic::Call => Kind::CallIndirect,
            _ => Kind::Other,
        },
        FlowControl::UnconditionalBranch => near().map_or(Kind::JumpIndirect, Kind::Jump),
        FlowControl::ConditionalBranch => near().map_or(Kind::JumpIndirect, Kind::CondJump),
        FlowControl::IndirectBranch | FlowControl::XbeginXabortXend => Kind::JumpIndirect,
        FlowControl::Return => Kind::Ret,
        FlowControl::Interrupt | FlowControl::Exception => match decoded.mnemonic() {
            Mnemonic::Syscall => Kind::Other,
            _ => Kind::Trap,
        },
        FlowControl::Next => match decoded.mnemonic() {
            Mnemonic::Push => Kind::Push,
            Mnemonic::Nop => Kind::Nop,
            Mnemonic::Hlt => Kind::Trap,
            _ => Kind::Other,
        },
    }
}

/// Whether `arch/x86/kernel/uprobes.c` emulates the instruction, in every
/// kernel from 5.10: `branch_setup_xol_ops` (e8, e9, eb, 70-7f, 0f
/// 80-8f, 90) and `push_setup_xol_ops` (50-57, alone or behind REX.B). With an
/// operand-size prefix a branch is refused, and longer `nop`s are emulated by
/// recent kernels only.
fn emulated(bytes: &[u8]) -> bool {
    matches!(
        bytes,
        [0xe8 | 0xe9, _, _, _, _]
            | [0x0f, 0x80..=0x8f, _, _, _, _]
            | [0xeb | 0x70..=0x7f, _]
            | [0x90]
            | [0x50..=0x57]
            | [0x41, 0x50..=0x57]
    )
}

/// Number of the general-purpose register that `name` is a part of.
fn register(name: Name) -> Option<Register> {
    let full = name.full_register();
    full.is_gpr64()
        .then(|| Register::new((full as u32).wrapping_sub(Name::RAX as u32) as u8))
}

fn writes(used: &[UsedRegister]) -> Registers {
    let mut written = Registers::NONE;
    for used in used {
        let writes = matches!(
            used.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        if let Some(register) = register(used.register()).filter(|_| writes) {
            written.insert(register);
        }
    }
    written
}

/// Base of the memory operand, when it has no index and no segment.
fn base(decoded: &Decoded) -> Option<Base> {
    if decoded.is_ip_rel_memory_operand() {
        return Some(Base::Absolute(Vaddr(decoded.ip_rel_memory_address())));
    }
    if decoded.memory_index() != Name::None || decoded.segment_prefix() != Name::None {
        return None;
    }
    let base = decoded.memory_base();
    base.is_gpr64().then_some(())?;
    Some(Base::Register(
        register(base)?,
        decoded.memory_displacement64() as i64,
    ))
}

fn assigns(decoded: &Decoded) -> Option<Assignment> {
    let to = match decoded.op0_kind() {
        OpKind::Register => decoded.op0_register(),
        _ => return None,
    };
    if !to.is_gpr64() && !to.is_gpr32() {
        return None;
    }
    let whole = to.is_gpr64();
    let to = register(to)?;
    match decoded.code() {
        Opcode::Lea_r64_m => match base(decoded)? {
            Base::Absolute(addr) => Some(Assignment::Constant { to, value: addr.0 }),
            Base::Register(from, addend) => Some(Assignment::Sum { to, from, addend }),
        },
        Opcode::Mov_r32_imm32 | Opcode::Mov_rm32_imm32 => Some(Assignment::Constant {
            to,
            value: u64::from(decoded.immediate32()),
        }),
        Opcode::Mov_r64_imm64 => Some(Assignment::Constant {
            to,
            value: decoded.immediate64(),
        }),
        Opcode::Mov_rm64_imm32 => Some(Assignment::Constant {
            to,
            value: decoded.immediate32to64() as u64,
        }),
        Opcode::Mov_r64_rm64 | Opcode::Mov_rm64_r64 if decoded.op1_kind() == OpKind::Register => {
            Some(Assignment::Sum {
                to,
                from: register(decoded.op1_register())?,
                addend: 0,
            })
        }
        Opcode::Xor_r32_rm32
        | Opcode::Xor_rm32_r32
        | Opcode::Xor_r64_rm64
        | Opcode::Xor_rm64_r64
            if decoded.op1_kind() == OpKind::Register
                && decoded.op0_register() == decoded.op1_register() =>
        {
            Some(Assignment::Constant { to, value: 0 })
        }
        Opcode::Inc_rm64 if whole => Some(Assignment::Sum {
            to,
            from: to,
            addend: 1,
        }),
        Opcode::Add_rm64_imm8 => Some(Assignment::Sum {
            to,
            from: to,
            addend: decoded.immediate8to64(),
        }),
        Opcode::Add_rm64_imm32 | Opcode::Add_RAX_imm32 => Some(Assignment::Sum {
            to,
            from: to,
            addend: decoded.immediate32to64(),
        }),
        _ => None,
    }
}

fn memory(decoded: &Decoded, access: impl Fn(u32) -> OpAccess) -> Option<Memory> {
    let operand =
        (0..decoded.op_count()).find(|&operand| decoded.op_kind(operand) == OpKind::Memory)?;
    let base = base(decoded)?;
    let width = u8::try_from(decoded.memory_size().size()).ok()?;
    let locked = decoded.has_lock_prefix();
    let access = match (decoded.mnemonic(), access(operand)) {
        (Mnemonic::Xchg, _) => Access::AtomicStore,
        (Mnemonic::Xadd, _) if locked => {
            Access::AtomicAdd(Addend::Register(register(decoded.op1_register())?))
        }
        (Mnemonic::Add, _) if locked => Access::AtomicAdd(match decoded.op1_kind() {
            OpKind::Register => Addend::Register(register(decoded.op1_register())?),
            OpKind::Immediate8to32 => Addend::Constant(i64::from(decoded.immediate8to32())),
            OpKind::Immediate8to64 => Addend::Constant(decoded.immediate8to64()),
            OpKind::Immediate32 => Addend::Constant(i64::from(decoded.immediate32() as i32)),
            OpKind::Immediate32to64 => Addend::Constant(decoded.immediate32to64()),
            _ => return None,
        }),
        (Mnemonic::Inc, _) if locked => Access::AtomicAdd(Addend::Constant(1)),
        (_, OpAccess::Read | OpAccess::CondRead) => Access::Load,
        (_, OpAccess::Write) => Access::Store,
        (_, OpAccess::ReadWrite | OpAccess::ReadCondWrite | OpAccess::CondWrite) => Access::Modify,
        // An address only (`lea`), or nothing at all (`nop`).
        (_, OpAccess::None | OpAccess::NoMemAccess) => return None,
    };
    Some(Memory {
        base,
        width,
        access,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(code: &[u8]) -> Instruction {
        let list = decode(Vaddr(0x1000), code);
        assert_eq!(list.len(), 1, "{code:x?}");
        list[0]
    }

    #[test]
    fn what_every_kernel_emulates() {
        for code in [
            &[0xe8, 0, 0, 0, 0][..],
            &[0xe9, 0, 0, 0, 0],
            &[0xeb, 0],
            &[0x74, 0],
            &[0x0f, 0x85, 0, 0, 0, 0],
            &[0x90],
            &[0x55],
            &[0x41, 0x56],
        ] {
            assert!(one(code).emulated, "{code:x?}");
        }
        for code in [
            // ret; jrcxz; call rax; pop rbp; xchg ax, ax; nop dword [rax]; bnd jmp;
            // push [rip]; sub rsp, 8; jmp with an operand-size prefix.
            &[0xc3][..],
            &[0xe3, 0],
            &[0xff, 0xd0],
            &[0x5d],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0xf2, 0xe9, 0, 0, 0, 0],
            &[0xff, 0x35, 0, 0, 0, 0],
            &[0x48, 0x83, 0xec, 8],
            &[0x66, 0x74, 0],
        ] {
            assert!(!one(code).emulated, "{code:x?}");
        }
    }

    #[test]
    fn memory_operands() {
        // lock xadd [rdx], rcx
        let add = one(&[0xf0, 0x48, 0x0f, 0xc1, 0x0a]);
        assert_eq!(
            add.memory,
            Some(Memory {
                base: Base::Register(Register::new(2), 0),
                width: 8,
                access: Access::AtomicAdd(Addend::Register(Register::new(1))),
            })
        );
        // mov rcx, [rip + 0x10]
        let load = one(&[0x48, 0x8b, 0x0d, 0x10, 0, 0, 0]);
        assert_eq!(
            load.memory,
            Some(Memory {
                base: Base::Absolute(Vaddr(0x1017)),
                width: 8,
                access: Access::Load,
            })
        );
        assert!(load.writes.contains(Register::new(1)));
        assert!(!load.writes.contains(Register::new(0)));
        // mov [rbx + rcx*8], rdx has an index: it is not understood.
        assert_eq!(one(&[0x48, 0x89, 0x14, 0xcb]).memory, None);
    }

    #[test]
    fn a_cut_off_instruction_ends_the_list() {
        let list = decode(Vaddr(0x1000), &[0x90, 0xe8, 0, 0]);
        assert_eq!(list.len(), 2);
        assert_eq!((list[1].kind, list[1].len), (Kind::Invalid, 3));
    }
}
