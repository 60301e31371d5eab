//! A program with tokio, opened: what its file says, whatever process runs it.

use std::fs::File;
use std::sync::{Arc, OnceLock};

use crate::binary::addr::{LoadBias, RuntimeAddr, Vaddr};
use crate::binary::elf::Elf;
use crate::runtime::Refusal;

use super::layout::{Layout, Version};
use super::names::{self, Finder, Name};
use super::uses::{Reach, Uses};
use super::vtables::{self, Vtable};

/// What one executable says of its tasks.
#[derive(Debug)]
pub struct Program {
    /// ELF headers.
    pub elf: Elf,
    /// tokio's version, where the program says it.
    pub version: Option<Version>,
    /// Where that version keeps things.
    pub layout: Layout,
    /// The vtables of its tasks, by address.
    pub vtables: Vec<Vtable>,
    /// The file itself.
    pub file: Arc<File>,
    names: OnceLock<Vec<Arc<Name>>>,
    uses: OnceLock<Vec<Uses>>,
    waker_vtables: OnceLock<Vec<Vaddr>>,
}

impl Program {
    /// Looks into `file`; `None` when it spawns no task of tokio.
    ///
    /// # Errors
    /// [`Refusal::Unreadable`], when it has tokio, but not as leakmon knows it.
    pub fn analyse(file: &File) -> Result<Option<Program>, Refusal> {
        let unreadable = |why: String| Refusal::Unreadable(why);
        // What is no program that leakmon reads is none of tokio's.
        let Ok(elf) = Elf::parse(file) else {
            return Ok(None);
        };
        let found = vtables::find(&elf, file).map_err(|why| unreadable(why.to_string()))?;
        let Some(found) = found else {
            return Ok(None);
        };
        let mut vtables = found.vtables;
        vtables.sort_unstable_by_key(|vtable| vtable.addr);
        Ok(Some(Program {
            elf,
            version: found.version,
            layout: found.layout,
            vtables,
            file: file
                .try_clone()
                .map(Arc::new)
                .map_err(|error| unreadable(error.to_string()))?,
            names: OnceLock::new(),
            uses: OnceLock::new(),
            waker_vtables: OnceLock::new(),
        }))
    }

    /// `tokio 1.44.2`.
    pub fn version_text(&self) -> String {
        match self.version {
            Some(version) => format!("tokio {version}"),
            None => "tokio".to_owned(),
        }
    }

    /// The build id of the file.
    pub fn build_id(&self) -> Option<String> {
        self.elf.build_id(&self.file)
    }

    /// What tasks of each of the [`Program::vtables`] are called.
    pub fn names(&self) -> &[Arc<Name>] {
        self.names
            .get_or_init(|| names::find(&self.elf, &self.file, &self.vtables))
    }

    /// What the code of tasks with this vtable can wait for.
    pub fn uses(&self, vtable: u32) -> Uses {
        let all = self.uses.get_or_init(|| {
            let mut reach = Reach::new(Finder::new(&self.elf, &self.file));
            let uses = |vtable: &Vtable| reach.uses(vtable.poll);
            self.vtables.iter().map(uses).collect()
        });
        all.get(vtable as usize).copied().unwrap_or(Uses::NONE)
    }

    /// Whether `word` may be the address of a waker's vtable.
    pub(super) fn is_waker_vtable(&self, loaded: Loaded, word: u64) -> bool {
        let vtables = self
            .waker_vtables
            .get_or_init(|| vtables::waker_vtables(&self.elf, &self.file));
        vtables
            .binary_search(&loaded.bias.vaddr(RuntimeAddr(word)))
            .is_ok()
    }

    /// Where the program's own data that `addr` is in ends.
    pub(super) fn data(&self, loaded: Loaded, addr: u64) -> Option<u64> {
        let vaddr = loaded.bias.vaddr(RuntimeAddr(addr));
        self.elf.segments.iter().find_map(|segment| {
            let delta = vaddr.offset_from(segment.vaddr)?;
            let inside = segment.writable && delta < segment.mem_size;
            inside.then(|| addr + (segment.mem_size - delta))
        })
    }

    /// Where the vtables lie in a process.
    pub fn loaded(&self, bias: LoadBias) -> Loaded {
        let addr = |vtable: Option<&Vtable>| vtable.map_or(0, |v| bias.runtime(v.addr).0);
        Loaded {
            first: addr(self.vtables.first()),
            last: addr(self.vtables.last()),
            bias,
        }
    }
}

/// Where the vtables of a program lie in a process.
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    first: u64,
    last: u64,
    bias: LoadBias,
}

impl Loaded {
    /// Whether `word` may be the address of a vtable: a test for every word of
    /// a process's memory.
    pub fn may_be(self, word: u64) -> bool {
        word.wrapping_sub(self.first) <= self.last.wrapping_sub(self.first)
    }

    /// Index of the vtable at `word`.
    pub fn index(self, program: &Program, word: u64) -> Option<u32> {
        if !self.may_be(word) {
            return None;
        }
        let addr = self.bias.vaddr(RuntimeAddr(word));
        let vtables = &program.vtables;
        let index = vtables.binary_search_by_key(&addr, |vtable| vtable.addr);
        u32::try_from(index.ok()?).ok()
    }
}
