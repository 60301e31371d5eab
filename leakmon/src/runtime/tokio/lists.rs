//! The lists of tasks: `OwnedTasks` of a runtime and `LocalOwnedTasks` of a
//! `LocalSet` (runtime/task/list.rs).
//!
//! A task is alive by tokio's own count (`RuntimeMetrics::num_alive_tasks`)
//! while it is in one. The list lies in what the task's scheduler points to:
//!
//! - from 1.38 on that of a runtime is a `ShardedList`: a boxed slice of
//!   mutexes of lists, how many were ever added, how many there are, a mask;
//!   then the id that the tasks have as their `owner_id`;
//! - before, and of a `LocalSet`, one list: head, tail, whether it is closed,
//!   the id.
//!
//! Where exactly is not known beforehand, for the compiler orders the fields
//! of what is around it: what is taken for a list has the id, the mask and the
//! length that it must have, and every one of its links leads to tasks with
//! that id.

use crate::binary::addr::RuntimeAddr;
use crate::process::memory::{Memory, MemoryError};

use super::cells::{Cell, Reader, word};

/// Bytes of a scheduler in which its list is looked for. The largest met has
/// it in its first 600.
const SCHEDULER: usize = 4096;

/// Bytes of a scheduler that are read at a time: it may end where its page
/// does.
const PIECE: usize = 256;

/// Words between a list and its id, at the most.
const NEAR: usize = 4;

/// Shards of a list at the most: `MAX_SHARDED_LIST_SIZE`, runtime/task/list.rs.
const MAX_SHARDS: u64 = 1 << 16;

/// Of a mutex of a list, its bytes, and where in it the list is: std's (a futex
/// and a flag in front of it), parking_lot's (a byte behind it), and std's
/// before Rust 1.62 (a pointer and a flag).
const SHAPES: [(u64, u64); 4] = [(24, 8), (24, 0), (32, 16), (32, 8)];

/// Where a list of tasks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A `ShardedList`.
    Sharded {
        /// Of the slice's pointer; its length follows.
        at: u64,
        /// What was there.
        slice: u64,
        /// Its length.
        len: u64,
        /// Bytes of an element.
        stride: u64,
        /// Where in it the head is.
        head: u64,
        /// Of the number of tasks.
        count: u64,
        /// Of the id.
        id: u64,
    },
    /// One list.
    Single {
        /// Of the head; the tail follows.
        at: u64,
        /// Of the id.
        id: u64,
    },
}

/// The ends of one list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) head: u64,
    pub(super) tail: u64,
}

/// A list, read.
#[derive(Clone, Debug)]
pub(super) struct Heads {
    /// Of every shard that is not empty.
    pub(super) ends: Vec<Ends>,
    /// How many tasks there are, by tokio's own count, where it keeps one.
    pub(super) count: Option<u64>,
}

impl Place {
    /// Reads the list with id `owner`; `None` when it is no more.
    pub(super) fn read<M: Memory>(
        &self,
        memory: &M,
        owner: u64,
    ) -> Result<Option<Heads>, MemoryError> {
        match self.read_now(memory, owner) {
            Err(MemoryError::Unmapped(_)) => Ok(None),
            other => other,
        }
    }

    fn read_now<M: Memory>(&self, memory: &M, owner: u64) -> Result<Option<Heads>, MemoryError> {
        let at = |addr: u64| memory.u64_at(RuntimeAddr(addr));
        match *self {
            Place::Sharded {
                at: place,
                slice,
                len,
                stride,
                head,
                count,
                id,
            } => {
                let lowest = place.min(count).min(id);
                let highest = place.max(count).max(id) + 16;
                let fields = memory.bytes(RuntimeAddr(lowest), (highest - lowest) as usize)?;
                let field = |addr: u64| word(&fields, addr - lowest);
                if field(place) != Some(slice)
                    || field(place + 8) != Some(len)
                    || field(id) != Some(owner)
                {
                    return Ok(None);
                }
                let shards = memory.bytes(RuntimeAddr(slice), (len * stride) as usize)?;
                let ends = shards
                    .chunks_exact(stride as usize)
                    .filter_map(|shard| {
                        Some(Ends {
                            head: word(shard, head)?,
                            tail: word(shard, head + 8)?,
                        })
                    })
                    .filter(|ends| ends.head != 0)
                    .collect();
                Ok(Some(Heads {
                    ends,
                    count: field(count),
                }))
            }
            Place::Single { at: place, id } => {
                if at(id)? != owner {
                    return Ok(None);
                }
                let list = memory.bytes(RuntimeAddr(place), 16)?;
                let ends = Ends {
                    head: word(&list, 0).unwrap_or(0),
                    tail: word(&list, 8).unwrap_or(0),
                };
                Ok(Some(Heads {
                    ends: Vec::from_iter((ends.head != 0).then_some(ends)),
                    count: None,
                }))
            }
        }
    }

    /// Whether it is a runtime's; a `LocalSet` has one list in every version,
    /// and so had the runtimes before 1.38.
    pub(super) fn is_sharded(&self) -> bool {
        matches!(self, Place::Sharded { .. })
    }
}

