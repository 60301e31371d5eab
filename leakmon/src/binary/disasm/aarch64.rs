//! AArch64.

use yaxpeax_arch::{Arch, Decoder, U8Reader};
use yaxpeax_arm::armv8::a64::{ARMv8, Opcode, Operand, ShiftStyle, SizeCode};

use super::{Access, Addend, Assignment, Base, Instruction, Kind, Memory, Register, Registers};
use crate::binary::addr::Vaddr;

/// Decodes `code`, which lies at `entry`, up to its last whole word.
pub fn decode(entry: Vaddr, code: &[u8]) -> Vec<Instruction> {
    let decoder = <ARMv8 as Arch>::Decoder::default();
    code.chunks_exact(4)
        .zip(0u64..)
        .map(|(word, index)| {
            let addr = entry.wrapping_add(index * 4);
            match decoder.decode(&mut U8Reader::new(word)) {
                Ok(decoded) => instruction(addr, decoded.opcode, &decoded.operands),
                Err(_) => Instruction::unknown(addr, 4, Kind::Invalid),
            }
        })
        .collect()
}

fn instruction(addr: Vaddr, opcode: Opcode, operands: &[Operand; 4]) -> Instruction {
    let kind = kind(addr, opcode, operands);
    Instruction {
        addr,
        len: 4,
        kind,
        emulated: emulated(opcode),
        exclusive: matches!(
            opcode,
            Opcode::LDXR
                | Opcode::LDXRB
                | Opcode::LDXRH
                | Opcode::LDXP
                | Opcode::LDAXR
                | Opcode::LDAXRB
                | Opcode::LDAXRH
                | Opcode::LDAXP
        ),
        writes: writes(opcode, operands),
        assigns: assigns(addr, opcode, operands),
        memory: memory(opcode, operands),
    }
}

/// The address that a PC-relative operand names.
fn relative(addr: Vaddr, operands: &[Operand; 4]) -> Option<Vaddr> {
    operands.iter().find_map(|operand| match operand {
        Operand::PCOffset(offset) => Some(addr.wrapping_add(*offset as u64)),
        _ => None,
    })
}

fn kind(addr: Vaddr, opcode: Opcode, operands: &[Operand; 4]) -> Kind {
    let target = || relative(addr, operands);
    match opcode {
        Opcode::BL => target().map_or(Kind::CallIndirect, Kind::Call),
        Opcode::BLR | Opcode::BLRAA | Opcode::BLRAAZ | Opcode::BLRAB | Opcode::BLRABZ => {
            Kind::CallIndirect
        }
        Opcode::B => target().map_or(Kind::JumpIndirect, Kind::Jump),
        Opcode::Bcc(_)
        | Opcode::BCcc(_)
        | Opcode::CBZ
        | Opcode::CBNZ
        | Opcode::TBZ
        | Opcode::TBNZ => target().map_or(Kind::JumpIndirect, Kind::CondJump),
        Opcode::BR | Opcode::BRAA | Opcode::BRAAZ | Opcode::BRAB | Opcode::BRABZ => {
            Kind::JumpIndirect
        }
        Opcode::RET
        | Opcode::RETAA
        | Opcode::RETAB
        | Opcode::RETAASPPC
        | Opcode::RETABSPPC
        | Opcode::RETAASPPCR
        | Opcode::RETABSPPCR => Kind::Ret,
        Opcode::ERET | Opcode::ERETAA | Opcode::ERETAB | Opcode::DRPS => Kind::JumpIndirect,
        Opcode::UDF | Opcode::BRK | Opcode::HLT | Opcode::HVC | Opcode::SMC => Kind::Trap,
        Opcode::Invalid => Kind::Invalid,
        Opcode::HINT => Kind::Nop,
        _ => Kind::Other,
    }
}

/// Whether `arch/arm64/kernel/probes/decode-insn.c` (`arm_probe_decode_insn`)
/// emulates the instruction, in every kernel from 5.10. `nop` is, from 6.13
/// only; a load of a literal is refused for uprobes by later ones.
fn emulated(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::B
            | Opcode::BL
            | Opcode::Bcc(_)
            | Opcode::CBZ
            | Opcode::CBNZ
            | Opcode::TBZ
            | Opcode::TBNZ
            | Opcode::BR
            | Opcode::BLR
            | Opcode::RET
            | Opcode::ADR
            | Opcode::ADRP
    )
}

/// The register that an operand names; 31 is the zero register where it is not
/// the stack pointer.
fn register(operand: &Operand) -> Option<Register> {
    match *operand {
        Operand::Register(_, number) if number < 31 => Some(Register::new(number as u8)),
        Operand::RegisterOrSP(_, number) if number < 32 => Some(Register::new(number as u8)),
        _ => None,
    }
}

