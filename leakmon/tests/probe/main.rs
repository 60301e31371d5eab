//! The kernel side against running programs. Needs root and a Go toolchain.

mod target;
mod threads;
mod tokio;

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use leakmon::probe::{
    Attached, Counts, Driver, Drivers, Governor, Kernel, Limits, Role, Tier, Way, calibrate,
};
use leakmon::task::SiteFlow;
use target::Target;

/// Every way of attaching that this kernel has, by its version: uprobe_multi came
/// with 6.6.
fn ways() -> Vec<Way> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split('.')
        .map_while(|number| number.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) >= (Some(6), Some(6)) {
        return vec![Way::Multi, Way::PerfEvent];
    }
    eprintln!(
        "kernel {} has no uprobe_multi: it is not tested",
        release.trim()
    );
    vec![Way::PerfEvent]
}

/// The tests measure time and count everything that a process does: one at a
/// time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many times as long as elsewhere things take, in guests.
fn slowness() -> u64 {
    let slowness = std::env::var("LEAKMON_SLOWNESS").ok();
    slowness.map_or(1, |slowness| slowness.parse().unwrap())
}

fn flow(counts: &Counts) -> SiteFlow {
    let mut sum = SiteFlow::default();
    for (_, flow) in &counts.sites {
        sum.spawned += flow.spawned;
        sum.exited += flow.exited;
    }
    sum
}

fn losses(counts: &Counts) -> BTreeMap<&'static str, u64> {
    counts.drops.losses().collect()
}

#[test]
fn spawns_and_exits_are_exact() {
    let _alone = alone();
    for way in ways() {
        let mut target = Target::start();
        let kernel = Kernel::load_for(way).unwrap();
        let attached = kernel
            .attach(target.pid(), &target.plan(), Tier::Lifecycle)
            .unwrap();
        target.run("churn 100000");
        target.run("settle");
        let counts = attached.read().unwrap();
        let entry = target.symbol("main.churnBody");
        let churned: Vec<_> = counts
            .sites
            .iter()
            .filter(|(site, _)| target.function(site.created_at) == "main.churn")
            .collect();
        assert_eq!(churned.len(), 1, "{counts:?}");
        let flow = churned[0].1;
        let what = format!("{way:?}, entry {entry:#x}: {counts:?}");
        assert!(losses(&counts).is_empty(), "{what}");
        assert_eq!((flow.spawned, flow.exited), (100_000, 100_000), "{what}");
        assert_eq!(flow.runs, None, "{what}");
        assert_eq!(attached.hits().unwrap(), counts.hits);
    }
}

#[test]
fn blocks_are_exact() {
    let _alone = alone();
    for way in ways() {
        let mut target = Target::start();
        let kernel = Kernel::load_for(way).unwrap();
        let attached = kernel
            .attach(target.pid(), &target.plan(), Tier::Blocking)
            .unwrap();
        // 8 blocked senders, for good.
        target.run("leak 8");
        // 20 waits of 50 ms in one place.
        target.run("slow 20 50");
        target.run("settle");
        let counts = attached.read().unwrap();
        assert!(losses(&counts).is_empty(), "{:?}", losses(&counts));

        let leaked: Vec<_> = counts
            .waits
            .iter()
            .filter(|wait| target.function(wait.pcs[1]) == "main.leak.func1")
            .collect();
        assert_eq!(leaked.len(), 1);
        assert_eq!((leaked[0].parks, leaked[0].resumes), (8, 0));

        let slow: Vec<_> = counts
            .waits
            .iter()
            .filter(|wait| target.function(wait.pcs[1]) == "main.slow")
            .collect();
        assert_eq!(slow.len(), 1);
        assert_eq!((slow[0].parks, slow[0].resumes), (20, 20), "{way:?}");
        let buckets = &slow[0].durations.buckets;
        // 2^25 ns is 34 ms, 2^26 ns is 67 ms.
        let last = if slowness() > 1 { buckets.len() } else { 26 };
        assert!(buckets[25..last].iter().sum::<u64>() >= 18, "{buckets:?}");
        assert_eq!(buckets.iter().sum::<u64>(), 20);
        assert_eq!(flow(&counts).spawned, 9);
        assert_eq!(flow(&counts).exited, 1);

        let begins = counts.hits.of(Role::Park);
        let ends = counts.hits.of(Role::Resume);
        let parks: u64 = counts.waits.iter().map(|wait| wait.parks).sum();
        let resumes: u64 = counts.waits.iter().map(|wait| wait.resumes).sum();
        assert_eq!(parks, begins);
        assert_eq!(resumes + counts.drops.unmatched_resumes(), ends);
    }
}

