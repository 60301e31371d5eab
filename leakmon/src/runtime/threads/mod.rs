//! Threads, of any process in any language: the kernel keeps their table.
//!
//! In the order in which they are used: [`census`] lists them and tells which
//! have run; `syscalls` says what a blocked one called, `stack` unwinds it with
//! the files that `modules` holds, `sites` names where it came from, `waits`
//! what it waits for, `deadlock` finds those that wait for each other, and
//! `probes` says what is probed, and where the threads that were seen to be made
//! came from.

pub mod census;
mod deadlock;
mod modules;
mod probes;
mod sites;
mod stack;
mod syscalls;
mod waits;

use crate::probe::{Counts, CreationStack, KnownThread};
use crate::process::identity::Process;
use crate::runtime::{Kind, Probes, Refusal, RegisterSource, Tasks};
use crate::task::{Classify, Dump, Flow, Population, SiteFlow};

use census::{Census, Detail};

/// Opens the threads of `process`: there always are some.
pub fn open(process: &Process) -> Option<Result<Box<dyn Tasks>, Refusal>> {
    Some(match Census::open(process, Detail::Stacks) {
        Ok(census) => Ok(Box::new(census)),
        Err(error) => Err(Refusal::Memory(error)),
    })
}

impl Tasks for Census {
    fn kind(&self) -> Kind {
        Kind::Threads
    }

    fn version(&self) -> String {
        String::new()
    }

    fn population(&mut self, probed: Option<&Counts>) -> Result<Population, Refusal> {
        match probed {
            Some(counts) => self.population_beside(counts),
            None => Census::population(self),
        }
    }

    fn dump(&mut self) -> Result<Dump, Refusal> {
        Census::dump(self)
    }

    fn known_threads(&mut self) -> Vec<KnownThread> {
        Census::known_threads(self)
    }

    fn use_stacks(&mut self, counts: &Counts, stacks: &mut dyn FnMut() -> Vec<CreationStack>) {
        Census::use_stacks(self, counts, stacks);
    }

    fn probes(&self) -> Result<Probes, Refusal> {
        Census::probes(self)
    }

    fn classify(&self) -> Classify {
        waits::kind
    }

    fn flow(&mut self, counts: &Counts) -> Flow {
        Census::flow(self, counts)
    }

    fn totals(&self, counts: &Counts) -> SiteFlow {
        let mut sum = SiteFlow::default();
        for (_, site) in &counts.sites {
            sum.add(*site);
        }
        sum
    }

    fn use_registers(&mut self, source: RegisterSource) {
        Census::use_registers(self, source);
    }

    fn build_id(&self) -> Option<String> {
        Census::build_id(self)
    }
}