fn is_64(operand: &Operand) -> bool {
    matches!(
        operand,
        Operand::Register(SizeCode::X, _) | Operand::RegisterOrSP(SizeCode::X, _)
    )
}

fn is_zero(operand: &Operand) -> bool {
    matches!(operand, Operand::Register(_, 31))
}

/// Instructions whose register operands are read only.
fn only_reads(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::STR
            | Opcode::STRB
            | Opcode::STRH
            | Opcode::STUR
            | Opcode::STURB
            | Opcode::STURH
            | Opcode::STP
            | Opcode::STLR
            | Opcode::STLRB
            | Opcode::STLRH
            | Opcode::CBZ
            | Opcode::CBNZ
            | Opcode::TBZ
            | Opcode::TBNZ
            | Opcode::CCMP
            | Opcode::CCMN
            | Opcode::HINT
            | Opcode::DMB(_)
            | Opcode::PRFM
            | Opcode::RET
            | Opcode::BR
    )
}

fn writes(opcode: Opcode, operands: &[Operand; 4]) -> Registers {
    let mut written = Registers::NONE;
    if matches!(opcode, Opcode::BL | Opcode::BLR) {
        written.insert(Register::new(30));
        return written;
    }
    let mut direct = !only_reads(opcode);
    for (index, operand) in operands.iter().enumerate() {
        match *operand {
            // Calculations write their first operand only; anything not known
            // to be one counts as writing every register that it names.
            Operand::Register(..) | Operand::RegisterOrSP(..) if direct => {
                if let Some(register) = register(operand) {
                    written.insert(register);
                }
                if index == 0 && calculates(opcode) {
                    direct = false;
                }
            }
            Operand::RegisterPair(_, number) if direct => {
                written.insert(Register::new(number as u8));
                written.insert(Register::new(number.wrapping_add(1) as u8));
            }
            Operand::RegPreIndex(base, _, true)
            | Operand::RegPostIndex(base, _)
            | Operand::RegPostIndexReg(base, _) => written.insert(Register::new(base as u8)),
            _ => {}
        }
    }
    written
}

/// Instructions whose first operand is the only register written, apart from a
/// base that is written back.
fn calculates(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::MOVN
            | Opcode::MOVK
            | Opcode::MOVZ
            | Opcode::ADC
            | Opcode::ADCS
            | Opcode::SBC
            | Opcode::SBCS
            | Opcode::AND
            | Opcode::ORR
            | Opcode::ORN
            | Opcode::EOR
            | Opcode::EON
            | Opcode::BIC
            | Opcode::BICS
            | Opcode::ANDS
            | Opcode::ADDS
            | Opcode::ADD
            | Opcode::SUBS
            | Opcode::SUB
            | Opcode::BFM
            | Opcode::UBFM
            | Opcode::SBFM
            | Opcode::ADR
            | Opcode::ADRP
            | Opcode::EXTR
            | Opcode::CSEL
            | Opcode::CSNEG
            | Opcode::CSINC
            | Opcode::CSINV
            | Opcode::RBIT
            | Opcode::REV
            | Opcode::CLZ
            | Opcode::MADD
            | Opcode::MSUB
            | Opcode::SMULH
            | Opcode::UMULH
            | Opcode::UDIV
            | Opcode::SDIV
            | Opcode::LSLV
            | Opcode::LSRV
            | Opcode::ASRV
            | Opcode::LDR
            | Opcode::LDRB
            | Opcode::LDRH
            | Opcode::LDRSB
            | Opcode::LDRSH
            | Opcode::LDRSW
            | Opcode::LDUR
            | Opcode::LDAR
            | Opcode::LDARB
    )
}

fn assigns(addr: Vaddr, opcode: Opcode, operands: &[Operand; 4]) -> Option<Assignment> {
    let to = register(&operands[0])?;
    let sum = |addend: i64| {
        is_64(&operands[0])
            .then(|| register(&operands[1]))
            .flatten()
            .map(|from| Assignment::Sum { to, from, addend })
    };
    match opcode {
        Opcode::ADR => Some(Assignment::Constant {
            to,
            value: relative(addr, operands)?.0,
        }),
        Opcode::ADRP => Some(Assignment::Constant {
            to,
            value: relative(Vaddr(addr.0 & !0xfff), operands)?.0,
        }),
        Opcode::MOVZ => Some(Assignment::Constant {
            to,
            value: immediate(&operands[1])?,
        }),
        Opcode::ORR if is_zero(&operands[1]) => match operands[2] {
            // `mov xd, xm`.
            Operand::RegShift(ShiftStyle::LSL, 0, SizeCode::X, from) if from < 31 => {
                is_64(&operands[0]).then_some(Assignment::Sum {
                    to,
                    from: Register::new(from as u8),
                    addend: 0,
                })
            }
            Operand::RegShift(_, _, _, 31) => Some(Assignment::Constant { to, value: 0 }),
            _ => Some(Assignment::Constant {
                to,
                value: immediate(&operands[2])?,
            }),
        },
        Opcode::ADD => sum(immediate(&operands[2])? as i64),
        Opcode::SUB => sum((immediate(&operands[2])? as i64).wrapping_neg()),
        _ => None,
    }
}

