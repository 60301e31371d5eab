//! Where the vtables of a program's tasks are.
//!
//! tokio makes one `static` vtable for each type of future and scheduler that
//! is spawned. A stripped program has no name for it, but its words are
//! pointers to functions, which the linker lists among the relocations, and
//! from 1.21 on offsets behind them. What looks so is a vtable: each pointer is
//! the start of a function, and the offsets are those of a cell.
//!
//! tokio's version is in the paths of its panic messages, which neither
//! stripping nor `--remap-path-prefix` removes. The older layouts have little
//! to be known by, so only a program that is of their version is searched for
//! them.

use crate::binary::addr::Vaddr;
use crate::binary::disasm;
use crate::binary::disasm::addresses::{Addresses, Named};
use crate::binary::elf::{Arch, Elf, ElfError, ReadAt};

use super::layout::{self, Layout, Version};

/// Bytes of data that are searched; of the largest programs 100 MB are.
const MAX_DATA: u64 = 512 << 20;

/// Bytes of relocations that are read.
const MAX_RELOCATIONS: u64 = 512 << 20;

/// Bytes of the index of functions that are read.
const MAX_INDEX: u64 = 256 << 20;

/// Bytes of constants that are searched for tokio's paths.
const MAX_CONSTANTS: u64 = 1 << 30;

/// Bytes of code that are searched for references, in programs with tokio 1.18
/// to 1.20.
const MAX_CODE: u64 = 512 << 20;

/// Vtables that are believed; a large program has a thousand.
const MAX_VTABLES: usize = 1 << 16;

/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;

/// A task's vtable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vtable {
    /// Where it lies.
    pub addr: Vaddr,
    /// `poll`. Several vtables may have the same, where the linker folds equal
    /// functions.
    pub poll: Vaddr,
    /// `dealloc`.
    pub dealloc: Vaddr,
    /// `drop_abort_handle`.
    pub drop_abort_handle: Vaddr,
    /// `shutdown`.
    pub shutdown: Vaddr,
    /// Where the cell's trailer starts, in bytes; `None` before 1.21.
    pub trailer: Option<u32>,
    /// Where the scheduler lies in the cell, in bytes; `None` before 1.23.
    pub scheduler: Option<u16>,
    /// Where the task's id lies in the cell, in bytes; `None` before 1.23.
    pub id: Option<u16>,
    /// Where the place of the spawn lies in the cell, in bytes: a
    /// `&'static Location`. Only of tokio 1.46 and later with `tokio_unstable`.
    pub spawn_location: Option<u16>,
}

/// What was found in a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// tokio's version, by the paths of its panic messages; `None` when tokio
    /// was built from a directory that does not have it in its name.
    pub version: Option<Version>,
    /// The layout of all vtables.
    pub layout: Layout,
    /// The vtables, by address.
    pub vtables: Vec<Vtable>,
}

/// Why no vtable is told of a program that has tokio.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// tokio before 1.18.
    #[error("built with tokio {0}; leakmon reads 1.{old} and later", old = layout::OLDEST)]
    TooOld(Version),
    /// No vtable where tokio's runtime is.
    #[error(
        "has tokio's runtime, but no task vtable that leakmon knows{}",
        .0.map_or_else(String::new, |version| format!(" (tokio {version})"))
    )]
    NoVtable(Option<Version>),
    /// Its paths are those of another tokio than its vtables.
    #[error(
        "says that it is built with tokio {0}, but its task vtables are those of 1.23 or later; \
         leakmon does not guess which is true"
    )]
    Contradiction(Version),
    /// The file cannot be read.
    #[error("{0}")]
    Elf(String),
}

impl From<ElfError> for Unknown {
    fn from(error: ElfError) -> Unknown {
        Unknown::Elf(error.to_string())
    }
}

