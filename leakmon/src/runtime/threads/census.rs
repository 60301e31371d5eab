//! The census: every thread of a process, from `/proc/PID/task`.
//!
//! A thread is live while `/proc/PID/task` lists it, a zombie included: that is
//! the kernel's own count (`Threads:` of `/proc/PID/status`), by which the
//! listing is checked.
//!
//! Whether a thread has run since an earlier census is told by its
//! `schedstat`: time on a processor, and times that it was put on one. Only
//! those of which that has changed are looked at again. And when the CPU clock
//! of the whole process stands where it stood, none has run, and the last
//! census is still true: one system call. (The kernel adds to that clock at
//! each tick, so that a thread which has just begun to run shows up to 4 ms
//! late.)

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::binary::addr::RuntimeAddr;
use crate::binary::elf::{Arch, Elf, ElfError};
use crate::binary::unwind::Registers;
use crate::probe::{Counts, CreationStack, KnownThread, ThreadRegisters, ThreadRun};
use crate::process::identity::Process;
use crate::process::memory::{Memory as _, MemoryError, ProcessMemory};
use crate::runtime::{Kind, Probes, Refusal, RegisterSource};
use crate::task::{
    Age, Cycle, CycleMember, Dump, Flow, Group, Population, Site, SiteFlow, SiteId, SiteKey, Stack,
    StackId, State, Task, WaitFlow,
};

use super::deadlock::{Edge, circles};
use super::modules::{Modules, Pc, Whose};
use super::probes::{self, Made};
use super::sites;
use super::stack::{Unwound, unwind};
use super::syscalls::{Blocked, Call};
use super::waits::{Futex, On, Owner, Primitive, decode};

/// Times that a thread which ran while it was read is read again.
const RETRIES: usize = 3;

/// Times that threads are listed again when they do not add up.
const LISTINGS: usize = 3;

/// Most threads that are believed to exist: `FUTEX_TID_MASK` allows no more.
const MAX_THREADS: usize = 1 << 22;

/// Stacks and sites that are told apart, and frames of all stacks.
const MAX_REMEMBERED: usize = 1 << 14;
const MAX_FRAMES: usize = 1 << 18;

/// Frames that are looked at for what a thread waits for.
const WAIT_FRAMES: usize = 24;

/// Threads in locks without an owner among which circles are looked for.
const MAX_DOUBTFUL: usize = 64;

/// How much a census finds out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Counts, states and ages; threads are grouped by name. Reads neither the
    /// process's memory nor its files.
    Counts,
    /// Also stacks and what the threads wait for.
    Stacks,
}

/// What shows whether a thread has run: time on a processor in nanoseconds, and
/// times that it was put on one. A thread that takes over another's id would
/// need the same of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Meter(u64, u64);

/// How a thread at rest waits.
#[derive(Clone, Debug)]
struct Rest {
    reason: Option<Arc<str>>,
    stack: Option<StackId>,
    on: On,
    /// The call that it is in.
    call: Option<Call>,
    /// Its lock is one of Rust's std, which says not who holds it.
    rust_mutex: bool,
    sp: u64,
    depth: u64,
}

/// What is remembered of a thread between two censuses.
#[derive(Clone, Debug)]
struct Thread {
    tid: u32,
    start_time: u64,
    name: Arc<str>,
    state: State,
    meter: Meter,
    /// CLOCK_MONOTONIC nanoseconds of the first census that found it so.
    since: u64,
    /// It has not run since an earlier census.
    still: bool,
    /// It kept running while it was read.
    unstable: bool,
    /// It is at rest, and its stack is among too many.
    untold: bool,
    site: SiteId,
    /// The site is known by its stack: it stays so for as long as it lives.
    sited: bool,
    /// The probes count it by this site, and so it keeps it.
    pinned: bool,
    /// What the probes know of where it was made was looked at.
    asked: bool,
    rest: Option<Rest>,
}

impl Thread {
    fn is_blocked(&self) -> bool {
        self.state.is_blocked() && !self.unstable
    }
}

/// The last census, which holds for as long as nothing has run.
struct Last {
    clock: Duration,
    links: u64,
    population: Population,
    /// Since when the oldest of each group has been blocked.
    since: Vec<Option<u64>>,
}

/// Sites and stacks by what makes them one.
#[derive(Default)]
struct Tallies {
    site_ids: FxHashMap<SiteKey, SiteId>,
    sites: Arc<Vec<Site>>,
    stack_ids: FxHashMap<Box<[Pc]>, StackId>,
    stacks: Arc<Vec<Stack>>,
    /// What the stacks' functions say of a wait, by stack.
    primitives: Vec<Option<Primitive>>,
    /// The sites that whole stacks lead to.
    entries: Vec<Option<SiteId>>,
    frames: usize,
}

impl Tallies {
    fn site(&mut self, site: Site) -> SiteId {
        if let Some(id) = self.site_ids.get(&site.key) {
            return *id;
        }
        let site = match self.sites.len() {
            ..MAX_REMEMBERED => site,
            _ => sites::by_name("other"),
        };
        if let Some(id) = self.site_ids.get(&site.key) {
            return *id;
        }
        let id = SiteId(self.sites.len() as u32);
        self.site_ids.insert(site.key, id);
        Arc::make_mut(&mut self.sites).push(site);
        id
    }

    fn stack(&mut self, unwound: &Unwound, modules: &mut Modules) -> Option<StackId> {
        if let Some(id) = self.stack_ids.get(&unwound.pcs[..]) {
            return Some(*id);
        }
        if self.stacks.len() >= MAX_REMEMBERED || self.frames >= MAX_FRAMES {
            return None;
        }
        let mut frames = Vec::new();
        for pc in &unwound.pcs {
            frames.extend(modules.frames(*pc).iter().cloned());
        }
        let functions = frames
            .iter()
            .take(WAIT_FRAMES)
            .take_while(|frame| frame.whose == Whose::System || !frame.named)
            .map(|frame| &*frame.frame.function);
        let primitive = Primitive::among(functions);
        let entry = match unwound.whole {
            true => sites::entry(&frames, modules).map(|site| self.site(site)),
            false => None,
        };
        let id = StackId(self.stacks.len() as u32);
        self.frames += frames.len() + 1;
        Arc::make_mut(&mut self.stacks).push(sites::stack(
            &frames,
            unwound.whole,
            modules.has_libc(),
        ));
        self.primitives.push(primitive);
        self.entries.push(entry);
        self.stack_ids.insert(unwound.pcs[..].into(), id);
        Some(id)
    }

