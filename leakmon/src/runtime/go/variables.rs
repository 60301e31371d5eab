//! Addresses of the runtime's variables in a binary without symbols.
//!
//! The function table survives `strip`, so the functions that use a variable
//! can be found and their operands decoded:
//!
//! - `runtime.allgadd` appends to `allgs` (a slice: three adjacent words), then
//!   stores its array to `allgptr` and its length to `allglen`, both
//!   atomically and in this order, so that a reader that takes the length first
//!   is safe. Before all that it checks the status of its argument.
//! - `runtime.newproc1` counts a system goroutine in `sched.ngsys` (a 32-bit
//!   atomic addition of 1) and takes 16 goroutine ids from `sched.goidgen` (a
//!   64-bit atomic addition of 16, `_GoidCacheBatch`), the first field of
//!   `sched`.
//!
//! Both are in `runtime/proc.go`, the same in substance from Go 1.18 to 1.27.
//! What does not look exactly so is refused.

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::binary::addr::Vaddr;
use crate::binary::disasm::values::{Value, Values, walk};
use crate::binary::disasm::{Access, Addend, Code, Instruction, Kind, Register};
use crate::binary::elf::Arch;

/// The functions of a binary: what pclntab and the text segment say.
pub trait Functions {
    /// Entry of the function with this name, as the runtime writes it
    /// (`runtime.newproc.func1`). Of a function and its wrapper for the other
    /// calling convention, which have the same name, the function.
    fn entry(&self, name: &str) -> Option<Vaddr>;

    /// Entry and bytes of the function with this name. Padding up to the next
    /// function may be included.
    fn code(&self, name: &str) -> Option<(Vaddr, Cow<'_, [u8]>)>;

    /// Name and entry of the function that `addr` lies in.
    fn containing(&self, addr: Vaddr) -> Option<(&str, Vaddr)>;
}

/// Something could not be proven from a function's code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{function}: {why}")]
pub struct Refused {
    /// The function.
    pub function: &'static str,
    /// What is not as it should be.
    pub why: String,
}

impl Refused {
    pub(super) fn new(function: &'static str, why: impl Into<String>) -> Self {
        Refused {
            function,
            why: why.into(),
        }
    }
}

/// Registers of Go's internal calling convention (`cmd/compile/abi-internal.md`;
/// amd64 from Go 1.17, arm64 from 1.18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convention {
    /// The first arguments; the first is the first result too.
    pub arguments: [Register; 3],
    /// The running goroutine's `g`.
    pub g: Register,
}

impl Convention {
    /// That of an architecture.
    pub fn of(architecture: Arch) -> Convention {
        let [first, second, third, g] = match architecture {
            // AX, BX, CX; R14.
            Arch::X86_64 => [0, 3, 1, 14],
            // R0, R1, R2; R28.
            Arch::Aarch64 => [0, 1, 2, 28],
        };
        Convention {
            arguments: [first, second, third].map(Register::new),
            g: Register::new(g),
        }
    }
}

/// Where the runtime keeps what a census reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variables {
    /// `runtime.allgs`, a slice of `*g`.
    pub allgs: Vaddr,
    /// `runtime.allgptr`, the address of the array that `allgs` uses.
    pub allgptr: Vaddr,
    /// `runtime.allglen`, how many of its elements are set. To be read before
    /// `allgptr`.
    pub allglen: Vaddr,
    /// `runtime.sched`.
    pub sched: Vaddr,
    /// `runtime.sched.ngsys`, the number of the runtime's own goroutines.
    pub ngsys: Vaddr,
    /// Offset of `atomicstatus` in a `g`, to hold against the layout that the
    /// version promises.
    pub atomicstatus: u64,
}

impl Variables {
    /// Finds them.
    pub fn find(architecture: Arch, functions: &impl Functions) -> Result<Variables, Refused> {
        let convention = Convention::of(architecture);
        let allgadd = Allgadd::read(architecture, functions, convention)?;
        let (sched, ngsys) = sched(architecture, functions, convention)?;
        let variables = Variables {
            allgs: allgadd.allgs,
            allgptr: allgadd.allgptr,
            allglen: allgadd.allglen,
            sched,
            ngsys,
            atomicstatus: allgadd.atomicstatus,
        };
        let words: BTreeSet<u64> = [
            variables.allgs.0,
            variables.allgs.0.wrapping_add(8),
            variables.allgs.0.wrapping_add(16),
            variables.allgptr.0,
            variables.allglen.0,
            variables.sched.0,
            variables.ngsys.0 & !7,
        ]
        .into();
        if words.len() != 7 {
            return Err(Refused::new("runtime.allgadd", "two variables overlap"));
        }
        Ok(variables)
    }
}

