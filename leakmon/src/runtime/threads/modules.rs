//! The files whose code a process runs: what unwinds their stacks and names
//! their functions.
//!
//! A file is read once for all processes that map it, and only as much of it
//! as is asked for: unwind information for the first stack, symbols for the
//! first name, DWARF for the first line.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, Weak};

use rustc_hash::FxHashMap;

use crate::binary::addr::{LoadBias, RuntimeAddr, Vaddr};
use crate::binary::elf::{Elf, ReadAt};
use crate::binary::symbols::{Lines, Symbols};
use crate::binary::unwind::{Rule, Table};
use crate::process::maps::Mapping;
use crate::process::memory::{Memory as _, ProcessMemory};
use crate::task::Frame;

/// Program counters whose rule or frames are remembered.
const MAX_CACHED: usize = 1 << 16;

/// Most bytes of a vdso; real ones have 8 to 16 KiB.
const MAX_VDSO: u64 = 1 << 16;

enum Bytes {
    File(Arc<File>),
    Memory(Vec<u8>),
}

impl ReadAt for Bytes {
    fn size(&self) -> u64 {
        match self {
            Bytes::File(file) => file.size(),
            Bytes::Memory(bytes) => bytes.size(),
        }
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        match self {
            Bytes::File(file) => ReadAt::read_exact_at(&**file, offset, buf),
            Bytes::Memory(bytes) => bytes.read_exact_at(offset, buf),
        }
    }
}

/// A file with code.
pub(super) struct Image {
    /// Its file name, without directories.
    pub(super) name: String,
    pub(super) elf: Elf,
    bytes: Bytes,
    table: OnceLock<Table>,
    symbols: OnceLock<Symbols>,
    lines: OnceLock<Option<Mutex<Lines>>>,
}

impl Image {
    fn new(name: &str, bytes: Bytes) -> Option<Image> {
        let elf = Elf::parse(&bytes).ok()?;
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        Some(Image {
            name: name.rsplit('/').next().unwrap_or(name).to_owned(),
            elf,
            bytes,
            table: OnceLock::new(),
            symbols: OnceLock::new(),
            lines: OnceLock::new(),
        })
    }

    fn table(&self) -> &Table {
        self.table
            .get_or_init(|| Table::read(&self.elf, &self.bytes))
    }

    pub(super) fn symbols(&self) -> &Symbols {
        self.symbols
            .get_or_init(|| Symbols::read(&self.elf, &self.bytes))
    }

    fn lines(&self) -> Option<&Mutex<Lines>> {
        self.lines
            .get_or_init(|| Lines::read(&self.elf, &self.bytes).map(Mutex::new))
            .as_ref()
    }

    /// The file; `None` of the vdso.
    pub(super) fn file(&self) -> Option<&Arc<File>> {
        match &self.bytes {
            Bytes::File(file) => Some(file),
            Bytes::Memory(_) => None,
        }
    }

    /// The bytes that the file has for `len` bytes of memory at `start`.
    pub(super) fn read(&self, start: Vaddr, len: u64) -> Option<Vec<u8>> {
        self.elf.read(&self.bytes, start, len).ok()
    }

    /// Whether rustc had a part in it: it says so in `.comment`, which stripping
    /// leaves.
    pub(super) fn is_rust(&self) -> bool {
        /// Most bytes of a comment that are looked at; it has some hundred.
        const MAX: u64 = 1 << 16;
        let Some(section) = self.elf.section(".comment") else {
            return false;
        };
        self.bytes
            .bytes_at(section.offset, section.size.min(MAX))
            .is_ok_and(|text| text.windows(13).any(|word| word == b"rustc version"))
    }
}

/// Whose code it is: what a person looks for is the program's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// The C library, the dynamic linker, the vdso, the C++ runtime.
    System,
    /// Anything else.
    Program,
}

/// Device, inode, size and time of change: another file has others.
type FileId = (u64, u64, u64, i64, i64);

/// The files that any process's modules hold.
static IMAGES: LazyLock<Mutex<HashMap<FileId, Weak<Image>>>> = LazyLock::new(Mutex::default);

fn image(mapping: &Mapping, file: File) -> Option<Arc<Image>> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() {
        return None;
    }
    let id = (
        metadata.dev(),
        metadata.ino(),
        metadata.size(),
        metadata.mtime(),
        metadata.mtime_nsec(),
    );
    let mut images = IMAGES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(image) = images.get(&id).and_then(Weak::upgrade) {
        return Some(image);
    }
    images.retain(|_, image| image.strong_count() > 0);
    let image = Arc::new(Image::new(&mapping.name, Bytes::File(Arc::new(file)))?);
    images.insert(id, Arc::downgrade(&image));
    Some(image)
}

