//! tokio's tasks.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use leakmon::binary::addr::LoadBias;
use leakmon::binary::elf::Elf;
use leakmon::process::identity::Process;
use leakmon::report::stacks::{self, Format, Origin};
use leakmon::runtime::tokio::census::Census;
use leakmon::runtime::tokio::program::Program;
use nix::sys::signal::Signal;

use super::common::{self, Running, state, wait_until};
use super::{Original, Snapshot, mutate, read_whole};

/// A zoo that stands still, for as long as its mappings are looked up.
fn original(path: &Path) -> (Original, Running) {
    let running = Running::start(path);
    let pid = running.pid();
    running.child.signal(Signal::SIGSTOP);
    wait_until("it has stopped", || state(pid) == Some('T'));
    let process = Process::open(pid).expect("a process");
    let bytes = std::fs::read(path).expect("the fixture");
    let elf = Elf::parse(&bytes[..]).expect("an ELF file");
    let bias = process.load_bias(elf.entry);
    let snapshot = Snapshot::take(pid);
    let program = Program::analyse(&process.executable)
        .expect("a program that is read")
        .expect("a program with tokio");

    // Wherever a vtable's address is, there may be a task.
    let loaded = program.loaded(bias);
    let mut places = Vec::new();
    for (start, region) in &snapshot.regions {
        for (i, word) in region.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            if loaded.index(&program, word).is_some() {
                let header = start + i as u64 * 8 - program.layout.vtable();
                places.extend((0..64).map(|word| header + word * 8));
            }
        }
    }
    assert!(places.len() > 1000, "{}: no tasks", path.display());

    let mut parts = vec![(0, 64), (64, 56 * 16), (0, bytes.len() as u64)];
    let sections = u64::from_le_bytes(bytes[40..48].try_into().expect("e_shoff"));
    parts.push((sections, 64 * 40));
    for name in [
        ".data.rel.ro",
        ".rela.dyn",
        ".dynamic",
        ".eh_frame_hdr",
        ".rodata",
        ".symtab",
        ".strtab",
    ] {
        if let Some(section) = elf.section(name) {
            parts.push((section.offset.0, 128.min(section.size)));
            parts.push((section.offset.0, section.size));
        }
    }
    for vtable in &program.vtables {
        for (addr, len) in [(vtable.addr, 88), (vtable.poll, 512), (vtable.dealloc, 256)] {
            let offset = elf.file_offset(addr).expect("in the file");
            parts.push((offset.0, len));
        }
    }
    let name = path.display().to_string();
    let original = Original {
        name,
        bytes,
        snapshot,
        bias,
        parts,
        places,
        examine: Box::new(move |file, bias, snapshot, _| examine(file, bias, snapshot, pid)),
    };
    (original, running)
}

/// Zoos of every layout and shape.
fn originals() -> (Vec<Original>, Vec<Running>) {
    let Some(fixtures) = common::fixtures() else {
        return (Vec::new(), Vec::new());
    };
    [
        "tokio-1.20/release",
        "tokio-1.44/fat-stripped",
        "tokio-1.54/release",
        "tokio-1.54/static",
        "tokio-1.54/relr",
        "tokio-1.54/debug1",
    ]
    .iter()
    .map(|build| original(&fixtures.join(build).join("zoo")))
    .unzip()
}

/// Does with a program all that leakmon does. How far it came.
fn examine(file: &File, bias: LoadBias, snapshot: &Snapshot, pid: u32) -> &'static str {
    let program = match Program::analyse(file) {
        Ok(Some(program)) => Arc::new(program),
        Ok(None) => return "not tokio",
        Err(refusal) => {
            assert!(!refusal.to_string().is_empty());
            return "refused";
        }
    };
    let mut census = Census::new(snapshot, pid, program, bias);
    if census.population().is_err() {
        return "no census";
    }
    let again = census
        .population()
        .expect("another census of the same memory");
    assert!(again.groups.iter().map(|group| group.count).sum::<u64>() == again.count);
    let dump = census.dump().expect("a dump of the same memory");
    let origin = Origin {
        executable: "/program",
        build_id: None,
        at: SystemTime::UNIX_EPOCH,
    };
    for format in [Format::Debug2, Format::Debug1, Format::Json, Format::Folded] {
        stacks::write(format, &dump, origin, &mut std::io::sink()).expect("a dump");
    }
    "read"
}

#[test]
fn mutated_programs() {
    let (originals, _running) = originals();
    let counts = mutate(&originals, 2_000);
    // As for goroutines.
    if !counts.is_empty() {
        let read = counts["read"];
        assert!((200..1_800).contains(&read), "{counts:?}");
    }
}

#[test]
fn unmutated_programs() {
    let (originals, _running) = originals();
    read_whole(&originals);
}
