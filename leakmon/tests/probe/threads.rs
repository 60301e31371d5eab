//! The kernel's own tasks: threads of a child.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use leakmon::binary::addr::FileOffset;
use leakmon::probe::{Code, Kernel, KnownThread, Place, Plan, ProcessEvent, Role, Tier};
use leakmon::task::SiteKey;
use leakmon_common::threads::{Layout, Shared, reason};

use super::{alone, losses, slowness, ways};

/// A child that waits on its standard input, and is killed in the end.
struct Blocked(Child);

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn registers_of_a_blocked_thread_are_those_of_proc() {
    let _alone = alone();
    let child = Blocked(Command::new("cat").stdin(Stdio::piped()).spawn().unwrap());
    let pid = child.0.id();
    let kernel = Kernel::load().unwrap();
    // "NUMBER six arguments SP PC", or "running".
    let proc = || {
        let line = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/syscall")).unwrap();
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        (words.len() == 9).then_some(words)
    };
    let start = Instant::now();
    let words = loop {
        // read(2) of its standard input.
        match proc() {
            Some(words) if words[0] == libc::SYS_read.to_string() && words[1] == "0x0" => {
                break words;
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
        assert!(start.elapsed() < Duration::from_secs(10));
    };
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
    let threads = kernel.registers(pid).unwrap();
    assert_eq!(threads.len(), 1, "{threads:?}");
    let thread = threads[0];
    assert!(thread.is_blocked());
    assert_eq!(thread.tid, pid);
    assert_eq!(thread.syscall, Some(libc::SYS_read as u32));
    assert_eq!((thread.sp, thread.ip), (hex(&words[7]), hex(&words[8])));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    assert_eq!(thread.voluntary_switches, field("voluntary_ctxt_switches:"));
    assert_eq!(
        thread.involuntary_switches,
        field("nonvoluntary_ctxt_switches:")
    );

    // All threads of a process, and only its own.
    let own = kernel.registers(std::process::id()).unwrap();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert_eq!(own.len(), tasks);
    let start = Instant::now();
    for _ in 0..100 {
        kernel.registers(pid).unwrap();
    }
    println!("one thread's registers: {:?}", start.elapsed() / 100);
    drop(child);
    assert_eq!(kernel.registers(pid).unwrap(), []);
}

/// The file and offset of an address of this process.
fn code(address: u64) -> (File, FileOffset) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let hex = |word| u64::from_str_radix(word, 16).unwrap();
    maps.lines()
        .find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-')?;
            (hex(start)..hex(end)).contains(&address).then(|| {
                // Without zeros in front, unlike the line.
                let range = format!("{:x}-{:x}", hex(start), hex(end));
                let file = File::open(format!("/proc/self/map_files/{range}")).unwrap();
                (file, FileOffset(hex(fields[2]) + address - hex(start)))
            })
        })
        .unwrap()
}

extern "C" fn waits(_: *mut libc::c_void) -> *mut libc::c_void {
    std::thread::sleep(Duration::from_millis(20));
    std::ptr::null_mut()
}

extern "C" fn told_apart(_: *mut libc::c_void) -> *mut libc::c_void {
    std::ptr::null_mut()
}

#[inline(never)]
fn create(start: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void, argument: &[u64; 3]) {
    let mut thread = 0;
    // SAFETY: the start routines read nothing of their argument.
    unsafe {
        let argument = std::ptr::from_ref(argument).cast_mut().cast();
        let made = libc::pthread_create(&raw mut thread, std::ptr::null(), start, argument);
        assert_eq!(made, 0);
        assert_eq!(libc::pthread_join(thread, std::ptr::null_mut()), 0);
    }
}

fn plan() -> Plan {
    let (file, offset) = code(libc::pthread_create as *const () as u64);
    Plan {
        layout: Layout {
            shared: [
                Shared::default(),
                Shared {
                    start: told_apart as *const () as u64,
                    offset: 16,
                },
            ],
        }
        .words(),
        places: vec![
            Place {
                code: Code::File(Arc::new(file)),
                offset,
                role: Role::ThreadCreate,
                argument: 0,
            },
            Place::nowhere(Role::ThreadStart),
            Place::nowhere(Role::ThreadExit),
            Place::nowhere(Role::ThreadSwitch),
        ],
    }
}

