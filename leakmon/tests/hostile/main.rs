//! Programs that lie: mutated executables and memories give an answer or a
//! refusal, never a panic, a hang or an allocation without bounds.
//!
//! The originals are real programs and what their memory held when they were
//! stopped. `LEAKMON_HOSTILE_SEED` repeats a single mutation.
//!
//! One file for each runtime that is read from a process's memory.

#[path = "../common/mod.rs"]
mod common;
mod go;
mod tokio;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use leakmon::binary::addr::{FileOffset, LoadBias, RuntimeAddr, Vaddr};
use leakmon::binary::elf::{Elf, ReadAt};
use leakmon::process::memory::{Memory, MemoryError};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Largest single allocation that a hostile program may lead to.
const MOST: usize = 64 << 20;

/// How long one mutation may keep leakmon busy.
const LIMIT: Duration = Duration::from_secs(10);

/// Records the largest allocation asked for.
struct Recording;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Recording {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Recording = Recording;

/// A small generator: a seed gives the same mutation in every run.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        // Neighbouring seeds must not give similar sequences.
        let mut random = Random(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }
}

/// What a stopped process had in its memory.
#[derive(Clone)]
struct Snapshot {
    /// By ascending address.
    regions: Vec<(u64, Vec<u8>)>,
}

impl Snapshot {
    fn take(pid: u32) -> Snapshot {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
        let memory = File::open(format!("/proc/{pid}/mem")).expect("its memory");
        let read = |line: &str| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            let len = u64::from_str_radix(end, 16).ok()? - start;
            if !words.next()?.starts_with('r') || len > 32 << 20 {
                return None;
            }
            let mut bytes = vec![0; len as usize];
            FileExt::read_exact_at(&memory, &mut bytes, start).ok()?;
            Some((start, bytes))
        };
        let mut regions: Vec<(u64, Vec<u8>)> = Vec::new();
        for (start, bytes) in maps.lines().filter_map(read) {
            match regions.last_mut() {
                Some((at, before)) if *at + before.len() as u64 == start => before.extend(bytes),
                _ => regions.push((start, bytes)),
            }
        }
        Snapshot { regions }
    }

    fn at(&self, addr: u64) -> Option<(usize, usize)> {
        let region = self
            .regions
            .partition_point(|(start, _)| *start <= addr)
            .checked_sub(1)?;
        let (start, bytes) = &self.regions[region];
        let offset = usize::try_from(addr - start).ok()?;
        (offset < bytes.len()).then_some((region, offset))
    }

    /// Sets what is there of `bytes`; returns what was there before.
    fn set(&mut self, addr: u64, bytes: &[u8]) -> Vec<u8> {
        let Some((region, offset)) = self.at(addr) else {
            return Vec::new();
        };
        let region = &mut self.regions[region].1;
        let end = region.len().min(offset + bytes.len());
        let before = region[offset..end].to_vec();
        region[offset..end].copy_from_slice(&bytes[..end - offset]);
        before
    }
}

impl Memory for &Snapshot {
    fn read(&self, addr: RuntimeAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let unmapped = MemoryError::Unmapped(addr);
        let (region, offset) = self.at(addr.0).ok_or(unmapped.clone())?;
        let region = &self.regions[region].1;
        let end = offset.checked_add(buf.len()).ok_or(unmapped.clone())?;
        buf.copy_from_slice(region.get(offset..end).ok_or(unmapped)?);
        Ok(())
    }

    fn still_the_same(&self) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// A program to be mutated.
struct Original {
    name: String,
    bytes: Vec<u8>,
    snapshot: Snapshot,
    bias: LoadBias,
    /// Parts of the file that decide much, as offset and length.
    parts: Vec<(u64, u64)>,
    /// Places in memory that do.
    places: Vec<u64>,
    /// Does with the program all that leakmon does. How far it came: `read`,
    /// when there was a census.
    examine: Examine,
}

type Examine = Box<dyn Fn(&File, LoadBias, &Snapshot, &mut Random) -> &'static str + Sync>;

/// A copy of an original that can be mutated and made whole again.
struct Mutable<'a> {
    original: &'a Original,
    file: File,
    snapshot: Snapshot,
    /// What was where in the file, and in memory.
    undo: Vec<(u64, Vec<u8>)>,
    /// The shortest that the file has been.
    shortest: u64,
    undo_memory: Vec<(u64, Vec<u8>)>,
}

