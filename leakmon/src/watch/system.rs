//! Watches every process of the machine, as closely as rules say: by censuses
//! alone, where nothing else is asked for.
//!
//! Each refresh takes one look at `/proc/PID/stat` of every process, and a
//! census of each runtime in those that have one. What that may cost is
//! bounded: a process whose census takes long is read less often, so that all of
//! them together stay within [`SHARE`] of one core.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::probe::ProcessEvent;
use crate::process::container::Placement;
use crate::process::discovery::{self, Glance, Incarnation};
use crate::process::environment::Environment;
use crate::process::identity::Process;
use crate::report::overview::{Overview, Row, RuntimeRow};
use crate::report::{Report, RuntimeReport};
use crate::runtime::{Cache, Kind, Refusal};
use crate::task::Tier;

use super::rules::{Candidate, Depth, Depths, Rule};
use super::{KernelSide, Watch};

/// Share of one core that the censuses of all processes may take.
const SHARE: f64 = 0.008;

/// Processes that are opened at once: opening waits for files and memory.
const OPENERS: usize = 2;

/// Time of a refresh that may be spent on attaching probes: the kernel takes its
/// time for each process.
const ATTACHING: Duration = Duration::from_millis(200);

/// A process that does not run its program for so long, or for a third of the
/// interval, is counted, and not looked into: it would be gone before it is read
/// twice.
const SHORT: Duration = Duration::from_secs(1);

/// Longest time from a process's first reading to its second, unless the interval
/// is longer: only the second tells how long one takes.
const SECOND_READING: Duration = Duration::from_secs(30);

/// Points of a process's past that are kept, and the time between them: an hour.
const PAST: usize = 60;
const PAST_EVERY: Duration = Duration::from_secs(60);

/// How the machine is watched.
#[derive(Clone)]
pub struct Options {
    /// Which processes, and how closely: the first that fits decides.
    pub rules: Vec<Rule>,
    /// What is done with those that none fits.
    pub otherwise: Depth,
    /// What probes may cost a process, in percent of its CPU time.
    pub max_overhead: f64,
    /// Read the service's name and attributes in the processes' environments.
    pub otel_environment: bool,
    /// Look at what each thread does, too; otherwise they are counted.
    pub all_runtimes: bool,
    /// What tells the registers of threads.
    pub kernel: Arc<KernelSide>,
}

impl Options {
    /// What process `pid` says of itself, as far as that is wanted.
    fn environment(&self, pid: u32) -> Environment {
        match self.otel_environment {
            true => Environment::of(pid),
            false => Environment::default(),
        }
    }
}

/// Every process that is wanted.
pub struct System {
    options: Options,
    cache: Arc<Cache>,
    started: Instant,
    started_at: SystemTime,
    /// Words of the kernel that were lost.
    lost: u64,
    entries: BTreeMap<u32, Entry>,
    /// Names of users, by id.
    users: BTreeMap<u32, Arc<str>>,
    /// Processes that came and went since the first look.
    came: u64,
    went: u64,
    /// The kernel tells of these; otherwise a look finds those that stay until
    /// the next.
    told: bool,
    /// How long a process runs its program before it is looked into.
    short: Duration,
}

/// Everything that is known at one moment, for exports.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Wall clock.
    pub at: SystemTime,
    /// The processes that are watched, by pid.
    pub processes: Vec<ProcessSnapshot>,
    /// Processes of the machine that came and that went since the watch began.
    pub came: u64,
    /// See `came`.
    pub went: u64,
    /// What leakmon itself uses; `None` where `/proc` does not tell.
    pub own: Option<Own>,
    /// Since the watch began.
    pub elapsed: Duration,
    /// Wall clock when the watch began: the same in every snapshot.
    pub started_at: SystemTime,
    /// When this was taken, on a clock that does not jump.
    pub taken: Instant,
    /// Events of processes that the kernel had no room for.
    pub lost: u64,
    /// The longest time since a process was read.
    pub oldest_reading: Duration,
}

impl Snapshot {
    /// What the table shows of it.
    pub fn overview(&self) -> Overview {
        let rows = self.processes.iter().map(|process| process.row.clone());
        Overview::new(
            self.at,
            self.elapsed,
            rows.collect(),
            (self.came, self.went),
            self.oldest_reading,
        )
    }
}

