//! The model: tasks, the sites that spawned them, what they wait for, and the
//! population of one process.
//!
//! Every runtime fills these types and every report reads them, so a report
//! knows nothing of Go and a runtime nothing of reports.

mod histogram;
pub mod human;
mod merge;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

pub use merge::{Checkpoint, Classify, SiteHash, SiteState, WaitState, merge, rates, reconcile};

pub use leakmon_common::{HISTOGRAM_BUCKETS, SiteKey};

/// One source position of a stack, symbolised. Inlined calls are frames of
/// their own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Function name as the binary's function table has it, type arguments
    /// included: `main.(*server).sum.func1`, `main.Map[go.shape.int]`.
    pub function: Arc<str>,
    /// Source file as the compiler recorded it.
    pub file: Arc<str>,
    /// Line in `file`, from 1; 0 when unknown.
    pub line: u32,
    /// Program counter in the process, as the runtime's own profiles have it:
    /// the return address; where the frame before was inlined into this one,
    /// one more than the address of the inlining's mark (or the return address
    /// of the frame before, where the mark is not known).
    pub pc: u64,
    /// Bytes from the start of the (outermost, not inlined) function to the
    /// return address, which inlined frames share.
    pub offset: u64,
    /// Entry of the (outermost, not inlined) function, in the process.
    pub entry: u64,
    /// The call was inlined into the next frame of the stack.
    pub inlined: bool,
    /// The runtime leaves the frame out of its own traces (Go's `runtime.gopark`),
    /// unless that would leave nothing.
    pub hidden: bool,
}

/// Where tasks were spawned. Tasks with equal [`SiteKey`] have equal sites.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Site {
    /// What the kernel side counts by.
    pub key: SiteKey,
    /// The function that the tasks run, `line` being its first line.
    pub entry: Option<Frame>,
    /// The statement that spawned them; `None` for a task that nobody spawned
    /// (Go's main goroutine).
    pub created_by: Option<Frame>,
    /// Why the names may be another task's: what they were found by, where that
    /// is not certain.
    pub doubt: Option<Arc<str>>,
}

/// What a task is doing, in the words of its runtime (`runnable`, `running`,
/// `syscall`, `waiting`, ...).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Ready to run, waiting for a processor.
    Runnable,
    /// On a processor.
    Running,
    /// In a system call.
    Syscall,
    /// Blocked; the group's reason says on what.
    Waiting,
    /// Its stack is being moved by the runtime.
    CopyStack,
    /// Stopped by the runtime's preemption.
    Preempted,
    /// Proven by the runtime itself to be unreachable (Go 1.26 and later).
    Leaked,
    /// A tokio task that nobody has woken: it waits.
    Idle,
    /// A tokio task that was woken and waits for a worker.
    Scheduled,
    /// A tokio task that has ended, and whose memory somebody still holds.
    Complete,
    /// A thread that waits, in the kernel.
    Sleeping,
    /// A thread that waits in the kernel and cannot be interrupted.
    DiskSleep,
    /// A thread stopped by a signal, or by a debugger.
    Stopped,
    /// A thread that has ended, and that nobody has reaped.
    Zombie,
}

impl State {
    /// Whether a task in this state waits for something to happen. A task in a
    /// system call is not counted among these: who waits there is the kernel's
    /// business.
    pub fn is_blocked(self) -> bool {
        matches!(
            self,
            State::Waiting | State::Leaked | State::Idle | State::Sleeping | State::DiskSleep
        )
    }

    /// The runtime's own word for the state: Go's (runtime/runtime2.go), tokio's
    /// (runtime/task/state.rs), the kernel's (fs/proc/array.c).
    pub fn name(self) -> &'static str {
        match self {
            State::Runnable => "runnable",
            State::Running => "running",
            State::Syscall => "syscall",
            State::Waiting => "waiting",
            State::CopyStack => "copystack",
            State::Preempted => "preempted",
            State::Leaked => "leaked",
            State::Idle => "idle",
            State::Scheduled => "scheduled",
            State::Complete => "complete",
            State::Sleeping => "sleeping",
            State::DiskSleep => "disk sleep",
            State::Stopped => "stopped",
            State::Zombie => "zombie",
        }
    }
}

/// How long a task has been blocked, and how exactly that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age {
    /// It has been blocked at least this long.
    pub at_least: Duration,
}

/// What a wait's reason lets one conclude about leaks. The runtime says it: only
/// it knows what its words mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitKind {
    /// How it is judged.
    pub class: WaitClass,
    /// What did not happen, that would have let the tasks run: `nobody received`.
    pub missing: Option<&'static str>,
}

/// How a wait is judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaitClass {
    /// Waiting for ever is never meant: a channel send, a nil channel.
    Hanging,
    /// A lock: waiting long is never meant.
    Lock,
    /// Waiting for ever is a way to be idle: receive, select, wait groups.
    Idle,
    /// It says nothing about leaks: `IO wait`, `sleep`.
    #[default]
    Silent,
}

/// Index into [`Population::stacks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StackId(pub u32);

/// Index into [`Population::sites`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId(pub u32);

