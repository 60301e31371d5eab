//! The census: every task of a process, read from its memory without stopping
//! it.
//!
//! The first one searches the memory ([`super::scan`]) for words that are
//! addresses of task vtables, and finds in the schedulers of the tasks the
//! lists that tokio itself keeps them in ([`super::lists`]). From then on the
//! lists tell which tasks there are. The search goes on in the background, a
//! little at a time: it finds runtimes that were started since, and what is in
//! no list: closures on blocking threads, and tasks that have ended and whose
//! handle somebody holds.
//!
//! Nothing is taken at its word. What is read as a task has the address of one
//! of the program's vtables in its place, a state word that a live cell can
//! have, an id, and the id of its list; what was freed meanwhile has no
//! references left in its state word, or something else in its place. A list
//! is walked to its end, each link back and forth, and held against tokio's
//! own number where there is one; what does not agree is read again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::binary::addr::LoadBias;
use crate::probe::Counts;
use crate::process::memory::Memory;
use crate::runtime::{Kind, Refusal};
use crate::task::{
    Age, Cycle, CycleMember, Dump, Frame, Group, Population, Scheduler, Site, SiteId, SiteKey,
    Stack, StackId, State, Task,
};

use super::cells::{Cell, Reader};
use super::idle::{Idle, Wait};
use super::layout::{Layout, state};
use super::lists::{self, Heads, Place};
use super::probes::Runs;
use super::program::{Loaded, Program};
use super::scan::{Regions, Search};

/// Longest that the first census, or a dump, searches the memory: some 20 GB.
const FIRST_SEARCH: Duration = Duration::from_secs(10);

/// Share of the time that is spent on searching while the process is young to
/// leakmon, and its runtimes may just be starting.
const EARLY_SHARE: u32 = 50;

/// The same later on: fifty processes take one percent of a core.
const SHARE: u32 = 5000;

/// Until when it is young.
const EARLY: Duration = Duration::from_secs(60);

/// Longest slice of a search in one census.
const SLICE: Duration = Duration::from_millis(100);

/// Shortest slice that gets anywhere.
const SHORTEST_SLICE: Duration = Duration::from_micros(200);

/// Most tasks that are believed to exist: their cells alone would take 16 GB.
const MAX_TASKS: usize = 1 << 26;

/// Times that lists which do not agree are read again.
const RETRIES: usize = 3;

/// Steps along lists into the unknown, each a read or two, before it is
/// quicker to search the memory.
const MAX_STEPS: usize = 20_000;

/// Lists that are told apart. Each runtime and each `LocalSet` has one.
const MAX_OWNERS: usize = 4096;

/// Sites that are told apart.
const MAX_SITES: usize = 1 << 16;

/// Circles of tasks that are told, and tasks in one.
const MAX_CYCLES: usize = 64;
const MAX_CYCLE: usize = 1024;

/// What is remembered of a task between two censuses, by its address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) vtable: u32,
    pub(super) id: u64,
    hash: u64,
    /// CLOCK_MONOTONIC nanoseconds of the first census that found it so, or of
    /// when the probes last saw it run.
    since: u64,
    /// What it waits for.
    wait: Wait,
    /// `&Location` of the spawn; 0 where there is none.
    pub(super) location: u64,
    /// It is in a list.
    pub(super) alive: bool,
    /// It was woken, or never polled.
    pub(super) scheduled: bool,
}

/// A list of tasks.
#[derive(Clone, Copy, Debug)]
struct Owner {
    id: u64,
    /// Where it is; `None` where that was not found: then its tasks are found
    /// by each other's links.
    place: Option<Place>,
    /// What its tasks have as their scheduler.
    scheduler: u64,
}

/// A runtime or `LocalSet`, for who asks about numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List {
    /// The id that tokio gave it: 1 for the first.
    pub id: u64,
    /// Tasks in it.
    pub tasks: u64,
    /// Its tasks by tokio's own count, where it keeps one.
    pub counted: Option<u64>,
}

impl Known {
    /// Whether it is `cell`, which has not run since.
    fn is(&self, cell: &Cell) -> bool {
        (self.vtable, self.id, self.hash) == (cell.vtable, cell.id, cell.hash)
    }
}

