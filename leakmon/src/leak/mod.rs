//! Verdicts over populations in time.
//!
//! Each interval's merged census goes into a [`History`], which then judges
//! each site. Three things earn a mark, the strongest first:
//!
//! - [`VerdictKind::RuntimeProven`]: the runtime itself found the tasks
//!   unreachable.
//! - [`VerdictKind::Growing`]: the tasks that wait for one channel or lock
//!   operation at one place and have not run since an earlier census become
//!   steadily more.
//! - [`VerdictKind::Stuck`]: at least two tasks wait at one place in an
//!   operation in which waiting for ever is not a normal way to be idle (a
//!   channel send, a nil channel, a lock), and none of them moves.
//!
//! Idle workers wait in `chan receive` and `select` and idle connections in
//! `IO wait`, for ever and by the thousand, so the first two are a leak only
//! while they grow and the last never is. What "grows" and "moves" mean is
//! defined in `series.rs`.

mod series;

use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::hash::{Hash, Hasher};
use std::time::Duration;

use crate::task::{SiteHash, SiteState, WaitClass, WaitState, human};
use series::Series;

/// Waits whose past is kept. At 1.2 KiB each, 10 MiB.
const MAX_SERIES: usize = 8192;

/// Sites whose live count at the start is kept.
const MAX_SITES: usize = 65_536;

/// Intervals after which a wait that nobody is in is forgotten.
const FORGET_AFTER: u64 = 64;

/// Tasks that must not move before they are called stuck.
const STUCK_FROM: u64 = 2;

/// How long a lock may be waited for before that is remarkable.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

/// What makes a site a suspect, from weak to strong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VerdictKind {
    /// Tasks that should move do not.
    Stuck,
    /// Tasks that do not run become steadily more.
    Growing,
    /// The runtime itself found them unreachable.
    RuntimeProven,
}

impl VerdictKind {
    /// Every kind.
    pub const ALL: [VerdictKind; 3] = [
        VerdictKind::Stuck,
        VerdictKind::Growing,
        VerdictKind::RuntimeProven,
    ];

    /// The word in reports.
    pub fn name(self) -> &'static str {
        match self {
            VerdictKind::Stuck => "stuck",
            VerdictKind::Growing => "growing",
            VerdictKind::RuntimeProven => "proven",
        }
    }
}

/// Why a site looks like a leak.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What was found.
    pub kind: VerdictKind,
    /// One sentence with the figures that it rests on.
    pub sentence: String,
    /// Index in [`SiteState::waits`] of the wait that earned it.
    pub wait: usize,
}

/// A wait of a site, by what the source says.
type WaitId = (SiteHash, u64);

fn wait_id(site: SiteHash, wait: &WaitState) -> WaitId {
    let mut hasher = DefaultHasher::new();
    wait.reason.hash(&mut hasher);
    if let Some(place) = &wait.place {
        (&place.function, &place.file, place.line).hash(&mut hasher);
    }
    (site, hasher.finish())
}

/// The past of one process's sites, bounded.
#[derive(Debug, Default)]
pub struct History {
    /// Intervals seen.
    observations: u64,
    /// When the first and the last were.
    first_at: Duration,
    last_at: Duration,
    /// Live tasks in the first, by site.
    at_first: HashMap<SiteHash, u64>,
    /// The past of each wait that can be a leak.
    series: HashMap<WaitId, Series>,
    /// Waits of the last interval that are not followed for want of room.
    untracked: u64,
}

impl History {
    /// Nothing seen yet.
    pub fn new() -> History {
        History::default()
    }

