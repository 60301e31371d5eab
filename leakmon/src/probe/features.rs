//! What kernels have of what leakmon uses, found by trying and not by their
//! versions, and what leakmon does where it is missing. The one place that knows.

use std::os::fd::AsFd as _;

use aya_obj::generated::bpf_insn;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use super::btf::Btf;
use super::error::Error;
use super::sys::{self, ProgramType, When};

// Helpers' numbers of include/uapi/linux/bpf.h.
const GET_CURRENT_TASK_BTF: i32 = 158;
const KTIME_GET_COARSE_NS: i32 = 160;
const GET_ATTACH_COOKIE: i32 = 174;
const TASK_PT_REGS: i32 = 175;

/// What this kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Its maps are not counted against RLIMIT_MEMLOCK (5.11).
    pub own_memory: bool,
    /// Atomic instructions that give what they found (5.12).
    pub exchange: bool,
    /// Cookies of perf events of uprobes, and `bpf_get_attach_cookie` (5.15).
    pub cookie: bool,
    /// `bpf_task_pt_regs` (5.15).
    pub registers: bool,
    /// The state as an argument of the tracepoint `sched_switch` (5.18).
    pub switch_state: bool,
    /// Maps whose entries can be allocated in any context (6.1).
    pub allocator: bool,
    /// A task iterator of one process (6.1).
    pub process_iterator: bool,
    /// uprobe_multi links (6.6).
    pub multi: bool,
    /// Programs that see a call and its return (6.13).
    pub session: bool,
}

/// One feature, for `leakmon doctor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is.
    pub name: &'static str,
    /// This kernel has it.
    pub there: bool,
    /// The first kernel that has it.
    pub since: &'static str,
    /// What leakmon does without it.
    pub without: &'static str,
}

impl Features {
    /// Those of the running kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Permission`], and [`Error::Program`] where the kernel takes no
    /// program at all.
    pub fn of_kernel() -> Result<Features, Error> {
        Features::detect(Btf::of_kernel().as_ref().ok())
    }

    /// Tries everything, in about a millisecond. `types` are the kernel's own, as
    /// far as it tells them.
    ///
    /// # Errors
    ///
    /// [`Error::Permission`], and [`Error::Program`] where the kernel takes no
    /// program at all.
    pub(super) fn detect(types: Option<&Btf>) -> Result<Features, Error> {
        // exit with 0.
        let nothing = [instruction(0xb7, 0, 0, 0, 0), exit()];
        sys::load_program("try", ProgramType::Uprobe, &nothing, c"GPL")
            .map_err(|(source, log)| Error::refused("try", source, log))?;
        let links = |program_type, when| {
            loads(program_type, &nothing)
                .is_some_and(|program| sys::has_uprobe_links(program.as_fd(), when))
        };
        let has =
            |of: &str, member: &str| types.is_some_and(|types| types.offset(of, member).is_some());
        Ok(Features {
            // It came with the same kernel, and shows itself by nothing else; programs of
            // uprobes may not call it.
            own_memory: loads(
                ProgramType::SocketFilter,
                &[call(KTIME_GET_COARSE_NS), exit()],
            )
            .is_some(),
            exchange: has_helper(&[
                // *(u64 *)(r10 - 8) = 0; r0 = 0; r1 = 1
                instruction(0x7a, 10, 0, -8, 0),
                instruction(0xb7, 0, 0, 0, 0),
                instruction(0xb7, 1, 0, 0, 1),
                // r0 = cmpxchg_64(r10 - 8, r0, r1)
                instruction(0xdb, 10, 1, -8, 0xf1),
                exit(),
            ]),
            cookie: has_helper(&[call(GET_ATTACH_COOKIE), exit()]),
            registers: has_helper(&[
                call(GET_CURRENT_TASK_BTF),
                // r1 = r0
                instruction(0xbf, 1, 0, 0, 0),
                call(TASK_PT_REGS),
                instruction(0xb7, 0, 0, 0, 0),
                exit(),
            ]),
            switch_state: has_switch_state(),
            allocator: has("bpf_htab", "ma"),
            process_iterator: has("bpf_iter_link_info", "task"),
            multi: links(ProgramType::UprobeMulti, When::Entry),
            session: links(ProgramType::UprobeSession, When::Session),
        })
    }

