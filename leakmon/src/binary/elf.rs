//! ELF headers: segments, sections, and the bridge between [`Vaddr`] and
//! [`FileOffset`].
//!
//! Nothing is mapped: a file that shrinks under a mapping kills its reader with
//! SIGBUS. Every read is a `pread`, and every length a file states is held
//! against the file's real size before anything is allocated.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use object::elf::{
    EM_AARCH64, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PF_W, PF_X, PT_DYNAMIC, PT_GNU_EH_FRAME,
    PT_LOAD, ProgramHeader64, SHT_NOBITS, SectionHeader64,
};
use object::pod;
use object::{LittleEndian, U64};

use super::addr::{FileOffset, Vaddr};

const LE: LittleEndian = LittleEndian;

/// Most program or section headers that are looked at. Real executables have
/// tens; the format allows 65,535.
const MAX_HEADERS: u64 = 4096;

/// Most bytes of section names that are looked at.
const MAX_NAMES: u64 = 1 << 20;

/// Something that bytes can be read from at an offset: a file, or a test's
/// byte array.
pub trait ReadAt {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Any I/O error; [`io::ErrorKind::UnexpectedEof`] past the end.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// `len` bytes from `offset`, allocated only after the length was checked.
    ///
    /// # Errors
    /// As [`ReadAt::read_exact_at`].
    fn bytes_at(&self, offset: FileOffset, len: u64) -> io::Result<Vec<u8>> {
        let end = offset.0.checked_add(len);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut buf = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?];
        self.read_exact_at(offset.0, &mut buf)?;
        Ok(buf)
    }
}

impl ReadAt for File {
    fn size(&self) -> u64 {
        self.metadata().map_or(0, |m| m.len())
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }
}

impl<T: ReadAt> ReadAt for Arc<T> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_exact_at(offset, buf)
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let bytes = start
            .checked_add(buf.len())
            .and_then(|end| self.get(start..end))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

/// The instruction sets that leakmon knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Arch {
    /// x86-64, Go's amd64.
    X86_64,
    /// AArch64, Go's arm64.
    Aarch64,
}

impl Arch {
    /// The architecture of this leakmon, the only one whose processes it meets.
    pub const NATIVE: Arch = if cfg!(target_arch = "aarch64") {
        Arch::Aarch64
    } else {
        Arch::X86_64
    };

    /// Go's `sys.PCQuantum`: the unit of program counters in its tables.
    pub fn pc_quantum(self) -> u32 {
        match self {
            Arch::X86_64 => 1,
            Arch::Aarch64 => 4,
        }
    }
}

/// Why a file is not an ELF executable that leakmon can read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ElfError {
    /// The file could not be read.
    #[error("reading {what}: {source}")]
    Io {
        /// What was being read.
        what: &'static str,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// No ELF magic.
    #[error("not an ELF file")]
    NotElf,
    /// ELFCLASS32.
    #[error("a 32-bit program; only 64-bit programs are supported")]
    ThirtyTwoBit,
    /// Big-endian.
    #[error("a big-endian program; only little-endian programs are supported")]
    BigEndian,
    /// Another machine.
    #[error("made for another machine (ELF machine {0})")]
    Machine(u16),
    /// Not an executable.
    #[error("not an executable (ELF type {0})")]
    NotExecutable(u16),
    /// A header contradicts the file or itself.
    #[error("damaged: {0}")]
    Damaged(&'static str),
}

impl ElfError {
    /// The file could not be read.
    pub fn io(what: &'static str, source: io::Error) -> ElfError {
        ElfError::Io {
            what,
            source: Arc::new(source),
        }
    }
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ElfError {
    move |source| match source.kind() {
        io::ErrorKind::UnexpectedEof => ElfError::Damaged("it ends before its headers do"),
        _ => ElfError::io(what, source),
    }
}

/// A PT_LOAD segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where the file says it lies in memory.
    pub vaddr: Vaddr,
    /// Where its bytes are in the file.
    pub offset: FileOffset,
    /// Bytes in the file, cut to what the file really has.
    pub file_size: u64,
    /// Bytes in memory.
    pub mem_size: u64,
    /// Mapped writable.
    pub writable: bool,
    /// Mapped executable.
    pub executable: bool,
}

/// What a program header other than PT_LOAD points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where the file says it lies in memory.
    pub vaddr: Vaddr,
    /// Bytes in the file, as the header has it.
    pub size: u64,
}

/// A section that has bytes in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name, lossily decoded.
    pub name: String,
    /// Where it lies in memory; 0 when it is not loaded.
    pub vaddr: Vaddr,
    /// Where its bytes are in the file.
    pub offset: FileOffset,
    /// Its size in bytes; lies within the file.
    pub size: u64,
}

