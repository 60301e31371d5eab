//! tokio's side: made-up tasks in this very process, with the layout of tokio's,
//! so that every count is known.

use std::arch::global_asm;
use std::time::{Duration, Instant};

use leakmon::binary::addr::FileOffset;
use leakmon::probe::{Code, Kernel, KnownTask, Place, Plan, Role, Tier, Way};
use leakmon::task::{SiteFlow, SiteKey};
use leakmon_common::tokio::{Argument, Layout};

use super::{alone, losses, slowness, ways};

// `fake_poll(task)` calls `task.body`; `fake_shutdown(task)` does nothing.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .text.fake_poll, \"ax\", @progbits",
    ".globl fake_poll",
    ".type fake_poll, @function",
    "fake_poll:",
    "push rbp",
    "mov rbp, rsp",
    "call qword ptr [rdi + 0x40]",
    "pop rbp",
    "ret",
    ".size fake_poll, . - fake_poll",
    ".globl fake_shutdown",
    ".type fake_shutdown, @function",
    "fake_shutdown:",
    "push rbp",
    "pop rbp",
    "ret",
    ".size fake_shutdown, . - fake_shutdown",
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
    "ldr x1, [x0, #0x40]",
    "blr x1",
    "ldp x29, x30, [sp], #16",
    "ret",
    ".size fake_poll, . - fake_poll",
    ".globl fake_shutdown",
    ".type fake_shutdown, @function",
    "fake_shutdown:",
    "nop",
    "ret",
    ".size fake_shutdown, . - fake_shutdown",
    ".popsection",
);

unsafe extern "C" {
    fn fake_poll(task: *mut Task);
    fn fake_shutdown(task: *mut Task);
}

/// Offset of the task id.
const ID: usize = 0x30;