/// What leakmon itself uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// CPU time so far.
    pub cpu: Duration,
    /// Resident memory, in bytes.
    pub resident: u64,
}

/// One process in a [`Snapshot`].
#[derive(Clone, Debug)]
pub struct ProcessSnapshot {
    /// What the table shows of it.
    pub row: Row,
    /// Who runs it.
    pub placement: Placement,
    /// What it is called as a service: by its own environment, its pod's container,
    /// or systemd's unit.
    pub service: Option<String>,
    /// Attributes that it says of itself.
    pub attributes: Vec<(String, String)>,
    /// How closely it is watched.
    pub depth: Depth,
    /// Wall clock since which what only grows is counted.
    pub counted_since: SystemTime,
    /// What was read of it last; `None` when nothing is read but its threads.
    pub report: Option<Arc<Report>>,
    /// Live tasks over the last hour, the oldest first.
    pub past: Vec<Past>,
}

/// Live tasks of a process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Past {
    /// Wall clock.
    pub at: SystemTime,
    /// Threads.
    pub threads: u64,
    /// Goroutines and tokio tasks.
    pub tasks: u64,
}

/// One process.
struct Entry {
    incarnation: Incarnation,
    /// How closely it is watched at what age.
    depths: Depths,
    /// It was found gone or changed: the next look tells.
    lost: bool,
    placement: Placement,
    environment: Environment,
    counted_since: SystemTime,
    past: VecDeque<Past>,
    /// It is not watched at its age, and was not looked into for that.
    skipped: bool,
    /// When it is looked into at the earliest.
    not_before: Option<Instant>,
    name: String,
    path: String,
    command: String,
    uid: u32,
    cgroup: Option<String>,
    threads: u64,
    first_threads: u64,
    since: Instant,
    /// Its threads were counted since it was first seen.
    looked_again: bool,
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
    depth: Depth,
    /// How often it was read.
    readings: u64,
    /// When it was read last, and how long that took.
    read_at: Option<Instant>,
    took: Duration,
    /// What was read last.
    report: Option<Arc<Report>>,
    /// Live tasks when each runtime was first read, and when that was.
    first: BTreeMap<&'static str, (Instant, u64)>,
}

impl System {
    /// Nothing looked at yet.
    pub fn new(options: Options) -> System {
        System::sharing(options, Arc::new(Cache::default()))
    }

    /// The same, with what others have found in programs.
    pub fn sharing(options: Options, cache: Arc<Cache>) -> System {
        System {
            options,
            cache,
            started: Instant::now(),
            started_at: SystemTime::now(),
            lost: 0,
            entries: BTreeMap::new(),
            users: BTreeMap::new(),
            came: 0,
            went: 0,
            told: false,
            short: SHORT,
        }
    }

