//! What this system lets leakmon do: the facts, and what they leave out for
//! each tier.
//!
//! The facts are gathered in one place ([`Facts::gather`]) and judged in another
//! ([`missing_for`]), which looks at nothing but them.

use std::fmt;
use std::fs;
use std::io::IoSliceMut;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::task::Tier;

/// A capability by its bit in `CapEff` of `/proc/PID/status`:
/// `include/uapi/linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Capability {
    /// Reads other users' processes.
    SysPtrace = 19,
    /// Stands for [`Capability::Bpf`] and [`Capability::Perfmon`] too.
    SysAdmin = 21,
    /// Attaches probes.
    Perfmon = 38,
    /// Loads programs.
    Bpf = 39,
}

impl Capability {
    /// Its name in the manual, capabilities(7).
    pub fn name(self) -> &'static str {
        match self {
            Capability::SysPtrace => "CAP_SYS_PTRACE",
            Capability::SysAdmin => "CAP_SYS_ADMIN",
            Capability::Perfmon => "CAP_PERFMON",
            Capability::Bpf => "CAP_BPF",
        }
    }

    /// What leakmon does with it.
    pub fn purpose(self) -> &'static str {
        match self {
            Capability::SysPtrace => "to read the memory of other users' processes",
            Capability::SysAdmin => "for what CAP_BPF and CAP_PERFMON allow",
            Capability::Perfmon => "to attach probes",
            Capability::Bpf => "to load what counts in the kernel",
        }
    }
}

/// A set of capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Whether what `capability` allows is allowed, by itself or by
    /// CAP_SYS_ADMIN (`bpf_capable` and `perfmon_capable` in
    /// `include/linux/capability.h`).
    pub fn allow(self, capability: Capability) -> bool {
        let has = |capability: Capability| self.0 & (1 << capability as u8) != 0;
        has(capability)
            || matches!(capability, Capability::Bpf | Capability::Perfmon)
                && has(Capability::SysAdmin)
    }
}

/// A kernel's version, as far as features depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    /// `6` of `6.18`.
    pub major: u32,
    /// `18` of `6.18`.
    pub minor: u32,
}

impl KernelVersion {
    /// The oldest kernel that leakmon's probes are tested on. Ring buffers
    /// (`BPF_MAP_TYPE_RINGBUF`) and task iterators came with 5.8.
    pub const PROBES: KernelVersion = KernelVersion {
        major: 5,
        minor: 10,
    };

    /// Reads `uname -r`: `6.1.0-18-amd64`.
    pub fn parse(release: &str) -> Option<KernelVersion> {
        let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next()?.parse().ok();
        Some(KernelVersion {
            major: number()?,
            minor: number()?,
        })
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The kernel's lockdown, `/sys/kernel/security/lockdown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lockdown {
    /// Off, or not compiled in.
    Off,
    /// Nothing may change the running kernel. leakmon does not: this forbids
    /// BPF programs only to write to user memory.
    Integrity,
    /// Nothing may read the kernel's memory either: BPF programs lose the helpers
    /// that could (`LOCKDOWN_BPF_READ_KERNEL`, `kernel/trace/bpf_trace.c`). A
    /// kernel without them is taken for one from before 5.5, whose only helper
    /// that reads user memory is among those.
    Confidentiality,
}

impl Lockdown {
    /// Reads the file: the mode in force stands in brackets.
    pub fn parse(text: &str) -> Lockdown {
        match text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
        {
            Some(("integrity", _)) => Lockdown::Integrity,
            Some(("confidentiality", _)) => Lockdown::Confidentiality,
            _ => Lockdown::Off,
        }
    }
}

/// What the system says of itself and of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// `uname -r`.
    pub release: String,
    /// The same, read; `None` when it makes no sense.
    pub kernel: Option<KernelVersion>,
    /// This process's effective capabilities.
    pub capabilities: Capabilities,
    /// Processes to be watched run as leakmon's own user, with no more
    /// capabilities than it has; `false` when that is not known.
    pub same_user: bool,
    /// In the initial user namespace: capabilities elsewhere count for nothing
    /// in bpf(2) and perf_event_open(2).
    pub initial_user_namespace: bool,
    /// In the initial pid namespace: from elsewhere the host's processes cannot
    /// be seen.
    pub initial_pid_namespace: bool,
    /// A container runtime's mark.
    pub container: Option<&'static str>,
    /// The kernel's lockdown.
    pub lockdown: Lockdown,
    /// `kernel.yama.ptrace_scope`; `None` without Yama.
    pub ptrace_scope: Option<i32>,
    /// `kernel.perf_event_paranoid`.
    pub perf_event_paranoid: Option<i32>,
    /// `kernel.unprivileged_bpf_disabled`.
    pub unprivileged_bpf_disabled: Option<i32>,
    /// A seccomp filter is in force.
    pub seccomp: bool,
    /// `process_vm_readv` works on leakmon's own memory; where it does not, a
    /// seccomp filter forbids it to all.
    pub reads_own_memory: bool,
    /// The kernel's uprobes are compiled in:
    /// `/sys/bus/event_source/devices/uprobe/type`.
    pub uprobes: bool,
    /// The kernel describes its own types: `/sys/kernel/btf/vmlinux`.
    pub btf: bool,
    /// `RLIMIT_MEMLOCK` in bytes; `None` when unlimited.
    pub memlock: Option<u64>,
}

