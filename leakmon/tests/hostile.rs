//! Programs that lie: mutated executables and memories give an answer or a
//! refusal, never a panic, a hang or an allocation without bounds.
//!
//! The originals are real programs and what their memory held when they were
//! stopped. `LEAKMON_HOSTILE_SEED` repeats a single mutation.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use common::{Fixture, Running, fixture, state, wait_until};
use leakmon::binary::addr::{FileOffset, LoadBias, RuntimeAddr, Vaddr};
use leakmon::binary::elf::{Elf, ReadAt};
use leakmon::process::identity::Process;
use leakmon::process::memory::{Memory, MemoryError};
use leakmon::report::stacks::{self, Format, Origin};
use leakmon::runtime::go::buildinfo;
use leakmon::runtime::go::census::{Census, Tables};
use leakmon::runtime::go::layout::{self, status};
use leakmon::runtime::go::pclntab::{Pclntab, TextOffset};
use leakmon::runtime::go::probes;
use leakmon::runtime::go::program::Program;
use leakmon::runtime::go::variables::Variables;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

/// Mutations of all programs together.
const MUTATIONS: u64 = 10_000;

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
    /// `runtime.allglen`, and a goroutine that waits.
    tables: Tables,
    waiting: RuntimeAddr,
}

impl Original {
    fn of(fixture: &Fixture) -> Original {
        let mut running = Running::start(&fixture.path);
        if fixture.program == "senders" {
            running.ask("call 30");
        }
        running.child.signal(Signal::SIGSTOP);
        wait_until("it has stopped", || state(running.pid()) == Some('T'));
        let process = Process::open(running.pid()).expect("a process");
        let bytes = std::fs::read(&fixture.path).expect("the fixture");
        let elf = Elf::parse(&bytes[..]).expect("an ELF file");
        let bias = process.load_bias(elf.entry);
        let snapshot = Snapshot::take(running.pid());

        let memory = &snapshot;
        let program = open(&fixture.path, elf.clone(), bias, &memory);
        let variables = Variables::find(program.elf.arch, &*program).expect("its variables");
        let tables = Tables {
            allglen: bias.runtime(variables.allglen),
            allgptr: bias.runtime(variables.allgptr),
            clock_offset: 0,
        };
        let word = |at: u64| memory.u64_at(RuntimeAddr(at)).expect("a word");
        let (len, array) = (word(tables.allglen.0), word(tables.allgptr.0));
        let gs: Vec<u64> = (0..len).map(|i| word(array + i * 8)).collect();
        let g = &program.layout.g;
        let is_waiting = |g_at: u64| {
            word(g_at + g.atomicstatus as u64) as u32 == status::WAITING
                && word(g_at + g.syscallsp as u64) == 0
        };
        let waiting = gs
            .iter()
            .copied()
            .find(|g| is_waiting(*g))
            .expect("one that waits");

        let mut places = vec![tables.allglen.0, tables.allgptr.0, array];
        for g_at in &gs {
            places.extend((0..48).map(|word| g_at + word * 8));
            let sp = word(g_at + layout::G_SCHED_SP as u64);
            places.extend((0..64).map(|word| sp + word * 8));
        }
        // Wherever the table's address is, there may be the moduledata.
        let table = elf
            .section(".gopclntab")
            .map(|section| bias.runtime(section.vaddr).0);
        for (start, region) in &snapshot.regions {
            for (i, word) in region.chunks_exact(8).enumerate() {
                if Some(u64::from_le_bytes(word.try_into().expect("8 bytes"))) == table {
                    places.extend((0..50).map(|word| start + (i as u64 + word) * 8));
                }
            }
        }

        let mut parts = vec![(0, 64), (64, 56 * 16), (0, bytes.len() as u64)];
        let sections = u64::from_le_bytes(bytes[40..48].try_into().expect("e_shoff"));
        parts.push((sections, 64 * 40));
        for name in [
            ".gopclntab",
            ".go.buildinfo",
            ".data.rel.ro.gopclntab",
            ".noptrdata",
        ] {
            if let Some(section) = elf.section(name) {
                parts.push((section.offset.0, 128.min(section.size)));
                parts.push((section.offset.0, section.size));
            }
        }
        for name in [
            "runtime.allgadd",
            "runtime.newproc1",
            "runtime.gopark",
            "runtime.goexit0",
        ] {
            let function = program.runtime_function(name).expect("a function");
            let code = program.vaddr(function.entry);
            parts.push((program.file_offset(code).expect("its code").0, 512));
        }
        Original {
            name: format!(
                "{} {} {}",
                fixture.program, fixture.go_version, fixture.variant
            ),
            bytes,
            snapshot,
            bias,
            parts,
            places,
            tables,
            waiting: RuntimeAddr(waiting),
        }
    }
}