    fn is_full(&self) -> bool {
        self.stacks.len() > MAX_REMEMBERED / 2
            || self.sites.len() > MAX_REMEMBERED / 2
            || self.frames > MAX_FRAMES / 2
    }
}

/// Reads the threads of one process, again and again.
pub struct Census {
    pid: u32,
    task: Dir,
    clock: Option<ClockId>,
    detail: Detail,
    /// Says that the process still runs the program; `None` where its memory
    /// may not be read.
    memory: Option<ProcessMemory>,
    /// The machine code of its program; `None` where it is not one whose calls
    /// and stacks are known: a 32-bit program.
    arch: Option<Arch>,
    registers: Option<RegisterSource>,
    modules: Modules,
    tallies: Tallies,
    threads: Vec<Thread>,
    last: Option<Last>,
    buffer: Vec<u8>,
    /// Ids of threads in the process's own pid namespace, where that is not
    /// leakmon's.
    namespace: Option<FxHashMap<u32, u32>>,
    nested: bool,
    executable: Option<std::fs::File>,
    /// Sites of the probes, as they were named when they were first seen: at
    /// most as many as the kernel side tells apart.
    made: FxHashMap<SiteKey, Made>,
    /// Why the probes do not see where threads are made, if they do not.
    no_sites: Option<Arc<str>>,
}

/// Groups by what makes them one.
type Groups = FxHashMap<(SiteId, State, Option<Arc<str>>, Option<StackId>), usize>;

/// Live threads of process `pid`, as the kernel counts them: one system call,
/// for a view of every process.
///
/// The directory's link count is 2 more than the threads: proc_task_getattr,
/// fs/proc/base.c.
///
/// # Errors
/// [`MemoryError::Gone`].
fn links(task: &Dir) -> Result<u64, MemoryError> {
    let links = fstat(task.as_fd()).map_err(gone)?.st_nlink;
    #[allow(clippy::useless_conversion, reason = "of 32 bits on AArch64")]
    let links = u64::from(links);
    match links.saturating_sub(2) {
        0 => Err(MemoryError::Gone),
        count => Ok(count),
    }
}

fn gone(errno: Errno) -> MemoryError {
    match errno {
        Errno::ESRCH | Errno::ENOENT => MemoryError::Gone,
        Errno::EPERM | Errno::EACCES => MemoryError::NotPermitted,
        other => MemoryError::Other(other),
    }
}

impl Census {
    /// Opens the threads of `process`.
    ///
    /// # Errors
    /// [`MemoryError::Gone`], or that `/proc` may not be read.
    pub fn open(process: &Process, detail: Detail) -> Result<Census, MemoryError> {
        let pid = process.identity.pid;
        let path = format!("/proc/{pid}/task");
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let task = Dir::open(path.as_str(), flags, Mode::empty()).map_err(gone)?;
        // The folder is of a process that was there while the other still was.
        process.still_runs()?;
        let arch = match Elf::parse(&process.executable) {
            Ok(elf) => Some(elf.arch),
            Err(ElfError::ThirtyTwoBit | ElfError::Machine(_) | ElfError::BigEndian) => None,
            Err(_) => Some(Arch::NATIVE),
        };
        Ok(Census {
            pid,
            task,
            clock: clock_getcpuclockid(Pid::from_raw(pid.cast_signed())).ok(),
            detail,
            memory: ProcessMemory::open(process).ok(),
            arch,
            registers: None,
            modules: Modules::default(),
            tallies: Tallies::default(),
            threads: Vec::new(),
            last: None,
            buffer: Vec::new(),
            namespace: None,
            nested: is_nested(pid),
            executable: process.executable.try_clone().ok(),
            made: FxHashMap::default(),
            no_sites: None,
        })
    }

    /// Live threads as the kernel counts them, and nothing else: one system
    /// call.
    ///
    /// # Errors
    /// [`MemoryError::Gone`].
    pub fn count(&self) -> Result<u64, MemoryError> {
        links(&self.task)
    }

    /// Takes registers from `source` rather than from `/proc` alone, which
    /// shows neither the frame pointer nor the link register.
    pub fn use_registers(&mut self, source: RegisterSource) {
        self.registers = Some(source);
        // What was cut short for want of them is looked at again.
        self.last = None;
        for thread in &mut self.threads {
            thread.rest = None;
        }
    }

    /// Counts every thread.
    ///
    /// # Errors
    /// [`Refusal::Memory`]: the process is gone or replaced.
    pub fn population(&mut self) -> Result<Population, Refusal> {
        self.population_beside(&Counts::default())
    }

    /// As [`Census::population`], with what the probes had counted before.
    ///
    /// # Errors
    /// As [`Census::population`].
    pub fn population_beside(&mut self, probed: &Counts) -> Result<Population, Refusal> {
        let started = Instant::now();
        let now = crate::runtime::go::census::monotonic_ns();
        let clock = self.clock();
        if self.is_told_more(&probed.threads) {
            self.last = None;
        }
        if let Some(population) = self.unchanged(clock, now, started)? {
            return Ok(population);
        }
        self.last = None;
        self.look(now)?;
        self.join(&probed.threads);
        let (mut population, since) = self.tally(now);
        population.cycles = self.cycles();
        self.still_the_same()?;
        population.took = started.elapsed();
        let at_rest = |thread: &Thread| {
            !thread.unstable && thread.state != State::Running && thread.state != State::Runnable
        };
        // One that runs need not move the clock before the next tick.
        if let Some(clock) = clock
            && self.threads.iter().all(at_rest)
        {
            self.last = Some(Last {
                clock,
                links: population.count,
                population: population.clone(),
                since,
            });
        }
        Ok(population)
    }