impl Facts {
    /// Asks the system. What cannot be found out counts as what the kernel does
    /// by default.
    pub fn gather() -> Facts {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let number = |path: &str| text(path).trim().parse().ok();
        let status = text("/proc/self/status");
        let release = text("/proc/sys/kernel/osrelease").trim().to_owned();
        Facts {
            kernel: KernelVersion::parse(&release),
            release,
            capabilities: Capabilities(
                field(&status, "CapEff")
                    .and_then(|value| u64::from_str_radix(value, 16).ok())
                    .unwrap_or(0),
            ),
            same_user: false,
            // PROC_USER_INIT_INO and PROC_PID_INIT_INO, include/linux/proc_ns.h.
            initial_user_namespace: in_namespace("user", 0xefff_fffd),
            initial_pid_namespace: in_namespace("pid", 0xefff_fffc),
            container: container(),
            lockdown: Lockdown::parse(&text("/sys/kernel/security/lockdown")),
            ptrace_scope: number("/proc/sys/kernel/yama/ptrace_scope"),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            unprivileged_bpf_disabled: number("/proc/sys/kernel/unprivileged_bpf_disabled"),
            // SECCOMP_MODE_DISABLED is 0, include/uapi/linux/seccomp.h.
            seccomp: field(&status, "Seccomp").is_some_and(|mode| mode != "0"),
            reads_own_memory: reads_own_memory(),
            uprobes: Path::new("/sys/bus/event_source/devices/uprobe/type").exists(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            memlock: getrlimit(Resource::RLIMIT_MEMLOCK)
                .ok()
                .map(|(soft, _)| soft)
                .filter(|&soft| soft != RLIM_INFINITY),
        }
    }
}

/// The value of a line of `/proc/PID/status`.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key == name).then(|| value.trim())
    })
}

fn in_namespace(kind: &str, initial: u32) -> bool {
    match fs::read_link(format!("/proc/self/ns/{kind}")) {
        Ok(link) => link.as_os_str() == format!("{kind}:[{initial}]").as_str(),
        // A kernel without namespaces of this kind.
        Err(_) => true,
    }
}

fn container() -> Option<&'static str> {
    let marked = |path: &str| Path::new(path).exists();
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        Some("Kubernetes")
    } else if marked("/run/.containerenv") {
        Some("Podman")
    } else if marked("/.dockerenv") {
        Some("Docker")
    } else if std::env::var_os("container").is_some() {
        Some("a container runtime")
    } else {
        None
    }
}

