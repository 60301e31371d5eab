//! From program counters to source positions, and what Go's own traces show
//! of them.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::binary::addr::{LoadBias, RuntimeAddr};
use crate::task::{Frame, Site, SiteKey, Stack};

use super::pclntab::Position;
use super::program::Program;

/// Frames of program counters that are remembered; past that the memory is
/// emptied. A program has a few thousand call sites at which it blocks.
const MAX_CACHED: usize = 1 << 16;

/// Bytes of names that are remembered.
const MAX_NAMES: usize = 16 << 20;

/// A program counter of a stack.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Pc(u64);

/// Set in a [`Pc`] at which the function was interrupted: it names the
/// instruction itself, while a return address names the one behind the call.
const EXACT: u64 = 1 << 63;

impl Pc {
    /// A return address, or the address at which a parked goroutine goes on.
    pub fn after_call(addr: RuntimeAddr) -> Pc {
        Pc(addr.0 & !EXACT)
    }

    /// The address of an instruction that was interrupted.
    pub fn exact(addr: RuntimeAddr) -> Pc {
        Pc(addr.0 | EXACT)
    }

    /// The address itself.
    pub fn addr(self) -> RuntimeAddr {
        RuntimeAddr(self.0 & !EXACT)
    }

    fn is_exact(self) -> bool {
        self.0 & EXACT != 0
    }
}

/// A frame, and whether Go's traces leave it out as compiler-made.
#[derive(Clone, Debug)]
struct Resolved {
    frame: Frame,
    wrapper: bool,
}

/// Symbolises the program counters of one process.
#[derive(Debug)]
pub struct Symbols {
    program: Arc<Program>,
    bias: LoadBias,
    /// Names and files are shared: few distinct ones cover a million frames.
    strings: FxHashMap<Box<[u8]>, Arc<str>>,
    strings_len: usize,
    frames: FxHashMap<Pc, Arc<[Resolved]>>,
    frames_len: usize,
}

impl Symbols {
    /// Symbolises for a process that loaded `program` with `bias`.
    pub fn new(program: Arc<Program>, bias: LoadBias) -> Symbols {
        Symbols {
            program,
            bias,
            strings: FxHashMap::default(),
            strings_len: 0,
            frames: FxHashMap::default(),
            frames_len: 0,
        }
    }

    /// The stack whose program counters are `pcs`, innermost first, as far as
    /// `most` frames.
    pub fn stack(&mut self, pcs: &[Pc], most: usize) -> Stack {
        let mut frames: Vec<Frame> = Vec::with_capacity(pcs.len() + 4);
        // A wrapper is shown when it called into a panic rather than what it
        // wraps: runtime.elideWrapperCalling.
        let mut panicked = false;
        for pc in pcs {
            if frames.len() >= most {
                break;
            }
            for resolved in self.resolve(*pc).iter() {
                let elided = resolved.wrapper && !panicked;
                panicked = matches!(
                    &*resolved.frame.function,
                    "runtime.gopanic" | "runtime.sigpanic" | "runtime.panicwrap"
                );
                if elided {
                    continue;
                }
                let mut frame = resolved.frame.clone();
                // The boundary between ordinary and deferred code is shown, but
                // not as the innermost frame: runtime.showfuncinfo.
                if &*frame.function == "runtime.gopanic" && frames.iter().any(|f| !f.hidden) {
                    frame.hidden = false;
                }
                frames.push(frame);
            }
        }
        let place = place(&frames);
        Stack { frames, place }
    }

    /// The site of the goroutines with these `gopc` and `startpc`.
    pub fn site(&mut self, key: SiteKey) -> Site {
        Site {
            doubt: None,
            key,
            entry: self.entry(key.entry),
            created_by: self.creator(key.created_at),
        }
    }

    /// The first line of the function that starts at `addr`, or of the one that
    /// it was made for.
    fn entry(&mut self, addr: u64) -> Option<Frame> {
        let program = Arc::clone(&self.program);
        let offset = program.text_offset(self.bias.vaddr(RuntimeAddr(addr)))?;
        let mut function = program.table.function(offset)?;
        let mut addr = addr;
        if let Some(wrapped) = program.table.wrapped(function, &*program) {
            addr = self.bias.runtime(program.vaddr(wrapped.entry)).0;
            function = wrapped;
        }
        let position = program.table.start(function)?;
        Some(self.frame(&program, &position, addr, addr).frame)
    }

