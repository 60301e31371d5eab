//! Threads that wait for each other in a circle.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

/// A thread that waits for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edge {
    /// The thread.
    pub(super) waiter: u32,
    /// The lock's address.
    pub(super) lock: u64,
    /// The thread that holds the lock.
    pub(super) holder: u32,
}

/// The circles among `edges`, of which a thread has one at the most: each
/// starts with its lowest thread id and is told once.
pub(super) fn circles(edges: &[Edge]) -> Vec<Vec<Edge>> {
    let of: FxHashMap<u32, Edge> = edges.iter().map(|edge| (edge.waiter, *edge)).collect();
    let mut done: BTreeSet<u32> = BTreeSet::new();
    let mut found = Vec::new();
    let mut waiters: Vec<u32> = of.keys().copied().collect();
    waiters.sort_unstable();
    for start in waiters {
        let mut path: Vec<Edge> = Vec::new();
        let mut on_path: FxHashMap<u32, usize> = FxHashMap::default();
        let mut at = start;
        while let Some(edge) = of.get(&at) {
            if let Some(first) = on_path.get(&at) {
                let mut circle = path.split_off(*first);
                let lowest = (0..circle.len()).min_by_key(|i| circle[*i].waiter);
                circle.rotate_left(lowest.unwrap_or(0));
                found.push(circle);
                break;
            }
            if !done.insert(at) {
                break;
            }
            on_path.insert(at, path.len());
            path.push(*edge);
            at = edge.holder;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges(pairs: &[(u32, u32)]) -> Vec<Edge> {
        let edge = |(waiter, holder): &(u32, u32)| Edge {
            waiter: *waiter,
            lock: u64::from(*waiter) * 16,
            holder: *holder,
        };
        pairs.iter().map(edge).collect()
    }

    fn waiters(pairs: &[(u32, u32)]) -> Vec<Vec<u32>> {
        circles(&edges(pairs))
            .iter()
            .map(|circle| circle.iter().map(|edge| edge.waiter).collect())
            .collect()
    }

    #[test]
    fn circles_are_found_once() {
        assert_eq!(waiters(&[(1, 2), (2, 1)]), [[1, 2]]);
        assert_eq!(waiters(&[(5, 5)]), [[5]]);
        // Who waits for a circle is not part of it.
        assert_eq!(waiters(&[(1, 2), (2, 3), (3, 4), (4, 2)]), [[2, 3, 4]]);
        assert_eq!(
            waiters(&[(9, 8), (8, 9), (1, 3), (3, 1), (2, 9)]),
            [[1, 3], [8, 9]]
        );
        assert!(waiters(&[(1, 2), (2, 3)]).is_empty());
        assert!(waiters(&[]).is_empty());
    }

    #[test]
    fn a_long_chain_is_no_recursion() {
        let chain: Vec<(u32, u32)> = (0..200_000).map(|n| (n, n + 1)).collect();
        assert!(waiters(&chain).is_empty());
    }
}
