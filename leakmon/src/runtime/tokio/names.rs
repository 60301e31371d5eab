//! What the tasks of a vtable are called.
//!
//! From best to worst:
//!
//! 1. the symbol of `poll`, which in Rust's v0 mangling has the future's type;
//! 2. the symbol of the cell's drop glue, which has it in either mangling:
//!    `drop_in_place<Box<Cell<T, S>>>`, called by the vtable's `dealloc` and
//!    `drop_abort_handle`. Not where that of several types was folded into one;
//! 3. the first function of the program itself that `poll` calls: with a doubt,
//!    for where the compiler has put the future's own code into `poll` that
//!    may be one that it awaits;
//! 4. in a stripped program, the place in the source that `poll` gives to a
//!    panic: "`async fn` resumed after completion" is at the function itself;
//! 5. the names of all types whose drop glue was folded into one.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::binary::addr::Vaddr;
use crate::binary::disasm::addresses::{Addresses, Named};
use crate::binary::disasm::{Code, Instruction, Kind};
use crate::binary::elf::{Elf, ReadAt};
use crate::binary::symbols::Symbols;

use super::vtables::{self, Vtable};

/// How far calls are followed from `poll`: raw, harness, core, catch_unwind
/// and the closures in it.
const DEPTH: usize = 6;

/// How far calls are followed from `dealloc`.
const DROP_DEPTH: usize = 3;

/// Instructions between an argument and the call that it is for.
const NEAR: usize = 2;

/// Functions that are looked at for one vtable.
const MAX_FUNCTIONS: usize = 64;

/// Longest path of a source file that is believed.
const MAX_PATH: u64 = 4096;

/// The name of what a vtable's tasks run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// `app::serve::{{closure}}`, or what is known instead of it.
    pub function: Arc<str>,
    /// Source file; empty when it is not known.
    pub file: Arc<str>,
    /// Line in it, from 1; 0 when it is not known.
    pub line: u32,
    /// `poll`, which stands for all of the name.
    pub poll: Vaddr,
    /// Why it may be another task's.
    pub doubt: Option<Arc<str>>,
}

/// The names of `vtables`, in their order.
pub fn find<R: ReadAt + ?Sized>(elf: &Elf, file: &R, vtables: &[Vtable]) -> Vec<Arc<Name>> {
    let mut finder = Finder::new(elf, file);
    let drops: Vec<Vec<(Vaddr, String)>> = vtables
        .iter()
        .map(|vtable| {
            let mut dropped = finder.dropped(vtable.dealloc);
            dropped.extend(finder.dropped(vtable.drop_abort_handle));
            dropped.sort_unstable();
            dropped.dedup();
            dropped
        })
        .collect();
    let mut users: FxHashMap<Vaddr, usize> = FxHashMap::default();
    for (addr, _) in drops.iter().flatten() {
        *users.entry(*addr).or_default() += 1;
    }
    let mut polls: FxHashMap<Vaddr, usize> = FxHashMap::default();
    for vtable in vtables {
        *polls.entry(vtable.poll).or_default() += 1;
    }
    // All vtables of a name are one, whatever schedulers they are for.
    let mut first: FxHashMap<(Arc<str>, Arc<str>, u32), Vaddr> = FxHashMap::default();
    let mut names = Vec::with_capacity(vtables.len());
    for (vtable, drops) in vtables.iter().zip(&drops) {
        // What several vtables' drop glue was folded into says something where it
        // has the names of all: the linker leaves them, the compiler does not.
        let is_of_all = |(addr, futures): &&(Vaddr, String)| {
            users.get(addr) == Some(&futures.split(OR).count())
        };
        let dropped = drops.iter().find(is_of_all);
        let shared = polls.get(&vtable.poll).is_some_and(|users| *users > 1);
        let mut name = finder.name(vtable, dropped.map(|(_, future)| future.as_str()), shared);
        if !name.function.starts_with(UNNAMED) {
            let key = (
                Arc::clone(&name.function),
                Arc::clone(&name.file),
                name.line,
            );
            name.poll = *first.entry(key).or_insert(name.poll);
        }
        names.push(Arc::new(name));
    }
    names
}

