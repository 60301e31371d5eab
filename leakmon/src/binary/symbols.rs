//! Names and lines of native code: symbol tables, demangled, and DWARF.

use std::sync::Arc;

use addr2line::Context;
use gimli::{Dwarf, EndianArcSlice, LittleEndian, SectionId};
use object::elf::{STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, Sym64};
use object::pod;

use super::addr::Vaddr;
use super::elf::{Elf, ReadAt};

const LE: object::LittleEndian = object::LittleEndian;

/// Most bytes of a symbol table or of its names that are read. A debug build
/// of Chromium's names take 300 MB; LLVM's 40 MB.
const MAX_TABLE: u64 = 64 << 20;

/// Most bytes of DWARF that are read of one file.
const MAX_DWARF: u64 = 256 << 20;

/// Longest mangled name that is demangled, and longest name that is shown.
/// Types nest: a mangled name can stand for one that is exponentially longer.
const MAX_NAME: usize = 4096;

/// A function of a symbol table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Function {
    start: u64,
    /// Bytes; 0 when the table does not say.
    size: u64,
    /// Where its name starts in [`Symbols::names`].
    name: usize,
}

/// The functions of one file, by address.
#[derive(Debug, Default)]
pub struct Symbols {
    functions: Vec<Function>,
    /// Further mangled names of some of these: compilers and linkers keep one copy
    /// of functions with the same code.
    folded: Vec<Function>,
    names: Vec<u8>,
}

impl Symbols {
    /// The functions that `.symtab` and `.dynsym` name.
    pub fn read<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Symbols {
        let mut symbols = Symbols::default();
        for (table, names) in [(".symtab", ".strtab"), (".dynsym", ".dynstr")] {
            symbols.add(elf, file, table, names);
        }
        symbols
            .functions
            .sort_by_key(|function| (function.start, std::cmp::Reverse(function.size)));
        let mut functions = std::mem::take(&mut symbols.functions);
        // Of several names the plainest: `pthread_mutex_lock` rather than
        // `___pthread_mutex_lock`.
        functions.sort_by(|a, b| {
            (a.start, symbols.ugliness(a.name)).cmp(&(b.start, symbols.ugliness(b.name)))
        });
        let mut folded = Vec::new();
        functions.dedup_by(|later, first| {
            let same = later.start == first.start;
            if same {
                first.size = first.size.max(later.size);
                if is_mangled(symbols.raw(later.name)) && is_mangled(symbols.raw(first.name)) {
                    folded.push(*later);
                }
            }
            same
        });
        symbols.functions = functions;
        symbols.folded = folded;
        symbols
    }

    fn add<R: ReadAt + ?Sized>(&mut self, elf: &Elf, file: &R, table: &str, names: &str) {
        let section = |name: &str| {
            let section = elf.section(name)?;
            if section.size > MAX_TABLE {
                return None;
            }
            file.bytes_at(section.offset, section.size).ok()
        };
        let (Some(table), Some(names)) = (section(table), section(names)) else {
            return;
        };
        let count = table.len() / size_of::<Sym64<object::LittleEndian>>();
        let Ok((entries, _)) = pod::slice_from_bytes::<Sym64<object::LittleEndian>>(&table, count)
        else {
            return;
        };
        let base = self.names.len();
        for entry in entries {
            let kind = entry.st_type();
            let code = kind == STT_FUNC || kind == STT_GNU_IFUNC;
            let start = entry.st_value.get(LE);
            // Assembly often leaves out the type.
            let plain = kind == STT_NOTYPE && entry.st_size.get(LE) > 0;
            let name = entry.st_name.get(LE) as usize;
            if (code || plain)
                && start != 0
                && entry.st_shndx.get(LE).0 != 0
                && names.get(name).is_some_and(|byte| *byte != 0)
            {
                self.functions.push(Function {
                    start,
                    size: entry.st_size.get(LE),
                    name: base + name,
                });
            }
        }
        self.names.extend_from_slice(&names);
        // So that the last name of a damaged table ends.
        self.names.push(0);
    }

    fn raw(&self, at: usize) -> &[u8] {
        let rest = self.names.get(at..).unwrap_or_default();
        let end = rest.iter().position(|byte| *byte == 0);
        &rest[..end.unwrap_or(rest.len())]
    }

    fn ugliness(&self, at: usize) -> (usize, usize, &[u8]) {
        let name = self.raw(at);
        let lines = match is_mangled(name) {
            true => 0,
            false => name.iter().take_while(|byte| **byte == b'_').count(),
        };
        (lines, name.len(), name)
    }

