//! Go, 1.18 to 1.27.
//!
//! In the order in which they are used: [`buildinfo`] tells whether a program
//! is Go and which, [`layout`] where that version keeps things, [`pclntab`]
//! reads its functions and lines, [`program`] puts these together for one
//! executable. [`variables`] and [`places`] find by disassembly what no symbol
//! leads to in a stripped program, and [`probes`] makes a plan of them.
//! [`symbols`] turns program counters into source positions, [`stack`] unwinds,
//! [`census`] reads every goroutine of a process, and [`waits`] says what its
//! wait reasons mean.

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
pub mod waits;

use std::sync::Arc;

use crate::binary::elf::{Elf, ElfError};
use crate::binary::shared::Shared;
use crate::probe::Counts;
use crate::process::identity::Process;
use crate::process::memory::ProcessMemory;
use crate::runtime::{self, Kind, Probes, Tasks};
use crate::task::{Classify, Dump, Flow, Population, SiteFlow};

use census::{Census, Tables};
use program::{Program, Refusal};
use variables::Variables;

/// What was found in Go programs, shared by the processes that run them.
pub type Cache = Shared<Result<Analysis, Refusal>>;

/// What one executable says, whatever process runs it.
#[derive(Debug)]
pub struct Analysis {
    program: Arc<Program>,
    variables: Variables,
}

impl Analysis {
    fn of(process: &Process, memory: &ProcessMemory) -> Result<Analysis, Refusal> {
        let file = process.executable.try_clone().map_err(unreadable)?;
        let elf = Elf::parse(&file)?;
        let bias = process.load_bias(elf.entry);
        let program = Arc::new(Program::open(file, elf, bias, memory)?);
        let variables = Variables::find(program.elf.arch, &*program)
            .map_err(|refused| Refusal::Unproven(refused.to_string()))?;
        if variables.atomicstatus != program.layout.g.atomicstatus as u64 {
            return Err(Refusal::Unproven(format!(
                "runtime.allgadd reads g.atomicstatus at {}, where {} should have it at {}",
                variables.atomicstatus, program.version.text, program.layout.g.atomicstatus
            )));
        }
        Ok(Analysis { program, variables })
    }
}

fn unreadable(source: std::io::Error) -> Refusal {
    Refusal::Elf(ElfError::io("its executable", source))
}

/// Opens the goroutines of `process`; `None` when it is not a Go program.
pub fn open(process: &Process, cache: &Cache) -> Option<Result<Box<dyn Tasks>, runtime::Refusal>> {
    match census(process, cache) {
        Ok(census) => Some(Ok(Box::new(census))),
        Err(Refusal::NotGo) => None,
        Err(refusal) => Some(Err(refusal.into())),
    }
}

/// The goroutines of `process`.
///
/// # Errors
/// [`Refusal`] says why they cannot be read.
pub fn census(process: &Process, cache: &Cache) -> Result<Census<ProcessMemory>, Refusal> {
    let memory = ProcessMemory::open(process)?;
    let found = cache
        .get(&process.executable, process.identity.uid, || {
            Analysis::of(process, &memory)
        })
        .map_err(unreadable)?;
    let Analysis { program, variables } = match &*found {
        Ok(analysis) => analysis,
        // What was wrong with one process's memory says nothing of another's.
        Err(Refusal::Memory(_)) => &Analysis::of(process, &memory)?,
        Err(refusal) => return Err(refusal.clone()),
    };
    let bias = process.load_bias(program.elf.entry);
    let tables = Tables {
        allglen: bias.runtime(variables.allglen),
        allgptr: bias.runtime(variables.allgptr),
        clock_offset: process.identity.clock_offset_ns(),
    };
    Ok(Census::new(memory, Arc::clone(program), bias, tables))
}

impl From<Refusal> for runtime::Refusal {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Memory(error) => runtime::Refusal::Memory(error),
            other => runtime::Refusal::Unreadable(other.to_string()),
        }
    }
}

impl Tasks for Census<ProcessMemory> {
    fn kind(&self) -> Kind {
        Kind::Go
    }

    fn version(&self) -> String {
        self.program().version.text.clone()
    }

    fn population(&mut self, _probed: Option<&Counts>) -> Result<Population, runtime::Refusal> {
        Ok(Census::population(self)?)
    }

    fn sample(&mut self) -> Result<(), runtime::Refusal> {
        Ok(Census::sample(self)?)
    }

    fn dump(&mut self) -> Result<Dump, runtime::Refusal> {
        Ok(Census::dump(self)?)
    }

    fn probes(&self) -> Result<Probes, runtime::Refusal> {
        Ok(probes::find(self.program())?)
    }

    fn classify(&self) -> Classify {
        waits::kind
    }

    fn flow(&mut self, counts: &Counts) -> Flow {
        probes::flow(self, counts)
    }

    fn totals(&self, counts: &Counts) -> SiteFlow {
        probes::totals(self, counts)
    }

    fn build_id(&self) -> Option<String> {
        let program = self.program();
        program.elf.build_id(&program.file)
    }
}
