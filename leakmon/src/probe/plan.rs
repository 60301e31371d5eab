//! What is to be probed in one process: plain data that a runtime fills in and
//! [`super::Kernel::attach`] attaches.

use std::fs::File;
use std::sync::Arc;

pub use leakmon_common::Layout;
use leakmon_common::go::slot as go;
use leakmon_common::threads::slot as threads;
use leakmon_common::tokio::slot as tokio;

use crate::binary::addr::FileOffset;
pub use crate::task::Tier;

/// What happens at a place, and so which program counts it and in which
/// registers it finds what it counts. amd64's register is named first, then
/// arm64's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Go: a goroutine was made: BX / X1 is its `g`, with every field set
    /// (`CALL runqput` in `newproc.func1`).
    Spawn,
    /// Go: a goroutine was made: AX / X0 is its `g` (behind `CALL newproc1`,
    /// where `runqput` is inlined).
    SpawnReturned,
    /// Go: a goroutine ends: AX / X0 is its `g` (`goexit0`, after its stack
    /// check).
    Exit,
    /// Go: a goroutine is about to wait: R14 / X28 is its `g`, CX / X2 the
    /// reason, RBP / X29 its frame pointer (`CALL gopark`). The place's argument
    /// is the number of return addresses to keep.
    Park,
    /// Go: a goroutine goes on: R14 / X28 is its `g` (behind `CALL gopark`).
    Resume,
    /// Go: a goroutine waits: AX / X0 is its `g`, the reason is in it (`park_m`,
    /// after its stack check). The argument is as for [`Role::Park`].
    ParkUniversal,
    /// Go: a goroutine is made ready to run: AX / X0 is its `g`
    /// (`runtime.ready`, after its stack check). Ends the wait in place of
    /// [`Role::Resume`].
    Ready,
    /// tokio: a call of a vtable's `poll`, and its return: RDI / X0 is the task's
    /// header, and the return address is where it was at the function's entry. The
    /// place's argument is an [`Argument`](leakmon_common::tokio::Argument).
    Poll,
    /// tokio: the same at an instruction that the kernel does not emulate.
    PollStepped,
    /// tokio: a call of a vtable's `shutdown`: RDI / X0 is the task's header. The
    /// argument is as for [`Role::Poll`].
    Shutdown,
    /// tokio: the time from the end of a task's poll to the start of its next.
    /// It has no place of its own: [`Role::Poll`] and [`Role::PollStepped`]
    /// measure it.
    Idle,
    /// Threads: a call of `pthread_create`, at its first instruction: RDX / X2 is
    /// the start routine, RCX / X3 its argument, the return address lies at RSP /
    /// in X30. It names the sites of [`Role::ThreadStart`].
    ThreadCreate,
    /// Threads: one is made, by the kernel's tracepoint: it has no place.
    ThreadStart,
    /// Threads: one ends, by the kernel's tracepoint: it has no place.
    ThreadExit,
    /// Threads: one is taken from its CPU or put on one, by the kernel's
    /// tracepoint: it has no place.
    ThreadSwitch,
}

/// How a role's program sees what happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// At an instruction: the function's name in leakmon-ebpf.
    Entry(&'static str),
    /// At an instruction of a function, and when the function returns.
    Call {
        /// The one function for both, where the kernel has sessions.
        session: &'static str,
        /// At the instruction.
        entry: &'static str,
        /// At the return.
        returned: &'static str,
    },
    /// At one of the kernel's tracepoints, on the whole machine.
    Tracepoint {
        /// The kernel's name of it.
        name: &'static str,
        /// The function's name in leakmon-ebpf.
        function: &'static str,
    },
    /// Not at all: another role's program does it.
    Nothing,
}

/// What was measured for a role's hits, see [`super::Cost`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measured {
    Lifecycle,
    Blocking,
    Poll,
    PollStepped,
    Switch,
}

/// What the kernel side has for a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) role: Role,
    pub(super) kind: Kind,
    /// Where its hits are counted; each runtime numbers its own.
    pub(super) slot: usize,
    /// The lowest tier in which it is attached.
    pub(super) tier: Tier,
    /// Whose cost a hit has.
    pub(super) cost: Measured,
    /// The word in messages.
    pub(super) name: &'static str,
}

