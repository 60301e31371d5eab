//! `leakmon doctor`: what this system allows, and what to do about the rest.
//!
//! The tiers are not only judged by the facts: the kernel side is loaded and
//! its probes are tried on leakmon itself. What works, works, whatever the facts
//! say; what does not is explained by them.
//!
//! Exit code 0 when every tier is possible, [`Exit::NotPermitted`] when not.

use std::io::{self, Write};

use super::{Exit, Failure};
use crate::probe::{self, Features, Role, Way};
use crate::process::capabilities::{
    Capability, Facts, KernelVersion, Lockdown, Missing, missing_for,
};
use crate::task::Tier;

/// What became of trying the probes.
#[derive(Clone, Debug, PartialEq)]
enum Trial {
    /// They count exactly; what a hit costs in each tier, in nanoseconds.
    Works {
        way: Way,
        lifecycle_ns: f64,
        blocking_ns: f64,
    },
    /// The error.
    Fails(String),
}

impl Trial {
    fn run() -> Trial {
        match probe::load() {
            Ok((kernel, calibration)) => {
                let cost = calibration.of(&kernel, [Role::Spawn, Role::Park]);
                Trial::Works {
                    way: kernel.way(),
                    lifecycle_ns: cost.lifecycle_ns,
                    blocking_ns: cost.blocking_ns,
                }
            }
            Err(error) => Trial::Fails(error.to_string()),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Standard output cannot be written.
pub fn run() -> Result<Exit, Failure> {
    let facts = Facts::gather();
    let features = Features::of_kernel();
    let trial = Trial::run();
    let mut out = io::stdout().lock();
    report(&mut out, &facts, features.ok().as_ref(), &trial)
        .and_then(|exit| out.flush().map(|()| exit))
        .map_err(|error| Failure::output(&error))
}

/// What is missing for the probes: nothing when they work.
fn missing_for_probes(facts: &Facts, trial: &Trial) -> Vec<Missing> {
    match trial {
        Trial::Works { .. } => missing_for(Tier::Census, facts),
        Trial::Fails(_) => missing_for(Tier::Blocking, facts),
    }
}

fn report(
    out: &mut impl Write,
    facts: &Facts,
    features: Option<&Features>,
    trial: &Trial,
) -> io::Result<Exit> {
    let census = missing_for(Tier::Census, facts);
    let probes = missing_for_probes(facts, trial);
    let works = matches!(trial, Trial::Works { .. });

    writeln!(
        out,
        "leakmon on Linux {} ({})\n",
        facts.release,
        std::env::consts::ARCH
    )?;
    let own = Facts {
        same_user: true,
        ..facts.clone()
    };
    // Probes are for processes that a census can be taken of.
    for (tier, works) in [
        (Tier::Census, true),
        (Tier::Lifecycle, works),
        (Tier::Blocking, works),
    ] {
        let possible = if works && census.is_empty() {
            "possible"
        } else if works && missing_for(Tier::Census, &own).is_empty() {
            "possible for processes of the same user only"
        } else {
            "not possible"
        };
        writeln!(out, "tier {:<10} {possible}", tier.name())?;
    }

    writeln!(out)?;
    for (what, says) in checks(facts) {
        item(out, what, &says)?;
    }
    item(out, "probes, tried", &tried(trial))?;
    if let Some(features) = features {
        writeln!(out, "\nWhat this kernel has, tried:")?;
        for feature in features.table() {
            let says = if feature.there {
                format!("yes ({})", feature.since)
            } else {
                format!("no ({}): {}", feature.since, feature.without)
            };
            item(out, feature.name, &says)?;
        }
    }

    if !probes.is_empty() || !works {
        writeln!(out, "\nWhat to do:")?;
    }
    for missing in &probes {
        paragraph(out, "- ", &format!("{missing}: {}.", missing.remedy()))?;
    }
    if !works && probes.is_empty() {
        let what = if facts.seccomp {
            "a seccomp filter is in force and may forbid bpf or perf_event_open: allow them in \
             the container's seccomp profile, or run it with seccomp=unconfined."
        } else {
            "everything that is known to be needed is there. A security module (SELinux, \
             AppArmor) may forbid bpf or perf_event_open: its log says so."
        };
        paragraph(out, "- ", what)?;
    }
    if !facts.initial_pid_namespace {
        let what = "leakmon is in a pid namespace of its own and sees no process of the host: \
                    share the host's (hostPID: true, --pid=host) to watch those.";
        paragraph(out, "- ", what)?;
    }
    Ok(if census.is_empty() && works {
        Exit::Success
    } else {
        Exit::NotPermitted
    })
}

fn tried(trial: &Trial) -> String {
    match trial {
        Trial::Works {
            way,
            lifecycle_ns,
            blocking_ns,
        } => {
            let way = match way {
                Way::Multi => "uprobe_multi links",
                Way::PerfEvent => "a perf event for each place",
            };
            format!(
                "they count exactly, by {way}; a hit costs {:.2} us (lifecycle), {:.2} us (blocking)",
                lifecycle_ns / 1e3,
                blocking_ns / 1e3
            )
        }
        Trial::Fails(error) => error.clone(),
    }
}

/// What was looked at, and what it means.
fn checks(facts: &Facts) -> Vec<(&'static str, String)> {
    let number = |value: Option<i32>| value.map_or("-".to_owned(), |value| value.to_string());
    let yes = |yes| if yes { "yes" } else { "no" };
    let mut checks = vec![(
        "kernel",
        match facts.kernel {
            Some(kernel) => format!("{kernel}; probes need {}", KernelVersion::PROBES),
            None => format!("of unknown version; probes need {}", KernelVersion::PROBES),
        },
    )];
    for capability in [Capability::SysPtrace, Capability::Bpf, Capability::Perfmon] {
        let there = facts.capabilities.allow(capability);
        let says = format!(
            "{}, {}",
            if there { "there" } else { "missing" },
            capability.purpose()
        );
        checks.push((capability.name(), says));
    }
    checks.push((
        "uprobes",
        format!("{} (CONFIG_UPROBE_EVENTS)", yes(facts.uprobes)),
    ));
    checks.push((
        "kernel BTF",
        format!("{}; leakmon does without", yes(facts.btf)),
    ));
    checks.push((
        "lockdown",
        match facts.lockdown {
            Lockdown::Off => "off".to_owned(),
            Lockdown::Integrity => "integrity: forbids nothing that leakmon does".to_owned(),
            Lockdown::Confidentiality => {
                "confidentiality: forbids probes, not the census".to_owned()
            }
        },
    ));
    checks.push((
        "ptrace_scope",
        match facts.ptrace_scope {
            None => "- (no Yama)".to_owned(),
            Some(0) => "0: own processes can be read without a capability".to_owned(),
            Some(scope @ 1..=2) => format!("{scope}: every process needs CAP_SYS_PTRACE"),
            Some(scope) => format!("{scope}: no process can be read by anybody"),
        },
    ));
    let unprivileged = "counts without the capabilities only";
    checks.push((
        "perf_event_paranoid",
        format!("{}; {unprivileged}", number(facts.perf_event_paranoid)),
    ));
    checks.push((
        "unprivileged_bpf_disabled",
        format!(
            "{}; {unprivileged}",
            number(facts.unprivileged_bpf_disabled)
        ),
    ));
    checks.push((
        "seccomp",
        match (facts.seccomp, facts.reads_own_memory) {
            (_, false) => "a filter forbids process_vm_readv".to_owned(),
            (true, true) => "a filter is in force; process_vm_readv passes it".to_owned(),
            (false, true) => "no filter".to_owned(),
        },
    ));
    checks.push((
        "user namespace",
        if facts.initial_user_namespace {
            "the initial one".to_owned()
        } else {
            "not the initial one: its capabilities do not allow probes".to_owned()
        },
    ));
    checks.push((
        "container",
        match (facts.container, facts.initial_pid_namespace) {
            (None, true) => "no".to_owned(),
            (None, false) => "a pid namespace of its own".to_owned(),
            (Some(runtime), true) => format!("{runtime}; sees the host's processes"),
            (Some(runtime), false) => format!("{runtime}; sees only its own processes"),
        },
    ));
    checks.push((
        "RLIMIT_MEMLOCK",
        match facts.memlock {
            None => "unlimited; not counted since kernel 5.11".to_owned(),
            Some(bytes) => format!("{} KiB; not counted since kernel 5.11", bytes >> 10),
        },
    ));
    checks
}

/// Columns of the text.
const WIDTH: usize = 80;
/// Where the second column starts.
const SECOND: usize = 27;

fn item(out: &mut impl Write, what: &str, says: &str) -> io::Result<()> {
    let first = format!("{what:<SECOND$}");
    wrapped(out, &first, SECOND, says)
}

fn paragraph(out: &mut impl Write, first: &str, text: &str) -> io::Result<()> {
    wrapped(out, first, first.len(), text)
}

/// `text` behind `first`, broken between words into lines of [`WIDTH`], all but
/// the first indented.
fn wrapped(out: &mut impl Write, first: &str, indent: usize, text: &str) -> io::Result<()> {
    let mut line = first.to_owned();
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.len() + 1 + word.len() > WIDTH {
            writeln!(out, "{}", line.trim_end())?;
            line = " ".repeat(indent);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    writeln!(out, "{}", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::capabilities::Capabilities;

    fn facts() -> Facts {
        Facts {
            release: "6.12.0-amd64".to_owned(),
            kernel: KernelVersion::parse("6.12.0"),
            capabilities: Capabilities(!0),
            same_user: false,
            initial_user_namespace: true,
            initial_pid_namespace: true,
            container: None,
            lockdown: Lockdown::Off,
            ptrace_scope: Some(1),
            perf_event_paranoid: Some(2),
            unprivileged_bpf_disabled: None,
            seccomp: false,
            reads_own_memory: true,
            uprobes: true,
            btf: true,
            memlock: None,
        }
    }

    const WORKS: Trial = Trial::Works {
        way: Way::Multi,
        lifecycle_ns: 612.0,
        blocking_ns: 745.0,
    };

    fn rendered(facts: &Facts, trial: &Trial) -> (Exit, String) {
        let mut out = Vec::new();
        let features = Features::oldest();
        let exit = report(&mut out, facts, Some(&features), trial).expect("writes to memory");
        let text = String::from_utf8(out).expect("text");
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        (exit, text)
    }

    #[test]
    fn all_is_well() {
        let (exit, text) = rendered(&facts(), &WORKS);
        assert_eq!(exit, Exit::Success);
        assert!(text.contains("tier blocking   possible\n"), "{text}");
        assert!(text.contains("costs 0.61 us"), "{text}");
        let lacks = "uprobe_multi link          no (6.6): each place has a perf event";
        assert!(text.contains(lacks), "{text}");
        assert!(!text.contains("What to do"), "{text}");
    }

    #[test]
    fn a_missing_capability_is_named_with_its_remedy() {
        let facts = Facts {
            capabilities: Capabilities(!(1 << 21 | 1 << 39)),
            ..facts()
        };
        let (exit, text) = rendered(&facts, &Trial::Fails("bpf: EPERM".to_owned()));
        assert_eq!(exit, Exit::NotPermitted);
        assert!(text.contains("tier census     possible\n"), "{text}");
        assert!(text.contains("tier lifecycle  not possible\n"), "{text}");
        assert!(text.contains("- CAP_BPF is missing"), "{text}");
        assert!(!text.contains("- CAP_PERFMON"), "{text}");
        assert!(text.contains("setcap"), "{text}");
    }

    #[test]
    fn without_ptrace_own_processes_remain() {
        let mut facts = Facts {
            capabilities: Capabilities(!(1 << 19)),
            ptrace_scope: None,
            ..facts()
        };
        let (exit, text) = rendered(&facts, &WORKS);
        assert_eq!(exit, Exit::NotPermitted);
        let own = "possible for processes of the same user only";
        assert!(text.contains(&format!("tier census     {own}")), "{text}");
        assert!(text.contains(&format!("tier blocking   {own}")), "{text}");
        assert!(text.contains("- CAP_SYS_PTRACE is missing"), "{text}");
        facts.ptrace_scope = Some(1);
        assert!(!rendered(&facts, &WORKS).1.contains(own));
    }

    #[test]
    fn what_works_is_not_called_missing() {
        let facts = Facts {
            lockdown: Lockdown::Confidentiality,
            ..facts()
        };
        let (exit, text) = rendered(&facts, &WORKS);
        assert_eq!(exit, Exit::Success);
        assert!(!text.contains("What to do"), "{text}");
        let (exit, text) = rendered(&facts, &Trial::Fails("unknown func".to_owned()));
        assert_eq!(exit, Exit::NotPermitted);
        assert!(text.contains("- kernel lockdown"), "{text}");
    }

    #[test]
    fn what_nothing_explains_points_to_seccomp_or_a_security_module() {
        let fails = Trial::Fails("bpf: EPERM".to_owned());
        assert!(rendered(&facts(), &fails).1.contains("security module"));
        let filtered = Facts {
            seccomp: true,
            container: Some("Docker"),
            initial_pid_namespace: false,
            ..facts()
        };
        let (_, text) = rendered(&filtered, &fails);
        assert!(text.contains("seccomp filter is in force"), "{text}");
        assert!(text.contains("hostPID"), "{text}");
    }
}