    /// Takes in what the kernel tells of processes, instead of finding it out:
    /// those that are gone go at once, and those that run another program are
    /// looked into as soon as they have done so for a while.
    pub fn take(&mut self, events: &[ProcessEvent]) {
        self.told = true;
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
                        let entry = Entry {
                            not_before: Some(Instant::now() + self.short),
                            ..Entry::new(glance)
                        };
                        self.entries.insert(pid, entry);
                    }
                }
            }
        }
        self.open_new();
    }

    /// The kernel had no room for so many events: who came and went is not all
    /// counted.
    pub fn lose(&mut self, events: u64) {
        self.lost += events;
    }

    /// The kernel tells no more: who comes and goes is found by looking.
    pub fn untold(&mut self) {
        self.told = false;
    }

    /// Looks at every process again, and reads what is due, for the table of
    /// every `interval`.
    ///
    /// # Errors
    /// `/proc` cannot be listed.
    pub fn refresh(&mut self, interval: Duration) -> io::Result<()> {
        self.short = SHORT.max(interval / 3);
        self.look()?;
        self.open_new();
        self.deepen();
        self.read(interval);
        self.remember();
        Ok(())
    }

    /// Other rules from now on. Processes that they treat as before are watched on
    /// as before.
    pub fn set_options(&mut self, options: Options) {
        let before = std::mem::replace(&mut self.options, options);
        let options = &self.options;
        for (pid, entry) in &mut self.entries {
            if let Some(depths) = entry.judge(*pid, options) {
                entry.depths = depths;
            }
            if before.otel_environment != options.otel_environment {
                entry.environment = options.environment(*pid);
            }
            if before.max_overhead != options.max_overhead
                && let State::Open(open) = &mut entry.state
            {
                // What is attached comes again, with the other budget.
                open.watch.reach(Tier::Census, options.max_overhead);
                open.depth = Depth::Census;
            }
        }
    }

    /// Watches each process as closely as its age and the rules say.
    fn deepen(&mut self) {
        let started = Instant::now();
        for (pid, entry) in &mut self.entries {
            let depth = entry.depth();
            match &mut entry.state {
                State::Open(_) if depth == Depth::Off => {
                    entry.skipped = true;
                    entry.state = State::Plain;
                }
                State::Open(open) if open.depth != depth => {
                    if started.elapsed() > ATTACHING {
                        continue;
                    }
                    if let Some(tier) = depth.tier() {
                        open.watch.reach(tier, self.options.max_overhead);
                        open.depth = depth;
                        // What the probes count begins anew.
                        entry.counted_since = SystemTime::now();
                        if let Err(error) = open.watch.attach() {
                            tracing::info!("pid {pid}: {error}");
                        }
                    }
                }
                // It was not watched at this age before.
                State::Plain if depth != Depth::Off && entry.skipped => {
                    entry.skipped = false;
                    entry.state = State::New;
                }
                _ => {}
            }
        }
    }

    /// Keeps what lives now, every so often.
    fn remember(&mut self) {
        let at = SystemTime::now();
        for entry in self.entries.values_mut() {
            let last = entry.past.back().map(|past| past.at);
            let due = last.is_none_or(|last| {
                at.duration_since(last)
                    .is_ok_and(|since| since >= PAST_EVERY)
            });
            if due {
                // All of it at once: an hour later it takes no more memory.
                if entry.past.is_empty() {
                    entry.past.reserve_exact(PAST);
                }
                if entry.past.len() >= PAST {
                    entry.past.pop_front();
                }
                entry.past.push_back(entry.now(at));
            }
        }
    }

    /// Everything that is known now.
    pub fn snapshot(&mut self) -> Snapshot {
        let at = SystemTime::now();
        let rows = self.rows();
        let processes = rows.into_iter().filter_map(|row| {
            let entry = self.entries.get(&row.pid)?;
            let mut past: Vec<Past> = entry.past.iter().copied().collect();
            past.push(entry.now(at));
            Some(ProcessSnapshot {
                service: entry.service(),
                attributes: entry.environment.attributes.clone(),
                placement: entry.placement.clone(),
                depth: entry.depth(),
                counted_since: entry.counted_since,
                report: match &entry.state {
                    State::Open(open) => open.report.clone(),
                    _ => None,
                },
                past,
                row,
            })
        });
        Snapshot {
            at,
            processes: processes.collect(),
            came: self.came,
            went: self.went,
            own: own(),
            elapsed: self.started.elapsed(),
            started_at: self.started_at,
            taken: Instant::now(),
            lost: self.lost,
            oldest_reading: self.oldest_reading(),
        }
    }

    /// Takes in who came, went, or runs another program now.
    fn look(&mut self) -> io::Result<()> {
        let glances = discovery::glances()?;
        let first = self.entries.is_empty();
        let mut before = std::mem::take(&mut self.entries);
        for glance in glances {
            let entry = match before.remove(&glance.pid) {
                Some(mut entry) if entry.incarnation == glance.incarnation && !entry.lost => {
                    entry.threads = glance.threads;
                    entry.looked_again = true;
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
        let now = Instant::now();
        let new: Vec<u32> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.state, State::New))
            .filter(|(_, entry)| entry.not_before.is_none_or(|time| time <= now))
            .map(|(pid, _)| *pid)
            .collect();
        if new.is_empty() {
            return;
        }
        let queue = Mutex::new(new.iter().copied());
        let (send, opened) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..OPENERS.min(new.len()) {
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
                    entry.uid = opening.uid;
                    entry.cgroup = opening.cgroup;
                    entry.placement = opening.placement;
                    entry.environment = opening.environment;
                    entry.command = opening.command;
                    entry.path = opening.path;
                    if let Some(name) = opening.name {
                        entry.name = name;
                    }
                    entry.depths = opening.depths;
                    entry.skipped = opening.skipped;
                    entry.state = opening.state;
                }
                // It is gone, or has changed: the next look tells.
                None => entry.lost = true,
            }
        }
    }

    /// Takes the censuses that are due.
    fn read(&mut self, interval: Duration) {
        let open = |entry: &&mut Entry| !entry.lost && matches!(entry.state, State::Open(_));
        let number = self.entries.values_mut().filter(open).count();
        // What one process may take of a core.
        let share = SHARE / number.max(1) as f64;
        for entry in self.entries.values_mut().filter(open) {
            let State::Open(open) = &mut entry.state else {
                continue;
            };
            let mut period = open.took.div_f64(share);
            if open.readings == 1 {
                // It has the reading of the program's symbols in it.
                period = period.min(SECOND_READING);
            }
            let period = period.max(interval);
            // Half an interval early is nearer than half an interval late.
            let due = open
                .read_at
                .is_none_or(|at| at.elapsed() + interval / 2 >= period);
            if due && let Err(refusal) = open.read() {
                match refusal.ends_the_watch() {
                    // It is gone, or runs another program: the next look tells.
                    true => entry.lost = true,
                    false => entry.state = State::Closed(refusal.to_string()),
                }
            }
        }
    }

    /// Everything that is known now, for the table.
    pub fn overview(&mut self) -> Overview {
        let rows = self.rows();
        Overview::new(
            SystemTime::now(),
            self.started.elapsed(),
            rows,
            (self.came, self.went),
            self.oldest_reading(),
        )
    }

    fn oldest_reading(&self) -> Duration {
        let ages = self
            .entries
            .values()
            .filter_map(|entry| match &entry.state {
                State::Open(open) => Some(open.read_at?.elapsed()),
                _ => None,
            });
        ages.max().unwrap_or_default()
    }

    /// A row for each process that is watched, by pid.
    fn rows(&mut self) -> Vec<Row> {
        let mut rows = Vec::new();
        for (pid, entry) in &self.entries {
            // Of one that was not looked into nobody knows whether it is wanted.
            let unknown = matches!(entry.state, State::New);
            if entry.lost || unknown || entry.depth() == Depth::Off {
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
                threads_per_minute: (entry.looked_again && minutes > 0.0)
                    .then(|| (entry.threads as f64 - entry.first_threads as f64) / minutes),
                runtimes: Vec::new(),
                not_read: None,
                verdict: None,
            };
            match &entry.state {
                State::New | State::Plain => {}
                State::Closed(why) => row.not_read = Some(why.clone()),
                State::Open(open) => open.describe(&mut row),
            }
            rows.push(row);
        }
        rows
    }
}

