//! What registers hold on the way through a function.
//!
//! Where paths join, that remains known on which they agree. A call leaves
//! nothing known but its result: Go's calling convention has no registers that
//! a callee keeps.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::{Assignment, Base, Code, Instruction, Kind, Memory, Register};
use crate::binary::addr::Vaddr;

/// What is known of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Nothing.
    Unknown,
    /// Its value, or the file's address that it holds.
    Constant(u64),
    /// The value that a register had at the function's entry, plus an offset.
    Argument(Register, i64),
    /// What the call to this function returned in its first result register,
    /// plus an offset.
    Returned(Vaddr, i64),
}

/// The registers' values before an instruction.
#[derive(Clone, Debug)]
pub struct Values([Value; 32]);

impl Values {
    /// What `register` holds.
    pub fn get(&self, register: Register) -> Value {
        self.0[register.number()]
    }

    /// Where a memory operand lies: a constant is an address of the file.
    pub fn place(&self, memory: &Memory) -> Value {
        match memory.base {
            Base::Absolute(addr) => Value::Constant(addr.0),
            Base::Register(register, offset) => shifted(self.get(register), offset),
        }
    }

    fn forget(&mut self) {
        self.0 = [Value::Unknown; 32];
    }

    /// Keeps what both agree on. Whether that is less than before.
    fn meet(&mut self, other: &Values) -> bool {
        let mut changed = false;
        for (value, other) in self.0.iter_mut().zip(&other.0) {
            if value != other && *value != Value::Unknown {
                *value = Value::Unknown;
                changed = true;
            }
        }
        changed
    }

    fn step(&mut self, instruction: &Instruction, result: Register) {
        let assigned = instruction.assigns.map(|assignment| match assignment {
            Assignment::Constant { to, value } => (to, Value::Constant(value)),
            Assignment::Sum { to, from, addend } => (to, shifted(self.get(from), addend)),
        });
        for (number, value) in (0u8..).zip(self.0.iter_mut()) {
            if instruction.writes.contains(Register::new(number)) {
                *value = Value::Unknown;
            }
        }
        if let Some((to, value)) = assigned {
            self.0[to.number()] = value;
        }
        match instruction.kind {
            Kind::Call(target) => {
                self.forget();
                self.0[result.number()] = Value::Returned(target, 0);
            }
            Kind::CallIndirect => self.forget(),
            _ => {}
        }
    }
}

fn shifted(value: Value, by: i64) -> Value {
    match value {
        Value::Unknown => Value::Unknown,
        Value::Constant(value) => Value::Constant(value.wrapping_add(by as u64)),
        Value::Argument(register, offset) => Value::Argument(register, offset.wrapping_add(by)),
        Value::Returned(call, offset) => Value::Returned(call, offset.wrapping_add(by)),
    }
}

/// Passes over the code before what is not settled counts as unknown. Compiled
/// functions settle in as many as their loops are nested.
const MAX_PASSES: usize = 32;

/// Calls `visit` for each instruction that can be reached, in the order of
/// addresses, with what the registers hold before it on every path.
///
/// `result` is the register in which calls return their first result. A jump to
/// the entry starts the function anew, with arguments of its own. In a function
/// that jumps to computed addresses more paths may exist than are known:
/// nothing is known of any register then.
pub fn walk(code: &Code, result: Register, mut visit: impl FnMut(&Instruction, &Values)) {
    let mut joins: BTreeMap<Vaddr, Values> = BTreeMap::new();
    let mut settled = code.jumps_indirectly();
    if settled {
        joins = unknown(code);
    }
    for _ in 0..MAX_PASSES {
        if settled {
            break;
        }
        settled = !pass(code, result, &mut joins, &mut |_, _| {});
    }
    if !settled {
        joins = unknown(code);
    }
    pass(code, result, &mut joins, &mut visit);
}

