//! pprof labels of a goroutine: what `g.labels` points to.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::binary::addr::RuntimeAddr;
use crate::process::memory::Memory;

use super::layout::Layout;

/// Key and value of each label, by key.
type LabelSet = Vec<(Arc<str>, Arc<str>)>;

/// Bytes of labels that a dump keeps.
const KEPT: usize = 64 << 20;

/// More labels than anybody sets are not believed.
const MOST: usize = 64;

/// Longest key or value that is read, in bytes.
const LONGEST: u64 = 1024;

/// Bytes of a Go string's header.
const STRING: u64 = 16;

/// The labels of a dump's goroutines. Those spawned by one have its own.
#[derive(Debug, Default)]
pub struct Labels {
    by_addr: FxHashMap<u64, LabelSet>,
    /// Bytes of all of them.
    len: usize,
}

impl Labels {
    /// The labels at `addr`, a `runtime/pprof.labelMap` (runtime/pprof/label.go);
    /// none once there are too many.
    ///
    /// Nobody changes them once they are set, so what cannot be read is none.
    pub fn of<M: Memory>(&mut self, memory: &M, layout: &Layout, addr: u64) -> LabelSet {
        if addr == 0 {
            return LabelSet::new();
        }
        if let Some(labels) = self.by_addr.get(&addr) {
            return labels.clone();
        }
        if self.len > KEPT {
            return LabelSet::new();
        }
        let reader = Reader { memory };
        let read = if layout.labels_are_slice {
            reader.slice(addr)
        } else {
            reader.map(addr)
        };
        let mut labels = read.unwrap_or_default();
        labels.sort_unstable();
        let texts = labels.iter().map(|(key, value)| key.len() + value.len());
        self.len += texts.sum::<usize>() + 64;
        self.by_addr.insert(addr, labels.clone());
        labels
    }
}

struct Reader<'a, M> {
    memory: &'a M,
}

impl<M: Memory> Reader<'_, M> {
    fn word(&self, at: u64) -> Option<u64> {
        self.memory.u64_at(RuntimeAddr(at)).ok()
    }

    fn string(&self, at: u64) -> Option<Arc<str>> {
        let (data, len) = (self.word(at)?, self.word(at.wrapping_add(8))?);
        let len = len.min(LONGEST) as usize;
        let bytes = self.memory.bytes(RuntimeAddr(data), len).ok()?;
        Some(String::from_utf8_lossy(&bytes).into())
    }

    /// A slice of pairs of strings: from Go 1.24 on.
    fn slice(&self, addr: u64) -> Option<LabelSet> {
        let list = self.word(addr)?;
        let len = self.word(addr.wrapping_add(8))?.min(MOST as u64);
        let pair = |i: u64| {
            let at = list.wrapping_add(i * 2 * STRING);
            Some((self.string(at)?, self.string(at.wrapping_add(STRING))?))
        };
        (0..len).map(pair).collect()
    }

    /// A map of strings, `runtime.hmap` in runtime/map.go: up to Go 1.23.
    fn map(&self, addr: u64) -> Option<LabelSet> {
        /// Of a bucket, and of `abi.MapBucketCount` cells in it.
        const CELLS: u64 = 8;
        const OVERFLOW: u64 = CELLS + CELLS * 2 * STRING;
        const BUCKET: u64 = OVERFLOW + 8;
        /// `sameSizeGrow`, a flag of the map.
        const SAME_SIZE: u64 = 8;
        /// `minTopHash`: below it a cell is empty or has been moved.
        const FILLED: u8 = 5;
        let map = self.word(addr)?;
        if map == 0 {
            return Some(LabelSet::new());
        }
        let count = self.word(map)?.min(MOST as u64) as usize;
        let flags = self.word(map.wrapping_add(8))?;
        let log2_buckets = (flags >> 8) as u8;
        let (buckets, old) = (
            self.word(map.wrapping_add(16))?,
            self.word(map.wrapping_add(24))?,
        );
        let number = 1_u64.checked_shl(log2_buckets.into())?.min(MOST as u64);
        // While it grows, each cell is in one of both arrays.
        let old_number = match old {
            0 => 0,
            _ if flags & SAME_SIZE != 0 => number,
            _ => number / 2,
        };
        let starts = (0..number)
            .map(|i| buckets.wrapping_add(i * BUCKET))
            .chain((0..old_number).map(|i| old.wrapping_add(i * BUCKET)));
        let mut labels = LabelSet::new();
        for start in starts {
            let mut bucket = start;
            // A chain that is longer than all labels is none.
            for _ in 0..MOST {
                if bucket == 0 || labels.len() == count {
                    break;
                }
                let hashes = self.word(bucket)?.to_le_bytes();
                for (cell, hash) in (0..).zip(hashes) {
                    if hash >= FILLED && labels.len() < count {
                        let key = bucket.wrapping_add(CELLS + cell * STRING);
                        let value = key.wrapping_add(CELLS * STRING);
                        labels.push((self.string(key)?, self.string(value)?));
                    }
                }
                bucket = self.word(bucket.wrapping_add(OVERFLOW))?;
            }
        }
        Some(labels)
    }
}