fn open(path: &Path, elf: Elf, bias: LoadBias, memory: &&Snapshot) -> Arc<Program> {
    let file = File::open(path).expect("the fixture");
    Arc::new(Program::open(file, elf, bias, memory).expect("a Go program"))
}

/// Real programs of every shape that there is.
fn originals() -> Vec<Original> {
    [
        ("senders", "plain"),
        ("senders", "stripped"),
        ("senders", "pie"),
        ("zoo", "cgo-stripped"),
    ]
    .iter()
    .filter_map(|(program, variant)| fixture(program, variant))
    .chain(common::all("senders", "plain").first().cloned())
    .map(|fixture| Original::of(&fixture))
    .collect()
}

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

/// Does with a program all that leakmon does. How far it came.
fn examine(file: &File, bias: LoadBias, snapshot: &Snapshot, random: &mut Random) -> &'static str {
    let Ok(elf) = Elf::parse(file) else {
        return "not ELF";
    };
    let _ = buildinfo::read(&elf, file);
    for name in [".gopclntab", ".data.rel.ro.gopclntab"] {
        if let Some(section) = elf.section(name)
            && let Ok(bytes) = file.bytes_at(section.offset, section.size.min(1 << 25))
            && let Some(table) = Pclntab::parse(bytes, elf.arch)
        {
            examine_table(&table, random);
        }
    }
    let file = file.try_clone().expect("a file");
    let program = match Program::open(file, elf, bias, &snapshot) {
        Ok(program) => Arc::new(program),
        Err(refusal) => {
            assert!(!refusal.to_string().is_empty());
            return "refused";
        }
    };
    let _ = probes::find(&program);
    let Ok(variables) = Variables::find(program.elf.arch, &*program) else {
        return "no variables";
    };
    if variables.atomicstatus != program.layout.g.atomicstatus as u64 {
        return "another layout";
    }
    let tables = Tables {
        allglen: bias.runtime(variables.allglen),
        allgptr: bias.runtime(variables.allgptr),
        clock_offset: 0,
    };
    let mut census = Census::new(snapshot, program, bias, tables);
    if census.population().is_err() {
        return "no census";
    }
    census.sample().expect("a sample of the same memory");
    let again = census
        .population()
        .expect("another census of the same memory");
    let dump = census.dump().expect("a dump of the same memory");
    assert!(again.groups.iter().map(|group| group.count).sum::<u64>() == again.count);
    let origin = Origin {
        executable: "/program",
        build_id: None,
        at: SystemTime::UNIX_EPOCH,
    };
    for format in [
        Format::Debug2,
        Format::Debug1,
        Format::Json,
        Format::Folded,
        Format::Pprof,
    ] {
        stacks::write(format, &dump, origin, &mut std::io::sink()).expect("a dump");
    }
    "read"
}

fn examine_table(table: &Pclntab, random: &mut Random) {
    // Inline trees in which every call is inlined into itself.
    let tree = [0; 1 << 12];
    for function in table.functions().take(1 << 16) {
        if random.below(16) > 0 {
            continue;
        }
        let offset = TextOffset(function.entry.0.wrapping_add(random.below(1 << 10) as u32));
        let found = table.function(offset);
        for function in found.into_iter().chain([function]) {
            let _ = table.stack_delta(function, offset);
            let _ = table.name(function);
            let _ = table.start(function);
            let _ = table.end(function);
            let _ = table.positions(function, offset, &tree[..]);
        }
    }
}

#[test]
fn mutated_programs() {
    let originals = originals();
    if originals.is_empty() {
        return;
    }
    let only: Option<u64> = std::env::var("LEAKMON_HOSTILE_SEED")
        .ok()
        .map(|seed| seed.parse().expect("a seed"));
    let next = AtomicU64::new(only.unwrap_or(0));
    let last = only.map_or(MUTATIONS, |seed| seed + 1);
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
    let mut counts = std::collections::BTreeMap::new();
    for (outcome, _) in &outcomes {
        *counts.entry(*outcome).or_insert(0) += 1;
    }
    let slowest = outcomes.iter().map(|(_, took)| *took).max();
    eprintln!("{counts:?}, slowest {slowest:?}, largest allocation {LARGEST:?}");
    if only.is_none() {
        // The mutations are neither so mild nor so harsh that they test nothing.
        assert!(
            counts["read"] > 500 && counts["refused"] > 500,
            "{counts:?}"
        );
    }
}

