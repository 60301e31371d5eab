use super::*;
use crate::report::sample::{Census, site, wait_kind};
use crate::task::{Population, State, merge};

/// Runs a process whose one wait has `counts[i]` = (tasks, not run) in census
/// `i`, one a second, and says what is judged after each.
fn run(reason: &str, counts: &[(u64, u64)]) -> Vec<Option<Verdict>> {
    let mut history = History::new();
    counts
        .iter()
        .enumerate()
        .map(|(i, &(count, not_run))| {
            let sites = merge(&census(reason, count, not_run), None, wait_kind);
            history.observe(Duration::from_secs(i as u64), &sites);
            sites.first().and_then(|site| history.judge(site))
        })
        .collect()
}

fn census(reason: &str, count: u64, not_run: u64) -> Population {
    let mut census = Census::new();
    let site = site("main.serve", 14, "main.serve.func1");
    if count > 0 {
        census.group(&site, reason, "main.serve.func1", 17, count, not_run);
    }
    census.done()
}

/// Counts where each census finds everyone of the census before.
fn stays(counts: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut before = 0;
    counts
        .into_iter()
        .map(|count| {
            let held = before.min(count);
            before = count;
            (count, held)
        })
        .collect()
}

fn kinds(verdicts: &[Option<Verdict>]) -> Vec<Option<VerdictKind>> {
    verdicts
        .iter()
        .map(|verdict| verdict.as_ref().map(|verdict| verdict.kind))
        .collect()
}

#[test]
fn three_senders_are_stuck_within_two_intervals() {
    let verdicts = run("chan send", &stays([8; 6]));
    assert_eq!(kinds(&verdicts[..2]), [None, None]);
    assert!(
        kinds(&verdicts[2..])
            .iter()
            .all(|kind| *kind == Some(VerdictKind::Stuck))
    );
    assert_eq!(
        verdicts[5].as_ref().unwrap().sentence,
        "none of the 8 has run since it blocked in chan send at main.go:17, the oldest for 5s; \
         nobody received"
    );
}

#[test]
fn a_leaking_server_grows() {
    let verdicts = run("chan send", &stays((0..131).map(|i| i * 2 / 3)));
    let early = verdicts[8].as_ref().unwrap();
    assert_eq!(early.kind, VerdictKind::Growing);
    let late = verdicts[130].as_ref().unwrap();
    assert_eq!(late.kind, VerdictKind::Growing);
    assert_eq!(
        late.sentence,
        "+40/min for 2m8s, none of the 86 has run since it blocked in chan send at main.go:17; \
         nobody received"
    );
}

#[test]
fn a_leak_that_stops_is_stuck_then() {
    let verdicts = run("chan send", &stays((0..200u64).map(|i| i.min(50) * 5)));
    assert_eq!(kinds(&verdicts)[40], Some(VerdictKind::Growing));
    assert_eq!(kinds(&verdicts)[199], Some(VerdictKind::Stuck));
}

#[test]
fn a_receiving_leak_grows() {
    for reason in ["chan receive", "select", "sync.WaitGroup.Wait"] {
        let verdicts = run(reason, &stays((0..30).map(|i| 10 + i * 3)));
        assert_eq!(kinds(&verdicts)[29], Some(VerdictKind::Growing), "{reason}");
    }
}

#[test]
fn a_slow_leak_grows() {
    // One a minute.
    let verdicts = run("chan receive", &stays((0..3600).map(|i| 20 + i / 60)));
    let last = verdicts[3599].as_ref().unwrap();
    assert_eq!(last.kind, VerdictKind::Growing);
    assert!(
        last.sentence.starts_with("+1/min for 5"),
        "{}",
        last.sentence
    );
}

#[test]
fn a_leak_that_begins_late_grows() {
    let counts = (0..2000u64).map(|i| 20 + i.saturating_sub(1900) * 4);
    let verdicts = run("chan receive", &stays(counts));
    assert!(kinds(&verdicts[..1900]).iter().all(Option::is_none));
    assert!(kinds(&verdicts[1910..]).iter().all(Option::is_some));
}

#[test]
fn a_pool_that_fills_loses_the_mark() {
    let verdicts = run("chan receive", &stays((0..120u64).map(|i| i.min(20) * 5)));
    assert!(
        kinds(&verdicts[40..]).iter().all(Option::is_none),
        "{:?}",
        kinds(&verdicts)
    );
}

