//! The census: every goroutine of a process, read from `runtime.allgs` without
//! stopping it.
//!
//! The target runs on while it is read, so nothing is taken at its word. A g
//! is read, then its stack, then the g once more, in one call that the kernel
//! carries out in this order: when both readings agree the stack belongs to
//! them. What keeps changing is counted, and its stack left out.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use rustc_hash::FxHashMap;

use crate::binary::addr::{LoadBias, RuntimeAddr};
use crate::process::memory::{self, Memory};
use crate::task::{
    Age, Dump, Group, Population, Site, SiteId, SiteKey, Stack, StackId, State, Task,
};

use super::labels::Labels;
use super::layout::{self, Layout, status};
use super::pclntab::TextOffset;
use super::program::{Program, Refusal};
use super::stack::{End, Unwinder};
use super::symbols::{Pc, Symbols};
use crate::runtime::Kind;

/// Goroutines handled at a time: bounds the memory of a census, and lets what
/// is read of them stay in the processor's cache until they are counted.
const BATCH: usize = 512;

/// The same of a dump, which has all frames of each: program counters of 32 MiB
/// at the most.
const DUMP_BATCH: usize = 32;

/// gs that lie closer than this, in bytes, are read together: the bytes
/// between them cost less than another range.
const GAP: u64 = 512;

/// Most bytes of one read range.
const MAX_RUN: u64 = 1 << 16;

/// Bytes of a stack that are read first; most parked goroutines need fewer.
const STACK_FIRST: u64 = 1024;

/// Stacks that are read in one go: bounds the buffer.
const STACKS_AT_ONCE: usize = 128;

/// Most bytes of a stack that are read: Go's own limit is 1 GB, of which a
/// trace shows 100 frames.
const STACK_MOST: u64 = 16 << 20;

/// Frames of a stack that a census tells apart. Deeper ones are told apart by
/// their innermost frames only; a dump has them all.
const CENSUS_FRAMES: usize = 64;

/// Frames of a stack that a dump keeps.
const DUMP_FRAMES: usize = 1 << 17;

/// Stacks and sites that are told apart. A program has a few thousand.
const MAX_REMEMBERED: usize = 1 << 16;

/// Frames of the stacks that are remembered between censuses: bounds their
/// memory.
const CENSUS_FRAMES_ALL: usize = 1 << 20;

/// Frames of all stacks of a dump.
const DUMP_FRAMES_ALL: usize = 1 << 22;

/// Bytes of stacks that one census or dump reads. An ordinary goroutine takes
/// [`STACK_FIRST`].
const STACKS_MOST: u64 = 16 << 30;

/// Most goroutines that are believed to exist: their stacks alone would take
/// 64 GB.
const MAX_GOROUTINES: u64 = 1 << 25;

/// Entries of `runtime.allgs` that are read in one go.
const GS_AT_ONCE: usize = 1 << 16;

/// Censuses after which a goroutine is known to stand still: with a reading
/// between them, one that runs would have hidden it four times in a row.
const SURE: u8 = 2;

/// Times that a stack is read once more and must be the same, where nothing
/// else shows that it stood still.
const REREADS: usize = 4;

/// Times a goroutine that changed while it was read is read again.
const RETRIES: usize = 3;

/// Where the runtime's tables lie in the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// `runtime.allglen`.
    pub allglen: RuntimeAddr,
    /// `runtime.allgptr`.
    pub allgptr: RuntimeAddr,
    /// What is added to the process's CLOCK_MONOTONIC to get leakmon's, in
    /// nanoseconds: not 0 when it runs in another time namespace.
    pub clock_offset: i64,
}

/// What leakmon reads of a `runtime.g`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RawG {
    addr: RuntimeAddr,
    stack_lo: u64,
    stack_hi: u64,
    m: u64,
    sched_sp: u64,
    sched_pc: u64,
    sched_g: u64,
    syscallsp: u64,
    syscallpc: u64,
    status: u32,
    goid: u64,
    waitsince: u64,
    waitreason: u8,
    tracking_seq: u8,
    lockedm: u64,
    parent: Option<u64>,
    gopc: u64,
    startpc: u64,
    waiting: u64,
    labels: u64,
    /// It cannot run without that showing in `tracking_seq`.
    counted: bool,
}