#[test]
fn threads_are_exact() {
    let _alone = alone();
    for way in ways() {
        let kernel = Kernel::load_for(way).unwrap();
        let mut attached = kernel
            .attach(std::process::id(), &plan(), Tier::Lifecycle)
            .unwrap();
        for _ in 0..10 {
            create(waits, &[1, 2, 3]);
        }
        for word in [77, 77, 88] {
            create(told_apart, &[1, 2, word]);
        }
        // A join may come before the kernel's end of a thread.
        std::thread::sleep(Duration::from_millis(20));
        let counts = attached.read().unwrap();
        let of = |entry: u64| {
            let site = counts.sites.iter().find(|(site, _)| site.entry == entry);
            site.unwrap_or_else(|| panic!("{way:?}: {entry:#x}: {counts:?}"))
        };
        let (site, flow) = of(waits as *const () as u64);
        assert_eq!((flow.spawned, flow.exited), (10, 10), "{way:?}");
        assert_eq!((of(77).1.spawned, of(77).1.exited), (2, 2));
        assert_eq!((of(88).1.spawned, of(88).1.exited), (1, 1));
        assert_eq!(counts.hits.of(Role::ThreadCreate), 13);

        let stacks = attached.creation_stacks().unwrap();
        assert_eq!(stacks.len(), 3);
        let stack = stacks.iter().find(|stack| stack.site == *site).unwrap();
        assert_eq!(stack.ip, libc::pthread_create as *const () as u64);
        assert!(stack.bytes.len() >= 1024);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(stack.bytes[..8], site.created_at.to_le_bytes());
        let memory = File::open("/proc/self/mem").unwrap();
        assert!(memory.read_exact_at(&mut [0], stack.sp).is_ok());

        attached.set_tier(Tier::Blocking).unwrap();
        for _ in 0..5 {
            create(waits, &[1, 2, 3]);
        }
        let (send, receive) = mpsc::channel();
        let blocked = std::thread::spawn(move || {
            // SAFETY: it has no arguments.
            send.send(unsafe { libc::gettid() } as u32).unwrap();
            std::thread::park();
        });
        let tid = receive.recv().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let counts = attached.read().unwrap();
        let sleep = reason(libc::SYS_clock_nanosleep as u32, 0);
        let slept: Vec<_> = counts
            .waits
            .iter()
            .filter(|wait| wait.site == *site && wait.reason == sleep)
            .collect();
        assert_eq!(slept.len(), 1, "{:?}", counts.waits);
        let mut lost = losses(&counts);
        // See `not_seen_to_go_on` in thread_flow.rs.
        let unseen = lost.remove("resume not seen").unwrap_or(0);
        assert!(lost.is_empty() && unseen < 3, "{unseen} and {lost:?}");
        assert_eq!(slept[0].parks, 5);
        assert!(slept[0].resumes <= 5 && slept[0].resumes + unseen >= 5);
        // 2^24 ns is 17 ms. A slow processor needs a part of the time that a thread
        // is to sleep for to take it from its CPU.
        let shortest = if slowness() > 1 { 23 } else { 24 };
        let long = slept[0].durations.buckets[shortest..].iter();
        assert_eq!(long.sum::<u64>(), slept[0].resumes, "{counts:?}");
        let thread = counts
            .threads
            .iter()
            .find(|thread| thread.tid == tid)
            .unwrap();
        // FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, as Rust's std parks.
        assert_eq!(thread.reason, reason(libc::SYS_futex as u32, 0x89));
        let line = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(format!("{:#x}", thread.argument), words[1]);
        assert!(thread.blocked_since.is_some() && thread.born.is_some());
        let registers = kernel.registers(std::process::id()).unwrap();
        let switches = registers.iter().find(|thread| thread.tid == tid).unwrap();
        assert_eq!(switches.voluntary_switches, thread.voluntary, "{thread:?}");
        blocked.thread().unpark();
        blocked.join().unwrap();
        drop(attached);
        create(waits, &[1, 2, 3]);
    }
}