impl<'a> Mutable<'a> {
    fn new(original: &'a Original) -> Mutable<'a> {
        let file: OwnedFd = memfd_create("mutated", MFdFlags::empty()).expect("a memfd");
        let mut file = File::from(file);
        file.write_all(&original.bytes).expect("a copy");
        Mutable {
            original,
            file,
            snapshot: original.snapshot.clone(),
            undo: Vec::new(),
            shortest: original.bytes.len() as u64,
            undo_memory: Vec::new(),
        }
    }

    fn mutate(&mut self, random: &mut Random) {
        for _ in 0..1 + random.below(4) {
            match random.below(10) {
                0 => {
                    let len = random.below(self.original.bytes.len() as u64);
                    self.file.set_len(len).expect("a truncation");
                    self.shortest = self.shortest.min(len);
                }
                1..=5 => self.mutate_file(random),
                _ => self.mutate_memory(random),
            }
        }
    }

    fn mutate_file(&mut self, random: &mut Random) {
        let (start, len) = *random.of(&self.original.parts);
        let at = start + random.below(len);
        let mut bytes = [0; 8];
        let Ok(read) = self.file.read_at(&mut bytes, at) else {
            return;
        };
        let changed = changed(&bytes, random);
        self.undo.push((at, bytes[..read].to_vec()));
        self.file
            .write_all_at(&changed[..read], at)
            .expect("a mutation");
        // What a process has loaded, it has loaded with the mutation.
        if random.below(2) == 0
            && let Ok(elf) = Elf::parse(&self.original.bytes[..])
        {
            for segment in &elf.segments {
                if (segment.offset.0..segment.offset.0 + segment.file_size).contains(&at) {
                    let vaddr = Vaddr(segment.vaddr.0 + (at - segment.offset.0));
                    self.set_memory(self.original.bias.runtime(vaddr).0, &changed[..read]);
                }
            }
        }
    }

    fn mutate_memory(&mut self, random: &mut Random) {
        let addr = *random.of(&self.original.places);
        let mut bytes = [0; 8];
        if (&self.snapshot).read(RuntimeAddr(addr), &mut bytes).is_ok() {
            let changed = changed(&bytes, random);
            self.set_memory(addr, &changed);
        }
    }

    fn set_memory(&mut self, addr: u64, bytes: &[u8]) {
        let before = self.snapshot.set(addr, bytes);
        self.undo_memory.push((addr, before));
    }

    fn restore(&mut self) {
        let missing = &self.original.bytes[self.shortest as usize..];
        self.file
            .write_all_at(missing, self.shortest)
            .expect("the rest");
        self.shortest = self.original.bytes.len() as u64;
        for (at, bytes) in self.undo.drain(..).rev() {
            self.file.write_all_at(&bytes, at).expect("the original");
        }
        for (addr, bytes) in self.undo_memory.drain(..).rev() {
            self.snapshot.set(addr, &bytes);
        }
    }
}

/// Eight bytes, mutated.
fn changed(bytes: &[u8; 8], random: &mut Random) -> [u8; 8] {
    const EXTREMES: [u64; 12] = [
        0,
        1,
        0x7f,
        0xff,
        0xffff,
        0x7fff_ffff,
        0xffff_ffff,
        1 << 25,
        1 << 40,
        0x7fff_ffff_f000,
        i64::MAX as u64,
        u64::MAX,
    ];
    let mut changed = *bytes;
    match random.below(5) {
        0 => changed[random.below(8) as usize] ^= 1 << random.below(8),
        1 => changed[random.below(8) as usize] = random.next() as u8,
        2 => changed = random.next().to_le_bytes(),
        3 => changed = random.of(&EXTREMES).to_le_bytes(),
        _ => {
            let near = u64::from_le_bytes(*bytes).wrapping_add(random.below(1 << 12));
            changed = near.wrapping_sub(1 << 11).to_le_bytes();
        }
    }
    changed
}

/// Mutates the originals, so many times in all. How many of these came how far;
/// empty when there is nothing to judge.
fn mutate(originals: &[Original], times: u64) -> BTreeMap<&'static str, u64> {
    if originals.is_empty() {
        return BTreeMap::new();
    }
    let only: Option<u64> = std::env::var("LEAKMON_HOSTILE_SEED")
        .ok()
        .map(|seed| seed.parse().expect("a seed"));
    let next = AtomicU64::new(only.unwrap_or(0));
    let last = only.map_or(times, |seed| seed + 1);
    let outcomes = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut mutables: Vec<_> = originals.iter().map(Mutable::new).collect();
                    let mut outcomes = Vec::new();
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= last {
                            return outcomes;
                        }
                        let which = (seed % mutables.len() as u64) as usize;
                        outcomes.push(mutation(&mut mutables[which], seed));
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("no mutation panics"))
            .collect::<Vec<_>>()
    });
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (outcome, _) in &outcomes {
        *counts.entry(*outcome).or_insert(0) += 1;
    }
    let slowest = outcomes.iter().map(|(_, took)| *took).max();
    eprintln!("{counts:?}, slowest {slowest:?}, largest allocation {LARGEST:?}");
    match only {
        Some(_) => BTreeMap::new(),
        None => counts,
    }
}

fn mutation(mutable: &mut Mutable<'_>, seed: u64) -> (&'static str, Duration) {
    let name = &mutable.original.name;
    let mut random = Random::new(seed);
    mutable.mutate(&mut random);
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let bias = mutable.original.bias;
        (mutable.original.examine)(&mutable.file, bias, &mutable.snapshot, &mut random)
    }));
    let took = started.elapsed();
    let outcome = outcome.unwrap_or_else(|_| panic!("{name}: seed {seed} panics"));
    assert!(took < LIMIT, "{name}: seed {seed} takes {took:?}");
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(
        largest <= MOST,
        "{name}: seed {seed} allocates {largest} bytes"
    );
    mutable.restore();
    (outcome, took)
}

/// The originals themselves are read in full: else their mutations prove
/// nothing.
fn read_whole(originals: &[Original]) {
    for original in originals {
        let mut mutable = Mutable::new(original);
        for seed in 0..50 {
            mutable.mutate(&mut Random::new(seed));
            mutable.restore();
        }
        let whole = mutable.file.bytes_at(FileOffset(0), mutable.file.size());
        assert!(
            whole.expect("the file") == original.bytes,
            "{}",
            original.name
        );
        let mut random = Random::new(0);
        let file = &mutable.file;
        let outcome = (original.examine)(file, original.bias, &mutable.snapshot, &mut random);
        assert_eq!(outcome, "read", "{}", original.name);
    }
}
