//! Watches every process of the machine by censuses alone: nothing is attached
//! to any of them.
//!
//! Each refresh takes one look at `/proc/PID/stat` of every process, and a
//! census of each runtime in those that have one. What that may cost is
//! bounded: a process whose census takes long is read less often, so that all of
//! them together stay within [`SHARE`] of one core.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::leak::{History, Verdict};
use crate::probe::ProcessEvent;
use crate::process::discovery::{self, Filter, Glance, Incarnation};
use crate::process::identity::Process;
use crate::report::overview::{Overview, Row, RuntimeRow};
use crate::runtime::{self, Cache, Found, Kind, Refusal, Tasks};
use crate::task::merge;
use crate::watch::KernelSide;

/// Share of one core that the censuses of all processes may take.
const SHARE: f64 = 0.012;

/// Processes that are opened at once: opening waits for files and memory.
const OPENERS: usize = 2;

/// How the machine is watched.
#[derive(Clone)]
pub struct Options {
    /// Which processes.
    pub filter: Filter,
    /// Look at what each thread does, too; otherwise they are counted.
    pub all_runtimes: bool,
    /// What tells the registers of threads.
    pub kernel: Arc<KernelSide>,
}

/// Every process that is wanted.
pub struct System {
    options: Options,
    cache: Arc<Cache>,
    started: Instant,
    entries: BTreeMap<u32, Entry>,
    /// Names of users, by id.
    users: BTreeMap<u32, Arc<str>>,
    /// Processes that came and went since the first look.
    came: u64,
    went: u64,
    /// The kernel tells of these; otherwise a look finds those that stay until
    /// the next.
    told: bool,
}

/// One process.
struct Entry {
    incarnation: Incarnation,
    /// Wanted by the filter.
    wanted: bool,
    name: String,
    command: String,
    uid: u32,
    cgroup: Option<String>,
    threads: u64,
    first_threads: u64,
    since: Instant,
    state: State,
}

enum State {
    /// Not looked into yet.
    New,
    /// It has no runtime but the kernel's, or none that is read.
    Plain,
    /// It may not be looked into.
    Closed(String),
    /// It has runtimes that are read.
    Open(Box<Open>),
}

struct Open {
    process: Process,
    runtimes: Vec<Opened>,
    /// When it was read last, and how long that took.
    read_at: Option<Instant>,
    took: Duration,
}

struct Opened {
    kind: Kind,
    state: Result<Reading, String>,
}

struct Reading {
    tasks: Box<dyn Tasks>,
    history: History,
    first: Option<(Instant, u64)>,
    row: RuntimeRow,
    verdict: Option<Verdict>,
}

impl System {
    /// Nothing looked at yet.
    pub fn new(options: Options) -> System {
        System {
            options,
            cache: Arc::new(Cache::default()),
            started: Instant::now(),
            entries: BTreeMap::new(),
            users: BTreeMap::new(),
            came: 0,
            went: 0,
            told: false,
        }
    }

    /// Takes in what the kernel tells of processes, instead of finding it out:
    /// those that are gone go at once, and those that run another program are
    /// looked into at once.
    pub fn take(&mut self, events: &[ProcessEvent]) {
        self.told = true;
        let mut new = false;
        for event in events {
            match *event {
                ProcessEvent::Fork(_) => self.came += 1,
                ProcessEvent::Exit(pid) => {
                    self.went += 1;
                    self.entries.remove(&pid);
                }
                ProcessEvent::Exec(pid) => {
                    self.entries.remove(&pid);
                    if let Some(glance) = discovery::glance(pid) {
                        self.entries.insert(pid, Entry::new(glance));
                        new = true;
                    }
                }
            }
        }
        if new {
            self.open_new();
        }
    }

    /// Looks at every process again, and reads what is due, for the table of
    /// every `interval`.
    ///
    /// # Errors
    /// `/proc` cannot be listed.
    pub fn refresh(&mut self, interval: Duration) -> io::Result<Overview> {
        let at = SystemTime::now();
        self.look()?;
        self.open_new();
        self.read(interval);
        Ok(self.overview(at))
    }

    /// Takes in who came, went, or runs another program now.
    fn look(&mut self) -> io::Result<()> {
        let glances = discovery::glances()?;
        let first = self.entries.is_empty();
        let mut before = std::mem::take(&mut self.entries);
        for glance in glances {
            let entry = match before.remove(&glance.pid) {
                Some(mut entry) if entry.incarnation == glance.incarnation => {
                    entry.threads = glance.threads;
                    entry
                }
                known => {
                    let other = known.is_none_or(|known| {
                        known.incarnation.start_time != glance.incarnation.start_time
                    });
                    self.came += u64::from(other && !first && !self.told);
                    Entry::new(glance.clone())
                }
            };
            self.entries.insert(glance.pid, entry);
        }
        if !self.told {
            self.went += before.len() as u64;
        }
        Ok(())
    }

