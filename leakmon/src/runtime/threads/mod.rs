//! Threads, of any process in any language: the kernel keeps their table.
//!
//! In the order in which they are used: [`census`] lists them and tells which
//! have run; `syscalls` says what a blocked one called, `stack` unwinds it with
//! the files that `modules` holds, `sites` names where it came from, `waits`
//! what it waits for, and `deadlock` finds those that wait for each other.

pub mod census;
mod deadlock;
mod modules;
mod sites;
mod stack;
mod syscalls;
mod waits;

use crate::probe::Counts;
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

    fn population(&mut self, _probed: Option<&Counts>) -> Result<Population, Refusal> {
        Census::population(self)
    }

    fn dump(&mut self) -> Result<Dump, Refusal> {
        Census::dump(self)
    }

    fn probes(&self) -> Result<Probes, Refusal> {
        Err(Refusal::Unreadable(
            "no probe places for threads are known".to_owned(),
        ))
    }

    fn classify(&self) -> Classify {
        waits::kind
    }

    fn flow(&mut self, _counts: &Counts) -> Flow {
        Flow::default()
    }

    fn totals(&self, _counts: &Counts) -> SiteFlow {
        SiteFlow::default()
    }

    fn use_registers(&mut self, source: RegisterSource) {
        Census::use_registers(self, source);
    }

    fn build_id(&self) -> Option<String> {
        Census::build_id(self)
    }
}