/// Decodes a function that must be there and understood to its last byte.
pub(super) fn decode(
    architecture: Arch,
    functions: &impl Functions,
    name: &'static str,
) -> Result<Code, Refused> {
    let (entry, bytes) = functions
        .code(name)
        .ok_or_else(|| Refused::new(name, "not in the function table"))?;
    let code = Code::decode(architecture, entry, &bytes);
    if code.instructions().is_empty() {
        return Err(Refused::new(name, "has no code"));
    }
    if !code.is_whole() {
        return Err(Refused::new(name, "an instruction cannot be decoded"));
    }
    if code.jumps_indirectly() {
        return Err(Refused::new(name, "it jumps to a computed address"));
    }
    Ok(code)
}

struct Allgadd {
    allgs: Vaddr,
    allgptr: Vaddr,
    allglen: Vaddr,
    atomicstatus: u64,
}

impl Allgadd {
    const NAME: &'static str = "runtime.allgadd";

    fn read(
        architecture: Arch,
        functions: &impl Functions,
        convention: Convention,
    ) -> Result<Allgadd, Refused> {
        let refused = |why: &str| Refused::new(Self::NAME, why);
        let code = decode(architecture, functions, Self::NAME)?;
        let g = convention.arguments[0];

        let mut loads = BTreeSet::new();
        let mut stores = BTreeSet::new();
        let mut atomic: Vec<u64> = Vec::new();
        let atomicstorep = functions.entry("runtime.atomicstorep");
        walk(&code, g, |instruction, values| {
            if let (Kind::Call(callee), Value::Constant(addr)) = (instruction.kind, values.get(g))
                && Some(callee) == atomicstorep
            {
                atomic.push(addr);
            }
            let Some(memory) = instruction.memory else {
                return;
            };
            if let Value::Constant(addr) = values.place(&memory) {
                let words =
                    (0..u64::from(memory.width) / 8).map(|word| addr.wrapping_add(word * 8));
                match memory.access {
                    Access::Load => loads.extend(words),
                    Access::Store => stores.extend(words),
                    Access::AtomicStore if memory.width == 8 => atomic.push(addr),
                    _ => {}
                }
            }
        });

        let &[allgptr, allglen] = atomic.as_slice() else {
            return Err(refused(&format!(
                "{} atomic stores to variables instead of 2",
                atomic.len()
            )));
        };
        let mut slices = loads.iter().copied().filter(|&array| {
            let [len, cap] = [array.wrapping_add(8), array.wrapping_add(16)];
            [array, len, cap]
                .iter()
                .all(|word| loads.contains(word) && !atomic.contains(word))
                && stores.contains(&len)
                && stores.contains(&cap)
        });
        let allgs = slices.next().ok_or_else(|| refused("uses no slice"))?;
        if slices.next().is_some() {
            return Err(refused("uses more than one slice"));
        }
        if !loads.contains(&allgptr) {
            return Err(refused("its first atomic store is not to allgptr"));
        }
        let atomicstatus = match status_offset(&code, g) {
            // `readgstatus` is not inlined in a program compiled without
            // inlining.
            None => status_offset(&decode(architecture, functions, "runtime.readgstatus")?, g),
            found => found,
        }
        .ok_or_else(|| refused("it does not read its argument's status"))?;
        for addr in [allgs, allgptr, allglen] {
            if addr % 8 != 0 {
                return Err(refused("a variable is not aligned"));
            }
        }
        Ok(Allgadd {
            allgs: Vaddr(allgs),
            allgptr: Vaddr(allgptr),
            allglen: Vaddr(allglen),
            atomicstatus,
        })
    }
}

/// Offset of the status in the `g` that is a function's first argument: of the
/// first 32 bits that it reads from there, itself or by a method of the field.
fn status_offset(code: &Code, g: Register) -> Option<u64> {
    let mut first = None;
    walk(code, g, |instruction, values| {
        let place = match (instruction.kind, instruction.memory) {
            (Kind::Call(_), _) => values.get(g),
            (_, Some(memory)) if memory.width == 4 && memory.access == Access::Load => {
                values.place(&memory)
            }
            _ => return,
        };
        if let Value::Argument(register, offset @ 1..) = place
            && register == g
        {
            first.get_or_insert(offset as u64);
        }
    });
    first.filter(|offset| (16..512).contains(offset) && offset % 4 == 0)
}

