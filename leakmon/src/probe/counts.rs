//! What the kernel side counted, as numbers and addresses.

use leakmon_common::{DROP_REASONS, Dropped, WAIT_FRAMES};

use super::plan::{PROGRAMS, Role};
use crate::task::{Histogram, Runs, SiteFlow, SiteKey};

/// What the probes counted in one process since it was first attached. Every
/// figure but `moved` only grows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// Spawns and exits by site, ordered by site.
    pub sites: Vec<(SiteKey, SiteFlow)>,
    /// Blocks by spawn site, reason and place, ordered by these.
    pub waits: Vec<WaitCounts>,
    /// tokio's live tasks, as far as they were polled or said to be there,
    /// ordered by header.
    pub tasks: Vec<TaskRun>,
    /// Spawns and exits that were counted while `tasks` were read: of so many
    /// tasks, `sites` may know more or less.
    pub moved: u64,
    /// Threads that were made or switched while the probes were attached,
    /// ordered by thread id. One that ended while they were away may be left.
    pub threads: Vec<ThreadRun>,
    /// Probe hits by role.
    pub hits: Hits,
    /// Hits that could not be counted.
    pub drops: Drops,
}

/// What was counted of one live task. Times are of CLOCK_MONOTONIC, in
/// nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskRun {
    /// tokio's task id; before tokio 1.23 a number that no other task has at
    /// this header.
    pub id: u64,
    /// Its header's address.
    pub header: u64,
    /// Where it was spawned, as far as its memory tells: its vtable and, where
    /// there is one, the `Location` of the spawn.
    pub site: SiteKey,
    /// It may have been there before the probes came; else its spawn was counted.
    pub known: bool,
    /// When its first poll began that was seen.
    pub first_seen: Option<u64>,
    /// When the latest poll ended, if the probes have been attached without a break
    /// since.
    pub last_poll_end: Option<u64>,
    /// Since when it is being polled, if it is, and the probes saw it begin.
    pub polling_since: Option<u64>,
}

/// What was counted of one thread. Times are of CLOCK_MONOTONIC, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadRun {
    /// Thread id.
    pub tid: u32,
    /// Where it was made: the return address of `pthread_create`, and the start
    /// routine or the word of `leakmon_common::threads::Shared`; or what
    /// [`KnownThread::site`] said. All 0 where neither is known.
    pub site: SiteKey,
    /// When it was made, if the probes saw it.
    pub born: Option<u64>,
    /// Since when it is blocked, if it is.
    pub blocked_since: Option<u64>,
    /// What it is or was last blocked in: see
    /// [`leakmon_common::threads::reason`].
    pub reason: u32,
    /// First argument of that system call: the address of a futex.
    pub argument: u64,
    /// Times that it blocked.
    pub voluntary: u64,
    /// Times that its CPU was taken.
    pub involuntary: u64,
}

/// The caller's stack at the first `pthread_create` of a site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreationStack {
    /// The threads' site.
    pub site: SiteKey,
    /// Instruction pointer: the first instruction of `pthread_create`.
    pub ip: u64,
    /// Stack pointer: the address of the first of `bytes`.
    pub sp: u64,
    /// Frame pointer: RBP / X29.
    pub frame: u64,
    /// X30; 0 on x86_64.
    pub link: u64,
    /// The stack from there on, at most 8 KiB.
    pub bytes: Vec<u8>,
}

/// A task that a census found, for [`super::Attached::learned`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownTask {
    /// Its header's address.
    pub header: u64,
    /// tokio's task id; 0 before tokio 1.23.
    pub id: u64,
    /// As [`TaskRun::site`].
    pub site: SiteKey,
}

/// A thread that a census found, for [`super::Attached::know_threads`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownThread {
    /// Its id.
    pub tid: u32,
    /// What it is to be counted by.
    pub site: SiteKey,
}

/// What was counted of one kind of wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitCounts {
    /// Where the waiting tasks were spawned.
    pub site: SiteKey,
    /// The runtime's number of the wait reason.
    pub reason: u32,
    /// Return addresses, innermost first; 0 from the first that was not kept.
    pub pcs: [u64; WAIT_FRAMES],
    /// Times a task blocked.
    pub parks: u64,
    /// Times one that was seen to block went on. While the probes stay attached
    /// without a break, `parks - resumes` are blocked now (of those that blocked
    /// since).
    pub resumes: u64,
    /// Blocked durations, one for each of `resumes`.
    pub durations: Histogram,
    /// tokio: polls that ended.
    pub runs: Runs,
}

/// Probe hits by role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits(pub(super) [u64; PROGRAMS.len()]);

impl Hits {
    /// Hits of one role.
    pub fn of(&self, role: Role) -> u64 {
        self.0[role.index()]
    }

    /// All hits.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Hits of the roles that are first attached in the tier `lifecycle`.
    pub fn lifecycle(&self) -> u64 {
        self.sum(super::Tier::Lifecycle)
    }

    /// Hits of the roles that are first attached in the tier `blocking`.
    pub fn blocking(&self) -> u64 {
        self.sum(super::Tier::Blocking)
    }

    fn sum(&self, tier: super::Tier) -> u64 {
        PROGRAMS
            .iter()
            .filter(|program| program.tier == tier)
            .map(|program| self.of(program.role))
            .sum()
    }
}

/// Hits that were not counted otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops(pub(super) [u64; DROP_REASONS]);

impl Drops {
    /// Resumes of tasks that were not seen to park: they parked before
    /// the probes were attached (or in a gap of a sampled tier). Not a loss.
    pub fn unmatched_resumes(&self) -> u64 {
        self.0[Dropped::UnmatchedResume as usize]
    }

    /// What was lost, by reason; empty when the figures are complete.
    pub fn losses(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            (Dropped::SitesFull, "site map full"),
            (Dropped::ParkedFull, "map of waiting tasks full"),
            (Dropped::WaitsFull, "wait map full"),
            (Dropped::Unreadable, "memory not readable"),
            (Dropped::LostResume, "resume not seen"),
            (Dropped::TasksFull, "task map full"),
            (Dropped::ThreadsFull, "thread map full"),
            (Dropped::Contended, "task in use on another CPU"),
        ]
        .into_iter()
        .map(|(reason, words)| (words, self.0[reason as usize]))
        .filter(|&(_, count)| count != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_summed_by_tier() {
        let mut hits = Hits::default();
        hits.0[..7].copy_from_slice(&[1, 2, 4, 8, 16, 32, 64]);
        assert_eq!(hits.of(Role::Exit), 4);
        assert_eq!(hits.lifecycle(), 7);
        assert_eq!(hits.blocking(), 120);
        assert_eq!(hits.total(), 127);
    }

    #[test]
    fn an_unmatched_resume_is_no_loss() {
        let mut drops = Drops::default();
        drops.0[Dropped::UnmatchedResume as usize] = 3;
        assert_eq!(drops.losses().count(), 0);
        assert_eq!(drops.unmatched_resumes(), 3);
        drops.0[Dropped::WaitsFull as usize] = 2;
        assert_eq!(drops.losses().collect::<Vec<_>>(), [("wait map full", 2)]);
    }
}
