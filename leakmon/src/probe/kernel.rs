//! Loads the kernel side, attaches plans to processes and reads what it
//! counted.

use std::num::NonZeroU32;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, PerCpuValues, Queue};
use aya::programs::uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope};
use aya::programs::{ProgramError, UProbe};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use leakmon_common::{
    Cookie, Counters, MAX_TARGETS, Parked, SiteCount, Target, TargetSite, WaitCount, WaitKey,
    parked_key, threads::KernelOffsets,
};

use super::btf::Btf;
use super::counts::{Counts, Drops, Hits, WaitCounts};
use super::error::{Error, errno};
use super::object::{OBJECT, Object};
use super::plan::{Code, PROGRAMS, Place, Plan, Role, Tier};
use super::registers::{self, ThreadRegisters};
use super::sys::{self, ProgramType};
use crate::task::{Histogram, SiteFlow, SiteKey};

/// The kernel's types.
const BTF: &str = "/sys/kernel/btf/vmlinux";

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
            targets: MAX_TARGETS,
        }
    }
}

/// How programs are tied to places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One uprobe_multi link for all places of a role: kernel 6.6 and later.
    Multi,
    /// One perf event for each place: kernel 5.15 and later. Detaching waits for
    /// the kernel once for each place.
    PerfEvent,
}

/// A program of uprobes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProgramId {
    Role(Role),
    /// Does nothing.
    Empty,
}

impl ProgramId {
    const COUNT: usize = PROGRAMS.len() + 1;

    fn index(self) -> usize {
        match self {
            ProgramId::Role(role) => role.index(),
            ProgramId::Empty => PROGRAMS.len(),
        }
    }

    /// The function's name in leakmon-ebpf.
    fn name(self) -> &'static str {
        match self {
            ProgramId::Role(role) => role.program().function,
            ProgramId::Empty => "empty",
        }
    }
}

/// What keeps places attached. Dropping it detaches.
enum Links {
    Multi(OwnedFd),
    PerfEvent(Vec<UProbeLink>),
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
    /// Holds what was not taken of it: aya's programs, and maps.
    ebpf: Box<Ebpf>,
    object: Object,
    /// By [`ProgramId::index`], as far as they are loaded.
    programs: [Option<OwnedFd>; ProgramId::COUNT],
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
    /// The kernel's types, read when they are first needed.
    types: Option<Btf>,
    offsets: Array<MapData, KernelOffsets>,
    iterated: Array<MapData, u32>,
    iterator: Option<OwnedFd>,
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

fn lock(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    // Every change of the state is complete before it can panic.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kernel {
    /// Loads the programs in the best way that this kernel has. That they fire
    /// is proven by [`super::calibrate`].
    ///
    /// # Errors
    ///
    /// [`Error::Permission`] names the missing capability.
    pub fn load() -> Result<Kernel, Error> {
        match Kernel::load_for(Way::Multi) {
            // EINVAL: the kernel does not know uprobe_multi.
            Err(Error::Program { .. }) => Kernel::load_for(Way::PerfEvent),
            other => other,
        }
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
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("TARGETS", limits.targets)
            .map_max_entries("COUNTERS", limits.targets)
            .map_max_entries("SITES", limits.sites)
            .map_max_entries("PARKED", limits.goroutines)
            .map_max_entries("WAITS", limits.waits)
            .map_max_entries("FREE_SLOTS", limits.waits)
            .map_max_entries("WAIT_COUNTS", limits.waits)
            .load(OBJECT)
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
        let iterated = take(&mut ebpf, "ITERATED")?;
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
            ebpf: Box::new(ebpf),
            object,
            programs: [const { None }; ProgramId::COUNT],
            cpus,
            indices: vec![Index::Free; limits.targets as usize],
            epoch: 0,
            types: None,
            offsets,
            iterated,
            iterator: None,
        };
        // One that this kernel must take, if it takes any.
        state.prepare(ProgramId::Empty)?;
        Ok(Kernel {
            shared: Arc::new(Mutex::new(state)),
            way,
        })
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
        let pid = NonZeroU32::new(pid).ok_or(Error::Plan("process 0 is the kernel's"))?;
        let mut state = lock(&self.shared);
        let index = state
            .indices
            .iter()
            .position(|&index| index == Index::Free)
            .ok_or(Error::TooManyTargets(state.indices.len() as u32))?;
        state.epoch = state.epoch.wrapping_add(1);
        let target = Target {
            lifecycle_since: 0,
            blocking_since: 0,
            layout: plan.layout,
            epoch: state.epoch,
            reserved: 0,
        };
        state
            .targets
            .set(index as u32, target, 0)
            .map_err(map_error("describe a process"))?;
        state.indices[index] = Index::Used;
        drop(state);
        let mut attached = Attached {
            shared: Arc::clone(&self.shared),
            pid,
            index: index as u16,
            target,
            plan: plan.clone(),
            roles: Role::all()
                .filter(|&role| plan.places.iter().any(|place| place.role == role))
                .collect(),
            tier: Tier::Census,
            links: Vec::new(),
        };
        attached.set_tier(tier)?;
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
        let cookie = Cookie {
            target: 0,
            argument: 0,
            epoch: 0,
        };
        let links = lock(&self.shared).link(ProgramId::Empty, pid, cookie, &places)?;
        Ok(Empty(links))
    }
}