impl Entry {
    fn new(glance: Glance) -> Entry {
        Entry {
            incarnation: glance.incarnation,
            depths: Depths::default(),
            lost: false,
            skipped: false,
            not_before: None,
            placement: Placement::default(),
            environment: Environment::default(),
            counted_since: SystemTime::now(),
            past: VecDeque::new(),
            name: glance.name,
            path: String::new(),
            command: String::new(),
            uid: 0,
            cgroup: None,
            threads: glance.threads,
            first_threads: glance.threads,
            since: Instant::now(),
            looked_again: false,
            state: State::New,
        }
    }

    /// How closely it is watched now.
    fn depth(&self) -> Depth {
        self.depths.at(self.incarnation.age())
    }

    /// What the rules say of it; `None` before it was looked into.
    fn judge(&self, pid: u32, options: &Options) -> Option<Depths> {
        if matches!(self.state, State::New) {
            return None;
        }
        let comm = discovery::glance(pid)?.name;
        let candidate = Candidate {
            names: &[&self.path, &self.name, &comm],
            uid: self.uid,
            cgroup: self.cgroup.as_deref(),
            container: self.placement.container.as_deref(),
        };
        Some(Depths::of(&options.rules, options.otherwise, candidate))
    }

    fn now(&self, at: SystemTime) -> Past {
        let runtimes = match &self.state {
            State::Open(open) => open.report.as_ref().map(|report| &report.runtimes),
            _ => None,
        };
        let tasks = runtimes
            .into_iter()
            .flatten()
            .filter(|runtime| runtime.runtime.name != Kind::Threads.name())
            .filter_map(|runtime| Some(runtime.tasks.as_ref().ok()?.count));
        Past {
            at,
            threads: self.threads,
            tasks: tasks.sum(),
        }
    }