impl RawG {
    /// Decodes the bytes of a g; `None` when there are too few.
    fn decode(
        bytes: &[u8],
        addr: RuntimeAddr,
        layout: &Layout,
        clock_offset: i64,
        coroutine: Option<u8>,
    ) -> Option<RawG> {
        let word = |at: usize| {
            let word = bytes.get(at..at.checked_add(8)?)?;
            Some(u64::from_le_bytes(word.try_into().ok()?))
        };
        let g = &layout.g;
        let status = word(g.atomicstatus)? as u32;
        let waitreason = *bytes.get(g.waitreason)?;
        let counted = match status & !status::SCAN {
            status::SYSCALL => layout.syscalls_are_counted,
            status::WAITING => Some(waitreason) != coroutine,
            _ => true,
        };
        Some(RawG {
            addr,
            counted,
            stack_lo: word(layout::G_STACK_LO)?,
            stack_hi: word(layout::G_STACK_HI)?,
            m: word(layout::G_M)?,
            sched_sp: word(layout::G_SCHED_SP)?,
            sched_pc: word(layout::G_SCHED_PC)?,
            sched_g: word(layout::G_SCHED_G)?,
            syscallsp: word(g.syscallsp)?,
            syscallpc: word(g.syscallsp + 8)?,
            status,
            goid: word(g.goid)?,
            waitsince: match word(g.waitsince)? {
                0 => 0,
                since => since.saturating_add_signed(clock_offset),
            },
            waitreason,
            tracking_seq: *bytes.get(g.tracking_seq)?,
            lockedm: word(g.lockedm)?,
            parent: match g.parent_goid {
                Some(at) => Some(word(at)?),
                None => None,
            },
            gopc: word(g.gopc)?,
            startpc: word(g.startpc)?,
            waiting: word(g.waiting)?,
            labels: word(g.labels)?,
        })
    }

    fn base_status(&self) -> u32 {
        self.status & !status::SCAN
    }

    /// Whether it exists at all: `NumGoroutine` counts no idle or dead g.
    fn exists(&self) -> bool {
        !matches!(
            self.base_status(),
            status::IDLE | status::DEAD | status::DEADEXTRA
        )
    }

    fn state(&self) -> Option<State> {
        Some(match self.base_status() {
            status::RUNNABLE => State::Runnable,
            status::RUNNING => State::Running,
            status::SYSCALL => State::Syscall,
            status::WAITING => State::Waiting,
            status::COPYSTACK => State::CopyStack,
            status::PREEMPTED => State::Preempted,
            status::LEAKED => State::Leaked,
            _ => return None,
        })
    }

    /// Where it will go on, and its stack pointer there; `None` while it runs.
    fn resume(&self) -> Option<(RuntimeAddr, u64)> {
        match self.state()? {
            State::Running | State::CopyStack => None,
            State::Syscall => Some((RuntimeAddr(self.syscallpc), self.syscallsp)),
            // The runtime's own rule: unwinder.initAt, runtime/traceback.go.
            _ if self.syscallsp != 0 => Some((RuntimeAddr(self.syscallpc), self.syscallsp)),
            _ => Some((RuntimeAddr(self.sched_pc), self.sched_sp)),
        }
    }

    /// What shows whether it has run.
    fn rest(&self) -> Rest {
        Rest {
            goid: self.goid,
            pc: self.resume().map_or(0, |(pc, _)| pc.0),
            waitsince: self.waitsince,
            depth: self.depth() as u32,
            status: self.base_status() as u8,
            waitreason: self.waitreason,
            tracking_seq: self.tracking_seq,
        }
    }

    /// Bytes on its stack, which stay the same when the runtime moves it.
    fn depth(&self) -> u64 {
        self.resume()
            .map_or(0, |(_, sp)| self.stack_hi.wrapping_sub(sp))
    }

    fn site(&self) -> SiteKey {
        SiteKey {
            created_at: self.gopc,
            entry: self.startpc,
        }
    }

    fn wait_reason(&self) -> Option<u8> {
        matches!(self.state(), Some(State::Waiting | State::Leaked)).then_some(self.waitreason)
    }
}

/// What shows whether a goroutine has run between two readings.
///
/// Small, since it is kept for every goroutine: the upper half of a depth is
/// left out, which no stack has.
#[derive(Clone, Copy, Debug)]
struct Rest {
    goid: u64,
    /// Where it will go on; 0 while it runs.
    pc: u64,
    waitsince: u64,
    depth: u32,
    status: u8,
    waitreason: u8,
    tracking_seq: u8,
}

impl Rest {
    /// Whether `later` shows the same goroutine, not having run in between, if
    /// both readings are [`RawG::counted`].
    ///
    /// trackingSeq moves each time a goroutine leaves running (casgstatus,
    /// runtime/proc.go), but for a system call from Go 1.26 on, and for a
    /// coroutine (coroswitch_m, runtime/coro.go); the runtime may move a stack,
    /// but not change its depth, and sets waitsince once while it is blocked.
    fn is_still(&self, later: &Rest) -> bool {
        self.goid == later.goid
            && self.status == later.status
            && self.waitreason == later.waitreason
            && self.tracking_seq == later.tracking_seq
            && self.depth == later.depth
            && self.pc == later.pc
            && (self.waitsince == 0 || self.waitsince == later.waitsince)
    }
}

/// What a function at which goroutines start is to the runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// The program's own goroutine.
    User,
    /// One of the runtime's.
    System,
    /// The runtime's, which runs finalizers or cleanups of the program: dumps
    /// show it while it does, NumGoroutine never counts it.
    Callbacks,
}