/// What the name starts with of which nothing is known.
const UNNAMED: &str = "unnamed task";

/// What a function's code does that matters here.
#[derive(Clone, Debug, Default)]
pub(super) struct Function {
    /// Functions that it calls or jumps to, in the order of its code.
    pub(super) calls: Vec<Vaddr>,
    /// Addresses that it mentions.
    pub(super) mentions: Vec<Vaddr>,
    /// Functions that it calls, and what it mentions just before.
    pub(super) passes: Vec<(Vaddr, Vaddr)>,
    /// Whether this is all of its code.
    pub(super) is_complete: bool,
}

/// Looks into the functions of a program.
pub(super) struct Finder<'a, R: ?Sized> {
    elf: &'a Elf,
    file: &'a R,
    pub(super) starts: Vec<u64>,
    pub(super) symbols: Symbols,
    /// The words of the program's relocated constants.
    constants: vtables::Constants,
    functions: FxHashMap<Vaddr, Arc<Function>>,
}

/// A place in the source, `core::panic::Location`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Location {
    pub(super) file: String,
    pub(super) line: u32,
}

impl<'a, R: ReadAt + ?Sized> Finder<'a, R> {
    /// Of the program in `file`.
    pub(super) fn new(elf: &'a Elf, file: &'a R) -> Finder<'a, R> {
        Finder {
            elf,
            file,
            starts: vtables::function_starts(elf, file),
            symbols: Symbols::read(elf, file),
            constants: vtables::constants(elf, file),
            functions: FxHashMap::default(),
        }
    }

    fn name(&mut self, vtable: &Vtable, dropped: Option<&str>, shared: bool) -> Name {
        let location = self.location(vtable.poll);
        let (file, line) = match &location {
            Some(location) => (location.file.as_str(), location.line),
            None => ("", 0),
        };
        let name = |function: String, doubt: Option<&str>| Name {
            function: function.into(),
            file: file.into(),
            line,
            poll: vtable.poll,
            doubt: doubt.map(Into::into),
        };
        let folded = shared.then_some("several kinds of tasks have the same code");
        let of_poll = self.symbols.function(vtable.poll, Some(vtable.poll));
        if let Some((symbol, _)) = &of_poll
            && let Some(future) = argument(symbol, "::raw::poll::<")
        {
            return name(plain(future).to_owned(), folded);
        }
        if let Some(future) = dropped.filter(|futures| !futures.contains(OR)) {
            return name(future.to_owned(), folded);
        }
        if let Some(function) = self.called(vtable.poll) {
            let doubt = "by the first function that it calls";
            return name(function, Some(folded.unwrap_or(doubt)));
        }
        match (&location, dropped) {
            (Some(location), _) => {
                let function = format!("task at {}:{}", location.file, location.line);
                let doubt = "by the place of a panic in its code";
                name(function, Some(folded.unwrap_or(doubt)))
            }
            (None, Some(futures)) => {
                let doubt = "several kinds of tasks have the same drop code";
                name(futures.to_owned(), Some(folded.unwrap_or(doubt)))
            }
            (None, None) => {
                let why = match self.symbols.is_empty() {
                    true => " (stripped)",
                    false => "",
                };
                name(format!("{UNNAMED}, poll at {}{why}", vtable.poll), folded)
            }
        }
    }

    /// The functions whose symbols have the type of a task's future and that
    /// `dealloc` leads to, and that type.
    fn dropped(&mut self, dealloc: Vaddr) -> Vec<(Vaddr, String)> {
        let mut found = Vec::new();
        self.walk(dealloc, DROP_DEPTH, |finder, addr, _| {
            if let Some((symbol, _)) = finder.symbols.function(addr, Some(addr)) {
                found.extend(futures(&symbol).map(|futures| (addr, futures)));
            }
            // The rest is what the future holds.
            found.is_empty()
        });
        found
    }

    /// The first function of the program itself that `poll` leads to.
    fn called(&mut self, poll: Vaddr) -> Option<String> {
        let mut found = Vec::new();
        let mut level = usize::MAX;
        self.walk(poll, DEPTH, |finder, addr, depth| {
            if depth > level {
                return false;
            }
            let Some((symbol, _)) = finder.symbols.function(addr, Some(addr)) else {
                return false;
            };
            if is_library(&symbol) {
                // What tokio does around the future leads to it.
                return symbol.contains("::runtime::task::")
                    || symbol.contains("catch_unwind")
                    || symbol.contains("panicking::try")
                    || symbol.contains("call_once")
                    || symbol.contains("UnsafeCell");
            }
            if symbol.ends_with("{{closure}}")
                || symbol.ends_with("}")
                || symbol.ends_with("::poll")
            {
                level = depth;
                found.push(symbol);
            }
            false
        });
        found.dedup();
        match &found[..] {
            [one] => Some(one.trim_end_matches("::poll").to_owned()),
            _ => None,
        }
    }

    /// The shallowest place in the source, tokio's and the standard library's
    /// own aside, that `poll` leads to.
    fn location(&mut self, poll: Vaddr) -> Option<Location> {
        let mut found = BTreeSet::new();
        let mut resumed = BTreeSet::new();
        let mut level = usize::MAX;
        self.walk(poll, DEPTH, |finder, addr, depth| {
            if depth > level {
                return false;
            }
            let function = finder.function(addr);
            for mention in &function.mentions {
                let location = finder.read_location(*mention);
                let own = location.filter(|location| !is_library_path(&location.file));
                let Some(own) = own else {
                    continue;
                };
                let mut passes = function.passes.iter();
                if passes.any(|(to, what)| what == mention && finder.is_resumed(*to)) {
                    resumed.insert(own.clone());
                }
                found.insert(own);
                level = depth;
            }
            true
        });
        // Of several it is not known which is the future's own. Where there are
        // symbols, and they do not tell, the future is as simple as others are:
        // then it is the one of the `async fn` itself.
        let one = |found: BTreeSet<Location>| {
            let mut found = found.into_iter();
            found.next().filter(|_| found.next().is_none())
        };
        one(found).or_else(|| one(resumed))
    }

    /// Whether a function is the one that says that a future was polled which
    /// had ended.
    pub(super) fn is_resumed(&self, addr: Vaddr) -> bool {
        let symbol = self.symbols.function(addr, Some(addr));
        symbol.is_some_and(|(symbol, _)| symbol.contains("panic_const_async_fn_resumed"))
    }

    /// Visits `start` and what it calls, level by level, each once; what is
    /// called by a function only where `visit` says so.
    fn walk(
        &mut self,
        start: Vaddr,
        depth: usize,
        mut visit: impl FnMut(&mut Self, Vaddr, usize) -> bool,
    ) {
        let mut seen = FxHashSet::from_iter([start]);
        let mut level = vec![start];
        for depth in 0..=depth {
            let mut next = Vec::new();
            for addr in level {
                if !visit(self, addr, depth) {
                    continue;
                }
                for callee in &self.function(addr).calls {
                    if seen.len() < MAX_FUNCTIONS && seen.insert(*callee) {
                        next.push(*callee);
                    }
                }
            }
            level = next;
        }
    }

    pub(super) fn function(&mut self, addr: Vaddr) -> Arc<Function> {
        if let Some(function) = self.functions.get(&addr) {
            return Arc::clone(function);
        }
        let function = Arc::new(self.decode(addr).unwrap_or_default());
        self.functions.insert(addr, Arc::clone(&function));
        function
    }

    fn decode(&self, addr: Vaddr) -> Option<Function> {
        // Without bounds nothing is known of a function.
        let index = self.starts.binary_search(&addr.0).ok()?;
        let next = self.starts.get(index + 1..)?;
        let end = next.iter().find(|start| **start > addr.0)?;
        let len = (end - addr.0).min(crate::binary::disasm::MAX_CODE as u64);
        let bytes = self.elf.read(self.file, addr, len).ok()?;
        let code = Code::decode(self.elf.arch, addr, &bytes);
        let is_valid = |instruction: &Instruction| instruction.kind != Kind::Invalid;
        let mut function = Function {
            is_complete: len == end - addr.0 && code.instructions().iter().all(is_valid),
            ..Function::default()
        };
        // The address mentioned last, and how many instructions ago.
        let mut last = (Vaddr(0), usize::MAX);
        let mut addresses = Addresses::new(self.elf.arch);
        for instruction in code.instructions() {
            last.1 = last.1.saturating_add(1);
            if let Kind::Call(target) | Kind::Jump(target) | Kind::CondJump(target) =
                instruction.kind
                && (target < addr || target.0 >= *end)
            {
                function.calls.push(target);
                let passed = (last.1 <= NEAR).then_some((target, last.0));
                function.passes.extend(passed);
            }
            let named = addresses.step(instruction);
            if let Some(Named::Address(addr)) = named {
                function.mentions.push(addr);
                last = (addr, 0);
            }
            if let Some(Named::Memory(target)) = named {
                function.mentions.push(target);
                // Calls between crates go through a table, in debug builds by
                // way of a register.
                let callee = self.constants.word(target);
                if let Some(callee) =
                    callee.filter(|callee| self.starts.binary_search(callee).is_ok())
                {
                    match instruction.kind {
                        Kind::CallIndirect | Kind::JumpIndirect => {
                            function.calls.push(Vaddr(callee));
                            let passed = (last.1 <= NEAR).then_some((Vaddr(callee), last.0));
                            function.passes.extend(passed);
                        }
                        _ => function.mentions.push(Vaddr(callee)),
                    }
                }
            }
        }
        Some(function)
    }

    /// A `core::panic::Location` at `addr`: the file's name, pointer and
    /// length (from Rust 1.83 on with a zero that counts), line, column.
    pub(super) fn read_location(&self, addr: Vaddr) -> Option<Location> {
        let word = |index: u64| self.constants.word(addr.checked_add(index * 8)?);
        let (path, len, place) = (word(0)?, word(1)?, word(2)?);
        let (line, column) = (place as u32, (place >> 32) as u32);
        if !(4..=MAX_PATH).contains(&len) || line == 0 || column == 0 || column > 1 << 16 {
            return None;
        }
        let bytes = self.elf.read(self.file, Vaddr(path), len).ok()?;
        let file = String::from_utf8(bytes).ok()?;
        let file = file.trim_end_matches('\0').to_owned();
        (file.ends_with(".rs") && !file.contains(char::is_control))
            .then_some(Location { file, line })
    }
}

