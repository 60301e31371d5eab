//! What a probe hit costs on this machine, measured on leakmon's own process.
//!
//! Loops in assembly hold a made-up goroutine in the registers in which Go
//! would hold a real one and pass two places. The programs that leakmon
//! attaches to a target are attached to these, and run the same path.
//!
//! It also proves that probes of a process fire in all of its threads, which
//! uprobe_multi links of kernel 6.6 to 6.9 did not do: the loops run in a thread
//! that is not the process's first.

use std::arch::global_asm;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use leakmon_common::go::{Layout, STARTPC_FROM_GOPC};
use leakmon_common::tokio;

use super::error::Error;
use super::kernel::{Attached, Kernel, Way};
use super::lock;
use super::plan::{Code, Measured, Place, Plan, Role, Tier};
use crate::binary::addr::FileOffset;

/// Defines the function `$name(g, frame, rounds)`: it passes `$begin` and
/// `$end`, both instructions that the kernel emulates, `rounds` times.
macro_rules! calibration_loop {
    ($name:ident, $begin:ident, $end:ident) => {
        global_asm!(
            concat!(".pushsection .text.", stringify!($name), ", \"ax\", @progbits"),
            ".p2align 4",
            concat!(".globl ", stringify!($name)),
            concat!(".globl ", stringify!($begin)),
            concat!(".globl ", stringify!($end)),
            concat!(".hidden ", stringify!($name)),
            concat!(".hidden ", stringify!($begin)),
            concat!(".hidden ", stringify!($end)),
            concat!(".type ", stringify!($name), ", @function"),
            concat!(stringify!($name), ":"),
            prologue!(),
            "2:",
            concat!(stringify!($begin), ":"),
            emulated!("3"),
            concat!(stringify!($end), ":"),
            emulated!("4"),
            epilogue!("2b"),
            concat!(".size ", stringify!($name), ", . - ", stringify!($name)),
            ".popsection",
            reason = const REASON,
        );

        unsafe extern "C" {
            fn $name(g: *const u64, frame: *const u64, rounds: u64);
            static $begin: u8;
            static $end: u8;
        }
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! prologue {
    () => {
        // rax: spawn (returned), exit, ready; rbx: spawn; r14: park, resume;
        // rbp: the park's stack; ecx: its reason.
        "push rbp
         push rbx
         push r14
         mov rax, rdi
         mov rbx, rdi
         mov r14, rdi
         mov rbp, rsi
         mov ecx, {reason}"
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! emulated {
    ($label:literal) => {
        "push rbp
         pop rbp"
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! epilogue {
    ($back:literal) => {
        concat!(
            "dec rdx
             jnz ",
            $back,
            "
             pop r14
             pop rbx
             pop rbp
             ret"
        )
    };
}

#[cfg(target_arch = "aarch64")]
macro_rules! prologue {
    () => {
        // x0: spawn (returned), exit, ready; x1: spawn; x28: park, resume; x29:
        // the park's stack; x2: its reason.
        "stp x29, x30, [sp, #-32]!
         str x28, [sp, #16]
         mov x28, x0
         mov x29, x1
         mov x3, x2
         mov x1, x0
         mov x2, #{reason}"
    };
}

#[cfg(target_arch = "aarch64")]
macro_rules! emulated {
    ($label:literal) => {
        concat!("b ", $label, "f\n", $label, ":")
    };
}

#[cfg(target_arch = "aarch64")]
macro_rules! epilogue {
    ($back:literal) => {
        concat!(
            "subs x3, x3, #1
             b.ne ",
            $back,
            "
             ldr x28, [sp, #16]
             ldp x29, x30, [sp], #32
             ret"
        )
    };
}

calibration_loop!(
    leakmon_calibrate_empty,
    leakmon_calibrate_empty_begin,
    leakmon_calibrate_empty_end
);
calibration_loop!(
    leakmon_calibrate_lifecycle,
    leakmon_calibrate_lifecycle_begin,
    leakmon_calibrate_lifecycle_end
);
calibration_loop!(
    leakmon_calibrate_blocking,
    leakmon_calibrate_blocking_begin,
    leakmon_calibrate_blocking_end
);

// `leakmon_calibrate_polls(task, rounds, polled)` calls `polled(task)`:
// `leakmon_calibrate_polled`, which begins with an instruction that the kernel
// emulates, or `leakmon_calibrate_stepped`, which does not.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .text.leakmon_calibrate_polls, \"ax\", @progbits",
    ".p2align 4",
    ".globl leakmon_calibrate_polls",
    ".hidden leakmon_calibrate_polls",
    ".type leakmon_calibrate_polls, @function",
    "leakmon_calibrate_polls:",
    "push rbx",
    "push r14",
    "push r15",
    "mov rbx, rdi",
    "mov r14, rsi",
    "mov r15, rdx",
    "2:",
    "mov rdi, rbx",
    "call r15",
    "dec r14",
    "jnz 2b",
    "pop r15",
    "pop r14",
    "pop rbx",
    "ret",
    ".size leakmon_calibrate_polls, . - leakmon_calibrate_polls",
    ".globl leakmon_calibrate_polled",
    ".hidden leakmon_calibrate_polled",
    ".type leakmon_calibrate_polled, @function",
    "leakmon_calibrate_polled:",
    "push rbp",
    "pop rbp",
    "ret",
    ".size leakmon_calibrate_polled, . - leakmon_calibrate_polled",
    ".globl leakmon_calibrate_stepped",
    ".hidden leakmon_calibrate_stepped",
    ".type leakmon_calibrate_stepped, @function",
    "leakmon_calibrate_stepped:",
    "sub rsp, 8",
    "add rsp, 8",
    "ret",
    ".size leakmon_calibrate_stepped, . - leakmon_calibrate_stepped",
    ".popsection",
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".pushsection .text.leakmon_calibrate_polls, \"ax\", @progbits",
    ".p2align 4",
    ".globl leakmon_calibrate_polls",
    ".hidden leakmon_calibrate_polls",
    ".type leakmon_calibrate_polls, @function",
    "leakmon_calibrate_polls:",
    "stp x29, x30, [sp, #-48]!",
    "stp x19, x20, [sp, #16]",
    "str x21, [sp, #32]",
    "mov x19, x0",
    "mov x20, x1",
    "mov x21, x2",
    "2:",
    "mov x0, x19",
    "blr x21",
    "subs x20, x20, #1",
    "b.ne 2b",
    "ldr x21, [sp, #32]",
    "ldp x19, x20, [sp, #16]",
    "ldp x29, x30, [sp], #48",
    "ret",
    ".size leakmon_calibrate_polls, . - leakmon_calibrate_polls",
    ".globl leakmon_calibrate_polled",
    ".hidden leakmon_calibrate_polled",
    ".type leakmon_calibrate_polled, @function",
    "leakmon_calibrate_polled:",
    "b 3f",
    "3:",
    "ret",
    ".size leakmon_calibrate_polled, . - leakmon_calibrate_polled",
    ".globl leakmon_calibrate_stepped",
    ".hidden leakmon_calibrate_stepped",
    ".type leakmon_calibrate_stepped, @function",
    "leakmon_calibrate_stepped:",
    "mov x1, x0",
    "ret",
    ".size leakmon_calibrate_stepped, . - leakmon_calibrate_stepped",
    ".popsection",
);

unsafe extern "C" {
    fn leakmon_calibrate_polls(task: *const u64, rounds: u64, polled: *const u8);
    static leakmon_calibrate_polled: u8;
    static leakmon_calibrate_stepped: u8;
}

/// One of the loops.
#[derive(Clone, Copy)]
struct Loop {
    run: unsafe extern "C" fn(*const u64, *const u64, u64),
    /// Addresses of its two places.
    begin: u64,
    end: u64,
}

/// The three loops: detaching takes longer than a measurement, so that each has
/// places of its own.
fn loops() -> [Loop; 3] {
    [
        Loop {
            run: leakmon_calibrate_empty,
            begin: &raw const leakmon_calibrate_empty_begin as u64,
            end: &raw const leakmon_calibrate_empty_end as u64,
        },
        Loop {
            run: leakmon_calibrate_lifecycle,
            begin: &raw const leakmon_calibrate_lifecycle_begin as u64,
            end: &raw const leakmon_calibrate_lifecycle_end as u64,
        },
        Loop {
            run: leakmon_calibrate_blocking,
            begin: &raw const leakmon_calibrate_blocking_begin as u64,
            end: &raw const leakmon_calibrate_blocking_end as u64,
        },
    ]
}

/// Any wait reason.
const REASON: u8 = 15;

/// Rounds of a measurement, two hits each.
const ROUNDS: u64 = 250;

/// Measurements, of which the median counts.
const MEASUREMENTS: usize = 9;

/// Where the made-up goroutine has its fields.
const LAYOUT: Layout = Layout {
    goid: 152,
    gopc: 288,
    waitreason: 176,
    sched_bp: 96,
    reasons: !0,
};

/// Words of the made-up goroutine.
const G_WORDS: usize = 64;

/// What a hit costs a target on this machine, in nanoseconds of its CPU time; 0
/// where nobody has asked for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// A hit of a program that does nothing.
    pub empty_ns: f64,
    /// A hit of the programs of the tier `lifecycle`.
    pub lifecycle_ns: f64,
    /// A hit of the programs that the tier `blocking` adds. Half as much again as
    /// one of `lifecycle` where it cannot be measured.
    pub blocking_ns: f64,
    /// A poll of a tokio task: its call, its return and its idle time. Ten times
    /// an empty hit where it cannot be measured, and hardly be attached.
    pub poll_ns: f64,
    /// The same where the kernel does not emulate the probed instruction but
    /// executes it out of line, step by step. Ten times as much where it cannot be
    /// measured.
    pub poll_stepped_ns: f64,
    /// A thread is taken from its CPU or put on one. As much as a hit of the tier
    /// `lifecycle` where it cannot be measured.
    pub switch_ns: f64,
}

impl Cost {
    /// What of a role's hit hangs on what is in the caches: all but the exceptions
    /// that a step takes.
    pub(super) fn cached(&self, role: Role) -> f64 {
        match role.program().cost {
            Measured::PollStepped => self.poll_ns,
            _ => self.of(role),
        }
    }

    /// A hit of a role's program.
    pub fn of(&self, role: Role) -> f64 {
        match role.program().cost {
            Measured::Lifecycle => self.lifecycle_ns,
            Measured::Blocking => self.blocking_ns,
            Measured::Poll => self.poll_ns,
            Measured::PollStepped => self.poll_stepped_ns,
            Measured::Switch => self.switch_ns,
        }
    }
}

/// What hits cost, as far as somebody has asked: the kernel takes as long to accept
/// some programs as the rest of leakmon's start takes.
pub struct Calibration(Mutex<Cost>);

impl Calibration {
    /// The cost of hits of these roles, and of any others that are known by now.
    /// What is not known yet is measured on leakmon's own process, once; what cannot
    /// be measured, as when a map is full, is taken to be dear.
    pub fn of(&self, kernel: &Kernel, roles: impl IntoIterator<Item = Role>) -> Cost {
        let mut cost = lock(&self.0);
        for role in roles {
            cost.measure(kernel, role.program().cost);
        }
        *cost
    }
}

impl Cost {
    /// Measures one figure, if it is not known.
    fn measure(&mut self, kernel: &Kernel, what: Measured) {
        match what {
            Measured::Blocking if self.blocking_ns == 0.0 => {
                let [_, _, blocking] = loops();
                let waits = [Role::Park, Role::Resume];
                let measured = apart(|| measure_hit(kernel, blocking, waits, Tier::Blocking));
                self.blocking_ns = measured_or(measured, 1.5 * self.lifecycle_ns);
            }
            Measured::Poll if self.poll_ns == 0.0 => {
                let measured = apart(|| measure_poll(kernel, Role::Poll));
                self.poll_ns = measured_or(measured, 10.0 * self.empty_ns);
            }
            Measured::PollStepped if self.poll_stepped_ns == 0.0 => {
                self.measure(kernel, Measured::Poll);
                let measured = apart(|| measure_poll(kernel, Role::PollStepped));
                self.poll_stepped_ns = measured_or(measured, 10.0 * self.poll_ns);
            }
            _ => {}
        }
    }
}

/// What was measured, or else this: no other figure hangs on it.
fn measured_or<T>(measured: Result<T, Error>, otherwise: T) -> T {
    measured.unwrap_or_else(|error| {
        log::info!("{error}");
        otherwise
    })
}

/// Loads the kernel side in the best way that is proven to work here.
///
/// # Errors
///
/// Those of [`Kernel::load`] and [`calibrate`].
pub fn load() -> Result<(Kernel, Calibration), Error> {
    let kernel = Kernel::load()?;
    let calibration = match calibrate(&kernel) {
        Err(error) if kernel.way() == Way::Multi => {
            log::info!("uprobe_multi links are not used: {error}");
            drop(kernel);
            let kernel = Kernel::load_for(Way::PerfEvent)?;
            let calibration = calibrate(&kernel)?;
            return Ok((kernel, calibration));
        }
        calibration => calibration?,
    };
    Ok((kernel, calibration))
}

/// Proves that probes fire and count, and measures what the hits cost that every
/// process has. It attaches to leakmon's own process, which nobody watches yet.
///
/// # Errors
///
/// [`Error::NotFiring`] when the probes do not count exactly what they should.
pub fn calibrate(kernel: &Kernel) -> Result<Calibration, Error> {
    let [empty, lifecycle, _] = loops();
    let sites = [Role::Spawn, Role::Exit];
    let cost = apart(|| {
        let empty_ns = measure_empty(kernel, empty)?;
        let lifecycle_ns = measure_hit(kernel, lifecycle, sites, Tier::Lifecycle)?;
        Ok(Cost {
            empty_ns,
            lifecycle_ns,
            blocking_ns: 0.0,
            poll_ns: 0.0,
            poll_stepped_ns: 0.0,
            // A hit takes an exception besides: rather too much than nothing.
            switch_ns: measured_or(measure_switch(kernel), None).unwrap_or(lifecycle_ns),
        })
    })?;
    Ok(Calibration(Mutex::new(cost)))
}

/// Measures in a thread that is not the process's first.
fn apart<T: Send>(measure: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let measured = scope.spawn(measure).join();
        measured.unwrap_or_else(|_| Err(Error::NotFiring("the calibration panicked".to_owned())))
    })
}

/// A plan of a loop's two places.
fn plan(of: Loop, roles: [Role; 2]) -> Result<Plan, Error> {
    let mut places = Vec::new();
    for (address, role) in [of.begin, of.end].into_iter().zip(roles) {
        places.push(Place {
            code: Code::Executable,
            offset: own_offset(address)?,
            role,
            argument: 2,
        });
    }
    Ok(Plan {
        layout: LAYOUT.words(),
        places,
    })
}

/// What a hit of the program that does nothing costs.
fn measure_empty(kernel: &Kernel, empty: Loop) -> Result<f64, Error> {
    let bare = per_hit(empty);
    let places = plan(empty, [Role::Spawn, Role::Exit])?.places;
    let attached = kernel.attach_empty(std::process::id(), &places)?;
    let probed = per_hit(empty);
    detach(attached);
    Ok((probed - bare).max(1.0))
}

/// What a hit costs that is one of these two in turn, which must count what was
/// done.
fn measure_hit(kernel: &Kernel, of: Loop, roles: [Role; 2], tier: Tier) -> Result<f64, Error> {
    let bare = per_hit(of);
    let attached = kernel.attach(std::process::id(), &plan(of, roles)?, tier)?;
    let probed = per_hit(of);
    let verified = verify(&attached);
    detach(attached);
    verified.map(|()| (probed - bare).max(1.0))
}

/// Drops what is attached. The kernel takes its time; nobody needs to wait for it.
fn detach<T: Send + 'static>(attached: T) {
    std::thread::spawn(move || drop(attached));
}

/// The words of a made-up task: its state (one reference), its vtable's address,
/// the number of its list and its id.
const TASK: (usize, usize, usize, usize) = (0, 2, 3, 5);

/// What a poll of a tokio task costs, in one of the two roles for it.
fn measure_poll(kernel: &Kernel, role: Role) -> Result<f64, Error> {
    let stepped = role == Role::PollStepped;
    let polled = match stepped {
        true => &raw const leakmon_calibrate_stepped,
        false => &raw const leakmon_calibrate_polled,
    };
    let mut task = [0u64; 8];
    task[TASK.0] = 1 << tokio::REFERENCES_SHIFT;
    task[TASK.1] = polled as u64;
    task[TASK.2] = 1;
    task[TASK.3] = 1;
    let time = || {
        median(|| {
            // SAFETY: the loop keeps the callee-saved registers and writes nothing
            // but its stack; the pointer is only passed on in a register.
            unsafe { leakmon_calibrate_polls(task.as_ptr(), ROUNDS, polled) }
        }) / ROUNDS as f64
    };
    let bare = time();
    let plan = Plan {
        layout: tokio::Layout {
            vtable: TASK.1 as u8,
        }
        .words(),
        places: vec![
            Place {
                code: Code::Executable,
                offset: own_offset(polled as u64)?,
                role,
                argument: tokio::Argument {
                    id: 8 * TASK.3 as u16,
                    located: false,
                    stepped,
                }
                .pack(),
            },
            Place::nowhere(Role::Idle),
        ],
    };
    let mut attached = kernel.attach(std::process::id(), &plan, Tier::Blocking)?;
    attached.learned(&[])?;
    let probed = time();
    let counts = attached.read();
    detach(attached);
    let rounds = ROUNDS * (MEASUREMENTS as u64 + 1);
    let polls: Vec<u64> = counts?.waits.iter().map(|wait| wait.runs.count).collect();
    if polls != [rounds] {
        return Err(Error::NotFiring(format!(
            "{polls:?} polls where {rounds} were due in leakmon's own process"
        )));
    }
    Ok((probed - bare).max(1.0))
}

/// What a switch of a thread costs: the program is run by hand for a process that is
/// not watched and for one that is, in turn, so that both meet what else the machine
/// does. `None` where the difference drowns in that.
fn measure_switch(kernel: &Kernel) -> Result<Option<f64>, Error> {
    let mut switches = kernel.switches()?;
    let mut time = |watched| -> Result<Duration, Error> {
        switches.watch(watched)?;
        let start = Instant::now();
        for _ in 0..ROUNDS {
            switches.run()?;
        }
        Ok(start.elapsed())
    };
    // To warm up.
    time(false)?;
    time(true)?;
    let (mut bare, mut watched) = (
        [Duration::ZERO; MEASUREMENTS],
        [Duration::ZERO; MEASUREMENTS],
    );
    for (bare, watched) in bare.iter_mut().zip(&mut watched) {
        (*bare, *watched) = (time(false)?, time(true)?);
    }
    let nanos = middle(watched) - middle(bare);
    Ok((nanos > 0.0).then_some(nanos / ROUNDS as f64))
}

/// The counts must be what [`per_hit`] did.
fn verify(attached: &Attached) -> Result<(), Error> {
    let counts = attached.read()?;
    // One measurement more, to warm up.
    let rounds = ROUNDS * (MEASUREMENTS as u64 + 1);
    let sites_agree = counts
        .sites
        .iter()
        .all(|(_, flow)| flow.spawned == rounds && flow.exited == rounds);
    let waits_agree = counts
        .waits
        .iter()
        .all(|wait| wait.parks == rounds && wait.resumes == rounds);
    let one = counts.sites.len() + counts.waits.len() == 1;
    if counts.hits.total() == 2 * rounds && sites_agree && waits_agree && one {
        return Ok(());
    }
    Err(Error::NotFiring(format!(
        "{} hits where {} were due in leakmon's own process",
        counts.hits.total(),
        2 * rounds
    )))
}

/// Nanoseconds of a pass over one place: the median of some measurements.
fn per_hit(loops: Loop) -> f64 {
    let mut g = [0u64; G_WORDS];
    g[usize::from(LAYOUT.goid) / 8] = 1;
    g[usize::from(LAYOUT.gopc) / 8] = 0x1000;
    g[usize::from(LAYOUT.gopc + STARTPC_FROM_GOPC) / 8] = 0x2000;
    // Two frames, the outer one without a caller: {frame pointer, return address}.
    let mut frames = [[0u64; 2]; 2];
    frames[0] = [frames[1].as_ptr() as u64, 0x3000];
    frames[1] = [0, 0x4000];
    let nanos = median(|| {
        // SAFETY: the loop keeps the callee-saved registers and writes nothing
        // but its stack; the pointers are only passed on in registers.
        unsafe { (loops.run)(g.as_ptr(), frames[0].as_ptr(), ROUNDS) }
    });
    nanos / (2 * ROUNDS) as f64
}

/// Nanoseconds that `run` takes: the median of some measurements, after one to
/// warm up.
fn median(mut run: impl FnMut()) -> f64 {
    let mut round = || {
        let start = Instant::now();
        run();
        start.elapsed()
    };
    round();
    middle(std::array::from_fn(|_| round()))
}

/// The median, in nanoseconds.
fn middle(mut times: [Duration; MEASUREMENTS]) -> f64 {
    times.sort_unstable();
    times[MEASUREMENTS / 2].as_nanos() as f64
}

/// Where an address of leakmon's code lies in its executable.
fn own_offset(address: u64) -> Result<FileOffset, Error> {
    let path = "/proc/self/maps";
    let file = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let maps = std::fs::read_to_string(path).map_err(file)?;
    offset_in(&maps, address)
        .ok_or_else(|| file(std::io::Error::other("leakmon's own code is not there")))
}

/// The offset in its file of a mapped address, by the text of /proc/PID/maps.
fn offset_in(maps: &str, address: u64) -> Option<FileOffset> {
    maps.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let offset = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
        (start..end)
            .contains(&address)
            .then(|| offset.checked_add(address - start).map(FileOffset))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_maps() {
        let maps = "55d0c8a00000-55d0c8a10000 r--p 00000000 fd:00 1 /usr/bin/leakmon\n\
                    55d0c8a10000-55d0c8b00000 r-xp 0000f000 fd:00 1 /usr/bin/leakmon\n\
                    junk\n\
                    7ffd0000-x r-xp\n";
        assert_eq!(offset_in(maps, 0x55d0_c8a1_0010), Some(FileOffset(0xf010)));
        assert_eq!(offset_in(maps, 0x55d0_c8a0_0000), Some(FileOffset(0)));
        assert_eq!(offset_in(maps, 0x55d0_c8b0_0000), None);
        assert_eq!(offset_in("", 0), None);
    }

    #[test]
    fn the_loops_run_without_probes() {
        for each in loops() {
            assert!(per_hit(each) >= 0.0);
        }
    }
}
