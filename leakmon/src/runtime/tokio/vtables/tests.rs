use super::*;
use crate::binary::addr::FileOffset;
use crate::binary::elf::{Part, Segment};

const CODE: u64 = 0x1000;
const DATA: u64 = 0x4000;
const DYNAMIC: u64 = 0x6000;

/// A file of a code segment with a function each 16 bytes, an index of them,
/// constants, data, and a dynamic section, all at their own addresses.
fn image(arch: Arch, position_independent: bool) -> (Elf, Vec<u8>) {
    let mut bytes = vec![0; 0x8000];
    let segment = |vaddr: u64, size: u64, writable, executable| Segment {
        vaddr: Vaddr(vaddr),
        offset: FileOffset(vaddr),
        file_size: size,
        mem_size: size,
        writable,
        executable,
    };
    bytes[0x2000..0x200c].copy_from_slice(&[1, 0x1b, 3, 0x3b, 0, 0, 0, 0, 128, 0, 0, 0]);
    for n in 0..128u64 {
        let start = (CODE + n * 16).wrapping_sub(0x2000) as u32;
        let at = 0x200c + n as usize * 8;
        bytes[at..at + 4].copy_from_slice(&start.to_le_bytes());
    }
    let elf = Elf {
        arch,
        position_independent,
        entry: Vaddr(CODE),
        segments: vec![
            segment(CODE, 0x800, false, true),
            segment(0x2000, 0x2000, false, false),
            segment(DATA, 0x2000, true, false),
            segment(DYNAMIC, 0x1000, false, false),
        ],
        dynamic: Some(Part {
            vaddr: Vaddr(DYNAMIC),
            size: 0x100,
        }),
        eh_frame_hdr: Some(Part {
            vaddr: Vaddr(0x2000),
            size: 12 + 128 * 8,
        }),
        sections: Vec::new(),
    };
    (elf, bytes)
}

