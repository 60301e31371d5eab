//! A Go program, opened: its version, tables and layout, and the way from a
//! program counter to a source position.

use std::borrow::Cow;
use std::fs::File;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::binary::addr::{FileOffset, LoadBias, RuntimeAddr, Vaddr};
use crate::binary::elf::{Arch, Elf, ElfError, ReadAt};
use crate::process::memory::{Memory, MemoryError};

use super::buildinfo::{self, BuildInfo, Version};
use super::layout::{self, Layout};
use super::pclntab::{Function, FunctionData, Pclntab, TextOffset};
use super::variables::Functions;

/// Bytes read at a time when the target's data is searched.
const CHUNK: usize = 1 << 20;

/// Packages whose functions are looked up by name: those that make, park and
/// end goroutines.
const PACKAGES: [&[u8]; 7] = [
    b"runtime.",
    b"sync.",
    b"reflect.",
    b"internal/sync.",
    b"internal/poll.",
    // Where the atomic operations are not inlined; renamed in 1.23.
    b"internal/runtime/atomic.",
    b"runtime/internal/atomic.",
];

/// Longest name of such a function that is looked up.
const MAX_NAME: usize = 1024;

/// Most functions that are looked up by name; a program has some thousand.
const MAX_FUNCTIONS: usize = 1 << 16;

/// Most places at which a pclntab is believed to start.
const MAX_CANDIDATES: usize = 64;

/// Bytes of a program that are searched for a table: its data, of which the
/// largest programs have some 100 MB.
const MAX_SEARCHED: u64 = 2 << 30;

/// Largest pclntab that is read. The largest programs have 200 MB.
const MAX_PCLNTAB: u64 = 512 << 20;

/// Most wait reasons that a runtime is believed to have; 1.27 has 47.
const MAX_WAIT_REASONS: usize = 128;

/// Why a program's goroutines cannot be read. Its threads still can be.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    /// Not Go.
    #[error("not a Go program")]
    NotGo,
    /// The file is none that leakmon can read.
    #[error("its executable is {0}")]
    Elf(#[from] ElfError),
    /// Go before 1.18.
    #[error("built by Go 1.17 or older; leakmon reads Go 1.{old} to 1.{new}", old = layout::OLDEST, new = layout::NEWEST)]
    TooOld,
    /// A version whose layout nobody has checked.
    #[error("built by {0}, whose layout this leakmon does not know (it reads Go 1.{old} to 1.{new}); a newer leakmon may", old = layout::OLDEST, new = layout::NEWEST)]
    UnknownVersion(String),
    /// garble, or something like it.
    #[error(
        "obfuscated (it looks like garble): its function table is encrypted; build it without garble"
    )]
    Garbled,
    /// Its version says Go, but what the version promises is not there.
    #[error("{0}; please report this binary's Go version and how it was built")]
    Unproven(String),
    /// Memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn unproven(what: impl Into<String>) -> Refusal {
    Refusal::Unproven(what.into())
}

/// What a Go executable says of itself, whatever process runs it.
#[derive(Debug)]
pub struct Program {
    /// ELF headers.
    pub elf: Elf,
    /// The file.
    pub file: Arc<File>,
    /// Which Go built it.
    pub version: Version,
    /// Offsets of that version.
    pub layout: Layout,
    /// Functions and lines.
    pub table: Pclntab,
    /// `moduledata.text`.
    pub text: Vaddr,
    /// `moduledata.etext`.
    pub text_end: Vaddr,
    /// `moduledata.gofunc`.
    gofunc: Vaddr,
    /// `runtime.waitReasonStrings`.
    wait_reasons: Vec<Arc<str>>,
    /// The functions of the runtime and of sync, by name.
    runtime_functions: FxHashMap<Box<str>, Function>,
}

/// The inline trees are read from the file where they are asked for.
impl FunctionData for Program {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Option<()> {
        let at = self.elf.file_offset(self.gofunc.checked_add(offset)?)?;
        self.file.read_exact_at(at.0, buf).ok()
    }
}