/// Every program, in the order of [`Role`]'s variants. Adding a runtime adds
/// its lines here.
#[rustfmt::skip]
pub(super) const PROGRAMS: [Program; 15] = {
    use Kind::{Call, Entry, Nothing, Tracepoint};
    use Measured as Cost;
    use Tier::{Blocking, Lifecycle};
    const fn program(role: Role, kind: Kind, slot: usize, tier: Tier, cost: Measured, name: &'static str) -> Program {
        Program { role, kind, slot, tier, cost, name }
    }
    [
        program(Role::Spawn, Entry("go_spawn"), go::SPAWN, Lifecycle, Cost::Lifecycle, "spawn"),
        program(Role::SpawnReturned, Entry("go_spawn_returned"), go::SPAWN_RETURNED, Lifecycle, Cost::Lifecycle, "spawn (returned)"),
        program(Role::Exit, Entry("go_exit"), go::EXIT, Lifecycle, Cost::Lifecycle, "exit"),
        program(Role::Park, Entry("go_park"), go::PARK, Blocking, Cost::Blocking, "park"),
        program(Role::Resume, Entry("go_resume"), go::RESUME, Blocking, Cost::Blocking, "resume"),
        program(Role::ParkUniversal, Entry("go_park_universal"), go::PARK_UNIVERSAL, Blocking, Cost::Blocking, "park (universal)"),
        program(Role::Ready, Entry("go_ready"), go::READY, Blocking, Cost::Blocking, "ready"),
        program(
            Role::Poll,
            Call { session: "tokio_poll_session", entry: "tokio_poll", returned: "tokio_poll_returned" },
            tokio::POLL, Lifecycle, Cost::Poll, "poll",
        ),
        program(
            Role::PollStepped,
            Call { session: "tokio_poll_session", entry: "tokio_poll", returned: "tokio_poll_returned" },
            tokio::POLL_STEPPED, Lifecycle, Cost::PollStepped, "poll (stepped)",
        ),
        program(Role::Shutdown, Entry("tokio_shutdown"), tokio::SHUTDOWN, Lifecycle, Cost::Lifecycle, "shutdown"),
        program(Role::Idle, Nothing, tokio::IDLE, Blocking, Cost::Poll, "idle"),
        program(Role::ThreadCreate, Entry("thread_create"), threads::CREATE, Lifecycle, Cost::Lifecycle, "pthread_create"),
        program(
            Role::ThreadStart,
            Tracepoint { name: "task_newtask", function: "thread_start" },
            threads::START, Lifecycle, Cost::Lifecycle, "thread start",
        ),
        program(
            Role::ThreadExit,
            Tracepoint { name: "sched_process_exit", function: "thread_exit" },
            threads::EXIT, Lifecycle, Cost::Lifecycle, "thread exit",
        ),
        program(
            Role::ThreadSwitch,
            Tracepoint { name: "sched_switch", function: "thread_switch" },
            threads::SWITCH, Blocking, Cost::Switch, "thread switch",
        ),
    ]
};

impl Role {
    /// Every role, in the order in which they are attached.
    pub fn all() -> impl Iterator<Item = Role> {
        PROGRAMS.iter().map(|program| program.role)
    }

    /// Position in [`PROGRAMS`].
    pub(super) fn index(self) -> usize {
        self as usize
    }

    pub(super) fn program(self) -> &'static Program {
        &PROGRAMS[self.index()]
    }

    /// The lowest tier in which places of this role are attached.
    pub fn tier(self) -> Tier {
        self.program().tier
    }

    /// It is one of those that follow tokio's tasks.
    pub(super) fn is_poll(self) -> bool {
        matches!(self, Role::Poll | Role::PollStepped)
    }

    /// The word in messages.
    pub fn name(self) -> &'static str {
        self.program().name
    }
}

/// The file that a place lies in.
#[derive(Clone, Debug, Default)]
pub enum Code {
    /// The process's executable.
    #[default]
    Executable,
    /// Another file that the process has mapped, opened by whoever proved the
    /// place.
    File(Arc<File>),
    /// None: the role's program is not one of an instruction.
    Nowhere,
}

impl PartialEq for Code {
    /// Two files are equal when they were opened at once.
    fn eq(&self, other: &Code) -> bool {
        match (self, other) {
            (Code::Executable, Code::Executable) | (Code::Nowhere, Code::Nowhere) => true,
            (Code::File(file), Code::File(other)) => Arc::ptr_eq(file, other),
            _ => false,
        }
    }
}

/// One instruction to be probed.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The file that it is in.
    pub code: Code,
    /// Where in the file. The caller has proven that an instruction starts here.
    pub offset: FileOffset,
    /// What happens here.
    pub role: Role,
    /// What the role's program must know of this place alone; see [`Role`].
    pub argument: u16,
}

impl Place {
    /// The place of a role that has none: it only says that the role is wanted.
    pub fn nowhere(role: Role) -> Place {
        Place {
            code: Code::Nowhere,
            offset: FileOffset(0),
            role,
            argument: 0,
        }
    }
}

/// Everything that can be attached to one process for one runtime.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The layout of the runtime's structs, as its programs understand it: the
    /// words of `leakmon_common::go::Layout` and the like.
    pub layout: Layout,
    /// The places, of all tiers. No two have equal files, offsets and roles.
    pub places: Vec<Place>,
}

impl Plan {
    /// The places that `tier` attaches.
    pub fn places(&self, tier: Tier) -> impl Iterator<Item = &Place> {
        self.places
            .iter()
            .filter(move |place| place.role.tier() <= tier)
    }

    /// The highest tier for which there is a place.
    pub fn highest_tier(&self) -> Tier {
        self.places
            .iter()
            .map(|place| place.role.tier())
            .max()
            .unwrap_or(Tier::Census)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(role: Role) -> Place {
        Place {
            code: Code::Executable,
            offset: FileOffset(role.index() as u64),
            role,
            argument: 0,
        }
    }

    fn plan(places: Vec<Place>) -> Plan {
        Plan {
            layout: Layout::default(),
            places,
        }
    }

    #[test]
    fn roles_are_indexed_in_order() {
        for (index, role) in Role::all().enumerate() {
            assert_eq!(role.index(), index);
            assert!(role.program().slot < leakmon_common::SLOTS);
        }
    }

    #[test]
    fn a_tier_holds_the_tiers_below() {
        let plan = plan(Role::all().take(7).map(place).collect());
        assert_eq!(plan.places(Tier::Census).count(), 0);
        assert_eq!(plan.places(Tier::Lifecycle).count(), 3);
        assert_eq!(plan.places(Tier::Blocking).count(), 7);
        assert_eq!(plan.highest_tier(), Tier::Blocking);
    }

    #[test]
    fn a_plan_without_places_is_a_census() {
        assert_eq!(plan(vec![]).highest_tier(), Tier::Census);
    }
}