    /// The form of a program that this kernel can take: its function in
    /// leakmon-ebpf.
    pub(super) fn variant(&self, program: &'static str) -> &'static str {
        match program {
            "tokio_poll" if !self.exchange => "tokio_poll_old",
            "tokio_poll_returned" if !self.exchange => "tokio_poll_returned_old",
            "tokio_shutdown" if !self.exchange => "tokio_shutdown_old",
            "thread_create" if !self.exchange => "thread_create_old",
            "thread_registers" if !self.registers => "thread_registers_old",
            "thread_switch" if !self.registers || !self.switch_state => "thread_switch_old",
            program => program,
        }
    }

    /// All of them, the oldest first.
    pub fn table(&self) -> [Feature; 9] {
        let feature = |name, there, since, without| Feature {
            name,
            there,
            since,
            without,
        };
        [
            feature(
                "BPF memory of its own",
                self.own_memory,
                "5.11",
                "RLIMIT_MEMLOCK is raised, for which CAP_SYS_RESOURCE may be needed",
            ),
            feature(
                "atomic exchange",
                self.exchange,
                "5.12",
                "tokio's tasks and the stacks of threads' makers are locked by a map",
            ),
            feature(
                "attach cookie",
                self.cookie,
                "5.15",
                "each place has a copy of its program, with its cookie in it",
            ),
            feature(
                "bpf_task_pt_regs",
                self.registers,
                "5.15",
                "threads' registers are read from their kernel stacks",
            ),
            feature(
                "sched_switch's state",
                self.switch_state,
                "5.18",
                "the state is read from the thread",
            ),
            feature(
                "BPF allocator",
                self.allocator,
                "6.1",
                "maps are smaller, and allocated beforehand",
            ),
            feature(
                "iterator of a process",
                self.process_iterator,
                "6.1",
                "every thread of the machine is looked at for registers",
            ),
            feature(
                "uprobe_multi link",
                self.multi,
                "6.6",
                "each place has a perf event of its own: attaching takes longer",
            ),
            feature(
                "uprobe session",
                self.session,
                "6.13",
                "a poll's start and its return are two probes, tied by a map",
            ),
        ]
    }
}

/// Has the kernel take maps of any size, before 5.11: it counts them against
/// RLIMIT_MEMLOCK, whose default is 64 KiB.
pub(super) fn raise_memory_limit() -> Result<(), Error> {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) else {
        return Ok(());
    };
    if soft == RLIM_INFINITY
        || setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_ok()
    {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: "memory for probes",
        why: format!(
            "kernels before 5.11 count it against RLIMIT_MEMLOCK, which is {} KiB here and cannot \
             be raised beyond {} KiB without CAP_SYS_RESOURCE: run leakmon under `ulimit -l \
             unlimited`, or with LimitMEMLOCK=infinity in its unit",
            soft >> 10,
            hard >> 10
        ),
    })
}

/// The end.
fn exit() -> bpf_insn {
    instruction(0x95, 0, 0, 0, 0)
}

/// An instruction of Documentation/bpf/instruction-set.rst.
fn instruction(code: u8, to: u8, from: u8, off: i16, imm: i32) -> bpf_insn {
    bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off,
        imm,
    }
}

fn call(helper: i32) -> bpf_insn {
    instruction(0x85, 0, 0, 0, helper)
}

fn loads(program_type: ProgramType, program: &[bpf_insn]) -> Option<std::os::fd::OwnedFd> {
    sys::load_program("try", program_type, program, c"GPL").ok()
}

fn has_helper(program: &[bpf_insn]) -> bool {
    loads(ProgramType::Uprobe, program).is_some()
}

/// Whether a program that reads the fourth argument of `sched_switch` can be
/// attached there: the kernel refuses one that reads more than there are. It is
/// attached for a moment.
fn has_switch_state() -> bool {
    let program = [
        // r0 = *(u64 *)(r1 + 24); r0 = 0
        instruction(0x79, 0, 1, 24, 0),
        instruction(0xb7, 0, 0, 0, 0),
        exit(),
    ];
    loads(ProgramType::RawTracepoint, &program)
        .is_some_and(|program| sys::link_tracepoint(program.as_fd(), "sched_switch").is_ok())
}

#[cfg(test)]
impl Features {
    /// Those of a kernel that has none.
    pub(crate) fn oldest() -> Features {
        Features {
            own_memory: false,
            exchange: false,
            cookie: false,
            registers: false,
            switch_state: false,
            allocator: false,
            process_iterator: false,
            multi: false,
            session: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_told() {
        let none = Features::oldest();
        assert!(none.table().iter().all(|feature| !feature.there));
        let session = Features {
            session: true,
            ..none
        };
        let there = session.table().into_iter().filter(|feature| feature.there);
        assert_eq!(
            there.map(|feature| feature.since).collect::<Vec<_>>(),
            ["6.13"]
        );
    }
}