    /// Every thread with its stack.
    ///
    /// # Errors
    /// As [`Census::population`].
    pub fn dump(&mut self) -> Result<Dump, Refusal> {
        let detail = std::mem::replace(&mut self.detail, Detail::Stacks);
        if detail == Detail::Counts {
            // What is remembered was not looked at closely.
            self.threads.clear();
            self.last = None;
        }
        let population = self.population();
        self.detail = detail;
        population?;
        let mut tasks = Vec::with_capacity(self.threads.len());
        for index in 0..self.threads.len() {
            let on = self.on(index);
            let thread = &self.threads[index];
            tasks.push(Task {
                id: thread.tid.into(),
                parent: None,
                state: thread.state,
                reason: thread.rest.as_ref().and_then(|rest| rest.reason.clone()),
                scan: false,
                waited: None,
                locked_to_thread: false,
                site: thread.site,
                stack: thread.rest.as_ref().and_then(|rest| rest.stack),
                on: on.map(Arc::from),
                name: Some(Arc::clone(&thread.name)),
                labels: Vec::new(),
            });
        }
        Ok(Dump {
            tasks,
            sites: Arc::clone(&self.tallies.sites),
            stacks: Arc::clone(&self.tallies.stacks),
            version: String::new(),
            noun: Kind::Threads.task(),
        })
    }

    /// Build id of the program.
    pub fn build_id(&self) -> Option<String> {
        let file = self.executable.as_ref()?;
        Elf::parse(file).ok()?.build_id(file)
    }

    fn clock(&self) -> Option<Duration> {
        let time = clock_gettime(self.clock?).ok()?;
        Some(Duration::from(time))
    }

    fn still_the_same(&self) -> Result<(), MemoryError> {
        match &self.memory {
            Some(memory) => memory.still_the_same(),
            None => self.count().map(drop),
        }
    }

    /// The last census, where nothing has run since.
    fn unchanged(
        &mut self,
        clock: Option<Duration>,
        now: u64,
        started: Instant,
    ) -> Result<Option<Population>, Refusal> {
        let Some(last) = &mut self.last else {
            return Ok(None);
        };
        if clock != Some(last.clock) || links(&self.task)? != last.links {
            return Ok(None);
        }
        for thread in &mut self.threads {
            thread.still = thread.state != State::Zombie;
        }
        let population = &mut last.population;
        for (group, since) in population.groups.iter_mut().zip(&last.since) {
            if let Some(since) = since {
                group.oldest = Some(Age {
                    at_least: Duration::from_nanos(now.saturating_sub(*since)),
                });
                group.not_run = group.count;
            }
        }
        population.taken_at = now;
        population.took = started.elapsed();
        Ok(Some(population.clone()))
    }

