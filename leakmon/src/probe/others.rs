//! Keeps what the machine's switches of threads cost within a share of each
//! CPU's use.
//!
//! A tracepoint is the whole machine's: while the threads of one process are
//! timed, every switch on every CPU is looked at, and programs that nobody
//! watches pay for it. [`Others`] is a state machine over readings, like the
//! governor, which keeps the cost for the watched process: it knows no kernel.
//! Where a CPU's switches cost more than it may give, the tracepoint is left
//! alone for a while by all targets, and then tried again, ever more rarely.

use std::io;
use std::time::Duration;

use super::budget::{FLOOR_PERCENT, Retry};
use crate::process::discovery::TICKS;

/// What a switch costs that is of no watched thread, in nanoseconds. Two
/// threads that wake each other on one CPU took 173 ns more for two switches
/// with the same instructions on them, and 119 to 126 with a program that does
/// nothing (kernel 6.18, x86_64, medians of 30 to 40 pairs of runs).
const SWITCH_NS: f64 = 85.0;

/// Share of the time that a CPU is in use which its switches may cost, in
/// percent.
const SHARE_PERCENT: f64 = 2.0;

/// A shorter window says too little: the kernel tells a CPU's use in ticks of
/// 10 ms.
const WINDOW: Duration = Duration::from_millis(250);

/// What a CPU has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CpuReading {
    /// Switches that the tracepoint has seen on it.
    pub(super) switches: u64,
    /// Time that it was in use.
    pub(super) busy: Duration,
}

/// Decides whether switches may be looked at. See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// When the present window began, with the readings of then; `None` while
    /// nothing is attached.
    window: Option<(Duration, Vec<CpuReading>)>,
    /// It was too dear, and until then nobody tries.
    refused: Option<Retry>,
}

impl Others {
    /// The tracepoint was attached.
    pub(super) fn attached(&mut self, now: Duration, cpus: Vec<CpuReading>) {
        self.window = Some((now, cpus));
    }

    /// It was detached.
    pub(super) fn detached(&mut self) {
        self.window = None;
    }

    /// Whether the window is long enough for [`Others::judge`].
    pub(super) fn is_due(&self, now: Duration) -> bool {
        let window = self.window.as_ref();
        window.is_some_and(|(began, _)| now.saturating_sub(*began) >= WINDOW)
    }

    /// Ends a window and begins another one.
    pub(super) fn judge(&mut self, now: Duration, cpus: Vec<CpuReading>) {
        let Some((began, before)) = self.window.take() else {
            return;
        };
        let time = now.saturating_sub(began);
        let too_dear = before.iter().zip(&cpus).any(|(before, after)| {
            let switches = after.switches.saturating_sub(before.switches);
            let busy = after.busy.saturating_sub(before.busy).as_secs_f64();
            let allowed = (SHARE_PERCENT * busy).max(FLOOR_PERCENT * time.as_secs_f64()) / 100.0;
            switches as f64 * SWITCH_NS / 1e9 > allowed
        });
        self.window = Some((now, cpus));
        match self.refused {
            // Whoever is attached has yet to go: it is the same window's end.
            Some(retry) if now < retry.at => {}
            refused if too_dear => self.refused = Some(Retry::after(refused, now)),
            // It was cheap for as long as it had been refused.
            Some(retry) if now >= retry.at + retry.pause => self.refused = None,
            _ => {}
        }
    }

    /// Whether switches are to be left alone.
    pub(super) fn refuses(&self, now: Duration) -> bool {
        self.refused.is_some_and(|retry| now < retry.at)
    }
}

