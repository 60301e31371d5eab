//! Every task of one process, at one moment.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::SystemTime;

use crate::process::identity::Process;
use crate::report::stacks::{self, Format, Origin};
use crate::runtime::{self, Cache, Kind, Refusal};
use crate::task::Dump;

use super::KernelSide;

/// A dump, and what a profile says of where it comes from.
#[derive(Debug)]
pub struct Dumped {
    /// The tasks.
    pub dump: Dump,
    executable: String,
    build_id: Option<String>,
    at: SystemTime,
}

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// They cannot be read.
    #[error(transparent)]
    Refusal(#[from] Refusal),
    /// The process has no runtime of this kind.
    #[error("has no {}", .0.tasks())]
    None(Kind),
}

impl Dumped {
    /// Reads the tasks of `wanted`; without it of the first runtime that the process
    /// has, threads being the last.
    ///
    /// # Errors
    /// [`DumpError`], without the process's name.
    pub fn read(
        process: &Process,
        wanted: Option<Kind>,
        kernel: Arc<KernelSide>,
        cache: &Cache,
    ) -> Result<Dumped, DumpError> {
        let found = runtime::open(process, cache)
            .into_iter()
            .find(|found| wanted.is_none_or(|wanted| wanted == found.kind));
        let mut tasks = match found {
            Some(found) => found.tasks?,
            None => return Err(DumpError::None(wanted.unwrap_or(Kind::Threads))),
        };
        tasks.use_registers(Box::new(move |pid| kernel.registers(pid)));
        Ok(Dumped {
            dump: tasks.dump()?,
            executable: process.identity.executable.to_string_lossy().into_owned(),
            build_id: tasks.build_id(),
            at: SystemTime::now(),
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// Of `out`.
    pub fn write(&self, format: Format, out: &mut dyn Write) -> io::Result<()> {
        let origin = Origin {
            executable: &self.executable,
            build_id: self.build_id.as_deref(),
            at: self.at,
        };
        stacks::write(format, &self.dump, origin, out)
    }
}