fn mutation(mutable: &mut Mutable<'_>, seed: u64) -> (&'static str, Duration) {
    let name = &mutable.original.name;
    let mut random = Random::new(seed);
    mutable.mutate(&mut random);
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let bias = mutable.original.bias;
        examine(&mutable.file, bias, &mutable.snapshot, &mut random)
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
#[test]
fn unmutated_programs() {
    for original in &originals() {
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
        let outcome = examine(&mutable.file, original.bias, &mutable.snapshot, &mut random);
        assert_eq!(outcome, "read", "{}", original.name);
    }
}

/// A memory with goroutines that the target has made up: `make` fills in the g
/// and the stack of each.
struct MadeUp<'a> {
    snapshot: &'a Snapshot,
    tables: Tables,
    count: u64,
    g: Vec<u8>,
    stack_len: u64,
    fields: Fields,
    /// Program counters that lie in Go's text.
    pcs: Vec<u64>,
    kind: Kind,
}

#[derive(Clone, Copy)]
struct Fields {
    goid: usize,
    gopc: usize,
    startpc: usize,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    /// Every goroutine has a stack of its own.
    Distinct,
    /// Every goroutine was spawned elsewhere.
    Sites,
    /// Every stack returns to the same place for ever.
    Cyclic,
}

const ARRAY: u64 = 0x1000_0000_0000;
const GS: u64 = 0x2000_0000_0000;
const STACKS: u64 = 0x4000_0000_0000;
const EACH: u64 = 1 << 20;

impl MadeUp<'_> {
    fn byte_source(&self, addr: u64) -> Option<(u64, Vec<u8>)> {
        let word = |start: u64, value: u64| Some((start, value.to_le_bytes().to_vec()));
        if addr == self.tables.allglen.0 {
            return word(addr, self.count);
        }
        if addr == self.tables.allgptr.0 {
            return word(addr, ARRAY);
        }
        match addr {
            ARRAY..GS => {
                let index = (addr - ARRAY) / 8;
                word(ARRAY + index * 8, GS + index * 512)
            }
            GS..STACKS => {
                let index = (addr - GS) / 512;
                Some((GS + index * 512, self.g(index)))
            }
            STACKS.. => {
                let at = addr & !7;
                let index = (at - STACKS) / EACH;
                let place = (at - STACKS) % EACH / 8;
                let pc = match self.kind {
                    Kind::Cyclic | Kind::Sites => 0,
                    Kind::Distinct => (index >> (4 * (place % 8))) as usize % 16 + place as usize,
                };
                word(at, self.pcs[pc % self.pcs.len()])
            }
            _ => None,
        }
    }

    fn g(&self, index: u64) -> Vec<u8> {
        let mut g = self.g.clone();
        let mut set = |at: usize, value: u64| g[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let addr = GS + index * 512;
        let stack = STACKS + index * EACH;
        set(layout::G_STACK_LO, stack);
        set(layout::G_STACK_HI, stack + self.stack_len);
        set(layout::G_SCHED_SP, stack);
        set(layout::G_SCHED_G, addr);
        set(self.fields.goid, index + 1);
        set(layout::G_SCHED_PC, self.pcs[0]);
        if self.kind == Kind::Sites {
            set(self.fields.gopc, self.pcs[0].wrapping_add(index));
        } else {
            set(self.fields.gopc, self.pcs[0]);
        }
        set(self.fields.startpc, 0);
        g.resize(512, 0);
        g
    }
}

impl Memory for &MadeUp<'_> {
    fn read(&self, addr: RuntimeAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < buf.len() {
            let at = addr.wrapping_add(done as u64);
            let Some((start, bytes)) = self.byte_source(at.0) else {
                return self.snapshot.read(at, &mut buf[done..]);
            };
            let from = &bytes[(at.0 - start) as usize..];
            let len = from.len().min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&from[..len]);
            done += len;
        }
        Ok(())
    }

    fn still_the_same(&self) -> Result<(), MemoryError> {
        Ok(())
    }
}

