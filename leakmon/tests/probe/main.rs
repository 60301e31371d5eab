//! The kernel side against a running Go program. Needs root and a Go toolchain.

mod target;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use leakmon::probe::{Counts, Kernel, Role, Tier, Way};
use leakmon::task::SiteFlow;
use target::Target;

/// Both ways of attaching, where the kernel has both.
const WAYS: [Way; 2] = [Way::Multi, Way::PerfEvent];

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
    for way in WAYS {
        let mut target = Target::start();
        let kernel = Kernel::load_for(way).unwrap();
        let attached = kernel
            .attach(target.pid(), &target.plan(), Tier::Lifecycle)
            .unwrap();
        target.run("churn 100000");
        let counts = attached.read().unwrap();
        let entry = target.symbol("main.churnBody");
        let churned: Vec<_> = counts
            .sites
            .iter()
            .filter(|(site, _)| target.function(site.created_at) == "main.churn")
            .collect();
        assert_eq!(churned.len(), 1, "{counts:?}");
        assert_eq!(
            churned[0].1,
            SiteFlow {
                spawned: 100_000,
                exited: 100_000
            },
            "{way:?}, entry {entry:#x}: {counts:?}"
        );
        assert!(losses(&counts).is_empty(), "{:?}", losses(&counts));
        assert_eq!(attached.hits().unwrap(), counts.hits);
    }
}

#[test]
fn blocks_are_exact() {
    for way in WAYS {
        let mut target = Target::start();
        let kernel = Kernel::load_for(way).unwrap();
        let attached = kernel
            .attach(target.pid(), &target.plan(), Tier::Blocking)
            .unwrap();
        // 8 blocked senders, for good.
        target.run("leak 8");
        // 20 waits of 50 ms in one place.
        target.run("slow 20 50");
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
        assert!(buckets[25] >= 18, "{buckets:?}");
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
    let mut target = Target::start();
    let kernel = Kernel::load().unwrap();
    let attached = kernel
        .attach(target.pid(), &target.plan(), Tier::Blocking)
        .unwrap();
    target.run("ping 50000");
    let counts = attached.read().unwrap();
    assert!(losses(&counts).is_empty(), "{:?}", losses(&counts));
    for wait in &counts.waits {
        assert_eq!(wait.parks, wait.resumes, "{wait:?}");
        assert_eq!(wait.durations.buckets.iter().sum::<u64>(), wait.resumes);
    }
    assert!(counts.waits.iter().map(|wait| wait.parks).sum::<u64>() > 50_000);
}

#[test]
fn another_process_of_the_same_file_is_not_counted() {
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

#[test]
fn tiers_go_up_and_down() {
    for way in WAYS {
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
    for way in WAYS {
        let mut target = Target::start();
        let kernel = Kernel::load_for(way).unwrap();
        let mut plan = target.plan();
        let mut bad = *plan
            .places
            .iter()
            .find(|place| place.role == Role::Exit)
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
