//! tokio, 1.18 to 1.54 and what comes with the same layout.
//!
//! In the order in which they are used: [`layout`] says where a version keeps
//! things, [`vtables`] finds the vtables of a program's tasks, [`names`] what
//! each stands for, [`program`] puts these together for one executable.
//! [`scan`] searches a process's memory, `cells` reads tasks, `lists` finds
//! tokio's own lists of them, and [`census`] counts. [`probes`] says where their
//! polls can be probed, and what of.

mod cells;
pub mod census;
mod idle;
pub mod layout;
mod lists;
pub mod names;
pub mod probes;
pub mod program;
pub mod scan;
pub mod uses;
pub mod vtables;
pub mod waits;
mod wakers;

use std::sync::Arc;

use crate::binary::shared::Shared;
use crate::probe::{Counts, KnownTask};
use crate::process::identity::Process;
use crate::process::memory::ProcessMemory;
use crate::runtime::{Kind, Probes, Refusal, Tasks};
use crate::task::{Classify, Dump, Flow, Population, SiteFlow};

use census::Census;
use program::Program;

/// What was found in programs, shared by the processes that run them.
pub type Cache = Shared<Result<Option<Arc<Program>>, Refusal>>;

/// Opens the tasks of `process`; `None` when its program has no tokio.
pub fn open(process: &Process, cache: &Cache) -> Option<Result<Box<dyn Tasks>, Refusal>> {
    match census(process, cache).transpose()? {
        Ok(census) => Some(Ok(Box::new(census))),
        Err(refusal) => Some(Err(refusal)),
    }
}

/// The tasks of `process`; `None` when its program has no tokio.
///
/// # Errors
/// [`Refusal`] says why they cannot be read.
pub fn census(process: &Process, cache: &Cache) -> Result<Option<Census<ProcessMemory>>, Refusal> {
    let found = cache
        .get(&process.executable, process.identity.uid, || {
            Ok(Program::analyse(&process.executable)?.map(Arc::new))
        })
        .map_err(|error| Refusal::Unreadable(format!("its executable: {error}")))?;
    let Some(program) = (*found).clone()? else {
        return Ok(None);
    };
    let memory = ProcessMemory::open(process)?;
    let bias = process.load_bias(program.elf.entry);
    Ok(Some(Census::new(
        memory,
        process.identity.pid,
        program,
        bias,
    )))
}

impl Tasks for Census<ProcessMemory> {
    fn kind(&self) -> Kind {
        Kind::Tokio
    }

    fn version(&self) -> String {
        self.program().version_text()
    }

    fn population(&mut self, probed: Option<&Counts>) -> Result<Population, Refusal> {
        self.population_with(probed)
    }

    fn dump(&mut self) -> Result<Dump, Refusal> {
        Census::dump(self)
    }

    fn known(&self) -> Vec<KnownTask> {
        probes::known(self)
    }

    fn probes(&self) -> Result<Probes, Refusal> {
        probes::find(self.program())
    }

    fn classify(&self) -> Classify {
        waits::classify
    }

    fn flow(&mut self, counts: &Counts) -> Flow {
        probes::flow(self, counts)
    }

    fn totals(&self, counts: &Counts) -> SiteFlow {
        probes::totals(self, counts)
    }

    fn build_id(&self) -> Option<String> {
        self.program().build_id()
    }
}