    /// The go statement that returns to `addr`, as `runtime.printcreatedby`
    /// shows it: the enclosing function that is not inlined, with the line.
    /// `None` for what the runtime itself started: the main goroutine.
    fn creator(&mut self, addr: u64) -> Option<Frame> {
        let program = Arc::clone(&self.program);
        let offset = program.text_offset(self.bias.vaddr(RuntimeAddr(addr)))?;
        let function = program.table.function(offset)?;
        let mut call = offset;
        if call > function.entry {
            call.0 = call.0.saturating_sub(program.elf.arch.pc_quantum());
        }
        let (file, line) = program.table.file_line(function, call);
        let position = Position {
            function: program.table.name(function)?,
            file,
            line,
            inlined: false,
            func_id: program.table.func_id(function)?,
            at: call,
        };
        let entry = self.bias.runtime(program.vaddr(function.entry)).0;
        let frame = self.frame(&program, &position, addr, entry).frame;
        (!frame.hidden).then_some(frame)
    }

    fn resolve(&mut self, pc: Pc) -> Arc<[Resolved]> {
        if let Some(frames) = self.frames.get(&pc) {
            return Arc::clone(frames);
        }
        let frames: Arc<[Resolved]> = self.resolve_afresh(pc).into();
        if self.frames_len >= MAX_CACHED {
            self.frames.clear();
            self.frames_len = 0;
        }
        self.frames_len += frames.len().max(1);
        self.frames.insert(pc, Arc::clone(&frames));
        frames
    }

    fn resolve_afresh(&mut self, pc: Pc) -> Vec<Resolved> {
        let program = Arc::clone(&self.program);
        let addr = pc.addr();
        let function = program
            .text_offset(self.bias.vaddr(addr))
            .and_then(|offset| Some((offset, program.table.function(offset)?)));
        let Some((offset, function)) = function else {
            return Vec::new();
        };
        let mut call = offset;
        if !pc.is_exact() && call > function.entry {
            // Within the call, as unwinder.symPC has it.
            call.0 -= 1;
        }
        let entry = self.bias.runtime(program.vaddr(function.entry)).0;
        let positions = program.table.positions(function, call, &*program);
        positions
            .iter()
            .map(|position| self.frame(&program, position, addr.0, entry))
            .collect()
    }

    fn frame(
        &mut self,
        program: &Program,
        position: &Position<'_>,
        pc: u64,
        entry: u64,
    ) -> Resolved {
        let function = self.string(position.function);
        Resolved {
            wrapper: position.func_id == program.layout.func_id_wrapper,
            frame: Frame {
                hidden: is_hidden(&function),
                function,
                file: self.string(if position.file.is_empty() {
                    b"?"
                } else {
                    position.file
                }),
                line: position.line,
                // As runtime.tracebackPCs lists it: behind the instruction that
                // the position is of.
                pc: self
                    .bias
                    .runtime(program.vaddr(position.at))
                    .0
                    .wrapping_add(1),
                offset: pc.wrapping_sub(entry),
                entry,
                inlined: position.inlined,
            },
        }
    }

    fn string(&mut self, bytes: &[u8]) -> Arc<str> {
        if let Some(string) = self.strings.get(bytes) {
            return Arc::clone(string);
        }
        // An entry takes some room, too.
        self.strings_len += 2 * bytes.len() + 64;
        if self.strings_len > MAX_NAMES {
            self.strings.clear();
            self.strings_len = 0;
        }
        let string: Arc<str> = String::from_utf8_lossy(bytes).into();
        self.strings.insert(bytes.into(), Arc::clone(&string));
        string
    }
}

/// Whether Go's traces leave out a frame of this function: `showfuncinfo`,
/// runtime/traceback.go.
fn is_hidden(function: &str) -> bool {
    // Shown from Go 1.25 on so that a finalizer or cleanup is told as such.
    if matches!(function, "runtime.runFinalizers" | "runtime.runCleanups") {
        return false;
    }
    match function.strip_prefix("runtime.") {
        Some(rest) => !is_exported(rest),
        None => !function.contains('.'),
    }
}

/// `isExportedRuntime`, runtime/traceback.go.
fn is_exported(name: &str) -> bool {
    let upper = |s: &str| s.starts_with(|c: char| c.is_ascii_uppercase());
    match name.rsplit_once('.') {
        Some((receiver, method)) => {
            let receiver = receiver
                .strip_prefix("(*")
                .and_then(|r| r.strip_suffix(')'))
                .unwrap_or(receiver);
            upper(method) && upper(receiver)
        }
        None => upper(name),
    }
}