#[test]
fn a_growth_that_stops_is_forgotten_soon() {
    let verdicts = run("chan receive", &stays((0..60u64).map(|i| i.min(20) * 5)));
    assert_eq!(kinds(&verdicts)[21], Some(VerdictKind::Growing));
    assert!(kinds(&verdicts[27..]).iter().all(Option::is_none));
}

#[test]
fn the_first_census_is_no_start_from_nothing() {
    let verdicts = run("chan send", &stays([50, 60, 61]));
    assert_eq!(kinds(&verdicts)[2], Some(VerdictKind::Stuck));
}

#[test]
fn an_idle_pool_is_no_leak() {
    for reason in [
        "chan receive",
        "select",
        "select (no cases)",
        "sync.Cond.Wait",
    ] {
        assert!(
            kinds(&run(reason, &stays([64; 300])))
                .iter()
                .all(Option::is_none)
        );
    }
}

#[test]
fn idle_connections_are_no_leak() {
    for reason in ["IO wait", "sleep"] {
        assert!(
            kinds(&run(reason, &stays(0..300)))
                .iter()
                .all(Option::is_none)
        );
    }
}

#[test]
fn a_load_that_swings_is_no_leak() {
    let sine = |i: u64| (200.0 + 100.0 * (i as f64 / 25.0).sin()) as u64;
    for reason in ["chan receive", "select"] {
        let verdicts = run(reason, &stays((0..1200).map(sine)));
        // The first rise cannot be told from a leak; later ones can.
        assert!(kinds(&verdicts[120..]).iter().all(Option::is_none));
    }
    let saw = |i: u64| i % 20 * 5;
    let verdicts = run("select", &stays((0..400).map(saw)));
    assert!(kinds(&verdicts[40..]).iter().all(Option::is_none));
}

#[test]
fn senders_that_are_received_are_no_leak() {
    // Eight producers and a slow consumer: every fourth census one has moved.
    let counts: Vec<_> = (0..200)
        .map(|i| (8, if i % 4 == 0 { 7 } else { 8 }))
        .collect();
    assert!(
        kinds(&run("chan send", &counts)[8..])
            .iter()
            .all(Option::is_none)
    );
    // All of them move all the time.
    let counts = vec![(500, 0); 100];
    assert!(
        kinds(&run("chan send", &counts))
            .iter()
            .all(Option::is_none)
    );
}

#[test]
fn one_sender_is_no_leak() {
    assert!(
        kinds(&run("chan send", &stays([1; 100])))
            .iter()
            .all(Option::is_none)
    );
}

#[test]
fn a_lock_gets_patience() {
    let verdicts = kinds(&run("sync.Mutex.Lock", &stays([5; 60])));
    assert!(verdicts[..30].iter().all(Option::is_none));
    assert_eq!(verdicts[30], Some(VerdictKind::Stuck));
}

#[test]
fn the_runtime_is_believed() {
    let mut population = census("chan receive", 12, 0);
    population.groups[0].state = State::Leaked;
    let sites = merge(&population, None, wait_kind);
    let mut history = History::new();
    history.observe(Duration::ZERO, &sites);
    let verdict = history.judge(&sites[0]).unwrap();
    assert_eq!(verdict.kind, VerdictKind::RuntimeProven);
    assert_eq!(
        verdict.sentence,
        "the runtime itself has proven that 12 blocked in chan receive at main.go:17 can never \
         run again"
    );
}

#[test]
fn change_is_counted_from_the_start() {
    let mut history = History::new();
    let start = merge(&census("select", 10, 0), None, wait_kind);
    history.observe(Duration::from_secs(5), &start);
    assert_eq!(history.per_minute(&start[0]), None);
    let now = merge(&census("select", 30, 0), None, wait_kind);
    history.observe(Duration::from_secs(35), &now);
    assert_eq!(history.per_minute(&now[0]), Some(40.0));
}

#[test]
fn memory_is_bounded() {
    let mut history = History::new();
    for i in 0..200u64 {
        let mut census = Census::new();
        for j in 0..100u32 {
            let creator = format!("main.f{}", i * 100 + u64::from(j));
            census.group(&site(&creator, j, "main.w"), "select", "main.w", 1, 1, 0);
        }
        history.observe(
            Duration::from_secs(i),
            &merge(&census.done(), None, wait_kind),
        );
    }
    assert!(history.series.len() <= MAX_SERIES);
    assert!(history.series.len() <= 100 * FORGET_AFTER as usize);
}