/// An executable mapping of one process.
pub(super) struct Module {
    mapping: Mapping,
    pub(super) bias: LoadBias,
    pub(super) image: Arc<Image>,
    whose: Whose,
}

/// One frame, and what its place in a stack depends on.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    pub(super) frame: Frame,
    pub(super) whose: Whose,
    /// The function's name is known.
    pub(super) named: bool,
}

/// Program counter of a frame: a return address, or an instruction itself
/// (the innermost frame, and one that a signal interrupted).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pc {
    pub(super) addr: u64,
    pub(super) exact: bool,
}

impl Pc {
    /// An address within the instruction.
    fn within(self) -> u64 {
        match self.exact {
            true => self.addr,
            false => self.addr.wrapping_sub(1),
        }
    }
}

/// The modules of one process.
#[derive(Default)]
pub(super) struct Modules {
    mappings: Vec<Mapping>,
    /// Sorted by address.
    modules: Vec<Module>,
    rules: FxHashMap<Pc, Option<Arc<Rule>>>,
    frames: FxHashMap<Pc, Arc<[Resolved]>>,
}

impl Modules {
    /// Takes up what is mapped now; forgets everything when that has changed.
    pub(super) fn refresh(&mut self, mappings: Vec<Mapping>, memory: &ProcessMemory) {
        if mappings == self.mappings {
            return;
        }
        self.rules.clear();
        self.frames.clear();
        // Files that stay mapped stay read: they are held until the end.
        let held = std::mem::take(&mut self.modules);
        for mapping in &mappings {
            if let Some(module) = open(mapping, memory) {
                self.modules.push(module);
            }
        }
        drop(held);
        self.mappings = mappings;
    }

    fn module(&self, at: u64) -> Option<&Module> {
        let after = self
            .modules
            .partition_point(|module| module.mapping.start <= at);
        let module = self.modules.get(after.checked_sub(1)?)?;
        (at < module.mapping.end).then_some(module)
    }

    /// Whether the C library is a file of its own; otherwise it is part of the
    /// program, and what has no name may be either's.
    pub(super) fn has_libc(&self) -> bool {
        self.modules.iter().any(Module::is_libc)
    }

    /// Whether the code at this address is the C library's.
    pub(super) fn is_libc(&self, at: u64) -> bool {
        self.module(at).is_some_and(Module::is_libc)
    }

    /// Every mapped file with code, and how far it was moved.
    pub(super) fn files(&self) -> impl Iterator<Item = &Module> {
        let mut seen: Vec<*const Image> = Vec::new();
        self.modules.iter().filter(move |module| {
            let image = Arc::as_ptr(&module.image);
            let new = module.image.file().is_some() && !seen.contains(&image);
            if new {
                seen.push(image);
            }
            new
        })
    }

    /// The file that has its own data at this address, if one has.
    pub(super) fn data(&self, at: u64) -> Option<&Module> {
        self.files().find(|module| {
            let at = module.bias.vaddr(RuntimeAddr(at));
            module.image.elf.segments.iter().any(|segment| {
                let within = at.offset_from(segment.vaddr);
                !segment.executable && within.is_some_and(|within| within < segment.file_size)
            })
        })
    }

