//! Watches one process: a census of each of its runtimes every interval, the
//! probes between, and a report of both.

mod attachment;
pub mod dump;
mod kernel_side;
pub mod rules;
pub mod system;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::leak::History;
use crate::probe::{Error, Tier};
use crate::process::identity::Process;
use crate::process::memory::MemoryError;
use crate::report::{self, Report, RuntimeReport, TierReason, When};
use crate::runtime::{self, Cache, Found, Kind, Refusal, Tasks};

use attachment::{Attachment, Wanted};

pub use kernel_side::KernelSide;

/// Weight in the budget of the threads of a process that has tasks of another
/// runtime: their births and deaths alone are counted, which costs next to
/// nothing.
const LIGHT: f64 = 0.1;

/// How a process is watched.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The tier that was asked for; `None`: the highest that the budget allows.
    pub tier: Option<Tier>,
    /// One census, and no probes.
    pub once: bool,
    /// What the probes of a process may cost it, in percent of its CPU time.
    pub max_overhead: f64,
    /// Watch the threads of a process that has tasks of another runtime as
    /// closely as these.
    pub all_runtimes: bool,
    /// Look at what each thread does; otherwise threads are counted.
    pub threads: bool,
    /// The highest tier that is attached, where the budget decides.
    pub highest: Tier,
}

/// Why a process cannot be watched as was asked for.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// It is gone, or may not be read.
    #[error(transparent)]
    Refusal(#[from] Refusal),
    /// The probes that were asked for cannot be attached.
    #[error("{why}")]
    Probe {
        /// What the kernel said.
        why: String,
        /// For want of a capability.
        not_permitted: bool,
    },
    /// There are no places for the probes that were asked for.
    #[error("{0}")]
    NoPlaces(String),
}

impl From<&Error> for WatchError {
    fn from(error: &Error) -> WatchError {
        WatchError::Probe {
            why: error.to_string(),
            not_permitted: matches!(error, Error::Permission { .. }),
        }
    }
}

/// A process under watch.
pub struct Watch {
    process: Process,
    kernel: Arc<KernelSide>,
    options: Options,
    started: Instant,
    /// When the last report was made.
    last: Option<Instant>,
    runtimes: Vec<Watched>,
}

/// One runtime of a process under watch.
struct Watched {
    runtime: report::Runtime,
    state: Result<Live, String>,
}

/// A runtime whose tasks can be read.
struct Live {
    tasks: Box<dyn Tasks>,
    history: History,
    attachment: Attachment,
}