#[test]
fn many_blocks_are_exact() {
    let _alone = alone();
    let mut target = Target::start();
    let kernel = Kernel::load().unwrap();
    let attached = kernel
        .attach(target.pid(), &target.plan(), Tier::Blocking)
        .unwrap();
    target.run("ping 50000");
    target.run("settle");
    let counts = attached.read().unwrap();
    assert!(losses(&counts).is_empty(), "{:?}", losses(&counts));
    for wait in &counts.waits {
        assert_eq!(wait.parks, wait.resumes, "{wait:?}");
        assert_eq!(wait.durations.buckets.iter().sum::<u64>(), wait.resumes);
    }
    assert!(counts.waits.iter().map(|wait| wait.parks).sum::<u64>() > 50_000);
}

/// Keeps what is logged.
struct Log(Mutex<Vec<String>>);

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

static LOG: Log = Log(Mutex::new(Vec::new()));

#[test]
fn what_does_not_fit_is_counted_as_dropped_and_logged() {
    let _alone = alone();
    log::set_logger(&LOG).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let mut target = Target::start();
    let limits = Limits {
        sites: 1,
        goroutines: 4,
        waits: 2,
        ..Limits::for_cpus(1)
    };
    let kernel = Kernel::load_with(ways()[0], limits).unwrap();
    let attached = kernel
        .attach(target.pid(), &target.plan(), Tier::Blocking)
        .unwrap();
    target.run("leak 20");
    target.run("churn 100");
    target.run("slow 3 5");
    target.run("settle");
    let counts = attached.read().unwrap();
    assert_eq!(counts.sites.len(), 1);
    assert!(counts.waits.len() <= 2);
    let losses = losses(&counts);
    // 100 + 1 goroutines of the other sites come and go.
    assert_eq!(losses["site map full"], 202);
    assert!(
        losses.contains_key("map of waiting tasks full"),
        "{losses:?}"
    );
}

#[test]
fn the_universal_places_count_the_same() {
    let _alone = alone();
    // Go 1.26's number of "chan receive".
    const CHAN_RECEIVE: u32 = 19;
    let mut target = Target::start();
    let kernel = Kernel::load().unwrap();
    let plan = target::universal_plan(&target::binary(), 1 << CHAN_RECEIVE);
    let attached = kernel.attach(target.pid(), &plan, Tier::Blocking).unwrap();
    target.run("slow 20 20");
    target.run("churn 10000");
    target.run("settle");
    let counts = attached.read().unwrap();
    let flow = flow(&counts);
    assert_eq!((flow.spawned, flow.exited), (10_001, 10_001));
    let slow: Vec<_> = counts
        .waits
        .iter()
        .filter(|wait| {
            wait.pcs
                .iter()
                .any(|&pc| target.function(pc) == "main.slow")
        })
        .collect();
    assert_eq!(slow.len(), 1, "{counts:?}");
    assert_eq!((slow[0].parks, slow[0].resumes), (20, 20));
    assert!(counts.waits.iter().all(|wait| wait.reason == CHAN_RECEIVE));
    assert!(losses(&counts).is_empty(), "{:?}", losses(&counts));
}

