//! What is to be probed in one process: plain data that a runtime fills in and
//! [`super::Kernel::attach`] attaches.

use crate::binary::addr::FileOffset;
pub use crate::task::Tier;

/// Where the kernel side finds what it reads in a `runtime.g`, in bytes from
/// its start. They differ between Go's versions; see the layouts of
/// `runtime::go`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetLayout {
    /// `g.goid`, the goroutine's id (u64).
    pub goid: u16,
    /// `g.gopc`, the return address of the `go` statement.
    pub gopc: u16,
    /// `g.startpc`, the entry of the goroutine's function. The kernel side reads it
    /// together with `gopc`: it must lie 16 bytes after it.
    pub startpc: u16,
    /// `g.waitreason` (u8). Read by [`Role::ParkUniversal`] only.
    pub waitreason: u16,
    /// `g.sched.bp`, the saved frame pointer. Read by [`Role::ParkUniversal`]
    /// only.
    pub sched_bp: u16,
    /// Wait reasons (bit `n` for Go's reason number `n`) that
    /// [`Role::ParkUniversal`] counts; the others are ignored. The other roles
    /// count every reason.
    pub reasons: u64,
}

/// What happens at a place, and so in which registers the kernel side finds
/// what it counts. amd64's register is named first, then arm64's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A goroutine was made: BX / X1 is its `g`, with every field set
    /// (`CALL runqput` in `newproc.func1`).
    Spawn,
    /// A goroutine was made: AX / X0 is its `g` (behind `CALL newproc1`, where
    /// `runqput` is inlined).
    SpawnReturned,
    /// A goroutine ends: AX / X0 is its `g` (`goexit0`, after its stack check).
    Exit,
    /// A goroutine is about to wait: R14 / X28 is its `g`, CX / X2 the reason,
    /// RBP / X29 its frame pointer (`CALL gopark`).
    Park,
    /// A goroutine goes on: R14 / X28 is its `g` (behind `CALL gopark`).
    Resume,
    /// A goroutine waits: AX / X0 is its `g`, the reason is in it (`park_m`,
    /// after its stack check).
    ParkUniversal,
    /// A goroutine is made ready to run: AX / X0 is its `g` (`runtime.ready`,
    /// after its stack check). Ends the wait in place of [`Role::Resume`].
    Ready,
}

impl Role {
    /// Every role, in the order of [`Role::index`].
    pub const ALL: [Role; 7] = [
        Role::Spawn,
        Role::SpawnReturned,
        Role::Exit,
        Role::Park,
        Role::Resume,
        Role::ParkUniversal,
        Role::Ready,
    ];

    /// Position in [`Role::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The lowest tier in which places of this role are attached.
    pub fn tier(self) -> Tier {
        match self {
            Role::Spawn | Role::SpawnReturned | Role::Exit => Tier::Lifecycle,
            Role::Park | Role::Resume | Role::ParkUniversal | Role::Ready => Tier::Blocking,
        }
    }

    /// The word in messages.
    pub fn name(self) -> &'static str {
        match self {
            Role::Spawn => "spawn",
            Role::SpawnReturned => "spawn (returned)",
            Role::Exit => "exit",
            Role::Park => "park",
            Role::Resume => "resume",
            Role::ParkUniversal => "park (universal)",
            Role::Ready => "ready",
        }
    }
}

/// One instruction to be probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Of the instruction, in the process's executable. The caller has proven
    /// that an instruction starts here.
    pub offset: FileOffset,
    /// What happens here.
    pub role: Role,
    /// Return addresses kept of a wait's stack, innermost first; at most
    /// [`leakmon_common::WAIT_FRAMES`]. Used by [`Role::Park`] and
    /// [`Role::ParkUniversal`].
    pub depth: u8,
}

/// Everything that can be attached to one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The layout of the runtime's structs.
    pub target: TargetLayout,
    /// The places, of all tiers. No two have equal offsets and roles.
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
            offset: FileOffset(role.index() as u64),
            role,
            depth: 0,
        }
    }

    fn plan(places: Vec<Place>) -> Plan {
        Plan {
            target: TargetLayout {
                goid: 152,
                gopc: 288,
                startpc: 304,
                waitreason: 176,
                sched_bp: 96,
                reasons: !0,
            },
            places,
        }
    }

    #[test]
    fn roles_are_indexed_in_order() {
        for (index, role) in Role::ALL.into_iter().enumerate() {
            assert_eq!(role.index(), index);
        }
    }

    #[test]
    fn a_tier_holds_the_tiers_below() {
        let plan = plan(Role::ALL.map(place).to_vec());
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