/// Tasks of one site that are in one state at one place: the unit of a census.
#[derive(Clone, Debug)]
pub struct Group {
    /// Where they were spawned.
    pub site: SiteId,
    /// What they do.
    pub state: State,
    /// Why they wait (`chan send`), for states in which a task is blocked; `None`
    /// where that is not known.
    pub reason: Option<Arc<str>>,
    /// Their stack; `None` when it cannot be read (running).
    pub stack: Option<StackId>,
    /// How many.
    pub count: u64,
    /// Of these, how many have not run since an earlier census saw them.
    pub not_run: u64,
    /// The longest any of them has been blocked.
    pub oldest: Option<Age>,
    /// Id of the task that has been blocked longest (the lowest id among equals).
    pub sample: u64,
}

/// A stack, innermost frame first.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stack {
    /// Every physical and inlined frame, innermost first, the runtime's own
    /// included; only compiler-made wrappers that the runtime never shows are
    /// left out.
    pub frames: Vec<Frame>,
    /// Index in `frames` of the innermost frame that is not the runtime's or
    /// the standard library's own synchronisation code: where a person would
    /// say that the task waits.
    pub place: Option<usize>,
}

impl Stack {
    /// The frame where a person would say that the task waits.
    pub fn place(&self) -> Option<&Frame> {
        self.frames.get(self.place?)
    }
}

/// The tasks of one process and one runtime, at one moment.
#[derive(Clone, Debug)]
pub struct Population {
    /// CLOCK_MONOTONIC nanoseconds at the start of the census.
    pub taken_at: u64,
    /// How long the census took.
    pub took: Duration,
    /// Live tasks by the runtime's own definition (`runtime.NumGoroutine`).
    pub count: u64,
    /// Tasks of the runtime itself, not in `count`.
    pub system: u64,
    /// Tasks that changed while they were read, counted by their last state.
    /// Threads that are about to end, or have never run, are among them.
    pub unstable: u64,
    /// Tasks at rest whose stack is not told, because there are too many
    /// different ones or too much of them.
    pub untold: u64,
    /// `count` by state.
    pub states: BTreeMap<State, u64>,
    /// `count` by site, state, reason and stack.
    pub groups: Vec<Group>,
    /// Every site met.
    pub sites: Arc<Vec<Site>>,
    /// Every stack met.
    pub stacks: Arc<Vec<Stack>>,
    /// Tasks that wait for each other in a circle.
    pub cycles: Vec<Cycle>,
    /// What keeps the tasks, where a process may have several: tokio's runtimes and
    /// `LocalSet`s.
    pub schedulers: Vec<Scheduler>,
    /// What else is wrong, in sentences: `task 7 (app::serve) has run for 3s
    /// without yielding`.
    pub warnings: Vec<String>,
}

/// One of several schedulers of a runtime in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduler {
    /// The number that the runtime gave it: 1 for the first.
    pub id: u64,
    /// Its live tasks.
    pub live: u64,
}

/// Tasks that wait for each other in a circle: none of them can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cycle {
    /// Each waits for what the next one holds; the last for the first's.
    pub members: Vec<CycleMember>,
    /// Why this may be no deadlock, where it is not proven: a lock that does
    /// not say who holds it.
    pub doubt: Option<Arc<str>>,
}

/// One task of a [`Cycle`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CycleMember {
    /// The task's id.
    pub task: u64,
    /// Its name, where it has one.
    pub name: Option<Arc<str>>,
    /// Address of the lock that it waits for, in the process; `None` when it
    /// waits for the next one's end.
    pub lock: Option<u64>,
    /// Where it waits: the line that wants the lock.
    pub place: Option<Frame>,
}

impl Population {
    /// The site of a group.
    pub fn site(&self, id: SiteId) -> &Site {
        &self.sites[id.0 as usize]
    }

    /// The stack of a group.
    pub fn stack(&self, id: StackId) -> &Stack {
        &self.stacks[id.0 as usize]
    }
}

/// One task, for dumps.
#[derive(Clone, Debug)]
pub struct Task {
    /// The runtime's own id (goid).
    pub id: u64,
    /// Id of the task that spawned it, where the runtime keeps it.
    pub parent: Option<u64>,
    /// What it does.
    pub state: State,
    /// Why it waits.
    pub reason: Option<Arc<str>>,
    /// The garbage collector is scanning its stack.
    pub scan: bool,
    /// How long it has waited by the runtime's own clock, which Go starts at
    /// the first collection that finds the goroutine blocked.
    pub waited: Option<Duration>,
    /// Locked to its thread (`runtime.LockOSThread`).
    pub locked_to_thread: bool,
    /// Where it was spawned.
    pub site: SiteId,
    /// Its stack; `None` while it runs.
    pub stack: Option<StackId>,
    /// What exactly it waits for, where that is known: `task 17`, `mutex
    /// 0x7f31c0de held by thread 4243`.
    pub on: Option<Arc<str>>,
    /// Its name, where tasks have one (a thread's).
    pub name: Option<Arc<str>>,
    /// pprof labels, where they can be read.
    pub labels: Vec<(Arc<str>, Arc<str>)>,
}