/// The time that each CPU was in use, by its number, from the text of
/// /proc/stat.
///
/// # Errors
///
/// A line of a CPU has too few numbers.
pub(super) fn busy(stat: &str) -> io::Result<Vec<(usize, Duration)>> {
    let cpus = stat.lines().filter_map(|line| {
        let (number, times) = line.strip_prefix("cpu")?.split_once(' ')?;
        Some((number.parse::<usize>().ok()?, times))
    });
    cpus.map(|(number, times)| {
        let times: Vec<u64> = times
            .split_ascii_whitespace()
            .map_while(|time| time.parse().ok())
            .collect();
        // Time of guests is part of the first two.
        let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = times[..] else {
            return Err(io::Error::other("/proc/stat: a CPU without its times"));
        };
        let ticks = [nice, system, irq, softirq, steal]
            .into_iter()
            .fold(user, u64::saturating_add);
        let nanos = ticks.saturating_mul(1_000_000_000 / TICKS);
        Ok((number, Duration::from_nanos(nanos)))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(250);

    /// A CPU, and the rest of the machine, which idles.
    struct Machine {
        others: Others,
        now: Duration,
        cpu: CpuReading,
    }

    impl Machine {
        fn new() -> Machine {
            let mut others = Others::default();
            others.attached(Duration::from_secs(9), vec![CpuReading::default(); 2]);
            Machine {
                others,
                now: Duration::from_secs(9),
                cpu: CpuReading::default(),
            }
        }

        /// A step with so many switches a second in so much use; whether the
        /// next one may be looked at.
        fn step(&mut self, switches: u64, used: f64) -> bool {
            self.now += STEP;
            self.cpu.switches += switches / 4;
            self.cpu.busy += STEP.mul_f64(used);
            assert!(self.others.is_due(self.now));
            let cpus = vec![CpuReading::default(), self.cpu];
            self.others.judge(self.now, cpus);
            !self.others.refuses(self.now)
        }
    }

    #[test]
    fn what_a_server_does_is_looked_at() {
        let mut machine = Machine::new();
        for _ in 0..1000 {
            assert!(machine.step(100_000, 1.0));
        }
        // Few and short runs: half a percent of a core is nothing.
        let mut machine = Machine::new();
        assert!(machine.step(50_000, 0.02));
    }

    #[test]
    fn a_storm_of_switches_is_left_alone_ever_longer() {
        let mut machine = Machine::new();
        assert!(!machine.step(470_000, 1.0));
        machine.others.detached();
        let mut looked = 0;
        for second in 0..2000 {
            machine.now += Duration::from_secs(1);
            if machine.others.refuses(machine.now) {
                continue;
            }
            looked += 1;
            machine
                .others
                .attached(machine.now, vec![CpuReading::default(), machine.cpu]);
            assert!(!machine.step(470_000, 1.0), "after {second} s");
            machine.others.detached();
        }
        // After 10, 30, 70, 150, 310, 630, 950 ... seconds.
        assert!((8..=11).contains(&looked), "{looked}");
    }

    #[test]
    fn it_is_forgotten_when_the_storm_is_over() {
        let mut machine = Machine::new();
        assert!(!machine.step(470_000, 1.0));
        for _ in 0..39 {
            assert!(!machine.step(1000, 1.0));
        }
        for _ in 0..200 {
            assert!(machine.step(1000, 1.0));
        }
        assert_eq!(machine.others.refused, None);
    }

    #[test]
    fn a_window_takes_its_time() {
        let mut others = Others::default();
        assert!(!others.is_due(Duration::from_secs(100)));
        others.attached(Duration::from_secs(100), Vec::new());
        assert!(!others.is_due(Duration::from_millis(100_200)));
        assert!(others.is_due(Duration::from_millis(100_250)));
        others.detached();
        assert!(!others.is_due(Duration::from_secs(200)));
    }

    #[test]
    fn cpus_are_read() {
        let stat = "cpu  30 0 12 99 5 0 1 0 0 0\n\
                    cpu0 10 1 6 50 3 1 1 1 0 0\n\
                    cpu3 20 0 6 49 2 0 0 0 0 0\n\
                    intr 12345 0\nctxt 99\n";
        let busy = busy(stat).unwrap();
        let ms = Duration::from_millis;
        assert_eq!(busy, [(0, ms(200)), (3, ms(260))]);
        assert_eq!(super::busy("").unwrap(), []);
        assert!(super::busy("cpu0 1 2 3\n").is_err());
    }
}