/// Nothing is known at any place where paths may join.
fn unknown(code: &Code) -> BTreeMap<Vaddr, Values> {
    let everywhere = code.jumps_indirectly();
    code.instructions()
        .iter()
        .map(|instruction| instruction.addr)
        .filter(|&addr| everywhere || code.is_target(addr))
        .map(|addr| (addr, Values([Value::Unknown; 32])))
        .collect()
}

/// Goes once over the code, adding to what is known where paths join. Whether
/// anything changed there.
fn pass(
    code: &Code,
    result: Register,
    joins: &mut BTreeMap<Vaddr, Values>,
    visit: &mut impl FnMut(&Instruction, &Values),
) -> bool {
    let mut changed = false;
    let mut values = Some(Values(std::array::from_fn(|number| {
        Value::Argument(Register::new(number as u8), 0)
    })));
    for (index, instruction) in code.instructions().iter().enumerate() {
        if index > 0
            && let Some(join) = joins.get_mut(&instruction.addr)
        {
            if let Some(values) = &values {
                changed |= join.meet(values);
            }
            values = Some(join.clone());
        } else if index > 0
            && code.is_target(instruction.addr)
            && let Some(values) = &values
        {
            joins.insert(instruction.addr, values.clone());
            changed = true;
        }
        let Some(before) = &mut values else {
            continue;
        };
        visit(instruction, before);
        before.step(instruction, result);
        if let Kind::Jump(target) | Kind::CondJump(target) = instruction.kind {
            match joins.entry(target) {
                Entry::Occupied(mut join) => changed |= join.get_mut().meet(before),
                Entry::Vacant(join) => {
                    join.insert(before.clone());
                    changed = true;
                }
            }
        }
        if !instruction.kind.goes_on() {
            values = None;
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binary::disasm::Arch;

    const AX: Register = Register::new(0);
    const CX: Register = Register::new(1);

    fn at_end(code: &[u8]) -> (Value, Value) {
        let code = Code::decode(Arch::X86_64, Vaddr(0x1000), code);
        let mut last = (Value::Unknown, Value::Unknown);
        walk(&code, AX, |_, values| {
            last = (values.get(AX), values.get(CX))
        });
        last
    }

    #[test]
    fn what_all_paths_agree_on_is_known() {
        // mov ecx, 5; je +2; mov ecx, ecx is not simple: xor eax, eax; ret
        let agree = [0xb9, 5, 0, 0, 0, 0x74, 2, 0x31, 0xc0, 0xc3];
        assert_eq!(at_end(&agree), (Value::Unknown, Value::Constant(5)));
        // mov ecx, 5; je +5; mov ecx, 6; ret
        let differ = [0xb9, 5, 0, 0, 0, 0x74, 5, 0xb9, 6, 0, 0, 0, 0xc3];
        assert_eq!(at_end(&differ), (Value::Argument(AX, 0), Value::Unknown));
    }

    #[test]
    fn a_loop_settles() {
        // l: add rcx, 1; je l; ret (the loop starts at the entry's successor)
        let count = [0x90, 0x48, 0x83, 0xc1, 1, 0x74, 0xfa, 0xc3];
        assert_eq!(at_end(&count), (Value::Argument(AX, 0), Value::Unknown));
    }

    #[test]
    fn calls_leave_their_result_only() {
        // mov ecx, 5; call 0x1009 + 0x10; lea rcx, [rax+8]; ret
        let call = [
            0xb9, 5, 0, 0, 0, 0xe8, 0x10, 0, 0, 0, 0x48, 0x8d, 0x48, 8, 0xc3,
        ];
        let callee = Vaddr(0x101a);
        assert_eq!(
            at_end(&call),
            (Value::Returned(callee, 0), Value::Returned(callee, 8))
        );
    }

    #[test]
    fn a_computed_jump_leaves_nothing_known() {
        // mov ecx, 5; je +2; jmp rax; ret
        let code = [0xb9, 5, 0, 0, 0, 0x74, 2, 0xff, 0xe0, 0xc3];
        assert_eq!(at_end(&code), (Value::Unknown, Value::Unknown));
    }
}