    /// Looks at every thread: what has not run is left as it was.
    fn look(&mut self, now: u64) -> Result<(), Refusal> {
        if self.tallies.is_full() {
            let forgotten = std::mem::take(&mut self.tallies).sites;
            // Ages go on; only what names the forgotten tables goes.
            for thread in &mut self.threads {
                thread.rest = None;
                thread.sited = thread.pinned || thread.tid == self.pid;
                thread.site = self.tallies.site(match thread.sited {
                    true => forgotten[thread.site.0 as usize].clone(),
                    false => sites::by_name(&thread.name),
                });
            }
        }
        let mut registers: Option<FxHashMap<u32, ThreadRegisters>> = None;
        let mut mapped = false;
        self.namespace = None;
        let mut before = self.count()?;
        for attempt in 1.. {
            let tids = self.list()?;
            let known: FxHashMap<u32, usize> = self
                .threads
                .iter()
                .enumerate()
                .map(|(index, thread)| (thread.tid, index))
                .collect();
            let mut old: Vec<Option<Thread>> = std::mem::take(&mut self.threads)
                .into_iter()
                .map(Some)
                .collect();
            let mut threads = Vec::with_capacity(tids.len());
            for tid in tids {
                let old = known.get(&tid).and_then(|index| old[*index].take());
                if let Some(thread) = self.examine(tid, old, now, &mut registers, &mut mapped) {
                    threads.push(thread);
                }
            }
            self.threads = threads;
            let after = self.count()?;
            let counted = self.threads.len() as u64;
            if (before.min(after)..=before.max(after)).contains(&counted) || attempt == LISTINGS {
                return Ok(());
            }
            before = after;
        }
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<u32>, MemoryError> {
        let mut tids = Vec::new();
        for entry in self.task.iter() {
            let entry = entry.map_err(gone)?;
            let tid = entry.file_name().to_str().ok().and_then(|n| n.parse().ok());
            if let Some(tid) = tid {
                tids.push(tid);
            }
            if tids.len() == MAX_THREADS {
                break;
            }
        }
        // A thread that ends while its place in the list is looked for may
        // make the kernel list another twice.
        let mut seen = FxHashSet::default();
        tids.retain(|tid| seen.insert(*tid));
        Ok(tids)
    }

    /// The bytes of a file of a thread.
    fn file<'a>(&self, tid: u32, name: &str, buffer: &'a mut [u8]) -> Result<&'a [u8], Errno> {
        let path = format!("{tid}/{name}");
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(self.task.as_fd(), path.as_str(), flags, Mode::empty())?;
        let len = nix::unistd::read(&file, buffer)?;
        Ok(&buffer[..len])
    }

    fn meter(&self, tid: u32) -> Result<Meter, Errno> {
        let mut buffer = [0; 4096];
        if let Some(meter) = parse_schedstat(self.file(tid, "schedstat", &mut buffer)?) {
            return Ok(meter);
        }
        // A kernel that keeps no such figures: it prints zeros.
        parse_switches(self.file(tid, "status", &mut buffer)?).ok_or(Errno::EINVAL)
    }

    /// One thread; `None` when it is gone.
    fn examine(
        &mut self,
        tid: u32,
        old: Option<Thread>,
        now: u64,
        registers: &mut Option<FxHashMap<u32, ThreadRegisters>>,
        mapped: &mut bool,
    ) -> Option<Thread> {
        let mut meter = self.meter(tid).ok()?;
        let finished = |thread: &Thread| match self.detail {
            Detail::Counts => true,
            Detail::Stacks => thread.rest.is_some() || thread.state == State::Zombie,
        };
        if let Some(old) = &old
            && old.meter == meter
            && !old.unstable
            && old.state != State::Running
            && finished(old)
        {
            return Some(Thread {
                still: old.since < now && old.state != State::Zombie,
                ..old.clone()
            });
        }
        let mut buffer = [0; 4096];
        for attempt in 1..=RETRIES {
            let stat = parse_stat(self.file(tid, "stat", &mut buffer).ok()?)?;
            let same = old.as_ref().filter(|old| old.start_time == stat.start_time);
            let name = match same {
                Some(old) if old.name.as_bytes() == stat.name => Arc::clone(&old.name),
                _ => String::from_utf8_lossy(stat.name).into(),
            };
            let (site, sited) = match same {
                Some(old) if old.sited || old.name == name => (old.site, old.sited),
                _ if tid == self.pid => (self.tallies.site(sites::of_main()), true),
                _ => (self.tallies.site(sites::by_name(&name)), false),
            };
            // A census that could not look closely does not make it younger.
            let still = same.is_some_and(|old| {
                old.meter == meter && old.state == stat.state && old.state != State::Running
            });
            let mut thread = Thread {
                tid,
                start_time: stat.start_time,
                name,
                state: stat.state,
                meter,
                since: same.filter(|_| still).map_or(now, |old| old.since),
                still: still && stat.state != State::Zombie,
                unstable: false,
                untold: false,
                site,
                sited,
                pinned: same.is_some_and(|old| old.pinned),
                asked: same.is_some_and(|old| old.asked),
                rest: None,
            };
            let rests = !matches!(stat.state, State::Running | State::Zombie);
            if rests && self.detail == Detail::Stacks {
                self.rest(&mut thread, registers, mapped);
            }
            let after = self.meter(tid).ok()?;
            if stat.exiting || after == Meter(0, 0) {
                // On its way out or in: nobody can say whether it is counted
                // among those that have ended or were made.
                thread.unstable = true;
                thread.meter = after;
                return Some(thread);
            }
            if after == meter && (!rests || !thread.unstable) {
                return Some(thread);
            }
            if stat.state == State::Running {
                // It runs, and so its meter moves.
                thread.meter = after;
                return Some(thread);
            }
            if attempt == RETRIES {
                thread.unstable = true;
                thread.rest = None;
                thread.meter = after;
                return Some(thread);
            }
            meter = after;
        }
        None
    }

    /// What a thread at rest does: its call, its stack, and what it waits for.
    fn rest(
        &mut self,
        thread: &mut Thread,
        registers: &mut Option<FxHashMap<u32, ThreadRegisters>>,
        mapped: &mut bool,
    ) {
        let mut rest = Rest {
            reason: None,
            stack: None,
            on: On::Nothing,
            call: None,
            rust_mutex: false,
            sp: 0,
            depth: 0,
        };
        let Some(arch) = self.arch else {
            // The numbers of a 32-bit program's calls are others.
            thread.rest = Some(rest);
            return;
        };
        let mut buffer = [0; 512];
        let blocked = match self.file(thread.tid, "syscall", &mut buffer) {
            Ok(text) => Blocked::parse(text),
            // Not permitted, or not kept by this kernel.
            Err(_) => {
                thread.rest = Some(rest);
                return;
            }
        };
        let Some((sp, ip)) = blocked.and_then(Blocked::registers) else {
            thread.unstable = true;
            return;
        };
        let mut primitive = None;
        let mut in_libc = false;
        let unwound = self.unwind(thread, arch, ip, sp, registers, mapped);
        if let Some(stack) = unwound {
            in_libc = self.modules.is_libc(ip);
            rest.sp = sp;
            rest.depth = stack.depth;
            rest.stack = self.tallies.stack(&stack, &mut self.modules);
            thread.untold = rest.stack.is_none();
            if let Some(id) = rest.stack {
                primitive = self.tallies.primitives[id.0 as usize];
                if let Some(site) = self.tallies.entries[id.0 as usize]
                    && thread.tid != self.pid
                    && !thread.pinned
                {
                    thread.site = site;
                    thread.sited = true;
                }
            }
        }
        let waits = matches!(thread.state, State::Sleeping | State::DiskSleep);
        match blocked {
            Some(Blocked::Call { number, args, .. }) if waits => {
                let call = Call::of(arch, number);
                rest.call = call;
                match call {
                    Some(Call { name: "futex", .. }) => {
                        let (reason, on) = self.futex(Futex::of(&args), primitive, in_libc);
                        rest.rust_mutex = primitive == Some(Primitive::RustMutex)
                            && matches!(on, On::Lock { owner: None, .. });
                        rest.reason = Some(reason.into());
                        rest.on = on;
                    }
                    Some(call) => {
                        rest.reason = Some(call.reason().into());
                        if call.fd {
                            rest.on = On::Fd(args[0]);
                        }
                    }
                    None => rest.reason = Some(format!("syscall {number}").into()),
                }
            }
            Some(Blocked::Outside { .. }) if waits => rest.reason = Some("page fault".into()),
            _ => {}
        }
        thread.rest = Some(rest);
    }

    fn unwind(
        &mut self,
        thread: &Thread,
        arch: Arch,
        ip: u64,
        sp: u64,
        registers: &mut Option<FxHashMap<u32, ThreadRegisters>>,
        mapped: &mut bool,
    ) -> Option<Unwound> {
        let memory = self.memory.as_ref()?;
        if !*mapped {
            self.modules
                .refresh(memory.executable_mappings().ok()?, memory);
            *mapped = true;
        }
        let more = match (&mut self.registers, registers) {
            (Some(_), Some(registers)) => registers.get(&thread.tid),
            (Some(source), registers) => {
                let all = source(self.pid);
                registers
                    .insert(all.into_iter().map(|r| (r.tid, r)).collect())
                    .get(&thread.tid)
            }
            (None, _) => None,
        };
        // Of the same moment as what /proc says, if these two agree.
        let more = more.filter(|more| more.ip == ip && more.sp == sp);
        let start = Registers::new(arch, ip, sp, more.map(|r| r.frame), more.map(|r| r.link));
        let mut buffer = std::mem::take(&mut self.buffer);
        let unwound = unwind(&mut self.modules, &start, arch, memory, &mut buffer);
        self.buffer = buffer;
        unwound.ok()
    }

    fn futex(
        &mut self,
        futex: Futex,
        primitive: Option<Primitive>,
        in_libc: bool,
    ) -> (&'static str, On) {
        let Some(memory) = &self.memory else {
            return ("futex", On::Futex(futex.addr));
        };
        let word = |at: u64| {
            let mut bytes = [0; 4];
            memory.read(RuntimeAddr(at), &mut bytes).ok()?;
            Some(u32::from_le_bytes(bytes))
        };
        if self.nested && self.namespace.is_none() {
            self.namespace = Some(namespace(&mut self.task, self.pid));
        }
        let (task, namespace) = (&self.task, &self.namespace);
        let lives = |tid: u32| match namespace {
            Some(ids) => ids.contains_key(&tid),
            None => lives(task, tid),
        };
        decode(futex, primitive, in_libc, word, lives)
    }

    /// A thread's id in leakmon's pid namespace.
    fn host_tid(&self, tid: u32) -> Option<u32> {
        match &self.namespace {
            Some(ids) => ids.get(&tid).copied(),
            None => Some(tid),
        }
    }

    fn thread(&self, tid: u32) -> Option<&Thread> {
        self.threads.iter().find(|thread| thread.tid == tid)
    }

    /// What exactly a thread waits for.
    fn on(&mut self, index: usize) -> Option<String> {
        let rest = self.threads[index].rest.clone()?;
        if self.nested && self.namespace.is_none() {
            self.namespace = Some(namespace(&mut self.task, self.pid));
        }
        let named = |tid: u32| {
            let Some(tid) = self.host_tid(tid) else {
                return format!("thread {tid} of its own pid namespace");
            };
            match self.thread(tid) {
                Some(thread) => format!("thread {tid} ({})", thread.name),
                None => format!("thread {tid}"),
            }
        };
        Some(match rest.on {
            On::Lock { addr, owner } => match owner {
                Some(owner) => format!("mutex {addr:#x} held by {}", named(owner.tid)),
                None => format!("mutex {addr:#x}"),
            },
            On::Thread(tid) => named(tid),
            On::Futex(addr) => format!("futex {addr:#x}"),
            On::Fd(fd) => {
                let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", self.pid));
                match link {
                    Ok(link) => format!("fd {fd} ({})", link.display()),
                    Err(_) => format!("fd {fd}"),
                }
            }
            On::Nothing => return None,
        })
    }

    fn tally(&self, now: u64) -> (Population, Vec<Option<u64>>) {
        let mut population = Population {
            taken_at: now,
            took: Duration::ZERO,
            count: self.threads.len() as u64,
            system: 0,
            unstable: 0,
            untold: 0,
            states: BTreeMap::new(),
            groups: Vec::new(),
            sites: Arc::clone(&self.tallies.sites),
            stacks: Arc::clone(&self.tallies.stacks),
            cycles: Vec::new(),
            schedulers: Vec::new(),
            warnings: Vec::new(),
        };
        let mut groups = Groups::default();
        let mut since: Vec<Option<u64>> = Vec::new();
        for thread in &self.threads {
            *population.states.entry(thread.state).or_default() += 1;
            population.unstable += u64::from(thread.unstable);
            population.untold += u64::from(thread.untold);
            let rest = thread.rest.as_ref();
            let reason = rest.and_then(|rest| rest.reason.clone());
            let stack = rest.and_then(|rest| rest.stack);
            let key = (thread.site, thread.state, reason, stack);
            let at = *groups.entry(key).or_insert_with_key(|key| {
                population.groups.push(Group {
                    site: key.0,
                    state: key.1,
                    reason: key.2.clone(),
                    stack: key.3,
                    count: 0,
                    not_run: 0,
                    oldest: None,
                    sample: thread.tid.into(),
                });
                since.push(None);
                population.groups.len() - 1
            });
            let group = &mut population.groups[at];
            group.count += 1;
            group.not_run += u64::from(thread.still);
            let rests = !matches!(thread.state, State::Running | State::Zombie) && !thread.unstable;
            if rests && since[at].is_none_or(|oldest| thread.since < oldest) {
                since[at] = Some(thread.since);
                group.sample = thread.tid.into();
                group.oldest = Some(Age {
                    at_least: Duration::from_nanos(now.saturating_sub(thread.since)),
                });
            }
        }
        (population, since)
    }

    /// Locks that threads wait for in a circle.
    fn cycles(&mut self) -> Vec<Cycle> {
        let waits = |thread: &Thread| match thread.rest.as_ref()?.on {
            On::Lock { addr, owner } => Some((addr, owner)),
            _ => None,
        };
        let mut owners: FxHashMap<u32, Owner> = FxHashMap::default();
        let mut edges: Vec<Edge> = Vec::new();
        for thread in &self.threads {
            if let Some((lock, Some(owner))) = waits(thread)
                && let Some(holder) = self.host_tid(owner.tid)
            {
                owners.insert(thread.tid, owner);
                edges.push(Edge {
                    waiter: thread.tid,
                    lock,
                    holder,
                });
            }
        }
        let mut cycles: Vec<Cycle> = Vec::new();
        for circle in circles(&edges) {
            let tids = || circle.iter().map(|edge| edge.waiter);
            let holds = |tid: u32| owners.get(&tid).is_some_and(|owner| self.holds(*owner));
            // The locks are read again while all of them wait: none has let go
            // of the one before it waited for the other.
            if self.stand_still(tids()) && tids().all(holds) && self.stand_still(tids()) {
                let members = circle.iter().map(|e| self.member(e.waiter, e.lock));
                cycles.push(Cycle {
                    members: members.collect(),
                    doubt: None,
                });
            }
        }
        cycles.extend(self.doubtful_cycles());
        cycles
    }

    /// Circles of locks that say not who holds them: where the stack of a
    /// waiting thread refers to the lock that another waits for, as the guard
    /// of a held lock does.
    fn doubtful_cycles(&mut self) -> Vec<Cycle> {
        let waiters: Vec<(u32, u64, u64, u64)> = self
            .threads
            .iter()
            .filter_map(|thread| {
                let rest = thread.rest.as_ref().filter(|rest| rest.rust_mutex)?;
                match rest.on {
                    On::Lock { addr, .. } => Some((thread.tid, addr, rest.sp, rest.depth)),
                    _ => None,
                }
            })
            .collect();
        let Some(memory) = &self.memory else {
            return Vec::new();
        };
        if waiters.len() < 2 || waiters.len() > MAX_DOUBTFUL {
            return Vec::new();
        }
        let refers: Vec<FxHashSet<u64>> = waiters
            .iter()
            .map(|(_, _, sp, depth)| {
                let mut stack = vec![0; (*depth as usize).min(1 << 16)];
                let range = crate::process::memory::Range {
                    addr: RuntimeAddr(*sp),
                    len: stack.len(),
                };
                let len = memory.read_ranges(&[range], &mut stack).unwrap_or(0);
                stack[..len]
                    .chunks_exact(8)
                    .filter_map(|word| word.try_into().ok().map(u64::from_le_bytes))
                    .collect()
            })
            .collect();
        let mut edges = Vec::new();
        for (waiter, lock, ..) in &waiters {
            let mut holders = waiters
                .iter()
                .zip(&refers)
                .filter(|((_, other, ..), refers)| other != lock && refers.contains(lock));
            // Of two that refer to it nobody knows which holds it.
            if let (Some(((holder, ..), _)), None) = (holders.next(), holders.next()) {
                edges.push(Edge {
                    waiter: *waiter,
                    lock: *lock,
                    holder: *holder,
                });
            }
        }
        let mut cycles = Vec::new();
        for circle in circles(&edges) {
            if self.stand_still(circle.iter().map(|edge| edge.waiter)) {
                let members = circle.iter().map(|e| self.member(e.waiter, e.lock));
                cycles.push(Cycle {
                    members: members.collect(),
                    doubt: Some(
                        "Rust's Mutex does not say who holds it; each of these threads has a \
                         reference to the lock that another waits for on its stack"
                            .into(),
                    ),
                });
            }
        }
        cycles
    }

    /// Whether none of these has run since it was looked at.
    fn stand_still(&self, mut tids: impl Iterator<Item = u32>) -> bool {
        tids.all(|tid| {
            let thread = self.thread(tid);
            thread.is_some_and(|thread| self.meter(tid) == Ok(thread.meter))
        })
    }

    /// Whether the lock still says so.
    fn holds(&self, owner: Owner) -> bool {
        let mut word = [0; 4];
        self.memory.as_ref().is_some_and(|memory| {
            memory.read(RuntimeAddr(owner.at), &mut word).is_ok()
                && owner.holds(u32::from_le_bytes(word))
        })
    }

    fn member(&self, tid: u32, lock: u64) -> CycleMember {
        let thread = self.thread(tid);
        let stack = thread.and_then(|thread| thread.rest.as_ref()?.stack);
        CycleMember {
            task: tid.into(),
            name: thread.map(|thread| Arc::clone(&thread.name)),
            lock: Some(lock),
            place: stack.and_then(|id| self.tallies.stacks[id.0 as usize].place().cloned()),
        }
    }
}

