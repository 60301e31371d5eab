//! The pclntab: functions, files, lines, stack deltas and inline trees, which
//! every Go program carries and `strip` keeps.
//!
//! Two formats are read: Go 1.18 to 1.19 and Go 1.20 on (runtime/symtab.go,
//! runtime/symtabinl.go, cmd/link/internal/ld/pcln.go of these versions).
//! Everything here is a pure function over bytes: any bytes give an answer or
//! `None`, never a panic.

use crate::binary::elf::Arch;

/// Magic of Go 1.18 and 1.19: `Go118PCLnTabMagic`, internal/abi/symtab.go.
const MAGIC_118: u32 = 0xffff_fff0;
/// Magic of Go 1.20 on: `Go120PCLnTabMagic`, internal/abi/symtab.go.
const MAGIC_120: u32 = 0xffff_fff1;

/// Size of `runtime.pcHeader`; its last word, not used from Go 1.26 on, was
/// there all the time.
const HEADER: usize = 72;

/// `PCDATA_InlTreeIndex`, internal/abi/symtab.go (runtime/funcdata.h).
const PCDATA_INL_TREE_INDEX: u32 = 2;
/// `FUNCDATA_InlTree`, internal/abi/symtab.go (runtime/funcdata.h).
const FUNCDATA_INL_TREE: u32 = 3;
/// `FUNCDATA_WrapInfo`, internal/abi/symtab.go (runtime/funcdata.h).
const FUNCDATA_WRAP_INFO: u32 = 7;

/// `FuncFlagTopFrame`, internal/abi/symtab.go.
const FLAG_TOP_FRAME: u8 = 1;
/// `FuncFlagSPWrite`, internal/abi/symtab.go.
const FLAG_SP_WRITE: u8 = 2;

/// Longest function or file name that is believed, in bytes.
const MAX_NAME: usize = 1 << 16;

/// Deepest nesting of inlined calls that is followed.
const MAX_INLINE_DEPTH: usize = 128;

/// Most entries of a pc-value table that are followed. The largest functions,
/// which generators write, have some hundred thousand.
const MAX_PC_VALUES: usize = 1 << 20;

/// An offset from the start of Go's text (`moduledata.text`): how the table
/// itself names program counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TextOffset(pub u32);

/// A pclntab.
#[derive(Debug, Clone)]
pub struct Pclntab {
    bytes: Vec<u8>,
    arch: Arch,
    /// Go 1.20 or later.
    modern: bool,
    function_count: usize,
    names: usize,
    compile_units: usize,
    files: usize,
    pc_values: usize,
    functions: usize,
}

/// The bytes at `moduledata.gofunc`, which hold the inline trees. They lie
/// outside of the table, and only few of them are ever looked at.
pub trait FunctionData {
    /// Fills `buf` from `offset`; `None` when that is not there.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Option<()>;
}

impl FunctionData for [u8] {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        buf.copy_from_slice(self.get(start..start.checked_add(buf.len())?)?);
        Some(())
    }
}

/// One function of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it starts.
    pub entry: TextOffset,
    /// Where its `_func` is, from the start of the table.
    at: usize,
}

/// One source position, as the table names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position<'a> {
    /// Function name as the table has it.
    pub function: &'a [u8],
    /// Source file; empty when the table names none.
    pub file: &'a [u8],
    /// Line from 1; 0 when the table has none.
    pub line: u32,
    /// This call was inlined into the next position's function.
    pub inlined: bool,
    /// `runtime.funcID` of the function.
    pub func_id: u8,
    /// The instruction that `file` and `line` are of: a call's, or for an outer
    /// position the mark that the compiler left for the inlined call.
    pub at: TextOffset,
}

impl Pclntab {
    /// The table in `bytes`, which start at its header and may go on past its
    /// end. `None` when they hold no table that makes sense.
    pub fn parse(bytes: Vec<u8>, arch: Arch) -> Option<Pclntab> {
        let header = Header::parse(&bytes, arch)?;
        let table = Pclntab {
            arch,
            modern: header.modern,
            function_count: header.function_count,
            names: header.names,
            compile_units: header.compile_units,
            files: header.files,
            pc_values: header.pc_values,
            functions: header.functions,
            bytes,
        };
        // The function table proper, with the end of the text behind it.
        let size = table.function_count.checked_mul(8)?.checked_add(4)?;
        table
            .bytes
            .get(table.functions..table.functions.checked_add(size)?)?;
        // Entries ascend: binary search relies on it.
        let mut previous = None;
        for i in 0..table.function_count {
            let entry = table.entry_at(i)?;
            if previous.is_some_and(|p| p > entry) {
                return None;
            }
            previous = Some(entry);
        }
        Some(table)
    }