/// What tokio 1.23 and later have at these offsets, as far as it is read.
#[repr(C, align(128))]
struct Task {
    state: u64,
    queue_next: u64,
    vtable: *const Vtable,
    list: u64,
    scheduler: u64,
    other: u64,
    id: u64,
    location: u64,
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
const RUNNING: u64 = 1;
const NOTIFIED: u64 = 4;

impl Task {
    fn new(id: u64) -> Box<Task> {
        Box::new(Task {
            state: ALIVE,
            queue_next: 0,
            vtable: &raw const VTABLE,
            list: 1,
            scheduler: 0,
            other: 0,
            id,
            location: 0,
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
            site: site(),
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

/// Completes, and its memory is free by then, in glibc's way for small pieces: the
/// next one's address in a disguise, and a random number.
extern "C" fn freed(task: *mut Task) {
    // SAFETY: the caller's task.
    unsafe {
        (*task).state = 0x1487_49b4;
        (*task).queue_next = 0xcfbc_5f3c_83e7_965d;
    }
}

/// The same in its way for others: two neighbours' addresses.
extern "C" fn freed_among_neighbours(task: *mut Task) {
    // SAFETY: the caller's task.
    unsafe {
        (*task).state = 0x1484_bbf0 & !COMPLETE;
        (*task).queue_next = 0x1484_be70;
    }
}

/// Is woken, and queued before another one.
extern "C" fn queued(task: *mut Task) {
    // SAFETY: the caller's task.
    unsafe {
        (*task).state = ALIVE | NOTIFIED;
        (*task).queue_next = 0x7f00_1234_5680;
    }
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

/// Where the tasks come from.
fn site() -> SiteKey {
    SiteKey {
        created_at: 0,
        entry: &raw const VTABLE as u64,
    }
}

fn plan() -> Plan {
    Plan {
        layout: Layout { vtable: 2 }.words(),
        places: vec![
            Place {
                code: Code::Executable,
                offset: own_offset(fake_poll as *const () as u64),
                role: Role::Poll,
                argument: argument().pack(),
            },
            Place {
                code: Code::Executable,
                offset: own_offset(fake_shutdown as *const () as u64),
                role: Role::Shutdown,
                argument: argument().pack(),
            },
            Place::nowhere(Role::Idle),
        ],
    }
}

/// What the probes know of all tasks here.
fn argument() -> Argument {
    Argument {
        id: ID as u16,
        ..Argument::default()
    }
}

#[test]
fn polls_are_exact() {
    let _alone = alone();
    assert_eq!(std::mem::offset_of!(Task, id), ID);
    for way in ways() {
        let kernel = Kernel::load_for(way).unwrap();
        let mut attached = kernel
            .attach(std::process::id(), &plan(), Tier::Lifecycle)
            .unwrap();
        assert!(attached.is_learning());
        attached.set_tier(Tier::Blocking).unwrap();

        let began = Instant::now();
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

        // 100 at once, 6 polls each.
        let mut tasks: Vec<Box<Task>> = (100..200).map(Task::new).collect();
        for _ in 0..4 {
            for task in &mut tasks {
                task.poll(pending);
            }
        }
        for (index, task) in tasks.iter_mut().enumerate() {
            task.poll(queued);
            task.poll([ready, overwritten, freed, freed_among_neighbours][index % 4]);
        }
        // The same memory, other tasks.
        for task in &mut tasks {
            task.state = ALIVE;
            task.queue_next = 0;
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
        // A closure on a blocking thread, in memory that a task has left.
        tasks[2].list = 0;
        tasks[2].id = 7000;
        tasks[2].poll(pending);
        tasks[2].poll(ready);
        // Idle for 20 ms, and polled for as long.
        std::thread::sleep(Duration::from_millis(20));
        outer.poll(slow);

        let counts = attached.read().unwrap();
        let site = site();
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
        assert!(task(1).known && task(1).last_poll_end > task(1).first_seen);
        assert_eq!((task(4).first_seen, task(4).last_poll_end), (None, None));
        assert!(!task(901).known);
        let last = task(5000);
        assert_eq!(last.header, outer.header());
        assert_eq!(last.polling_since, None);
        assert_eq!(counts.waits.len(), 1);
        let wait = &counts.waits[0];
        assert_eq!(wait.site, site);
        // All but the closure's, and that of one that had ended.
        assert_eq!(wait.runs.count, counts.hits.of(Role::Poll) - 2 - 1);
        assert!(wait.runs.longest_ns > 20_000_000, "{wait:?}");
        // One was polled within another: both were busy then.
        let most = 2 * u64::try_from(began.elapsed().as_nanos()).unwrap();
        assert!(
            (wait.runs.longest_ns..most).contains(&wait.runs.busy_ns),
            "{wait:?} of {most}"
        );
        // 2^24 ns is 17 ms: the outer task's sleep. On a slow processor the others
        // may take as long.
        let long = wait.durations.buckets[24..].iter().sum::<u64>();
        assert!(long == 1 || long > 1 && slowness() > 1, "{wait:?}");
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
fn tasks_that_are_shut_down_end() {
    let _alone = alone();
    for way in ways() {
        let kernel = Kernel::load_for(way).unwrap();
        let mut attached = kernel
            .attach(std::process::id(), &plan(), Tier::Lifecycle)
            .unwrap();
        attached.learned(&[]).unwrap();
        let shut_down = |task: &mut Task| {
            // SAFETY: it does nothing.
            unsafe { fake_shutdown(task) };
        };
        let mut tasks: Vec<Box<Task>> = (1..=4).map(Task::new).collect();
        for task in &mut tasks[..3] {
            task.poll(pending);
        }
        shut_down(&mut tasks[0]);
        // Another thread polls it: it ends with that poll.
        tasks[1].state = ALIVE | RUNNING;
        shut_down(&mut tasks[1]);
        // It has ended.
        tasks[2].poll(ready);
        shut_down(&mut tasks[2]);
        // Never polled: it never was.
        shut_down(&mut tasks[3]);
        let ended = |exited| {
            let counts = attached.read().unwrap();
            let flow = SiteFlow {
                runs: None,
                spawned: 3,
                exited,
            };
            assert_eq!(counts.sites, [(site(), flow)], "{way:?}");
        };
        ended(2);
        tasks[1].state = ALIVE;
        tasks[1].poll(ready);
        ended(3);
        let hits = attached.hits().unwrap();
        assert_eq!(hits.of(Role::Shutdown), 4);
    }
}

/// Where the task keeps the place of its spawn, that is part of its site; hits at
/// an instruction that is not emulated are told apart.
#[test]
fn places_have_arguments() {
    let _alone = alone();
    for way in ways() {
        let kernel = Kernel::load_for(way).unwrap();
        let mut plan = plan();
        plan.places[0].role = Role::PollStepped;
        plan.places[0].argument = Argument {
            located: true,
            stepped: true,
            ..argument()
        }
        .pack();
        let mut attached = kernel
            .attach(std::process::id(), &plan, Tier::Blocking)
            .unwrap();
        let mut old = Task::new(1);
        old.location = 0x1230;
        let known = KnownTask {
            site: SiteKey {
                created_at: old.location,
                ..site()
            },
            ..old.known()
        };
        attached.learned(&[known]).unwrap();
        old.poll(ready);
        let mut new = Task::new(2);
        new.location = 0x4560;
        new.poll(pending);
        let counts = attached.read().unwrap();
        let flow = |created_at, spawned, exited| {
            let site = SiteKey {
                created_at,
                ..site()
            };
            let runs = None;
            (
                site,
                SiteFlow {
                    spawned,
                    exited,
                    runs,
                },
            )
        };
        assert_eq!(
            counts.sites,
            [flow(0x1230, 0, 1), flow(0x4560, 1, 0)],
            "{way:?}"
        );
        assert_eq!(counts.hits.of(Role::PollStepped), 2);
        assert_eq!(counts.hits.total(), 2);
        assert_eq!(counts.tasks[0].site.created_at, 0x4560);
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