impl Watch {
    /// Begins to watch `process`: finds its runtimes. Nothing is attached yet.
    ///
    /// # Errors
    /// [`Refusal`], when not even its threads can be seen.
    pub fn open(
        process: Process,
        options: Options,
        kernel: Arc<KernelSide>,
        cache: &Cache,
    ) -> Result<Watch, Refusal> {
        let mut runtimes = Vec::new();
        for Found { kind, tasks } in runtime::open(&process, cache) {
            if kind == Kind::Threads && !options.threads {
                continue;
            }
            let mut runtime = report::Runtime {
                name: kind.name(),
                tasks: kind.tasks(),
                version: String::new(),
            };
            let state = match tasks {
                Ok(mut tasks) => {
                    runtime.version = tasks.version();
                    let kernel = Arc::clone(&kernel);
                    tasks.use_registers(Box::new(move |pid| kernel.registers(pid)));
                    Ok(Live {
                        tasks,
                        history: History::new(),
                        attachment: match options.tier {
                            Some(Tier::Census) => Attachment::None(TierReason::Fixed),
                            None if options.highest == Tier::Census => {
                                Attachment::None(TierReason::Fixed)
                            }
                            _ if options.once => Attachment::None(TierReason::Once),
                            _ => Attachment::Pending,
                        },
                    })
                }
                Err(refusal) if refusal.ends_the_watch() => return Err(refusal),
                Err(refusal) => Err(refusal.to_string()),
            };
            runtimes.push(Watched { runtime, state });
        }
        Ok(Watch {
            process,
            kernel,
            options,
            started: Instant::now(),
            last: None,
            runtimes,
        })
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// When the watch began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Whether there is nothing to be read.
    pub fn is_empty(&self) -> bool {
        self.runtimes.is_empty()
    }

    /// Whether a runtime was found whose tasks cannot be read.
    pub fn is_refused(&self) -> bool {
        self.runtimes.iter().any(|watched| watched.state.is_err())
    }

    /// One interval's report.
    ///
    /// # Errors
    /// [`Refusal`], when the watch is over. What only one runtime lacks is told
    /// in the report.
    pub fn observe(&mut self) -> Result<Report, Refusal> {
        let now = Instant::now();
        let last = self.last.replace(now);
        let when = When {
            at: SystemTime::now(),
            elapsed: now.duration_since(self.started),
            interval: last.map_or(Duration::ZERO, |last| now.duration_since(last)),
        };
        let mut runtimes = Vec::with_capacity(self.runtimes.len());
        for watched in &mut self.runtimes {
            let tasks = match &mut watched.state {
                Ok(live) => match live.observe(when.elapsed, &self.options) {
                    Ok(tasks) => Ok(tasks),
                    Err(refusal) if refusal.ends_the_watch() => return Err(refusal),
                    Err(refusal) => {
                        let reason = refusal.to_string();
                        // Its probes go with it.
                        watched.state = Err(reason.clone());
                        Err(reason)
                    }
                },
                Err(reason) => Err(reason.clone()),
            };
            runtimes.push(RuntimeReport {
                runtime: watched.runtime.clone(),
                tasks,
            });
        }
        self.process.still_runs()?;
        let identity = &self.process.identity;
        Ok(Report {
            when,
            process: report::Process {
                pid: identity.pid,
                start_time: identity.start_time,
                executable: identity.executable.clone(),
                command: identity.command_line.clone(),
            },
            threads: identity.threads().ok_or(MemoryError::Gone)?,
            runtimes,
        })
    }

    /// A look between two reports.
    ///
    /// # Errors
    /// As [`Watch::observe`].
    pub fn sample(&mut self) -> Result<(), Refusal> {
        for watched in &mut self.runtimes {
            let Ok(live) = &mut watched.state else {
                continue;
            };
            match live.tasks.sample() {
                Err(refusal) if refusal.ends_the_watch() => return Err(refusal),
                // The next census finds out whether it lasts.
                Err(_) | Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Lets the budget of `max_overhead` percent go as high as `tier` from now on; what is attached goes, and
    /// comes again with [`Watch::attach`].
    pub fn reach(&mut self, tier: Tier, max_overhead: f64) {
        self.options.highest = tier;
        self.options.max_overhead = max_overhead;
        for live in self
            .runtimes
            .iter_mut()
            .flat_map(|watched| &mut watched.state)
        {
            live.attachment = match tier {
                Tier::Census => Attachment::None(TierReason::Fixed),
                Tier::Lifecycle | Tier::Blocking => Attachment::Pending,
            };
        }
    }

    /// Attaches what was asked for, once; waits for the kernel side.
    ///
    /// # Errors
    /// [`WatchError`], when a tier was asked for and is not to be had. Otherwise
    /// the census goes on, and the reports say why without more.
    pub fn attach(&mut self) -> Result<(), WatchError> {
        let others = self
            .runtimes
            .iter()
            .any(|watched| watched.runtime.name != Kind::Threads.name() && watched.state.is_ok());
        let light = others && !self.options.all_runtimes;
        let live = self.runtimes.iter_mut().filter_map(|watched| {
            let live = watched.state.as_mut().ok()?;
            matches!(live.attachment, Attachment::Pending).then_some(live)
        });
        let mut live: Vec<(&mut Live, f64)> = live
            .map(|live| match live.tasks.kind() {
                Kind::Threads if light => (live, LIGHT),
                _ => (live, 1.0),
            })
            .collect();
        let all: f64 = live.iter().map(|(_, weight)| weight).sum();
        for (live, weight) in &mut live {
            let highest = match *weight {
                LIGHT => Tier::Lifecycle.min(self.options.highest),
                _ => self.options.highest,
            };
            let wanted = Wanted {
                fixed: self.options.tier.map(|tier| tier.min(highest)),
                highest,
                max_overhead: self.options.max_overhead * *weight / all,
            };
            let pid = self.process.identity.pid;
            let attached = Attachment::attach(&mut *live.tasks, pid, wanted, &self.kernel);
            live.attachment = match attached {
                Ok(attachment) => attachment,
                Err(error) => {
                    // Perhaps because the process is not there any more.
                    self.process.still_runs().map_err(Refusal::Memory)?;
                    if self.options.tier.is_some() && *weight == 1.0 {
                        return Err(error);
                    }
                    Attachment::None(TierReason::Unavailable(error.to_string()))
                }
            };
        }
        Ok(())
    }
}
