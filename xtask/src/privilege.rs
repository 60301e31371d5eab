//! Root, and whether the kernel lets it use BPF.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Result, bail};

use crate::command::Run;

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command that runs as root: as it is, or through sudo.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Run {
    if is_root() {
        Run::new(program)
    } else {
        Run::new("sudo").arg(program)
    }
}

/// Fails with the reason where a task of xtask could not load a BPF program or place a probe.
pub(crate) fn require_bpf(task: &str) -> Result<()> {
    if !is_root() {
        bail!(
            "`cargo xtask {task}` loads BPF programs and reads other processes, so it needs root: \
             run `sudo -E env \"PATH=$PATH\" cargo xtask {task}`"
        );
    }
    if !Path::new("/sys/bus/event_source/devices/uprobe/type").exists() {
        bail!(
            "this kernel has no uprobes (CONFIG_UPROBE_EVENTS), or /sys is not mounted: \
             `cargo xtask {task}` needs both"
        );
    }
    if let Err(error) = create_map() {
        bail!(
            "the kernel refuses bpf(BPF_MAP_CREATE) to root ({error}): in a container, run it with \
             CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE and a seccomp profile that allows bpf(2)"
        );
    }
    Ok(())
}

/// What bpf(2) wants to know of a new map.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// Makes the smallest BPF map and closes it again.
fn create_map() -> Result<(), std::io::Error> {
    const BPF_MAP_CREATE: libc::c_int = 0;
    const BPF_MAP_TYPE_ARRAY: u32 = 2;
    let attributes = MapCreate {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
    };
    // SAFETY: the kernel reads `attributes` only, and as many bytes of it as it is told.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_CREATE,
            &raw const attributes,
            size_of::<MapCreate>(),
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is the one that was just made, and nobody else has it.
    unsafe { libc::close(fd as libc::c_int) };
    Ok(())
}
