//! `cargo xtask`: everything that a developer of leakmon does, from nothing.

mod arch;
mod bench;
mod big;
mod bpf;
mod command;
mod cross;
mod debian;
mod demo;
mod dist;
mod fixtures;
mod garble;
mod go;
mod privilege;
mod program;
mod progress;
mod real;
mod setup;
mod test;
mod tools;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Sets up, builds, shows, tests and measures leakmon.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building leakmon needs and is missing here
    Setup,
    /// Watch a leaking Go server with leakmon for ten seconds
    Demo,
    /// Build leakmon and run it (with sudo when not root)
    Run {
        /// What leakmon is told, after `--`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Format check, lints and every test, on all fixtures and real programs
    Test(test::Options),
    /// Boot other kernels, without KVM, and run the tests there
    Vm(vm::Options),
    /// Measure what leakmon costs the programs it watches
    Bench(bench::Options),
    /// Make static programs and Debian packages, for every architecture
    Dist(dist::Options),
    /// Build the fixtures, with every Go and tokio version that can be had
    Fixtures(fixtures::Options),
}

fn main() -> ExitCode {
    let outcome = run(Arguments::parse().task);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Setup => setup::run().map(drop),
        Task::Demo => demo::run(),
        Task::Run { arguments } => {
            setup::run()?;
            let leakmon = setup::build_leakmon()?;
            privilege::as_root(leakmon).args(arguments).run()
        }
        Task::Test(options) => test::run(&options),
        Task::Vm(options) => vm::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Dist(options) => dist::run(&options),
        Task::Fixtures(options) => fixtures::run(&options).map(drop),
    }
}