/// Whether an `Arc` of a scheduler may be at `addr`: it has its two counts in
/// front (alloc's `ArcInner`), and each of its tasks is counted.
pub(super) fn is_scheduler<M: Memory>(memory: &M, addr: u64) -> Result<bool, MemoryError> {
    /// Most references that are believed.
    const MOST: u64 = 1 << 32;
    if !addr.is_multiple_of(8) {
        return Ok(false);
    }
    match memory.bytes(RuntimeAddr(addr), 16) {
        Ok(counts) => Ok([0, 8]
            .iter()
            .all(|at| word(&counts, *at).is_some_and(|count| (1..MOST).contains(&count)))),
        Err(MemoryError::Unmapped(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Finds the list that task `cell` is in, where its scheduler has it. Another
/// thread may change it meanwhile: `None` says that it was not found this time.
pub(super) fn find<M: Memory>(
    reader: &Reader<M>,
    cell: &Cell,
) -> Result<Option<Place>, MemoryError> {
    if !cell.scheduler.is_multiple_of(8) || cell.scheduler == 0 {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    while bytes.len() < SCHEDULER {
        let at = cell.scheduler.wrapping_add(bytes.len() as u64);
        let piece = PIECE - (at as usize % PIECE);
        match reader.memory.bytes(RuntimeAddr(at), piece) {
            Ok(piece) => bytes.extend(piece),
            Err(MemoryError::Unmapped(_)) => break,
            Err(error) => return Err(error),
        }
    }
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|bytes| word(bytes, 0).unwrap_or(0))
        .collect();
    let addr = |index: usize| cell.scheduler + index as u64 * 8;
    // What has the fields of a sharded list is one, even when it is changed too
    // fast to be read now: of what else is there, a queue of tasks that wait for a
    // worker may look like a single list.
    for index in 2..words.len() {
        if let Some(signature) = Sharded::at(cell, &words, index) {
            return signature.place(reader, cell);
        }
    }
    // What is near to it is it: an id is a small number, of which there are many.
    for index in 2..words.len() {
        let single = words[index];
        if single == 0 {
            continue;
        }
        // Behind it, or in front, but not among the counts of the Arc.
        let behind = index + 2..index + 2 + NEAR;
        let mut ids = behind.chain(index.saturating_sub(NEAR).max(2)..index);
        let Some(id) = ids.find(|at| words.get(*at) == Some(&cell.owner)) else {
            continue;
        };
        let Some(tail) = words.get(index + 1).copied() else {
            continue;
        };
        let ends = Ends { head: single, tail };
        if are_ends(reader, cell.owner, &[ends])? {
            return Ok(Some(Place::Single {
                at: addr(index),
                id: addr(id),
            }));
        }
    }
    Ok(None)
}

/// The fields of a sharded list.
struct Sharded {
    /// Of the slice's pointer.
    at: u64,
    slice: u64,
    len: u64,
    /// Words between the slice and the number of tasks.
    added: u64,
    count: u64,
}

impl Sharded {
    /// The list whose slice is at `index`.
    fn at(cell: &Cell, words: &[u64], index: usize) -> Option<Sharded> {
        let [slice, len, rest @ ..] = words.get(index..)? else {
            return None;
        };
        let (slice, len) = (*slice, *len);
        if slice == 0 || slice % 8 != 0 || !len.is_power_of_two() || len > MAX_SHARDS {
            return None;
        }
        // The order of the fields as every compiler so far has it: how many were
        // added from 1.39 on only.
        let added = [0, 1].into_iter().find(|added| {
            rest.get(added + 1) == Some(&(len - 1)) && rest.get(added + 2) == Some(&cell.owner)
        })?;
        Some(Sharded {
            at: cell.scheduler + index as u64 * 8,
            slice,
            len,
            added: added as u64,
            count: rest[added],
        })
    }

    /// It, where its mutexes are of a known shape.
    fn place<M: Memory>(
        &self,
        reader: &Reader<M>,
        cell: &Cell,
    ) -> Result<Option<Place>, MemoryError> {
        for (stride, head) in SHAPES {
            let place = Place::Sharded {
                at: self.at,
                slice: self.slice,
                len: self.len,
                stride,
                head,
                count: self.at + (2 + self.added) * 8,
                id: self.at + (4 + self.added) * 8,
            };
            let Some(heads) = place.read(reader.memory, cell.owner)? else {
                continue;
            };
            if heads.ends.len() as u64 <= self.count
                && !heads.ends.is_empty()
                && are_ends(reader, cell.owner, &heads.ends)?
            {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }
}

/// Whether these are the ends of lists of tasks with this id.
fn are_ends<M: Memory>(reader: &Reader<M>, owner: u64, ends: &[Ends]) -> Result<bool, MemoryError> {
    let addrs: Vec<u64> = ends
        .iter()
        .flat_map(|ends| [ends.head, ends.tail])
        .collect();
    if addrs.iter().any(|addr| *addr == 0 || addr % 8 != 0) {
        return Ok(false);
    }
    let cells = reader.unknown(&addrs)?;
    Ok(cells
        .chunks_exact(2)
        .all(|ends| match (&ends[0], &ends[1]) {
            (Some(head), Some(tail)) => {
                head.owner == owner && tail.owner == owner && head.prev == 0 && tail.next == 0
            }
            _ => false,
        }))
}
