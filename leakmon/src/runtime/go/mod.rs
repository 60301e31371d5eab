//! Go, 1.18 to 1.27.
//!
//! In the order in which they are used: [`buildinfo`] tells whether a program
//! is Go and which, [`layout`] where that version keeps things, [`pclntab`]
//! reads its functions and lines, [`program`] puts these together for one
//! executable. [`variables`] and [`places`] find by disassembly what no symbol
//! leads to in a stripped program, and [`probes`] makes a plan of them.
//! [`symbols`] turns program counters into
//! source positions, [`stack`] unwinds, and [`census`] reads every goroutine of
//! a process.

pub mod buildinfo;
pub mod census;
pub mod labels;
pub mod layout;
pub mod pclntab;
pub mod places;
pub mod probes;
pub mod program;
pub mod stack;
pub mod symbols;
pub mod variables;

use std::sync::Arc;

use crate::binary::elf::Elf;
use crate::process::identity::Process;
use crate::process::memory::ProcessMemory;

use census::{Census, Tables};
use program::{Program, Refusal};
use variables::Variables;

/// Opens the goroutines of `process`.
///
/// # Errors
/// [`Refusal`] says why they cannot be read.
pub fn open(process: &Process) -> Result<Census<ProcessMemory>, Refusal> {
    let file = process.executable.try_clone().map_err(|source| {
        Refusal::Elf(crate::binary::elf::ElfError::Io {
            what: "its executable",
            source,
        })
    })?;
    let elf = Elf::parse(&file)?;
    let bias = process.load_bias(elf.entry);
    let memory = ProcessMemory::open(process)?;
    let program = Arc::new(Program::open(file, elf, bias, &memory)?);
    let variables = Variables::find(program.elf.arch, &*program)
        .map_err(|refused| Refusal::Unproven(refused.to_string()))?;
    if variables.atomicstatus != program.layout.g.atomicstatus as u64 {
        return Err(Refusal::Unproven(format!(
            "runtime.allgadd reads g.atomicstatus at {}, where {} should have it at {}",
            variables.atomicstatus, program.version.text, program.layout.g.atomicstatus
        )));
    }
    let tables = Tables {
        allglen: bias.runtime(variables.allglen),
        allgptr: bias.runtime(variables.allgptr),
        clock_offset: process.identity.clock_offset_ns(),
    };
    Ok(Census::new(memory, program, bias, tables))
}
