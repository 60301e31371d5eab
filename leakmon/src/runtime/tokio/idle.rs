//! Reads what idle tasks wait for: their cells, what these lead to, and once
//! more the cells, for a task may run meanwhile.

use std::ops::Range;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::process::memory::{Memory, MemoryError};

use super::cells::{Cell, Reader, Wanted};
use super::layout::{Layout, state};
use super::scan::Regions;
use super::waits::{self, Sockets, Waiting};
use super::wakers::{self, Part, Scene, Shapes};

/// Tasks that are looked at together.
const BATCH: usize = 2048;

/// Longest that one census spends on this; the rest is left to the next one.
const LIMIT: Duration = Duration::from_millis(800);

/// Most bytes of a cell that are read.
const MAX_CELL: u64 = 64 << 10;

/// Pointers of a task that are followed.
const MAX_POINTERS: usize = 128;

/// Objects that are read for the tasks looked at together: 40 MiB.
const MAX_OBJECTS: usize = 1 << 16;

/// Pointers that are followed from what its pointers lead to, and bytes of it
/// in which they are looked for.
const MAX_FURTHER: usize = 1024;
const FURTHER: usize = 0x200;

/// What a task waits for, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wait {
    /// Index of its words in [`Words`]; 0 when nothing is known.
    pub(super) reason: u16,
    /// Header of the task whose end it waits for, if for nothing else.
    pub(super) on: u64,
    /// Times that it was looked at.
    pub(super) tries: u8,
}

impl Wait {
    /// Whether another look may tell more.
    pub(super) fn is_open(&self) -> bool {
        /// A lock may have been held just then, or the task woken.
        const TRIES: u8 = 3;
        self.reason == 0 && self.tries < TRIES
    }
}

/// Looks at the tasks of one process.
#[derive(Debug, Default)]
pub(super) struct Idle {
    shapes: Shapes,
    words: waits::Words,
}

impl Idle {
    /// The words of a wait; `None` when nothing is known.
    pub(super) fn words(&self, wait: Wait) -> Option<std::sync::Arc<str>> {
        self.words.get(wait.reason)
    }

    /// Looks at `tasks`; `cells` are all that there are.
    pub(super) fn look<M: Memory>(
        &mut self,
        reader: &Reader<M>,
        pid: u32,
        tasks: &[Cell],
        cells: &FxHashMap<u64, Cell>,
    ) -> Result<FxHashMap<u64, Wait>, MemoryError> {
        let mut found = FxHashMap::default();
        if tasks.is_empty() {
            return Ok(found);
        }
        let deadline = Instant::now() + LIMIT;
        let regions = Regions::of(pid)?;
        let mut sockets = Sockets::new(pid);
        for batch in tasks.chunks(BATCH) {
            if Instant::now() >= deadline {
                break;
            }
            self.batch(
                reader,
                &regions,
                &mut sockets,
                batch,
                cells,
                deadline,
                &mut found,
            )?;
        }
        Ok(found)
    }

