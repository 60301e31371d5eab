//! Reads the cells of tasks, many at a time, while they change.

use std::hash::Hasher as _;

use rustc_hash::FxHasher;

use crate::binary::addr::RuntimeAddr;
use crate::process::memory::{Memory, MemoryError, Range};

use super::layout::{self, state};
use super::program::{Loaded, Program};

/// Cells that lie closer than this, in bytes, are read together: the bytes
/// between them cost less than another range.
const GAP: u64 = 512;

/// Most bytes of one range.
const MAX_RUN: u64 = 1 << 16;

/// Bytes that are read in one go: bounds the buffer.
const BATCH: u64 = 4 << 20;

/// Bytes of a cell that are compared with those of an earlier census, from its
/// start.
const COMPARED: u64 = 4096;

/// Bytes of a trailer that are read: the list's pointers and the waker of who
/// awaits the task.
const TRAILER: u64 = 0x20;

/// What was read of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// Of the header.
    pub(super) addr: u64,
    /// Index of its vtable.
    pub(super) vtable: u32,
    /// The state word.
    pub(super) state: u64,
    /// Id of the list that the task was put into; 0 before, and of a closure
    /// on a blocking thread.
    pub(super) owner: u64,
    /// The task's own id; 0 where the layout has none that is known.
    pub(super) id: u64,
    /// The scheduler's word.
    pub(super) scheduler: u64,
    /// The neighbours in the list.
    pub(super) prev: u64,
    /// The neighbours in the list.
    pub(super) next: u64,
    /// `&Location` of the spawn; 0 where there is none.
    pub(super) location: u64,
    /// Of all that changes when the task runs.
    pub(super) hash: u64,
}

impl Cell {
    pub(super) fn is(&self, bit: u64) -> bool {
        self.state & bit != 0
    }
}

/// The reader of one process's cells.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a, M> {
    pub(super) memory: &'a M,
    pub(super) program: &'a Program,
    pub(super) loaded: Loaded,
}

/// Bytes to be read, and whose.
pub(super) struct Wanted {
    pub(super) addr: u64,
    pub(super) len: u64,
}