impl Program {
    /// Reads the executable `file`, which a process has loaded with `bias` and
    /// whose memory is `memory`.
    ///
    /// # Errors
    /// [`Refusal`] says why its goroutines cannot be read.
    pub fn open<M: Memory>(
        file: File,
        elf: Elf,
        bias: LoadBias,
        memory: &M,
    ) -> Result<Program, Refusal> {
        let version = match buildinfo::read(&elf, &file)? {
            BuildInfo::Version(version) => version,
            BuildInfo::Old => return Err(Refusal::TooOld),
            BuildInfo::Unintelligible(text) if text.is_empty() || text == "unknown" => {
                return Err(Refusal::Garbled);
            }
            BuildInfo::Unintelligible(text) => return Err(Refusal::UnknownVersion(text)),
            BuildInfo::Absent => {
                // Only Go's linker writes a Go build id, and only an obfuscator
                // removes the build info but not it.
                let go = elf.section(".note.go.buildid").is_some()
                    || elf.section(".gopclntab").is_some();
                return Err(if go { Refusal::Garbled } else { Refusal::NotGo });
            }
        };
        let layout = Layout::of(&version).ok_or_else(|| match version.minor < layout::OLDEST {
            true => Refusal::TooOld,
            false => Refusal::UnknownVersion(version.text.clone()),
        })?;
        if elf.arch != Arch::NATIVE {
            return Err(unproven("made for another architecture"));
        }
        let candidates = pclntab_candidates(&elf, &file)?;
        if candidates.is_empty() {
            // garble changes the table's magic.
            return Err(Refusal::Garbled);
        }
        let found = search_data(&elf, bias, memory, &candidates)?;
        let moduledata = found
            .moduledata
            .ok_or_else(|| unproven("its runtime.firstmoduledata was not found"))?;
        let word = |offset: u64| memory.u64_at(moduledata.addr.wrapping_add(offset));
        let text = bias.vaddr(RuntimeAddr(word(layout::MODULEDATA_TEXT)?));
        let text_end = bias.vaddr(RuntimeAddr(word(layout::MODULEDATA_TEXT + 8)?));
        let gofunc = bias.vaddr(RuntimeAddr(word(layout.moduledata_gofunc)?));
        let text_sections = word(layout.moduledata_textsectmap + 8)?;
        if text_sections > 1 {
            return Err(unproven("its text is split into several sections"));
        }
        // pclntable is the table's last part: it says where the table ends.
        let functions = RuntimeAddr(word(layout::MODULEDATA_PCLNTABLE)?);
        let end = functions.wrapping_add(word(layout::MODULEDATA_PCLNTABLE + 8)?);
        let len = bias
            .vaddr(end)
            .offset_from(moduledata.pclntab)
            .ok_or_else(|| unproven("runtime.firstmoduledata contradicts itself"))?;
        if len > MAX_PCLNTAB {
            return Err(unproven(format!("its function table has {len} bytes")));
        }
        let table = elf
            .read(&file, moduledata.pclntab, len)
            .ok()
            .and_then(|bytes| Pclntab::parse(bytes, elf.arch))
            .ok_or(Refusal::Garbled)?;
        let executable = |vaddr: Vaddr| {
            elf.segments.iter().any(|s| {
                s.executable && vaddr.offset_from(s.vaddr).is_some_and(|d| d <= s.mem_size)
            })
        };
        if !executable(text) || !executable(text_end) || text_end <= text {
            return Err(unproven(
                "runtime.firstmoduledata.text lies outside of its code",
            ));
        }
        if elf.file_offset(gofunc).is_none() {
            return Err(unproven(
                "runtime.firstmoduledata.gofunc lies outside of the program",
            ));
        }
        let wait_reasons = found
            .wait_reasons
            .ok_or_else(|| unproven("its table of wait reasons was not found"))?;
        let mut program = Program {
            elf,
            file: Arc::new(file),
            version,
            layout,
            table,
            text,
            text_end,
            gofunc,
            wait_reasons,
            runtime_functions: FxHashMap::default(),
        };
        program.index_runtime()?;
        Ok(program)
    }

    /// Indexes the runtime's functions, and proves by the way that the table
    /// is what the version promises.
    fn index_runtime(&mut self) -> Result<(), Refusal> {
        let mut last_id = 0;
        for function in self.table.functions() {
            let Some(name) = self.table.name(function) else {
                continue;
            };
            last_id = last_id.max(self.table.func_id(function).unwrap_or(0));
            if name.len() > MAX_NAME || self.runtime_functions.len() >= MAX_FUNCTIONS {
                continue;
            }
            if !PACKAGES.iter().any(|package| name.starts_with(package)) {
                continue;
            }
            let Ok(name) = std::str::from_utf8(name) else {
                continue;
            };
            // A function and its wrapper for the other calling convention have
            // the same name: the function is meant.
            if self.table.func_id(function) == Some(self.layout.func_id_wrapper) {
                self.runtime_functions
                    .entry(name.into())
                    .or_insert(function);
            } else {
                self.runtime_functions.insert(name.into(), function);
            }
        }
        // garble keeps the names of the runtime readable, or else hides them;
        // it always encrypts the entries.
        if !self.runtime_functions.contains_key("runtime.goexit")
            || !self.runtime_functions.contains_key("runtime.newproc1")
        {
            return Err(Refusal::Garbled);
        }
        if last_id > self.layout.func_id_wrapper {
            return Err(unproven(
                "its function table has kinds that its version does not know",
            ));
        }
        Ok(())
    }