/// Reads the tasks of one process, again and again.
#[derive(Debug)]
pub struct Census<M> {
    memory: M,
    pid: u32,
    program: Arc<Program>,
    pub(super) loaded: Loaded,
    bias: LoadBias,
    pub(super) known: FxHashMap<u64, Known>,
    idle: Idle,
    /// CLOCK_MONOTONIC nanoseconds of the last census.
    taken_at: u64,
    owners: Vec<Owner>,
    lists: Vec<List>,
    opened: Instant,
    search: Option<Search>,
    /// Bytes that the first search did not get to.
    unsearched: u64,
    searched_once: bool,
    last: Option<Instant>,
    site_ids: FxHashMap<SiteKey, SiteId>,
    pub(super) sites: Arc<Vec<Site>>,
    stacks: Arc<Vec<Stack>>,
    /// By site: its one stack.
    stack_of: Vec<Option<StackId>>,
}

/// Everything that one reading of the process found.
#[derive(Default)]
struct Found {
    cells: FxHashMap<u64, Cell>,
    /// In a list, by address.
    alive: FxHashSet<u64>,
    /// Tasks that changed while they were read.
    unstable: u64,
}

impl<M: Memory> Census<M> {
    /// A census of process `pid`, whose memory is `memory`.
    pub fn new(memory: M, pid: u32, program: Arc<Program>, bias: LoadBias) -> Census<M> {
        Census {
            memory,
            pid,
            loaded: program.loaded(bias),
            program,
            bias,
            known: FxHashMap::default(),
            idle: Idle::default(),
            taken_at: 0,
            owners: Vec::new(),
            lists: Vec::new(),
            opened: Instant::now(),
            search: None,
            unsearched: 0,
            searched_once: false,
            last: None,
            site_ids: FxHashMap::default(),
            sites: Arc::default(),
            stacks: Arc::default(),
            stack_of: Vec::new(),
        }
    }

    /// The program that the process runs.
    pub fn program(&self) -> &Arc<Program> {
        &self.program
    }

    /// Where the program was loaded.
    pub fn bias(&self) -> LoadBias {
        self.bias
    }

    /// The lists that the last census found, in the order of their ids.
    pub fn lists(&self) -> &[List] {
        &self.lists
    }

