//! A census and the probes' counts, merged by site.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{
    Flow, Frame, Histogram, Population, Rates, Reconciliation, Runs, Site, SiteFlow, SiteKey,
    Stack, State, WaitKind,
};

/// Names a site by what the source says (creator's function and line, and the
/// entry function), so that it is the same in every process of one program,
/// in every run, and under address randomisation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteHash(u64);

impl SiteHash {
    /// The name of a site.
    pub fn of(site: &Site) -> SiteHash {
        // FNV-1a: short, and the same for ever.
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut eat = |bytes: &[u8]| {
            // 0xff never occurs in UTF-8, so it ends a string.
            for &byte in bytes.iter().chain(&[0xff]) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        };
        match &site.created_by {
            Some(frame) => {
                eat(frame.function.as_bytes());
                eat(&frame.line.to_le_bytes());
            }
            None => eat(b""),
        }
        match &site.entry {
            Some(frame) => eat(frame.function.as_bytes()),
            None => eat(b""),
        }
        if site.created_by.is_none() && site.entry.is_none() {
            // Nothing is known but the addresses.
            eat(&site.key.created_at.to_le_bytes());
            eat(&site.key.entry.to_le_bytes());
        }
        SiteHash(hash)
    }
}

impl fmt::Display for SiteHash {
    /// Twelve hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}", self.0 >> 16)
    }
}

impl fmt::Debug for SiteHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteHash({self})")
    }
}

/// Tasks of one site that wait for one thing at one place.
#[derive(Clone, Debug)]
pub struct WaitState {
    /// Why they wait, in the runtime's words (`chan send`).
    pub reason: Arc<str>,
    /// What that lets one conclude.
    pub kind: WaitKind,
    /// Where a person would say that they wait.
    pub place: Option<Frame>,
    /// How many wait now.
    pub count: u64,
    /// Of these, how many have not run since an earlier census saw them.
    pub not_run: u64,
    /// Of these, how many the runtime itself has proven to be leaked.
    pub leaked: u64,
    /// The longest any of them has been blocked, at least.
    pub oldest: Option<Duration>,
    /// Id of the task blocked longest; `None` when none waits now.
    pub sample: Option<u64>,
    /// Times a task went on from here since the probes were attached; `None`
    /// where no probe counts it.
    pub resumes: Option<u64>,
    /// How long those had been blocked.
    pub durations: Option<Histogram>,
}

/// Everything known about the tasks of one site at one moment.
#[derive(Clone, Debug)]
pub struct SiteState {
    /// The site's lasting name.
    pub id: SiteHash,
    /// The site (one of several with this name, when the compiler has copied
    /// the statement).
    pub site: Site,
    /// Tasks that live.
    pub live: u64,
    /// Of these, waiting.
    pub blocked: u64,
    /// Of these, not run since an earlier census saw them.
    pub not_run: u64,
    /// `live` by state.
    pub states: BTreeMap<State, u64>,
    /// The longest any of them has been blocked, at least.
    pub oldest: Option<Duration>,
    /// Tasks spawned since the probes were attached; `None` without probes.
    pub spawned: Option<u64>,
    /// Tasks that ended since then.
    pub exited: Option<u64>,
    /// Times that they ran since then; `None` where no probe counts it.
    pub runs: Option<Runs>,
    /// What they wait for, the most tasks first.
    pub waits: Vec<WaitState>,
}

impl SiteState {
    /// How long tasks of this site were blocked, all waits together; `None`
    /// where no probe counts it.
    pub fn durations(&self) -> Option<Histogram> {
        let mut all: Option<Histogram> = None;
        for durations in self.waits.iter().filter_map(|wait| wait.durations.as_ref()) {
            all.get_or_insert_default().add(durations);
        }
        all
    }
}

/// What tells two waits of a site apart. The program counter does not: a
/// compiler may copy a statement.
type WaitKey = (Arc<str>, Option<(Arc<str>, Arc<str>, u32)>);

struct Building {
    state: SiteState,
    waits: HashMap<WaitKey, WaitState>,
}

/// What a wait's reason lets one conclude, by the runtime whose word it is.
pub type Classify = fn(&str) -> WaitKind;