impl Kernel {
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
        if state.iterator.is_none() {
            let id = state.function("the threads' registers", "bpf_iter_task")?;
            let iterator = ProgramType::TaskIterator(id);
            state.iterator = Some(state.object.load("thread_registers", iterator)?);
        }
        state
            .iterated
            .set(0, pid, 0)
            .map_err(map_error("name a process"))?;
        let Some(iterator) = &state.iterator else {
            return Ok(Vec::new());
        };
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

/// Places attached to the program that does nothing, until dropped.
#[must_use = "dropping it detaches"]
pub struct Empty(Vec<Links>);

impl Drop for Empty {
    fn drop(&mut self) {
        detach(std::mem::take(&mut self.0));
    }
}

/// Possible CPUs, for which the kernel keeps values of per-CPU maps.
fn cpus() -> Result<usize, Error> {
    aya::util::nr_cpus().map_err(|(path, source)| Error::File {
        path: path.to_owned(),
        source,
    })
}

fn map_error(what: &'static str) -> impl Fn(MapError) -> Error {
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

/// The verifier's answer, from aya.
fn program_error(program: &'static str, error: ProgramError) -> Error {
    let log = match &error {
        ProgramError::LoadError { verifier_log, .. } => verifier_log.to_string(),
        _ => String::new(),
    };
    let source = errno(&error).unwrap_or_else(|| std::io::Error::other(error));
    Error::or_permission("bpf", source, |source| Error::Program {
        program,
        source,
        log,
    })
}

/// The path by which the kernel finds the file that a process runs or has mapped,
/// also when it was deleted, replaced, or lies in another mount namespace.
fn path(code: &Code, pid: NonZeroU32) -> String {
    match code {
        Code::Executable => format!("/proc/{pid}/exe"),
        Code::File(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
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
            Code::Executable => "executable".to_owned(),
            Code::File(_) => std::fs::read_link(path(&place.code, pid))
                .map_or_else(|_| "file".to_owned(), |path| path.display().to_string()),
        },
        source,
    })
}

impl State {
    /// Tells the kernel side where the kernel's own structs have their fields;
    /// once.
    fn describe_kernel(&mut self, what: &'static str) -> Result<(), Error> {
        if self.types.is_some() {
            return Ok(());
        }
        let unsupported = |why: String| Error::Unsupported { what, why };
        let namespace = std::fs::metadata("/proc/self/ns/pid").map(|meta| meta.ino());
        if namespace.ok() != Some(INITIAL_PID_NAMESPACE) {
            return Err(unsupported(
                "leakmon does not run in the initial pid namespace, whose process ids the \
                 kernel gives (run it on the host, or in a container with the host's)"
                    .to_owned(),
            ));
        }
        let data = std::fs::read(BTF)
            .map_err(|error| unsupported(format!("{BTF}: {error} (CONFIG_DEBUG_INFO_BTF)")))?;
        let btf = Btf::parse(data).ok_or_else(|| unsupported(format!("{BTF} is malformed")))?;
        let offset = |of: &str, member: &str| {
            btf.offset(of, member)
                .ok_or_else(|| unsupported(format!("this kernel has no {of}.{member}")))
        };
        let offsets = KernelOffsets {
            pid: offset("task_struct", "pid")?,
            state: offset("task_struct", "__state").or_else(|_| offset("task_struct", "state"))?,
            nvcsw: offset("task_struct", "nvcsw")?,
            nivcsw: offset("task_struct", "nivcsw")?,
            signal: offset("task_struct", "signal")?,
            live: offset("signal_struct", "live")?,
        };
        if offset("task_struct", "tgid")? != offsets.pid + 4 {
            return Err(unsupported("task_struct.tgid is not behind pid".to_owned()));
        }
        self.offsets
            .set(0, offsets, 0)
            .map_err(map_error("describe the kernel"))?;
        self.types = Some(btf);
        Ok(())
    }

