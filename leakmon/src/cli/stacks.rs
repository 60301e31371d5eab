//! `leakmon stacks`: every goroutine of a process, without a stop and without
//! an endpoint.

use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use crate::process::identity::Process;
use crate::report::stacks::{self, Format, Origin};
use crate::runtime::go;

use super::{Exit, Failure, StacksArgs, StacksFormat, exit_of};

/// Bytes of output that are collected before they are written.
const BUFFER: usize = 1 << 18;

/// Runs the command.
///
/// # Errors
/// [`Failure`] when the process cannot be dumped.
pub fn run(args: &StacksArgs) -> Result<Exit, Failure> {
    if args.format == StacksFormat::Pprof && io::stdout().is_terminal() {
        return Err(Failure {
            message: "a pprof profile is no text: send it to a file, `> goroutines.pb.gz`"
                .to_owned(),
            exit: Exit::Usage,
        });
    }
    let process = Process::open(args.pid)?;
    let failed = |refusal: go::program::Refusal| Failure {
        message: format!("{}: {refusal}", process.identity.describe()),
        exit: exit_of(&refusal),
    };
    let mut census = go::census(&process).map_err(failed)?;
    let dump = census.dump().map_err(failed)?;
    let format = match args.format {
        StacksFormat::Debug2 => Format::Debug2,
        StacksFormat::Debug1 => Format::Debug1,
        StacksFormat::Json => Format::Json,
        StacksFormat::Folded => Format::Folded,
        StacksFormat::Pprof => Format::Pprof,
    };
    let executable = process.identity.executable.to_string_lossy();
    let program = census.program();
    let build_id = program.elf.build_id(&program.file);
    let origin = Origin {
        executable: &executable,
        build_id: build_id.as_deref(),
        at: SystemTime::now(),
    };
    let mut out = io::BufWriter::with_capacity(BUFFER, io::stdout().lock());
    match stacks::write(format, &dump, origin, &mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(Exit::Success),
        // The reader has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Success),
        Err(error) => Err(Failure::output(&error)),
    }
}