/// A thread that ends when it is told to, and its id.
fn until_told() -> (u32, mpsc::Sender<()>, std::thread::JoinHandle<()>) {
    let (give, tid) = mpsc::channel();
    let (end, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        // SAFETY: it has no arguments.
        give.send(unsafe { libc::gettid() } as u32).unwrap();
        let _ = told.recv();
    });
    (tid.recv().unwrap(), end, thread)
}

#[test]
fn an_id_that_is_used_again_is_another_threads() {
    /// What the kernel counts thread ids from (CONFIG_CHECKPOINT_RESTORE).
    const LAST: &str = "/proc/sys/kernel/ns_last_pid";
    let _alone = alone();
    if std::fs::metadata(LAST).is_err() {
        println!("there is no {LAST}: it is not tested");
        return;
    }
    let kernel = Kernel::load().unwrap();
    let mut attached = kernel
        .attach(std::process::id(), &plan(), Tier::Lifecycle)
        .unwrap();
    let (tid, end, first) = until_told();
    let counts = attached.read().unwrap();
    let seen = counts.threads.iter().find(|thread| thread.tid == tid);
    let site = seen.unwrap().site;
    assert_ne!(site.created_at, 0);
    attached.set_tier(Tier::Census).unwrap();
    drop(end);
    first.join().unwrap();
    let own = format!("/proc/self/task/{tid}");
    while std::fs::metadata(&own).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Somebody else may be faster.
    let again = (0..100).find_map(|_| {
        std::fs::write(LAST, (tid - 1).to_string()).unwrap();
        let thread = until_told();
        if thread.0 == tid {
            return Some(thread);
        }
        drop(thread.1);
        thread.2.join().unwrap();
        None
    });
    let (_, end, second) = again.expect("the id again");
    for tier in [Tier::Lifecycle, Tier::Blocking] {
        attached.set_tier(tier).unwrap();
    }
    drop(end);
    second.join().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let counts = attached.read().unwrap();
    let of = |key| counts.sites.iter().find(|(site, _)| *site == key);
    let (_, flow) = of(site).unwrap();
    assert_eq!((flow.spawned, flow.exited), (1, 0), "{counts:?}");
    let (_, unknown) = of(SiteKey::default()).unwrap();
    assert_eq!(unknown.exited, 1, "{counts:?}");
    assert!(counts.waits.iter().all(|wait| wait.site != site));
}

#[test]
fn threads_that_were_there_are_counted_as_was_said() {
    let _alone = alone();
    let kernel = Kernel::load().unwrap();
    let (tid, end, thread) = until_told();
    let mut attached = kernel
        .attach(std::process::id(), &plan(), Tier::Census)
        .unwrap();
    let site = SiteKey {
        created_at: 0,
        entry: 4711,
    };
    attached.know_threads(&[KnownThread { tid, site }]).unwrap();
    attached.set_tier(Tier::Blocking).unwrap();
    drop(end);
    thread.join().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let counts = attached.read().unwrap();
    let flow = counts.sites.iter().find(|(key, _)| *key == site).unwrap().1;
    assert_eq!((flow.spawned, flow.exited), (0, 1));
    drop(attached);
    // Nothing is left of it.
    let attached = kernel
        .attach(std::process::id(), &plan(), Tier::Lifecycle)
        .unwrap();
    assert!(
        attached
            .read()
            .unwrap()
            .threads
            .iter()
            .all(|t| t.tid != tid)
    );
}

#[test]
fn two_plans_of_one_process_do_not_share_its_threads() {
    let _alone = alone();
    let kernel = Kernel::load().unwrap();
    let first = kernel
        .attach(std::process::id(), &plan(), Tier::Lifecycle)
        .unwrap();
    let second = kernel.attach(std::process::id(), &plan(), Tier::Lifecycle);
    assert!(second.is_err());
    drop(first);
    let third = kernel.attach(std::process::id(), &plan(), Tier::Lifecycle);
    assert!(third.is_ok());
}