    /// Whether the code at this address is of `file`.
    pub(super) fn is_of(&self, at: u64, file: &File) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let id = |file: &File| file.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        let own = self.module(at).and_then(|module| module.image.file());
        own.is_some_and(|own| id(own).is_some() && id(own) == id(file))
    }

    /// Whether the code at this address is of a file that rustc made.
    pub(super) fn is_rust(&self, at: u64) -> bool {
        self.module(at).is_some_and(|module| module.image.is_rust())
    }

    /// Whether code may be at this address.
    pub(super) fn is_code(&self, at: u64) -> bool {
        let after = self.mappings.partition_point(|m| m.start <= at);
        after
            .checked_sub(1)
            .is_some_and(|i| at < self.mappings[i].end)
    }

    /// How to unwind from `pc`.
    pub(super) fn rule(&mut self, pc: Pc) -> Option<Arc<Rule>> {
        if let Some(rule) = self.rules.get(&pc) {
            return rule.clone();
        }
        let rule = self.module(pc.within()).and_then(|module| {
            let at = module.bias.vaddr(RuntimeAddr(pc.within()));
            module.image.table().rule(at).map(Arc::new)
        });
        if self.rules.len() >= MAX_CACHED {
            self.rules.clear();
        }
        self.rules.insert(pc, rule.clone());
        rule
    }

    /// The frames at `pc`, innermost first: at least one.
    pub(super) fn frames(&mut self, pc: Pc) -> Arc<[Resolved]> {
        if let Some(frames) = self.frames.get(&pc) {
            return Arc::clone(frames);
        }
        let frames: Arc<[Resolved]> = self.resolve(pc).into();
        if self.frames.len() >= MAX_CACHED {
            self.frames.clear();
        }
        self.frames.insert(pc, Arc::clone(&frames));
        frames
    }

    fn resolve(&mut self, pc: Pc) -> Vec<Resolved> {
        let rule = self.rule(pc);
        let frame = |function: String, entry: u64| Frame {
            function: function.into(),
            file: "".into(),
            line: 0,
            pc: pc.addr,
            offset: pc.addr.wrapping_sub(entry),
            entry,
            inlined: false,
            hidden: false,
        };
        let Some(module) = self.module(pc.within()) else {
            // Code that the program made as it ran (a JIT), or has unmapped.
            return vec![Resolved {
                frame: frame("[no file]".to_owned(), pc.addr),
                whose: Whose::Program,
                named: false,
            }];
        };
        let at = module.bias.vaddr(RuntimeAddr(pc.within()));
        let start = rule.map(|rule| rule.function);
        let symbol = module.image.symbols().function(at, start);
        let entry_vaddr = symbol.as_ref().map(|(_, entry)| *entry).or(start);
        let entry = entry_vaddr.map_or(pc.addr, |entry| module.bias.runtime(entry).0);
        let positions = match module.image.lines() {
            Some(lines) => lines
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .positions(at),
            None => Vec::new(),
        };
        let named = symbol.is_some();
        let outer = match symbol {
            Some((name, _)) => name,
            None => module.offset_name(entry_vaddr.unwrap_or(at)),
        };
        let whose = |function: &str| match module.whose {
            Whose::System => Whose::System,
            Whose::Program => whose_function(function),
        };
        if positions.is_empty() {
            return vec![Resolved {
                whose: whose(&outer),
                frame: frame(outer, entry),
                named,
            }];
        }
        let last = positions.len() - 1;
        let resolved = positions.into_iter().enumerate().map(|(n, position)| {
            let known = position.function.is_some();
            // The symbol's name has the whole path, DWARF's may not.
            let function = match position.function {
                Some(function) if n < last || !named => function,
                _ => outer.clone(),
            };
            Resolved {
                whose: whose(&function),
                named: known || named,
                frame: Frame {
                    file: position.file.into(),
                    line: position.line,
                    inlined: position.inlined,
                    ..frame(function, entry)
                },
            }
        });
        resolved.collect()
    }

    /// What code without a name is called.
    pub(super) fn offset_name(&self, at: u64) -> Option<String> {
        let module = self.module(at)?;
        Some(module.offset_name(module.bias.vaddr(RuntimeAddr(at))))
    }

    /// Line and file of the first instruction of the function `frame` is of.
    pub(super) fn first_line(&mut self, frame: &Frame) -> Frame {
        let pc = Pc {
            addr: frame.entry,
            exact: true,
        };
        let start = self.frames(pc);
        let same = start.iter().find(|r| r.frame.function == frame.function);
        match same {
            Some(first) => Frame {
                pc: frame.entry,
                offset: 0,
                inlined: false,
                ..first.frame.clone()
            },
            // Inlined: it has no first line of its own.
            None => Frame {
                line: 0,
                pc: frame.entry,
                offset: 0,
                inlined: false,
                ..frame.clone()
            },
        }
    }
}

impl Module {
    /// By an address of the file: the same in every run.
    fn offset_name(&self, at: Vaddr) -> String {
        format!("{}+{:#x}", self.image.name, at.0)
    }

    /// Whether it is the C library's, or of what comes with it.
    pub(super) fn is_libc(&self) -> bool {
        self.whose == Whose::System && self.image.name != "[vdso]"
    }
}