#[test]
fn another_process_of_the_same_file_is_not_counted() {
    let _alone = alone();
    let mut target = Target::start();
    let mut other = Target::start();
    let kernel = Kernel::load().unwrap();
    let first = kernel
        .attach(target.pid(), &target.plan(), Tier::Lifecycle)
        .unwrap();
    let second = kernel
        .attach(other.pid(), &other.plan(), Tier::Lifecycle)
        .unwrap();
    target.run("churn 1000");
    other.run("churn 300");
    other.run("settle");
    assert_eq!(flow(&first.read().unwrap()).spawned, 1000);
    assert_eq!(flow(&second.read().unwrap()).spawned, 300);
    drop(second);
    other.run("churn 300");
    // The index is used again, and starts from nothing.
    let second = kernel
        .attach(other.pid(), &other.plan(), Tier::Lifecycle)
        .unwrap();
    assert_eq!(second.read().unwrap(), Counts::default());
    assert_eq!(flow(&first.read().unwrap()).spawned, 1000);
}

/// Hits of each process are counted once: those of a member for itself, those of one
/// with links of its own by these, and with the others' where these are away.
#[test]
fn what_processes_share_is_counted_once() {
    let _alone = alone();
    let kernel = Kernel::load().unwrap();
    if kernel.way() != Way::Multi {
        eprintln!("this kernel has no uprobe_multi: nothing is shared");
        return;
    }
    let mut targets: Vec<Target> = (0..7).map(|_| Target::start()).collect();
    let joined = targets[..6].iter();
    let mut attached: Vec<Attached> = joined
        .map(|target| kernel.join(target.pid(), &target.plan()).unwrap())
        .collect();
    let shares: Vec<bool> = attached.iter().map(|one| one.pool().is_some()).collect();
    assert_eq!(shares, [false, false, false, false, true, true]);
    assert_eq!(attached[4].pool(), attached[5].pool());
    let others = |attached: &[Attached]| attached[5].hits_of_others().unwrap().total();
    let spawned = |one: &Attached| flow(&one.read().unwrap()).spawned;

    // Only the shared links are attached, by one of the two.
    attached[4].set_tier(Tier::Lifecycle).unwrap();
    for target in &mut targets[4..6] {
        target.run("churn 100");
    }
    assert_eq!((spawned(&attached[4]), spawned(&attached[5])), (100, 0));
    assert_eq!(others(&attached), 0);
    attached[5].set_tier(Tier::Blocking).unwrap();
    targets[5].run("churn 100");
    assert_eq!((spawned(&attached[4]), spawned(&attached[5])), (100, 100));
    // One with links of its own, which are away, and one that nobody watches.
    let mut before = others(&attached);
    for which in [0, 6] {
        targets[which].run("churn 100");
        let after = others(&attached);
        assert!(after >= before + 200, "{which}: {before} {after}");
        before = after;
    }
    assert_eq!(attached[0].hits().unwrap().total(), 0);
    // Less than what is shared: it counts for itself, and for the others.
    attached[0].set_tier(Tier::Lifecycle).unwrap();
    targets[0].run("churn 100");
    assert_eq!(spawned(&attached[0]), 100);
    assert!(others(&attached) >= before + 200);
    // As much: for itself alone.
    attached[0].set_tier(Tier::Blocking).unwrap();
    before = others(&attached);
    targets[0].run("churn 100");
    assert_eq!((spawned(&attached[0]), others(&attached)), (200, before));
    // What one of the two wants stays when the other one goes.
    let left = attached.remove(4);
    drop(left);
    targets[4].run("churn 100");
    targets[5].run("churn 100");
    assert_eq!(spawned(&attached[4]), 200);
    attached[4].set_tier(Tier::Census).unwrap();
    targets[5].run("churn 100");
    assert_eq!(spawned(&attached[4]), 200);
}

#[test]
fn tiers_go_up_and_down() {
    let _alone = alone();
    for way in ways() {
        let mut target = Target::start();
        let kernel = Kernel::load_for(way).unwrap();
        let mut attached = kernel
            .attach(target.pid(), &target.plan(), Tier::Census)
            .unwrap();
        target.run("churn 100");
        assert_eq!(attached.hits().unwrap().total(), 0);
        let mut times = Vec::new();
        for tier in [
            Tier::Lifecycle,
            Tier::Blocking,
            Tier::Lifecycle,
            Tier::Census,
            Tier::Blocking,
            Tier::Census,
        ] {
            let from = attached.tier();
            let start = Instant::now();
            attached.set_tier(tier).unwrap();
            times.push((from, tier, start.elapsed()));
            target.run("churn 100");
            target.run("ping 100");
            target.run("settle");
        }
        let counts = attached.read().unwrap();
        assert_eq!(flow(&counts).spawned, 4 * 101);
        assert_eq!(flow(&counts).exited, 4 * 101);
        assert!(losses(&counts).is_empty(), "{:?}", losses(&counts));
        for (from, to, took) in times {
            println!("{way:?}: {} to {}: {took:?}", from.name(), to.name());
        }
    }
}