    /// The words of `g.waitreason` number `reason`; `None` for a number that
    /// this runtime does not have.
    pub fn wait_reason(&self, reason: u8) -> Option<&Arc<str>> {
        self.wait_reasons.get(usize::from(reason))
    }

    /// The words of `g.waitreason` number `reason`, or the number itself.
    pub fn wait_reason_or_number(&self, reason: u8) -> Arc<str> {
        self.wait_reason(reason)
            .map_or_else(|| format!("wait reason {reason}").into(), Arc::clone)
    }

    /// Every wait reason, by number.
    pub fn wait_reasons(&self) -> &[Arc<str>] {
        &self.wait_reasons
    }

    /// The function of the runtime or of sync called `name`.
    pub fn runtime_function(&self, name: &str) -> Option<Function> {
        self.runtime_functions.get(name).copied()
    }

    /// Where a function's code lies.
    pub fn vaddr(&self, offset: TextOffset) -> Vaddr {
        self.text.wrapping_add(u64::from(offset.0))
    }

    /// The text offset of an address, when it lies in Go's text.
    pub fn text_offset(&self, vaddr: Vaddr) -> Option<TextOffset> {
        if vaddr >= self.text_end {
            return None;
        }
        u32::try_from(vaddr.offset_from(self.text)?)
            .ok()
            .map(TextOffset)
    }

    /// The code of a function, up to the start of the next.
    pub fn code(&self, function: Function) -> Option<Vec<u8>> {
        // No function is that long; the table of a hostile file may say so.
        const MAX_CODE: u64 = 16 << 20;
        let end = self.table.end(function)?;
        let len = u64::from(end.0.checked_sub(function.entry.0)?);
        let vaddr = self.vaddr(function.entry);
        (len <= MAX_CODE).then(|| self.elf.read(&self.file, vaddr, len).ok())?
    }

    /// Where a probe at `vaddr` is attached.
    pub fn file_offset(&self, vaddr: Vaddr) -> Option<FileOffset> {
        self.elf.file_offset(vaddr)
    }
}

impl Functions for Program {
    fn entry(&self, name: &str) -> Option<Vaddr> {
        Some(self.vaddr(self.runtime_function(name)?.entry))
    }

    fn code(&self, name: &str) -> Option<(Vaddr, Cow<'_, [u8]>)> {
        let function = self.runtime_function(name)?;
        Some((
            self.vaddr(function.entry),
            Program::code(self, function)?.into(),
        ))
    }

    fn containing(&self, addr: Vaddr) -> Option<(&str, Vaddr)> {
        let function = self.table.function(self.text_offset(addr)?)?;
        let name = std::str::from_utf8(self.table.name(function)?).ok()?;
        Some((name, self.vaddr(function.entry)))
    }
}

/// Where a pclntab may start: what the section says, or else every place that
/// holds a sane header.
fn pclntab_candidates(elf: &Elf, file: &File) -> Result<Vec<Vaddr>, ElfError> {
    const NAMES: [&str; 2] = [".gopclntab", ".data.rel.ro.gopclntab"];
    const HEADER: u64 = 72;
    let sane = |vaddr: Vaddr| {
        elf.read(file, vaddr, HEADER)
            .is_ok_and(|b| Pclntab::is_header(&b, elf.arch))
    };
    if let Some(section) = NAMES.iter().find_map(|name| elf.section(name)) {
        if sane(section.vaddr) {
            return Ok(vec![section.vaddr]);
        }
        return Ok(Vec::new());
    }
    // A stripped cgo PIE up to Go 1.24 has no section of its own for it. The
    // linker aligns the table to 32 bytes.
    const ALIGN: usize = 32;
    let mut found = Vec::new();
    let mut searched = 0;
    for segment in elf.segments.iter().filter(|s| !s.executable || s.writable) {
        let mut at = 0;
        while at < segment.file_size && searched < MAX_SEARCHED {
            let len = (segment.file_size - at).min(CHUNK as u64);
            let base = segment.vaddr.wrapping_add(at);
            let bytes = elf.read(file, base, len)?;
            let skip = (ALIGN as u64 - base.0 % ALIGN as u64) % ALIGN as u64;
            for i in (skip as usize..bytes.len()).step_by(ALIGN) {
                // Every magic ends in these three bytes.
                if bytes[i..].get(1..4) == Some(&[0xff; 3]) {
                    let vaddr = base.wrapping_add(i as u64);
                    if found.len() < MAX_CANDIDATES && sane(vaddr) {
                        found.push(vaddr);
                    }
                }
            }
            at += len;
            searched += len;
        }
    }
    Ok(found)
}

