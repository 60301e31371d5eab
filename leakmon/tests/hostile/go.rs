//! Goroutines.

use std::cell::Cell;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use leakmon::binary::addr::{LoadBias, RuntimeAddr};
use leakmon::binary::elf::{Elf, ReadAt as _};
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
use nix::sys::signal::Signal;

use super::common::{self, Fixture, Running, fixture, state, wait_until};
use super::{LARGEST, MOST, Original, Random, Snapshot, mutate, read_whole};

/// A Go program, and where what its goroutines are read by lies.
struct GoProgram {
    original: Original,
    tables: Tables,
    /// A goroutine that waits.
    waiting: RuntimeAddr,
}

impl GoProgram {
    fn of(fixture: &Fixture) -> GoProgram {
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
        let name = format!(
            "{} {} {}",
            fixture.program, fixture.go_version, fixture.variant
        );
        GoProgram {
            original: Original {
                name,
                bytes,
                snapshot,
                bias,
                parts,
                places,
                examine: Box::new(examine),
            },
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
    .map(|fixture| GoProgram::of(&fixture).original)
    .collect()
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
    let counts = mutate(&originals(), 10_000);
    // The mutations are neither so mild nor so harsh that they test nothing.
    if !counts.is_empty() {
        assert!(
            counts["read"] > 500 && counts["refused"] > 500,
            "{counts:?}"
        );
    }
}

#[test]
fn unmutated_programs() {
    read_whole(&originals());
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
    let GoProgram {
        original,
        tables,
        waiting,
    } = GoProgram::of(&fixture);
    let elf = Elf::parse(&original.bytes[..]).expect("an ELF file");
    let snapshot = &original.snapshot;
    let program = open(&fixture.path, elf, original.bias, &snapshot);
    let mut g = vec![0; 512];
    snapshot.read(waiting, &mut g).expect("a g");
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
            tables,
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
        let mut census = Census::new(&made_up, Arc::clone(&program), original.bias, tables);
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
    let GoProgram {
        original,
        tables,
        waiting,
    } = GoProgram::of(&fixture);
    let elf = Elf::parse(&original.bytes[..]).expect("an ELF file");
    let snapshot = &original.snapshot;
    let program = open(&fixture.path, elf, original.bias, &snapshot);
    let mut census = Census::new(snapshot, Arc::clone(&program), original.bias, tables);
    let count = census.population().expect("a census").count;
    assert_eq!(count, 61);
    // Not mapped, the program's text, and an array of one goroutine many times.
    for elsewhere in [8, original.bias.runtime(program.text).0, ARRAY_OF_ONE_G] {
        let mut snapshot = snapshot.clone();
        let array = waiting.0.to_le_bytes().repeat(1 << 10);
        snapshot.regions.push((ARRAY_OF_ONE_G, array));
        snapshot.regions.sort_by_key(|(start, _)| *start);
        let moving = Moving {
            snapshot: &snapshot,
            allgptr: tables.allgptr,
            elsewhere,
            moved: Cell::new(false),
        };
        let program = Arc::clone(&program);
        let mut census = Census::new(&moving, program, original.bias, tables);
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
    let GoProgram {
        original, tables, ..
    } = GoProgram::of(&fixture);
    let elf = Elf::parse(&original.bytes[..]).expect("an ELF file");
    for count in [1 << 20, 1 << 25, (1 << 25) + 1, 1 << 32, 1 << 61, u64::MAX] {
        let mut snapshot = original.snapshot.clone();
        snapshot.set(tables.allglen.0, &count.to_le_bytes());
        let snapshot = &snapshot;
        let program = open(&fixture.path, elf.clone(), original.bias, &snapshot);
        let mut census = Census::new(snapshot, program, original.bias, tables);
        assert!(census.population().is_err(), "{count}");
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest <= MOST, "{count}: {largest}");
    }
}
