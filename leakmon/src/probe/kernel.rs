//! Loads the kernel side, attaches plans to processes and reads what it
//! counted.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, PerCpuValues, Queue, RingBuf};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use leakmon_common::threads::{KernelOffsets, StackCopy, ThreadEntry};
use leakmon_common::tokio::{SESSION_COOKIE, SESSION_IS_RETURN, TaskEntry, header_of, owner};
use leakmon_common::{
    Cookie, Counters, MAX_TARGETS, NO_SLOT, Parked, SiteCount, Target, TargetSite, WaitCount,
    WaitKey, member_key, parked_key,
};

use super::btf::Btf;
use super::counts::{
    Counts, CreationStack, Drops, Hits, KnownTask, KnownThread, TaskRun, ThreadRun, WaitCounts,
};
use super::detaching::Detaching;
use super::error::{Error, errno};
use super::events::ProcessEvents;
use super::features::{self, Features};
use super::lock;
use super::object::{Cookies, Image, Object};
use super::others::{self, CpuReading, Others};
use super::plan::{Code, Kind, Place, Plan, Role, Tier};
use super::pool::{OWN_LINKS, Pool, PoolKey, Shared};
use super::registers::{self, ThreadRegisters, Witness};
use super::sys::{self, ProgramType, Uprobe, When};
use crate::process::capabilities::{Facts, KernelVersion};
use crate::task::{Histogram, Runs, SiteFlow, SiteKey};

/// The program of the tracepoint of switches.
const SWITCH: &str = "thread_switch";

/// What they are, in messages.
const EVENTS: &str = "events of processes";

/// What a session is, in messages.
const SESSIONS: &str = "programs that see a call and its return";

/// `PROC_PID_INIT_INO` of include/linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// How much is counted at once, over all targets. What exceeds it is counted
/// as dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Spawn sites. The kernel holds about 100 bytes and 16 for each CPU of one
    /// that is in use.
    pub sites: u32,
    /// Goroutines whose waits are followed. The kernel holds 16 bytes of one,
    /// and 128 more of one that has waited.
    pub goroutines: u32,
    /// Kinds of wait, by spawn site, reason and place. The kernel holds 408
    /// bytes for each CPU of one.
    pub waits: u32,
    /// tokio's tasks. The kernel holds 16 bytes of one, and 128 more of one that
    /// was seen.
    pub tasks: u32,
    /// Plans attached at once, at most [`MAX_TARGETS`]. The kernel holds 56
    /// bytes and 112 for each CPU of one.
    pub targets: u32,
}

impl Limits {
    /// What is sensible on a machine with `cpus` possible CPUs: about 16 MiB
    /// for the goroutines and as much for the waits.
    pub fn for_cpus(cpus: usize) -> Limits {
        const WAITS_BYTES: usize = 16 << 20;
        let waits = WAITS_BYTES / (size_of::<WaitCount>() * cpus.max(1));
        Limits {
            sites: 16 * 1024,
            goroutines: 1 << 20,
            waits: waits.clamp(512, 8192) as u32,
            tasks: 1 << 18,
            targets: MAX_TARGETS,
        }
    }

    /// What remains where every entry is allocated beforehand: about 30 MiB.
    fn on(self, features: &Features) -> Limits {
        if features.allocator {
            return self;
        }
        Limits {
            sites: self.sites.min(4 * 1024),
            goroutines: self.goroutines.min(1 << 17),
            tasks: self.tasks.min(1 << 16),
            ..self
        }
    }
}

/// How programs are tied to places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One uprobe_multi link for all places of a role: kernel 6.6 and later.
    Multi,
    /// One perf event for each place: every kernel. Detaching waits for the kernel
    /// once for each place.
    PerfEvent,
}

/// The program that does nothing.
const EMPTY: &str = "empty";

/// What keeps places attached. Dropping it detaches.
enum Links {
    Multi(OwnedFd),
    /// Each with its program, which may be a copy of its own.
    PerfEvent(Vec<(Uprobe, Arc<OwnedFd>)>),
    /// Of the whole machine, for all targets.
    Tracepoint(Arc<OwnedFd>),
}

/// Whose hits a link sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// Those of the process whose file it is attached to.
    Process,
    /// Those of every process that has the file mapped.
    Everybody,
}

/// One index of `TARGETS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Index {
    Free,
    Used,
    /// Its entries could not be removed: not to be used again.
    Spoilt,
}

struct State {
    way: Way,
    features: Features,
    /// Holds the maps that were not taken of it.
    _ebpf: Box<Ebpf>,
    object: Object,
    /// By name, as far as they are loaded; `None`: this kernel cannot have it.
    programs: HashMap<&'static str, Option<Arc<OwnedFd>>>,
    /// By name and cookie, for kernels that keep no cookies.
    copies: HashMap<(&'static str, u64), Weak<OwnedFd>>,
    targets: Array<MapData, Target>,
    counters: PerCpuArray<MapData, Counters>,
    // The hash maps are read in batches, for which aya has no call.
    sites: MapData,
    parked: MapData,
    waits: MapData,
    free_slots: Queue<MapData, u32>,
    wait_counts: PerCpuArray<MapData, WaitCount>,
    logger: EbpfLogger<&'static dyn log::Log>,
    cpus: usize,
    indices: Vec<Index>,
    epoch: u32,
    /// The kernel's types, or why there are none.
    types: Result<Types, String>,
    /// The kernel side knows where the kernel's structs have their fields.
    described: bool,
    offsets: Array<MapData, KernelOffsets>,
    iterated: Array<MapData, u32>,
    tasks: MapData,
    threads: MapData,
    stacks: MapData,
    watched: Array<MapData, u64>,
    processes: aya::maps::HashMap<MapData, u32, u64>,
    /// What the kernel's processes tell, until somebody wants it.
    events: Option<(RingBuf<MapData>, Array<MapData, u64>)>,
    /// Tracepoints that are attached, by function.
    tracepoints: HashMap<&'static str, Weak<OwnedFd>>,
    switches: PerCpuArray<MapData, u64>,
    others: Others,
    members: aya::maps::HashMap<MapData, u64, u64>,
    pools: HashMap<PoolKey, Pool<Vec<Links>>>,
}

/// The loaded kernel side: one for a leakmon process, for any number of
/// targets up to [`Limits::targets`].
///
/// Nothing is pinned: when leakmon ends, in whatever way, the kernel detaches
/// everything.
pub struct Kernel {
    shared: Arc<Mutex<State>>,
    way: Way,
}

impl Kernel {
    /// Loads the programs in the best way that this kernel has. That they fire
    /// is proven by [`super::calibrate`].
    ///
    /// # Errors
    ///
    /// [`Error::Permission`] names the missing capability.
    pub fn load() -> Result<Kernel, Error> {
        let loaded = match Kernel::load_for(Way::Multi) {
            Err(Error::Unsupported { .. }) => Kernel::load_for(Way::PerfEvent),
            Err(error @ Error::Program { .. }) => {
                tracing::warn!("{error}; each place gets a perf event of its own instead");
                Kernel::load_for(Way::PerfEvent)
            }
            other => other,
        };
        loaded.map_err(too_old)
    }

    /// Loads the programs for one way of attaching.
    ///
    /// # Errors
    ///
    /// As [`Kernel::load`], also when the kernel lacks `way`.
    pub fn load_for(way: Way) -> Result<Kernel, Error> {
        Kernel::load_with(way, Limits::for_cpus(cpus()?))
    }

