//! The leakmon binary: see the library for what it does.

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // Diagnostics, those of the kernel side included, go to standard error and
    // only when they are asked for: LEAKMON_LOG=info.
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("LEAKMON_LOG").unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .init();
    leakmon::cli::run()
}