/// Where a person would say that the goroutine waits: the innermost frame of a
/// package outside of the standard library, or else the innermost that is not
/// the standard library's synchronisation code.
fn place(frames: &[Frame]) -> Option<usize> {
    let shown = || frames.iter().enumerate().filter(|(_, f)| !f.hidden);
    let outside = shown().find(|(_, f)| !is_standard(package(&f.function)));
    let waits = |f: &Frame| {
        let package = package(&f.function);
        let root = package.split('/').next().unwrap_or(package);
        !matches!(
            root,
            "runtime" | "internal" | "sync" | "syscall" | "time" | "iter"
        )
    };
    outside
        .or_else(|| shown().find(|(_, f)| waits(f)))
        .or_else(|| shown().next())
        .map(|(index, _)| index)
}

/// The import path of a function: `net/http` of `net/http.(*conn).serve`.
fn package(function: &str) -> &str {
    let function = function.split('[').next().unwrap_or(function);
    let name = function.rfind('/').map_or(0, |slash| slash + 1);
    function[name..]
        .find('.')
        .map_or(function, |dot| &function[..name + dot])
}

/// Whether an import path is the standard library's: `go list std`, by first
/// element.
fn is_standard(package: &str) -> bool {
    const ROOTS: [&str; 49] = [
        "archive",
        "bufio",
        "bytes",
        "cmp",
        "compress",
        "container",
        "context",
        "crypto",
        "database",
        "debug",
        "embed",
        "encoding",
        "errors",
        "expvar",
        "flag",
        "fmt",
        "go",
        "hash",
        "html",
        "image",
        "index",
        "internal",
        "io",
        "iter",
        "log",
        "maps",
        "math",
        "mime",
        "net",
        "os",
        "path",
        "plugin",
        "reflect",
        "regexp",
        "runtime",
        "slices",
        "sort",
        "strconv",
        "strings",
        "structs",
        "sync",
        "syscall",
        "testing",
        "text",
        "time",
        "unicode",
        "unique",
        "vendor",
        "weak",
    ];
    let root = package.split('/').next().unwrap_or(package);
    ROOTS.binary_search(&root).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_shows_what_it_shows() {
        for shown in [
            "main.main",
            "sync.runtime_SemacquireMutex",
            "runtime.Gosched",
            "runtime.(*Frames).Next",
            "runtime.Frames.Next",
            "runtime.runFinalizers",
            "github.com/a/b.F",
        ] {
            assert!(!is_hidden(shown), "{shown}");
        }
        for hidden in [
            "runtime.gopark",
            "runtime.(*mcache).Alloc",
            "runtime.goexit",
            "memeqbody",
        ] {
            assert!(is_hidden(hidden), "{hidden}");
        }
    }

    #[test]
    fn packages_of_functions() {
        for (function, expected) in [
            ("net/http.(*conn).serve", "net/http"),
            ("main.main.func1", "main"),
            (
                "github.com/a/b.c/d.F[go.shape.struct { x/y.Z }]",
                "github.com/a/b.c/d",
            ),
            ("gopkg.in/yaml%2ev3.Unmarshal", "gopkg.in/yaml%2ev3"),
        ] {
            assert_eq!(package(function), expected);
        }
        assert!(is_standard("net/http") && is_standard("weak") && is_standard("archive/zip"));
        assert!(!is_standard("main") && !is_standard("github.com/a/b"));
    }

    fn frames(functions: &[&str]) -> Vec<Frame> {
        let frame = |function: &&str| Frame {
            function: (*function).into(),
            file: "x.go".into(),
            line: 1,
            pc: 1,
            offset: 1,
            entry: 0,
            inlined: false,
            hidden: is_hidden(function),
        };
        functions.iter().map(frame).collect()
    }

    #[test]
    fn the_place_is_where_a_person_would_look() {
        let place_of = |functions: &[&str]| {
            let frames = frames(functions);
            place(&frames).map(|i| frames[i].function.to_string())
        };
        let send = [
            "runtime.gopark",
            "runtime.chansend",
            "runtime.chansend1",
            "main.call.func1",
        ];
        assert_eq!(place_of(&send).as_deref(), Some("main.call.func1"));
        let idle = [
            "runtime.gopark",
            "internal/poll.(*FD).Read",
            "net.(*conn).Read",
            "net/http.f",
        ];
        assert_eq!(place_of(&idle).as_deref(), Some("net.(*conn).Read"));
        let lock = [
            "runtime.gopark",
            "sync.runtime_SemacquireMutex",
            "sync.(*Mutex).Lock",
        ];
        assert_eq!(
            place_of(&lock).as_deref(),
            Some("sync.runtime_SemacquireMutex")
        );
        assert_eq!(place_of(&["runtime.gopark", "runtime.goexit"]), None);
    }
}