/// What is remembered of a g between two censuses, by its place in allgs,
/// where it stays for as long as the process lives (allgadd, runtime/proc.go).
#[derive(Clone, Copy, Debug)]
struct Remembered {
    rest: Rest,
    /// CLOCK_MONOTONIC nanoseconds of the first reading that found it so.
    since: u64,
    /// Censuses in a row that found it unchanged.
    still: u8,
    /// Where it was spawned and stands, when its stack could be read.
    known: Option<(SiteId, StackId)>,
}

impl Remembered {
    /// Whether `g` has not run since it was remembered.
    fn is_still(&self, g: &RawG) -> bool {
        g.counted && self.rest.is_still(&g.rest())
    }

    /// Whether `g` still stands where it stood, and where that is is known.
    fn stands_as(&self, g: &RawG) -> bool {
        self.known.is_some() && self.is_still(g)
    }
}

/// Interns sites and stacks.
#[derive(Debug)]
struct Tallies {
    symbols: Symbols,
    site_ids: FxHashMap<SiteKey, SiteId>,
    sites: Arc<Vec<Site>>,
    stack_ids: FxHashMap<Box<[Pc]>, StackId>,
    stacks: Arc<Vec<Stack>>,
    /// Frames of all stacks, and how many may be.
    frames: usize,
    most_frames: usize,
    /// Stacks may be as many as there are frames for.
    most_stacks: usize,
}

impl Tallies {
    fn new(
        program: &Arc<Program>,
        bias: LoadBias,
        most_stacks: usize,
        most_frames: usize,
    ) -> Tallies {
        Tallies {
            symbols: Symbols::new(Arc::clone(program), bias),
            site_ids: FxHashMap::default(),
            sites: Arc::default(),
            stack_ids: FxHashMap::default(),
            stacks: Arc::default(),
            frames: 0,
            most_frames,
            most_stacks,
        }
    }

    /// The site with this key; one without a name for all that are too many.
    fn site(&mut self, key: SiteKey) -> SiteId {
        if let Some(id) = self.site_ids.get(&key) {
            return *id;
        }
        let key = match self.sites.len() {
            ..MAX_REMEMBERED => key,
            _ => OTHER_SITES,
        };
        if let Some(id) = self.site_ids.get(&key) {
            return *id;
        }
        let id = SiteId(u32::try_from(self.sites.len()).unwrap_or(u32::MAX));
        let site = self.symbols.site(key);
        Arc::make_mut(&mut self.sites).push(site);
        self.site_ids.insert(key, id);
        id
    }

    /// The stack with these program counters; `None` when there are too many.
    fn stack(&mut self, pcs: &[Pc]) -> Option<StackId> {
        if let Some(id) = self.stack_ids.get(pcs) {
            return Some(*id);
        }
        if self.stacks.len() >= self.most_stacks || self.frames >= self.most_frames {
            return None;
        }
        let id = StackId(u32::try_from(self.stacks.len()).unwrap_or(u32::MAX));
        let stack = self.symbols.stack(pcs, self.most_frames - self.frames);
        // What is kept of a stack without frames takes some room, too.
        self.frames += stack.frames.len().max(pcs.len());
        Arc::make_mut(&mut self.stacks).push(stack);
        self.stack_ids.insert(pcs.into(), id);
        Some(id)
    }

    /// Forgets everything once so much is remembered that another census
    /// might not find room; returns whether it did.
    fn trim(&mut self) -> bool {
        let full = self.stacks.len() > self.most_stacks / 2
            || self.frames > self.most_frames / 2
            || self.sites.len() > MAX_REMEMBERED / 2;
        if full {
            self.site_ids.clear();
            self.sites = Arc::default();
            self.stack_ids.clear();
            self.stacks = Arc::default();
            self.frames = 0;
        }
        full
    }
}

/// Stands for the sites that are too many.
const OTHER_SITES: SiteKey = SiteKey {
    created_at: 0,
    entry: 0,
};

/// Reads the goroutines of one process, again and again.
#[derive(Debug)]
pub struct Census<M> {
    memory: M,
    program: Arc<Program>,
    bias: LoadBias,
    tables: Tables,
    unwinder: Unwinder,
    tallies: Tallies,
    starts: FxHashMap<u64, Start>,
    remembered: Vec<Option<Remembered>>,
    /// Bytes of stacks that the census has read.
    stack_bytes: u64,
    /// The number of the wait reason "coroutine", from Go 1.22 on.
    coroutine: Option<u8>,
    /// CLOCK_MONOTONIC nanoseconds of the last census.
    last: Option<u64>,
}

/// Groups by what makes them one.
type Groups = FxHashMap<(SiteId, State, Option<u8>, Option<StackId>), Group>;

/// One goroutine, read.
struct Read {
    index: usize,
    g: RawG,
    start: Start,
    /// Its program counters in [`Batch::pcs`], when its stack was read afresh
    /// and whole.
    fresh: Option<Range<usize>>,
    /// It kept changing.
    unstable: bool,
}

/// Goroutines that are read together, and the buffers for it: fresh memory for
/// each batch would cost more than the reading.
#[derive(Default)]
struct Batch {
    reads: Vec<Read>,
    pcs: Vec<Pc>,
    gs: Vec<u8>,
    stacks: Vec<u8>,
}