fn reads_own_memory() -> bool {
    let from = [0x5a_u8; 8];
    let mut to = [0_u8; 8];
    let range = RemoteIoVec {
        base: from.as_ptr() as usize,
        len: from.len(),
    };
    let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut to)], &[range]);
    !matches!(read, Err(Errno::EPERM | Errno::EACCES | Errno::ENOSYS))
}

/// Something that a tier needs and the system does not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// This process lacks a capability.
    Capability(Capability),
    /// The kernel is too old.
    Kernel {
        /// What runs; `None` when its version makes no sense.
        found: Option<KernelVersion>,
        /// What would do.
        needed: KernelVersion,
    },
    /// The kernel is compiled without uprobes.
    Uprobes,
    /// The capabilities hold in a user namespace only.
    UserNamespace,
    /// The kernel's lockdown forbids BPF programs to read memory.
    Lockdown,
    /// Yama forbids to read any process, to everybody.
    PtraceScope,
    /// A seccomp filter forbids process_vm_readv(2).
    Seccomp,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missing::Capability(capability) => {
                write!(
                    f,
                    "{} is missing, {}",
                    capability.name(),
                    capability.purpose()
                )
            }
            Missing::Kernel {
                found: Some(found),
                needed,
            } => write!(f, "kernel {found} is too old: probes need {needed}"),
            Missing::Kernel {
                found: None,
                needed,
            } => write!(f, "the kernel's version is unknown: probes need {needed}"),
            Missing::Uprobes => write!(f, "the kernel has no uprobes"),
            Missing::UserNamespace => {
                write!(f, "capabilities in a user namespace do not allow probes")
            }
            Missing::Lockdown => write!(f, "kernel lockdown (confidentiality) forbids probes"),
            Missing::PtraceScope => {
                write!(
                    f,
                    "kernel.yama.ptrace_scope = 3 forbids to read any process"
                )
            }
            Missing::Seccomp => write!(f, "a seccomp filter forbids process_vm_readv"),
        }
    }
}

impl Missing {
    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Missing::Capability(Capability::SysPtrace) => {
                "run as root, or: setcap cap_sys_ptrace,cap_bpf,cap_perfmon+ep \
                 path/to/leakmon; without it only processes of the same user can be \
                 read, where there is no Yama or kernel.yama.ptrace_scope is 0"
            }
            Missing::Capability(_) => {
                "run as root, or: setcap cap_sys_ptrace,cap_bpf,cap_perfmon+ep \
                 path/to/leakmon; in a container add the capability to its \
                 securityContext or with --cap-add"
            }
            Missing::Kernel { .. } => "use --tier census, or boot a newer kernel",
            Missing::Uprobes => "boot a kernel with CONFIG_UPROBE_EVENTS=y",
            Missing::UserNamespace => {
                "run leakmon on the host, or in a container without a user namespace of its own"
            }
            Missing::Lockdown => {
                "use --tier census, or boot with lockdown=integrity or without lockdown="
            }
            Missing::PtraceScope => "set kernel.yama.ptrace_scope to 2 or less and reboot",
            Missing::Seccomp => {
                "allow process_vm_readv, bpf and perf_event_open in the container's \
                 seccomp profile, or run it with seccomp=unconfined"
            }
        }
    }
}