/// Goroutine ids that a processor takes at once: `_GoidCacheBatch` in
/// `runtime/proc.go`, Go 1.18 to 1.27.
const GOID_BATCH: u64 = 16;

/// An atomic addition of a constant to a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Addition {
    /// Where the variable lies; `None` when that is not known.
    addr: Option<u64>,
    width: u8,
    addend: u64,
}

/// Looks for atomic additions: by one instruction, or, in a program that is
/// compiled without inlining, by a method of `atomic`'s types.
pub(super) struct Additions {
    convention: Convention,
    methods: Vec<(Vaddr, u8)>,
}

impl Additions {
    pub(super) fn new(functions: &impl Functions, convention: Convention) -> Self {
        // The package was renamed in Go 1.23.
        let methods = [
            ("runtime/internal/atomic.(*Uint64).Add", 8),
            ("internal/runtime/atomic.(*Uint64).Add", 8),
            ("runtime/internal/atomic.(*Int32).Add", 4),
            ("internal/runtime/atomic.(*Int32).Add", 4),
        ]
        .into_iter()
        .filter_map(|(name, width)| Some((functions.entry(name)?, width)))
        .collect();
        Additions {
            convention,
            methods,
        }
    }

    /// The addition that an instruction does.
    fn of(&self, instruction: &Instruction, values: &Values) -> Option<Addition> {
        let constant = |value| match value {
            Value::Constant(constant) => Some(constant),
            _ => None,
        };
        if let Kind::Call(callee) = instruction.kind {
            let &(_, width) = self.methods.iter().find(|(entry, _)| *entry == callee)?;
            let [addr, addend, _] = self
                .convention
                .arguments
                .map(|register| values.get(register));
            return Some(Addition {
                addr: constant(addr),
                width,
                addend: constant(addend)?,
            });
        }
        let memory = instruction.memory?;
        let addend = match memory.access {
            Access::AtomicAdd(Addend::Constant(constant)) => constant as u64,
            Access::AtomicAdd(Addend::Register(register)) => constant(values.get(register))?,
            _ => return None,
        };
        Some(Addition {
            addr: constant(values.place(&memory)),
            width: memory.width,
            addend,
        })
    }
}

/// `sched` and `sched.ngsys`.
fn sched(
    architecture: Arch,
    functions: &impl Functions,
    convention: Convention,
) -> Result<(Vaddr, Vaddr), Refused> {
    const NAME: &str = "runtime.newproc1";
    let code = decode(architecture, functions, NAME)?;
    let mut ids = BTreeSet::new();
    let mut counters = BTreeSet::new();
    let additions = Additions::new(functions, convention);
    walk(
        &code,
        convention.arguments[0],
        |instruction, values| match additions.of(instruction, values) {
            Some(Addition {
                addr: Some(addr),
                width: 8,
                addend: GOID_BATCH,
            }) => {
                ids.insert(addr);
            }
            Some(Addition {
                addr: Some(addr),
                width: 4,
                addend: 1,
            }) => {
                counters.insert(addr);
            }
            _ => {}
        },
    );
    let single = |addrs: &BTreeSet<u64>, what: &str| {
        let mut addrs = addrs.iter();
        match (addrs.next(), addrs.next()) {
            (Some(&addr), None) => Ok(addr),
            (None, _) => Err(Refused::new(NAME, format!("no atomic addition to {what}"))),
            (Some(_), Some(_)) => Err(Refused::new(
                NAME,
                format!("more than one variable could be {what}"),
            )),
        }
    };
    let sched = single(&ids, "sched.goidgen")?;
    let ngsys = single(&counters, "sched.ngsys")?;
    // `ngsys` lies behind goidgen, lastpoll, pollUntil, the lock and the lists
    // of idle ms and ps: 72 to 96 bytes on in the versions known.
    let near = ngsys
        .checked_sub(sched)
        .is_some_and(|offset| (24..256).contains(&offset));
    if !near || sched % 8 != 0 || ngsys % 4 != 0 {
        return Err(Refused::new(NAME, "sched.ngsys does not lie in sched"));
    }
    Ok((Vaddr(sched), Vaddr(ngsys)))
}