struct Moduledata {
    addr: RuntimeAddr,
    pclntab: Vaddr,
}

#[derive(Default)]
struct Found {
    moduledata: Option<Moduledata>,
    wait_reasons: Option<Vec<Arc<str>>>,
}

/// Looks through the target's own data, where every pointer is relocated, for
/// the two tables that no symbol leads to in a stripped program.
///
/// - `runtime.firstmoduledata` is what starts with the addresses of the
///   pclntab and of its table of function names.
/// - `runtime.waitReasonStrings` is the array of strings in which "GC assist
///   marking" is followed by "IO wait": they are its second and third in every
///   version, while later ones were renumbered in 1.26.
fn search_data<M: Memory>(
    elf: &Elf,
    bias: LoadBias,
    memory: &M,
    candidates: &[Vaddr],
) -> Result<Found, Refusal> {
    /// Length of the first name of the wait reasons, and of the one behind it.
    const FIRST: u64 = "GC assist marking".len() as u64;
    const SECOND: u64 = "IO wait".len() as u64;
    let names = |vaddr: Vaddr| {
        // The header's word at 32 is the distance to the names.
        let offset = memory.u64_at(bias.runtime(vaddr).wrapping_add(32)).ok()?;
        Some((
            bias.runtime(vaddr).0,
            bias.runtime(vaddr).0.wrapping_add(offset),
            vaddr,
        ))
    };
    let tables: Vec<(u64, u64, Vaddr)> = candidates.iter().filter_map(|c| names(*c)).collect();
    let mut found = Found::default();
    let mut buf = Vec::new();
    let (mut searched, mut tried) = (0, 0);
    for segment in elf.segments.iter().filter(|s| s.writable) {
        let size = segment.file_size.min(segment.mem_size);
        let mut at = 0;
        while at < size && searched < MAX_SEARCHED {
            // Consecutive chunks overlap by what the longest pattern needs.
            let len = (size - at).min(CHUNK as u64 + 32) as usize;
            let base = bias.runtime(segment.vaddr.wrapping_add(at));
            buf.resize(len, 0);
            memory.read(base, &mut buf)?;
            let words: Vec<u64> = buf
                .chunks_exact(8)
                .filter_map(|w| Some(u64::from_le_bytes(w.try_into().ok()?)))
                .collect();
            for (i, window) in words.windows(4).enumerate() {
                let addr = base.wrapping_add(i as u64 * 8);
                if found.moduledata.is_none()
                    && let Some(table) =
                        tables.iter().find(|t| t.0 == window[0] && t.1 == window[1])
                {
                    found.moduledata = Some(Moduledata {
                        addr,
                        pclntab: table.2,
                    });
                }
                if window[1] == FIRST
                    && window[3] == SECOND
                    && found.wait_reasons.is_none()
                    && tried < MAX_CANDIDATES
                {
                    tried += 1;
                    let first = memory.bytes(RuntimeAddr(window[0]), FIRST as usize);
                    let second = memory.bytes(RuntimeAddr(window[2]), SECOND as usize);
                    if first.as_deref() == Ok(b"GC assist marking")
                        && second.as_deref() == Ok(b"IO wait")
                    {
                        found.wait_reasons = Some(wait_reasons(memory, addr));
                    }
                }
            }
            if found.moduledata.is_some() && found.wait_reasons.is_some() {
                return Ok(found);
            }
            at += CHUNK as u64;
            searched += CHUNK as u64;
        }
    }
    Ok(found)
}

/// The strings of `runtime.waitReasonStrings`, whose second is at `second`.
/// The first is empty.
fn wait_reasons<M: Memory>(memory: &M, second: RuntimeAddr) -> Vec<Arc<str>> {
    let mut reasons: Vec<Arc<str>> = vec!["".into()];
    while reasons.len() < MAX_WAIT_REASONS {
        let header = second.wrapping_add((reasons.len() as u64 - 1) * 16);
        let string = memory
            .u64_at(header)
            .ok()
            .zip(memory.u64_at(header.wrapping_add(8)).ok());
        let text = string
            .filter(|(_, len)| (1..=64).contains(len))
            .and_then(|(at, len)| {
                let bytes = memory.bytes(RuntimeAddr(at), len as usize).ok()?;
                String::from_utf8(bytes).ok()
            });
        match text {
            // What lies behind the array may look like a string, too; numbers
            // that high are never asked for.
            Some(text) if text.bytes().all(|b| (b' '..=b'~').contains(&b)) => {
                reasons.push(text.into());
            }
            _ => break,
        }
    }
    reasons
}