    #[allow(clippy::too_many_arguments)]
    fn batch<M: Memory>(
        &mut self,
        reader: &Reader<M>,
        regions: &Regions,
        sockets: &mut Sockets,
        batch: &[Cell],
        cells: &FxHashMap<u64, Cell>,
        deadline: Instant,
        found: &mut FxHashMap<u64, Wait>,
    ) -> Result<(), MemoryError> {
        let around = Around {
            reader,
            cells,
            regions,
        };
        let wanted: Vec<Wanted> = batch
            .iter()
            .map(|cell| Wanted {
                addr: cell.addr,
                len: around.size(cell),
            })
            .collect();
        let own = parts(reader, &wanted)?;
        let mut objects: FxHashMap<u64, Part> = FxHashMap::default();
        let mut followed: Vec<Vec<u64>> = Vec::with_capacity(batch.len());
        for (cell, own) in batch.iter().zip(&own) {
            let future = around.future(cell, own);
            let first = usize::try_from((future.start - cell.addr) / 8).unwrap_or(0);
            let words = own.words.get(first..).unwrap_or_default();
            let mut pointers = around.pointers(words.iter().copied(), MAX_POINTERS, &[]);
            let inside = cell.addr..cell.addr + around.known_size(cell);
            pointers.retain(|addr| !inside.contains(addr));
            followed.push(pointers);
        }
        around.read(&followed, &mut objects)?;
        let mut looks = self.looks(&around, batch, &own, &objects, &followed, deadline);
        // Where not all was found, a step further.
        let mut room = MAX_OBJECTS.saturating_sub(objects.len());
        for ((cell, followed), look) in batch.iter().zip(&mut followed).zip(&looks) {
            let proven = look.iter().filter(|found| found.holder.is_some()).count() as u64;
            if proven >= waits::wakers(cell) || Instant::now() >= deadline {
                continue;
            }
            let words = followed.iter().filter_map(|addr| objects.get(addr));
            let words = words.flat_map(|part| part.words.iter().take(FURTHER / 8).copied());
            let further = around.pointers(words, MAX_FURTHER.min(room), followed);
            room -= further.len();
            followed.extend(further);
        }
        if room < MAX_OBJECTS.saturating_sub(objects.len()) {
            around.read(&followed, &mut objects)?;
            looks = self.looks(&around, batch, &own, &objects, &followed, deadline);
        }
        // What was met in the middle of a list, when its ends came later.
        looks = match looks.iter().flatten().any(|found| found.holder.is_none()) {
            true => self.looks(&around, batch, &own, &objects, &followed, deadline),
            false => looks,
        };
        let known: Vec<(u64, u32)> = batch.iter().map(|cell| (cell.addr, cell.vtable)).collect();
        let again = reader.known(&known)?;
        for ((cell, again), look) in batch.iter().zip(again).zip(looks) {
            let mut wait = Wait::default();
            let same = again.is_some_and(|again| {
                (again.hash, again.state, again.id) == (cell.hash, cell.state, cell.id)
            });
            if same {
                let uses = || reader.program.uses(cell.vtable);
                let version = reader.program.version;
                let waiting = waits::waiting(cell, &look, version, uses, sockets);
                wait = self.wait(waiting);
            }
            found.insert(cell.addr, wait);
        }
        Ok(())
    }

    fn wait(&mut self, waiting: Waiting) -> Wait {
        Wait {
            reason: waiting.words.map_or(0, |words| self.words.number(&words)),
            on: waiting.on,
            tries: 0,
        }
    }

    fn looks<M: Memory>(
        &mut self,
        around: &Around<M>,
        batch: &[Cell],
        own: &[Part],
        objects: &FxHashMap<u64, Part>,
        followed: &[Vec<u64>],
        deadline: Instant,
    ) -> Vec<Vec<wakers::Found>> {
        let mut looks = Vec::with_capacity(batch.len());
        for ((cell, own), followed) in batch.iter().zip(own).zip(followed) {
            let objects: Vec<&Part> = followed
                .iter()
                .filter_map(|addr| objects.get(addr))
                .collect();
            let program = around.reader.program;
            let kinds = program.layout == Layout::V23;
            let scene = Scene {
                tasks: around,
                task: cell.addr,
                cell: own,
                future: around.future(cell, own),
                scheduler: cell.scheduler,
                kinds,
                places: wakers::places(program.version, kinds),
                objects: &objects,
                deadline,
            };
            looks.push(scene.wakers(&mut self.shapes));
        }
        looks
    }
}

/// Reads `wanted`; what cannot be read is empty.
fn parts<M: Memory>(reader: &Reader<M>, wanted: &[Wanted]) -> Result<Vec<Part>, MemoryError> {
    let mut parts = vec![Part::default(); wanted.len()];
    reader.read(wanted, |index, bytes| {
        parts[index] = Part::new(wanted[index].addr, bytes.unwrap_or_default());
    })?;
    Ok(parts)
}

/// What is around the tasks.
struct Around<'a, M> {
    reader: &'a Reader<'a, M>,
    cells: &'a FxHashMap<u64, Cell>,
    regions: &'a Regions,
}