impl<M: Memory> Reader<'_, M> {
    /// What is at `addrs`, in their order; `None` where no task is.
    pub(super) fn unknown(&self, addrs: &[u64]) -> Result<Vec<Option<Cell>>, MemoryError> {
        let layout = self.program.layout;
        let mut vtables = vec![None; addrs.len()];
        let wanted = |addr: u64| Wanted {
            addr,
            len: layout.header(),
        };
        let headers: Vec<Wanted> = addrs.iter().copied().map(wanted).collect();
        self.read(&headers, |index, bytes| {
            let word = bytes.and_then(|bytes| word(bytes, layout.vtable()));
            vtables[index] = word.and_then(|word| self.loaded.index(self.program, word));
        })?;
        let tasks: Vec<(usize, u64, u32)> = addrs
            .iter()
            .zip(vtables)
            .enumerate()
            .filter_map(|(index, (addr, vtable))| Some((index, *addr, vtable?)))
            .collect();
        let known: Vec<(u64, u32)> = tasks
            .iter()
            .map(|(_, addr, vtable)| (*addr, *vtable))
            .collect();
        let mut found = vec![None; addrs.len()];
        for ((index, ..), cell) in tasks.iter().zip(self.known(&known)?) {
            found[*index] = cell;
        }
        Ok(found)
    }

    /// What is at `tasks`, of which the vtables are known, in their order;
    /// `None` where that task is no more.
    pub(super) fn known(&self, tasks: &[(u64, u32)]) -> Result<Vec<Option<Cell>>, MemoryError> {
        let mut found = vec![None; tasks.len()];
        let mut wanted = Vec::with_capacity(tasks.len());
        for (addr, vtable) in tasks {
            wanted.push(Wanted {
                addr: *addr,
                len: self.head(*vtable),
            });
        }
        self.read(&wanted, |index, bytes| {
            let (addr, vtable) = tasks[index];
            found[index] = bytes.and_then(|bytes| self.decode(addr, vtable, bytes));
        })?;
        // Of a large cell the trailer lies elsewhere.
        let large: Vec<(usize, Wanted)> = tasks
            .iter()
            .enumerate()
            .filter(|(index, _)| found[*index].is_some())
            .filter_map(|(index, (addr, vtable))| {
                let trailer = u64::from(self.program.vtables[*vtable as usize].trailer?);
                (trailer + TRAILER > self.head(*vtable)).then_some(())?;
                let addr = addr.checked_add(trailer)?;
                Some((index, Wanted { addr, len: TRAILER }))
            })
            .collect();
        let (indices, wanted): (Vec<usize>, Vec<Wanted>) = large.into_iter().unzip();
        self.read(&wanted, |index, bytes| {
            let cell = &mut found[indices[index]];
            let pointers = bytes.and_then(|bytes| Some((word(bytes, 0)?, word(bytes, 8)?)));
            *cell = match (*cell, pointers) {
                (Some(cell), Some((prev, next))) => Some(Cell { prev, next, ..cell }),
                _ => None,
            };
        })?;
        Ok(found)
    }

    /// Bytes that are read of a cell, from its start.
    fn head(&self, vtable: u32) -> u64 {
        let all = match self.program.vtables[vtable as usize].trailer {
            Some(trailer) => u64::from(trailer) + TRAILER,
            None => self.program.layout.header() + 8,
        };
        all.min(COMPARED)
    }

    fn decode(&self, addr: u64, index: u32, bytes: &[u8]) -> Option<Cell> {
        let layout = self.program.layout;
        let vtable = &self.program.vtables[index as usize];
        let at = |offset: u64| word(bytes, offset);
        if self.loaded.index(self.program, at(layout.vtable())?) != Some(index) {
            return None;
        }
        let state = at(layout::STATE)?;
        if !state::is_sane(state) {
            return None;
        }
        let trailer = vtable.trailer.map(u64::from);
        let owned = layout.owned_in_header().or(trailer);
        // Before 1.23 nothing says where they are: observed behind the header,
        // and in front of the trailer.
        let id = match (vtable.id, trailer) {
            (Some(id), _) => Some(u64::from(id)),
            (None, Some(trailer)) => trailer.checked_sub(8),
            (None, None) => None,
        };
        let owner = at(layout.owner_id()).filter(|owner| *owner < layout::MAX_OWNER)?;
        let scheduler = vtable.scheduler.map_or(layout.header(), u64::from);
        let end = trailer.unwrap_or(layout.header()).min(bytes.len() as u64);
        let mut hasher = FxHasher::default();
        hasher.write_u64(state);
        hasher.write(bytes.get(layout.header() as usize..end as usize)?);
        let id = id.map_or(Some(0), |id| at(id).or(Some(0)))?;
        // Ids are never 0 where tokio says where they are.
        if vtable.id.is_some() && id == 0 {
            return None;
        }
        Some(Cell {
            addr,
            vtable: index,
            state,
            owner,
            id,
            scheduler: at(scheduler).unwrap_or(0),
            prev: owned.and_then(at).unwrap_or(0),
            next: owned.and_then(|owned| at(owned + 8)).unwrap_or(0),
            location: vtable
                .spawn_location
                .and_then(|location| at(u64::from(location)))
                .unwrap_or(0),
            hash: hasher.finish(),
        })
    }

    /// Reads all of `wanted`, and gives each its bytes, or `None` where they
    /// cannot be read. In the order of addresses, not of `wanted`.
    pub(super) fn read(
        &self,
        wanted: &[Wanted],
        mut give: impl FnMut(usize, Option<&[u8]>),
    ) -> Result<(), MemoryError> {
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_unstable_by_key(|index| wanted[*index].addr);
        let mut buf = Vec::new();
        let mut rest = &order[..];
        while !rest.is_empty() {
            // Runs of neighbours, up to a batch of them.
            let mut runs: Vec<(Range, usize)> = Vec::new();
            let mut bytes = 0;
            let mut taken = 0;
            for index in rest {
                let Wanted { addr, len } = wanted[*index];
                let Some(end) = addr.checked_add(len) else {
                    break;
                };
                match runs.last_mut() {
                    Some((run, count))
                        if addr - run.addr.0 <= run.len as u64 + GAP
                            && end - run.addr.0 <= MAX_RUN =>
                    {
                        let longer = (end - run.addr.0).max(run.len as u64);
                        bytes += longer - run.len as u64;
                        run.len = longer as usize;
                        *count += 1;
                    }
                    _ => {
                        if bytes >= BATCH {
                            break;
                        }
                        bytes += len;
                        let run = Range {
                            addr: RuntimeAddr(addr),
                            len: len as usize,
                        };
                        runs.push((run, 1));
                    }
                }
                taken += 1;
            }
            if taken == 0 {
                // At the end of the address space is no memory.
                for index in rest {
                    give(*index, None);
                }
                return Ok(());
            }
            self.read_runs(&runs, &mut buf, &rest[..taken], wanted, &mut give)?;
            rest = &rest[taken..];
        }
        Ok(())
    }

    fn read_runs(
        &self,
        runs: &[(Range, usize)],
        buf: &mut Vec<u8>,
        order: &[usize],
        wanted: &[Wanted],
        give: &mut impl FnMut(usize, Option<&[u8]>),
    ) -> Result<(), MemoryError> {
        let mut runs = runs;
        let mut order = order;
        while !runs.is_empty() {
            let ranges: Vec<Range> = runs.iter().map(|(range, _)| *range).collect();
            let size: usize = ranges.iter().map(|range| range.len).sum();
            buf.resize(size.max(buf.len()), 0);
            let mut done = self.memory.read_ranges(&ranges, &mut buf[..size])?;
            let mut start = 0;
            let mut whole = 0;
            for (run, count) in runs {
                let short = done < run.len;
                let here = done.min(run.len);
                let (members, behind) = order.split_at(*count);
                for index in members {
                    let Wanted { addr, len } = wanted[*index];
                    let from = (addr - run.addr.0) as usize;
                    let to = from + len as usize;
                    match (short, to <= here) {
                        (_, true) => give(*index, Some(&buf[start + from..start + to])),
                        // Its neighbours' hole is not its own.
                        (true, false) => {
                            let mut own = vec![0; len as usize];
                            match self.memory.read(RuntimeAddr(addr), &mut own) {
                                Ok(()) => give(*index, Some(&own)),
                                Err(MemoryError::Unmapped(_)) => give(*index, None),
                                Err(error) => return Err(error),
                            }
                        }
                        (false, false) => give(*index, None),
                    }
                }
                order = behind;
                whole += 1;
                if short {
                    break;
                }
                start += run.len;
                done -= run.len;
            }
            runs = &runs[whole..];
        }
        Ok(())
    }
}

/// The word at `offset`.
pub(super) fn word(bytes: &[u8], offset: u64) -> Option<u64> {
    let at = usize::try_from(offset).ok()?;
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(word.try_into().ok()?))
}
