//! `leakmon stacks`: every goroutine, tokio task or thread of a process,
//! without a stop and without an endpoint.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use crate::process::identity::Process;
use crate::report::stacks::Format;
use crate::runtime::{Cache, Kind};
use crate::watch::KernelSide;
use crate::watch::dump::{DumpError, Dumped};

use super::{Exit, Failure, RuntimeArg, StacksArgs, StacksFormat, exit_of};

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
    let failed = |error: DumpError| Failure {
        message: format!("{}: {error}", process.identity.describe()),
        exit: match &error {
            DumpError::Refusal(refusal) => exit_of(refusal),
            DumpError::None(_) => Exit::Refused,
        },
    };
    let wanted = args.runtime.map(RuntimeArg::kind);
    let kernel = Arc::new(KernelSide::new(false));
    let dumped = Dumped::read(&process, wanted, kernel, &Cache::default()).map_err(failed)?;
    let format = match args.format {
        StacksFormat::Debug2 => Format::Debug2,
        StacksFormat::Debug1 => Format::Debug1,
        StacksFormat::Json => Format::Json,
        StacksFormat::Folded => Format::Folded,
        StacksFormat::Pprof => Format::Pprof,
    };
    let mut out = io::BufWriter::with_capacity(BUFFER, io::stdout().lock());
    match dumped.write(format, &mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(Exit::Success),
        // The reader has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Success),
        Err(error) => Err(Failure::output(&error)),
    }
}

impl RuntimeArg {
    fn kind(self) -> Kind {
        match self {
            RuntimeArg::Go => Kind::Go,
            RuntimeArg::Tokio => Kind::Tokio,
            RuntimeArg::Threads => Kind::Threads,
        }
    }
}