    /// As [`Kernel::load_for`], with limits of the caller's.
    ///
    /// # Errors
    ///
    /// As [`Kernel::load_for`].
    pub fn load_with(way: Way, limits: Limits) -> Result<Kernel, Error> {
        let cpus = cpus()?;
        let btf = Btf::of_kernel();
        let features = Features::detect(btf.as_ref().ok())?;
        if way == Way::Multi && !features.multi {
            return Err(Error::Unsupported {
                what: "probes by uprobe_multi links",
                why: "this kernel has none".to_owned(),
            });
        }
        if !features.own_memory {
            features::raise_memory_limit()?;
        }
        let limits = limits.on(&features);
        let image = Image::new(features.allocator)?;
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("TASKS", limits.tasks)
            .map_max_entries("TARGETS", limits.targets)
            .map_max_entries("MEMBERS", 2 * limits.targets)
            .map_max_entries("COUNTERS", limits.targets)
            .map_max_entries("SITES", limits.sites)
            .map_max_entries("PARKED", limits.goroutines)
            .map_max_entries("WAITS", limits.waits)
            .map_max_entries("FREE_SLOTS", limits.waits)
            .map_max_entries("WAIT_COUNTS", limits.waits)
            .load(image.bytes())
            .map_err(|error| match errno(&error) {
                Some(source) => Error::or_permission("bpf", source, |_| Error::Load(error)),
                None => Error::Load(error),
            })?;
        let object = Object::new(&ebpf)?;
        let mut free_slots: Queue<MapData, u32> = take(&mut ebpf, "FREE_SLOTS")?;
        for slot in 0..limits.waits {
            free_slots.push(slot, 0).map_err(map_error("fill a map"))?;
        }
        let offsets = take(&mut ebpf, "KERNEL_OFFSETS")?;
        let tasks = take_data(&mut ebpf, "TASKS")?;
        let threads = take_data(&mut ebpf, "THREADS")?;
        let stacks = take_data(&mut ebpf, "STACKS")?;
        let watched = take(&mut ebpf, "WATCHED")?;
        let processes = take(&mut ebpf, "PROCESSES")?;
        let events = (take(&mut ebpf, "EVENTS")?, take(&mut ebpf, "EVENTS_LOST")?);
        let iterated = take(&mut ebpf, "ITERATED")?;
        let switches = take(&mut ebpf, "SWITCHES")?;
        let members = take(&mut ebpf, "MEMBERS")?;
        let mut state = State {
            targets: take(&mut ebpf, "TARGETS")?,
            counters: take(&mut ebpf, "COUNTERS")?,
            sites: take_data(&mut ebpf, "SITES")?,
            parked: take_data(&mut ebpf, "PARKED")?,
            waits: take_data(&mut ebpf, "WAITS")?,
            free_slots,
            wait_counts: take(&mut ebpf, "WAIT_COUNTS")?,
            logger: EbpfLogger::init(&mut ebpf)
                .map_err(|error| Error::Object(error.to_string()))?,
            way,
            features,
            _ebpf: Box::new(ebpf),
            object,
            programs: HashMap::new(),
            copies: HashMap::new(),
            cpus,
            indices: vec![Index::Free; limits.targets as usize],
            epoch: 0,
            types: btf.map(|btf| Types::of(&btf)),
            described: false,
            tasks,
            threads,
            stacks,
            watched,
            processes,
            events: Some(events),
            tracepoints: HashMap::new(),
            switches,
            others: Others::default(),
            members,
            pools: HashMap::new(),
            offsets,
            iterated,
        };
        // What this takes is told where it is needed. It makes a thread, which would
        // be counted by then where leakmon watches itself.
        if !state.features.registers {
            let _ = state.describe_kernel(EVENTS);
        }
        // One that this kernel must take, if it takes any.
        match way {
            Way::Multi => drop(state.program(EMPTY, ProgramType::UprobeMulti)?),
            Way::PerfEvent => drop(state.program(EMPTY, ProgramType::Uprobe)?),
        }
        Ok(Kernel {
            shared: Arc::new(Mutex::new(state)),
            way,
        })
    }

    /// What this kernel has.
    pub fn features(&self) -> Features {
        lock(&self.shared).features
    }

    /// How programs are tied to places.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Attaches what `tier` holds of `plan` to the process `pid`, all of it or
    /// nothing. [`Tier::Census`] attaches nothing yet.
    ///
    /// The caller has checked that `pid` still is the process that `plan` was
    /// made for.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`] names the place, [`Error::Plan`] what is wrong with
    /// the plan.
    pub fn attach(&self, pid: u32, plan: &Plan, tier: Tier) -> Result<Attached, Error> {
        let mut attached = self.add(pid, plan, false)?;
        attached.set_tier(tier)?;
        Ok(attached)
    }

    /// As [`Kernel::attach`] of [`Tier::Census`], with links that it shares with
    /// others where many have the same places ([`Attached::pool`]).
    ///
    /// # Errors
    ///
    /// As [`Kernel::attach`].
    pub fn join(&self, pid: u32, plan: &Plan) -> Result<Attached, Error> {
        self.add(pid, plan, true)
    }

    fn add(&self, pid: u32, plan: &Plan, may_share: bool) -> Result<Attached, Error> {
        let pid = NonZeroU32::new(pid).ok_or(Error::Plan("process 0 is the kernel's"))?;
        let mut state = lock(&self.shared);
        let target = Target {
            layout: plan.layout,
            ..Target::default()
        };
        let (index, target) = state.add_target(target)?;
        let mut attached = Attached {
            shared: Arc::clone(&self.shared),
            pid,
            index,
            target,
            plan: plan.clone(),
            roles: Role::all()
                .filter(|&role| plan.places.iter().any(|place| place.role == role))
                .collect(),
            counted: false,
            seeded: false,
            tier: Tier::Census,
            links: Vec::new(),
            pool: None,
            shares: false,
            left: false,
        };
        let key = may_share.then(|| state.pool_key(pid, plan)).flatten();
        let joined = key.map(|key| {
            let shares = state.join(&key, pid.get(), target_cookie(index, target.epoch));
            (key, shares)
        });
        // Dropping what was made takes the lock.
        drop(state);
        if let Some((key, shares)) = joined {
            attached.pool = Some(key);
            attached.shares = shares?;
        }
        Ok(attached)
    }

    /// Attaches the program that does nothing at `places`, whatever their role:
    /// what a probe costs without leakmon's work.
    ///
    /// # Errors
    ///
    /// As [`Kernel::attach`].
    pub fn attach_empty(&self, pid: u32, places: &[Place]) -> Result<Empty, Error> {
        let pid = NonZeroU32::new(pid).ok_or(Error::Plan("process 0 is the kernel's"))?;
        let places: Vec<&Place> = places.iter().collect();
        let cookie = target_cookie(0, 0);
        let links =
            lock(&self.shared).link(Kind::Entry(EMPTY), pid, Scope::Process, cookie, &places)?;
        Ok(Empty(links))
    }
}

impl Kernel {
    /// What becomes of the machine's processes from now on; at most one reader.
    /// Needs the initial pid namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] says what is missing; nothing else is lost then.
    pub fn events(&self) -> Result<ProcessEvents, Error> {
        let mut state = lock(&self.shared);
        state.describe_kernel(EVENTS)?;
        let mut links = Vec::new();
        for (name, function) in [
            ("task_newtask", "process_fork"),
            ("sched_process_exec", "process_exec"),
            ("sched_process_exit", "process_exit"),
        ] {
            links.push(state.tracepoint(name, function)?);
        }
        let (ring, lost) = state.events.take().ok_or_else(|| Error::Unsupported {
            what: EVENTS,
            why: "somebody reads them already".to_owned(),
        })?;
        Ok(ProcessEvents {
            ring,
            lost,
            told: 0,
            _links: links,
        })
    }

    /// The registers of every thread of process `pid`, empty when it is gone. A
    /// thread that came or went meanwhile may be missing. Needs the initial pid
    /// namespace and kernel 5.15; before 6.1 the kernel looks at every thread of
    /// the machine for it.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] says what is missing; nothing else is lost then.
    pub fn registers(&self, pid: u32) -> Result<Vec<ThreadRegisters>, Error> {
        let mut state = lock(&self.shared);
        state.describe_kernel("the threads' registers")?;
        let id = state.function("the threads' registers", "bpf_iter_task")?;
        let iterator = state.program("thread_registers", ProgramType::TaskIterator(id))?;
        state
            .iterated
            .set(0, pid, 0)
            .map_err(map_error("name a process"))?;
        match sys::iterate_tasks(iterator.as_fd(), pid) {
            Ok(file) => registers::read(file),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(Vec::new()),
            Err(source) => Err(Error::or_permission("bpf", source, |source| {
                Error::Unsupported {
                    what: "the threads' registers",
                    why: source.to_string(),
                }
            })),
        }
    }
}

/// Switches of leakmon's own threads that are counted by hand: the program is not
/// attached, no other process pays for it.
pub(super) struct Switches {
    program: Arc<OwnedFd>,
    attached: Attached,
    watched: bool,
}

impl Kernel {
    /// For calibration.
    pub(super) fn switches(&self) -> Result<Switches, Error> {
        let plan = Plan {
            layout: Default::default(),
            places: vec![Place::nowhere(Role::ThreadSwitch)],
        };
        let attached = self.attach(std::process::id(), &plan, Tier::Census)?;
        let mut state = lock(&self.shared);
        state.describe_kernel("tracepoints of threads")?;
        let Kind::Tracepoint { function, .. } = Role::ThreadSwitch.program().kind else {
            return Err(Error::Plan("switches have no tracepoint"));
        };
        let program = state.program(function, ProgramType::RawTracepoint)?;
        drop(state);
        Ok(Switches {
            program,
            attached,
            watched: false,
        })
    }
}

impl Switches {
    /// Whether leakmon's own process is watched.
    pub(super) fn watch(&mut self, watched: bool) -> Result<(), Error> {
        let attached = &mut self.attached;
        let mut state = lock(&attached.shared);
        let pid = attached.pid.get();
        if watched && !self.watched {
            let cookie = attached.cookie();
            attached.counted = true;
            attached.target.blocking_since = monotonic();
            state.set_target(attached.index, attached.target)?;
            state.watch(pid, cookie)?;
        } else if !watched && self.watched {
            state.unwatch(pid)?;
        }
        self.watched = watched;
        Ok(())
    }

