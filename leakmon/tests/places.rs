//! Probe places and variables found by decoding, held against the symbol tables
//! of real Go programs.
//!
//! `LEAKMON_FIXTURES` names a directory; every ELF file below it that is a Go
//! program with symbols is examined. Without it there is nothing to do.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use leakmon::binary::addr::Vaddr;
use leakmon::binary::disasm::Code;
use leakmon::binary::elf::Arch;
use leakmon::runtime::go::places::{Places, Role};
use leakmon::runtime::go::variables::{Functions, Variables};
use object::{Object, ObjectSection, ObjectSymbol};

/// What a symbol table says.
struct Symbols<'a> {
    functions: BTreeMap<String, (u64, u64)>,
    by_entry: BTreeMap<u64, (String, u64)>,
    variables: BTreeMap<String, u64>,
    text: (u64, &'a [u8]),
}

impl<'a> Symbols<'a> {
    fn read(file: &object::File<'a>) -> Option<Symbols<'a>> {
        let text = file.section_by_name(".text")?;
        let mut symbols = Symbols {
            functions: BTreeMap::new(),
            by_entry: BTreeMap::new(),
            variables: BTreeMap::new(),
            text: (text.address(), text.data().ok()?),
        };
        for symbol in file.symbols() {
            let (Ok(name), place) = (symbol.name(), (symbol.address(), symbol.size())) else {
                continue;
            };
            if symbol.section_index() == Some(text.index()) && symbol.size() > 0 {
                let plain = name.strip_suffix(".abi0").unwrap_or(name);
                if plain == name {
                    symbols.functions.insert(name.to_owned(), place);
                } else {
                    symbols.functions.entry(plain.to_owned()).or_insert(place);
                }
                symbols
                    .by_entry
                    .insert(place.0, (plain.to_owned(), place.1));
            } else {
                symbols.variables.insert(name.to_owned(), place.0);
            }
        }
        symbols
            .functions
            .contains_key("runtime.newproc1")
            .then_some(symbols)
    }
}

impl Functions for Symbols<'_> {
    fn entry(&self, name: &str) -> Option<Vaddr> {
        self.functions.get(name).map(|&(entry, _)| Vaddr(entry))
    }

    fn code(&self, name: &str) -> Option<(Vaddr, Cow<'_, [u8]>)> {
        let &(entry, size) = self.functions.get(name)?;
        let start = entry.checked_sub(self.text.0)? as usize;
        let bytes = self.text.1.get(start..start + size as usize)?;
        Some((Vaddr(entry), Cow::Borrowed(bytes)))
    }

    fn containing(&self, addr: Vaddr) -> Option<(&str, Vaddr)> {
        let (&entry, (name, size)) = self.by_entry.range(..=addr.0).next_back()?;
        (addr.0 - entry < *size).then_some((name, Vaddr(entry)))
    }
}

fn files(directory: &Path, list: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&path, list),
            Ok(kind) if kind.is_file() => list.push(path),
            _ => {}
        }
    }
}

#[test]
fn found_by_decoding_is_what_the_symbols_say() {
    let directory = std::env::var_os("LEAKMON_FIXTURES")
        .expect("LEAKMON_FIXTURES names no fixtures: run `cargo xtask test`");
    let mut paths = Vec::new();
    files(Path::new(&directory), &mut paths);
    // Those of the other architecture lie beside this machine's, where they were built.
    let mut beside = directory.clone();
    beside.push("-aarch64");
    files(Path::new(&beside), &mut paths);
    paths.sort();
    let mut failures = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        let Ok(data) = std::fs::read(&path) else {
            continue;
        };
        let Ok(file) = object::File::parse(data.as_slice()) else {
            continue;
        };
        let architecture = match file.architecture() {
            object::Architecture::X86_64 => Arch::X86_64,
            object::Architecture::Aarch64 => Arch::Aarch64,
            _ => continue,
        };
        if let Some(symbols) = Symbols::read(&file) {
            let mut wrong = |what: String| failures.push(format!("{name}: {what}"));
            check(&name, architecture, &symbols, &mut wrong);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn check(file: &str, architecture: Arch, symbols: &Symbols<'_>, wrong: &mut impl FnMut(String)) {
    let mut line = String::new();
    match Variables::find(architecture, symbols) {
        Ok(found) => {
            for (name, addr) in [
                ("runtime.allgs", found.allgs),
                ("runtime.allgptr", found.allgptr),
                ("runtime.allglen", found.allglen),
                ("runtime.sched", found.sched),
            ] {
                if symbols.variables.get(name) != Some(&addr.0) {
                    wrong(format!("{name} is not at {addr}"));
                }
            }
            line += &format!(
                "atomicstatus {} ngsys {}",
                found.atomicstatus,
                found.ngsys.0 - found.sched.0
            );
        }
        Err(refused) => wrong(refused.to_string()),
    }

    let places = Places::find(architecture, symbols);
    let mut found = Vec::new();
    match places.lifecycle {
        Ok(list) => {
            for role in [Role::Spawn, Role::Exit] {
                let made = |role| match role {
                    Role::SpawnReturned => Role::Spawn,
                    role => role,
                };
                if !list.iter().any(|place| made(place.role) == role) {
                    wrong(format!("no place for {role:?}"));
                }
            }
            found.extend(list);
        }
        // Go 1.22 and 1.23 with a profile full of spawns.
        Err(refused) if refused.why.starts_with("newproc1 is inlined into it") => {
            line += &format!(" no lifecycle ({refused})");
        }
        Err(refused) => wrong(refused.to_string()),
    }
    match places.blocking {
        Ok(blocking) => {
            found.extend(blocking.places);
            if let Some(refused) = blocking.universal {
                line += &format!(" universal ({refused})");
            }
        }
        Err(refused) => wrong(refused.to_string()),
    }
    for place in &found {
        let Some((entry, code)) = symbols.code(place.function) else {
            wrong(format!("{} does not exist", place.function));
            continue;
        };
        let code = Code::decode(architecture, entry, &code);
        let emulated = code
            .index_of(place.vaddr)
            .is_some_and(|index| code.instructions()[index].emulated);
        if !emulated {
            wrong(format!("{} is not an emulated instruction", place.vaddr));
        }
        line += &format!(
            "\n    {} {:?} {}+{:#x}",
            place.vaddr,
            place.role,
            place.function,
            place.vaddr.0 - entry.0
        );
    }
    println!("{file}: {line}");
}