fn immediate(operand: &Operand) -> Option<u64> {
    match *operand {
        Operand::Immediate(value) => Some(u64::from(value)),
        Operand::Imm64(value) => Some(value),
        Operand::Imm16(value) => Some(u64::from(value)),
        Operand::ImmShift(value, shift) => u64::from(value).checked_shl(u32::from(shift)),
        _ => None,
    }
}

fn memory(opcode: Opcode, operands: &[Operand; 4]) -> Option<Memory> {
    let (base, offset) = operands.iter().find_map(|operand| match *operand {
        Operand::RegPreIndex(base, offset, false) => Some((base, offset)),
        _ => None,
    })?;
    let word = match operands[0] {
        Operand::Register(SizeCode::X, _) => 8,
        Operand::Register(SizeCode::W, _) => 4,
        _ => return None,
    };
    let (width, access) = match opcode {
        Opcode::LDR | Opcode::LDUR | Opcode::LDAR => (word, Access::Load),
        Opcode::LDRB | Opcode::LDRSB | Opcode::LDARB => (1, Access::Load),
        Opcode::LDRH | Opcode::LDRSH => (2, Access::Load),
        Opcode::LDRSW => (4, Access::Load),
        Opcode::LDP => (2 * word, Access::Load),
        Opcode::STR | Opcode::STUR => (word, Access::Store),
        Opcode::STRB => (1, Access::Store),
        Opcode::STRH => (2, Access::Store),
        Opcode::STP => (2 * word, Access::Store),
        Opcode::STLR | Opcode::SWP(_) => (word, Access::AtomicStore),
        Opcode::LDADD(_) => (
            word,
            Access::AtomicAdd(Addend::Register(register(&operands[0])?)),
        ),
        _ => return None,
    };
    Some(Memory {
        base: Base::Register(Register::new(base as u8), i64::from(offset)),
        width,
        access,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(word: u32) -> Instruction {
        decode(Vaddr(0x1000), &word.to_le_bytes())[0]
    }

    #[test]
    fn what_every_kernel_emulates() {
        for word in [
            // b; bl; b.ls; cbz; tbz; ret; br x1; blr x1; adr; adrp
            0x1400_0000,
            0x9400_0000,
            0x5400_0009,
            0xb400_0000,
            0x3600_0000,
            0xd65f_03c0,
            0xd61f_0020,
            0xd63f_0020,
            0x1000_0000,
            0x9000_0000,
        ] {
            assert!(one(word).emulated, "{word:x}");
        }
        for word in [
            // nop; bti c; stp x29, x30, [sp, #-16]!; ldr x0, literal; svc; ldaxr
            0xd503_201f,
            0xd503_245f,
            0xa9bf_7bfd,
            0x5800_0000,
            0xd400_0001,
            0xc85f_fc00,
        ] {
            assert!(!one(word).emulated, "{word:x}");
        }
    }

    #[test]
    fn memory_operands() {
        // ldaddal x2, x4, [x3]
        let add = one(0xf8e2_0064);
        assert_eq!(
            add.memory,
            Some(Memory {
                base: Base::Register(Register::new(3), 0),
                width: 8,
                access: Access::AtomicAdd(Addend::Register(Register::new(2))),
            })
        );
        // stlr x1, [x2]
        let store = one(0xc89f_fc41);
        assert_eq!(
            store.memory,
            Some(Memory {
                base: Base::Register(Register::new(2), 0),
                width: 8,
                access: Access::AtomicStore,
            })
        );
        assert_eq!(store.writes, Registers::NONE);
        // ldar w2, [x2]
        let load = one(0x88df_fc42);
        assert_eq!(
            load.memory,
            Some(Memory {
                base: Base::Register(Register::new(2), 0),
                width: 4,
                access: Access::Load,
            })
        );
        assert!(load.writes.contains(Register::new(2)));
    }

    #[test]
    fn pages_and_branches_are_resolved() {
        // adrp x27, one page on
        assert_eq!(
            one(0xb000_001b).assigns,
            Some(Assignment::Constant {
                to: Register::new(27),
                value: 0x2000,
            })
        );
        // b.ls +8; bl -4
        assert_eq!(one(0x5400_0049).kind, Kind::CondJump(Vaddr(0x1008)));
        assert_eq!(one(0x97ff_ffff).kind, Kind::Call(Vaddr(0xffc)));
    }

    #[test]
    fn a_load_exclusive_is_marked() {
        assert!(one(0xc85f_fc00).exclusive);
        assert!(!one(0xf8e2_0064).exclusive);
    }
}
