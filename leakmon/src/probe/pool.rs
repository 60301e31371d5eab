//! Processes that run the same file share their probes.
//!
//! The kernel keeps a list of those who want to see a place of a file and goes
//! through it at every hit, in whatever process: with a link for each process, a
//! hit costs 23 ns more for each other process that is watched (Go's ping-pong,
//! kernel 6.18: 13 times as much with 300 of them). So only the first few have
//! links of their own ([`OWN_LINKS`]); all others share one link for each role,
//! which is for every process, and the programs find out whose hit it is.
//!
//! Processes of the file that nobody watches are hit, too, and so are those with
//! links of their own when these are less than what is shared. What that costs them
//! is kept within a budget like everything else.

use std::collections::HashMap;

use super::plan::{Role, Tier};

/// Processes of a file that have links of their own. While there are no more, each
/// can be left alone, and nobody else is hit.
pub(super) const OWN_LINKS: usize = 4;

/// What tells files and places apart: device, inode, offset, role and argument
/// of each place.
pub(super) type PoolKey = Vec<(u64, u64, u64, usize, u16)>;

/// The processes with the same places. `L` is what keeps a role attached.
pub(super) struct Pool<L> {
    /// Those that have links of their own, by their index in `TARGETS`: the pid, and
    /// what is attached to it alone.
    pub(super) own: HashMap<u16, (u32, Tier)>,
    /// Those that share links, if any.
    pub(super) shared: Option<Shared<L>>,
}

impl<L> Default for Pool<L> {
    fn default() -> Self {
        Pool {
            own: HashMap::new(),
            shared: None,
        }
    }
}

/// Links that processes share.
pub(super) struct Shared<L> {
    /// In `TARGETS`.
    pub(super) index: u16,
    /// Of `index`.
    pub(super) epoch: u32,
    /// The tier that each member wants, by its index in `TARGETS`.
    pub(super) members: HashMap<u16, Tier>,
    /// What is attached.
    pub(super) tier: Tier,
    pub(super) links: Vec<(Role, L)>,
}

impl<L> Shared<L> {
    pub(super) fn new(index: u16, epoch: u32) -> Self {
        Shared {
            index,
            epoch,
            members: HashMap::new(),
            tier: Tier::Census,
            links: Vec::new(),
        }
    }

    /// What is to be attached: what the one wants that wants most.
    pub(super) fn wanted(&self) -> Tier {
        self.members.values().copied().max().unwrap_or(Tier::Census)
    }

    /// Takes out the links that nobody wants.
    #[must_use = "dropping them detaches"]
    pub(super) fn lower(&mut self) -> Vec<(Role, L)> {
        let wanted = self.wanted();
        if wanted >= self.tier {
            return Vec::new();
        }
        self.tier = wanted;
        let (gone, kept) = std::mem::take(&mut self.links)
            .into_iter()
            .partition(|(role, _)| role.tier() > wanted);
        self.links = kept;
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_wants_stays() {
        let mut shared = Shared::new(7, 1);
        shared.tier = Tier::Blocking;
        shared.links = vec![(Role::Spawn, "spawn"), (Role::Park, "park")];
        shared.members = HashMap::from([(1, Tier::Blocking), (2, Tier::Lifecycle)]);
        assert!(shared.lower().is_empty());
        shared.members.insert(1, Tier::Census);
        assert_eq!(shared.lower(), [(Role::Park, "park")]);
        assert_eq!(shared.tier, Tier::Lifecycle);
        shared.members.clear();
        assert_eq!(shared.lower(), [(Role::Spawn, "spawn")]);
        assert_eq!((shared.tier, shared.links.len()), (Tier::Census, 0));
    }
}
