//! `cargo xtask test`: everything that has to hold before a change lands.

use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::fixtures;
use crate::privilege;
use crate::progress::{self, step};
use crate::real;
use crate::setup;
use crate::vm;

/// What to test beyond this machine.
#[derive(Args)]
pub(crate) struct Options {
    /// Boot other kernels too, and run there what `cargo xtask vm` runs, in brief
    #[arg(long)]
    vm: bool,
}

/// Sets up, builds and tests.
pub(crate) fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    step("permissions", || privilege::require_bpf("test"))?;
    let go = setup::run()?;
    step("format", || {
        setup::cargo().args(["fmt", "--all", "--check"]).run()
    })?;
    let built = fixtures::build(&go, &fixtures::Options::default())?;
    fixtures::require_all(&built)?;
    let programs = step("real programs", || real::ensure(&go))?;
    setup::build_leakmon()?;
    step("lints", || {
        setup::cargo()
            .args([
                "clippy",
                "--release",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])
            .run()
    })?;
    step("tests, compiled", || {
        setup::cargo().args(["test", "--release", "--no-run"]).run()
    })?;
    // They wait most of the time.
    let _ahead = options.vm.then(vm::ahead).transpose()?;
    let twice = || (2 * std::thread::available_parallelism().map_or(1, usize::from)).to_string();
    let threads = std::env::var("RUST_TEST_THREADS").unwrap_or_else(|_| twice());
    step("tests", || {
        setup::cargo()
            .args(["test", "--release"])
            .env("LEAKMON_FIXTURES", &built.folder)
            .env("LEAKMON_REAL", &programs)
            .env("LEAKMON_GO", go.program())
            .env("RUST_TEST_THREADS", threads)
            .run()
    })?;
    if options.vm {
        vm::test(&go)?;
    }
    println!("==> all passed in {}", progress::seconds(start.elapsed()));
    Ok(())
}