/// Finds the vtables in `file`; `None` when it spawns no task of tokio.
///
/// # Errors
/// [`Unknown`], when it has tokio, but not as leakmon knows it.
pub fn find<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Result<Option<Found>, Unknown> {
    let starts = function_starts(elf, file);
    let mut data = data(elf, file)?;
    relocate(elf, file, &mut data);
    let code = Code { elf, starts };
    let runs: Vec<Run> = data.iter().flat_map(|block| runs(block, &code)).collect();
    // 1.17 and older have five functions at least.
    if !runs.iter().any(|run| run.functions >= 5) {
        return Ok(None);
    }
    let modern: Vec<Vtable> = runs.iter().filter_map(modern).collect();
    let said = Said::of(elf, file);
    let found = |layout, mut vtables: Vec<Vtable>| {
        vtables.truncate(MAX_VTABLES);
        Some(Found {
            version: said.version,
            layout,
            vtables,
        })
    };
    let older = |layout, vtables: Vec<Vtable>| match vtables.is_empty() {
        false => Ok(found(layout, vtables)),
        // Parts of tokio can be used without a runtime.
        true if said.spawns => Err(Unknown::NoVtable(said.version)),
        true => Ok(None),
    };
    let layout = said.version.map(Layout::of);
    match layout {
        _ if !said.tokio => {
            // Without a word of tokio only what cannot be anything else counts.
            let proven = !code.starts.is_empty() && !modern.is_empty();
            Ok(proven.then(|| found(Layout::V23, modern)).flatten())
        }
        Some(None) if said.runtime => match said.version {
            Some(version) => Err(Unknown::TooOld(version)),
            None => Ok(None),
        },
        Some(None) => Ok(None),
        Some(Some(Layout::V23)) | None if !modern.is_empty() => Ok(found(Layout::V23, modern)),
        // Nothing else looks like these.
        Some(Some(Layout::V18 | Layout::V21)) if !code.starts.is_empty() && !modern.is_empty() => {
            match said.version {
                Some(version) => Err(Unknown::Contradiction(version)),
                None => Ok(None),
            }
        }
        Some(Some(Layout::V21)) => {
            let vtables: Vec<Vtable> = runs.iter().filter_map(with_trailer).collect();
            older(Layout::V21, vtables)
        }
        Some(Some(Layout::V18)) => {
            let referenced = References::find(elf, file, &data);
            let vtables: Vec<Vtable> = runs
                .iter()
                .flat_map(|run| without_offsets(run, &referenced))
                .collect();
            older(Layout::V18, vtables)
        }
        // Parts of tokio can be used without a runtime.
        _ if said.spawns => Err(Unknown::NoVtable(said.version)),
        _ => Ok(None),
    }
}

/// A part of the file that may hold vtables.
struct Block {
    addr: Vaddr,
    words: Vec<u64>,
    /// Whether the word is an address that the program's loading changes; empty
    /// when every word may be one.
    moved: Vec<bool>,
}