impl Census {
    /// What can be probed.
    pub(super) fn probes(&self) -> Result<Probes, Refusal> {
        Ok(Probes {
            plan: self.find_probes()?.plan,
            blocking_refused: None,
        })
    }

    fn find_probes(&self) -> Result<probes::Found, Refusal> {
        let mut modules = Modules::default();
        if let Some(memory) = &self.memory {
            modules.refresh(memory.executable_mappings()?, memory);
        }
        Ok(probes::find(&modules, self.arch))
    }

    /// Every thread of the latest census, by its site; what is known by a stack
    /// stays so.
    pub(super) fn known_threads(&mut self) -> Vec<KnownThread> {
        let mut known = Vec::with_capacity(self.threads.len());
        for thread in &mut self.threads {
            let site = &self.tallies.sites[thread.site.0 as usize];
            thread.pinned = thread.sited;
            known.push(KnownThread {
                tid: thread.tid,
                site: site.key,
            });
            self.made.entry(site.key).or_insert_with(|| Made {
                site: site.clone(),
                start: None,
                closure: false,
                by_library: false,
            });
        }
        known
    }

    /// Names the sites that the probes counted and that have no name yet.
    pub(super) fn use_stacks(
        &mut self,
        counts: &Counts,
        stacks: &mut dyn FnMut() -> Vec<CreationStack>,
    ) {
        let new = |(key, _): &&(SiteKey, SiteFlow)| !self.made.contains_key(key);
        let new: Vec<SiteKey> = counts
            .sites
            .iter()
            .filter(new)
            .map(|(key, _)| *key)
            .collect();
        let mut read: Option<Vec<CreationStack>> = None;
        for key in new {
            let made = match (self.arch, &self.memory) {
                _ if key == SiteKey::default() => self.unseen(),
                (Some(arch), Some(memory)) => {
                    let stacks = match &read {
                        Some(stacks) => stacks,
                        None => {
                            if let Ok(mappings) = memory.executable_mappings() {
                                self.modules.refresh(mappings, memory);
                            }
                            read.insert(stacks())
                        }
                    };
                    let stack = stacks.iter().find(|stack| stack.site == key);
                    let executable = self.executable.as_ref();
                    let is_program = |modules: &Modules, at: u64| {
                        executable.is_some_and(|file| modules.is_of(at, file))
                    };
                    probes::name(key, stack, arch, &mut self.modules, memory, is_program)
                }
                _ => probes::unnamed(key),
            };
            self.made.insert(key, made);
        }
    }