fn open(mapping: &Mapping, memory: &ProcessMemory) -> Option<Module> {
    if mapping.name == "[vdso]" {
        let len = mapping.end - mapping.start;
        if len > MAX_VDSO {
            return None;
        }
        let bytes = memory
            .bytes(RuntimeAddr(mapping.start), len as usize)
            .ok()?;
        let image = Image::new(&mapping.name, Bytes::Memory(bytes))?;
        let base = image.elf.segments.first()?.vaddr.0;
        return Some(Module {
            mapping: mapping.clone(),
            bias: LoadBias(mapping.start.wrapping_sub(base)),
            image: Arc::new(image),
            whose: Whose::System,
        });
    }
    if mapping.inode == 0 {
        return None;
    }
    let image = image(mapping, mapping.open(memory.pid()).ok()?)?;
    // The segment that the mapping is of: the kernel maps whole pages.
    let segment = image.elf.segments.iter().find(|segment| {
        let start = segment.offset.0 & !0xfff;
        segment.executable
            && mapping.offset >= start
            && mapping.offset < segment.offset.0.saturating_add(segment.file_size)
    })?;
    let vaddr = segment
        .vaddr
        .0
        .wrapping_add(mapping.offset)
        .wrapping_sub(segment.offset.0);
    Some(Module {
        bias: LoadBias(mapping.start.wrapping_sub(vaddr)),
        whose: whose_module(&image.name),
        mapping: mapping.clone(),
        image,
    })
}

/// By a file's name: glibc's and musl's own libraries, and those that GCC's
/// C++ and LLVM's come with.
fn whose_module(name: &str) -> Whose {
    const SYSTEM: [&str; 13] = [
        "[vdso]",
        "ld-",
        "ld.so",
        "libc-",
        "libc++",
        "libc.so",
        "libgcc_s",
        "libpthread",
        "librt-",
        "librt.so",
        "libstdc++",
        "libc.musl",
        "libstd-",
    ];
    match SYSTEM.iter().any(|start| name.starts_with(start)) {
        true => Whose::System,
        false => Whose::Program,
    }
}

/// By a function's name, where the libraries are linked into the program.
pub(super) fn whose_function(name: &str) -> Whose {
    /// Rust's standard library and its best known locks, C++'s, and what is
    /// the C library's own: names with two underscores are reserved for it (C11,
    /// 7.1.3).
    const STARTS: [&str; 9] = [
        "std::",
        "core::",
        "alloc::",
        "parking_lot::",
        "parking_lot_core::",
        "lock_api::",
        "pthread_",
        "sem_",
        "__",
    ];
    /// Of a static libc: what blocks, and what starts threads.
    const NAMES: [&str; 38] = [
        "_start",
        "accept",
        "accept4",
        "clock_nanosleep",
        "clone",
        "clone3",
        "connect",
        "do_futex_wait",
        "epoll_pwait",
        "epoll_wait",
        "execute_native_thread_routine",
        "nanosleep",
        "pause",
        "poll",
        "ppoll",
        "pselect",
        "read",
        "recv",
        "recvfrom",
        "recvmsg",
        "select",
        "send",
        "sendmsg",
        "sendto",
        "sigsuspend",
        "sigtimedwait",
        "sigwait",
        "sigwaitinfo",
        "sleep",
        "start_thread",
        "syscall",
        "thrd_join",
        "thrd_sleep",
        "usleep",
        "wait",
        "wait4",
        "waitpid",
        "write",
    ];
    // `<std::thread::Thread as ...>::park`
    let plain = name.trim_start_matches(['<', '&']);
    let plain = plain.strip_prefix("dyn ").unwrap_or(plain);
    if STARTS.iter().any(|start| plain.starts_with(start)) || NAMES.contains(&name) {
        Whose::System
    } else {
        Whose::Program
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_function_is() {
        for name in [
            "<std::thread::Thread>::park",
            "<alloc::boxed::Box<dyn core::ops::FnOnce()> as core::ops::FnOnce()>::call_once",
            "__new_sem_wait_slow64.constprop.0",
            "pthread_mutex_lock",
            "sigwait",
        ] {
            assert_eq!(whose_function(name), Whose::System, "{name}");
        }
        for name in ["main", "stdlib::f", "sigwait_all", "app::run", "reader"] {
            assert_eq!(whose_function(name), Whose::Program, "{name}");
        }
    }

    #[test]
    fn whose_a_file_is() {
        for name in ["libc.so.6", "ld-linux-x86-64.so.2", "libstdc++.so.6.0.30"] {
            assert_eq!(whose_module(name), Whose::System);
        }
        for name in ["libcurl.so.4", "librt_app.so", "node"] {
            assert_eq!(whose_module(name), Whose::Program);
        }
    }
}
