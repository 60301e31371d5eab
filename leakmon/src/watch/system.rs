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

use crate::probe::ProcessEvent;
use crate::process::discovery::{self, Filter, Glance, Incarnation};
use crate::process::identity::Process;
use crate::report::overview::{Overview, Row, RuntimeRow};
use crate::report::{Report, RuntimeReport};
use crate::runtime::{Cache, Refusal};
use crate::task::Tier;

use super::{KernelSide, Watch};

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
    watch: Watch,
    /// When it was read last, and how long that took.
    read_at: Option<Instant>,
    took: Duration,
    /// What was read last.
    report: Option<Report>,
    /// Live tasks when each runtime was first read, and when that was.
    first: BTreeMap<&'static str, (Instant, u64)>,
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
            if due && let Err(refusal) = open.read() {
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
                    open.describe(&mut row);
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
            true => open(process, options, cache),
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

/// Begins to watch a process, by its census alone.
fn open(process: Process, options: &Options, cache: &Cache) -> State {
    let options_of_watch = super::Options {
        tier: Some(Tier::Census),
        once: false,
        max_overhead: 0.0,
        all_runtimes: options.all_runtimes,
        threads: options.all_runtimes,
        highest: Tier::Census,
    };
    let kernel = Arc::clone(&options.kernel);
    match Watch::open(process, options_of_watch, kernel, cache) {
        Ok(watch) if watch.is_empty() => State::Plain,
        Ok(watch) => State::Open(Box::new(Open {
            watch,
            read_at: None,
            took: Duration::ZERO,
            report: None,
            first: BTreeMap::new(),
        })),
        Err(refusal) => State::Closed(refusal.to_string()),
    }
}

impl Open {
    /// A census of every runtime.
    fn read(&mut self) -> Result<(), Refusal> {
        let now = Instant::now();
        let report = self.watch.observe()?;
        self.read_at = Some(now);
        self.took = now.elapsed();
        for RuntimeReport { runtime, tasks } in &report.runtimes {
            if let Ok(tasks) = tasks {
                self.first.entry(runtime.name).or_insert((now, tasks.count));
            }
        }
        self.report = Some(report);
        Ok(())
    }

    /// Puts what was read into the process's row.
    fn describe(&self, row: &mut Row) {
        let runtimes = self.report.iter().flat_map(|report| &report.runtimes);
        for RuntimeReport { runtime, tasks } in runtimes {
            let tasks = match tasks {
                Ok(tasks) => tasks,
                Err(why) => {
                    row.not_read = Some(format!("{}: {why}", runtime.tasks));
                    continue;
                }
            };
            let since = self.first.get(runtime.name).zip(self.read_at);
            let per_minute = since.and_then(|((first_at, first), read_at)| {
                let minutes = read_at.duration_since(*first_at).as_secs_f64() / 60.0;
                (minutes > 0.0).then(|| (tasks.count as f64 - *first as f64) / minutes)
            });
            let sites = || tasks.sites.iter().map(|site| &site.state);
            row.runtimes.push(RuntimeRow {
                name: runtime.name,
                tasks: runtime.tasks,
                version: runtime.version.clone(),
                live: tasks.count,
                blocked: sites().map(|site| site.blocked).sum(),
                oldest: sites().filter_map(|site| site.oldest).max(),
                per_minute,
                deadlocks: tasks.cycles.len() as u64,
            });
            let verdicts = tasks.suspects().filter_map(|site| site.verdict.as_ref());
            for verdict in verdicts {
                if row
                    .verdict
                    .as_ref()
                    .is_none_or(|known| known.kind < verdict.kind)
                {
                    row.verdict = Some(verdict.clone());
                }
            }
        }
    }
}