impl<M: Memory> Around<'_, M> {
    /// Where the trailer of a cell starts; what is read of one of which that is
    /// not known.
    fn trailer(&self, cell: &Cell) -> u64 {
        /// A cell with one timer, and more.
        const UNKNOWN: u64 = 0x400;
        let vtable = &self.reader.program.vtables[cell.vtable as usize];
        vtable.trailer.map_or(UNKNOWN, u64::from)
    }

    /// Bytes that are a cell's for certain.
    fn known_size(&self, cell: &Cell) -> u64 {
        let program = self.reader.program;
        let trailer = program.vtables[cell.vtable as usize].trailer;
        trailer.map_or(program.layout.header(), u64::from)
    }

    /// Bytes of a cell that are read.
    fn size(&self, cell: &Cell) -> u64 {
        (self.trailer(cell) + 0x20).min(MAX_CELL)
    }

    /// Where the future is, behind the scheduler's word.
    fn future(&self, cell: &Cell, own: &Part) -> Range<u64> {
        let vtable = &self.reader.program.vtables[cell.vtable as usize];
        let header = self.reader.program.layout.header();
        let start = vtable.scheduler.map_or(header, u64::from) + 8;
        let end = (own.words.len() as u64 * 8).min(self.trailer(cell));
        cell.addr + start.min(end)..cell.addr + end
    }

    /// The addresses among `words` that something can be read at, each once.
    fn pointers(&self, words: impl Iterator<Item = u64>, most: usize, but: &[u64]) -> Vec<u64> {
        let mut seen: FxHashSet<u64> = but.iter().copied().collect();
        words
            .filter(|word| wakers::is_pointer(*word) && self.end(*word).is_some())
            .filter(|word| seen.insert(*word))
            .take(most)
            .collect()
    }

    /// Where what can be read at `addr` ends.
    fn end(&self, addr: u64) -> Option<u64> {
        let data = || {
            let program = self.reader.program;
            program.data(self.reader.loaded, addr)
        };
        self.regions.end(addr).or_else(data)
    }

    /// Reads what `followed` lead to and is not there yet.
    fn read(
        &self,
        followed: &[Vec<u64>],
        objects: &mut FxHashMap<u64, Part>,
    ) -> Result<(), MemoryError> {
        let mut addrs: Vec<u64> = followed.iter().flatten().copied().collect();
        addrs.sort_unstable();
        addrs.dedup();
        addrs.retain(|addr| !objects.contains_key(addr));
        let wanted: Vec<Wanted> = addrs
            .iter()
            .filter_map(|addr| {
                let size = self.cells.get(addr).map_or(0, |cell| self.size(cell));
                let len = size.max(wakers::OBJECT as u64).min(self.end(*addr)? - addr);
                Some(Wanted { addr: *addr, len })
            })
            .collect();
        for part in parts(self.reader, &wanted)? {
            objects.insert(part.addr, part);
        }
        Ok(())
    }
}

impl<M: Memory> wakers::Tasks for Around<'_, M> {
    fn is_waker_vtable(&self, word: u64) -> bool {
        let program = self.reader.program;
        program.is_waker_vtable(self.reader.loaded, word)
    }

    fn awaited(&self, header: u64) -> Option<Range<u64>> {
        let cell = self.cells.get(&header)?;
        if !cell.is(state::JOIN_WAKER) || cell.is(state::COMPLETE) {
            return None;
        }
        let vtable = &self.reader.program.vtables[cell.vtable as usize];
        match vtable.trailer {
            // Behind the list's links.
            Some(trailer) => {
                let at = header + u64::from(trailer) + 0x10;
                Some(at..at + 1)
            }
            None => {
                let end = header + wakers::OBJECT as u64;
                let between = (header + 8..end).step_by(8);
                let next = between
                    .into_iter()
                    .find(|addr| self.cells.contains_key(addr));
                Some(header..next.unwrap_or(end))
            }
        }
    }
}