    /// The site of threads of which the probes did not see where they were made.
    fn unseen(&mut self) -> Made {
        if self.no_sites.is_none() {
            let found = self.find_probes().ok();
            let why = found.and_then(|found| found.no_sites);
            self.no_sites = Some(why.unwrap_or_else(|| {
                "made before the probes came, or without pthread_create".into()
            }));
        }
        let mut made = probes::unnamed(SiteKey::default());
        made.site.doubt.clone_from(&self.no_sites);
        made
    }

    /// What the probes counted of this thread, if it is of this thread.
    fn run<'a>(&self, thread: &Thread, runs: &'a [ThreadRun]) -> Option<&'a ThreadRun> {
        let at = runs.binary_search_by_key(&thread.tid, |run| run.tid).ok()?;
        Some(&runs[at])
    }

    /// Whether the probes know more of a thread than the last census did.
    fn is_told_more(&self, runs: &[ThreadRun]) -> bool {
        self.threads.iter().any(|thread| {
            self.run(thread, runs).is_some_and(|run| {
                let since = run.blocked_since.filter(|_| thread.is_blocked());
                since.is_some_and(|since| since < thread.since)
                    || run.born.is_some() && !thread.pinned && !thread.asked
            })
        })
    }

    /// Takes over what the probes know of the threads: where they were made, and
    /// since when they are blocked.
    fn join(&mut self, runs: &[ThreadRun]) {
        let clocks = Clocks::now();
        for at in 0..self.threads.len() {
            let thread = &self.threads[at];
            let Some(run) = self.run(thread, runs) else {
                continue;
            };
            // It has not run since before the counts were read: it is the block
            // that they tell of.
            let since = run
                .blocked_since
                .filter(|since| thread.still && thread.is_blocked() && *since < thread.since);
            let mut site = None;
            let mut asked = thread.asked;
            if let Some(born) = run.born
                && !thread.pinned
                && let Some(made) = self.made.get(&run.site)
            {
                asked = true;
                let own = &self.tallies.sites[thread.site.0 as usize];
                if clocks.is_birth(born, thread.start_time) && made.tells_more(own, thread.sited) {
                    site = Some(made.site.clone());
                }
            }
            let site = site.map(|site| self.tallies.site(site));
            let thread = &mut self.threads[at];
            thread.asked = asked;
            thread.since = since.unwrap_or(thread.since);
            if let Some(site) = site {
                thread.site = site;
                thread.sited = true;
                thread.pinned = true;
            }
        }
    }

    /// Puts names to what the probes counted.
    pub(super) fn flow(&self, counts: &Counts) -> Flow {
        let site = |key: &SiteKey| match self.made.get(key) {
            Some(made) => made.site.clone(),
            None => probes::unnamed(*key).site,
        };
        let mut sites: Vec<(Site, SiteFlow)> = Vec::with_capacity(counts.sites.len());
        for (key, flow) in &counts.sites {
            sites.push((site(key), *flow));
        }
        let mut waits = Vec::with_capacity(counts.waits.len());
        for wait in &counts.waits {
            // What waits is told of, though nothing was made or has ended.
            if counts
                .sites
                .binary_search_by_key(&wait.site, |(key, _)| *key)
                .is_err()
            {
                sites.push((site(&wait.site), SiteFlow::default()));
            }
            waits.push(WaitFlow {
                site: wait.site,
                reason: reason(self.arch, wait.reason).into(),
                stack: Stack {
                    frames: Vec::new(),
                    place: None,
                },
                parks: wait.parks,
                resumes: wait.resumes,
                durations: wait.durations.clone(),
            });
        }
        Flow {
            sites,
            waits,
            hits: counts.hits.total(),
            dropped: counts.drops.losses().collect(),
        }
    }
}