    /// This thread is taken from its CPU, as far as the program can see: `preempt`
    /// is 0, the next thread none, the previous state `TASK_INTERRUPTIBLE`.
    pub(super) fn run(&self) -> Result<(), Error> {
        sys::run_tracepoint(self.program.as_fd(), &[0, 0, 0, 1]).map_err(|source| Error::Map {
            what: "run a program",
            source,
        })
    }
}

impl Drop for Switches {
    fn drop(&mut self) {
        if let Err(error) = self.watch(false) {
            log::warn!("{error}");
        }
    }
}

/// Places attached to the program that does nothing, until dropped.
#[must_use = "dropping it detaches"]
pub struct Empty(Vec<Links>);

impl Drop for Empty {
    fn drop(&mut self) {
        detach(std::mem::take(&mut self.0));
    }
}

/// What is to be said of a kernel that leakmon does not support, whatever it lacks.
fn too_old(error: Error) -> Error {
    match (&error, Facts::gather().kernel) {
        (Error::Permission { .. }, _) => error,
        (_, Some(kernel)) if kernel < KernelVersion::PROBES => Error::Unsupported {
            what: "probes",
            why: format!(
                "kernel {kernel} is too old, they need {}; a census needs none of it",
                KernelVersion::PROBES
            ),
        },
        _ => error,
    }
}

/// Possible CPUs, for which the kernel keeps values of per-CPU maps.
fn cpus() -> Result<usize, Error> {
    aya::util::nr_cpus().map_err(|(path, source)| Error::File {
        path: path.to_owned(),
        source,
    })
}

pub(super) fn map_error(what: &'static str) -> impl Fn(MapError) -> Error {
    move |error| {
        let source = errno(&error).unwrap_or_else(|| std::io::Error::other(error));
        Error::Map { what, source }
    }
}

fn take<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, Error> {
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| Error::Object(format!("it has no map {name}")))?;
    T::try_from(map).map_err(|error| Error::Object(format!("{name}: {error}")))
}

fn take_data(ebpf: &mut Ebpf, name: &'static str) -> Result<MapData, Error> {
    match ebpf.take_map(name) {
        Some(Map::HashMap(data) | Map::PerCpuHashMap(data)) => Ok(data),
        _ => Err(Error::Object(format!("it has no hash map {name}"))),
    }
}

