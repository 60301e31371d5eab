//! Unwinding a goroutine's stack by the pclntab's stack deltas, as
//! runtime.unwinder does (runtime/traceback.go): frame pointers would do on
//! amd64 from Go 1.21 on only.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::binary::addr::{LoadBias, RuntimeAddr};
use crate::binary::elf::Arch;

use super::program::Program;
use super::symbols::Pc;

/// Program counters whose unwind rule is remembered.
const MAX_CACHED: usize = 1 << 16;

/// How to get from a frame to its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// The stack pointer has moved by so many bytes since the call.
    Delta(u32),
    /// The outermost frame of the stack.
    Top,
    /// The table does not say: the runtime's own traces end here, too.
    Lost,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    rule: Rule,
    /// The function is one that the runtime puts between an interrupted
    /// instruction and its handler.
    injected: bool,
    /// The delta at this program counter is 0, as at a function's first
    /// instruction.
    frameless: bool,
}

/// How an unwinding ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At the goroutine's outermost frame.
    Top,
    /// At a frame behind which the runtime itself cannot see.
    Lost,
    /// The bytes ran out: more of the stack must be read.
    Short,
    /// A return address is not in Go's text: the bytes are not a stack at rest.
    Torn,
    /// More frames than were asked for.
    Limit,
}

/// Unwinds the stacks of one process.
#[derive(Debug)]
pub struct Unwinder {
    program: Arc<Program>,
    bias: LoadBias,
    steps: FxHashMap<RuntimeAddr, Step>,
}

impl Unwinder {
    /// Unwinds for a process that loaded `program` with `bias`.
    pub fn new(program: Arc<Program>, bias: LoadBias) -> Unwinder {
        Unwinder {
            program,
            bias,
            steps: FxHashMap::default(),
        }
    }

    /// Unwinds from `pc`, with `stack` being the bytes from the stack pointer
    /// up, and adds what it finds to `pcs`, at most `limit` of them.
    pub fn unwind(
        &mut self,
        pc: RuntimeAddr,
        stack: &[u8],
        limit: usize,
        pcs: &mut Vec<Pc>,
    ) -> End {
        let link_register = self.program.elf.arch == Arch::Aarch64;
        let word = |at: usize| {
            let bytes = stack.get(at..at.checked_add(8)?)?;
            Some(RuntimeAddr(u64::from_le_bytes(bytes.try_into().ok()?)))
        };
        let first = pcs.len();
        let mut sp = 0usize;
        let mut pc = pc;
        let mut exact = false;
        loop {
            let Some(step) = self.step(pc) else {
                return End::Torn;
            };
            if pcs.len() - first == limit {
                return End::Limit;
            }
            pcs.push(if exact {
                Pc::exact(pc)
            } else {
                Pc::after_call(pc)
            });
            let delta = match step.rule {
                Rule::Top => return End::Top,
                Rule::Lost => return End::Lost,
                Rule::Delta(delta) => delta as usize,
            };
            // amd64's CALL pushes the return address above the frame; arm64
            // saves its link register at the bottom of it.
            let (at, caller) = if link_register {
                (Some(sp), sp.checked_add(delta))
            } else {
                (
                    sp.checked_add(delta),
                    sp.checked_add(delta).and_then(|sp| sp.checked_add(8)),
                )
            };
            let (Some(at), Some(caller)) = (at, caller) else {
                return End::Torn;
            };
            let Some(next) = word(at) else {
                return End::Short;
            };
            if caller <= sp && next == pc {
                return End::Torn;
            }
            sp = caller;
            pc = next;
            exact = step.injected;
            if link_register && step.injected {
                // The signal handler saved the interrupted function's link
                // register in a frame of its own, 16 bytes.
                let Some(saved) = word(sp) else {
                    return End::Short;
                };
                sp += 16;
                let Some(interrupted) = self.step(pc) else {
                    return End::Torn;
                };
                if interrupted.frameless {
                    pcs.push(Pc::exact(pc));
                    pc = saved;
                    exact = false;
                }
            }
        }
    }

    /// The rule at `pc`; `None` when it lies outside of Go's text.
    fn step(&mut self, pc: RuntimeAddr) -> Option<Step> {
        if let Some(step) = self.steps.get(&pc) {
            return Some(*step);
        }
        let table = &self.program.table;
        let offset = self.program.text_offset(self.bias.vaddr(pc))?;
        let function = table.function(offset)?;
        let delta = table.stack_delta(function, offset);
        let name = table.name(function).unwrap_or(b"");
        // cgocallback and systemstack write SP in ways that the runtime
        // follows; a parked goroutine has neither on its stack.
        let rule = if table.is_top_frame(function) {
            Rule::Top
        } else if table.writes_sp(function) && name != b"runtime.cgocallback" {
            Rule::Lost
        } else {
            delta.map_or(Rule::Lost, Rule::Delta)
        };
        let step = Step {
            rule,
            injected: matches!(
                name,
                b"runtime.sigpanic" | b"runtime.asyncPreempt" | b"runtime.debugCallV2"
            ),
            frameless: delta == Some(0),
        };
        if self.steps.len() >= MAX_CACHED {
            self.steps.clear();
        }
        self.steps.insert(pc, step);
        Some(step)
    }
}
