//! The kernel side that a leakmon process shares among everything it watches.

use std::sync::OnceLock;

use crate::probe::{self, Calibration, Drivers, Error, Kernel, Limits, ThreadRegisters, Way};

/// Loaded once, when it is first needed or somebody has the time.
pub struct KernelSide {
    probes: bool,
    /// For probes: proven to fire and to count.
    probing: OnceLock<Result<(Kernel, Calibration), Error>>,
    drivers: Drivers,
    /// For what the kernel tells without a probe in any process.
    reading: OnceLock<Option<Kernel>>,
}

impl KernelSide {
    /// Nothing loaded yet. Without `probes`, nothing will be attached to any
    /// process.
    pub fn new(probes: bool) -> KernelSide {
        let probing = OnceLock::new();
        if !probes {
            // Nobody is to wait for what will not come.
            let _ = probing.set(Err(Error::Unsupported {
                what: "probes",
                why: "nothing asked for them when leakmon started".to_owned(),
            }));
        }
        KernelSide {
            probes,
            probing,
            drivers: Drivers::default(),
            reading: OnceLock::new(),
        }
    }

    /// Loads what probes need. Those that need it wait for it.
    pub fn load(&self) {
        if self.probes {
            // Waiters must hear of it, whatever happens here.
            let loaded = std::panic::catch_unwind(probe::load)
                .unwrap_or_else(|_| Err(Error::Object("loading it panicked".to_owned())));
            // It is loaded by one thread only.
            let _ = self.probing.set(loaded);
        }
    }

    /// What probes need; waits for [`KernelSide::load`].
    pub(super) fn probing(&self) -> Result<&(Kernel, Calibration), &Error> {
        self.probing.wait().as_ref()
    }

    /// What governs what is attached.
    pub(super) fn drivers(&self) -> &Drivers {
        &self.drivers
    }

    /// What reads from the kernel alone; `None` where that is not permitted or
    /// not possible.
    pub fn reading(&self) -> Option<&Kernel> {
        if self.probes {
            return Some(&self.probing.wait().as_ref().ok()?.0);
        }
        let load = || {
            let few = Limits {
                targets: 1,
                sites: 1,
                goroutines: 1,
                waits: 1,
                ..Limits::for_cpus(1)
            };
            let loaded = Kernel::load_with(Way::PerfEvent, few);
            if let Err(error) = &loaded {
                tracing::info!("stacks of threads may be cut short: {error}");
            }
            loaded.ok()
        };
        self.reading.get_or_init(load).as_ref()
    }

    /// The registers of a process's threads; none where the kernel does not say.
    pub fn registers(&self, pid: u32) -> Vec<ThreadRegisters> {
        let registers = self.reading().map(|kernel| kernel.registers(pid));
        match registers {
            Some(Ok(registers)) => registers,
            Some(Err(error)) => {
                tracing::info!("pid {pid}: stacks of threads may be cut short: {error}");
                Vec::new()
            }
            None => Vec::new(),
        }
    }
}
