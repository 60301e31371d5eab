//! Searches a process's memory for the headers of tasks.
//!
//! Only what is private to the process and was written to is read: heap,
//! arenas, stacks, memory files. Pages that are not there stay so: reading them
//! would make the kernel map them. A search is done in slices, so that ten
//! gigabytes are no stop for anybody, and its cost is bounded by whoever calls.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::binary::addr::RuntimeAddr;
use crate::process::memory::{self, Memory, MemoryError};

/// Bytes that are read and looked at together.
const CHUNK: usize = 256 << 10;

/// Bytes of a page: the unit of `/proc/PID/pagemap`. Larger ones are asked for
/// as such, too.
const PAGE: u64 = 4096;

/// Bytes of which it is asked at a time whether they are there.
const WINDOW: u64 = 4 << 20;

/// Most mappings of a process that are searched: the kernel's own default
/// limit, `vm.max_map_count`.
const MAX_MAPPINGS: usize = 65530;

/// The memory of a process that may hold tasks.
#[derive(Debug, Default)]
pub struct Regions {
    /// By address; none overlaps.
    parts: Vec<Range<u64>>,
    pagemap: Option<File>,
}

impl Regions {
    /// Of process `pid`, as it is now.
    ///
    /// # Errors
    /// [`MemoryError::Gone`], [`MemoryError::NotPermitted`].
    pub fn of(pid: u32) -> Result<Regions, MemoryError> {
        let text =
            std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|error| {
                match error.kind() {
                    std::io::ErrorKind::PermissionDenied => MemoryError::NotPermitted,
                    _ => MemoryError::Gone,
                }
            })?;
        Ok(Regions {
            parts: parse(&text),
            pagemap: File::open(format!("/proc/{pid}/pagemap")).ok(),
        })
    }

    /// Bytes of address space.
    pub fn size(&self) -> u64 {
        self.parts.iter().map(|part| part.end - part.start).sum()
    }

    /// Where the part that `addr` is in ends.
    pub(super) fn end(&self, addr: u64) -> Option<u64> {
        let before = self.parts.partition_point(|part| part.start <= addr);
        let part = self.parts.get(before.checked_sub(1)?)?;
        part.contains(&addr).then_some(part.end)
    }

    /// The parts of `window` that are there, or that may be.
    fn present(&self, window: Range<u64>) -> Vec<Range<u64>> {
        /// Bits of an entry: Documentation/admin-guide/mm/pagemap.rst.
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        let Some(pagemap) = &self.pagemap else {
            return vec![window];
        };
        let pages = (window.end - window.start).div_ceil(PAGE);
        let mut entries = vec![0; pages as usize * 8];
        if pagemap
            .read_exact_at(&mut entries, window.start / PAGE * 8)
            .is_err()
        {
            return vec![window];
        }
        let mut found: Vec<Range<u64>> = Vec::new();
        for (page, entry) in (0..).zip(entries.chunks_exact(8)) {
            let entry = entry.try_into().map_or(0, u64::from_le_bytes);
            if entry & PRESENT_OR_SWAPPED == 0 {
                continue;
            }
            let start = window.start + page * PAGE;
            match found.last_mut() {
                Some(last) if last.end == start => last.end += PAGE,
                _ => found.push(start..start + PAGE),
            }
        }
        found
    }
}

/// The mappings in `/proc/PID/maps` that may hold a task: those that the
/// process can write to and that are no file on a disk.
fn parse(text: &str) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else {
            continue;
        };
        let name = fields.nth(3).unwrap_or("");
        let memory = name.is_empty()
            || name == "[heap]"
            || name.starts_with("[stack")
            || name.starts_with("[anon")
            || name.starts_with("/memfd:")
            || name.starts_with("/dev/zero");
        if !permissions.starts_with("rw") || !memory {
            continue;
        }
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (Some(start), Some(end)) = (number(start), number(end)) else {
            continue;
        };
        if start >= end || start % PAGE != 0 || end % PAGE != 0 {
            continue;
        }
        let room = parts.len() < MAX_MAPPINGS;
        match parts.last_mut() {
            Some(last) if last.end == start => last.end = end,
            Some(last) if last.end > start => {}
            _ if room => parts.push(start..end),
            _ => {}
        }
    }
    parts
}

/// A search that may be left and taken up again.
#[derive(Debug)]
pub struct Search {
    regions: Regions,
    /// Index of the part, and address in it, that is next.
    next: (usize, u64),
    buf: Vec<u8>,
}

impl Search {
    /// A search of all of `regions`.
    pub fn new(regions: Regions) -> Search {
        let first = regions.parts.first().map_or(0, |part| part.start);
        Search {
            regions,
            next: (0, first),
            buf: Vec::new(),
        }
    }

