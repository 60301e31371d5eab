//! One folder a runtime, all of one shape: detect, layout, census, probes,
//! names. What the rest of leakmon sees of each is [`Tasks`].

pub mod go;
pub mod threads;
pub mod tokio;

use crate::probe::{Counts, CreationStack, KnownTask, KnownThread, Plan, ThreadRegisters};
use crate::process::identity::Process;
use crate::process::memory::MemoryError;
use crate::task::{Classify, Dump, Flow, Population, SiteFlow, Tier};

/// The runtimes that leakmon knows, in the order in which reports show them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Goroutines.
    Go,
    /// Rust's tokio.
    Tokio,
    /// The kernel's own: every process has it.
    Threads,
}

impl Kind {
    /// Every runtime.
    pub const ALL: [Kind; 3] = [Kind::Go, Kind::Tokio, Kind::Threads];

    /// The word on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Go => "go",
            Kind::Tokio => "tokio",
            Kind::Threads => "threads",
        }
    }

    /// The runtime of this [`name`](Kind::name).
    pub fn named(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What it calls its tasks, in the plural.
    pub fn tasks(self) -> &'static str {
        match self {
            Kind::Go => "goroutines",
            Kind::Tokio => "tasks",
            Kind::Threads => "threads",
        }
    }

    /// What it calls one of its tasks.
    pub fn task(self) -> &'static str {
        match self {
            Kind::Go => "goroutine",
            Kind::Tokio => "task",
            Kind::Threads => "thread",
        }
    }
}

/// Why the tasks of a runtime cannot be read, and what would help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The process is gone, was replaced, or may not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The runtime is there, but what leakmon relies on is not.
    #[error("{0}")]
    Unreadable(String),
}

impl Refusal {
    /// Whether nothing more can be said of the process, not even its threads.
    pub fn ends_the_watch(&self) -> bool {
        matches!(
            self,
            Refusal::Memory(MemoryError::Gone | MemoryError::Replaced | MemoryError::NotPermitted)
        )
    }
}

/// A plan, and what it lacks.
#[derive(Debug)]
pub struct Probes {
    /// What can be attached.
    pub plan: Plan,
    /// Why what [`Tier::Blocking`] adds cannot be, if it cannot.
    pub blocking_refused: Option<String>,
}

impl Probes {
    /// The highest tier that the plan has places for.
    pub fn highest_tier(&self) -> Tier {
        self.plan.highest_tier()
    }
}

/// Gives the registers of all threads of the process with this pid, as far as
/// it knows them: [`Kernel::registers`](crate::probe::Kernel::registers).
pub type RegisterSource = Box<dyn FnMut(u32) -> Vec<ThreadRegisters> + Send>;

/// The tasks that one runtime keeps in one process.
pub trait Tasks: Send {
    /// Which runtime.
    fn kind(&self) -> Kind;

    /// Its version as it prints itself: `go1.26.8`; empty where it has none.
    fn version(&self) -> String;

    /// A census: every live task, by the runtime's own definition. `probed` is
    /// what the probes had counted just before, where they are attached.
    ///
    /// # Errors
    /// [`Refusal`]; the process may be gone.
    fn population(&mut self, probed: Option<&Counts>) -> Result<Population, Refusal>;

    /// A look between two censuses, where one helps to tell whether a task has
    /// run.
    ///
    /// # Errors
    /// As [`Tasks::population`].
    fn sample(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    /// Every task with its stack.
    ///
    /// # Errors
    /// As [`Tasks::population`].
    fn dump(&mut self) -> Result<Dump, Refusal>;

    /// Takes the registers of threads from `source`, where stacks are unwound
    /// from them: `/proc` shows neither the frame pointer nor the link register,
    /// without which many stacks end early. May be called at any time.
    fn use_registers(&mut self, source: RegisterSource) {
        drop(source);
    }

    /// Every live task of the latest census, for probes that must tell those
    /// that are new from those that were there before.
    fn known(&self) -> Vec<KnownTask> {
        Vec::new()
    }

    /// Every thread of the latest census, for probes that count those that were
    /// there before them by the sites that the census has found.
    fn known_threads(&mut self) -> Vec<KnownThread> {
        Vec::new()
    }

    /// Takes the stacks of those who made tasks, which `stacks` reads from the
    /// kernel, where a site in `counts` has no name without. Called before what
    /// was counted is used otherwise.
    fn use_stacks(&mut self, counts: &Counts, stacks: &mut dyn FnMut() -> Vec<CreationStack>) {
        let _ = (counts, stacks);
    }

    /// What can be probed.
    ///
    /// # Errors
    /// [`Refusal::Unreadable`] when nothing can; the census goes on without.
    fn probes(&self) -> Result<Probes, Refusal>;

    /// What its wait reasons let one conclude.
    fn classify(&self) -> Classify;

    /// Puts names to what the probes counted of the program's own tasks.
    fn flow(&mut self, counts: &Counts) -> Flow;

    /// Spawns and exits of the program's own tasks.
    fn totals(&self, counts: &Counts) -> SiteFlow;

    /// Build id of the program, for profiles.
    fn build_id(&self) -> Option<String>;
}

/// A runtime found in a process, and its tasks or why they cannot be read.
pub struct Found {
    /// Which runtime.
    pub kind: Kind,
    /// Its tasks.
    pub tasks: Result<Box<dyn Tasks>, Refusal>,
}

/// What was found in programs, shared by the processes that run them.
#[derive(Debug, Default)]
pub struct Cache {
    go: go::Cache,
    tokio: tokio::Cache,
}

/// Opens every runtime of `process`, in the order of [`Kind::ALL`].
pub fn open(process: &Process, cache: &Cache) -> Vec<Found> {
    let mut found = Vec::new();
    let mut add = |kind, opened: Option<Result<Box<dyn Tasks>, Refusal>>| {
        if let Some(tasks) = opened {
            found.push(Found { kind, tasks });
        }
    };
    add(Kind::Go, go::open(process, &cache.go));
    add(Kind::Tokio, tokio::open(process, &cache.tokio));
    add(Kind::Threads, threads::open(process));
    found
}
