//! tokio's side: made-up tasks in this very process, with the layout of tokio's,
//! so that every count is known.

use std::arch::global_asm;
use std::time::Duration;

use leakmon::binary::addr::FileOffset;
use leakmon::probe::{Code, Kernel, KnownTask, Place, Plan, Role, Tier, Way};
use leakmon::task::SiteFlow;
use leakmon_common::tokio::Layout;

use super::{WAYS, alone, losses};

// `fake_poll(task)` calls `task.body`.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .text.fake_poll, \"ax\", @progbits",
    ".globl fake_poll",
    ".type fake_poll, @function",
    "fake_poll:",
    "push rbp",
    "mov rbp, rsp",
    "call qword ptr [rdi + 0x38]",
    "pop rbp",
    "ret",
    ".size fake_poll, . - fake_poll",
    ".popsection",
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".pushsection .text.fake_poll, \"ax\", @progbits",
    ".globl fake_poll",
    ".type fake_poll, @function",
    "fake_poll:",
    "nop",
    "stp x29, x30, [sp, #-16]!",
    "mov x29, sp",
    "ldr x1, [x0, #0x38]",
    "blr x1",
    "ldp x29, x30, [sp], #16",
    "ret",
    ".size fake_poll, . - fake_poll",
    ".popsection",
);

unsafe extern "C" {
    fn fake_poll(task: *mut Task);
}

/// Offset of the task id.
const ID: usize = 0x30;

/// What tokio 1.23 and later have at these offsets, as far as it is read.
#[repr(C, align(128))]
struct Task {
    state: u64,
    queue_next: u64,
    vtable: *const Vtable,
    owner: u64,
    scheduler: u64,
    other: u64,
    id: u64,
    body: extern "C" fn(*mut Task),
    inner: *mut Task,
}

#[repr(C)]
struct Vtable {
    poll: unsafe extern "C" fn(*mut Task),
}

static VTABLE: Vtable = Vtable { poll: fake_poll };

/// One reference, nothing else.
const ALIVE: u64 = 1 << 6;
const COMPLETE: u64 = 2;

impl Task {
    fn new(id: u64) -> Box<Task> {
        Box::new(Task {
            state: ALIVE,
            queue_next: 0,
            vtable: &raw const VTABLE,
            owner: 0,
            scheduler: 0,
            other: 0,
            id,
            body: pending,
            inner: std::ptr::null_mut(),
        })
    }

    fn poll(&mut self, body: extern "C" fn(*mut Task)) {
        self.body = body;
        let vtable = self.vtable;
        // SAFETY: `fake_poll` of a live task.
        unsafe { ((*vtable).poll)(self) };
    }

    fn header(&self) -> u64 {
        std::ptr::from_ref(self) as u64
    }

    fn known(&self) -> KnownTask {
        KnownTask {
            header: self.header(),
            id: self.id,
            vtable: &raw const VTABLE as u64,
            poll: fake_poll as *const () as u64,
        }
    }
}

extern "C" fn pending(_: *mut Task) {}

extern "C" fn slow(_: *mut Task) {
    std::thread::sleep(Duration::from_millis(20));
}

extern "C" fn ready(task: *mut Task) {
    // SAFETY: the caller's task.
    unsafe { (*task).state = ALIVE | COMPLETE };
}

/// Completes, and something else is in its memory by then.
extern "C" fn overwritten(task: *mut Task) {
    // SAFETY: the caller's task.
    unsafe { (*task).state = 0x5555_5555_5555_5555 };
}

/// Completes; its memory is the next task's by then, which has been polled.
extern "C" fn replaced(task: *mut Task) {
    // SAFETY: the caller's task.
    let task = unsafe { &mut *task };
    task.state = ALIVE;
    task.id += 1000;
    task.poll(pending);
}

/// Polls its inner task.
extern "C" fn nested(task: *mut Task) {
    // SAFETY: both are live.
    unsafe { (*(*task).inner).poll(pending) };
}

/// Where an address of this executable lies in its file.
pub(crate) fn own_offset(address: u64) -> FileOffset {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-')?;
            let hex = |word| u64::from_str_radix(word, 16).unwrap();
            (hex(start)..hex(end))
                .contains(&address)
                .then(|| FileOffset(hex(fields[2]) + address - hex(start)))
        })
        .unwrap()
}

fn plan() -> Plan {
    Plan {
        layout: Layout { vtable: 2 }.words(),
        places: vec![
            Place {
                code: Code::Executable,
                offset: own_offset(fake_poll as *const () as u64),
                role: Role::Poll,
                argument: (ID / 8) as u16,
            },
            Place::nowhere(Role::Idle),
        ],
    }
}