/// Between the names of functions that were folded into one.
const OR: &str = " or ";

/// The futures in the symbol of drop glue; `None` where it does not name all.
fn futures(symbol: &str) -> Option<String> {
    let future = |symbol| {
        let future = argument(symbol, "::task::core::Cell<");
        future.or_else(|| argument(symbol, "::raw::dealloc::<"))
    };
    let mut futures: Vec<&str> = symbol
        .split(OR)
        .map(|symbol| future(symbol).map(plain))
        .collect::<Option<_>>()?;
    futures.sort_unstable();
    futures.dedup();
    Some(futures.join(OR))
}

/// The first type argument behind `prefix`.
fn argument<'a>(symbol: &'a str, prefix: &str) -> Option<&'a str> {
    let (_, rest) = symbol.split_once(prefix)?;
    let mut depth = 0usize;
    let mut before = ' ';
    for (at, char) in rest.char_indices() {
        match char {
            '<' | '(' | '[' => depth += 1,
            // `->` closes nothing.
            '>' if before == '-' => {}
            '>' | ')' | ']' if depth == 0 => return Some(&rest[..at]),
            '>' | ')' | ']' => depth -= 1,
            ',' if depth == 0 => return Some(&rest[..at]),
            _ => {}
        }
        before = char;
    }
    None
}