/// Every task of one process: what `leakmon stacks` prints.
#[derive(Clone, Debug)]
pub struct Dump {
    /// Tasks in the order in which the runtime itself dumps them.
    pub tasks: Vec<Task>,
    /// Every site met.
    pub sites: Arc<Vec<Site>>,
    /// Every stack met.
    pub stacks: Arc<Vec<Stack>>,
    /// The runtime's version as it prints itself: `go1.26.8`.
    pub version: String,
    /// What the runtime calls a task: `goroutine`.
    pub noun: &'static str,
}

/// Durations in log2 buckets, as the kernel counted them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Bucket `i` counts durations of `2^i` to `2^(i+1) - 1` nanoseconds.
    pub buckets: [u64; HISTOGRAM_BUCKETS],
    /// Sum of all durations, in nanoseconds.
    pub total_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: [0; HISTOGRAM_BUCKETS],
            total_ns: 0,
        }
    }
}

/// What the probes counted at one site since they were attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SiteFlow {
    /// Tasks spawned.
    pub spawned: u64,
    /// Tasks that ended.
    pub exited: u64,
    /// Times that they ran, where the runtime's probes count it (tokio's polls).
    pub runs: Option<Runs>,
}

impl SiteFlow {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: SiteFlow) {
        self.spawned += other.spawned;
        self.exited += other.exited;
        if let Some(runs) = other.runs {
            self.runs.get_or_insert_default().add(runs);
        }
    }
}

/// Times that tasks ran from one wait to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// How often.
    pub count: u64,
    /// How long in all, in nanoseconds.
    pub busy_ns: u64,
    /// The longest one, in nanoseconds.
    pub longest_ns: u64,
}

impl Runs {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: Runs) {
        self.count += other.count;
        self.busy_ns += other.busy_ns;
        self.longest_ns = self.longest_ns.max(other.longest_ns);
    }
}

/// What the probes counted of one kind of wait since they were attached.
#[derive(Clone, Debug)]
pub struct WaitFlow {
    /// Where the waiting tasks were spawned.
    pub site: SiteKey,
    /// Why they waited, in the runtime's words.
    pub reason: Arc<str>,
    /// The wait's own stack, symbolised, innermost first; a few frames only.
    pub stack: Stack,
    /// Times a task blocked here.
    pub parks: u64,
    /// Times one went on.
    pub resumes: u64,
    /// How long they were blocked (one entry a resume).
    pub durations: Histogram,
}

/// Everything the probes counted in one process since they were attached.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    /// Tasks spawned and ended, by site.
    pub sites: Vec<(Site, SiteFlow)>,
    /// Blocks by site, reason and place.
    pub waits: Vec<WaitFlow>,
    /// Probe hits.
    pub hits: u64,
    /// Hits that could not be counted, by reason (`site map full`).
    pub dropped: BTreeMap<&'static str, u64>,
}

/// How much is attached to a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Nothing: the runtime's tables are read.
    #[default]
    Census,
    /// Spawn and exit.
    Lifecycle,
    /// Spawn, exit, and channel and sync park and resume.
    Blocking,
}

impl Tier {
    /// The word on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Census => "census",
            Tier::Lifecycle => "lifecycle",
            Tier::Blocking => "blocking",
        }
    }
}

/// Flow measured over one interval by the probes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Tasks spawned a second, while the probes were attached.
    pub spawned_per_second: f64,
    /// Tasks ended a second.
    pub exited_per_second: f64,
}

/// What leakmon costs the target, as measured over the last interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Overhead {
    /// Probe hits in the interval.
    pub hits: u64,
    /// What the interval's hits cost, by what was measured of leakmon's own, in
    /// nanoseconds of target CPU.
    pub cost_ns: u64,
    /// CPU time that the target used in the interval, in nanoseconds.
    pub target_cpu_ns: u64,
    /// `cost_ns` over `target_cpu_ns`, in percent.
    pub percent: f64,
    /// `cost_ns` over the interval: percent of one core.
    pub core_percent: f64,
    /// What `--max-overhead` allows, in percent; `None` when ungoverned.
    pub budget_percent: Option<f64>,
    /// Share of the interval in which the probes were attached, 0 to 1.
    /// Below 1 the probes' figures are samples.
    pub attached: f64,
}

/// How much of what happened the probes saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coverage {
    /// Share of the last interval in which spawns and exits were counted, 0 to 1.
    pub spawns: f64,
    /// Share of the last interval in which waits were timed, 0 to 1.
    pub waits: f64,
    /// Spawns and exits were counted without a break since the first time:
    /// their totals are exact.
    pub all_spawns: bool,
    /// Waits were timed without a break since the first time. Otherwise long
    /// ones are missing: a wait that a break cuts is not timed.
    pub all_waits: bool,
}

/// Census and probes, held against each other.
///
/// While probes are attached without a break, the live count by census must
/// change by exactly spawned - exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reconciliation {
    /// Live count by census, less what the probes expect: 0 when both agree.
    pub difference: i64,
    /// The census reads a running target over some time; a difference up to
    /// this many tasks (spawned and exited meanwhile) proves nothing.
    pub uncertainty: u64,
}