    /// The function that holds `at`: its name, demangled, and its start. Where
    /// several functions have been folded into one, all of them are named. One
    /// whose size the table leaves out reaches as far as `limit`, the start of
    /// what unwind information says it is.
    pub fn function(&self, at: Vaddr, start: Option<Vaddr>) -> Option<(String, Vaddr)> {
        let before = self
            .functions
            .partition_point(|function| function.start <= at.0);
        let function = self.functions.get(before.checked_sub(1)?)?;
        let within = match function.size {
            0 => start.is_some_and(|start| start.0 == function.start),
            size => at.0 - function.start < size,
        };
        within.then(|| (self.name(function), Vaddr(function.start)))
    }

    fn name(&self, function: &Function) -> String {
        /// Names that are told of one function.
        const MOST: usize = 4;
        let demangled = |at: usize| demangle(&String::from_utf8_lossy(self.raw(at)));
        let mut name = demangled(function.name);
        let first = self
            .folded
            .partition_point(|folded| folded.start < function.start);
        let mut told = vec![name.clone()];
        for folded in self.folded[first..]
            .iter()
            .take_while(|folded| folded.start == function.start)
        {
            let other = demangled(folded.name);
            if told.contains(&other) {
                continue;
            }
            if told.len() == MOST {
                name.push_str(" or others");
                break;
            }
            name.push_str(" or ");
            name.push_str(&other);
            told.push(other);
        }
        name
    }

    /// Where the function with this very name starts.
    pub fn named(&self, name: &str) -> Option<Vaddr> {
        // Of several names only the plainest is kept, by `ugliness`.
        self.functions
            .iter()
            .find(|function| self.raw(function.name) == name.as_bytes())
            .map(|function| Vaddr(function.start))
    }

    /// The functions whose name in the file, not demangled, is `wanted`: name,
    /// start, and size in bytes (0 when the table does not say).
    pub fn all<'a>(
        &'a self,
        wanted: impl Fn(&[u8]) -> bool + 'a,
    ) -> impl Iterator<Item = (&'a [u8], Vaddr, u64)> {
        self.functions.iter().filter_map(move |function| {
            let name = self.raw(function.name);
            wanted(name).then_some((name, Vaddr(function.start), function.size))
        })
    }

    /// How many functions have a name.
    pub fn len(&self) -> usize {
        self.functions.len()
    }

    /// Whether no function has one.
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }
}

/// Whether a name is Rust's or C++'s: of such no two are of one function.
fn is_mangled(name: &[u8]) -> bool {
    matches!(name, [b'_', b'Z' | b'R', ..])
}

/// A name as its source has it: Rust's without their hashes, C++'s, or the name
/// itself.
pub fn demangle(name: &str) -> String {
    let cut = |mut text: String| {
        if text.len() > MAX_NAME {
            let end = (0..=MAX_NAME).rev().find(|end| text.is_char_boundary(*end));
            text.truncate(end.unwrap_or(0));
            text.push('…');
        }
        text
    };
    if name.len() > MAX_NAME {
        return cut(name.to_owned());
    }
    // What LLVM appends to the copies that it makes.
    let plain = name.split(".llvm.").next().unwrap_or(name);
    if let Ok(rust) = rustc_demangle::try_demangle(plain) {
        return cut(format!("{rust:#}"));
    }
    if plain.starts_with("_Z")
        && let Ok(symbol) = cpp_demangle::Symbol::new(plain)
        && let Ok(text) = symbol.demangle()
    {
        return cut(text);
    }
    cut(name.to_owned())
}

/// A source position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The function, demangled; `None` where DWARF does not name it.
    pub function: Option<String>,
    /// The source file; empty when unknown.
    pub file: String,
    /// The line; 0 when unknown.
    pub line: u32,
    /// The call was inlined into the next position.
    pub inlined: bool,
}

/// The lines of one file.
pub struct Lines {
    context: Context<EndianArcSlice<LittleEndian>>,
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines").finish_non_exhaustive()
    }
}

impl Lines {
    /// The DWARF of `file`; `None` when it has none, or more than is read.
    pub fn read<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Option<Lines> {
        let wanted = |name: &str| name.starts_with(".debug_") || name.starts_with(".zdebug_");
        let size: u64 = elf
            .sections
            .iter()
            .filter(|section| wanted(&section.name))
            .try_fold(0u64, |sum, section| sum.checked_add(section.size))?;
        if size == 0 || size > MAX_DWARF || elf.section(".debug_line").is_none() {
            return None;
        }
        let load = |id: SectionId| -> Result<EndianArcSlice<LittleEndian>, gimli::Error> {
            let bytes = elf
                .section(id.name())
                .and_then(|section| file.bytes_at(section.offset, section.size).ok())
                .unwrap_or_default();
            Ok(EndianArcSlice::new(Arc::from(bytes), LittleEndian))
        };
        let dwarf = Dwarf::load(load).ok()?;
        Some(Lines {
            context: Context::from_dwarf(dwarf).ok()?,
        })
    }

