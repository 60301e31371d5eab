//! What executable memory of a process is mapped from: `/proc/PID/maps`.
//!
//! Read by hand, and the executable lines only: a Java process has thousands
//! of others.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};

use super::memory::{MemoryError, ProcessMemory};

/// An executable mapping.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// Where it starts in its file, in bytes.
    pub offset: u64,
    /// `MAJOR:MINOR` of the file's device.
    pub device: String,
    /// The file's inode; 0 when it is no file's.
    pub inode: u64,
    /// The file's path, `[vdso]`, or empty.
    pub name: String,
}

/// The executable mappings in the text of `/proc/PID/maps`, in their order.
pub fn executable(text: &[u8]) -> Vec<Mapping> {
    text.split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    // START-END PERMS OFFSET DEVICE INODE   PATH
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|byte| *byte == b' ');
        let (field, left) = rest.split_at(end.unwrap_or(rest.len()));
        rest = left.get(1..).unwrap_or_default();
        std::str::from_utf8(field).ok()
    };
    let (start, end) = field()?.split_once('-')?;
    if !field()?.contains('x') {
        return None;
    }
    let offset = u64::from_str_radix(field()?, 16).ok()?;
    let device = field()?.to_owned();
    let inode = field()?.parse().ok()?;
    let (start, end) = (
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    );
    (start < end).then(|| Mapping {
        start,
        end,
        offset,
        device,
        inode,
        name: String::from_utf8_lossy(rest.trim_ascii_start()).into_owned(),
    })
}

impl Mapping {
    /// Opens its file, of process `pid`: by the mapping itself, which also
    /// finds a deleted or replaced file, or by its path if that is still it.
    ///
    /// # Errors
    /// When neither leads to the file.
    pub fn open(&self, pid: u32) -> io::Result<File> {
        let link = format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end);
        if let Ok(file) = File::open(link) {
            return Ok(file);
        }
        // The process may have put something else there, which to open is to wait
        // for ever: it is looked at first.
        let place = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(format!("/proc/{pid}/root{}", self.name))?;
        let found = place.metadata()?;
        if !found.is_file() || found.ino() != self.inode {
            return Err(io::ErrorKind::NotFound.into());
        }
        File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))
    }
}

impl ProcessMemory {
    /// The executable mappings of the process.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn executable_mappings(&self) -> Result<Vec<Mapping>, MemoryError> {
        let text = std::fs::read(format!("/proc/{}/maps", self.pid()))
            .map_err(|error| super::memory::from_io(&error))?;
        Ok(executable(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let text = b"7f00-8f00 r-xp 00001000 fd:01 123                        /usr/lib/a b.so\n\
            9000-a000 rw-p 00000000 00:00 0 \n\
            b000-c000 r-xp 00000000 00:00 0                          [vdso]\n\
            d000-e000 --xp 00000000 00:00 0 \nnonsense\n";
        let found = executable(text);
        assert_eq!(found.len(), 3);
        assert_eq!(
            found[0],
            Mapping {
                start: 0x7f00,
                end: 0x8f00,
                offset: 0x1000,
                device: "fd:01".to_owned(),
                inode: 123,
                name: "/usr/lib/a b.so".to_owned(),
            }
        );
        assert_eq!(found[1].name, "[vdso]");
        assert_eq!(found[2].name, "");
    }

    #[test]
    fn every_cut_is_an_answer() {
        let line = b"7f00-8f00 r-xp 00001000 fd:01 123      /usr/lib/a";
        for end in 0..line.len() {
            let _ = executable(&line[..end]);
        }
        assert!(executable(b"8-7 r-xp 0 0 0").is_empty());
    }
}