impl Batch {
    /// The program counters of `read`, when its stack was read afresh.
    fn fresh(&self, read: &Read) -> Option<&[Pc]> {
        self.pcs.get(read.fresh.clone()?)
    }
}

impl<M: Memory> Census<M> {
    /// A census of the process whose memory is `memory`.
    pub fn new(memory: M, program: Arc<Program>, bias: LoadBias, tables: Tables) -> Census<M> {
        Census {
            memory,
            unwinder: Unwinder::new(Arc::clone(&program), bias),
            tallies: Tallies::new(&program, bias, MAX_REMEMBERED, CENSUS_FRAMES_ALL),
            bias,
            tables,
            starts: FxHashMap::default(),
            remembered: Vec::new(),
            stack_bytes: 0,
            coroutine: program
                .wait_reasons()
                .iter()
                .position(|reason| &**reason == "coroutine")
                .and_then(|number| u8::try_from(number).ok()),
            last: None,
            program,
        }
    }

    /// The program that the process runs.
    pub fn program(&self) -> &Arc<Program> {
        &self.program
    }

    /// The memory that is read.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Symbolises a site that a probe met.
    pub fn site(&mut self, key: SiteKey) -> Site {
        let id = self.tallies.site(key);
        self.tallies.sites[id.0 as usize].clone()
    }

    /// Symbolises return addresses that a probe met, innermost first.
    pub fn stack_of(&mut self, return_addresses: &[u64]) -> Stack {
        let pcs: Vec<Pc> = return_addresses
            .iter()
            .map(|pc| Pc::after_call(RuntimeAddr(*pc)))
            .collect();
        self.tallies.symbols.stack(&pcs, CENSUS_FRAMES_ALL)
    }

    /// Counts every goroutine.
    ///
    /// # Errors
    /// [`Refusal`]: the process is gone or replaced, or its tables are not what
    /// its version promises.
    pub fn population(&mut self) -> Result<Population, Refusal> {
        self.twice(|census| {
            let counted = census.count();
            if counted.is_err() {
                // Half a census is none to hold the next against.
                census.remembered.clear();
            }
            counted
        })
    }