fn put(bytes: &mut [u8], at: u64, words: &[u64]) {
    for (n, word) in words.iter().enumerate() {
        let at = at as usize + n * 8;
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
}

fn function(n: u64) -> u64 {
    CODE + n * 16
}

/// Seven functions, and the offsets of a cell.
fn vtable_words() -> Vec<u64> {
    let mut words: Vec<u64> = (0..7).map(function).collect();
    words.extend([0xb0, 0x20, 0x28]);
    words
}

fn say(bytes: &mut [u8], text: &str) {
    bytes[0x3000..0x3000 + text.len()].copy_from_slice(text.as_bytes());
}

fn at(addr: u64) -> Vtable {
    Vtable {
        addr: Vaddr(addr),
        poll: Vaddr(function(0)),
        dealloc: Vaddr(function(2)),
        drop_abort_handle: Vaddr(function(5)),
        shutdown: Vaddr(function(6)),
        trailer: Some(0xb0),
        scheduler: Some(0x20),
        id: Some(0x28),
        spawn_location: None,
    }
}

#[test]
fn by_rela() {
    for (arch, kind) in [(Arch::X86_64, 8), (Arch::Aarch64, 1027)] {
        let (elf, mut bytes) = image(arch, true);
        // The words themselves are 0: their values are in the relocations.
        for (n, value) in (0..7).map(function).enumerate() {
            let entry = [DATA + 0x40 + n as u64 * 8, kind, value];
            put(&mut bytes, 0x6400 + n as u64 * 24, &entry);
        }
        put(&mut bytes, DATA + 0x40 + 56, &[0xb0, 0x20, 0x28]);
        put(&mut bytes, DYNAMIC, &[7, 0x6400, 8, 7 * 24]);
        assert_eq!(
            find(&elf, &bytes[..]).unwrap().unwrap().vtables,
            [at(DATA + 0x40)]
        );
    }
}

#[test]
fn by_relr() {
    let (elf, mut bytes) = image(Arch::X86_64, true);
    put(&mut bytes, DATA, &vtable_words());
    // The first word, then a bitmap of the six behind it.
    put(&mut bytes, 0x6400, &[DATA, 0b111_1111]);
    put(&mut bytes, DYNAMIC, &[36, 0x6400, 35, 16]);
    assert_eq!(find(&elf, &bytes[..]).unwrap().unwrap().vtables, [at(DATA)]);
    // One of them is none.
    put(&mut bytes, 0x6400, &[DATA, 0b111_1011]);
    assert_eq!(find(&elf, &bytes[..]), Ok(None));
}

#[test]
fn by_plain_words_and_with_the_place_of_the_spawn() {
    let (elf, mut bytes) = image(Arch::X86_64, false);
    put(&mut bytes, DATA, &vtable_words());
    put(&mut bytes, DATA + 80, &[0x30]);
    say(&mut bytes, "/home/me/tokio-1.46.0/src/runtime/task/core.rs");
    let found = find(&elf, &bytes[..]).unwrap().unwrap();
    assert_eq!(
        found.version,
        Some(Version {
            minor: 46,
            patch: 0
        })
    );
    let expected = Vtable {
        spawn_location: Some(0x30),
        ..at(DATA)
    };
    assert_eq!(found.vtables, [expected]);
}

#[test]
fn implausible_offsets_and_pointers_into_functions_are_none() {
    let cases = [
        (0, function(0) + 1),
        (7, 0xb4),
        (7, 0x28),
        (7, 1 << 30),
        (8, 0x18),
        (8, 0x30),
        (9, 0x18),
        (9, 0xb8),
    ];
    for (index, value) in cases {
        let (elf, mut bytes) = image(Arch::X86_64, false);
        let mut words = vtable_words();
        words[index] = value;
        put(&mut bytes, DATA, &words);
        assert_eq!(find(&elf, &bytes[..]), Ok(None), "{index} {value:#x}");
        say(&mut bytes, "tokio-1.44.2/src/runtime/task/raw.rs");
        let refused = Unknown::NoVtable(Some(Version {
            minor: 44,
            patch: 2,
        }));
        assert_eq!(find(&elf, &bytes[..]), Err(refused));
    }
}

#[test]
fn a_tokio_that_is_too_old_is_refused() {
    let (elf, mut bytes) = image(Arch::X86_64, false);
    put(&mut bytes, DATA, &vtable_words());
    say(&mut bytes, "tokio-1.17.0/src/runtime/task/core.rs");
    let error = find(&elf, &bytes[..]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "built with tokio 1.17.0; leakmon reads 1.18 and later"
    );
}

#[test]
fn one_offset_only() {
    let (elf, mut bytes) = image(Arch::X86_64, false);
    let mut words: Vec<u64> = (0..8).map(function).collect();
    words.push(0xb0);
    put(&mut bytes, DATA, &words);
    assert_eq!(find(&elf, &bytes[..]), Ok(None));
    say(&mut bytes, "tokio-1.22.0/src/runtime/task/core.rs");
    let found = find(&elf, &bytes[..]).unwrap().unwrap();
    assert_eq!(found.layout, Layout::V21);
    assert_eq!(found.vtables[0].trailer, Some(0xb0));
    assert_eq!(found.vtables[0].dealloc, Vaddr(function(1)));
}

#[test]
fn tables_without_offsets_are_split_where_code_refers_to_them() {
    for arch in [Arch::X86_64, Arch::Aarch64] {
        let (elf, mut bytes) = image(arch, true);
        // Four functions of another table, then two vtables, one behind the other.
        let words: Vec<u64> = (0..20).map(function).collect();
        put(&mut bytes, DATA, &words);
        put(&mut bytes, 0x6400, &[DATA, (1 << 20) - 1]);
        put(&mut bytes, DYNAMIC, &[36, 0x6400, 35, 16]);
        say(&mut bytes, "tokio-1.20.6/src/runtime/task/core.rs");
        for (n, target) in [DATA, DATA + 32, DATA + 96].into_iter().enumerate() {
            let code = CODE + 0x100 + n as u64 * 16;
            let instructions: Vec<u8> = match arch {
                Arch::X86_64 => {
                    let disp = target.wrapping_sub(code + 7) as u32;
                    [&[0x48, 0x8d, 0x05][..], &disp.to_le_bytes()].concat()
                }
                Arch::Aarch64 => {
                    // adrp x1, DATA; add x0, x1, #low
                    let page = ((target >> 12) - (code >> 12)) as u32;
                    let adrp = 0x9000_0001 | (page & 3) << 29 | (page >> 2) << 5;
                    let add = 0x9100_0020 | ((target & 0xfff) as u32) << 10;
                    [adrp.to_le_bytes(), add.to_le_bytes()].concat()
                }
            };
            let at = code as usize;
            bytes[at..at + instructions.len()].copy_from_slice(&instructions);
        }
        let found = find(&elf, &bytes[..]).unwrap().unwrap();
        let addrs: Vec<u64> = found.vtables.iter().map(|vtable| vtable.addr.0).collect();
        assert_eq!(addrs, [DATA + 32, DATA + 96], "{arch:?}");
        assert_eq!(found.vtables[0].poll, Vaddr(function(4)));
    }
}

#[test]
fn a_field_of_another_struct_is_no_reference() {
    // adrp x0, here; add x0, x0, #0x40; add x1, x0, #8; ret; add x2, x0, #0x80
    let code = [
        0x9000_0000u32,
        0x9101_0000,
        0x9100_2001,
        0xd65f_03c0,
        0x9102_0002,
    ];
    let code = code.map(u32::to_le_bytes).concat();
    let mut found = Vec::new();
    references_aarch64(&code, Vaddr(0x5000), &mut |addr| found.push(addr));
    assert_eq!(found, [0x5040]);
}

#[test]
fn any_bytes_are_an_answer() {
    let (elf, mut bytes) = image(Arch::X86_64, true);
    put(&mut bytes, DATA, &vtable_words());
    put(&mut bytes, 0x6400, &[DATA, 0b111_1111]);
    let dynamic = [36, 0x6400, 35, 16, 7, 0x6400, 8, u64::MAX];
    put(&mut bytes, DYNAMIC, &dynamic);
    for at in (0x2000..0x2040).chain(0x4000..0x4060).chain(0x6000..0x6040) {
        for flip in [0xff, 0x80, 1] {
            bytes[at] ^= flip;
            let _ = find(&elf, &bytes[..]);
            bytes[at] ^= flip;
        }
    }
    for len in (0..bytes.len()).step_by(97) {
        let _ = find(&elf, &bytes[..len]);
    }
}