impl Building {
    fn new(id: SiteHash, site: &Site) -> Building {
        Building {
            state: SiteState {
                id,
                site: site.clone(),
                live: 0,
                blocked: 0,
                not_run: 0,
                states: BTreeMap::new(),
                oldest: None,
                spawned: None,
                exited: None,
                runs: None,
                waits: Vec::new(),
            },
            waits: HashMap::new(),
        }
    }

    fn wait(
        &mut self,
        reason: &Arc<str>,
        stack: Option<&Stack>,
        classify: Classify,
    ) -> &mut WaitState {
        let place = stack.and_then(Stack::place);
        let key = (
            reason.clone(),
            place.map(|frame| (frame.function.clone(), frame.file.clone(), frame.line)),
        );
        self.waits.entry(key).or_insert_with(|| WaitState {
            reason: reason.clone(),
            kind: classify(reason),
            place: place.cloned(),
            count: 0,
            not_run: 0,
            leaked: 0,
            oldest: None,
            sample: None,
            resumes: None,
            durations: None,
        })
    }
}

/// Merges a census and, where probes are attached, what they counted, by site.
/// The sites with most live tasks come first.
pub fn merge(population: &Population, flow: Option<&Flow>, classify: Classify) -> Vec<SiteState> {
    let mut sites: HashMap<SiteHash, Building> = HashMap::new();
    let mut by_key: HashMap<SiteKey, SiteHash> = HashMap::new();
    let hashes: Vec<SiteHash> = population.sites.iter().map(SiteHash::of).collect();
    let unnamed: Arc<str> = Arc::from("waiting");

    for group in &population.groups {
        let index = group.site.0 as usize;
        let (Some(site), Some(&id)) = (population.sites.get(index), hashes.get(index)) else {
            continue;
        };
        by_key.insert(site.key, id);
        let building = sites.entry(id).or_insert_with(|| Building::new(id, site));
        let state = &mut building.state;
        let oldest = group.oldest.map(|age| age.at_least);
        state.live += group.count;
        *state.states.entry(group.state).or_default() += group.count;
        state.not_run += group.not_run;
        if !group.state.is_blocked() {
            continue;
        }
        state.blocked += group.count;
        state.oldest = state.oldest.max(oldest);
        let stack = group
            .stack
            .and_then(|id| population.stacks.get(id.0 as usize));
        let wait = building.wait(group.reason.as_ref().unwrap_or(&unnamed), stack, classify);
        wait.count += group.count;
        wait.not_run += group.not_run;
        if group.state == State::Leaked {
            wait.leaked += group.count;
        }
        if wait.sample.is_none() || oldest > wait.oldest {
            wait.sample = Some(group.sample);
        }
        wait.oldest = wait.oldest.max(oldest);
    }

    if let Some(flow) = flow {
        for (site, counts) in &flow.sites {
            let id = SiteHash::of(site);
            by_key.insert(site.key, id);
            let state = &mut sites
                .entry(id)
                .or_insert_with(|| Building::new(id, site))
                .state;
            state.spawned = Some(state.spawned.unwrap_or(0) + counts.spawned);
            state.exited = Some(state.exited.unwrap_or(0) + counts.exited);
            if let Some(runs) = counts.runs {
                state.runs.get_or_insert_default().add(runs);
            }
        }
        for building in sites.values_mut() {
            building.state.spawned.get_or_insert(0);
            building.state.exited.get_or_insert(0);
        }
        for waits in &flow.waits {
            // A wait of a site that neither side knows has nowhere to be shown.
            let Some(building) = by_key.get(&waits.site).and_then(|id| sites.get_mut(id)) else {
                continue;
            };
            let wait = building.wait(&waits.reason, Some(&waits.stack), classify);
            wait.resumes = Some(wait.resumes.unwrap_or(0) + waits.resumes);
            wait.durations.get_or_insert_default().add(&waits.durations);
        }
    }

    let mut sites: Vec<SiteState> = sites
        .into_values()
        .map(|building| {
            let mut state = building.state;
            // `collect` takes room for four, and most sites have one.
            state.waits = Vec::with_capacity(building.waits.len());
            state.waits.extend(building.waits.into_values());
            state.waits.sort_by(|a, b| {
                let key = |wait: &WaitState| {
                    wait.place
                        .as_ref()
                        .map(|frame| (frame.function.clone(), frame.file.clone(), frame.line))
                };
                (b.count, b.resumes)
                    .cmp(&(a.count, a.resumes))
                    .then_with(|| a.reason.cmp(&b.reason))
                    .then_with(|| key(a).cmp(&key(b)))
            });
            state
        })
        .collect();
    sites.sort_by(|a, b| {
        (b.live, b.blocked, b.spawned)
            .cmp(&(a.live, a.blocked, a.spawned))
            .then_with(|| a.id.cmp(&b.id))
    });
    sites
}

