//! What becomes of the machine's processes, told by the kernel: no need to list
//! /proc to find a new one.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use aya::maps::{Array, MapData, RingBuf};
use leakmon_common::threads::event;

use super::error::Error;

/// What happened to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It was made; it runs its parent's program.
    Fork(u32),
    /// It runs another program.
    Exec(u32),
    /// Its last thread ends.
    Exit(u32),
}

impl ProcessEvent {
    /// The process.
    pub fn pid(self) -> u32 {
        match self {
            ProcessEvent::Fork(pid) | ProcessEvent::Exec(pid) | ProcessEvent::Exit(pid) => pid,
        }
    }

    fn of(raw: u64) -> Option<ProcessEvent> {
        let pid = raw as u32;
        match (raw >> 32) as u32 {
            event::FORK => Some(ProcessEvent::Fork(pid)),
            event::EXEC => Some(ProcessEvent::Exec(pid)),
            event::EXIT => Some(ProcessEvent::Exit(pid)),
            _ => None,
        }
    }
}

/// Events of every process of the machine, from when this was made. Its file
/// descriptor is readable when there are some.
#[must_use = "dropping it ends the events"]
pub struct ProcessEvents {
    pub(super) ring: RingBuf<MapData>,
    pub(super) lost: Array<MapData, u64>,
    /// Losses that were told.
    pub(super) told: u64,
    /// Keeps the programs attached.
    pub(super) _links: Vec<Arc<OwnedFd>>,
}

impl ProcessEvents {
    /// The events since the last call, in their order, at most as many as the
    /// queue holds; and how many were lost: the reader then lists /proc.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn read(&mut self) -> Result<(Vec<ProcessEvent>, u64), Error> {
        let mut events = Vec::new();
        while events.len() < 8192
            && let Some(item) = self.ring.next()
        {
            let raw = item.get(..8).and_then(|bytes| bytes.try_into().ok());
            events.extend(raw.map(u64::from_ne_bytes).and_then(ProcessEvent::of));
        }
        let lost = self
            .lost
            .get(&0, 0)
            .map_err(super::kernel::map_error("read the lost events"))?;
        let new = lost - self.told;
        self.told = lost;
        Ok((events, new))
    }
}

impl AsFd for ProcessEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor, and lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}