    fn reader(&self) -> Reader<'_, M> {
        Reader {
            memory: &self.memory,
            program: &self.program,
            loaded: self.loaded,
        }
    }

    /// Counts every task.
    ///
    /// # Errors
    /// [`Refusal`]: the process is gone or replaced.
    pub fn population(&mut self) -> Result<Population, Refusal> {
        self.population_with(None)
    }

    /// The same; `probed` is what the probes had counted just before.
    ///
    /// # Errors
    /// As [`Census::population`].
    pub fn population_with(&mut self, probed: Option<&Counts>) -> Result<Population, Refusal> {
        let program = Arc::clone(&self.program);
        let counted = self.count(Runs::of(&program, probed));
        if counted.is_err() {
            // Half a census is none to hold the next against.
            self.known.clear();
            self.memory.still_the_same()?;
        }
        counted
    }

    fn count(&mut self, runs: Runs<'_>) -> Result<Population, Refusal> {
        let started = Instant::now();
        let now = crate::runtime::go::census::monotonic_ns();
        let budget = self.search_budget(started);
        let found = self.read(budget)?;
        self.memory.still_the_same()?;
        self.last = Some(started);
        let mut population = Population {
            taken_at: now,
            took: Duration::ZERO,
            count: 0,
            system: 0,
            unstable: found.unstable,
            untold: 0,
            states: BTreeMap::new(),
            groups: Vec::new(),
            sites: Arc::default(),
            stacks: Arc::default(),
            cycles: Vec::new(),
            schedulers: self
                .lists
                .iter()
                .map(|list| Scheduler {
                    id: list.id,
                    live: list.tasks,
                })
                .collect(),
            warnings: self.warnings(),
        };
        let waits = self.waits(&found)?;
        self.memory.still_the_same()?;
        population.cycles = self.cycles(&found, &waits);
        let mut groups: FxHashMap<(SiteId, State, u16), Group> = FxHashMap::default();
        let mut known = FxHashMap::with_capacity_and_hasher(found.cells.len(), Default::default());
        for cell in found.cells.values() {
            let before = self.known.get(&cell.addr);
            let before = before.filter(|before| before.is(cell));
            let ran = runs.last(cell.addr, cell.id);
            let since = before.map_or(now, |before| ran.unwrap_or(before.since));
            let alive = found.alive.contains(&cell.addr);
            let wait = waits.get(&cell.addr).copied().unwrap_or_default();
            let remembered = Known {
                vtable: cell.vtable,
                id: cell.id,
                hash: cell.hash,
                since,
                wait,
                location: cell.location,
                alive,
                scheduled: cell.is(state::NOTIFIED) && !cell.is(state::RUNNING),
            };
            let stood = before.is_some() && ran.is_none_or(|ran| ran <= self.taken_at);
            known.insert(cell.addr, remembered);
            if !alive {
                population.system += u64::from(is_blocking(cell));
                continue;
            }
            let state = state_of(cell);
            population.count += 1;
            *population.states.entry(state).or_default() += 1;
            let site = self.site(cell);
            let stack = self.stack(site);
            let idle = &self.idle;
            let group = groups.entry((site, state, wait.reason));
            let group = group.or_insert_with(|| Group {
                site,
                state,
                reason: idle.words(wait),
                stack,
                count: 0,
                not_run: 0,
                oldest: None,
                sample: cell.id,
            });
            group.count += 1;
            group.not_run += u64::from(stood && state != State::Running);
            let age = (state == State::Idle).then(|| Age {
                at_least: Duration::from_nanos(now - since),
            });
            let older = (age, std::cmp::Reverse(cell.id));
            if older > (group.oldest, std::cmp::Reverse(group.sample)) {
                group.oldest = age;
                group.sample = cell.id;
            }
        }
        self.known = known;
        self.taken_at = now;
        runs.warnings(self, now, &mut population.warnings);
        population.groups = groups.into_values().collect();
        population.sites = Arc::clone(&self.sites);
        population.stacks = Arc::clone(&self.stacks);
        population.took = started.elapsed();
        Ok(population)
    }

    /// Every task.
    ///
    /// # Errors
    /// As [`Census::population`].
    pub fn dump(&mut self) -> Result<Dump, Refusal> {
        // What is in no list, a fresh search tells.
        self.search = None;
        let found = self.read(FIRST_SEARCH)?;
        self.memory.still_the_same()?;
        let mut cells: Vec<Cell> = found
            .cells
            .values()
            .filter(|cell| found.alive.contains(&cell.addr) || cell.is(state::COMPLETE))
            .copied()
            .collect();
        cells.sort_unstable_by_key(|cell| (cell.owner, cell.id, cell.addr));
        let waits = self.waits(&found)?;
        self.memory.still_the_same()?;
        let mut tasks = Vec::with_capacity(cells.len());
        for cell in &cells {
            let wait = waits.get(&cell.addr).copied().unwrap_or_default();
            let on = found.cells.get(&wait.on).filter(|on| on.id != 0);
            let site = self.site(cell);
            let mut labels = Vec::new();
            let mut label = |key: &str, value: String| labels.push((key.into(), value.into()));
            let is_runtime = self.owners.iter().any(|owner| {
                owner.id == cell.owner && owner.place.is_some_and(|place| place.is_sharded())
            });
            let kind = if is_runtime { "runtime" } else { "list" };
            label(kind, cell.owner.to_string());
            let handle = match cell.is(state::JOIN_INTEREST) {
                true => "held",
                false => "dropped",
            };
            label("handle", handle.to_owned());
            tasks.push(Task {
                id: cell.id,
                parent: None,
                state: state_of(cell),
                reason: self.idle.words(wait),
                scan: false,
                waited: None,
                locked_to_thread: false,
                site,
                stack: self.stack(site),
                on: on.map(|on| format!("task {}", on.id).into()),
                name: None,
                labels,
            });
        }
        Ok(Dump {
            noun: Kind::Tokio.task(),
            tasks,
            sites: Arc::clone(&self.sites),
            stacks: Arc::clone(&self.stacks),
            version: self.program.version_text(),
        })
    }

    /// What the idle tasks wait for, by address: of those that have not run
    /// since an earlier census, what it was then.
    fn waits(&mut self, found: &Found) -> Result<FxHashMap<u64, Wait>, Refusal> {
        let mut waits = FxHashMap::default();
        let mut open = Vec::new();
        for addr in &found.alive {
            let Some(cell) = found.cells.get(addr).filter(|c| state_of(c) == State::Idle) else {
                continue;
            };
            let known = self.known.get(addr).filter(|known| known.is(cell));
            match known.map(|known| known.wait) {
                Some(wait) if !wait.is_open() => {
                    waits.insert(*addr, wait);
                }
                _ => open.push(*cell),
            }
        }
        // Neighbours are read together.
        open.sort_unstable_by_key(|cell| cell.addr);
        let reader = Reader {
            memory: &self.memory,
            program: &self.program,
            loaded: self.loaded,
        };
        let looked = self.idle.look(&reader, self.pid, &open, &found.cells)?;
        for (addr, wait) in looked {
            let before = self.known.get(&addr).map_or(0, |known| known.wait.tries);
            let tries = before.saturating_add(1);
            waits.insert(addr, Wait { tries, ..wait });
        }
        Ok(waits)
    }

    /// The circles of tasks of which each waits for the end of the next one.
    fn cycles(&self, found: &Found, waits: &FxHashMap<u64, Wait>) -> Vec<Cycle> {
        let next = |addr: u64| waits.get(&addr).map_or(0, |wait| wait.on);
        let circles = circles(waits.keys().copied(), next);
        let cycle = |circle: Vec<u64>| Cycle {
            members: circle
                .iter()
                .filter_map(|addr| found.cells.get(addr))
                .map(|cell| self.member(cell))
                .collect(),
            doubt: None,
        };
        circles.into_iter().map(cycle).collect()
    }

    /// A task of a circle.
    fn member(&self, cell: &Cell) -> CycleMember {
        let name = &self.program.names()[cell.vtable as usize];
        CycleMember {
            task: cell.id,
            name: Some(Arc::clone(&name.function)),
            lock: None,
            place: None,
        }
    }

    /// What a census cannot promise.
    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.unsearched > 0 {
            warnings.push(format!(
                "{} MiB of its memory have not been searched yet: a runtime of which every task lies there is missing",
                self.unsearched >> 20
            ));
        }
        warnings
    }

    /// How long this census may search the memory.
    fn search_budget(&self, now: Instant) -> Duration {
        let Some(last) = self.last else {
            return FIRST_SEARCH;
        };
        let share = match now - self.opened < EARLY || self.unsearched > 0 {
            true => EARLY_SHARE,
            false => SHARE,
        };
        ((now - last) / share).clamp(SHORTEST_SLICE, SLICE)
    }

    /// Reads every task, searching the memory for `budget` at the most.
    fn read(&mut self, budget: Duration) -> Result<Found, Refusal> {
        let mut found = Found::default();
        let known: Vec<(u64, u32)> = self
            .known
            .iter()
            .map(|(addr, known)| (*addr, known.vtable))
            .collect();
        let cells = self.reader().known(&known)?;
        found.add(cells);
        let mut addrs = Vec::new();
        self.search_on(Instant::now() + budget, &found.cells, &mut addrs)?;
        found.add(self.reader().unknown(&addrs)?);
        self.discover(&found)?;
        let mut lists = Vec::new();
        let owners = self.owners.clone();
        for (index, owner) in owners.iter().enumerate() {
            let mut list = self.walk(owner, &mut found)?;
            if list.is_none() && owner.place.is_some() {
                // Its place may have been another one, that looked like it.
                self.owners[index].place = None;
                list = self.walk_links(owner, &mut found)?;
            }
            lists.extend(list);
        }
        let ids: FxHashSet<u64> = lists.iter().map(|list| list.id).collect();
        self.owners.retain(|owner| ids.contains(&owner.id));
        lists.sort_unstable_by_key(|list| list.id);
        self.lists = lists;
        // What is in no list: closures on blocking threads, and what has ended.
        let schedulers: FxHashMap<u64, u64> = self
            .owners
            .iter()
            .map(|owner| (owner.id, owner.scheduler))
            .collect();
        let mut ids: FxHashSet<u64> = FxHashSet::default();
        if self.program.layout == Layout::V23 {
            let alive = found.alive.iter();
            ids.extend(alive.filter_map(|addr| Some(found.cells.get(addr)?.id)));
        }
        let first = |cell: &Cell, ids: &mut FxHashSet<u64>| {
            self.program.layout != Layout::V23 || ids.insert(cell.id)
        };
        found.cells.retain(|addr, cell| {
            found.alive.contains(addr)
                // A cell is put together on the stack, where it stays until
                // something else is written there: with an id that another has.
                || (is_blocking(cell) && first(cell, &mut ids))
                || (cell.is(state::COMPLETE)
                    && schedulers.get(&cell.owner) == Some(&cell.scheduler))
        });
        Ok(found)
    }

    /// Searches on until `deadline`, adding what may be headers.
    fn search_on(
        &mut self,
        deadline: Instant,
        known: &FxHashMap<u64, Cell>,
        addrs: &mut Vec<u64>,
    ) -> Result<(), Refusal> {
        let mut search = match self.search.take() {
            Some(search) => search,
            None => Search::new(Regions::of(self.pid)?),
        };
        let loaded = self.loaded;
        let program = &self.program;
        let header = program.layout.vtable();
        let done = search.go_on(
            &self.memory,
            deadline,
            |word| loaded.may_be(word),
            |at, word| {
                let addr = at.0.wrapping_sub(header);
                if loaded.index(program, word).is_some()
                    && !known.contains_key(&addr)
                    && addrs.len() < MAX_TASKS
                {
                    addrs.push(addr);
                }
            },
        )?;
        if done {
            self.searched_once = true;
            self.unsearched = 0;
        } else {
            if !self.searched_once {
                self.unsearched = search.left();
            }
            self.search = Some(search);
        }
        Ok(())
    }

    /// Finds the lists of tasks whose list is not known.
    fn discover(&mut self, found: &Found) -> Result<(), Refusal> {
        let mut tried: FxHashMap<u64, usize> = FxHashMap::default();
        for cell in found.cells.values() {
            if cell.owner == 0 || cell.is(state::COMPLETE) {
                continue;
            }
            let known = self.owners.iter().position(|owner| owner.id == cell.owner);
            if known.is_some_and(|index| self.owners[index].place.is_some()) {
                continue;
            }
            // The list may be changed just while it is looked at.
            let tries = tried.entry(cell.owner).or_default();
            *tries += 1;
            if *tries > RETRIES || (known.is_none() && self.owners.len() >= MAX_OWNERS) {
                continue;
            }
            // A scheduler has one list. What has another id was left of a task
            // somewhere, and partly written over.
            let has_list = |owner: &Owner| {
                owner.scheduler == cell.scheduler && owner.id != cell.owner && owner.place.is_some()
            };
            if self.owners.iter().any(has_list)
                || !lists::is_scheduler(&self.memory, cell.scheduler)?
            {
                continue;
            }
            let place = lists::find(&self.reader(), cell)?;
            let owner = Owner {
                id: cell.owner,
                place,
                scheduler: cell.scheduler,
            };
            match known {
                Some(index) => self.owners[index] = owner,
                None => self.owners.push(owner),
            }
        }
        Ok(())
    }

    /// Walks one list; `None` when it is no more.
    fn walk(&self, owner: &Owner, found: &mut Found) -> Result<Option<List>, Refusal> {
        let Some(place) = owner.place else {
            return self.walk_links(owner, found);
        };
        let mut exact: Option<Vec<u64>> = None;
        let mut off = 0;
        for attempt in 0..RETRIES {
            let Some(heads) = place.read(&self.memory, owner.id)? else {
                return Ok(None);
            };
            if attempt > 0 {
                let again: Vec<(u64, u32)> = found
                    .cells
                    .values()
                    .filter(|cell| cell.owner == owner.id)
                    .map(|cell| (cell.addr, cell.vtable))
                    .collect();
                for (addr, _) in &again {
                    found.cells.remove(addr);
                }
                found.add(self.reader().known(&again)?);
            }
            self.follow(owner, &heads, found)?;
            let (members, broken) = members(owner, &heads, found);
            let counted = match place.read(&self.memory, owner.id)? {
                Some(heads) => heads.count,
                None => return Ok(None),
            };
            let differs = counted.map_or(0, |counted| counted.abs_diff(members.len() as u64));
            off = differs.max(broken);
            if off == 0 {
                exact = Some(members);
                break;
            }
        }
        let members = match exact {
            Some(members) => members,
            // The list is changed faster than it can be walked, and a walk that was
            // cut says nothing of what comes behind. But each task says itself, too,
            // whether it has ended.
            None => {
                let alive = self.alive(owner, &place, found);
                let heads = place.read(&self.memory, owner.id)?;
                let counted = heads.and_then(|heads| heads.count);
                off = counted.map_or(off, |counted| counted.abs_diff(alive.len() as u64));
                off = off.max(1);
                alive
            }
        };
        if off == 0 && self.lacks(owner, &place, &members, found)? {
            return Ok(None);
        }
        found.unstable += off;
        let list = List {
            id: owner.id,
            tasks: members.len() as u64,
            counted: place.read(&self.memory, owner.id)?.and_then(|h| h.count),
        };
        found.alive.extend(members);
        Ok(Some(list))
    }

    /// The tasks with a list's id that have not ended, by their own words.
    fn alive(&self, owner: &Owner, place: &Place, found: &Found) -> Vec<u64> {
        let mut ids = FxHashSet::default();
        let has_ids = self.program.layout == Layout::V23;
        found
            .cells
            .values()
            .filter(|cell| self.is_live(owner, cell))
            // A cell is put together on the stack, where a copy may stay: it has
            // no neighbours, and the id of another.
            .filter(|cell| place.is_sharded() || (cell.prev, cell.next) != (0, 0))
            .filter(|cell| !has_ids || ids.insert(cell.id))
            .map(|cell| cell.addr)
            .collect()
    }

    /// Whether a task is of a list, by its own words, and has not ended.
    fn is_live(&self, owner: &Owner, cell: &Cell) -> bool {
        cell.owner == owner.id
            && (self.program.layout != Layout::V23 || cell.scheduler == owner.scheduler)
            && !cell.is(state::COMPLETE)
    }

    /// Whether a live task with the list's id is not in it: then the place is
    /// another one, that looks like a list. A list that counts its tasks needs no
    /// such proof.
    fn lacks(
        &self,
        owner: &Owner,
        place: &Place,
        members: &[u64],
        found: &mut Found,
    ) -> Result<bool, Refusal> {
        if place.is_sharded() {
            return Ok(false);
        }
        let members: FxHashSet<u64> = members.iter().copied().collect();
        let strays: Vec<Cell> = self
            .alive(owner, place, found)
            .iter()
            .filter(|addr| !members.contains(addr))
            .filter_map(|addr| found.cells.get(addr).copied())
            .collect();
        for stray in strays {
            // It may have ended since, or be put into the list just now.
            for attempt in 0.. {
                let now = self.reader().known(&[(stray.addr, stray.vtable)])?;
                let now = now[0].filter(|cell| cell.id == stray.id && self.is_live(owner, cell));
                let Some(now) = now else {
                    break;
                };
                let around = self.reader().unknown(&[now.prev, now.next])?;
                let is_linked = around[0].is_some_and(|cell| cell.next == now.addr)
                    || around[1].is_some_and(|cell| cell.prev == now.addr);
                if !is_linked {
                    break;
                }
                if attempt == RETRIES {
                    return Ok(true);
                }
                let Some(heads) = place.read(&self.memory, owner.id)? else {
                    return Ok(true);
                };
                found.add(vec![Some(now)]);
                self.follow(owner, &heads, found)?;
                let (members, _) = self::members(owner, &heads, found);
                if members.contains(&stray.addr) {
                    break;
                }
            }
        }
        Ok(false)
    }

    /// Reads what the lists lead to and is not known.
    fn follow(&self, owner: &Owner, heads: &Heads, found: &mut Found) -> Result<(), Refusal> {
        let mut next: Vec<u64> = heads.ends.iter().map(|ends| ends.head).collect();
        let mut seen: FxHashSet<u64> = FxHashSet::default();
        let mut steps = 0;
        while !next.is_empty() && steps < MAX_STEPS && found.cells.len() < MAX_TASKS {
            // Along what is known as far as it goes.
            let mut unknown = Vec::new();
            for start in next.drain(..) {
                let mut at = start;
                while at != 0 && seen.insert(at) {
                    match found.cells.get(&at) {
                        Some(cell) if cell.owner == owner.id => at = cell.next,
                        Some(_) => break,
                        None => {
                            unknown.push(at);
                            break;
                        }
                    }
                }
            }
            if unknown.is_empty() {
                break;
            }
            let cells = self.reader().unknown(&unknown)?;
            next.extend(
                cells
                    .iter()
                    .flatten()
                    .filter(|cell| cell.owner == owner.id)
                    .map(|cell| cell.next),
            );
            found.add(cells);
            steps += 1;
        }
        Ok(())
    }

    /// The tasks of a list that was not found itself: each has a neighbour on
    /// either side, or is at an end.
    fn walk_links(&self, owner: &Owner, found: &mut Found) -> Result<Option<List>, Refusal> {
        let is_member = |cell: &Cell| self.is_live(owner, cell);
        for _ in 0..MAX_STEPS {
            let unknown: Vec<u64> = found
                .cells
                .values()
                .filter(|cell| is_member(cell))
                .flat_map(|cell| [cell.prev, cell.next])
                .filter(|addr| *addr != 0 && !found.cells.contains_key(addr))
                .collect();
            if unknown.is_empty() {
                break;
            }
            let cells = self.reader().unknown(&unknown)?;
            let mut any = false;
            for cell in cells.iter().flatten().filter(|cell| is_member(cell)) {
                any |= found.cells.insert(cell.addr, *cell).is_none();
            }
            if !any {
                break;
            }
        }
        let linked = |cell: &Cell| {
            let cells = &found.cells;
            let back = |addr: u64, towards: fn(&Cell) -> u64| {
                addr == 0
                    || cells
                        .get(&addr)
                        .is_some_and(|other| is_member(other) && towards(other) == cell.addr)
            };
            back(cell.prev, |prev| prev.next) && back(cell.next, |next| next.prev)
        };
        let members: Vec<&Cell> = found
            .cells
            .values()
            .filter(|cell| is_member(cell))
            .collect();
        let unstable = members.iter().filter(|cell| !linked(cell)).count() as u64;
        let members: Vec<u64> = members.iter().map(|cell| cell.addr).collect();
        // From 1.38 on every list is where it is looked for. What looks like the only
        // task of another is what was left of one somewhere.
        let old = self
            .program
            .version
            .is_some_and(|version| version.minor < 38);
        if members.is_empty() || (members.len() == 1 && !old) {
            return Ok(None);
        }
        let list = List {
            id: owner.id,
            tasks: members.len() as u64,
            counted: None,
        };
        found.unstable += unstable;
        found.alive.extend(members);
        Ok(Some(list))
    }

    fn site(&mut self, cell: &Cell) -> SiteId {
        self.site_of(cell.vtable, cell.location)
    }

    /// The site of the tasks of a vtable that were spawned at `location`.
    pub(super) fn site_of(&mut self, vtable: u32, location: u64) -> SiteId {
        let name = Arc::clone(&self.program.names()[vtable as usize]);
        let entry = self.bias.runtime(name.poll).0;
        let mut key = SiteKey {
            created_at: location,
            entry,
        };
        if let Some(id) = self.site_ids.get(&key) {
            return *id;
        }
        if self.sites.len() >= MAX_SITES {
            key = SiteKey {
                created_at: 0,
                entry: 0,
            };
            if let Some(id) = self.site_ids.get(&key) {
                return *id;
            }
        }
        let frame = Frame {
            function: Arc::clone(&name.function),
            file: Arc::clone(&name.file),
            line: name.line,
            pc: entry,
            offset: 0,
            entry,
            inlined: false,
            hidden: false,
        };
        let id = SiteId(self.sites.len() as u32);
        Arc::make_mut(&mut self.sites).push(Site {
            key,
            entry: Some(frame.clone()),
            created_by: None,
            doubt: name.doubt.clone(),
        });
        self.site_ids.insert(key, id);
        let stack = StackId(self.stacks.len() as u32);
        Arc::make_mut(&mut self.stacks).push(Stack {
            frames: vec![frame],
            place: Some(0),
        });
        self.stack_of.push(Some(stack));
        id
    }

    fn stack(&self, site: SiteId) -> Option<StackId> {
        self.stack_of.get(site.0 as usize).copied().flatten()
    }
}

