//! `cargo xtask setup`, and the build of leakmon that the other tasks share.

use std::path::PathBuf;

use anyhow::Result;

use crate::bpf;
use crate::command::Run;
use crate::fixtures;
use crate::go::Go;
use crate::progress::{note, step};
use crate::tools;
use crate::workspace;

/// Installs what is missing; gives the Go that builds the fixtures.
pub(crate) fn run() -> Result<Go> {
    step("Rust for the kernel side", || bpf::ensure().map(drop))?;
    step("C and musl for the fixtures", || {
        fixtures::ensure_compilers();
        Ok(())
    })?;
    step("programs that the tests run", || {
        tools::ensure();
        Ok(())
    })?;
    step("Go for the fixtures", || {
        let go = Go::ensure()?;
        note(format!("go {} at {}", go.version(), go.program().display()));
        Ok(go)
    })
}

/// Builds leakmon in release and gives the program's path.
pub(crate) fn build_leakmon() -> Result<PathBuf> {
    step("leakmon", || cargo().args(["build", "--release"]).run())?;
    Ok(workspace::target().join("release/leakmon"))
}

/// cargo in this checkout.
pub(crate) fn cargo() -> Run {
    apart(Run::new("cargo"))
}

/// A command in this checkout, free of what the cargo that started xtask set for xtask.
pub(crate) fn apart(run: Run) -> Run {
    run.dir(workspace::root())
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("CARGO_MANIFEST_PATH")
}
