//! `leakmon stacks`: every goroutine, tokio task or thread of a process,
//! without a stop and without an endpoint.

use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use crate::process::identity::Process;
use crate::report::stacks::{self, Format, Origin};
use crate::runtime::{self, Cache, Kind, Refusal, Tasks};

use crate::watch::KernelSide;

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
    let failed = |refusal: Refusal| Failure {
        message: format!("{}: {refusal}", process.identity.describe()),
        exit: exit_of(&refusal),
    };
    let mut tasks = choose(&process, args.runtime)?.map_err(failed)?;
    let kernel = KernelSide::new(false);
    tasks.use_registers(Box::new(move |pid| kernel.registers(pid)));
    let dump = tasks.dump().map_err(failed)?;
    let format = match args.format {
        StacksFormat::Debug2 => Format::Debug2,
        StacksFormat::Debug1 => Format::Debug1,
        StacksFormat::Json => Format::Json,
        StacksFormat::Folded => Format::Folded,
        StacksFormat::Pprof => Format::Pprof,
    };
    let executable = process.identity.executable.to_string_lossy();
    let build_id = tasks.build_id();
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

/// The tasks of the runtime that was asked for; else of the first that the
/// process has, threads being the last.
fn choose(
    process: &Process,
    wanted: Option<RuntimeArg>,
) -> Result<Result<Box<dyn Tasks>, Refusal>, Failure> {
    let wanted = wanted.map(RuntimeArg::kind);
    let found = runtime::open(process, &Cache::default())
        .into_iter()
        .find(|found| wanted.is_none_or(|wanted| wanted == found.kind));
    match found {
        Some(found) => Ok(found.tasks),
        None => Err(Failure {
            message: format!(
                "{}: has no {}",
                process.identity.describe(),
                wanted.unwrap_or(Kind::Threads).tasks()
            ),
            exit: Exit::Refused,
        }),
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