fn totals(flow: &Flow) -> (u64, u64) {
    flow.sites.iter().fold((0, 0), |(s, e), (_, counts)| {
        (s + counts.spawned, e + counts.exited)
    })
}

/// Spawns and exits a second between two readings of the probes, over the time
/// in which they were attached. Zero when they were not.
pub fn rates(before: &Flow, now: &Flow, attached: Duration) -> Rates {
    let seconds = attached.as_secs_f64();
    if seconds <= 0.0 {
        return Rates::default();
    }
    let ((spawned_before, exited_before), (spawned, exited)) = (totals(before), totals(now));
    Rates {
        spawned_per_second: spawned.saturating_sub(spawned_before) as f64 / seconds,
        exited_per_second: exited.saturating_sub(exited_before) as f64 / seconds,
    }
}

/// A census with the probes' counts read on either side of it.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoint {
    /// [`Population::count`], less the tasks that nobody spawned, and
    /// [`Population::unstable`].
    live: u64,
    unstable: u64,
    /// Spawned and ended, before the census and after it.
    before: (u64, u64),
    after: (u64, u64),
}

impl Checkpoint {
    /// `before` and `after` are the probes' counts next to the census.
    pub fn new(population: &Population, before: SiteFlow, after: SiteFlow) -> Checkpoint {
        // Threads of C that call into Go have tasks that nobody spawned.
        let foreign: u64 = population
            .groups
            .iter()
            .filter(|group| population.site(group.site).key.entry == 0)
            .map(|group| group.count)
            .sum();
        Checkpoint {
            live: population.count - foreign,
            unstable: population.unstable,
            before: (before.spawned, before.exited),
            after: (after.spawned, after.exited),
        }
    }

    /// The same, when of so many more tasks nobody can say whether they are in it.
    pub fn less_certain_by(self, tasks: u64) -> Checkpoint {
        Checkpoint {
            unstable: self.unstable.saturating_add(tasks),
            ..self
        }
    }

    /// Tasks spawned or ended while the census was taken.
    fn moved(&self) -> u64 {
        self.after.0.saturating_sub(self.before.0) + self.after.1.saturating_sub(self.before.1)
    }
}