/// Two of the kernel's clocks at one moment, and the unit of `/proc`'s times.
struct Clocks {
    /// What CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC, in nanoseconds.
    ahead: u64,
    tick: u64,
}

impl Clocks {
    fn now() -> Clocks {
        let read = |clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
        let monotonic = read(ClockId::CLOCK_MONOTONIC);
        let ahead = read(ClockId::CLOCK_BOOTTIME).saturating_sub(monotonic);
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
        let ticks = ticks.ok().flatten().map_or(100, i64::cast_unsigned);
        Clocks {
            ahead: u64::try_from(ahead.as_nanos()).unwrap_or(u64::MAX),
            tick: 1_000_000_000 / ticks.max(1),
        }
    }

    /// Whether a thread with this start time (CLOCK_BOOTTIME, in ticks, rounded
    /// down) is the one that was made then (CLOCK_MONOTONIC nanoseconds), and not
    /// another that had its id. The kernel reads both clocks as it makes it
    /// (`copy_process`, kernel/fork.c).
    fn is_birth(&self, born: u64, start_time: u64) -> bool {
        /// Between two readings, there and here; it may be held up.
        const SLACK: u64 = 2_000_000;
        let started = start_time.saturating_mul(self.tick);
        let born = born.saturating_add(self.ahead);
        (started.saturating_sub(SLACK)..started.saturating_add(self.tick + SLACK)).contains(&born)
    }
}

/// The reason of a wait that the probes saw, in a census's words. A futex says
/// not what it is part of.
fn reason(arch: Option<Arch>, number: u32) -> String {
    let call = u64::from(number & 0xffff);
    if number == leakmon_common::threads::NO_SYSCALL {
        return "page fault".to_owned();
    }
    let Some(arch) = arch else {
        // The numbers of a 32-bit program's calls are others.
        return "waiting".to_owned();
    };
    match Call::of(arch, call.cast_signed()) {
        Some(Call { name: "futex", .. }) => Futex::reason_of(number >> 16).to_owned(),
        Some(call) => call.reason().to_owned(),
        None => format!("syscall {call}"),
    }
}

/// Whether a thread of this id is in the folder.
fn lives(task: &Dir, tid: u32) -> bool {
    let path = format!("{tid}");
    nix::sys::stat::fstatat(task.as_fd(), path.as_str(), nix::fcntl::AtFlags::empty()).is_ok()
}