#[test]
fn made_up_goroutines() {
    let Some(fixture) = fixture("senders", "plain") else {
        return;
    };
    let original = Original::of(&fixture);
    let elf = Elf::parse(&original.bytes[..]).expect("an ELF file");
    let snapshot = &original.snapshot;
    let program = open(&fixture.path, elf, original.bias, &snapshot);
    let mut g = vec![0; 512];
    snapshot.read(original.waiting, &mut g).expect("a g");
    // Functions with a small frame, so that every word is a return address.
    let pcs: Vec<u64> = program
        .table
        .functions()
        .filter(|function| !program.table.is_top_frame(*function))
        .filter(|function| !program.table.writes_sp(*function))
        .filter(|function| program.table.stack_delta(*function, function.entry) == Some(0))
        .map(|function| original.bias.runtime(program.vaddr(function.entry)).0)
        .collect();
    assert!(pcs.len() > 500);
    for (kind, count, stack_len) in [
        (Kind::Distinct, 150_000, 256),
        (Kind::Distinct, 30_000, 4096),
        (Kind::Sites, 150_000, 64),
        (Kind::Cyclic, 300, EACH),
    ] {
        let made_up = MadeUp {
            snapshot,
            tables: original.tables,
            count,
            g: g.clone(),
            stack_len,
            fields: Fields {
                goid: program.layout.g.goid,
                gopc: program.layout.g.gopc,
                startpc: program.layout.g.startpc,
            },
            pcs: pcs.clone(),
            kind,
        };
        let mut census = Census::new(
            &made_up,
            Arc::clone(&program),
            original.bias,
            original.tables,
        );
        let started = Instant::now();
        for _ in 0..2 {
            let population = census.population().expect("a census");
            assert_eq!(population.count, count, "{kind:?}");
            assert!(population.sites.len() <= (1 << 16) + 1, "{kind:?}");
            assert!(population.stacks.len() <= 1 << 16, "{kind:?}");
            let frames: usize = population
                .stacks
                .iter()
                .map(|stack| stack.frames.len())
                .sum();
            assert!(frames <= (1 << 20) + (1 << 10), "{kind:?}: {frames} frames");
            let untold = population
                .groups
                .iter()
                .filter(|group| group.stack.is_none());
            let untold: u64 = untold.map(|group| group.count).sum();
            // What is left out is said, and nothing is left out without need.
            assert_eq!(population.untold, untold, "{kind:?}");
            assert_eq!(untold > 0, kind == Kind::Distinct, "{kind:?}: {untold}");
        }
        let dump = census.dump().expect("a dump");
        assert_eq!(dump.tasks.len() as u64, count, "{kind:?}");
        let frames: usize = dump.stacks.iter().map(|stack| stack.frames.len()).sum();
        assert!(frames <= (1 << 22) + (1 << 10), "{kind:?}: {frames} frames");
        eprintln!("{kind:?}: {count} goroutines in {:?}", started.elapsed());
    }
}

/// A memory in which `runtime.allgs` has just been outgrown: the first reading
/// of its address leads elsewhere.
struct Moving<'a> {
    snapshot: &'a Snapshot,
    allgptr: RuntimeAddr,
    elsewhere: u64,
    moved: Cell<bool>,
}

impl Memory for &Moving<'_> {
    fn read(&self, addr: RuntimeAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        if addr == self.allgptr && !self.moved.replace(true) {
            buf.copy_from_slice(&self.elsewhere.to_le_bytes()[..buf.len()]);
            return Ok(());
        }
        self.snapshot.read(addr, buf)
    }

    fn still_the_same(&self) -> Result<(), MemoryError> {
        Ok(())
    }
}

#[test]
fn an_outgrown_array_is_not_believed() {
    let Some(fixture) = fixture("senders", "plain") else {
        return;
    };
    let original = Original::of(&fixture);
    let elf = Elf::parse(&original.bytes[..]).expect("an ELF file");
    let snapshot = &original.snapshot;
    let program = open(&fixture.path, elf, original.bias, &snapshot);
    let mut census = Census::new(
        snapshot,
        Arc::clone(&program),
        original.bias,
        original.tables,
    );
    let count = census.population().expect("a census").count;
    assert_eq!(count, 61);
    // Not mapped, the program's text, and an array of one goroutine many times.
    for elsewhere in [8, original.bias.runtime(program.text).0, ARRAY_OF_ONE_G] {
        let mut snapshot = snapshot.clone();
        let array = original.waiting.0.to_le_bytes().repeat(1 << 10);
        snapshot.regions.push((ARRAY_OF_ONE_G, array));
        snapshot.regions.sort_by_key(|(start, _)| *start);
        let moving = Moving {
            snapshot: &snapshot,
            allgptr: original.tables.allgptr,
            elsewhere,
            moved: Cell::new(false),
        };
        let program = Arc::clone(&program);
        let mut census = Census::new(&moving, program, original.bias, original.tables);
        let found = census.population().expect("a census").count;
        assert_eq!(found, count, "{elsewhere:#x}");
    }
}

/// An address at which no program has anything.
const ARRAY_OF_ONE_G: u64 = 0x1234_0000_0000;

/// Numbers of goroutines that no program has are refused, without an attempt
/// to keep as many.
#[test]
fn impossible_counts() {
    let Some(fixture) = fixture("senders", "plain") else {
        return;
    };
    let original = Original::of(&fixture);
    let elf = Elf::parse(&original.bytes[..]).expect("an ELF file");
    for count in [1 << 20, 1 << 25, (1 << 25) + 1, 1 << 32, 1 << 61, u64::MAX] {
        let mut snapshot = original.snapshot.clone();
        snapshot.set(original.tables.allglen.0, &count.to_le_bytes());
        let snapshot = &snapshot;
        let program = open(&fixture.path, elf.clone(), original.bias, &snapshot);
        let mut census = Census::new(snapshot, program, original.bias, original.tables);
        assert!(census.population().is_err(), "{count}");
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest <= MOST, "{count}: {largest}");
    }
}