    /// Whether `bytes` start with a header that makes sense: for searching.
    pub fn is_header(bytes: &[u8], arch: Arch) -> bool {
        Header::parse(bytes, arch).is_some()
    }

    /// Every function, by ascending entry.
    pub fn functions(&self) -> impl Iterator<Item = Function> + '_ {
        (0..self.function_count).filter_map(|i| self.function_at(i))
    }

    /// The function that covers `offset`.
    pub fn function(&self, offset: TextOffset) -> Option<Function> {
        let (mut low, mut high) = (0, self.function_count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry_at(middle)? <= offset {
                low = middle + 1
            } else {
                high = middle
            }
        }
        let index = low.checked_sub(1)?;
        (offset < self.entry_at(self.function_count)? || index + 1 < self.function_count)
            .then(|| self.function_at(index))?
    }

    /// The functions called `name`; several when the linker kept copies.
    pub fn find<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Function> + 'a {
        self.functions()
            .filter(move |f| self.name(*f) == Some(name.as_bytes()))
    }

    /// Where the function after `function` starts: an upper bound of its code.
    pub fn end(&self, function: Function) -> Option<TextOffset> {
        let (mut low, mut high) = (0, self.function_count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry_at(middle)? <= function.entry {
                low = middle + 1
            } else {
                high = middle
            }
        }
        self.entry_at(low)
    }

    /// Its name.
    pub fn name(&self, function: Function) -> Option<&[u8]> {
        self.name_at(self.u32_at(function.at.checked_add(4)?)?)
    }

    /// `runtime.funcID`: which special runtime function it is.
    pub fn func_id(&self, function: Function) -> Option<u8> {
        self.bytes
            .get(function.at.checked_add(self.ids())?)
            .copied()
    }

    fn flags(&self, function: Function) -> u8 {
        let at = function.at.checked_add(self.ids() + 1);
        at.and_then(|at| self.bytes.get(at)).copied().unwrap_or(0)
    }

    /// It is the outermost of its stack: `runtime.goexit` and the like.
    pub fn is_top_frame(&self, function: Function) -> bool {
        self.flags(function) & FLAG_TOP_FRAME != 0
    }

    /// It moves the stack pointer in ways that the table cannot describe.
    pub fn writes_sp(&self, function: Function) -> bool {
        self.flags(function) & FLAG_SP_WRITE != 0
    }

    /// How far the stack pointer has moved at `offset` since the function was
    /// entered, in bytes. `None` when the table does not say (assembly without
    /// frame information) or says nonsense.
    pub fn stack_delta(&self, function: Function, offset: TextOffset) -> Option<u32> {
        let table = self.u32_at(function.at.checked_add(16)?)?;
        u32::try_from(self.pc_value(function, table, offset)?).ok()
    }

    /// The first line of the function.
    pub fn start(&self, function: Function) -> Option<Position<'_>> {
        let (file, line) = self.file_line(function, function.entry);
        Some(Position {
            function: self.name(function)?,
            file,
            line: if self.modern {
                self.u32_at(function.at.checked_add(36)?)?
            } else {
                line
            },
            inlined: false,
            func_id: self.func_id(function)?,
            at: function.entry,
        })
    }

    /// File and line at `offset`.
    pub fn file_line(&self, function: Function, offset: TextOffset) -> (&[u8], u32) {
        self.try_file_line(function, offset).unwrap_or((b"", 0))
    }

    fn try_file_line(&self, function: Function, offset: TextOffset) -> Option<(&[u8], u32)> {
        let file_table = self.u32_at(function.at.checked_add(20)?)?;
        let line_table = self.u32_at(function.at.checked_add(24)?)?;
        let unit = self.u32_at(function.at.checked_add(32)?)?;
        let file = self.pc_value(function, file_table, offset)?;
        let line = self.pc_value(function, line_table, offset)?;
        let slot = unit.checked_add(u32::try_from(file).ok()?)?;
        let name = self.u32_at(self.compile_units.checked_add(slot as usize * 4)?)?;
        if name == u32::MAX {
            return None;
        }
        let name = self.c_string(self.files.checked_add(name as usize)?)?;
        Some((name, u32::try_from(line).ok()?))
    }

    /// The source positions of `offset`, innermost first: inlined calls, then
    /// the function itself.
    ///
    /// `offset` is that of a call or other instruction, not of a return
    /// address (runtime.newInlineUnwinder).
    pub fn positions<D: FunctionData + ?Sized>(
        &self,
        function: Function,
        offset: TextOffset,
        data: &D,
    ) -> Vec<Position<'_>> {
        let mut found = Vec::new();
        let mut at = offset;
        let tree = self.inline_tree(function);
        while found.len() < MAX_INLINE_DEPTH {
            let call = tree.and_then(|tree| {
                let table = self.pc_data(function, PCDATA_INL_TREE_INDEX)?;
                let index = usize::try_from(self.pc_value(function, table, at)?).ok()?;
                self.inlined_call(data, tree, index)
            });
            let (file, line) = self.file_line(function, at);
            let Some(call) = call else {
                found.push(Position {
                    function: self.name(function).unwrap_or(b"?"),
                    file,
                    line,
                    inlined: false,
                    func_id: self.func_id(function).unwrap_or(0),
                    at,
                });
                break;
            };
            found.push(Position {
                function: call.name,
                file,
                line,
                inlined: true,
                func_id: call.func_id,
                at,
            });
            let Some(parent) = function.entry.0.checked_add(call.parent) else {
                break;
            };
            at = TextOffset(parent);
        }
        found
    }

    /// Offset within `_func` of funcID, which the flag follows: behind
    /// startLine from Go 1.20 on.
    fn ids(&self) -> usize {
        if self.modern { 40 } else { 36 }
    }

    /// The function that `function` was made for, where the compiler made it to
    /// carry the arguments of a `go` statement: runtime.startPCForTrace.
    pub fn wrapped<D: FunctionData + ?Sized>(
        &self,
        function: Function,
        data: &D,
    ) -> Option<Function> {
        let at = self.function_data(function, FUNCDATA_WRAP_INFO)?;
        let mut entry = [0; 4];
        data.read(at as u64, &mut entry)?;
        self.function(TextOffset(u32::from_le_bytes(entry)))
    }

    fn inline_tree(&self, function: Function) -> Option<usize> {
        self.function_data(function, FUNCDATA_INL_TREE)
    }

    /// Where a function's data of this kind starts, from `moduledata.gofunc`.
    fn function_data(&self, function: Function, which: u32) -> Option<usize> {
        let ids = function.at.checked_add(self.ids())?;
        let pc_data_count = self.u32_at(function.at.checked_add(28)?)? as usize;
        let count = u32::from(*self.bytes.get(ids + 3)?);
        if which >= count {
            return None;
        }
        let table = ids
            .checked_add(4)?
            .checked_add(pc_data_count.checked_mul(4)?)?;
        let offset = self.u32_at(table.checked_add(which as usize * 4)?)?;
        (offset != u32::MAX).then_some(offset as usize)
    }

    fn pc_data(&self, function: Function, which: u32) -> Option<u32> {
        if which >= self.u32_at(function.at.checked_add(28)?)? {
            return None;
        }
        let table = function.at.checked_add(self.ids() + 4)?;
        self.u32_at(table.checked_add(which as usize * 4)?)
    }

    /// `runtime.inlinedCall`: Go 1.20 shortened it (cmd/internal/goobj,
    /// runtime/symtab.go before, runtime/symtabinl.go since).
    fn inlined_call<D: FunctionData + ?Sized>(
        &self,
        data: &D,
        tree: usize,
        index: usize,
    ) -> Option<InlinedCall<'_>> {
        let size = if self.modern { 16 } else { 20 };
        let at = tree.checked_add(index.checked_mul(size)?)?;
        let mut call = [0; 20];
        let call = &mut call[..size];
        data.read(at as u64, call)?;
        let word = |at: usize| le32(call, at);
        let (func_id, name, parent) = if self.modern {
            (call[0], word(4)?, word(8)?)
        } else {
            (call[2], word(12)?, word(16)?)
        };
        Some(InlinedCall {
            func_id,
            name: self.name_at(name)?,
            parent,
        })
    }

    fn entry_at(&self, index: usize) -> Option<TextOffset> {
        self.u32_at(self.functions.checked_add(index.checked_mul(8)?)?)
            .map(TextOffset)
    }

    fn function_at(&self, index: usize) -> Option<Function> {
        let slot = self.functions.checked_add(index.checked_mul(8)?)?;
        let at = self
            .functions
            .checked_add(self.u32_at(slot.checked_add(4)?)? as usize)?;
        let entry = TextOffset(self.u32_at(slot)?);
        // The `_func` repeats its entry: a table that lies about it is none.
        (self.u32_at(at)? == entry.0).then_some(Function { entry, at })
    }

    /// The value of a pc-value table at `target`: runtime.pcvalue.
    fn pc_value(&self, function: Function, table: u32, target: TextOffset) -> Option<i32> {
        if table == 0 {
            return None;
        }
        let bytes = self
            .bytes
            .get(self.pc_values.checked_add(table as usize)?..)?;
        let mut bytes = bytes.iter().copied();
        let quantum = self.arch.pc_quantum();
        let target = target.0.checked_sub(function.entry.0)?;
        let (mut pc, mut value) = (0u32, -1i32);
        for i in 0..MAX_PC_VALUES {
            let delta = varint(&mut bytes)?;
            if delta == 0 && i > 0 {
                return None;
            }
            value = value.wrapping_add((delta >> 1) as i32 ^ -((delta & 1) as i32));
            pc = pc.checked_add(varint(&mut bytes)?.checked_mul(quantum)?)?;
            if target < pc {
                return Some(value);
            }
        }
        None
    }

    fn name_at(&self, offset: u32) -> Option<&[u8]> {
        self.c_string(self.names.checked_add(offset as usize)?)
    }

    fn c_string(&self, at: usize) -> Option<&[u8]> {
        let bytes = self.bytes.get(at..)?;
        let bytes = &bytes[..bytes.len().min(MAX_NAME)];
        Some(&bytes[..bytes.iter().position(|b| *b == 0)?])
    }

    fn u32_at(&self, at: usize) -> Option<u32> {
        le32(&self.bytes, at)
    }
}

