//! Which processes there are: every one on the machine, cheaply and again and
//! again.

use std::fs::File;
use std::io::{self, Read as _};
use std::time::Duration;

use globset::{Glob, GlobMatcher};
use nix::unistd::{Uid, User};
use procfs::FromRead as _;
use procfs::process::Stat;

/// PF_KTHREAD, include/linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;

/// Clock ticks a second of `/proc/PID/stat` (USER_HZ, the same on every
/// architecture that leakmon is for).
pub const TICKS: u64 = 100;

/// Most bytes of `/proc/PID/cgroup` that are read.
const MAX_CGROUP: u64 = 1 << 16;

/// A look at one process: a single read of `/proc/PID/stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glance {
    /// Process id, in leakmon's pid namespace.
    pub pid: u32,
    /// Which program of which process this is.
    pub incarnation: Incarnation,
    /// What the kernel calls it (`comm`).
    pub name: String,
    /// Live threads.
    pub threads: u64,
}

/// Tells a process from every other that had or will have its pid, and the
/// program that it runs from those that it ran before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation {
    /// Clock ticks from boot to the process's start.
    pub start_time: u64,
    /// Where its program's stack begins: the kernel chooses anew at each exec
    /// (0 where it may not be seen).
    start_stack: u64,
}

impl Incarnation {
    /// How long the process has run.
    pub fn age(&self) -> Duration {
        // The clock that the kernel counts starts by: it goes on in suspension.
        let now = nix::time::ClockId::CLOCK_BOOTTIME.now();
        let now = now.map_or(Duration::ZERO, Duration::from);
        now.saturating_sub(Duration::from_millis(self.start_time * 1000 / TICKS))
    }
}

/// Every process that runs a program, in the order of the pids. Kernel threads
/// and those that have ended are left out.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn glances() -> io::Result<Vec<Glance>> {
    let mut pids: Vec<u32> = std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    Ok(pids.into_iter().filter_map(glance).collect())
}

/// A look at process `pid`; `None` when it is gone, has ended or is the
/// kernel's.
pub fn glance(pid: u32) -> Option<Glance> {
    let stat = Stat::from_read(File::open(format!("/proc/{pid}/stat")).ok()?).ok()?;
    if stat.flags & PF_KTHREAD != 0 || matches!(stat.state, 'Z' | 'X' | 'x') {
        return None;
    }
    Some(Glance {
        pid,
        incarnation: Incarnation {
            start_time: stat.starttime,
            start_stack: stat.startstack,
        },
        threads: u64::try_from(stat.num_threads).ok()?,
        name: stat.comm,
    })
}

/// The real user id of a process, as leakmon's own user namespace has it.
pub fn uid_of(pid: u32) -> Option<u32> {
    let process = procfs::process::Process::new(pid.cast_signed()).ok()?;
    Some(process.status().ok()?.ruid)
}

/// The control group of a process, as `/proc/PID/cgroup` has it: of version 2,
/// or else of the memory controller, or else the first.
pub fn cgroup(pid: u32) -> Option<String> {
    let mut text = String::new();
    let file = File::open(format!("/proc/{pid}/cgroup")).ok()?;
    file.take(MAX_CGROUP).read_to_string(&mut text).ok()?;
    choose_cgroup(&text).map(str::to_owned)
}

/// Lines are `HIERARCHY:CONTROLLERS:PATH` (man 7 cgroups).
fn choose_cgroup(text: &str) -> Option<&str> {
    let lines: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.split_once(':')?.1.split_once(':'))
        .collect();
    let unified = lines.iter().find(|(controllers, _)| controllers.is_empty());
    let memory = || {
        let has = |controllers: &str| controllers.split(',').any(|name| name == "memory");
        lines.iter().find(|(controllers, _)| has(controllers))
    };
    unified
        .filter(|(_, path)| *path != "/")
        .or_else(memory)
        .or(unified)
        .or(lines.first())
        .map(|(_, path)| *path)
}

/// A pattern with `*` and `?`; one without matches what contains it.
///
/// # Errors
/// What is wrong with the pattern, in words.
pub fn pattern(text: &str) -> Result<GlobMatcher, String> {
    let plain = !text.contains(['*', '?', '[', '{']);
    let text = match plain {
        true => format!("*{text}*"),
        false => text.to_owned(),
    };
    Glob::new(&text)
        .map(|glob| glob.compile_matcher())
        .map_err(|error| error.to_string())
}

/// A user's id, by name or number.
///
/// # Errors
/// There is no such user.
pub fn uid(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err("no such user".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// A user's name; the number where it has none.
pub fn user_name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_itself() {
        let own = std::process::id();
        let all = glances().unwrap();
        let found = all.iter().find(|glance| glance.pid == own).unwrap();
        assert!(found.threads >= 1);
        assert_eq!(found.incarnation, glance(own).unwrap().incarnation);
        assert!(all.is_sorted_by_key(|glance| glance.pid));
    }

    #[test]
    fn an_exec_is_another_incarnation() {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "read line; exec cat"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let before = glance(child.id()).unwrap();
        let mut stdin = child.stdin.take().unwrap();
        io::Write::write_all(&mut stdin, b"\n").unwrap();
        let after = loop {
            let now = glance(child.id()).unwrap();
            if now.name == "cat" {
                break now;
            }
        };
        assert_eq!(before.incarnation.start_time, after.incarnation.start_time);
        assert_ne!(before.incarnation, after.incarnation);
        drop(stdin);
        child.wait().unwrap();
        assert_eq!(glance(child.id()), None);
    }

    #[test]
    fn control_groups_of_both_versions() {
        assert_eq!(
            choose_cgroup("0::/system.slice/a.service\n"),
            Some("/system.slice/a.service")
        );
        let mixed = "12:cpu,cpuacct:/x\n3:memory:/docker/abc\n0::/\n";
        assert_eq!(choose_cgroup(mixed), Some("/docker/abc"));
        assert_eq!(choose_cgroup("0::/\n"), Some("/"));
        assert_eq!(choose_cgroup("nonsense"), None);
        assert_eq!(choose_cgroup(""), None);
    }

    #[test]
    fn patterns_with_and_without_stars() {
        assert!(pattern("prom").unwrap().is_match("prometheus"));
        assert!(!pattern("prom*r").unwrap().is_match("prometheus"));
        assert!(pattern("*/kubepods*").unwrap().is_match("/a/kubepods/pod1"));
        assert!(pattern("[").is_err());
    }

    #[test]
    fn users_by_name_and_number() {
        assert_eq!(uid("root"), Ok(0));
        assert_eq!(uid("4242"), Ok(4242));
        assert!(uid("no such user here").is_err());
        assert_eq!(user_name(0), "root");
    }
}