impl Found {
    fn add(&mut self, cells: Vec<Option<Cell>>) {
        for cell in cells.into_iter().flatten() {
            self.cells.insert(cell.addr, cell);
        }
    }
}

/// The circles in which each of `starts` leads to the next, which is 0 where it
/// leads to none; each circle from its lowest member on.
fn circles(starts: impl Iterator<Item = u64>, next: impl Fn(u64) -> u64) -> Vec<Vec<u64>> {
    let mut circles = Vec::new();
    // From which start each was first met.
    let mut met: FxHashMap<u64, u64> = FxHashMap::default();
    for start in starts {
        let mut at = start;
        while at != 0 && !met.contains_key(&at) {
            met.insert(at, start);
            at = next(at);
        }
        if at == 0 || met.get(&at) != Some(&start) || circles.len() >= MAX_CYCLES {
            continue;
        }
        let members = std::iter::successors(Some(at), |member| Some(next(*member)));
        let rest = members.skip(1).take_while(|member| *member != at);
        let mut circle: Vec<u64> = std::iter::once(at).chain(rest).take(MAX_CYCLE).collect();
        let lowest = (0..circle.len()).min_by_key(|index| circle[*index]);
        circle.rotate_left(lowest.unwrap_or(0));
        circles.push(circle);
    }
    circles.sort_unstable();
    circles
}