/// The data of a program: of one that can be loaded anywhere what is writable
/// until it has been relocated, of another its constants, too. Some linkers put
/// these beside the code (GNU ld for AArch64): their section tells them apart.
fn data<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Result<Vec<Block>, Unknown> {
    let mut left = MAX_DATA;
    let mut blocks = Vec::new();
    for segment in &elf.segments {
        let wanted = match elf.position_independent {
            true => segment.writable,
            false => segment.writable || !segment.executable,
        };
        let constants = elf.section(".rodata").filter(|section| {
            let inside = section.vaddr.offset_from(segment.vaddr);
            !elf.position_independent && inside.is_some_and(|delta| delta < segment.file_size)
        });
        let (vaddr, offset, size) = match constants {
            _ if wanted => (segment.vaddr, segment.offset, segment.file_size),
            Some(section) => (section.vaddr, section.offset, section.size),
            None => continue,
        };
        let skip = vaddr.0.wrapping_neg() % 8;
        if size <= skip {
            continue;
        }
        let len = (size - skip).min(left) / 8 * 8;
        left -= len;
        let (Some(addr), Some(offset)) = (vaddr.checked_add(skip), offset.checked_add(skip)) else {
            continue;
        };
        let bytes = file
            .bytes_at(offset, len)
            .map_err(|source| Unknown::Elf(format!("reading its data: {source}")))?;
        let words: Vec<u64> = bytes.chunks_exact(8).map(word).collect();
        let moved = match elf.position_independent {
            true => vec![false; words.len()],
            false => Vec::new(),
        };
        blocks.push(Block { addr, words, moved });
    }
    Ok(blocks)
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// The words of a program's data, as loading with bias 0 leaves them.
pub(super) struct Constants(Vec<Block>);

impl Constants {
    /// The word at `addr`.
    pub(super) fn word(&self, addr: Vaddr) -> Option<u64> {
        self.0.iter().find_map(|block| {
            let delta = addr.offset_from(block.addr)?;
            let word = block.words.get(usize::try_from(delta / 8).ok()?)?;
            (delta % 8 == 0).then_some(*word)
        })
    }
}

/// The data of `file`, relocated; nothing where it cannot be read.
pub(super) fn constants<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Constants {
    let mut data = data(elf, file).unwrap_or_default();
    relocate(elf, file, &mut data);
    Constants(data)
}

/// Where in `file` the vtable of a waker may be: four functions in a row. Of
/// another vtable the size and the alignment are among its first four words.
pub(super) fn waker_vtables<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Vec<Vaddr> {
    /// `RawWakerVTable`, core/src/task/wake.rs: clone, wake, wake_by_ref, drop.
    const FUNCTIONS: usize = 4;
    let Constants(data) = constants(elf, file);
    let starts = function_starts(elf, file);
    let code = Code { elf, starts };
    let mut found = Vec::new();
    for block in &data {
        let moved = |at: usize| block.moved.get(at).copied().unwrap_or(true);
        let mut functions = 0;
        for (at, word) in block.words.iter().enumerate() {
            match moved(at) && code.is_function(*word) {
                true => functions += 1,
                false => functions = 0,
            }
            if functions >= FUNCTIONS {
                let first = (at + 1 - FUNCTIONS) as u64;
                found.push(block.addr.wrapping_add(first * 8));
            }
        }
    }
    found.sort_unstable();
    found
}

/// Tags of PT_DYNAMIC: elf.h, and the generic ABI for DT_RELR.
mod dynamic {
    pub(super) const RELA: u64 = 7;
    pub(super) const RELASZ: u64 = 8;
    pub(super) const RELR: u64 = 36;
    pub(super) const RELRSZ: u64 = 35;
}

/// Carries out the relocations that add the load bias to a word, with bias 0.
fn relocate<R: ReadAt + ?Sized>(elf: &Elf, file: &R, data: &mut [Block]) {
    /// Bytes of PT_DYNAMIC that are read: 16 an entry, of which there are tens.
    const MAX_DYNAMIC: u64 = 1 << 16;
    let Some(part) = elf.dynamic.filter(|_| elf.position_independent) else {
        return;
    };
    let entries = elf
        .read(file, part.vaddr, part.size.min(MAX_DYNAMIC))
        .unwrap_or_default();
    let value = |tag: u64| {
        let mut entries = entries.chunks_exact(16);
        let entry = entries.find(|entry| word(&entry[..8]) == tag)?;
        Some(word(&entry[8..]))
    };
    let table = |addr: Option<u64>, size: Option<u64>| {
        let (addr, size) = (Vaddr(addr?), size?.min(MAX_RELOCATIONS));
        elf.read(file, addr, size).ok()
    };
    let mut set = |addr: u64, value: Option<u64>| {
        for block in data.iter_mut() {
            let Some(delta) = Vaddr(addr).offset_from(block.addr) else {
                continue;
            };
            let at = (delta / 8) as usize;
            if let (0, Some(word)) = (delta % 8, block.words.get_mut(at)) {
                *word = value.unwrap_or(*word);
                block.moved[at] = true;
            }
        }
    };
    let relative = match elf.arch {
        Arch::X86_64 => object::elf::R_X86_64_RELATIVE,
        Arch::Aarch64 => object::elf::R_AARCH64_RELATIVE,
    };
    if let Some(rela) = table(value(dynamic::RELA), value(dynamic::RELASZ)) {
        for entry in rela.chunks_exact(24) {
            if word(&entry[8..16]) == u64::from(relative.0) {
                set(word(&entry[..8]), Some(word(&entry[16..])));
            }
        }
    }
    if let Some(relr) = table(value(dynamic::RELR), value(dynamic::RELRSZ)) {
        let mut next = 0u64;
        for entry in relr.chunks_exact(8).map(word) {
            if entry & 1 == 0 {
                set(entry, None);
                next = entry.wrapping_add(8);
            } else {
                for bit in 0..63 {
                    if entry >> (bit + 1) & 1 == 1 {
                        set(next.wrapping_add(bit * 8), None);
                    }
                }
                next = next.wrapping_add(63 * 8);
            }
        }
    }
}

/// The starts of the program's functions, sorted, by `.eh_frame_hdr`; empty
/// when there is none.
///
/// Linux Standard Base, chapter 10.6.2; the encodings are DWARF's.
pub(super) fn function_starts<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Vec<u64> {
    /// DW_EH_PE_datarel | DW_EH_PE_sdata4: what every linker writes.
    const DATAREL_SDATA4: u8 = 0x3b;
    /// DW_EH_PE_udata4.
    const UDATA4: u8 = 0x03;
    let Some(part) = elf.eh_frame_hdr.filter(|part| part.size <= MAX_INDEX) else {
        return Vec::new();
    };
    let bytes = elf.read(file, part.vaddr, part.size).unwrap_or_default();
    let Some((head, table)) = bytes.split_at_checked(12) else {
        return Vec::new();
    };
    if head[0] != 1 || head[2] != UDATA4 || head[3] != DATAREL_SDATA4 {
        return Vec::new();
    }
    let count = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
    let mut starts: Vec<u64> = table
        .chunks_exact(8)
        .take(count)
        .map(|entry| {
            let start = i32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            part.vaddr.0.wrapping_add_signed(i64::from(start))
        })
        .collect();
    starts.sort_unstable();
    starts
}

/// What tells a pointer to a function.
struct Code<'a> {
    elf: &'a Elf,
    starts: Vec<u64>,
}