    /// The BTF id of a function of the kernel.
    fn function(&self, what: &'static str, name: &str) -> Result<u32, Error> {
        let id = self.types.as_ref().and_then(|types| types.function(name));
        id.ok_or_else(|| Error::Unsupported {
            what,
            why: format!("this kernel has no {name}"),
        })
    }

    /// aya's side of a program.
    fn uprobe(&mut self, name: &'static str) -> Result<&mut UProbe, Error> {
        self.ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| Error::Object(format!("it has no program {name}")))
    }

    /// Loads a program unless it is.
    fn prepare(&mut self, id: ProgramId) -> Result<(), Error> {
        match self.way {
            Way::Multi => {
                let program = &mut self.programs[id.index()];
                if program.is_none() {
                    *program = Some(self.object.load(id.name(), ProgramType::UprobeMulti)?);
                }
                Ok(())
            }
            Way::PerfEvent => {
                let program = self.uprobe(id.name())?;
                if program.fd().is_ok() {
                    return Ok(());
                }
                program
                    .load()
                    .map_err(|error| program_error(id.name(), error))
            }
        }
    }

    /// Attaches one program at `places` of `pid`, all or none.
    fn link(
        &mut self,
        id: ProgramId,
        pid: NonZeroU32,
        cookie: Cookie,
        places: &[&Place],
    ) -> Result<Vec<Links>, Error> {
        self.prepare(id)?;
        let mut links = Vec::new();
        let mut rest = places.to_vec();
        // File by file.
        while let Some(first) = rest.first() {
            let code = first.code.clone();
            let (same, others): (Vec<&Place>, Vec<&Place>) =
                rest.into_iter().partition(|place| place.code == code);
            let linked = match self.way {
                Way::Multi => self.link_multi(id, pid, cookie, &code, &same),
                Way::PerfEvent => self.link_perf_events(id, pid, cookie, &code, &same),
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
        Ok(links)
    }

    fn link_multi(
        &self,
        id: ProgramId,
        pid: NonZeroU32,
        cookie: Cookie,
        code: &Code,
        places: &[&Place],
    ) -> Result<Links, Error> {
        let program = self.programs[id.index()]
            .as_ref()
            .ok_or(Error::Plan("its program is not loaded"))?
            .as_fd();
        let path = path(code, pid);
        let offsets: Vec<u64> = places.iter().map(|place| place.offset.0).collect();
        let cookies: Vec<u64> = places.iter().map(|place| at(cookie, place)).collect();
        let link = |offsets: &[u64], cookies: &[u64]| {
            sys::link_uprobes(program, &path, offsets, cookies, pid.get())
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
        id: ProgramId,
        pid: NonZeroU32,
        cookie: Cookie,
        code: &Code,
        places: &[&Place],
    ) -> Result<Links, Error> {
        let path = path(code, pid);
        let program = self.uprobe(id.name())?;
        let mut links = Vec::with_capacity(places.len());
        for place in places {
            let point = UProbeAttachPoint {
                location: UProbeAttachLocation::AbsoluteOffset(place.offset.0),
                cookie: Some(at(cookie, place)),
            };
            let link = program
                .attach(point, &path, UProbeScope::OneProcess(pid))
                .and_then(|id| program.take_link(id));
            match link {
                Ok(link) => links.push(link),
                Err(error) => {
                    detach(vec![Links::PerfEvent(links)]);
                    let source = errno(&error).unwrap_or_else(|| std::io::Error::other(error));
                    return Err(not_attached("perf_event_open", pid, place, source));
                }
            }
        }
        Ok(Links::PerfEvent(links))
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

    /// Removes every entry of a target and frees its slots. Its links are gone.
    fn clear(&mut self, target: u16) -> Result<(), Error> {
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

        let parked: Vec<u64> = sys::entries::<u64, Parked>(self.parked.fd().as_fd(), 1)
            .map_err(error)?
            .into_iter()
            .map(|(key, _)| key)
            .filter(|&key| key >> 48 == parked_key(target, 0) >> 48)
            .collect();
        sys::remove(self.parked.fd().as_fd(), &parked).map_err(error)?;

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
        let zero = vec![Counters::default(); self.cpus];
        let zero = PerCpuValues::try_from(zero).map_err(error)?;
        self.counters.set(index, zero, 0).map_err(&set)
    }
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
    let mut perf_events = Vec::new();
    std::thread::scope(|scope| {
        for link in links {
            match link {
                Links::Multi(link) => {
                    scope.spawn(move || drop(link));
                }
                Links::PerfEvent(links) => perf_events.extend(links),
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
    tier: Tier,
    links: Vec<(Role, Vec<Links>)>,
}

impl Attached {
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
        let cookie = Cookie {
            target: self.index,
            argument: 0,
            epoch: self.target.epoch,
        };
        let mut added = Vec::new();
        for &role in &self.roles {
            if role.tier() <= self.tier || role.tier() > tier {
                continue;
            }
            let places: Vec<&Place> = self
                .plan
                .places
                .iter()
                .filter(|place| place.role == role)
                .collect();
            match state.link(ProgramId::Role(role), self.pid, cookie, &places) {
                Ok(links) => added.push((role, links)),
                Err(error) => {
                    drop(state);
                    detach(added.into_iter().flat_map(|(_, links)| links).collect());
                    return Err(error);
                }
            }
        }
        self.links.append(&mut added);
        // All of it is attached: count from here on, all roles of a tier at once.
        let now = monotonic();
        if self.tier < Tier::Lifecycle {
            self.target.lifecycle_since = now;
        }
        if tier == Tier::Blocking {
            self.target.blocking_since = now;
        }
        self.tier = tier;
        state.set_target(self.index, self.target)
    }

    fn step_down(&mut self, tier: Tier) -> Result<(), Error> {
        // All roles of a tier stop counting at once.
        self.target.blocking_since = 0;
        if tier == Tier::Census {
            self.target.lifecycle_since = 0;
        }
        let closed = lock(&self.shared).set_target(self.index, self.target);
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.links)
            .into_iter()
            .partition(|(role, _)| role.tier() > tier);
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

    /// Everything that was counted since the process was first attached.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn read(&self) -> Result<Counts, Error> {
        let mut state = lock(&self.shared);
        state.logger.flush();
        let mut sites: Vec<(SiteKey, SiteFlow)> = state
            .sites()?
            .into_iter()
            .filter(|(key, _)| key.target == u64::from(self.index))
            .map(|(key, flow)| (key.site, flow))
            .collect();
        sites.sort_unstable_by_key(|&(site, _)| site);
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
            });
        }
        waits.sort_unstable_by_key(|wait| (wait.site, wait.reason, wait.pcs));
        let (hits, drops) = state.counters(self.index, &self.roles)?;
        Ok(Counts {
            sites,
            waits,
            hits,
            drops,
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let links = std::mem::take(&mut self.links);
        detach(links.into_iter().flat_map(|(_, links)| links).collect());
        let mut state = lock(&self.shared);
        let cleared = state.clear(self.index);
        state.indices[usize::from(self.index)] = match cleared {
            Ok(()) => Index::Free,
            Err(error) => {
                log::warn!("process {}: {error}", self.pid);
                Index::Spoilt
            }
        };
    }
}