    fn service(&self) -> Option<String> {
        let environment = self.environment.service.clone();
        environment.or_else(|| self.placement.unit.clone())
    }
}

/// What the first look into a process finds.
struct Opening {
    depths: Depths,
    /// It is not watched at its age, and may be later.
    skipped: bool,
    uid: u32,
    path: String,
    name: Option<String>,
    command: String,
    cgroup: Option<String>,
    placement: Placement,
    environment: Environment,
    state: State,
}

impl Opening {
    /// `None` when the process is gone.
    fn of(pid: u32, options: &Options, cache: &Cache) -> Option<Opening> {
        let glance = discovery::glance(pid)?;
        let cgroup = discovery::cgroup(pid);
        let placement = cgroup.as_deref().map(Placement::of).unwrap_or_default();
        let depths = |names: &[&str], uid| {
            let candidate = Candidate {
                names,
                uid,
                cgroup: cgroup.as_deref(),
                container: placement.container.as_deref(),
            };
            Depths::of(&options.rules, options.otherwise, candidate)
        };
        let process = match Process::open(pid) {
            Ok(process) => process,
            Err(error) => {
                let uid = discovery::uid_of(pid)?;
                return Some(Opening {
                    depths: depths(&[&glance.name], uid),
                    skipped: false,
                    uid,
                    path: String::new(),
                    name: None,
                    command: String::new(),
                    cgroup,
                    placement,
                    environment: Environment::default(),
                    state: State::Closed(error.to_string()),
                });
            }
        };
        let identity = &process.identity;
        let uid = identity.uid;
        let path = identity.executable.to_string_lossy();
        let path = path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned();
        let file = identity.executable.file_name().unwrap_or_default();
        let file = file.to_string_lossy();
        let name = file.strip_suffix(" (deleted)").unwrap_or(&file).to_owned();
        let depths = depths(&[&path, &name, &glance.name], uid);
        let command = identity.command_line.join(" ");
        let environment = options.environment(pid);
        let depth = depths.at(glance.incarnation.age());
        let state = match depth {
            Depth::Off => State::Plain,
            _ => open(process, options, cache),
        };
        Some(Opening {
            skipped: depth == Depth::Off,
            depths,
            uid,
            path,
            name: Some(name),
            command,
            cgroup,
            placement,
            environment,
            state,
        })
    }
}

/// Begins to watch a process, by its census at first.
fn open(process: Process, options: &Options, cache: &Cache) -> State {
    let options_of_watch = super::Options {
        tier: None,
        once: false,
        max_overhead: options.max_overhead,
        all_runtimes: options.all_runtimes,
        threads: options.all_runtimes,
        highest: Tier::Census,
    };
    let kernel = Arc::clone(&options.kernel);
    match Watch::open(process, options_of_watch, kernel, cache) {
        Ok(watch) if watch.is_empty() => State::Plain,
        Ok(watch) => State::Open(Box::new(Open {
            watch,
            depth: Depth::Census,
            read_at: None,
            readings: 0,
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
        self.readings += 1;
        self.took = now.elapsed();
        for RuntimeReport { runtime, tasks } in &report.runtimes {
            if let Ok(tasks) = tasks {
                self.first.entry(runtime.name).or_insert((now, tasks.count));
            }
        }
        self.report = Some(Arc::new(report));
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

/// What leakmon itself has used so far.
fn own() -> Option<Own> {
    let stat = procfs::process::Process::myself().ok()?.stat().ok()?;
    Some(Own {
        cpu: Duration::from_millis((stat.utime + stat.stime) * 1000 / discovery::TICKS),
        resident: stat.rss * procfs::page_size(),
    })
}