    /// Finds the runtimes of the processes that are new.
    fn open_new(&mut self) {
        let new: Vec<u32> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.state, State::New))
            .map(|(pid, _)| *pid)
            .collect();
        if new.is_empty() {
            return;
        }
        let queue = Mutex::new(new.into_iter());
        let (send, opened) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..OPENERS {
                let send = send.clone();
                let queue = &queue;
                let cache = &*self.cache;
                let options = &self.options;
                scope.spawn(move || {
                    let next = || {
                        // A panic leaves the queue as it was.
                        queue.lock().unwrap_or_else(PoisonError::into_inner).next()
                    };
                    while let Some(pid) = next() {
                        // Nobody has gone away: the receiver is this thread's
                        // parent.
                        let _ = send.send((pid, Opening::of(pid, options, cache)));
                    }
                });
            }
        });
        drop(send);
        for (pid, opening) in opened {
            let Some(entry) = self.entries.get_mut(&pid) else {
                continue;
            };
            match opening {
                Some(opening) => {
                    entry.wanted = opening.wanted;
                    entry.uid = opening.uid;
                    entry.cgroup = opening.cgroup;
                    entry.command = opening.command;
                    if let Some(name) = opening.name {
                        entry.name = name;
                    }
                    entry.state = opening.state;
                }
                // It is gone, or has changed: the next look tells.
                None => entry.wanted = false,
            }
        }
    }

    /// Takes the censuses that are due.
    fn read(&mut self, interval: Duration) {
        let open = |entry: &&mut Entry| entry.wanted && matches!(entry.state, State::Open(_));
        let number = self.entries.values_mut().filter(open).count();
        // What one process may take of a core.
        let share = SHARE / number.max(1) as f64;
        for entry in self.entries.values_mut().filter(open) {
            let State::Open(open) = &mut entry.state else {
                continue;
            };
            let period = open.took.div_f64(share).max(interval);
            // Half an interval early is nearer than half an interval late.
            let due = open
                .read_at
                .is_none_or(|at| at.elapsed() + interval / 2 >= period);
            if due && let Err(refusal) = open.read(self.started) {
                match refusal.ends_the_watch() {
                    // It is gone, or runs another program: the next look tells.
                    true => entry.wanted = false,
                    false => entry.state = State::Closed(refusal.to_string()),
                }
            }
        }
    }

    fn overview(&mut self, at: SystemTime) -> Overview {
        let mut rows = Vec::new();
        let mut read_every = Duration::ZERO;
        for (pid, entry) in &self.entries {
            if !entry.wanted {
                continue;
            }
            let user = self
                .users
                .entry(entry.uid)
                .or_insert_with(|| discovery::user_name(entry.uid).into());
            let minutes = entry.since.elapsed().as_secs_f64() / 60.0;
            let mut row = Row {
                pid: *pid,
                start_time: entry.incarnation.start_time,
                user: Arc::clone(user),
                name: entry.name.clone(),
                command: entry.command.clone(),
                cgroup: entry.cgroup.clone(),
                threads: entry.threads,
                threads_per_minute: (minutes > 0.0)
                    .then(|| (entry.threads as f64 - entry.first_threads as f64) / minutes),
                runtimes: Vec::new(),
                not_read: None,
                verdict: None,
            };
            match &entry.state {
                State::New | State::Plain => {}
                State::Closed(why) => row.not_read = Some(why.clone()),
                State::Open(open) => {
                    if let Some(at) = open.read_at {
                        read_every = read_every.max(at.elapsed());
                    }
                    for opened in &open.runtimes {
                        match &opened.state {
                            Ok(reading) => {
                                row.runtimes.push(reading.row.clone());
                                let verdict = reading.verdict.as_ref();
                                if verdict.map(|verdict| verdict.kind)
                                    > row.verdict.as_ref().map(|verdict| verdict.kind)
                                {
                                    row.verdict = verdict.cloned();
                                }
                            }
                            Err(why) => {
                                row.not_read = Some(format!("{}: {why}", opened.kind.tasks()));
                            }
                        }
                    }
                }
            }
            rows.push(row);
        }
        Overview::new(
            at,
            self.started.elapsed(),
            rows,
            (self.came, self.went),
            read_every,
        )
    }
}

impl Entry {
    fn new(glance: Glance) -> Entry {
        Entry {
            incarnation: glance.incarnation,
            wanted: true,
            name: glance.name,
            command: String::new(),
            uid: 0,
            cgroup: None,
            threads: glance.threads,
            first_threads: glance.threads,
            since: Instant::now(),
            state: State::New,
        }
    }
}