impl Code<'_> {
    fn is_function(&self, addr: u64) -> bool {
        let executable = |addr: u64| {
            self.elf.segments.iter().any(|segment| {
                segment.executable
                    && addr
                        .checked_sub(segment.vaddr.0)
                        .is_some_and(|delta| delta < segment.file_size)
            })
        };
        let aligned = self.elf.arch == Arch::X86_64 || addr.is_multiple_of(4);
        aligned
            && executable(addr)
            && (self.starts.is_empty() || self.starts.binary_search(&addr).is_ok())
    }
}

/// Words in a row that point to functions, and what is behind them.
struct Run {
    addr: Vaddr,
    words: Vec<u64>,
    functions: usize,
    /// Of the words behind, which the program's loading changes.
    moved_behind: Vec<bool>,
}

/// Words behind a run that are kept: the offsets of a vtable.
const BEHIND: usize = 4;

fn runs(block: &Block, code: &Code) -> Vec<Run> {
    let moved = |at: usize| block.moved.get(at).copied().unwrap_or(true);
    let is_function = |at: usize| moved(at) && code.is_function(block.words[at]);
    let mut runs = Vec::new();
    let mut at = 0;
    while at < block.words.len() {
        if !is_function(at) {
            at += 1;
            continue;
        }
        let start = at;
        while at < block.words.len() && is_function(at) {
            at += 1;
        }
        if at - start < 5 {
            continue;
        }
        let end = (at + BEHIND).min(block.words.len());
        runs.push(Run {
            addr: block.addr.wrapping_add(start as u64 * 8),
            words: block.words[start..end].to_vec(),
            functions: at - start,
            moved_behind: (at..end)
                .map(|at| !block.moved.is_empty() && moved(at))
                .collect(),
        });
    }
    runs
}

impl Run {
    /// The last `functions` of it, as a vtable, and the words behind.
    fn last(&self, layout: Layout) -> Option<(Vtable, &[u64])> {
        let skip = self.functions.checked_sub(layout.functions())?;
        let vtable = self.vtable(skip, layout);
        // An offset is no address.
        let behind = self.moved_behind.iter().take_while(|moved| !**moved);
        let behind = &self.words[self.functions..][..behind.count()];
        Some((vtable, behind))
    }

    fn vtable(&self, skip: usize, layout: Layout) -> Vtable {
        let function = |index: usize| Vaddr(self.words[skip + index]);
        Vtable {
            addr: self.addr.wrapping_add(skip as u64 * 8),
            poll: function(0),
            dealloc: function(layout.dealloc()),
            drop_abort_handle: function(Layout::DROP_ABORT_HANDLE),
            shutdown: function(layout.functions() - 1),
            trailer: None,
            scheduler: None,
            id: None,
            spawn_location: None,
        }
    }
}

/// A vtable of 1.23 or later at the end of a run.
fn modern(run: &Run) -> Option<Vtable> {
    let (vtable, behind) = run.last(Layout::V23)?;
    let [trailer, scheduler, id, rest @ ..] = behind else {
        return None;
    };
    let (trailer, scheduler, id) = (*trailer, *scheduler, *id);
    let header = Layout::V23.header();
    let plausible = [trailer, scheduler, id].iter().all(|at| at % 8 == 0)
        && (header..=layout::MAX_SCHEDULER_OFFSET).contains(&scheduler)
        && (scheduler..=scheduler + layout::MAX_SCHEDULER).contains(&id)
        && id < trailer
        && trailer < layout::MAX_CELL;
    let location = rest
        .first()
        .copied()
        .filter(|at| *at == id + 8 && *at < trailer);
    plausible.then(|| Vtable {
        trailer: u32::try_from(trailer).ok(),
        scheduler: u16::try_from(scheduler).ok(),
        id: u16::try_from(id).ok(),
        spawn_location: location.and_then(|at| u16::try_from(at).ok()),
        ..vtable
    })
}