/// What `tier` needs and is not there, most fundamental first.
pub fn missing_for(tier: Tier, facts: &Facts) -> Vec<Missing> {
    let mut missing = Vec::new();
    // `__ptrace_may_access`, kernel/ptrace.c, with PTRACE_MODE_ATTACH_REALCREDS;
    // `yama_ptrace_access_check`, security/yama/yama_lsm.c.
    let allowed = |capability| facts.capabilities.allow(capability);
    if facts.ptrace_scope.is_some_and(|scope| scope >= 3) {
        missing.push(Missing::PtraceScope);
    }
    let own = facts.same_user && facts.ptrace_scope.is_none_or(|scope| scope == 0);
    if !own && !allowed(Capability::SysPtrace) {
        missing.push(Missing::Capability(Capability::SysPtrace));
    }
    if !facts.reads_own_memory {
        missing.push(Missing::Seccomp);
    }
    if tier == Tier::Census {
        return missing;
    }
    let needed = KernelVersion::PROBES;
    if facts.kernel.is_none_or(|kernel| kernel < needed) {
        missing.push(Missing::Kernel {
            found: facts.kernel,
            needed,
        });
    }
    if !facts.uprobes {
        missing.push(Missing::Uprobes);
    }
    for capability in [Capability::Bpf, Capability::Perfmon] {
        if !allowed(capability) {
            missing.push(Missing::Capability(capability));
        }
    }
    if !facts.initial_user_namespace {
        missing.push(Missing::UserNamespace);
    }
    if facts.lockdown == Lockdown::Confidentiality {
        missing.push(Missing::Lockdown);
    }
    missing
}

/// Why the kernel refuses to let this process read another, and what to do
/// about it.
pub fn why_not_read() -> String {
    explain(&missing_for(Tier::Census, &Facts::gather()))
}

/// Why the kernel refuses this process its probes, and what to do about it.
pub fn why_not_probe() -> String {
    let facts = Facts::gather();
    let census = missing_for(Tier::Census, &facts);
    let mut missing = missing_for(Tier::Blocking, &facts);
    missing.retain(|missing| !census.contains(missing));
    explain(&missing)
}