#[test]
fn a_place_that_cannot_be_probed_is_named_and_nothing_stays() {
    let _alone = alone();
    for way in ways() {
        let mut target = Target::start();
        let kernel = Kernel::load_for(way).unwrap();
        let mut plan = target.plan();
        let mut bad = plan
            .places
            .iter()
            .find(|place| place.role == Role::Exit)
            .cloned()
            .unwrap();
        bad.offset.0 = 1 << 40;
        plan.places.push(bad);
        let error = kernel
            .attach(target.pid(), &plan, Tier::Lifecycle)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("exit at offset 0x10000000000"), "{error}");
        target.run("churn 100");
    }
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let _alone = alone();
    let kernel = Kernel::load().unwrap();
    let target = Target::start();
    let (pid, plan) = (target.pid(), target.plan());
    drop(target);
    let error = kernel
        .attach(pid, &plan, Tier::Lifecycle)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("the process is gone"), "{error}");
}

/// Set for the process that [`a_killed_leakmon_leaves_nothing`] kills.
const CHILD: &str = "LEAKMON_TEST_CHILD";

#[test]
fn a_killed_leakmon_leaves_nothing() {
    let _alone = alone();
    if let Ok(pid) = std::env::var(CHILD) {
        let kernel = Kernel::load().unwrap();
        let plan = target::plan(&target::binary());
        let _attached = kernel
            .attach(pid.parse().unwrap(), &plan, Tier::Blocking)
            .unwrap();
        std::fs::write(format!("{}.{pid}", target::binary().display()), "").unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let mut target = Target::start();
    let places = target.plan().places;
    let before = target.code(&places);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_leakmon_leaves_nothing"])
        .env(CHILD, target.pid().to_string())
        .spawn()
        .unwrap();
    let ready = format!("{}.{}", target::binary().display(), target.pid());
    let start = Instant::now();
    while std::fs::metadata(&ready).is_err() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::remove_file(&ready).unwrap();
    assert_ne!(target.code(&places), before, "nothing was attached");
    target.run("churn 1000");
    child.kill().unwrap();
    child.wait().unwrap();
    let start = Instant::now();
    while target.code(&places) != before {
        assert!(start.elapsed() < Duration::from_secs(5), "still attached");
        target.run("churn 1000");
    }
    target.run("churn 1000");
    target.run("ping 1000");
}

/// What it costs against an empty probe is for `cargo xtask bench`: by how the
/// compiler has laid out the loops that are measured, one of them may take half as
/// long again.
#[test]
fn every_cost_is_measured() {
    let _alone = alone();
    for way in ways() {
        let kernel = Kernel::load_for(way).unwrap();
        let start = Instant::now();
        let calibration = calibrate(&kernel).unwrap();
        let cost = calibration.of(&kernel, Role::all());
        println!("{way:?}: {cost:.0?}, measured in {:?}", start.elapsed());
        for ns in [
            cost.lifecycle_ns,
            cost.blocking_ns,
            cost.poll_ns,
            cost.switch_ns,
        ] {
            assert!(ns > 1.0, "{way:?}: {cost:?}");
        }
        if slowness() > 1 {
            eprintln!("an emulated processor: what a single step costs is not tested");
            continue;
        }
        // A single step takes two more exceptions.
        assert!(cost.poll_stepped_ns > cost.poll_ns, "{way:?}: {cost:?}");
    }
}

#[test]
fn the_calibrated_cost_is_that_of_a_real_program() {
    let _alone = alone();
    let (kernel, calibration) = leakmon::probe::load().unwrap();
    let cost = calibration.of(&kernel, [Role::Spawn, Role::Park]);
    let mut target = Target::start();
    for (command, tier, ns) in [
        ("churn 100000", Tier::Lifecycle, cost.lifecycle_ns),
        ("ping 50000", Tier::Blocking, cost.blocking_ns),
    ] {
        target.run(command);
        let cpu = target.cpu();
        target.run(command);
        let bare = target.cpu() - cpu;
        let empty = kernel
            .attach_empty(
                target.pid(),
                &target.plan().places(tier).cloned().collect::<Vec<_>>(),
            )
            .unwrap();
        let cpu = target.cpu();
        target.run(command);
        let with_empty = target.cpu() - cpu;
        drop(empty);
        let attached = kernel.attach(target.pid(), &target.plan(), tier).unwrap();
        let cpu = target.cpu();
        target.run(command);
        let probed = target.cpu() - cpu;
        let hits = attached.hits().unwrap().total() as f64;
        let per_hit = |with: Duration| (with.as_nanos() as f64 - bare.as_nanos() as f64) / hits;
        println!(
            "{command}: {hits} hits, {bare:?} bare, {with_empty:?} with empty probes ({:.0} ns a hit), \
             {probed:?} probed ({:.0} ns a hit, {ns:.0} ns calibrated)",
            per_hit(with_empty),
            per_hit(probed),
        );
    }
}

/// Puts the target under a governor.
fn govern(kernel: &Kernel, target: &Target, governor: Governor) -> Driver {
    let attached = kernel
        .attach(target.pid(), &target.plan(), Tier::Census)
        .unwrap();
    Drivers::default().start(attached, governor, target.pid())
}

/// Runs a command over and over; says how often.
fn repeat(target: &mut Target, command: &str, until: Instant) -> u32 {
    let mut count = 0;
    while Instant::now() < until {
        target.run(command);
        count += 1;
    }
    count
}

#[test]
fn the_governor_keeps_a_busy_target_within_its_budget() {
    let _alone = alone();
    let (kernel, calibration) = leakmon::probe::load().unwrap();
    let cost = calibration.of(&kernel, [Role::Spawn, Role::Park]);
    let mut target = Target::start();
    let governor = Governor::governed(cost, 5.0, Tier::Blocking);
    let driver = govern(&kernel, &target, governor);
    let command = "ping 10000";
    let time = Duration::from_secs(3);
    repeat(&mut target, command, Instant::now() + time / 3);
    let bare = repeat(&mut target, command, Instant::now() + time);
    repeat(&mut target, command, Instant::now() + time / 3);
    driver.take_interval();
    let governed = repeat(&mut target, command, Instant::now() + time);
    let interval = driver.take_interval();
    println!(
        "busy: {} {interval:?}, {:.1} % of the throughput kept",
        driver.status().tier.name(),
        100.0 * f64::from(governed) / f64::from(bare)
    );
    assert!(interval.overhead.percent < 7.0, "{interval:?}");
    assert!(interval.overhead.attached < 0.5, "{interval:?}");
}

#[test]
fn the_governor_leaves_a_calm_target_attached() {
    let _alone = alone();
    let (kernel, calibration) = leakmon::probe::load().unwrap();
    let cost = calibration.of(&kernel, [Role::Spawn, Role::Park]);
    let mut target = Target::start();
    let governor = Governor::governed(cost, 5.0, Tier::Blocking);
    let driver = govern(&kernel, &target, governor);
    while driver.status().attached < Tier::Blocking {
        std::thread::sleep(Duration::from_millis(1));
    }
    driver.take_interval();
    repeat(
        &mut target,
        "slow 20 5",
        Instant::now() + Duration::from_secs(2),
    );
    let interval = driver.take_interval();
    println!("calm: {} {interval:?}", driver.status().tier.name());
    assert_eq!(interval.blocking, 1.0);
    target.run("settle");
    let counts = driver.counts().unwrap();
    let flow = flow(&counts);
    assert_eq!(flow.spawned, flow.exited);
    assert!(losses(&counts).is_empty());
}