/// A vtable of 1.21 or 1.22 at the end of a run.
fn with_trailer(run: &Run) -> Option<Vtable> {
    let (vtable, behind) = run.last(Layout::V21)?;
    let trailer = *behind.first()?;
    // Behind the header and at least a scheduler's and an id's room.
    let plausible =
        trailer % 8 == 0 && trailer > Layout::V21.header() && trailer < layout::MAX_CELL;
    plausible.then(|| Vtable {
        trailer: u32::try_from(trailer).ok(),
        ..vtable
    })
}

/// The vtables of 1.18 to 1.20 in a run: they lie one behind the other, with
/// nothing between them. Code refers to each one's first word, and to none of
/// the others.
fn without_offsets(run: &Run, referenced: &References) -> Vec<Vtable> {
    let functions = Layout::V18.functions();
    let is_start = |at: usize| referenced.contains(run.addr.wrapping_add(at as u64 * 8));
    (0..=run.functions.saturating_sub(functions))
        .filter(|at| run.functions - at >= functions && is_start(*at))
        .filter(|at| !(at + 1..at + functions).any(is_start))
        // The next one starts right behind, or the run ends, or something else
        // starts that code refers to.
        .filter(|at| at + functions == run.functions || is_start(at + functions))
        .map(|at| run.vtable(at, Layout::V18))
        .collect()
}

/// Addresses of the program's data that its code refers to.
struct References(Vec<u64>);

impl References {
    fn contains(&self, addr: Vaddr) -> bool {
        self.0.binary_search(&addr.0).is_ok()
    }

    fn find<R: ReadAt + ?Sized>(elf: &Elf, file: &R, data: &[Block]) -> References {
        let mut found = Vec::new();
        let mut left = MAX_CODE;
        let in_data = |addr: u64| {
            addr.is_multiple_of(8)
                && data.iter().any(|block| {
                    addr.checked_sub(block.addr.0)
                        .is_some_and(|delta| delta / 8 < block.words.len() as u64)
                })
        };
        // Where constants lie beside the code, some of them look like it.
        let parts: Vec<_> = match elf.section(".text") {
            Some(text) => vec![(text.vaddr, text.offset, text.size)],
            None => elf
                .segments
                .iter()
                .filter(|segment| segment.executable)
                .map(|segment| (segment.vaddr, segment.offset, segment.file_size))
                .collect(),
        };
        for (vaddr, offset, size) in parts {
            let len = size.min(left);
            left -= len;
            let mut at = 0;
            while at < len {
                // Chunks overlap by the longest pattern.
                let size = (CHUNK + 16).min(len - at);
                let (Some(offset), Some(addr)) = (offset.checked_add(at), vaddr.checked_add(at))
                else {
                    break;
                };
                let Ok(bytes) = file.bytes_at(offset, size) else {
                    break;
                };
                let mut add = |target: u64| {
                    if in_data(target) {
                        found.push(target);
                    }
                };
                match elf.arch {
                    Arch::X86_64 => references_x86_64(&bytes, addr.0, &mut add),
                    Arch::Aarch64 => references_aarch64(&bytes, addr, &mut add),
                }
                if !elf.position_independent && elf.arch == Arch::X86_64 {
                    references_absolute(&bytes, &mut add);
                }
                at += CHUNK;
            }
        }
        found.sort_unstable();
        found.dedup();
        References(found)
    }
}

/// `lea r64, [rip + disp32]`: REX.W with or without REX.R, 8d, ModRM of mode 0
/// and base 5.
fn references_x86_64(bytes: &[u8], addr: u64, add: &mut impl FnMut(u64)) {
    for (at, window) in bytes.windows(7).enumerate() {
        if matches!(window[0], 0x48 | 0x4c) && window[1] == 0x8d && window[2] & 0xc7 == 5 {
            let disp = i32::from_le_bytes([window[3], window[4], window[5], window[6]]);
            let next = addr.wrapping_add(at as u64 + 7);
            add(next.wrapping_add_signed(i64::from(disp)));
        }
    }
}