#[test]
fn processes_tell_what_becomes_of_them() {
    let _alone = alone();
    let kernel = Kernel::load().unwrap();
    let mut events = kernel.events().unwrap();
    assert!(kernel.events().is_err());
    let mut pids = Vec::new();
    for _ in 0..20 {
        let mut child = Command::new("true").spawn().unwrap();
        pids.push(child.id());
        child.wait().unwrap();
    }
    let (read, lost) = events.read().unwrap();
    assert_eq!(lost, 0);
    for pid in pids {
        let own: Vec<ProcessEvent> = read
            .iter()
            .copied()
            .filter(|event| event.pid() == pid)
            .collect();
        assert_eq!(
            own,
            [
                ProcessEvent::Fork(pid),
                ProcessEvent::Exec(pid),
                ProcessEvent::Exit(pid)
            ]
        );
    }
}

#[test]
fn what_a_switch_costs() {
    let _alone = alone();
    let kernel = Kernel::load().unwrap();
    let ping = || {
        let (there, from) = mpsc::sync_channel::<()>(0);
        let (back, answer) = mpsc::sync_channel::<()>(0);
        let thread = std::thread::spawn(move || {
            while from.recv().is_ok() {
                back.send(()).unwrap();
            }
        });
        let cpu = leakmon::probe::cpu_time(std::process::id()).unwrap();
        for _ in 0..20_000 {
            there.send(()).unwrap();
            answer.recv().unwrap();
        }
        let cpu = leakmon::probe::cpu_time(std::process::id()).unwrap() - cpu;
        drop(there);
        thread.join().unwrap();
        cpu
    };
    ping();
    let bare = ping();
    let attached = kernel
        .attach(std::process::id(), &plan(), Tier::Blocking)
        .unwrap();
    let before = attached.hits().unwrap().total();
    let probed = ping();
    let hits = attached.hits().unwrap().total() - before;
    let per_hit = (probed.as_nanos() as f64 - bare.as_nanos() as f64) / hits as f64;
    println!("{bare:?} bare, {probed:?} probed, {hits} hits, {per_hit:.0} ns a hit");
}

/// Kernel memory of the maps that a file descriptor of this process holds, in
/// bytes.
fn map_memory() -> u64 {
    std::fs::read_dir("/proc/self/fdinfo")
        .unwrap()
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok())
        .filter(|info| info.contains("map_type:"))
        .filter_map(|info| {
            let line = info
                .lines()
                .find_map(|line| line.strip_prefix("memlock:"))?;
            line.trim().parse::<u64>().ok()
        })
        .sum()
}

#[test]
fn many_idle_targets_need_little_kernel_memory() {
    let _alone = alone();
    let kernel = Kernel::load().unwrap();
    let mut children = Vec::new();
    let mut attached = Vec::new();
    let start = Instant::now();
    let plan = Plan {
        places: plan().places.split_off(1),
        ..plan()
    };
    for _ in 0..500 {
        let child = Blocked(Command::new("cat").stdin(Stdio::piped()).spawn().unwrap());
        let pid = child.0.id();
        children.push(child);
        attached.push(kernel.attach(pid, &plan, Tier::Lifecycle).unwrap());
        // The other runtimes' plans, with nothing attached.
        attached.push(kernel.attach(pid, &plan, Tier::Census).unwrap());
        attached.push(kernel.attach(pid, &plan, Tier::Census).unwrap());
    }
    let bytes = map_memory();
    println!(
        "1500 plans of 500 processes: {} KiB, attached in {:?}",
        bytes / 1024,
        start.elapsed()
    );
    assert!(bytes < 40 << 20, "{bytes}");
    assert!(bytes > 1 << 20, "{bytes}");
    let start = Instant::now();
    drop(attached);
    println!("detached in {:?}", start.elapsed());
}
