//! What is probed in a Go program, and what the counts mean.

use crate::probe::{Counts, Place, Plan, TargetLayout, Tier};
use crate::process::memory::Memory;
use crate::task::{Flow, WaitFlow};

use super::census::Census;
use super::places::{Found, Places};
use super::program::{Program, Refusal};

/// Wait reasons that the universal park place counts: waits on channels and
/// sync, which the call sites of gopark are in (waitReasonStrings,
/// runtime/runtime2.go). A suffix of testing/synctest is ignored.
const REASONS: &[&str] = &[
    "chan receive",
    "chan receive (nil chan)",
    "chan send",
    "chan send (nil chan)",
    "select",
    "select (no cases)",
    "semacquire",
    "sync.Cond.Wait",
    "sync.Mutex.Lock",
    "sync.RWMutex.Lock",
    "sync.RWMutex.RLock",
    "sync.WaitGroup.Wait",
];

/// A plan, and what it lacks.
#[derive(Debug)]
pub struct Probes {
    /// What can be attached.
    pub plan: Plan,
    /// Why [`Tier::Blocking`] cannot be, if it cannot.
    pub blocking_refused: Option<String>,
}

impl Probes {
    /// Finds the probe places of `program`.
    ///
    /// # Errors
    /// [`Refusal::Unproven`] when not even spawns and exits can be probed; the
    /// census goes on without.
    pub fn find(program: &Program) -> Result<Probes, Refusal> {
        let found = Places::find(program.elf.arch, program);
        let mut places = Vec::new();
        let mut add = |found: Vec<Found>| {
            for place in found {
                let offset = program.file_offset(place.vaddr).ok_or_else(|| {
                    Refusal::Unproven(format!("{} lies outside of its file", place.function))
                })?;
                places.push(Place {
                    offset,
                    role: place.role,
                    depth: place.depth,
                });
            }
            Ok::<(), Refusal>(())
        };
        add(found
            .lifecycle
            .map_err(|refused| Refusal::Unproven(refused.to_string()))?)?;
        let blocking_refused = match found.blocking {
            Ok(blocking) => {
                add(blocking.places)?;
                None
            }
            Err(refused) => Some(refused.to_string()),
        };
        Ok(Probes {
            plan: Plan {
                target: target_layout(program)?,
                places,
            },
            blocking_refused,
        })
    }

    /// The highest tier that the plan has places for.
    pub fn highest_tier(&self) -> Tier {
        self.plan.highest_tier()
    }
}

fn target_layout(program: &Program) -> Result<TargetLayout, Refusal> {
    let g = &program.layout.g;
    let narrow = |offset: usize| {
        u16::try_from(offset).map_err(|_| Refusal::Unproven("runtime.g is too large".to_owned()))
    };
    let counted = |reason: &str| {
        let plain = reason
            .strip_suffix(" (durable)")
            .or(reason.strip_suffix(" (synctest)"));
        REASONS.contains(&plain.unwrap_or(reason))
    };
    let reasons = program
        .wait_reasons()
        .iter()
        .enumerate()
        .filter(|(number, reason)| *number < 64 && counted(reason))
        .fold(0, |mask, (number, _)| mask | 1u64 << number);
    Ok(TargetLayout {
        goid: narrow(g.goid)?,
        gopc: narrow(g.gopc)?,
        startpc: narrow(g.startpc)?,
        waitreason: narrow(g.waitreason)?,
        sched_bp: narrow(g.sched_bp)?,
        reasons,
    })
}

/// Puts names to what the probes counted.
pub fn flow<M: Memory>(census: &mut Census<M>, counts: &Counts) -> Flow {
    let sites = counts
        .sites
        .iter()
        .map(|(key, flow)| (census.site(*key), *flow))
        .collect();
    let waits = counts
        .waits
        .iter()
        .map(|wait| {
            let kept = wait
                .pcs
                .iter()
                .position(|pc| *pc == 0)
                .unwrap_or(wait.pcs.len());
            WaitFlow {
                site: wait.site,
                reason: census.program().wait_reason_or_number(wait.reason),
                stack: census.stack_of(&wait.pcs[..kept]),
                parks: wait.parks,
                resumes: wait.resumes,
                durations: wait.durations.clone(),
            }
        })
        .collect();
    Flow {
        sites,
        waits,
        hits: counts.hits.total(),
        dropped: counts.drops.losses().collect(),
    }
}