/// Whether the process is in a pid namespace that is not leakmon's: its status
/// shows an id for each of the namespaces that it is seen in.
fn is_nested(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/status"))
        .is_ok_and(|text| ns_tids(&text).is_some_and(|ids| ids.len() > 1))
}

/// The ids of a `status` file's NSpid line, leakmon's own first.
fn ns_tids(status: &[u8]) -> Option<Vec<u32>> {
    let line = status
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"NSpid:"))?;
    let text = std::str::from_utf8(line).ok()?;
    text.split_whitespace().map(|id| id.parse().ok()).collect()
}

/// Thread ids in the process's own pid namespace, and which they are in
/// leakmon's.
fn namespace(task: &mut Dir, pid: u32) -> FxHashMap<u32, u32> {
    let mut ids = FxHashMap::default();
    for entry in task.iter().flatten() {
        let Ok(tid) = entry.file_name().to_str() else {
            continue;
        };
        if let Ok(status) = std::fs::read(format!("/proc/{pid}/task/{tid}/status"))
            && let Some(tids) = ns_tids(&status)
            && let (Some(host), Some(own)) = (tids.first(), tids.last())
        {
            ids.insert(*own, *host);
        }
    }
    ids
}

/// What of a thread's `stat` file is used.
struct Stat<'a> {
    name: &'a [u8],
    state: State,
    /// It has begun to end.
    exiting: bool,
    start_time: u64,
}

/// `TID (NAME) STATE ...`: the name may have brackets and spaces of its own.
fn parse_stat(text: &[u8]) -> Option<Stat<'_>> {
    /// `PF_EXITING` of include/linux/sched.h, in every kernel.
    const EXITING: u64 = 4;
    let open = text.iter().position(|byte| *byte == b'(')?;
    let close = text.iter().rposition(|byte| *byte == b')')?;
    let name = text.get(open + 1..close)?;
    let rest = std::str::from_utf8(text.get(close + 2..)?).ok()?;
    let mut fields = rest.split(' ');
    let state = match fields.next()? {
        "R" => State::Running,
        // Idle threads and parked ones are the kernel's own.
        "D" | "I" => State::DiskSleep,
        "T" | "t" => State::Stopped,
        "Z" | "X" | "x" => State::Zombie,
        _ => State::Sleeping,
    };
    // Fields 9 and 22; the state is field 3.
    let flags: u64 = fields.nth(5)?.parse().ok()?;
    let start_time = fields.nth(12)?.parse().ok()?;
    Some(Stat {
        name,
        state,
        exiting: flags & EXITING != 0,
        start_time,
    })
}

/// `RUNTIME WAITED TIMES`; `None` when the kernel does not keep them, or the
/// thread has not run yet.
fn parse_schedstat(text: &[u8]) -> Option<Meter> {
    let mut words = std::str::from_utf8(text).ok()?.split_whitespace();
    let run = words.next()?.parse().ok()?;
    let times = words.nth(1)?.parse().ok()?;
    (run != 0 || times != 0).then_some(Meter(run, times))
}

/// Voluntary and other context switches of a `status` file.
fn parse_switches(text: &[u8]) -> Option<Meter> {
    let text = String::from_utf8_lossy(text);
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    Some(Meter(
        value("voluntary_ctxt_switches:")?,
        value("nonvoluntary_ctxt_switches:")?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_brackets() {
        let text = b"42 (a) b (c) S 1 1 1 0 -1 4194368 1 0 0 0 0 0 0 0 20 0 1 0 1248559 724 1";
        let stat = parse_stat(text).unwrap();
        assert_eq!(stat.name, b"a) b (c");
        assert_eq!(stat.state, State::Sleeping);
        assert_eq!(stat.start_time, 1_248_559);
        assert!(!stat.exiting);
        let ends = b"42 (a) Z 1 1 1 0 -1 4194316 1 0 0 0 0 0 0 0 20 0 1 0 7 0 0";
        assert!(parse_stat(ends).unwrap().exiting);
        for end in 0..text.len() {
            let _ = parse_stat(&text[..end]);
        }
        assert!(parse_stat(b") (").is_none());
    }

    #[test]
    fn meters() {
        assert_eq!(parse_schedstat(b"3688 16318 1\n"), Some(Meter(3688, 1)));
        assert_eq!(parse_schedstat(b"0 0 0\n"), None);
        assert_eq!(parse_schedstat(b""), None);
        let status = b"Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t2\n";
        assert_eq!(parse_switches(status), Some(Meter(7, 2)));
    }

    #[test]
    fn a_birth_is_of_the_thread_that_began_then() {
        let clocks = Clocks {
            ahead: 5_000_000_000,
            tick: 10_000_000,
        };
        // It began in the tick from 7 s on of CLOCK_BOOTTIME.
        for (born, same) in [
            (2_000_000_000, true),
            (2_009_999_999, true),
            (2_011_000_000, true),
            (1_990_000_000, false),
            (2_020_000_000, false),
        ] {
            assert_eq!(clocks.is_birth(born, 700), same, "{born}");
        }
    }

    #[test]
    fn reasons_have_the_words_of_a_census() {
        let arch = Some(Arch::X86_64);
        for (number, words) in [
            (202 | 0x80 << 16, "futex"),
            (202 | 0x86 << 16, "mutex lock"),
            (202 | 0x8d << 16, "mutex lock"),
            (230, "sleep"),
            (232, "epoll wait"),
            (0, "read"),
            (999, "syscall 999"),
            (leakmon_common::threads::NO_SYSCALL, "page fault"),
        ] {
            assert_eq!(reason(arch, number), words);
        }
        assert_eq!(reason(None, 202), "waiting");
    }

    #[test]
    fn ids_of_namespaces() {
        assert_eq!(
            ns_tids(b"Pid:\t1\nNSpid:\t4711\t12\t1\n"),
            Some(vec![4711, 12, 1])
        );
        assert_eq!(ns_tids(b"Pid:\t1\n"), None);
    }
}
