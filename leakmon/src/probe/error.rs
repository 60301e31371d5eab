//! What can go wrong with the kernel side, and what to do about it.

use std::io;

use super::plan::Role;
use crate::binary::addr::FileOffset;
use crate::process::capabilities;

/// The kernel side could not be loaded, attached or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refuses bpf(2) or perf_event_open(2) to this process.
    #[error("{call}: {source}: {}", capabilities::why_not_probe())]
    Permission {
        /// What was called.
        call: &'static str,
        /// EPERM or EACCES.
        source: io::Error,
    },
    /// The kernel cannot make the maps.
    #[error("cannot load the kernel side: {0}")]
    Load(#[source] aya::EbpfError),
    /// The kernel's verifier refused a program.
    #[error("the kernel refused the program `{program}`: {source}\n{log}")]
    Program {
        /// Its name.
        program: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// The end of the verifier's output.
        log: String,
    },
    /// The object that was compiled in is not what this code expects.
    #[error("leakmon's own kernel object is broken: {0}")]
    Object(String),
    /// A map could not be read or written.
    #[error("cannot {what}: {source}")]
    Map {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A place could not be attached. Nothing of its tier is attached then.
    #[error("cannot probe {} at offset {offset} of process {pid}'s {file}: {source}{}", role.name(), attach_hint(source))]
    Attach {
        /// The process.
        pid: u32,
        /// What happens at the place.
        role: Role,
        /// Where it lies.
        offset: FileOffset,
        /// In what: "executable", or the path of a library.
        file: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The plan cannot be attached by this kernel side.
    #[error("the plan cannot be attached: {0}")]
    Plan(&'static str),
    /// Every index for a process is taken.
    #[error("more than {0} plans are attached at once")]
    TooManyTargets(u32),
    /// Probes of leakmon's own process do not fire as they should.
    #[error("the kernel's uprobes do not work: {0}")]
    NotFiring(String),
    /// This kernel, or this place to run leakmon in, lacks what is needed.
    #[error("{what} cannot be had here: {why}")]
    Unsupported {
        /// What was wanted.
        what: &'static str,
        /// What is missing, and what would help.
        why: String,
    },
    /// A file of /proc or /sys could not be read.
    #[error("{path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// [`Error::Permission`] for EPERM and EACCES, else what `other` makes.
    pub(super) fn or_permission(
        call: &'static str,
        source: io::Error,
        other: impl FnOnce(io::Error) -> Error,
    ) -> Error {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Error::Permission { call, source },
            _ => other(source),
        }
    }

    /// That a program was not loaded. EACCES is the verifier's word, too: where it
    /// said why, nobody was denied anything. Of one that it takes it says how much
    /// work that was (`print_verification_stats`, kernel/bpf/verifier.c).
    pub(super) fn refused(program: &'static str, source: io::Error, log: String) -> Error {
        let mut said = log.lines();
        if said.all(|line| line.starts_with("processed ") || line.starts_with("stack depth ")) {
            return Error::or_permission("bpf", source, |source| Error::Program {
                program,
                source,
                log,
            });
        }
        Error::Program {
            program,
            source,
            log,
        }
    }
}

/// The kernel's own errno (include/linux/errno.h), which libc does not name.
const ENOTSUPP: i32 = 524;

fn attach_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => " (the process is gone)",
        Some(ENOTSUPP) => " (the kernel cannot probe this instruction)",
        _ => "",
    }
}

/// The errno under an error of aya.
pub(super) fn errno(error: &(dyn std::error::Error + 'static)) -> Option<io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            return Some(io::Error::from_raw_os_error(code));
        }
        next = error.source();
    }
    None
}
