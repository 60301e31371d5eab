//! `cargo xtask demo`: a server that leaks, and leakmon that names the line.

use anyhow::Result;

use crate::fixtures;
use crate::privilege;
use crate::program::Program;
use crate::progress::{note, step};
use crate::setup;

/// How many requests a second the server sends itself; each leaks one goroutine.
const LOAD: &str = "20";

/// Sets up, starts the leaking server, watches it for ten seconds and ends it.
pub(crate) fn run() -> Result<()> {
    let go = setup::run()?;
    let leakmon = setup::build_leakmon()?;
    let server = step("the leaking server", || fixtures::one(&go, "sum"))?;
    let server = Program::start(&server, &["-load", LOAD])?;
    let pid = server.pid().to_string();
    note(format!(
        "pid {pid}; /sum leaks one goroutine a request, {LOAD} requests a second, see fixtures/go/sum/main.go"
    ));
    let arguments = ["--pid", &pid, "--interval", "2s", "--duration", "10s"];
    println!("==> leakmon {}\n", arguments.join(" "));
    privilege::as_root(leakmon).args(arguments).run()
}
