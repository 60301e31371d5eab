//! Ties a [`Governor`] to a real target.

use std::time::{Duration, Instant};

use super::budget::{Governor, Interval, Reading, cpu_time};
use super::counts::Counts;
use super::error::Error;
use super::kernel::{Attached, Kernel};
use super::plan::{Plan, Tier};

/// One target under a governor.
///
/// [`Driver::tick`] may wait for the kernel while it detaches (30 to 60 ms with
/// uprobe_multi links, up to seconds without): it belongs on a thread that may
/// block.
pub struct Driver {
    pid: u32,
    attached: Attached,
    governor: Governor,
    started: Instant,
}

impl Driver {
    /// Makes the target known to the kernel side. Nothing is attached before
    /// the first tick.
    ///
    /// # Errors
    ///
    /// Those of [`Kernel::attach`].
    pub fn new(
        kernel: &Kernel,
        pid: u32,
        plan: &Plan,
        governor: Governor,
    ) -> Result<Driver, Error> {
        Ok(Driver {
            pid,
            attached: kernel.attach(pid, plan, Tier::Census)?,
            governor,
            started: Instant::now(),
        })
    }

    /// Reads the target, decides, and attaches or detaches. Call it again after
    /// the time that it returns.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the process is gone, [`Error::Attach`] when a place
    /// cannot be probed: then nothing more is attached than was before.
    pub fn tick(&mut self) -> Result<Duration, Error> {
        let step = self.governor.tick(self.reading()?);
        if step.tier != self.attached.tier() {
            self.attached.set_tier(step.tier)?;
        }
        Ok(step.after)
    }

    fn reading(&self) -> Result<Reading, Error> {
        Ok(Reading {
            now: self.started.elapsed(),
            hits: self.attached.hits()?,
            cpu: cpu_time(self.pid).map_err(|source| Error::File {
                path: format!("CPU clock of process {}", self.pid),
                source,
            })?,
        })
    }

    /// The tier in force, attached now or not.
    pub fn tier(&self) -> Tier {
        self.governor.tier()
    }

    /// What is attached at this moment.
    pub fn attached(&self) -> Tier {
        self.attached.tier()
    }

    /// Everything that was counted so far.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn read(&self) -> Result<Counts, Error> {
        self.attached.read()
    }

    /// Cost and use since the last call.
    pub fn take_interval(&mut self) -> Interval {
        self.governor.take_interval()
    }
}