    /// Bytes of address space that have not been searched.
    pub fn left(&self) -> u64 {
        let parts = self.regions.parts.get(self.next.0..).unwrap_or_default();
        let all: u64 = parts.iter().map(|part| part.end - part.start).sum();
        let begun = parts.first().map_or(0, |part| self.next.1 - part.start);
        all - begun
    }

    /// Searches on until the end or `deadline`. `found` is called with the
    /// address of each word that `is` one of those searched for. Whether the
    /// end was reached.
    ///
    /// # Errors
    /// [`MemoryError::Gone`] among others. What has been unmapped meanwhile is
    /// passed over.
    pub fn go_on<M: Memory>(
        &mut self,
        memory: &M,
        deadline: Instant,
        is: impl Fn(u64) -> bool,
        mut found: impl FnMut(RuntimeAddr, u64),
    ) -> Result<bool, MemoryError> {
        while let Some(part) = self.regions.parts.get(self.next.0).cloned() {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            let window = self.next.1..(self.next.1 + WINDOW).min(part.end);
            for present in self.regions.present(window.clone()) {
                let mut at = present.start;
                while at < present.end {
                    let len = ((present.end - at) as usize).min(CHUNK);
                    self.buf.resize(CHUNK, 0);
                    let range = memory::Range {
                        addr: RuntimeAddr(at),
                        len,
                    };
                    let done = memory.read_ranges(&[range], &mut self.buf[..len])?;
                    for (index, word) in self.buf[..done].chunks_exact(8).enumerate() {
                        let word = word.try_into().map_or(0, u64::from_le_bytes);
                        if is(word) {
                            found(RuntimeAddr(at + index as u64 * 8), word);
                        }
                    }
                    at += len as u64;
                }
            }
            self.next = match window.end == part.end {
                true => {
                    let index = self.next.0 + 1;
                    let next = self.regions.parts.get(index);
                    (index, next.map_or(0, |part| part.start))
                }
                false => (self.next.0, window.end),
            };
        }
        self.buf = Vec::new();
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::process::identity::Process;
    use crate::process::memory::ProcessMemory;

    #[test]
    fn mappings_that_hold_tasks() {
        let text = "\
5556c7c6b000-5556c7c8c000 rw-p 00000000 00:00 0                          [heap]
7fa1a8000000-7fa1a8021000 rw-p 00000000 00:00 0
7fa1a8021000-7fa1ac000000 ---p 00000000 00:00 0
7fa1ac000000-7fa1ac021000 rw-p 00000000 08:01 123                        /lib/libc.so.6
7fa1ad000000-7fa1ad021000 rw-s 00000000 00:01 456                        /memfd:heap (deleted)
7fa1ad021000-7fa1ad022000 rw-p 00000000 00:00 0                          [anon: x]
7fa1ae000000-7fa1ad000000 rw-p 00000000 00:00 0
7ffeda530000-7ffeda551000 rw-p 00000000 00:00 0                          [stack]
7ffeda552000-7ffeda553000 r--p 00000000 00:00 0                          [vvar]
nonsense";
        assert_eq!(
            parse(text),
            [
                0x5556_c7c6_b000..0x5556_c7c8_c000,
                0x7fa1_a800_0000..0x7fa1_a802_1000,
                0x7fa1_ad00_0000..0x7fa1_ad02_2000,
                0x7ffe_da53_0000..0x7ffe_da55_1000,
            ]
        );
    }

    #[test]
    fn finds_a_word_of_its_own_in_slices_and_leaves_alone_what_is_not_there() {
        let word = 0x7e57_ab1e_0000_0001_u64.rotate_left(13);
        let heap: Vec<u64> = std::hint::black_box(vec![word; 3]);
        // Reserved, and never touched.
        let reserved: Vec<u8> = std::hint::black_box(Vec::with_capacity(1 << 30));
        let memory = ProcessMemory::open(&Process::open(std::process::id()).unwrap()).unwrap();
        let regions = Regions::of(std::process::id()).unwrap();
        assert!(regions.size() > 1 << 30);
        let mut search = Search::new(regions);
        let mut found = Vec::new();
        let mut slices = 0;
        let started = Instant::now();
        loop {
            slices += 1;
            let deadline = Instant::now() + Duration::from_micros(200);
            let end = search
                .go_on(
                    &memory,
                    deadline,
                    |w| w == word,
                    |addr, _| found.push(addr.0),
                )
                .unwrap();
            if end {
                break;
            }
        }
        assert!(slices > 1);
        assert_eq!(search.left(), 0);
        assert!(started.elapsed() < Duration::from_secs(20));
        let first = heap.as_ptr() as u64;
        for addr in [first, first + 8, first + 16] {
            assert!(found.contains(&addr), "{addr:#x} of {found:x?}");
        }
        drop(reserved);
    }
}