#[test]
fn polls_are_exact() {
    let _alone = alone();
    assert_eq!(std::mem::offset_of!(Task, id), ID);
    for way in WAYS {
        let kernel = Kernel::load_for(way).unwrap();
        let mut attached = kernel
            .attach(std::process::id(), &plan(), Tier::Lifecycle)
            .unwrap();
        assert!(attached.is_learning());
        attached.set_tier(Tier::Blocking).unwrap();

        let mut old: Vec<Box<Task>> = (1..=4).map(Task::new).collect();
        // Seen before the census, one ends before it is known.
        old[0].poll(pending);
        old[1].poll(ready);
        let known: Vec<KnownTask> = old.iter().map(|task| task.known()).collect();
        attached.learned(&known).unwrap();
        assert!(!attached.is_learning());
        assert_eq!(attached.read().unwrap().sites, []);
        // Polled once more, though it has ended.
        old[1].poll(pending);
        // An old one ends that was never polled: one exit.
        old[2].poll(ready);

        // 100 at once, 5 polls each.
        let mut tasks: Vec<Box<Task>> = (100..200).map(Task::new).collect();
        for _ in 0..4 {
            for task in &mut tasks {
                task.poll(pending);
            }
        }
        for (index, task) in tasks.iter_mut().enumerate() {
            task.poll(if index % 2 == 0 { ready } else { overwritten });
        }
        // The same memory, other tasks.
        for task in &mut tasks {
            task.state = ALIVE;
            task.id += 300;
            task.poll(pending);
            task.poll(ready);
        }
        // One that is gone without a poll, its memory used again.
        tasks[0].state = ALIVE;
        tasks[0].id = 900;
        tasks[0].poll(pending);
        tasks[0].id = 901;
        tasks[0].poll(pending);
        // One whose memory is used again before its poll returns.
        tasks[1].state = ALIVE;
        tasks[1].id = 2000;
        tasks[1].poll(replaced);
        // One within another.
        let mut outer = Task::new(5000);
        let mut inner = Task::new(5001);
        outer.inner = &raw mut *inner;
        outer.poll(nested);
        outer.poll(nested);
        // Idle for 20 ms, and polled for as long.
        std::thread::sleep(Duration::from_millis(20));
        outer.poll(slow);

        let counts = attached.read().unwrap();
        let site = leakmon::task::SiteKey {
            created_at: 0,
            entry: fake_poll as *const () as u64,
        };
        let flow = SiteFlow {
            runs: None,
            // 100, 100 in their memory, 900, 901, 2000, 3000, and the two last.
            spawned: 206,
            // The old one, 200, 900, 2000.
            exited: 203,
        };
        assert_eq!(counts.sites, [(site, flow)], "{way:?}");
        assert!(losses(&counts).is_empty(), "{:?}", losses(&counts));
        let ids: Vec<u64> = {
            let mut ids: Vec<u64> = counts.tasks.iter().map(|task| task.id).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(ids, [1, 4, 901, 3000, 5000, 5001], "{way:?}");
        let task = |id| counts.tasks.iter().find(|task| task.id == id).unwrap();
        assert_eq!((task(1).polls, task(1).known), (1, true));
        assert_eq!(task(4).first_seen, None);
        assert_eq!((task(901).polls, task(901).known), (1, false));
        assert_eq!(task(5001).polls, 2);
        let last = task(5000);
        assert_eq!((last.polls, last.header), (3, outer.header()));
        assert_eq!(last.polling_since, None);
        assert!(
            last.longest_ns > 20_000_000 && last.busy_ns < 40_000_000,
            "{last:?}"
        );
        assert_eq!(counts.waits.len(), 1);
        let wait = &counts.waits[0];
        assert_eq!(wait.site, site);
        // 2^24 ns is 17 ms: the outer task's sleep.
        assert_eq!(wait.durations.buckets[24..].iter().sum::<u64>(), 1);
        assert_eq!(wait.parks - wait.resumes, 5 - 1 + 2, "{wait:?}");

        // Away, and back: what it saw holds no more.
        attached.set_tier(Tier::Census).unwrap();
        outer.poll(pending);
        inner.poll(ready);
        attached.set_tier(Tier::Blocking).unwrap();
        assert!(attached.is_learning());
        outer.poll(pending);
        attached.learned(&[old[0].known(), outer.known()]).unwrap();
        let counts = attached.read().unwrap();
        assert_eq!(counts.sites, [(site, flow)], "{way:?}");
        let mut ids: Vec<u64> = counts.tasks.iter().map(|task| task.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [1, 5000]);
    }
}

#[test]
fn what_a_poll_costs() {
    let _alone = alone();
    for way in [Way::Multi, Way::PerfEvent] {
        let kernel = Kernel::load_for(way).unwrap();
        let mut task = Task::new(1);
        let mut run = |rounds: u32| {
            let start = std::time::Instant::now();
            for _ in 0..rounds {
                task.poll(pending);
            }
            start.elapsed() / rounds
        };
        let bare = run(10_000);
        let mut attached = kernel
            .attach(std::process::id(), &plan(), Tier::Lifecycle)
            .unwrap();
        attached.learned(&[]).unwrap();
        let lifecycle = run(10_000);
        attached.set_tier(Tier::Blocking).unwrap();
        println!(
            "{way:?}: a poll {bare:?}, probed {lifecycle:?}, with its idle time {:?}",
            run(10_000)
        );
    }
}