/// Holds a census against the probes, which have been attached without a break
/// since `base`.
///
/// The uncertainty is the number of tasks of which nobody can say whether they
/// were in a census: those spawned or ended while it was taken, and those that
/// changed while they were read.
pub fn reconcile(base: &Checkpoint, now: &Checkpoint) -> Reconciliation {
    let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let spawned = now.after.0.saturating_sub(base.after.0);
    let exited = now.after.1.saturating_sub(base.after.1);
    let expected = signed(base.live)
        .saturating_add(signed(spawned))
        .saturating_sub(signed(exited));
    Reconciliation {
        difference: signed(now.live).saturating_sub(expected),
        uncertainty: base.moved() + now.moved() + base.unstable + now.unstable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample::{self, wait_kind};
    use crate::task::{SiteFlow, WaitFlow};

    #[test]
    fn names_survive_relocation() {
        let site = sample::site("main.serve", 14, "main.serve.func1");
        let mut moved = site.clone();
        moved.key = SiteKey {
            created_at: 1,
            entry: 2,
        };
        for frame in [&mut moved.entry, &mut moved.created_by] {
            frame.as_mut().unwrap().pc += 0x1000;
        }
        assert_eq!(SiteHash::of(&site), SiteHash::of(&moved));
        let other = sample::site("main.serve", 15, "main.serve.func1");
        assert_ne!(SiteHash::of(&site), SiteHash::of(&other));
        assert_eq!(SiteHash::of(&site).to_string().len(), 12);
    }

    #[test]
    fn census_and_probes_meet_at_the_wait() {
        let mut population = sample::Census::new();
        let site = sample::site("main.serve", 14, "main.serve.func1");
        population.group(&site, "chan send", "main.serve.func1", 17, 8, 6);
        population.group(&site, "select", "main.serve.func1", 20, 1, 0);
        let population = population.done();
        let mut durations = Histogram::default();
        durations.buckets[20] = 5;
        let flow = Flow {
            sites: vec![(
                site.clone(),
                SiteFlow {
                    runs: None,
                    spawned: 12,
                    exited: 4,
                },
            )],
            waits: vec![WaitFlow {
                site: site.key,
                reason: "chan send".into(),
                stack: sample::stack("chan send", "main.serve.func1", 17),
                parks: 13,
                resumes: 5,
                durations,
            }],
            ..Flow::default()
        };
        let sites = merge(&population, Some(&flow), wait_kind);
        assert_eq!(sites.len(), 1);
        let site = &sites[0];
        assert_eq!((site.live, site.blocked, site.not_run), (9, 9, 6));
        assert_eq!((site.spawned, site.exited), (Some(12), Some(4)));
        assert_eq!(site.waits.len(), 2);
        assert_eq!(&*site.waits[0].reason, "chan send");
        assert_eq!(site.waits[0].resumes, Some(5));
        assert_eq!(site.waits[1].resumes, None);
        assert_eq!(site.durations().unwrap().count(), 5);
        assert!(merge(&population, None, wait_kind)[0].spawned.is_none());
    }

    #[test]
    fn the_sample_is_the_oldest() {
        let mut census = sample::Census::new();
        let site = sample::site("main.serve", 14, "main.serve.func1");
        for (id, seconds) in [(7, 5), (8, 90), (9, 60)] {
            let place = "main.serve.func1";
            census.group(&site, "chan send", place, 17, 2, 0).sample = id;
            census.aged(seconds);
        }
        let sites = merge(&census.done(), None, wait_kind);
        let wait = &sites[0].waits[0];
        assert_eq!((wait.count, wait.sample), (6, Some(8)));
        assert_eq!(wait.oldest, Some(Duration::from_secs(90)));
        assert_eq!(sites[0].oldest, wait.oldest);
    }

    #[test]
    fn difference_is_what_the_probes_do_not_explain() {
        let site = sample::site("main.main", 9, "main.work");
        let mut base = sample::Census::new();
        base.group(&site, "select", "main.work", 1, 10, 0);
        let base = base.done();
        let mut now = base.clone();
        now.count = 17;
        let counts = |spawned, exited| SiteFlow {
            spawned,
            exited,
            runs: None,
        };
        let quiet = Checkpoint::new(&base, counts(100, 90), counts(100, 90));
        let later = Checkpoint::new(&now, counts(300, 285), counts(300, 285));
        let answer = reconcile(&quiet, &later);
        assert_eq!((answer.difference, answer.uncertainty), (2, 0));
        // Three spawned and one ended while the census was taken.
        let busy = Checkpoint::new(&now, counts(297, 284), counts(300, 285));
        assert_eq!(
            reconcile(&quiet, &busy),
            Reconciliation {
                difference: 2,
                uncertainty: 4
            }
        );
    }

    #[test]
    fn rates_are_over_the_time_attached() {
        let site = sample::site("main.main", 9, "main.work");
        let flow = |spawned, exited| Flow {
            sites: vec![(
                site.clone(),
                SiteFlow {
                    spawned,
                    exited,
                    runs: None,
                },
            )],
            ..Flow::default()
        };
        let rates = rates(&flow(100, 90), &flow(300, 285), Duration::from_secs(2));
        assert_eq!(rates.spawned_per_second, 100.0);
        assert_eq!(rates.exited_per_second, 97.5);
    }
}