    /// What is wrong twice, in a process that still runs the same program, is
    /// wrong: once, the target may just have moved what was being read.
    fn twice<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let first = read(self);
        if first.is_ok() {
            return first;
        }
        self.memory_check()?;
        let second = read(self);
        if second.is_err() {
            self.memory_check()?;
        }
        second
    }

    fn count(&mut self) -> Result<Population, Refusal> {
        if self.tallies.trim() {
            // Ages go on; only what names the forgotten tables goes.
            for remembered in self.remembered.iter_mut().flatten() {
                remembered.known = None;
            }
        }
        self.stack_bytes = 0;
        let started = Instant::now();
        let now = monotonic_ns();
        let mut population = Population {
            cycles: Vec::new(),
            schedulers: Vec::new(),
            warnings: Vec::new(),
            taken_at: now,
            took: Duration::ZERO,
            count: 0,
            system: 0,
            unstable: 0,
            untold: 0,
            states: BTreeMap::new(),
            groups: Vec::new(),
            sites: Arc::default(),
            stacks: Arc::default(),
        };
        let mut groups = Groups::default();
        let gs = self.all_gs()?;
        self.remembered.truncate(gs.len());
        let mut batch = Batch::default();
        for (n, addrs) in gs.chunks(BATCH).enumerate() {
            self.read_batch(&mut batch, addrs, n * BATCH, CENSUS_FRAMES, true)?;
            self.remember(n * BATCH + addrs.len());
            for read in &batch.reads {
                self.tally(read, batch.fresh(read), now, &mut population, &mut groups);
            }
        }
        self.memory_check()?;
        population.groups = groups.into_values().collect();
        population.sites = Arc::clone(&self.tallies.sites);
        population.stacks = Arc::clone(&self.tallies.stacks);
        population.took = started.elapsed();
        self.last = Some(now);
        Ok(population)
    }

    /// Makes room for the first `len` goroutines, which are really there: a
    /// quarter more than needed, since there may be millions.
    fn remember(&mut self, len: usize) {
        let missing = len.saturating_sub(self.remembered.len());
        if self.remembered.capacity() < len {
            self.remembered.reserve_exact(missing + len / 4);
        }
        if missing > 0 {
            self.remembered.resize(len, None);
        }
    }

    fn tally(
        &mut self,
        read: &Read,
        fresh: Option<&[Pc]>,
        now: u64,
        population: &mut Population,
        groups: &mut Groups,
    ) {
        let slot = self.remembered[read.index];
        if !read.g.exists() {
            self.remembered[read.index] = None;
            return;
        }
        let Some(state) = read.g.state() else {
            population.unstable += 1;
            return;
        };
        if read.start != Start::User {
            population.system += 1;
            self.remembered[read.index] = None;
            return;
        }
        population.count += 1;
        population.unstable += u64::from(read.unstable);
        *population.states.entry(state).or_default() += 1;
        let rest = read.g.rest();
        let before = slot.filter(|slot| slot.is_still(&read.g));
        let blocked = matches!(state, State::Waiting | State::Leaked | State::Syscall);
        let not_run = before.is_some() && blocked;
        let since = match before {
            Some(before) if not_run => before.since,
            _ => now,
        };
        let known = before.and_then(|before| before.known);
        let site = known.map_or_else(|| self.tallies.site(read.g.site()), |(site, _)| site);
        let stack = match fresh {
            Some(pcs) => self.tallies.stack(pcs),
            None => known.map(|(_, stack)| stack),
        };
        let at_rest = !read.unstable && read.g.resume().is_some();
        population.untold += u64::from(at_rest && stack.is_none());
        self.remembered[read.index] = Some(Remembered {
            rest,
            since,
            still: match before {
                Some(before) if not_run => before.still.saturating_add(1),
                _ => 0,
            },
            known: stack.map(|stack| (site, stack)),
        });
        let reason = read.g.wait_reason();
        let waited_since = match read.g.waitsince {
            0 => since,
            // A coroutine's is not reset when it goes on, and what it waits for
            // next inherits it: it cannot be older than the census that saw it
            // elsewhere.
            waitsince => match (slot, self.last) {
                (Some(slot), Some(last)) if before.is_none() && slot.rest.goid == read.g.goid => {
                    since.min(waitsince.max(last))
                }
                _ => since.min(waitsince),
            },
        };
        let age = (blocked && read.g.counted).then(|| Age {
            at_least: Duration::from_nanos(now.saturating_sub(waited_since)),
        });
        let group = groups
            .entry((site, state, reason, stack))
            .or_insert_with(|| Group {
                site,
                state,
                reason: reason.map(|reason| self.program.wait_reason_or_number(reason)),
                stack,
                count: 0,
                not_run: 0,
                oldest: None,
                sample: read.g.goid,
            });
        group.count += 1;
        group.not_run += u64::from(not_run);
        if (age, std::cmp::Reverse(read.g.goid)) > (group.oldest, std::cmp::Reverse(group.sample)) {
            group.oldest = age;
            group.sample = read.g.goid;
        }
    }

    /// Looks once more, between two censuses, at goroutines that the last one
    /// found blocked and that are not yet known to stand still.
    ///
    /// `g.trackingSeq` has eight bits: one that runs 256 times between two
    /// censuses looks as if it had not run. With a reading in between it would
    /// have to do so in both halves.
    ///
    /// # Errors
    /// As [`Census::population`].
    pub fn sample(&mut self) -> Result<(), Refusal> {
        let now = monotonic_ns();
        let unsure: Vec<usize> = self
            .remembered
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.is_some_and(|slot| slot.still < SURE))
            .map(|(index, _)| index)
            .collect();
        if unsure.is_empty() {
            return Ok(());
        }
        let gs = self.all_gs()?;
        let mut buf = Vec::new();
        for indices in unsure.chunks(BATCH) {
            let addrs: Vec<RuntimeAddr> =
                indices.iter().map_while(|i| gs.get(*i)).copied().collect();
            let runs = match self.read_gs(&addrs, &mut buf) {
                Ok(runs) => runs,
                Err(refusal) => {
                    // Nothing is known to have stood still.
                    self.remembered.clear();
                    self.memory_check()?;
                    return Err(refusal);
                }
            };
            for ((index, start), addr) in indices.iter().zip(&runs.starts).zip(&addrs) {
                let g = self.decode(&buf, *start, *addr)?;
                if let Some(slot) = &mut self.remembered[*index]
                    && !slot.is_still(&g)
                {
                    let rest = g.rest();
                    *slot = Remembered {
                        rest,
                        since: now,
                        still: 0,
                        known: None,
                    };
                }
            }
        }
        Ok(())
    }

    /// Every goroutine with its whole stack, in the order of `runtime.allgs`.
    ///
    /// # Errors
    /// As [`Census::population`].
    pub fn dump(&mut self) -> Result<Dump, Refusal> {
        self.twice(Census::all)
    }

    fn all(&mut self) -> Result<Dump, Refusal> {
        let most_stacks = usize::MAX;
        let mut tallies = Tallies::new(&self.program, self.bias, most_stacks, DUMP_FRAMES_ALL);
        let mut labels = Labels::default();
        self.stack_bytes = 0;
        let mut tasks = Vec::new();
        let now = monotonic_ns();
        let gs = self.all_gs()?;
        let mut batch = Batch::default();
        for (n, addrs) in gs.chunks(DUMP_BATCH).enumerate() {
            self.read_batch(&mut batch, addrs, n * DUMP_BATCH, DUMP_FRAMES, false)?;
            for read in &batch.reads {
                let g = &read.g;
                let Some(state) = g.state().filter(|_| g.exists()) else {
                    continue;
                };
                let stack = batch.fresh(read).and_then(|pcs| tallies.stack(pcs));
                let shown = match read.start {
                    Start::User => true,
                    Start::System => false,
                    Start::Callbacks => {
                        stack.is_some_and(|id| calls_back(&tallies.stacks[id.0 as usize]))
                    }
                };
                if !shown {
                    continue;
                }
                let waits = matches!(state, State::Waiting | State::Syscall);
                tasks.push(Task {
                    on: None,
                    name: None,
                    id: g.goid,
                    parent: g.parent.filter(|parent| *parent != 0),
                    state,
                    reason: g
                        .wait_reason()
                        .filter(|reason| *reason != 0)
                        .map(|reason| self.program.wait_reason_or_number(reason)),
                    scan: g.status & status::SCAN != 0,
                    waited: (waits && g.waitsince != 0)
                        .then(|| Duration::from_nanos(now.saturating_sub(g.waitsince))),
                    locked_to_thread: g.lockedm != 0,
                    site: tallies.site(g.site()),
                    stack,
                    labels: labels.of(&self.memory, &self.program.layout, g.labels),
                });
            }
        }
        self.memory_check()?;
        Ok(Dump {
            noun: Kind::Go.task(),
            tasks,
            sites: tallies.sites,
            stacks: tallies.stacks,
            version: self.program.version.text.clone(),
        })
    }

    fn memory_check(&self) -> Result<(), Refusal> {
        self.memory.still_the_same().map_err(Refusal::Memory)
    }

    /// The addresses in `runtime.allgs`.
    fn all_gs(&self) -> Result<Vec<RuntimeAddr>, Refusal> {
        for _ in 0..RETRIES {
            // The length first: the runtime writes the pointer first, so the
            // array has at least as many (allgadd, runtime/proc.go).
            let len = self.memory.u64_at(self.tables.allglen)?;
            let array = self.memory.u64_at(self.tables.allgptr)?;
            if len > MAX_GOROUTINES || (len > 0 && array == 0) {
                return Err(Refusal::Unproven(format!(
                    "runtime.allglen says {len} goroutines, which cannot be"
                )));
            }
            let gs = self.array(RuntimeAddr(array), len as usize);
            // An array that has been outgrown is garbage, and its memory may
            // have become something else.
            if self.memory.u64_at(self.tables.allgptr)? == array {
                return gs;
            }
        }
        Err(Refusal::Unproven(
            "runtime.allgs moves faster than it can be read".to_owned(),
        ))
    }

    fn array(&self, array: RuntimeAddr, len: usize) -> Result<Vec<RuntimeAddr>, Refusal> {
        // Grows by what is really there.
        let mut gs = Vec::with_capacity(len.min(GS_AT_ONCE));
        while gs.len() < len {
            let part = (len - gs.len()).min(GS_AT_ONCE);
            let bytes = self
                .memory
                .bytes(array.wrapping_add(gs.len() as u64 * 8), part * 8)?;
            gs.extend(
                bytes
                    .chunks_exact(8)
                    .map(|word| RuntimeAddr(word.try_into().map_or(0, u64::from_le_bytes))),
            );
        }
        Ok(gs)
    }

    /// Reads the goroutines at `addrs`, which are at `first` in allgs, into
    /// `batch`.
    ///
    /// With `reuse`, the stack of one that has not run since the last census
    /// is not read again.
    fn read_batch(
        &mut self,
        batch: &mut Batch,
        addrs: &[RuntimeAddr],
        first: usize,
        frames: usize,
        reuse: bool,
    ) -> Result<(), Refusal> {
        batch.reads.clear();
        batch.pcs.clear();
        let runs = self.read_gs(addrs, &mut batch.gs)?;
        let mut todo = Vec::new();
        for (i, addr) in addrs.iter().enumerate() {
            let g = self.decode(&batch.gs, runs.starts[i], *addr)?;
            let index = first + i;
            let start = if g.exists() {
                self.start(&g)
            } else {
                Start::System
            };
            let known = reuse
                && self
                    .remembered
                    .get(index)
                    .is_some_and(|slot| slot.is_some_and(|before| before.stands_as(&g)));
            if g.exists() && start != Start::System && !known {
                if self.self_check(&g).is_err() {
                    // The runtime was just moving its stack, perhaps: what is
                    // wrong twice is wrong.
                    self.self_check(&self.read_g(g.addr)?)?;
                }
                if g.resume().is_some() {
                    todo.push(i);
                }
            }
            batch.reads.push(Read {
                index,
                g,
                start,
                fresh: None,
                unstable: false,
            });
        }
        for attempt in 0..RETRIES {
            if todo.is_empty() {
                break;
            }
            todo = self.read_stacks(batch, &todo, frames)?;
            if attempt > 0 {
                // What still changes is running: give it the time to rest.
                std::thread::yield_now();
            }
        }
        for i in todo {
            batch.reads[i].unstable = true;
        }
        Ok(())
    }

    /// Reads the gs at `addrs` into `buf`.
    fn read_gs(&self, addrs: &[RuntimeAddr], buf: &mut Vec<u8>) -> Result<Runs, Refusal> {
        let runs = Runs::of(addrs.iter().copied(), self.program.layout.g_len());
        buf.resize(runs.len, 0);
        if self.memory.read_ranges(&runs.ranges, buf)? < runs.len {
            return Err(Refusal::Unproven(
                "runtime.allgs points to memory that is not there".to_owned(),
            ));
        }
        Ok(runs)
    }

    /// Reads the g at `addr`.
    fn read_g(&self, addr: RuntimeAddr) -> Result<RawG, Refusal> {
        let mut buf = Vec::new();
        self.read_gs(&[addr], &mut buf)?;
        self.decode(&buf, 0, addr)
    }

    /// Decodes the g of `addr`, which is in `buf` at `start`.
    fn decode(&self, buf: &[u8], start: usize, addr: RuntimeAddr) -> Result<RawG, Refusal> {
        buf.get(start..)
            .and_then(|bytes| self.raw_g(bytes, addr))
            .ok_or_else(|| Refusal::Unproven("a runtime.g could not be decoded".to_owned()))
    }

    /// Reads the stacks of `batch.reads[i]` for each `i` of `todo`, and each g
    /// once more behind its stack. Returns those that changed meanwhile; they
    /// hold their newest g.
    fn read_stacks(
        &mut self,
        batch: &mut Batch,
        todo: &[usize],
        frames: usize,
    ) -> Result<Vec<usize>, Refusal> {
        let g_len = self.program.layout.g_len();
        let mut alone = Vec::new();
        let Batch {
            reads,
            pcs,
            stacks: buf,
            ..
        } = batch;
        for part in todo.chunks(STACKS_AT_ONCE) {
            let mut ranges = Vec::with_capacity(part.len() * 2);
            for i in part {
                let g = &reads[*i].g;
                let (_, sp) = g.resume().unwrap_or_default();
                ranges.push(memory::Range {
                    addr: RuntimeAddr(sp),
                    len: g.depth().min(STACK_FIRST) as usize,
                });
            }
            let stacks_len: usize = ranges.iter().map(|r| r.len).sum();
            self.stack_bytes += stacks_len as u64;
            if self.stack_bytes > STACKS_MOST {
                return Ok(Vec::new());
            }
            let runs = Runs::of(part.iter().map(|i| reads[*i].g.addr), g_len);
            ranges.extend(&runs.ranges);
            buf.resize(stacks_len + runs.len, 0);
            let done = self.memory.read_ranges(&ranges, buf)?;
            if done < buf.len() {
                // A stack that was freed meanwhile ends the whole read.
                alone.extend(part);
                continue;
            }
            let (stacks, gs) = buf.split_at(stacks_len);
            let mut at = 0;
            for (n, i) in part.iter().enumerate() {
                let stack = &stacks[at..at + ranges[n].len];
                at += ranges[n].len;
                if !reads[*i].g.counted {
                    alone.push(*i);
                    continue;
                }
                match self.unwind(&mut reads[*i], stack, &gs[runs.starts[n]..], frames, pcs) {
                    Outcome::Done => {}
                    Outcome::Changed | Outcome::Deeper => alone.push(*i),
                }
            }
        }
        let mut left = Vec::new();
        for i in alone {
            if !self.read_alone(&mut reads[i], frames, pcs)? {
                left.push(i);
            }
        }
        Ok(left)
    }

    /// Reads one goroutine's stack, as much of it as needed. False when it
    /// changed meanwhile.
    fn read_alone(
        &mut self,
        read: &mut Read,
        frames: usize,
        pcs: &mut Vec<Pc>,
    ) -> Result<bool, Refusal> {
        let g_len = self.program.layout.g_len();
        let mut want = STACK_FIRST;
        loop {
            let Some((_, sp)) = read.g.resume() else {
                return Ok(true);
            };
            let len = read.g.depth().min(want).min(STACK_MOST) as usize;
            self.stack_bytes += len as u64;
            if self.stack_bytes > STACKS_MOST {
                return Ok(true);
            }
            let ranges = [
                memory::Range {
                    addr: RuntimeAddr(sp),
                    len,
                },
                memory::Range {
                    addr: read.g.addr,
                    len: g_len,
                },
            ];
            let mut buf = vec![0; len + g_len];
            if self.memory.read_ranges(&ranges, &mut buf)? < buf.len() {
                // Freed under our hands: look at the g again.
                read.g = self.read_g(read.g.addr)?;
                return Ok(!read.g.exists());
            }
            // Nothing in the g would show that it ran meanwhile: then its
            // stack must be the same again and again.
            let again = if read.g.counted { 0 } else { REREADS };
            let mut same = vec![0; len + g_len];
            for _ in 0..again {
                let done = self.memory.read_ranges(&ranges, &mut same)?;
                if done < same.len() || same[..len] != buf[..len] {
                    read.g = self.read_g(read.g.addr)?;
                    return Ok(!read.g.exists());
                }
            }
            let (stack, g) = buf.split_at(len);
            match self.unwind(read, stack, g, frames, pcs) {
                Outcome::Done => return Ok(true),
                Outcome::Changed => return Ok(false),
                Outcome::Deeper => want = want.saturating_mul(8),
            }
        }
    }

    fn unwind(
        &mut self,
        read: &mut Read,
        stack: &[u8],
        g: &[u8],
        frames: usize,
        pcs: &mut Vec<Pc>,
    ) -> Outcome {
        let Some(now) = self.raw_g(g, read.g.addr) else {
            return Outcome::Changed;
        };
        if !read.g.rest().is_still(&now.rest()) || read.g.resume() != now.resume() {
            read.g = now;
            // One that has ended or runs has no stack to read.
            return if now.exists() && now.resume().is_some() {
                Outcome::Changed
            } else {
                Outcome::Done
            };
        }
        let Some((pc, _)) = now.resume() else {
            return Outcome::Done;
        };
        let start = pcs.len();
        match self.unwinder.unwind(pc, stack, frames, pcs) {
            End::Short if (stack.len() as u64) < now.depth().min(STACK_MOST) => {
                pcs.truncate(start);
                return Outcome::Deeper;
            }
            // Also where the stack's end was reached, or an address that is
            // none of Go's: so much of it is true.
            End::Top | End::Lost | End::Limit | End::Short | End::Torn => {
                read.fresh = Some(start..pcs.len());
            }
        }
        Outcome::Done
    }

    fn raw_g(&self, bytes: &[u8], addr: RuntimeAddr) -> Option<RawG> {
        RawG::decode(
            bytes,
            addr,
            &self.program.layout,
            self.tables.clock_offset,
            self.coroutine,
        )
    }

    /// What only holds when the layout is right, whatever the goroutine does.
    fn self_check(&self, g: &RawG) -> Result<(), Refusal> {
        let failed = |what: &str| {
            Err(Refusal::Unproven(format!(
                "goroutine {}: {what}: the layout of {} does not fit this program",
                g.goid, self.program.version.text
            )))
        };
        if g.sched_g != 0 && g.sched_g != g.addr.0 {
            return failed("g.sched.g does not point to itself");
        }
        if g.stack_lo >= g.stack_hi {
            return failed("g.stack is empty");
        }
        if g.base_status() == status::WAITING && self.program.wait_reason(g.waitreason).is_none() {
            return failed("g.waitreason is out of range");
        }
        Ok(())
    }

    /// Whether goroutines that start at `entry` are the runtime's own.
    pub fn is_system(&self, entry: u64) -> bool {
        self.classify(entry) != Start::User
    }

    fn start(&mut self, g: &RawG) -> Start {
        if let Some(start) = self.starts.get(&g.startpc) {
            return *start;
        }
        let start = self.classify(g.startpc);
        if self.starts.len() >= MAX_REMEMBERED {
            self.starts.clear();
        }
        self.starts.insert(g.startpc, start);
        start
    }

    /// isSystemGoroutine, runtime/traceback.go.
    fn classify(&self, entry: u64) -> Start {
        let program = &self.program;
        let name = program
            .text_offset(self.bias.vaddr(RuntimeAddr(entry)))
            .and_then(|offset: TextOffset| program.table.name(program.table.function(offset)?))
            .unwrap_or(b"");
        match name {
            b"runtime.main" | b"runtime.corostart" | b"runtime.handleAsyncEvent" => Start::User,
            b"runtime.runfinq" | b"runtime.runFinalizers" | b"runtime.runCleanups" => {
                Start::Callbacks
            }
            _ if name.starts_with(b"runtime.") => Start::System,
            _ => Start::User,
        }
    }
}