/// The tasks in the lists, and how many links do not hold.
fn members(owner: &Owner, heads: &Heads, found: &Found) -> (Vec<u64>, u64) {
    let mut members = Vec::new();
    let mut seen = FxHashSet::default();
    let mut broken = 0;
    for ends in &heads.ends {
        let mut before = 0;
        let mut at = ends.head;
        while at != 0 {
            let cell = found.cells.get(&at);
            let Some(cell) = cell.filter(|cell| cell.owner == owner.id && seen.insert(at)) else {
                broken += 1;
                break;
            };
            broken += u64::from(cell.prev != before);
            members.push(at);
            before = at;
            at = cell.next;
        }
        broken += u64::from(at == 0 && before != ends.tail);
    }
    (members, broken)
}

/// A closure on a blocking thread: it is in no list.
fn is_blocking(cell: &Cell) -> bool {
    cell.owner == 0 && !cell.is(state::COMPLETE)
}

fn state_of(cell: &Cell) -> State {
    if cell.is(state::COMPLETE) {
        State::Complete
    } else if cell.is(state::RUNNING) {
        State::Running
    } else if cell.is(state::NOTIFIED) {
        State::Scheduled
    } else {
        State::Idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles_of_tasks_that_await_each_other() {
        // 1 awaits 2 and 2 awaits 1; 5 awaits 6, 6 awaits 7, 7 awaits 5; 3 awaits
        // one of them, 4 awaits 8, which awaits nobody; 9 awaits itself.
        let next = |addr: u64| match addr {
            1 => 2,
            2 | 3 => 1,
            4 => 8,
            5 => 6,
            6 => 7,
            7 => 5,
            9 => 9,
            _ => 0,
        };
        for starts in [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]] {
            let circles = circles(starts.into_iter(), next);
            assert_eq!(circles, [vec![1, 2], vec![5, 6, 7], vec![9]]);
        }
    }
}