/// The path by which the kernel finds the file that a process runs or has mapped,
/// also when it was deleted, replaced, or lies in another mount namespace.
fn path(code: &Code, pid: NonZeroU32) -> String {
    match code {
        Code::Executable => format!("/proc/{pid}/exe"),
        Code::File(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
        Code::Nowhere => String::new(),
    }
}

/// Whether leakmon sees the process ids that the kernel gives.
fn in_initial_pid_namespace() -> bool {
    let namespace = std::fs::metadata("/proc/self/ns/pid");
    namespace.is_ok_and(|meta| meta.ino() == INITIAL_PID_NAMESPACE)
}

/// What a target's links have in their cookies, whatever the place.
fn target_cookie(target: u16, epoch: u32) -> Cookie {
    Cookie {
        target,
        argument: 0,
        epoch,
    }
}

/// The attach cookie of a place.
fn at(cookie: Cookie, place: &Place) -> u64 {
    Cookie {
        argument: place.argument,
        ..cookie
    }
    .pack()
}

fn not_attached(
    call: &'static str,
    pid: NonZeroU32,
    place: &Place,
    source: std::io::Error,
) -> Error {
    Error::or_permission(call, source, |source| Error::Attach {
        pid: pid.get(),
        role: place.role,
        offset: place.offset,
        file: match &place.code {
            Code::Executable | Code::Nowhere => "executable".to_owned(),
            Code::File(_) => std::fs::read_link(path(&place.code, pid))
                .map_or_else(|_| "file".to_owned(), |path| path.display().to_string()),
        },
        source,
    })
}

/// What is needed of the kernel's types.
struct Types {
    /// BTF ids of [`FUNCTIONS`], as far as this kernel has them.
    functions: HashMap<&'static str, u32>,
    /// Or which field this kernel lacks.
    offsets: Result<KernelOffsets, String>,
    /// Bytes of a `pt_regs`.
    registers: Option<u32>,
}

/// The kernel's functions that programs are of, or call.
const FUNCTIONS: [&str; 3] = [
    "bpf_iter_task",
    "bpf_session_is_return",
    "bpf_session_cookie",
];

impl Types {
    fn of(btf: &Btf) -> Types {
        Types {
            functions: FUNCTIONS
                .into_iter()
                .filter_map(|name| Some((name, btf.function(name)?)))
                .collect(),
            offsets: Types::offsets(btf),
            registers: btf.size("pt_regs"),
        }
    }

    fn offsets(btf: &Btf) -> Result<KernelOffsets, String> {
        let offset = |of: &str, member: &str| {
            btf.offset(of, member)
                .ok_or_else(|| format!("this kernel has no {of}.{member}"))
        };
        let offsets = KernelOffsets {
            pid: offset("task_struct", "pid")?,
            state: offset("task_struct", "__state").or_else(|_| offset("task_struct", "state"))?,
            nvcsw: offset("task_struct", "nvcsw")?,
            nivcsw: offset("task_struct", "nivcsw")?,
            signal: offset("task_struct", "signal")?,
            live: offset("signal_struct", "live")?,
            start_time: offset("task_struct", "start_time")?,
            stack: offset("task_struct", "stack")?,
            // See `State::find_registers`.
            registers: 0,
        };
        if offset("task_struct", "tgid")? != offsets.pid + 4 {
            return Err("task_struct.tgid is not behind pid".to_owned());
        }
        Ok(offsets)
    }
}

impl State {
    /// Tells the kernel side where the kernel's own structs have their fields;
    /// once.
    fn describe_kernel(&mut self, what: &'static str) -> Result<(), Error> {
        if self.described {
            return Ok(());
        }
        let unsupported = |why: String| Error::Unsupported { what, why };
        if !in_initial_pid_namespace() {
            return Err(unsupported(
                "leakmon does not run in the initial pid namespace, whose process ids the \
                 kernel gives (run it on the host, or in a container with the host's)"
                    .to_owned(),
            ));
        }
        let offsets = self.types(what)?.offsets.clone().map_err(unsupported)?;
        self.offsets
            .set(0, offsets, 0)
            .map_err(map_error("describe the kernel"))?;
        if !self.features.registers {
            self.find_registers(what, offsets)?;
        }
        self.described = true;
        Ok(())
    }

    /// Tells the kernel side where a thread's registers lie on its stack in the
    /// kernel, for kernels that do not say so; proven by a thread of leakmon's own.
    fn find_registers(&mut self, what: &'static str, found: KernelOffsets) -> Result<(), Error> {
        let unknown = || Error::Unsupported {
            what,
            why: "the kernel does not say where a thread's registers are".to_owned(),
        };
        let size = self.types(what)?.registers.ok_or_else(unknown)?;
        let id = self.function(what, "bpf_iter_task")?;
        let iterator = self.program("thread_registers", ProgramType::TaskIterator(id))?;
        let witness = Witness::start()?;
        let pid = std::process::id();
        let set = map_error("describe the kernel");
        self.iterated.set(0, pid, 0).map_err(&set)?;
        for stack in registers::STACK_SIZES {
            let offsets = KernelOffsets {
                registers: stack - size,
                ..found
            };
            self.offsets.set(0, offsets, 0).map_err(&set)?;
            let file = sys::iterate_tasks(iterator.as_fd(), pid).map_err(|source| {
                Error::or_permission("bpf", source, |source| Error::Unsupported {
                    what,
                    why: source.to_string(),
                })
            })?;
            if witness.is_in(&registers::read(file)?) {
                return Ok(());
            }
        }
        Err(unknown())
    }

    /// What is needed of the kernel's types.
    fn types(&self, what: &'static str) -> Result<&Types, Error> {
        self.types.as_ref().map_err(|why| Error::Unsupported {
            what,
            why: why.clone(),
        })
    }

    /// The BTF id of a function of the kernel, one of [`FUNCTIONS`].
    fn function(&self, what: &'static str, name: &'static str) -> Result<u32, Error> {
        let id = self.types(what)?.functions.get(name).copied();
        id.ok_or_else(|| Error::Unsupported {
            what,
            why: format!("this kernel has no {name}"),
        })
    }

    /// A program for places that are attached one by one, with this cookie.
    fn uprobe(&mut self, name: &'static str, cookie: u64) -> Result<Arc<OwnedFd>, Error> {
        if self.features.cookie {
            return self.program(name, ProgramType::Uprobe);
        }
        let name = self.features.variant(name);
        let key = (name, cookie);
        if let Some(copy) = self.copies.get(&key).and_then(Weak::upgrade) {
            return Ok(copy);
        }
        let cookies = Cookies::Constant(cookie);
        let copy = self.object.load(name, ProgramType::Uprobe, &[], cookies)?;
        let copy = Arc::new(copy);
        self.copies.retain(|_, copy| copy.strong_count() > 0);
        self.copies.insert(key, Arc::downgrade(&copy));
        Ok(copy)
    }

    /// A program, loaded in the form that this kernel needs.
    fn program(
        &mut self,
        name: &'static str,
        program_type: ProgramType,
    ) -> Result<Arc<OwnedFd>, Error> {
        let name = self.features.variant(name);
        if let Some(Some(program)) = self.programs.get(name) {
            return Ok(Arc::clone(program));
        }
        let program = Arc::new(self.object.load(name, program_type, &[], Cookies::Kernel)?);
        self.programs.insert(name, Some(Arc::clone(&program)));
        Ok(program)
    }

    /// A program that sees a call and its return; `None` when this kernel has no
    /// such programs (before 6.13).
    fn session(&mut self, name: &'static str) -> Option<Arc<OwnedFd>> {
        if let Some(program) = self.programs.get(name) {
            return program.clone();
        }
        let load = |state: &mut State| {
            let functions = [
                (SESSION_IS_RETURN, "bpf_session_is_return"),
                (SESSION_COOKIE, "bpf_session_cookie"),
            ]
            .map(|(number, name)| Ok((number, state.function(SESSIONS, name)?)));
            let [is_return, cookie] = functions;
            let functions = [is_return?, cookie?];
            state.object.load(
                name,
                ProgramType::UprobeSession,
                &functions,
                Cookies::Kernel,
            )
        };
        let program = match load(self) {
            Ok(program) => Some(Arc::new(program)),
            Err(error) => {
                log::info!("{error}");
                None
            }
        };
        self.programs.insert(name, program.clone());
        program
    }

    /// A program attached to a tracepoint of the whole machine.
    fn tracepoint(
        &mut self,
        name: &'static str,
        function: &'static str,
    ) -> Result<Arc<OwnedFd>, Error> {
        self.describe_kernel("tracepoints of threads")?;
        if let Some(link) = self.tracepoints.get(function).and_then(Weak::upgrade) {
            return Ok(link);
        }
        let program = self.program(function, ProgramType::RawTracepoint)?;
        let link = sys::link_tracepoint(program.as_fd(), name).map_err(|source| {
            Error::or_permission("bpf", source, |source| Error::Unsupported {
                what: "a tracepoint of threads",
                why: format!("{name}: {source}"),
            })
        })?;
        let link = Arc::new(link);
        self.tracepoints.insert(function, Arc::downgrade(&link));
        if function == SWITCH {
            let cpus = self.cpu_readings()?;
            self.others.attached(since_boot(), cpus);
        }
        Ok(link)
    }

    /// Whether switches are to be left alone, for the sake of programs that
    /// nobody watches.
    fn others_pay(&mut self) -> Result<bool, Error> {
        let now = since_boot();
        if self
            .tracepoints
            .get(SWITCH)
            .is_none_or(|link| link.strong_count() == 0)
        {
            self.others.detached();
        }
        if self.others.is_due(now) {
            let cpus = self.cpu_readings()?;
            self.others.judge(now, cpus);
        }
        Ok(self.others.refuses(now))
    }

    /// What each CPU has done so far.
    fn cpu_readings(&self) -> Result<Vec<CpuReading>, Error> {
        const STAT: &str = "/proc/stat";
        let text = std::fs::read_to_string(STAT);
        let busy = text.and_then(|text| others::busy(&text));
        let busy = busy.map_err(|source| Error::File {
            path: STAT.to_owned(),
            source,
        })?;
        let error = map_error("read the switches");
        let switches = self.switches.get(&0, 0).map_err(error)?;
        let mut readings: Vec<CpuReading> = switches
            .iter()
            .map(|&switches| CpuReading {
                switches,
                busy: Duration::ZERO,
            })
            .collect();
        for (number, busy) in busy {
            if let Some(reading) = readings.get_mut(number) {
                reading.busy = busy;
            }
        }
        Ok(readings)
    }

    /// Has the tracepoints count for process `pid`.
    fn watch(&mut self, pid: u32, cookie: Cookie) -> Result<(), Error> {
        // BPF_NOEXIST: one target counts a process's threads.
        self.processes
            .insert(pid, cookie.pack(), 1)
            .map_err(map_error("watch the threads of a process twice"))?;
        self.watch_bit(pid)
    }

    /// The reverse of [`State::watch`].
    fn unwatch(&mut self, pid: u32) -> Result<(), Error> {
        self.processes
            .remove(&pid)
            .map_err(map_error("leave the threads of a process"))?;
        self.watch_bit(pid)
    }

    /// Sets the bit for `pid` as long as there is a process with it.
    fn watch_bit(&mut self, pid: u32) -> Result<(), Error> {
        let low = pid & 0xffff;
        let wanted = self
            .processes
            .keys()
            .flatten()
            .any(|pid| pid & 0xffff == low);
        let error = map_error("watch the threads of a process");
        let mut word = self.watched.get(&(low / 64), 0).map_err(&error)?;
        let bit = 1 << (low % 64);
        word = if wanted { word | bit } else { word & !bit };
        self.watched.set(low / 64, word, 0).map_err(&error)
    }

    /// Every entry of `THREADS` of a target.
    fn threads(&self, target: u16) -> std::io::Result<impl Iterator<Item = (u32, ThreadEntry)>> {
        let entries = sys::entries::<u32, ThreadEntry>(self.threads.fd().as_fd(), 1)?;
        Ok(entries
            .into_iter()
            .filter_map(|(key, entries)| Some((key, *entries.first()?)))
            .filter(move |(_, thread)| thread.target == u64::from(target)))
    }

    /// Forgets threads that were there before the probes: nothing tells whether
    /// one that has such an id after a gap still is the same.
    fn forget_old_threads(&self, target: u16) -> Result<(), Error> {
        let error = |source| Error::Map {
            what: "forget the threads",
            source,
        };
        let threads = self.threads(target).map_err(error)?;
        let old = threads.filter(|(_, thread)| thread.born == 0);
        let old: Vec<u32> = old.map(|(tid, _)| tid).collect();
        sys::remove(self.threads.fd().as_fd(), &old).map_err(error)
    }

    /// Every entry of `STACKS` of a target.
    fn stacks(&self, target: u16) -> std::io::Result<Vec<(TargetSite, StackCopy)>> {
        let entries = sys::entries::<TargetSite, StackCopy>(self.stacks.fd().as_fd(), 1)?;
        Ok(entries
            .into_iter()
            .filter(|(key, _)| key.target == u64::from(target))
            .filter_map(|(key, entries)| Some((key, *entries.first()?)))
            .collect())
    }

    /// Attaches a role's program at `places` of `pid`, all or none.
    fn link(
        &mut self,
        kind: Kind,
        pid: NonZeroU32,
        scope: Scope,
        cookie: Cookie,
        places: &[&Place],
    ) -> Result<Vec<Links>, Error> {
        let programs = match (kind, self.way) {
            (Kind::Nothing, _) => Vec::new(),
            (Kind::Tracepoint { name, function }, _) => {
                let link = self.tracepoint(name, function)?;
                return Ok(vec![Links::Tracepoint(link)]);
            }
            (Kind::Entry(name), _) => vec![(name, When::Entry)],
            (Kind::Call { session, .. }, Way::Multi) if self.session(session).is_some() => {
                vec![(session, When::Session)]
            }
            // The return first: an entry that was counted has its return, too.
            (
                Kind::Call {
                    entry, returned, ..
                },
                _,
            ) => {
                vec![(returned, When::Return), (entry, When::Entry)]
            }
        };
        let mut links = Vec::new();
        for (name, when) in programs {
            // File by file.
            let mut rest = places.to_vec();
            while let Some(first) = rest.first() {
                let code = first.code.clone();
                let (same, others): (Vec<&Place>, Vec<&Place>) =
                    rest.into_iter().partition(|place| place.code == code);
                let linked = match (&code, self.way) {
                    (Code::Nowhere, _) => Err(Error::Plan("a place of code is nowhere")),
                    (_, Way::Multi) => {
                        self.link_multi((name, when), pid, scope, cookie, &code, &same)
                    }
                    (_, Way::PerfEvent) => {
                        self.link_perf_events((name, when), pid, cookie, &code, &same)
                    }
                };
                match linked {
                    Ok(linked) => links.push(linked),
                    Err(error) => {
                        detach(links);
                        return Err(error);
                    }
                }
                rest = others;
            }
        }
        Ok(links)
    }

    fn link_multi(
        &mut self,
        (name, when): (&'static str, When),
        pid: NonZeroU32,
        scope: Scope,
        cookie: Cookie,
        code: &Code,
        places: &[&Place],
    ) -> Result<Links, Error> {
        let who = match scope {
            Scope::Process => pid.get(),
            Scope::Everybody => 0,
        };
        let program = match when {
            When::Session => self.session(name),
            When::Entry | When::Return => Some(self.program(name, ProgramType::UprobeMulti)?),
        };
        let program = program.ok_or(Error::Plan("its program is not loaded"))?;
        let path = path(code, pid);
        let offsets: Vec<u64> = places.iter().map(|place| place.offset.0).collect();
        let cookies: Vec<u64> = places.iter().map(|place| at(cookie, place)).collect();
        let link = |offsets: &[u64], cookies: &[u64]| {
            sys::link_uprobes(program.as_fd(), when, &path, offsets, cookies, who)
        };
        link(&offsets, &cookies)
            .map(Links::Multi)
            .map_err(|source| {
                // The kernel does not say which: try one by one.
                let culprit = places
                    .iter()
                    .zip(offsets.iter().zip(&cookies))
                    .find(|(_, (offset, cookie))| {
                        link(std::slice::from_ref(offset), std::slice::from_ref(cookie)).is_err()
                    })
                    .map(|(place, _)| *place)
                    .or(places.first().copied());
                match culprit {
                    Some(place) => not_attached("bpf", pid, place, source),
                    None => Error::Plan("there is nothing to attach"),
                }
            })
    }

    fn link_perf_events(
        &mut self,
        (name, when): (&'static str, When),
        pid: NonZeroU32,
        cookie: Cookie,
        code: &Code,
        places: &[&Place],
    ) -> Result<Links, Error> {
        let path = path(code, pid);
        let mut links = Vec::with_capacity(places.len());
        for place in places {
            let (offset, cookie) = (place.offset.0, at(cookie, place));
            let kept = self.features.cookie.then_some(cookie);
            let link = self.uprobe(name, cookie).and_then(|program| {
                sys::attach_uprobe(program.as_fd(), when, &path, offset, kept, pid.get())
                    .map(|uprobe| (uprobe, program))
                    .map_err(|source| not_attached("perf_event_open", pid, place, source))
            });
            match link {
                Ok(link) => links.push(link),
                Err(error) => {
                    detach(vec![Links::PerfEvent(links)]);
                    return Err(error);
                }
            }
        }
        Ok(Links::PerfEvent(links))
    }

    /// Describes a process, or a pool, under an index and an epoch of its own.
    fn add_target(&mut self, target: Target) -> Result<(u16, Target), Error> {
        let free = self.indices.iter().position(|&index| index == Index::Free);
        let index = free.ok_or(Error::TooManyTargets(self.indices.len() as u32))?;
        // 0 is no cookie's.
        self.epoch = self.epoch.checked_add(1).unwrap_or(1);
        let target = Target {
            epoch: self.epoch,
            ..target
        };
        self.set_target(index as u16, target)?;
        self.indices[index] = Index::Used;
        Ok((index as u16, target))
    }

    /// With what a process that has this plan may share links; `None` where it
    /// may not: the links would need the process, or the kernel's process ids
    /// are not those that leakmon sees.
    fn pool_key(&mut self, pid: NonZeroU32, plan: &Plan) -> Option<PoolKey> {
        if self.way != Way::Multi || !in_initial_pid_namespace() {
            return None;
        }
        let mut key = Vec::with_capacity(plan.places.len());
        for place in &plan.places {
            if matches!(place.role.program().kind, Kind::Tracepoint { .. }) {
                return None;
            }
            let (device, inode) = match &place.code {
                Code::Nowhere => (0, 0),
                Code::Executable | Code::File(_) => {
                    let meta = std::fs::metadata(path(&place.code, pid)).ok()?;
                    (meta.dev(), meta.ino())
                }
            };
            let role = place.role.index();
            key.push((device, inode, place.offset.0, role, place.argument));
        }
        key.sort_unstable();
        Some(key)
    }

    /// Takes a process into a pool; whether it shares links there.
    fn join(&mut self, key: &PoolKey, pid: u32, cookie: Cookie) -> Result<bool, Error> {
        let index = cookie.target;
        let pool = self.pools.entry(key.clone()).or_default();
        if pool.own.len() < OWN_LINKS {
            pool.own.insert(index, (pid, Tier::Census));
            return Ok(false);
        }
        if pool.shared.is_none() {
            let target = Target {
                pool: 1,
                ..Target::default()
            };
            let (index, target) = self.add_target(target)?;
            let pool = self.pools.entry(key.clone()).or_default();
            pool.shared = Some(Shared::new(index, target.epoch));
        }
        let shared = self
            .pools
            .get_mut(key)
            .and_then(|pool| pool.shared.as_mut());
        if let Some(shared) = shared {
            shared.members.insert(index, Tier::Census);
            let pool = shared.index;
            self.set_member(pool, pid, cookie.pack())?;
        }
        Ok(true)
    }

    /// Has the hits of those with links of their own counted once: by their own
    /// links where these are all that the shared ones are, and otherwise with those
    /// of processes that nobody watches.
    fn balance(&mut self, attached: &Attached) -> Result<(), Error> {
        let Some(pool) = attached.pool.as_ref().and_then(|key| self.pools.get(key)) else {
            return Ok(());
        };
        let Some(shared) = &pool.shared else {
            return Ok(());
        };
        let (index, tier) = (shared.index, shared.tier);
        let own: Vec<(u32, Tier)> = pool.own.values().copied().collect();
        for (pid, own) in own {
            if own >= tier {
                self.set_member(index, pid, 0)?;
            } else {
                // It may not be there.
                let _ = self.members.remove(&member_key(pid, index));
            }
        }
        Ok(())
    }

    /// Remembers what is attached to a process by links of its own.
    fn set_own(&mut self, attached: &Attached, tier: Tier) -> Result<(), Error> {
        let pool = attached
            .pool
            .as_ref()
            .and_then(|key| self.pools.get_mut(key));
        if let Some((_, own)) = pool.and_then(|pool| pool.own.get_mut(&attached.index)) {
            *own = tier;
        }
        self.balance(attached)
    }

    fn set_member(&mut self, pool: u16, pid: u32, cookie: u64) -> Result<(), Error> {
        self.members
            .insert(member_key(pid, pool), cookie, 0)
            .map_err(map_error("share probes"))
    }

    /// Takes a process out of its pool. What nobody wants any more is given back,
    /// to be detached without the lock.
    fn leave(&mut self, attached: &Attached) -> Vec<(Role, Vec<Links>)> {
        let Some(key) = &attached.pool else {
            return Vec::new();
        };
        let Some(pool) = self.pools.get_mut(key) else {
            return Vec::new();
        };
        let pid = attached.pid.get();
        let mut gone = Vec::new();
        let mut forget = Vec::new();
        pool.own.remove(&attached.index);
        if let Some(shared) = &mut pool.shared {
            forget.push(member_key(pid, shared.index));
            if shared.members.remove(&attached.index).is_some() {
                gone = shared.lower();
            }
            if shared.members.is_empty() {
                let own = pool.own.values();
                forget.extend(own.map(|(pid, _)| member_key(*pid, shared.index)));
                let index = shared.index;
                pool.shared = None;
                // Nothing is counted under it but hits.
                self.free(index, &[]);
            }
        }
        if let Some(pool) = self.pools.get(key)
            && pool.own.is_empty()
            && pool.shared.is_none()
        {
            self.pools.remove(key);
        }
        for key in forget {
            // It may not be there.
            let _ = self.members.remove(&key);
        }
        if let Err(error) = self.balance(attached) {
            log::warn!("process {pid}: {error}");
        }
        gone
    }

    /// Forgets what was counted under an index, which is free then.
    fn free(&mut self, index: u16, roles: &[Role]) {
        self.indices[usize::from(index)] = match self.clear(index, roles) {
            Ok(()) => Index::Free,
            Err(error) => {
                log::warn!("what was counted is not forgotten: {error}");
                Index::Spoilt
            }
        };
    }

    /// The links that a process shares.
    fn shared(&mut self, attached: &Attached) -> Option<&mut Shared<Vec<Links>>> {
        let key = attached.pool.as_ref().filter(|_| attached.shares)?;
        self.pools.get_mut(key)?.shared.as_mut()
    }

    /// Attaches what of the plan is missing for `tier`, all of it or nothing.
    fn link_shared(&mut self, attached: &Attached, tier: Tier) -> Result<(), Error> {
        let Some(shared) = self.shared(attached) else {
            return Err(Error::Plan("its pool is gone"));
        };
        shared.members.insert(attached.index, tier);
        let cookie = target_cookie(shared.index, shared.epoch);
        let from = shared.tier;
        if tier <= from {
            return Ok(());
        }
        let added = self.link_tiers(attached, Scope::Everybody, cookie, from, tier);
        match (self.shared(attached), added) {
            (Some(shared), Ok(mut added)) => {
                shared.links.append(&mut added);
                shared.tier = tier;
                self.balance(attached)
            }
            (shared, Err(error)) => {
                if let Some(shared) = shared {
                    shared.members.insert(attached.index, attached.tier);
                }
                Err(error)
            }
            (None, Ok(_)) => Err(Error::Plan("its pool is gone")),
        }
    }

    /// Attaches the roles of the tiers above `from` up to `to`, all or none.
    fn link_tiers(
        &mut self,
        attached: &Attached,
        scope: Scope,
        cookie: Cookie,
        from: Tier,
        to: Tier,
    ) -> Result<Vec<(Role, Vec<Links>)>, Error> {
        let mut added = Vec::new();
        for &role in &attached.roles {
            if role.tier() <= from || role.tier() > to {
                continue;
            }
            let places = attached.plan.places.iter();
            let places: Vec<&Place> = places.filter(|place| place.role == role).collect();
            match self.link(role.program().kind, attached.pid, scope, cookie, &places) {
                Ok(links) => added.push((role, links)),
                Err(error) => {
                    detach(added.into_iter().flat_map(|(_, links)| links).collect());
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    fn set_target(&mut self, index: u16, target: Target) -> Result<(), Error> {
        self.targets
            .set(u32::from(index), target, 0)
            .map_err(map_error("describe a process"))
    }

    /// Every entry of `SITES`, summed over the CPUs.
    fn sites(&self) -> Result<Vec<(TargetSite, SiteFlow)>, Error> {
        let entries = sys::entries::<TargetSite, SiteCount>(self.sites.fd().as_fd(), self.cpus)
            .map_err(|source| Error::Map {
                what: "read the spawn sites",
                source,
            })?;
        Ok(entries
            .into_iter()
            .map(|(key, counts)| {
                let mut flow = SiteFlow::default();
                for count in counts {
                    flow.spawned += count.spawned;
                    flow.exited += count.exited;
                }
                (key, flow)
            })
            .collect())
    }

    /// Every entry of `WAITS`.
    fn waits(&self) -> Result<Vec<(WaitKey, u32)>, Error> {
        let entries =
            sys::entries::<WaitKey, u32>(self.waits.fd().as_fd(), 1).map_err(|source| {
                Error::Map {
                    what: "read the waits",
                    source,
                }
            })?;
        Ok(entries
            .into_iter()
            .filter_map(|(key, slots)| Some((key, *slots.first()?)))
            .collect())
    }

    /// What was counted of the waits of one slot, summed over the CPUs.
    fn wait_count(&self, slot: u32) -> Result<WaitCount, Error> {
        let counts = self
            .wait_counts
            .get(&slot, 0)
            .map_err(map_error("read the waits"))?;
        let mut sum = WaitCount::default();
        for count in counts.iter() {
            sum.parks += count.parks;
            sum.resumes += count.resumes;
            sum.total_ns = sum.total_ns.wrapping_add(count.total_ns);
            sum.runs += count.runs;
            sum.busy_ns = sum.busy_ns.wrapping_add(count.busy_ns);
            sum.longest_ns = sum.longest_ns.max(count.longest_ns);
            for (sum, bucket) in sum.histogram.iter_mut().zip(count.histogram) {
                *sum += bucket;
            }
        }
        Ok(sum)
    }

    /// Hits and drops of one target, summed over the CPUs. `roles` are those of
    /// its plan.
    fn counters(&self, target: u16, roles: &[Role]) -> Result<(Hits, Drops), Error> {
        let counters = self
            .counters
            .get(&u32::from(target), 0)
            .map_err(map_error("read the hits"))?;
        let (mut hits, mut drops) = (Hits::default(), Drops::default());
        for counter in counters.iter() {
            for role in roles {
                hits.0[role.index()] += counter.hits[role.program().slot];
            }
            for (sum, dropped) in drops.0.iter_mut().zip(counter.dropped) {
                *sum += dropped;
            }
        }
        Ok((hits, drops))
    }

    /// Every entry of `TASKS` of a target.
    fn tasks(&self, target: u16) -> std::io::Result<impl Iterator<Item = (u64, TaskEntry)>> {
        let entries = sys::entries::<u64, TaskEntry>(self.tasks.fd().as_fd(), 1)?;
        Ok(entries
            .into_iter()
            .filter(move |(key, _)| key >> 48 == u64::from(target))
            .filter_map(|(key, entries)| Some((key, *entries.first()?))))
    }

    /// Removes every entry of a target and frees its slots. Its links are gone.
    /// `roles` are those of its plan: a large map that none of them writes is not
    /// searched.
    fn clear(&mut self, target: u16, roles: &[Role]) -> Result<(), Error> {
        let error = |source| Error::Map {
            what: "remove a process from the maps",
            source,
        };
        let index = u32::from(target);
        let set = map_error("remove a process from the maps");
        self.targets
            .set(index, Target::default(), 0)
            .map_err(&set)?;

        let sites: Vec<TargetSite> = self
            .sites()?
            .into_iter()
            .map(|(key, _)| key)
            .filter(|key| key.target == u64::from(target))
            .collect();
        sys::remove(self.sites.fd().as_fd(), &sites).map_err(error)?;

        if roles.contains(&Role::Park) || roles.contains(&Role::ParkUniversal) {
            let parked: Vec<u64> = sys::entries::<u64, Parked>(self.parked.fd().as_fd(), 1)
                .map_err(error)?
                .into_iter()
                .map(|(key, _)| key)
                .filter(|&key| key >> 48 == parked_key(target, 0) >> 48)
                .collect();
            sys::remove(self.parked.fd().as_fd(), &parked).map_err(error)?;
        }

        let (waits, slots): (Vec<WaitKey>, Vec<u32>) = self
            .waits()?
            .into_iter()
            .filter(|(key, _)| key.target == index)
            .unzip();
        sys::remove(self.waits.fd().as_fd(), &waits).map_err(error)?;
        for slot in slots {
            let zero = vec![WaitCount::default(); self.cpus];
            let zero = PerCpuValues::try_from(zero).map_err(error)?;
            self.wait_counts.set(slot, zero, 0).map_err(&set)?;
            self.free_slots.push(slot, 0).map_err(&set)?;
        }
        if roles.iter().any(|role| role.is_poll()) {
            let tasks: Vec<u64> = self
                .tasks(target)
                .map_err(error)?
                .map(|(key, _)| key)
                .collect();
            sys::remove(self.tasks.fd().as_fd(), &tasks).map_err(error)?;
        }
        let threads: Vec<u32> = self
            .threads(target)
            .map_err(error)?
            .map(|(tid, _)| tid)
            .collect();
        sys::remove(self.threads.fd().as_fd(), &threads).map_err(error)?;
        let stacks: Vec<TargetSite> = self
            .stacks(target)
            .map_err(error)?
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        sys::remove(self.stacks.fd().as_fd(), &stacks).map_err(error)?;
        let zero = vec![Counters::default(); self.cpus];
        let zero = PerCpuValues::try_from(zero).map_err(error)?;
        self.counters.set(index, zero, 0).map_err(&set)
    }
}

/// [`monotonic`], as a duration.
fn since_boot() -> Duration {
    Duration::from_nanos(monotonic())
}

/// Nanoseconds of CLOCK_MONOTONIC, the kernel side's clock.
fn monotonic() -> u64 {
    let now = nix::time::ClockId::CLOCK_MONOTONIC.now();
    // The kernel always has this clock, and its readings are not negative.
    now.map_or(0, |now| {
        now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
    })
}

/// Closes links side by side: each waits for the kernel.
fn detach(links: Vec<Links>) {
    let Some(_detaching) = Detaching::begin() else {
        // leakmon ends, which closes them.
        std::mem::forget(links);
        return;
    };
    let mut perf_events = Vec::new();
    std::thread::scope(|scope| {
        for link in links {
            match link {
                Links::Multi(link) => {
                    scope.spawn(move || drop(link));
                }
                Links::PerfEvent(links) => perf_events.extend(links),
                // The kernel does not wait for these.
                Links::Tracepoint(link) => drop(link),
            }
        }
        for link in perf_events {
            scope.spawn(move || drop(link));
        }
    });
}

/// A process that the kernel side knows, with what is attached to it. Dropping
/// it detaches and removes what was counted.
#[must_use = "dropping it detaches"]
pub struct Attached {
    shared: Arc<Mutex<State>>,
    pid: NonZeroU32,
    index: u16,
    target: Target,
    plan: Plan,
    /// The roles of the plan's places, in the order in which they are attached.
    roles: Vec<Role>,
    /// Something was attached, so that there may be something in the maps.
    counted: bool,
    /// [`Attached::know_threads`] has put something there.
    seeded: bool,
    tier: Tier,
    links: Vec<(Role, Vec<Links>)>,
    /// Who has the same places, where links may be shared.
    pool: Option<PoolKey>,
    /// It has no links of its own.
    shares: bool,
    /// See [`Attached::leave`].
    left: bool,
}

impl Attached {
    fn cookie(&self) -> Cookie {
        target_cookie(self.index, self.target.epoch)
    }

    /// With whom it shares its links, if with anybody: those have the same
    /// number. What one of them attaches all pay for.
    pub fn pool(&self) -> Option<u32> {
        let mut state = lock(&self.shared);
        state.shared(self).map(|shared| shared.epoch)
    }

    /// Hits of those who share the probes' file and whom nobody watches.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn hits_of_others(&self) -> Result<Hits, Error> {
        let mut state = lock(&self.shared);
        match state.shared(self).map(|shared| shared.index) {
            Some(index) => Ok(state.counters(index, &self.roles)?.0),
            None => Ok(Hits::default()),
        }
    }

    /// What is attached now.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Attaches what is missing for `tier` and detaches what is too much;
    /// [`Tier::Census`] detaches everything. What was counted stays.
    ///
    /// Waits that last over a change of the blocking probes are not measured:
    /// they count as unmatched.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`]; the tier is unchanged then.
    pub fn set_tier(&mut self, tier: Tier) -> Result<(), Error> {
        if tier < self.tier {
            return self.step_down(tier);
        }
        if tier == self.tier {
            return Ok(());
        }
        let mut state = lock(&self.shared);
        let cookie = self.cookie();
        if self.tier == Tier::Census && self.has_tracepoints() {
            if self.counted {
                state.forget_old_threads(self.index)?;
            }
            state.watch(self.pid.get(), cookie)?;
        }
        self.counted = true;
        let linked = match self.shares {
            true => state.link_shared(self, tier).map(|()| Vec::new()),
            false => state.link_tiers(self, Scope::Process, cookie, self.tier, tier),
        };
        match linked {
            Ok(mut added) => self.links.append(&mut added),
            Err(error) => {
                if self.tier == Tier::Census && self.has_tracepoints() {
                    state.unwatch(self.pid.get())?;
                }
                return Err(error);
            }
        }
        // All of it is attached: count from here on, all roles of a tier at once.
        let now = monotonic();
        if self.tier < Tier::Lifecycle {
            self.target.lifecycle_since = now;
            self.target.learning = u32::from(self.roles.iter().any(|role| role.is_poll()));
        }
        if tier == Tier::Blocking {
            self.target.blocking_since = now;
        }
        self.tier = tier;
        state.set_target(self.index, self.target)?;
        state.set_own(self, tier)
    }

    /// Whether the plan has programs of tracepoints.
    fn has_tracepoints(&self) -> bool {
        self.roles
            .iter()
            .any(|role| matches!(role.program().kind, Kind::Tracepoint { .. }))
    }

    fn step_down(&mut self, tier: Tier) -> Result<(), Error> {
        // All roles of a tier stop counting at once.
        self.target.blocking_since = 0;
        if tier == Tier::Census {
            self.target.lifecycle_since = 0;
        }
        let mut state = lock(&self.shared);
        let mut closed = state.set_target(self.index, self.target);
        if tier == Tier::Census && self.has_tracepoints() {
            closed = closed.and(state.unwatch(self.pid.get()));
        }
        let index = self.index;
        let mut gone = Vec::new();
        if let Some(shared) = state.shared(self) {
            shared.members.insert(index, tier);
            gone = shared.lower();
        }
        closed = closed.and(state.set_own(self, tier));
        drop(state);
        let (mut own, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.links)
            .into_iter()
            .partition(|(role, _)| role.tier() > tier);
        gone.append(&mut own);
        self.links = kept;
        self.tier = tier;
        detach(gone.into_iter().flat_map(|(_, links)| links).collect());
        closed
    }

    /// Detaches everything; what was counted can still be read.
    ///
    /// # Errors
    ///
    /// [`Error::Map`]; everything is detached all the same when this is dropped.
    pub fn detach(&mut self) -> Result<(), Error> {
        self.set_tier(Tier::Census)
    }

    /// Probe hits by role since the process was first attached. One system call.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn hits(&self) -> Result<Hits, Error> {
        Ok(lock(&self.shared).counters(self.index, &self.roles)?.0)
    }

    /// Whether the highest tier now costs programs too much that nobody watches:
    /// it looks at every switch of the machine's threads.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] and [`Error::File`].
    pub fn is_too_dear_for_others(&self) -> Result<bool, Error> {
        if !self.roles.contains(&Role::ThreadSwitch) {
            return Ok(false);
        }
        lock(&self.shared).others_pay()
    }

    /// Everything that was counted since the process was first attached.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn read(&self) -> Result<Counts, Error> {
        let mut state = lock(&self.shared);
        state.logger.flush();
        let read_sites = |state: &State| {
            let mut sites: Vec<(SiteKey, SiteFlow)> = state
                .sites()?
                .into_iter()
                .filter(|(key, _)| key.target == u64::from(self.index))
                .map(|(key, flow)| (key.site, flow))
                .collect();
            sites.sort_unstable_by_key(|&(site, _)| site);
            Ok::<_, Error>(sites)
        };
        let mut sites = read_sites(&state)?;
        let mut waits = Vec::new();
        for (key, slot) in state.waits()? {
            if key.target != u32::from(self.index) {
                continue;
            }
            let count = state.wait_count(slot)?;
            waits.push(WaitCounts {
                site: key.site,
                reason: key.reason,
                pcs: key.pcs,
                parks: count.parks,
                resumes: count.resumes,
                durations: Histogram {
                    buckets: count.histogram,
                    total_ns: count.total_ns,
                },
                runs: Runs {
                    count: count.runs,
                    busy_ns: count.busy_ns,
                    longest_ns: count.longest_ns,
                },
            });
        }
        waits.sort_unstable_by_key(|wait| (wait.site, wait.reason, wait.pcs));
        let mut tasks = Vec::new();
        let mut moved = 0;
        if self.roles.iter().any(|role| role.is_poll()) {
            tasks = state
                .tasks(self.index)
                .map_err(|source| Error::Map {
                    what: "read the tasks",
                    source,
                })?
                .filter(|(_, task)| task.owner != 0)
                .map(|(_, task)| task_run(&task, self.target.lifecycle_since))
                .collect();
            tasks.sort_unstable_by_key(|task| task.header);
            let all = |sites: &[(SiteKey, SiteFlow)]| -> u64 {
                let flows = sites.iter().map(|(_, flow)| flow);
                flows.map(|flow| flow.spawned + flow.exited).sum()
            };
            let before = all(&sites);
            sites = read_sites(&state)?;
            moved = all(&sites).saturating_sub(before);
        }
        let mut threads = Vec::new();
        if self.has_tracepoints() {
            threads = state
                .threads(self.index)
                .map_err(|source| Error::Map {
                    what: "read the threads",
                    source,
                })?
                .map(|(tid, thread)| thread_run(tid, &thread, self.target.blocking_since))
                .collect();
            threads.sort_unstable_by_key(|thread| thread.tid);
        }
        let (hits, drops) = state.counters(self.index, &self.roles)?;
        Ok(Counts {
            sites,
            waits,
            tasks,
            moved,
            threads,
            hits,
            drops,
        })
    }
}

/// What user space says of a task. Nothing is known of what it did while the
/// probes were away.
fn task_run(task: &TaskEntry, lifecycle_since: u64) -> TaskRun {
    let some = |time: u64| (time != 0).then_some(time);
    let attached = |time: u64| (lifecycle_since != 0 && time >= lifecycle_since).then_some(time);
    TaskRun {
        id: task.id,
        header: header_of(task.owner),
        site: SiteKey {
            created_at: task.created_at,
            entry: task.vtable,
        },
        known: task.known != 0,
        first_seen: some(task.first_seen),
        last_poll_end: attached(task.last_end),
        polling_since: attached(task.polling_since),
    }
}

/// What user space says of a thread. Nothing is known of a block during which the
/// probes were away.
fn thread_run(tid: u32, thread: &ThreadEntry, blocking_since: u64) -> ThreadRun {
    let attached = blocking_since != 0 && thread.since >= blocking_since;
    ThreadRun {
        tid,
        site: thread.site,
        born: (thread.born != 0).then_some(thread.born),
        blocked_since: attached.then_some(thread.since),
        reason: thread.reason,
        argument: thread.argument,
        voluntary: thread.voluntary,
        involuntary: thread.involuntary,
    }
}

impl Attached {
    /// The stacks of those who made the first thread of each site, so far.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn creation_stacks(&self) -> Result<Vec<CreationStack>, Error> {
        let stacks = lock(&self.shared).stacks(self.index);
        let stacks = stacks.map_err(|source| Error::Map {
            what: "read the stacks",
            source,
        })?;
        Ok(stacks
            .into_iter()
            .map(|(key, copy)| CreationStack {
                site: key.site,
                ip: copy.ip,
                sp: copy.sp,
                frame: copy.frame,
                link: copy.link,
                bytes: copy.bytes[..(copy.length as usize).min(copy.bytes.len())].to_vec(),
            })
            .collect())
    }

    /// Says by which sites the threads are to be counted that are there before
    /// anything is attached. One that is not named, or that was made since, is
    /// counted by no site.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn know_threads(&mut self, known: &[KnownThread]) -> Result<(), Error> {
        self.seeded |= !known.is_empty();
        let state = lock(&self.shared);
        for thread in known {
            let entry = ThreadEntry {
                site: thread.site,
                slot: NO_SLOT,
                target: u64::from(self.index),
                ..ThreadEntry::default()
            };
            sys::insert(state.threads.fd().as_fd(), &thread.tid, &entry).map_err(|source| {
                Error::Map {
                    what: "remember the threads",
                    source,
                }
            })?;
        }
        Ok(())
    }

    /// Whether [`Attached::learned`] is waited for.
    pub fn is_learning(&self) -> bool {
        self.target.learning != 0
    }

    /// Says which tokio tasks there are, by a census that began after the probes
    /// were attached. Until then a task that is seen for the first time is taken
    /// for one that was there before; from then on it is counted as spawned.
    /// Probes that were away and came back ([`Attached::set_tier`]) learn anew.
    /// Does nothing when they have learned.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn learned(&mut self, known: &[KnownTask]) -> Result<(), Error> {
        if !self.is_learning() {
            return Ok(());
        }
        let failed = |source| Error::Map {
            what: "remember the tasks",
            source,
        };
        let mut state = lock(&self.shared);
        let key = |header| parked_key(self.index, header);
        let known: HashMap<u64, &KnownTask> =
            known.iter().map(|task| (key(task.header), task)).collect();
        // Tasks of an earlier time of the probes that are there no more.
        let since = self.target.lifecycle_since;
        let gone: Vec<u64> = state
            .tasks(self.index)
            .map_err(failed)?
            .filter(|(key, task)| {
                task.last_end.max(task.polling_since).max(task.first_seen) < since
                    && known
                        .get(key)
                        .is_none_or(|known| known.id != 0 && known.id != task.id)
            })
            .map(|(key, _)| key)
            .collect();
        sys::remove(state.tasks.fd().as_fd(), &gone).map_err(failed)?;
        let mut first = monotonic();
        for (key, task) in known {
            // Without an id of tokio's, any that no other task has here.
            first -= 1;
            let id = if task.id == 0 { first } else { task.id };
            let entry = TaskEntry {
                owner: owner(task.header, id),
                id,
                vtable: task.site.entry,
                created_at: task.site.created_at,
                slot: NO_SLOT,
                known: 1,
                ..TaskEntry::default()
            };
            // One that was polled meanwhile is known better.
            sys::insert(state.tasks.fd().as_fd(), &key, &entry).map_err(failed)?;
        }
        self.target.learning = 0;
        state.set_target(self.index, self.target)
    }
}

impl Attached {
    /// Ends the counting at once, and makes room for another one of the same
    /// process; what is attached is detached when this is dropped, for which the
    /// kernel takes its time.
    pub fn leave(&mut self) {
        if std::mem::replace(&mut self.left, true) {
            return;
        }
        self.target.lifecycle_since = 0;
        self.target.blocking_since = 0;
        let mut state = lock(&self.shared);
        let mut closed = state.set_target(self.index, self.target);
        if self.tier > Tier::Census && self.has_tracepoints() {
            closed = closed.and(state.unwatch(self.pid.get()));
        }
        let mut gone = state.leave(self);
        drop(state);
        self.links.append(&mut gone);
        self.tier = Tier::Census;
        if let Err(error) = closed {
            log::warn!("process {}: {error}", self.pid);
        }
    }
}

impl Attached {
    /// As [`Attached::leave`], and detaches what is attached; what was counted can
    /// still be read.
    pub fn close(&mut self) {
        self.leave();
        let links = std::mem::take(&mut self.links);
        detach(links.into_iter().flat_map(|(_, links)| links).collect());
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.close();
        let mut state = lock(&self.shared);
        if self.counted || self.seeded {
            state.free(self.index, &self.roles);
        } else {
            let cleared = state.set_target(self.index, Target::default());
            state.indices[usize::from(self.index)] = match cleared {
                Ok(()) => Index::Free,
                Err(_) => Index::Spoilt,
            };
        }
    }
}