fn explain(missing: &[Missing]) -> String {
    if missing.is_empty() {
        return "nothing that is known to be needed is missing, so a seccomp filter or a security \
                module (SELinux, AppArmor) forbids it: see `leakmon doctor`"
            .to_owned();
    }
    let mut remedies: Vec<&str> = missing.iter().map(|missing| missing.remedy()).collect();
    remedies.dedup();
    let missing: Vec<String> = missing.iter().map(Missing::to_string).collect();
    format!("{}: {}", missing.join(" and "), remedies.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Capabilities = Capabilities(
        1 << Capability::SysPtrace as u8
            | 1 << Capability::Perfmon as u8
            | 1 << Capability::Bpf as u8,
    );

    /// A system on which everything works.
    fn everything() -> Facts {
        Facts {
            release: "6.12.0-amd64".to_owned(),
            kernel: KernelVersion::parse("6.12.0-amd64"),
            capabilities: ALL,
            same_user: false,
            initial_user_namespace: true,
            initial_pid_namespace: true,
            container: None,
            lockdown: Lockdown::Off,
            ptrace_scope: Some(1),
            perf_event_paranoid: Some(3),
            unprivileged_bpf_disabled: Some(2),
            seccomp: false,
            reads_own_memory: true,
            uprobes: true,
            btf: true,
            memlock: Some(8 << 20),
        }
    }

    fn without(capability: Capability) -> Facts {
        Facts {
            capabilities: Capabilities(ALL.0 & !(1 << capability as u8)),
            ..everything()
        }
    }

    /// What is missing for the census, and for both tiers with probes.
    fn judge(facts: &Facts) -> (Vec<Missing>, Vec<Missing>) {
        let lifecycle = missing_for(Tier::Lifecycle, facts);
        assert_eq!(lifecycle, missing_for(Tier::Blocking, facts));
        (missing_for(Tier::Census, facts), lifecycle)
    }

    #[test]
    fn nothing_is_missing_with_the_three_capabilities() {
        assert_eq!(judge(&everything()), (vec![], vec![]));
    }

    #[test]
    fn each_missing_capability_is_named() {
        for capability in [Capability::Bpf, Capability::Perfmon] {
            assert_eq!(
                judge(&without(capability)),
                (vec![], vec![Missing::Capability(capability)])
            );
        }
        let ptrace = Missing::Capability(Capability::SysPtrace);
        assert_eq!(
            judge(&without(Capability::SysPtrace)),
            (vec![ptrace], vec![ptrace])
        );
        assert_eq!(
            ptrace.to_string(),
            "CAP_SYS_PTRACE is missing, to read the memory of other users' processes"
        );
    }

    #[test]
    fn cap_sys_admin_stands_for_bpf_and_perfmon_only() {
        let facts = Facts {
            capabilities: Capabilities(1 << Capability::SysAdmin as u8),
            ..everything()
        };
        let ptrace = Missing::Capability(Capability::SysPtrace);
        assert_eq!(judge(&facts), (vec![ptrace], vec![ptrace]));
    }

    #[test]
    fn own_processes_need_no_capability_where_yama_allows() {
        let mut facts = Facts {
            same_user: true,
            ptrace_scope: Some(0),
            ..without(Capability::SysPtrace)
        };
        assert_eq!(judge(&facts), (vec![], vec![]));
        facts.ptrace_scope = None;
        assert_eq!(judge(&facts), (vec![], vec![]));
        facts.ptrace_scope = Some(1);
        assert_eq!(judge(&facts).0.len(), 1);
        facts.capabilities = ALL;
        facts.ptrace_scope = Some(3);
        assert_eq!(judge(&facts).0, [Missing::PtraceScope]);
    }

    #[test]
    fn explanations_name_what_is_missing_and_each_remedy_once() {
        let both = [Capability::Bpf, Capability::Perfmon].map(Missing::Capability);
        assert_eq!(
            explain(&both),
            format!(
                "CAP_BPF is missing, to load what counts in the kernel and \
                 CAP_PERFMON is missing, to attach probes: {}",
                both[0].remedy()
            )
        );
        assert!(explain(&[]).contains("leakmon doctor"));
    }

    #[test]
    fn lockdown() {
        let locked = |lockdown| Facts {
            lockdown,
            ..everything()
        };
        assert_eq!(judge(&locked(Lockdown::Integrity)), (vec![], vec![]));
        assert_eq!(
            judge(&locked(Lockdown::Confidentiality)),
            (vec![], vec![Missing::Lockdown])
        );
    }

    #[test]
    fn old_kernels_give_a_census() {
        for (release, found) in [
            ("5.4.0-42-generic", KernelVersion::parse("5.4")),
            ("strange", None),
        ] {
            let facts = Facts {
                kernel: KernelVersion::parse(release),
                ..everything()
            };
            let needed = KernelVersion::PROBES;
            assert_eq!(
                judge(&facts),
                (vec![], vec![Missing::Kernel { found, needed }])
            );
        }
    }

    #[test]
    fn the_rest() {
        let mut facts = everything();
        facts.uprobes = false;
        facts.initial_user_namespace = false;
        facts.reads_own_memory = false;
        assert_eq!(
            judge(&facts),
            (
                vec![Missing::Seccomp],
                vec![Missing::Seccomp, Missing::Uprobes, Missing::UserNamespace]
            )
        );
    }

    #[test]
    fn what_the_files_say() {
        assert_eq!(
            Lockdown::parse("[none] integrity confidentiality\n"),
            Lockdown::Off
        );
        assert_eq!(
            Lockdown::parse("none [integrity] confidentiality\n"),
            Lockdown::Integrity
        );
        assert_eq!(
            Lockdown::parse("none integrity [confidentiality]\n"),
            Lockdown::Confidentiality
        );
        assert_eq!(Lockdown::parse(""), Lockdown::Off);
        let version = |major, minor| Some(KernelVersion { major, minor });
        assert_eq!(KernelVersion::parse("6.1.0-18-amd64"), version(6, 1));
        assert_eq!(KernelVersion::parse("5.15-rc1"), version(5, 15));
        assert_eq!(KernelVersion::parse("6"), None);
        let status = "Name:\tx\nCapEff:\t000001ffffffffff\nSeccomp:\t2\n";
        assert_eq!(field(status, "CapEff"), Some("000001ffffffffff"));
        assert_eq!(field(status, "Cap"), None);
        assert!(reads_own_memory());
    }
}
