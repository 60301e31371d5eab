//! Is a program Go, and which version built it: the `.go.buildinfo` blob that
//! the linker writes and `strip` keeps.

use crate::binary::elf::{Elf, ElfError, ReadAt};
use crate::task::human::safe;

/// First bytes of the blob: `buildInfoMagic`, debug/buildinfo/buildinfo.go.
const MAGIC: &[u8; 14] = b"\xff Go buildinf:";

/// The blob's alignment: `buildInfoAlign`, debug/buildinfo/buildinfo.go.
const ALIGN: usize = 16;

/// Size of the blob's fixed part: `buildInfoHeaderSize`, the same file.
const HEADER: usize = 32;

/// Set in the flags byte when the version is stored in the blob itself, as all
/// linkers from Go 1.18 on do: `flagsVersionInl`, the same file.
const INLINE: u8 = 2;

/// How far into the writable segments the blob is looked for when no section
/// names it. The linker puts it first in the data segment; external linkers
/// may put relocated read-only data before it.
const SEARCH: u64 = 16 << 20;

/// Most writable segments that are searched; linkers make up to three.
const MAX_SEGMENTS: usize = 16;

/// A Go version, `1.minor.patch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The 26 of 1.26.8.
    pub minor: u32,
    /// The whole text, as the program would print it: `go1.26.8 X:nodwarf5`.
    pub text: String,
}

/// What the blob says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildInfo {
    /// Built by Go of this version.
    Version(Version),
    /// A Go program with a version that is none: a development toolchain, or a
    /// tool that hides it.
    Unintelligible(String),
    /// The version is stored behind pointers: Go 1.17 or older.
    Old,
    /// No blob at all.
    Absent,
}

/// Reads the blob of the executable `file`.
///
/// # Errors
/// When the file cannot be read.
pub fn read<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Result<BuildInfo, ElfError> {
    if let Some(section) = elf.section(".go.buildinfo") {
        let len = section.size.min(SEARCH);
        let bytes = file
            .bytes_at(section.offset, len)
            .map_err(|source| ElfError::io(".go.buildinfo", source))?;
        return Ok(parse(&bytes));
    }
    let writable = elf.segments.iter().filter(|s| s.writable);
    for segment in writable.take(MAX_SEGMENTS) {
        let bytes = elf.read(file, segment.vaddr, segment.file_size.min(SEARCH))?;
        match parse(&bytes) {
            BuildInfo::Absent => {}
            found => return Ok(found),
        }
    }
    Ok(BuildInfo::Absent)
}

/// Finds and reads the blob in `bytes`, which start at a 16-byte boundary.
pub fn parse(bytes: &[u8]) -> BuildInfo {
    let mut starts = (0..bytes.len().saturating_sub(HEADER)).step_by(ALIGN);
    let Some(start) = starts.find(|i| bytes[*i..].starts_with(MAGIC)) else {
        return BuildInfo::Absent;
    };
    let blob = &bytes[start..];
    if blob[15] & INLINE == 0 {
        return BuildInfo::Old;
    }
    let rest = &blob[HEADER..];
    let Some((len, used)) = uvarint(rest) else {
        return BuildInfo::Unintelligible(String::new());
    };
    // A version is a few dozen bytes; a tool's own tag may add some.
    let text = usize::try_from(len)
        .ok()
        .filter(|len| *len <= 1024)
        .and_then(|len| rest.get(used..used.checked_add(len)?))
        .map(|text| safe(&String::from_utf8_lossy(text)).into_owned());
    match text {
        Some(text) => match minor(&text) {
            Some(minor) => BuildInfo::Version(Version { minor, text }),
            None => BuildInfo::Unintelligible(text),
        },
        None => BuildInfo::Unintelligible(String::new()),
    }
}

/// The 26 of `go1.26`, `go1.26.8`, `go1.26rc1`, `go1.26.11-X:nodwarf5`,
/// `go1.26.8 X:aliastypeparams`.
fn minor(text: &str) -> Option<u32> {
    let rest = text.strip_prefix("go1.")?;
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// An unsigned varint and its length, encoding/binary's `Uvarint`.
fn uvarint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0u64;
    for (i, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * i as u32)?;
        if byte & 0x80 == 0 {
            return Some((value, i + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(flags: u8, version: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 48];
        bytes.extend(MAGIC);
        bytes.extend([8, flags]);
        bytes.resize(48 + HEADER, 0);
        bytes.push(version.len() as u8);
        bytes.extend(version);
        bytes.extend([0; 8]);
        bytes
    }

    #[test]
    fn versions_with_every_suffix() {
        for (text, minor) in [
            ("go1.18", 18),
            ("go1.19.8", 19),
            ("go1.26.11-X:nodwarf5", 26),
            ("go1.27rc2", 27),
            ("go1.24.4 X:boringcrypto", 24),
        ] {
            let expected = BuildInfo::Version(Version {
                minor,
                text: text.into(),
            });
            assert_eq!(parse(&blob(2, text.as_bytes())), expected);
        }
    }

    #[test]
    fn what_is_no_version_says_so() {
        assert_eq!(
            parse(&blob(2, b"unknown")),
            BuildInfo::Unintelligible("unknown".into())
        );
        assert_eq!(
            parse(&blob(2, b"devel go1.26-abc")),
            BuildInfo::Unintelligible("devel go1.26-abc".into())
        );
        assert_eq!(parse(&blob(0, b"")), BuildInfo::Old);
        assert_eq!(parse(&[0; 500]), BuildInfo::Absent);
        assert_eq!(parse(&[]), BuildInfo::Absent);
    }

    #[test]
    fn cut_anywhere() {
        let whole = blob(2, b"go1.26.8");
        for len in 0..whole.len() {
            let _ = parse(&whole[..len]);
        }
    }
}