/// What the first look into a process finds.
struct Opening {
    wanted: bool,
    uid: u32,
    name: Option<String>,
    command: String,
    cgroup: Option<String>,
    state: State,
}

impl Opening {
    /// `None` when the process is gone.
    fn of(pid: u32, options: &Options, cache: &Cache) -> Option<Opening> {
        let process = match Process::open(pid) {
            Ok(process) => process,
            Err(error) => {
                let glance = discovery::glance(pid)?;
                let uid = discovery::uid_of(pid)?;
                let cgroup = discovery::cgroup(pid);
                let wanted = options
                    .filter
                    .wants(&[&glance.name], uid, || cgroup.clone());
                return Some(Opening {
                    wanted,
                    uid,
                    name: None,
                    command: String::new(),
                    cgroup,
                    state: State::Closed(error.to_string()),
                });
            }
        };
        let identity = &process.identity;
        let uid = identity.uid;
        let cgroup = discovery::cgroup(pid);
        let comm = discovery::glance(pid)?.name;
        let file = identity.executable.file_name().unwrap_or_default();
        let file = file.to_string_lossy().into_owned();
        let name = file.strip_suffix(" (deleted)").unwrap_or(&file).to_owned();
        let wanted = options
            .filter
            .wants(&[&name, &comm], uid, || cgroup.clone());
        let command = identity.command_line.join(" ");
        let state = match wanted {
            false => State::Plain,
            true => open(process, options, cache)?,
        };
        Some(Opening {
            wanted,
            uid,
            name: Some(name),
            command,
            cgroup,
            state,
        })
    }
}

/// Opens the runtimes of a process; `None` when it is gone.
fn open(process: Process, options: &Options, cache: &Cache) -> Option<State> {
    let mut runtimes = Vec::new();
    for Found { kind, tasks } in runtime::open(&process, cache) {
        if kind == Kind::Threads && !options.all_runtimes {
            continue;
        }
        let state = match tasks {
            Ok(mut tasks) => {
                let kernel = Arc::clone(&options.kernel);
                tasks.use_registers(Box::new(move |pid| kernel.registers(pid)));
                let row = RuntimeRow {
                    name: kind.name(),
                    tasks: kind.tasks(),
                    version: tasks.version(),
                    ..RuntimeRow::default()
                };
                let reading = Reading {
                    tasks,
                    history: History::new(),
                    first: None,
                    row,
                    verdict: None,
                };
                Ok(reading)
            }
            Err(Refusal::Memory(error)) => return Some(State::Closed(error.to_string())),
            Err(refusal) => Err(refusal.to_string()),
        };
        runtimes.push(Opened { kind, state });
    }
    Some(match runtimes.is_empty() {
        true => State::Plain,
        false => State::Open(Box::new(Open {
            process,
            runtimes,
            read_at: None,
            took: Duration::ZERO,
        })),
    })
}

impl Open {
    /// A census of every runtime.
    fn read(&mut self, started: Instant) -> Result<(), Refusal> {
        let now = Instant::now();
        for opened in &mut self.runtimes {
            let Ok(reading) = &mut opened.state else {
                continue;
            };
            match reading.read(now, started) {
                Ok(()) => {}
                Err(refusal) if refusal.ends_the_watch() => return Err(refusal),
                Err(refusal) => opened.state = Err(refusal.to_string()),
            }
        }
        self.process.still_runs()?;
        self.read_at = Some(now);
        self.took = now.elapsed();
        Ok(())
    }
}

impl Reading {
    fn read(&mut self, now: Instant, started: Instant) -> Result<(), Refusal> {
        let population = self.tasks.population(None)?;
        let sites = merge(&population, None, self.tasks.classify());
        self.history.observe(now.duration_since(started), &sites);
        self.verdict = None;
        for site in &sites {
            let verdict = self.history.judge(site);
            if verdict.as_ref().map(|verdict| verdict.kind)
                > self.verdict.as_ref().map(|verdict| verdict.kind)
            {
                self.verdict = verdict;
            }
        }
        let (first_at, first) = *self.first.get_or_insert((now, population.count));
        let minutes = now.duration_since(first_at).as_secs_f64() / 60.0;
        let row = &mut self.row;
        row.live = population.count;
        row.blocked = sites.iter().map(|site| site.blocked).sum();
        row.oldest = sites.iter().filter_map(|site| site.oldest).max();
        row.per_minute =
            (minutes > 0.0).then(|| (population.count as f64 - first as f64) / minutes);
        row.deadlocks = population.cycles.len() as u64;
        Ok(())
    }
}