/// Reads of equal length at many addresses, neighbours joined.
struct Runs {
    ranges: Vec<memory::Range>,
    /// Where in the buffer each read starts.
    starts: Vec<usize>,
    /// Bytes in all.
    len: usize,
}

impl Runs {
    fn of(addrs: impl Iterator<Item = RuntimeAddr>, each: usize) -> Runs {
        let mut runs = Runs {
            ranges: Vec::new(),
            starts: Vec::new(),
            len: 0,
        };
        for addr in addrs {
            if let Some(last) = runs.ranges.last_mut() {
                let gap = addr
                    .0
                    .wrapping_sub(last.addr.0)
                    .wrapping_sub(last.len as u64);
                if gap < GAP && last.len as u64 + gap + each as u64 <= MAX_RUN {
                    runs.starts.push(runs.len + gap as usize);
                    last.len += gap as usize + each;
                    runs.len += gap as usize + each;
                    continue;
                }
            }
            runs.starts.push(runs.len);
            runs.ranges.push(memory::Range { addr, len: each });
            runs.len += each;
        }
        runs
    }
}

enum Outcome {
    Done,
    Changed,
    Deeper,
}

/// Whether a stack of the runtime's finalizer or cleanup goroutine has a frame
/// of the program on it.
fn calls_back(stack: &Stack) -> bool {
    stack
        .frames
        .iter()
        .any(|f| !f.function.starts_with("runtime."))
}

/// CLOCK_MONOTONIC in nanoseconds, which is Go's nanotime.
pub fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| {
        t.tv_sec().cast_unsigned() * 1_000_000_000 + t.tv_nsec().cast_unsigned()
    })
}
