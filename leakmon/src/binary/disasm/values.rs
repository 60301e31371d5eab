//! What registers hold on the way through a function, as far as straight-line
//! code tells.
//!
//! Whatever is known is forgotten where another path may join (a branch
//! target), behind a call, and behind an instruction that never goes on. What
//! remains holds on every path.

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
            kind if !kind.goes_on() => self.forget(),
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

/// Calls `visit` for each instruction with what the registers hold before it.
///
/// `result` is the register in which calls return their first result.
pub fn walk(code: &Code, result: Register, mut visit: impl FnMut(&Instruction, &Values)) {
    let mut values = Values(std::array::from_fn(|number| {
        Value::Argument(Register::new(number as u8), 0)
    }));
    for (index, instruction) in code.instructions().iter().enumerate() {
        if index > 0 && code.is_target(instruction.addr) {
            values.forget();
        }
        visit(instruction, &values);
        values.step(instruction, result);
    }
}