/// What a future is that was boxed on its way: tokio boxes large ones itself.
fn plain(future: &str) -> &str {
    let inner = |text: &'_ str, prefix: &str, suffix: &str| {
        text.strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(suffix))
            .map(str::len)
            .map(|len| (prefix.len(), len))
    };
    let mut future = future;
    loop {
        let found = inner(future, "core::pin::Pin<alloc::boxed::Box<", ">>")
            .or_else(|| inner(future, "tokio::runtime::blocking::task::BlockingTask<", ">"));
        match found {
            Some((start, len)) => future = &future[start..start + len],
            None => return future,
        }
    }
}

/// Whether a function is tokio's or the standard library's.
fn is_library(symbol: &str) -> bool {
    let symbol = symbol.trim_start_matches(['<', '&']);
    let symbol = symbol.strip_prefix("dyn ").unwrap_or(symbol);
    [
        "tokio::", "core::", "std::", "alloc::", "__rust", "_R", "rust_",
    ]
    .iter()
    .any(|prefix| symbol.starts_with(prefix))
        || !symbol.contains("::")
}

/// Whether a source file is tokio's or the standard library's.
fn is_library_path(path: &str) -> bool {
    path.starts_with("/rustc/")
        || path.contains("/tokio-1.")
        || path.starts_with("tokio-1.")
        || path.contains("tokio/src/")
        || path.contains("/library/core/src/")
        || path.contains("/library/std/src/")
        || path.contains("/library/alloc/src/")
        || path.starts_with("library/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_future_in_a_symbol() {
        let glue = "core::ptr::drop_in_place<alloc::boxed::Box<tokio::runtime::task::core::Cell<core::pin::Pin<alloc::boxed::Box<zoo::waits::large::{{closure}}>>,alloc::sync::Arc<x>>>>";
        let future = argument(glue, "::task::core::Cell<").unwrap();
        assert_eq!(plain(future), "zoo::waits::large::{{closure}}");
        let poll = "tokio::runtime::task::raw::poll::<app::run<(u8, fn(u8) -> u16)>::{closure#0}, alloc::sync::Arc<x>>";
        assert_eq!(
            argument(poll, "::raw::poll::<"),
            Some("app::run<(u8, fn(u8) -> u16)>::{closure#0}")
        );
        assert_eq!(
            argument("tokio::runtime::task::raw::poll", "::raw::poll::<"),
            None
        );
        let folded = glue.replace("large", "small");
        let both = "zoo::waits::large::{{closure}} or zoo::waits::small::{{closure}}";
        assert_eq!(
            futures(&format!("{folded} or {glue}")).as_deref(),
            Some(both)
        );
        assert_eq!(
            futures(&format!("{glue} or {glue}")).as_deref(),
            Some(plain(future))
        );
        assert_eq!(futures(&format!("{glue} or others")), None);
        let blocking = "tokio::runtime::blocking::task::BlockingTask<zoo::main::{{closure}}>";
        assert_eq!(plain(blocking), "zoo::main::{{closure}}");
        let boxed = "core::pin::Pin<alloc::boxed::Box<dyn core::future::Future>>";
        assert_eq!(plain(boxed), "dyn core::future::Future");
    }

    #[test]
    fn whose_code_it_is() {
        assert!(is_library(
            "<tokio::time::Sleep as core::future::Future>::poll"
        ));
        assert!(is_library("memcpy"));
        assert!(!is_library("app::serve::{{closure}}"));
        assert!(!is_library("<app::Hand as core::future::Future>::poll"));
        assert!(is_library_path(
            "/root/.cargo/registry/src/x/tokio-1.44.2/src/sync/mpsc.rs"
        ));
        assert!(is_library_path("/rustc/abc/library/core/src/option.rs"));
        assert!(!is_library_path("src/main.rs"));
    }
}