    /// The positions of the instruction at `at`, innermost first.
    pub fn positions(&self, at: Vaddr) -> Vec<Position> {
        /// Most calls inlined into each other that are shown.
        const MAX: usize = 64;
        let mut found = Vec::new();
        let Ok(mut frames) = self.context.find_frames(at.0).skip_all_loads() else {
            return found;
        };
        while found.len() < MAX
            && let Ok(Some(frame)) = frames.next()
        {
            let function = frame
                .function
                .and_then(|name| Some(demangle(&name.raw_name().ok()?)));
            let location = frame.location;
            found.push(Position {
                function,
                file: location
                    .as_ref()
                    .and_then(|l| l.file)
                    .unwrap_or_default()
                    .to_owned(),
                line: location.and_then(|l| l.line).unwrap_or(0),
                inlined: true,
            });
        }
        if let Some(last) = found.last_mut() {
            last.inlined = false;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn names_of_three_languages() {
        for (mangled, plain) in [
            (
                "_ZN3std6thread4park17h0123456789abcdefE",
                "std::thread::park",
            ),
            ("_RNvC7mycrate3foo", "mycrate::foo"),
            ("_ZN3foo3barEv", "foo::bar()"),
            ("_ZN3foo3barEv.llvm.123", "foo::bar()"),
            ("pthread_mutex_lock", "pthread_mutex_lock"),
            ("_Z", "_Z"),
            ("", ""),
        ] {
            assert_eq!(demangle(mangled), plain);
        }
        assert!(demangle(&"x".repeat(1 << 20)).len() <= MAX_NAME + 4);
    }

    #[test]
    fn folded_functions_have_all_their_names() {
        let mut symbols = Symbols::default();
        let mut function = |start, name: &str| {
            let at = symbols.names.len();
            symbols.names.extend_from_slice(name.as_bytes());
            symbols.names.push(0);
            Function {
                start,
                size: 8,
                name: at,
            }
        };
        let one = function(8, "_RNvC1a3one");
        let two = function(8, "_RNvC1a3two");
        let again = function(8, "_ZN1a3one17h0123456789abcdefE");
        let alone = function(16, "_RNvC1a5alone");
        symbols.functions = vec![one, alone];
        symbols.folded = vec![again, two];
        let name = |at| symbols.function(Vaddr(at), None).map(|(name, _)| name);
        assert_eq!(name(9).as_deref(), Some("a::one or a::two"));
        assert_eq!(name(16).as_deref(), Some("a::alone"));
        symbols.folded = vec![two; 2];
        symbols.folded.extend((0..5).map(|i| Function {
            name: symbols.names.len() + i * 12,
            ..one
        }));
        for i in 0..5 {
            symbols
                .names
                .extend_from_slice(format!("_RNvC1a3no{i}\0").as_bytes());
        }
        assert_eq!(
            symbols.function(Vaddr(8), None).unwrap().0,
            "a::one or a::two or a::no0 or a::no1 or others"
        );
    }

    #[test]
    fn its_own_functions_have_names_and_lines() {
        let file = File::open("/proc/self/exe").unwrap();
        let elf = Elf::parse(&file).unwrap();
        let process = crate::process::identity::Process::open(std::process::id()).unwrap();
        let here = demangle as fn(&str) -> String as usize as u64;
        let at = process
            .load_bias(elf.entry)
            .vaddr(super::super::addr::RuntimeAddr(here));
        let symbols = Symbols::read(&elf, &file);
        let (name, start) = symbols.function(at, None).unwrap();
        assert_eq!(start, at);
        assert!(name.ends_with("symbols::demangle"), "{name}");
        assert_eq!(symbols.function(Vaddr(1), None), None);
        let lines = Lines::read(&elf, &file).unwrap();
        let positions = lines.positions(at);
        let last = positions.last().unwrap();
        assert!(last.file.ends_with("symbols.rs"), "{last:?}");
        assert!(last.line > 0 && !last.inlined);
        // (Near 0 lies what the linker threw away.)
        assert!(lines.positions(Vaddr(1 << 62)).is_empty());
    }
}