/// What an ELF executable's headers say.
#[derive(Clone, Debug)]
pub struct Elf {
    /// Its instruction set.
    pub arch: Arch,
    /// Loaded at an address that the kernel chooses.
    pub position_independent: bool,
    /// `e_entry`.
    pub entry: Vaddr,
    /// PT_LOAD segments in file order.
    pub segments: Vec<Segment>,
    /// PT_DYNAMIC: what the dynamic linker reads.
    pub dynamic: Option<Part>,
    /// PT_GNU_EH_FRAME: the index of the unwind information.
    pub eh_frame_hdr: Option<Part>,
    /// Sections with bytes in the file; empty when the section table is gone.
    pub sections: Vec<Section>,
}

impl Elf {
    /// Reads the headers of `file`.
    ///
    /// A damaged section table is treated as absent, since nothing at run time
    /// depends on it; damaged program headers are an error.
    ///
    /// # Errors
    /// [`ElfError`] says what is wrong with the file.
    pub fn parse<R: ReadAt + ?Sized>(file: &R) -> Result<Elf, ElfError> {
        let ident = file
            .bytes_at(FileOffset(0), 20)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => ElfError::NotElf,
                _ => ElfError::Io {
                    what: "the ELF header",
                    source: Arc::new(e),
                },
            })?;
        if ident[..4] != *b"\x7fELF" {
            return Err(ElfError::NotElf);
        }
        if ident[4] == 1 {
            return Err(ElfError::ThirtyTwoBit);
        }
        if ident[5] == 2 {
            return Err(ElfError::BigEndian);
        }
        let bytes = file
            .bytes_at(
                FileOffset(0),
                size_of::<FileHeader64<LittleEndian>>() as u64,
            )
            .map_err(io_error("the ELF header"))?;
        let (header, _) = pod::from_bytes::<FileHeader64<LittleEndian>>(&bytes)
            .map_err(|()| ElfError::Damaged("the ELF header"))?;
        let arch = match header.e_machine.get(LE) {
            EM_X86_64 => Arch::X86_64,
            EM_AARCH64 => Arch::Aarch64,
            other => return Err(ElfError::Machine(other.0)),
        };
        let position_independent = match header.e_type.get(LE) {
            ET_EXEC => false,
            ET_DYN => true,
            other => return Err(ElfError::NotExecutable(other.0)),
        };
        let headers = program_headers(file, header)?;
        let segments = segments(&headers, file.size())?;
        let part = |kind| {
            let header = headers.iter().find(|p| p.p_type.get(LE) == kind)?;
            Some(Part {
                vaddr: Vaddr(header.p_vaddr.get(LE)),
                size: header.p_filesz.get(LE),
            })
        };
        let mut elf = Elf {
            arch,
            position_independent,
            entry: Vaddr(header.e_entry.get(LE)),
            segments,
            dynamic: part(PT_DYNAMIC),
            eh_frame_hdr: part(PT_GNU_EH_FRAME),
            sections: Vec::new(),
        };
        elf.sections = sections(file, header).unwrap_or_default();
        Ok(elf)
    }

    /// The section called `name`.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name)
    }

    /// The build id that GNU tools know the file by, in hexadecimal.
    pub fn build_id<R: ReadAt + ?Sized>(&self, file: &R) -> Option<String> {
        /// Longest id that is believed, in bytes; a SHA-1 has 20.
        const MAX: u64 = 64;
        let section = self.section(".note.gnu.build-id")?;
        let note = file
            .bytes_at(section.offset, section.size.min(16 + MAX))
            .ok()?;
        let word = |at: usize| {
            let bytes = note.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        // NT_GNU_BUILD_ID of owner GNU.
        if word(0)? != 4 || word(8)? != 3 || note.get(12..16)? != b"GNU\0" {
            return None;
        }
        let id = note.get(16..16 + word(4)? as usize)?;
        Some(id.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Where the byte at `vaddr` is in the file.
    pub fn file_offset(&self, vaddr: Vaddr) -> Option<FileOffset> {
        self.segments.iter().find_map(|s| {
            let delta = vaddr.offset_from(s.vaddr)?;
            (delta < s.file_size).then(|| s.offset.checked_add(delta))?
        })
    }

    /// Reads `len` bytes at `vaddr` from the file.
    ///
    /// # Errors
    /// [`ElfError::Damaged`] when no segment holds the whole range.
    pub fn read<R: ReadAt + ?Sized>(
        &self,
        file: &R,
        vaddr: Vaddr,
        len: u64,
    ) -> Result<Vec<u8>, ElfError> {
        let offset = self
            .segments
            .iter()
            .find_map(|s| {
                let delta = vaddr.offset_from(s.vaddr)?;
                let end = delta.checked_add(len)?;
                (end <= s.file_size).then(|| s.offset.checked_add(delta))?
            })
            .ok_or(ElfError::Damaged("an address lies outside of its segments"))?;
        file.bytes_at(offset, len).map_err(io_error("a segment"))
    }
}

fn program_headers<R: ReadAt + ?Sized>(
    file: &R,
    header: &FileHeader64<LittleEndian>,
) -> Result<Vec<ProgramHeader64<LittleEndian>>, ElfError> {
    let count = u64::from(header.e_phnum.get(LE));
    let entry = size_of::<ProgramHeader64<LittleEndian>>() as u64;
    if u64::from(header.e_phentsize.get(LE)) != entry || count == 0 || count > MAX_HEADERS {
        return Err(ElfError::Damaged("the program header table"));
    }
    let bytes = file
        .bytes_at(FileOffset(header.e_phoff.get(LE)), count * entry)
        .map_err(io_error("the program headers"))?;
    let (headers, _) =
        pod::slice_from_bytes::<ProgramHeader64<LittleEndian>>(&bytes, count as usize)
            .map_err(|()| ElfError::Damaged("the program header table"))?;
    Ok(headers.to_vec())
}

fn segments(
    headers: &[ProgramHeader64<LittleEndian>],
    size: u64,
) -> Result<Vec<Segment>, ElfError> {
    let get = |field: &U64<LittleEndian>| field.get(LE);
    let loads: Vec<Segment> = headers
        .iter()
        .filter(|p| p.p_type.get(LE) == PT_LOAD)
        .map(|p| {
            let offset = get(&p.p_offset);
            let flags = p.p_flags.get(LE);
            Segment {
                vaddr: Vaddr(get(&p.p_vaddr)),
                offset: FileOffset(offset),
                file_size: get(&p.p_filesz).min(size.saturating_sub(offset)),
                mem_size: get(&p.p_memsz),
                writable: flags.contains(PF_W),
                executable: flags.contains(PF_X),
            }
        })
        .collect();
    if loads.is_empty() {
        return Err(ElfError::Damaged("no segment is loaded"));
    }
    Ok(loads)
}

fn sections<R: ReadAt + ?Sized>(
    file: &R,
    header: &FileHeader64<LittleEndian>,
) -> Option<Vec<Section>> {
    let count = u64::from(header.e_shnum.get(LE));
    let entry = size_of::<SectionHeader64<LittleEndian>>() as u64;
    if u64::from(header.e_shentsize.get(LE)) != entry || count == 0 || count > MAX_HEADERS {
        return None;
    }
    let bytes = file
        .bytes_at(FileOffset(header.e_shoff.get(LE)), count * entry)
        .ok()?;
    let (headers, _) =
        pod::slice_from_bytes::<SectionHeader64<LittleEndian>>(&bytes, count as usize).ok()?;
    let names = headers.get(usize::from(header.e_shstrndx.get(LE).0))?;
    let names = file
        .bytes_at(
            FileOffset(names.sh_offset.get(LE)),
            names.sh_size.get(LE).min(MAX_NAMES),
        )
        .ok()?;
    let size = file.size();
    let found = headers
        .iter()
        .filter(|s| s.sh_type.get(LE) != SHT_NOBITS)
        .filter_map(|s| {
            let offset = s.sh_offset.get(LE);
            let section = Section {
                name: c_string(names.get(s.sh_name.get(LE) as usize..)?),
                vaddr: Vaddr(s.sh_addr.get(LE)),
                offset: FileOffset(offset),
                size: s.sh_size.get(LE),
            };
            (offset.checked_add(section.size)? <= size).then_some(section)
        });
    Some(found.collect())
}

fn c_string(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test's own executable is as real as an ELF file gets.
    #[test]
    fn reads_its_own_headers() {
        let file = File::open("/proc/self/exe").unwrap();
        let elf = Elf::parse(&file).unwrap();
        assert_eq!(elf.arch, Arch::NATIVE);
        let text = elf.section(".text").unwrap();
        assert_eq!(elf.file_offset(text.vaddr), Some(text.offset));
        let entry = elf.read(&file, elf.entry, 16).unwrap();
        let offset = elf.file_offset(elf.entry).unwrap();
        assert_eq!(entry, file.bytes_at(offset, 16).unwrap());
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_an_answer() {
        let file = File::open("/proc/self/exe").unwrap();
        let mut head = file.bytes_at(FileOffset(0), 2048).unwrap();
        for len in 0..head.len() {
            let _ = Elf::parse(&head[..len]);
        }
        for i in 0..head.len() {
            for flip in [0xff, 0x80, 1] {
                head[i] ^= flip;
                let _ = Elf::parse(&head[..]);
                head[i] ^= flip;
            }
        }
    }

    #[test]
    fn says_what_a_file_is_not() {
        assert!(matches!(
            Elf::parse(&b"#!/bin/sh\nexit 0\n...."[..]),
            Err(ElfError::NotElf)
        ));
        assert!(matches!(Elf::parse(&b""[..]), Err(ElfError::NotElf)));
        let mut elf32 = [0u8; 64];
        elf32[..6].copy_from_slice(b"\x7fELF\x01\x01");
        assert!(matches!(
            Elf::parse(&elf32[..]),
            Err(ElfError::ThirtyTwoBit)
        ));
    }

    #[test]
    fn no_length_is_believed() {
        let bytes = [0u8; 16];
        assert!(bytes.bytes_at(FileOffset(8), 9).is_err());
        assert!(bytes.bytes_at(FileOffset(u64::MAX), 1).is_err());
        assert!(bytes.bytes_at(FileOffset(0), u64::MAX).is_err());
        assert_eq!(bytes.bytes_at(FileOffset(8), 8).unwrap().len(), 8);
    }
}