struct InlinedCall<'a> {
    func_id: u8,
    name: &'a [u8],
    parent: u32,
}

struct Header {
    modern: bool,
    function_count: usize,
    names: usize,
    compile_units: usize,
    files: usize,
    pc_values: usize,
    functions: usize,
}

impl Header {
    fn parse(bytes: &[u8], arch: Arch) -> Option<Header> {
        let modern = match le32(bytes, 0)? {
            MAGIC_118 => false,
            MAGIC_120 => true,
            _ => return None,
        };
        let fixed = bytes.get(4..8)?;
        if fixed[..2] != [0, 0] || u32::from(fixed[2]) != arch.pc_quantum() || fixed[3] != 8 {
            return None;
        }
        let word = |at: usize| usize::try_from(le64(bytes, at)?).ok();
        let header = Header {
            modern,
            function_count: word(8)?,
            names: word(32)?,
            compile_units: word(40)?,
            files: word(48)?,
            pc_values: word(56)?,
            functions: word(64)?,
        };
        let ascending = [
            HEADER,
            header.names,
            header.compile_units,
            header.files,
            header.pc_values,
            header.functions,
        ];
        // The table holds 32-bit offsets of itself.
        let sane = ascending.is_sorted() && header.functions <= u32::MAX as usize;
        // A function's entry and its `_func` take 8 + 40 bytes at the least.
        (sane && header.function_count > 0 && header.function_count <= u32::MAX as usize / 48)
            .then_some(header)
    }
}

fn varint(bytes: &mut impl Iterator<Item = u8>) -> Option<u32> {
    let mut value = 0u32;
    for shift in (0..35).step_by(7) {
        let byte = bytes.next()?;
        value |= u32::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(word.try_into().ok()?))
}