/// What programs that are not position-independent do instead:
/// `mov r32, imm32`, `mov r/m64, imm32` (REX.W c7) with any operand.
fn references_absolute(bytes: &[u8], add: &mut impl FnMut(u64)) {
    for (at, window) in bytes.windows(5).enumerate() {
        let immediate = |at: usize| {
            let word: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
            Some(u64::from(u32::from_le_bytes(word)))
        };
        let opcode = window[0];
        if (0xb8..=0xbf).contains(&opcode)
            && let Some(value) = immediate(at + 1)
        {
            add(value);
        }
        // REX.W c7 /0: ModRM, then SIB and displacement of 0, 1 or 4 bytes.
        if matches!(opcode, 0x48 | 0x49) && window[1] == 0xc7 && window[2] >> 3 & 7 == 0 {
            let sib = usize::from(window[2] & 7 == 4 && window[2] >> 6 != 3);
            let disp = match window[2] >> 6 {
                1 => 1,
                2 => 4,
                _ => 0,
            };
            if let Some(value) = immediate(at + 3 + sib + disp) {
                add(value);
            }
        }
    }
}

/// `adrp xN, page`, and then `add xM, xN, #offset`; or `adr xN, address`, which
/// linkers (lld, mold) put in their place where it reaches.
fn references_aarch64(bytes: &[u8], addr: Vaddr, add: &mut impl FnMut(u64)) {
    let mut addresses = Addresses::new(Arch::Aarch64);
    for instruction in disasm::aarch64::decode(addr, bytes) {
        if let Some(Named::Address(addr)) = addresses.step(&instruction) {
            add(addr.0);
        }
    }
}

/// What the program's constants say of tokio.
#[derive(Default)]
struct Said {
    /// It has some of tokio.
    tokio: bool,
    /// It has some of tokio's runtime.
    runtime: bool,
    /// It has what spawns tasks.
    spawns: bool,
    version: Option<Version>,
}

impl Said {
    fn of<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Said {
        /// Longest path that chunks overlap by.
        const LONGEST: u64 = 256;
        let mut said = Said::default();
        let mut left = MAX_CONSTANTS;
        // Where there are no sections, constants and code are told apart by
        // segment only.
        let parts: Vec<(u64, u64)> = match elf.section(".rodata") {
            Some(section) => vec![(section.offset.0, section.size)],
            None => elf
                .segments
                .iter()
                .filter(|segment| !segment.writable)
                .map(|segment| (segment.offset.0, segment.file_size))
                .collect(),
        };
        for (offset, size) in parts {
            let size = size.min(left);
            left -= size;
            let mut at = 0;
            while at < size {
                let len = (CHUNK + LONGEST).min(size - at);
                let offset = crate::binary::addr::FileOffset(offset + at);
                let Ok(bytes) = file.bytes_at(offset, len) else {
                    break;
                };
                said.read(&bytes);
                at += CHUNK;
            }
        }
        said
    }

    /// Reads paths like `.../tokio-1.44.2/src/runtime/task/core.rs`, or
    /// `vendor/tokio/src/...`.
    fn read(&mut self, bytes: &[u8]) {
        for at in memchr::memmem::find_iter(bytes, b"tokio") {
            let mut rest = &bytes[at + 5..];
            let mut version = None;
            if let Some(numbers) = rest.strip_prefix(b"-1.")
                && let Some((minor, behind)) = number(numbers)
                && let Some(patch) = behind.strip_prefix(b".")
                && let Some((patch, behind)) = number(patch)
            {
                version = Some(Version { minor, patch });
                rest = behind;
            }
            let Some(path) = rest.strip_prefix(b"/src/") else {
                continue;
            };
            self.tokio = true;
            self.runtime |= path.starts_with(b"runtime/");
            self.spawns |= path.starts_with(b"runtime/task/")
                || path.starts_with(b"runtime/scheduler/")
                || path.starts_with(b"runtime/thread_pool/");
            self.version = self.version.or(version);
        }
    }
}

/// The decimal number that `bytes` start with, and what follows.
fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let len = bytes
        .iter()
        .take(6)
        .take_while(|b| b.is_ascii_digit())
        .count();
    let number = std::str::from_utf8(&bytes[..len]).ok()?.parse().ok()?;
    Some((number, &bytes[len..]))
}

#[cfg(test)]
mod tests;
