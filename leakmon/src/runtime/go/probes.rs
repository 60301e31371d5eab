//! What is probed in a Go program, and what the counts mean.

use std::sync::Arc;

use leakmon_common::go::{Layout, STARTPC_FROM_GOPC};

use crate::probe::{Code, Counts, Place, Plan};
use crate::process::memory::Memory;
use crate::runtime::Probes;
use crate::task::{Flow, SiteFlow, SiteKey, WaitFlow};

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
                code: Code::File(Arc::clone(&program.file)),
                offset,
                role: place.role,
                argument: u16::from(place.depth),
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
            layout: layout(program)?.words(),
            places,
        },
        blocking_refused,
    })
}

fn layout(program: &Program) -> Result<Layout, Refusal> {
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
    if g.gopc + usize::from(STARTPC_FROM_GOPC) != g.startpc {
        return Err(Refusal::Unproven(
            "g.startpc does not lie 16 bytes after g.gopc, as it does in Go 1.18 to 1.27"
                .to_owned(),
        ));
    }
    Ok(Layout {
        goid: narrow(g.goid)?,
        gopc: narrow(g.gopc)?,
        waitreason: narrow(g.waitreason)?,
        sched_bp: narrow(g.sched_bp)?,
        reasons,
    })
}

/// Puts names to what the probes counted of the program's own goroutines. The
/// runtime's are left out, as NumGoroutine leaves them out.
pub fn flow<M: Memory>(census: &mut Census<M>, counts: &Counts) -> Flow {
    let sites: Vec<(SiteKey, SiteFlow)> = own_sites(census, counts).collect();
    let sites = sites
        .into_iter()
        .map(|(key, flow)| (census.site(key), flow))
        .collect();
    let mut waits = Vec::new();
    for wait in &counts.waits {
        if census.is_system(wait.site.entry) {
            continue;
        }
        let kept = wait.pcs.iter().position(|pc| *pc == 0);
        waits.push(WaitFlow {
            site: wait.site,
            reason: census.program().wait_reason_or_number(wait.reason as u8),
            stack: census.stack_of(&wait.pcs[..kept.unwrap_or(wait.pcs.len())]),
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

/// Spawns and exits of the program's own goroutines.
pub fn totals<M: Memory>(census: &Census<M>, counts: &Counts) -> SiteFlow {
    let mut sum = SiteFlow::default();
    for (_, site) in own_sites(census, counts) {
        sum.add(site);
    }
    sum
}

fn own_sites<'a, M: Memory>(
    census: &'a Census<M>,
    counts: &'a Counts,
) -> impl Iterator<Item = (SiteKey, SiteFlow)> + 'a {
    counts
        .sites
        .iter()
        .filter(|(key, _)| !census.is_system(key.entry))
        .copied()
}