    /// Takes in an interval's sites; `at` is the time since the watch began,
    /// which never goes back.
    pub fn observe(&mut self, at: Duration, sites: &[SiteState]) {
        let first = self.observations == 0;
        if first {
            self.first_at = at;
            self.at_first = sites
                .iter()
                .take(MAX_SITES)
                .map(|site| (site.id, site.live))
                .collect();
        }
        self.last_at = at;
        self.observations += 1;
        self.untracked = 0;
        for site in sites {
            for wait in &site.waits {
                if wait.count == 0 || wait.kind.class == WaitClass::Silent {
                    continue;
                }
                let room = self.series.len() < MAX_SERIES;
                let series = match self.series.entry(wait_id(site.id, wait)) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) if room => new.insert(Series::new()),
                    Entry::Vacant(_) => {
                        self.untracked += 1;
                        continue;
                    }
                };
                series.observe(self.observations, at, wait.count, wait.not_run);
                series.observe_resumes(wait.resumes);
            }
        }
        let now = self.observations;
        self.series.retain(|_, series| {
            if series.seen() < now {
                series.observe_none(now, at);
            }
            now - series.seen() < FORGET_AFTER
        });
    }

    /// Whether there was more than one census: from a single one nobody can
    /// tell a leak, unless the runtime itself has.
    pub fn can_judge(&self) -> bool {
        self.observations > 1
    }

    /// Waits of the last interval whose past is not kept, because too many are.
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// How fast a site's live count has changed since the watch began, a
    /// minute: what it has gained or lost, over the time. `None` in the first
    /// interval.
    pub fn per_minute(&self, site: &SiteState) -> Option<f64> {
        let minutes = self.last_at.saturating_sub(self.first_at).as_secs_f64() / 60.0;
        if self.observations < 2 || minutes <= 0.0 {
            return None;
        }
        let before = self.at_first.get(&site.id).copied().unwrap_or(0);
        Some((site.live as f64 - before as f64) / minutes)
    }

    /// Judges a site of the last interval; `None` when nothing speaks for a
    /// leak.
    pub fn judge(&self, site: &SiteState) -> Option<Verdict> {
        let mut best: Option<(VerdictKind, u64, Verdict)> = None;
        for (index, wait) in site.waits.iter().enumerate() {
            let Some((kind, sentence)) = self.judge_wait(site.id, wait) else {
                continue;
            };
            if best
                .as_ref()
                .is_none_or(|(best, count, _)| (kind, wait.count) > (*best, *count))
            {
                let verdict = Verdict {
                    kind,
                    sentence,
                    wait: index,
                };
                best = Some((kind, wait.count, verdict));
            }
        }
        best.map(|(_, _, verdict)| verdict)
    }

    fn judge_wait(&self, site: SiteHash, wait: &WaitState) -> Option<(VerdictKind, String)> {
        if wait.count == 0 {
            return None;
        }
        let place = place(wait);
        if wait.leaked > 0 {
            let who = if wait.leaked == wait.count {
                human::count(wait.count)
            } else {
                format!(
                    "{} of the {}",
                    human::count(wait.leaked),
                    human::count(wait.count)
                )
            };
            return Some((
                VerdictKind::RuntimeProven,
                format!(
                    "the runtime itself has proven that {who} blocked in {place} can never run again"
                ),
            ));
        }
        let class = wait.kind.class;
        let series = self.series.get(&wait_id(site, wait))?;
        let ending = ending(wait);

        let needed = if class == WaitClass::Idle { 5 } else { 3 };
        if let Some(growth) = series.growth(needed) {
            let time = self.last_at.saturating_sub(growth.since);
            let minutes = time.as_secs_f64() / 60.0;
            let rate = wait.count.saturating_sub(growth.from) as f64 / minutes;
            return Some((
                VerdictKind::Growing,
                format!(
                    "{}/min for {}, {} has run since it blocked in {place}{ending}",
                    human::change(rate),
                    human::duration(time),
                    none_of(wait, series),
                ),
            ));
        }

        let patience = match class {
            WaitClass::Hanging => Duration::ZERO,
            WaitClass::Lock => LOCK_PATIENCE,
            WaitClass::Idle | WaitClass::Silent => return None,
        };
        // The census can be deceived by tasks that run exactly 256 times; the
        // probes cannot.
        if series.resumed() >= wait.not_run.max(1) {
            return None;
        }
        let still = series.stuck(STUCK_FROM, patience)?;
        let time = wait.oldest.unwrap_or(still).max(still);
        Some((
            VerdictKind::Stuck,
            format!(
                "{} has run since it blocked in {place}, the oldest for {}{ending}",
                none_of(wait, series),
                human::duration(time),
            ),
        ))
    }
}

/// "chan send at main.go:17".
fn place(wait: &WaitState) -> String {
    match &wait.place {
        Some(frame) => {
            let file = frame.file.rsplit('/').next().unwrap_or(&frame.file);
            format!("{} at {}:{}", wait.reason, file, frame.line)
        }
        None => wait.reason.to_string(),
    }
}

/// "none of the 86": those that came since the last census have not been seen
/// to run either, but only those that were there can be said to have stayed.
fn none_of(wait: &WaitState, series: &Series) -> String {
    if series.newcomers() >= wait.count.saturating_sub(wait.not_run) {
        format!("none of the {}", human::count(wait.count))
    } else {
        format!(
            "none of {} (of {} here)",
            human::count(wait.not_run),
            human::count(wait.count)
        )
    }
}

/// What did not happen; or, when it happened to others, that it did.
fn ending(wait: &WaitState) -> String {
    match (wait.resumes, wait.kind.missing) {
        (Some(resumes), _) if resumes > 0 => {
            format!("; others went on {} times", human::count(resumes))
        }
        (_, Some(missing)) => format!("; {missing}"),
        (_, None) => String::new(),
    }
}

#[cfg(test)]
mod tests;
