//! Writes the manual's pages and the shells' completions into a folder, from the definition of the command line. It is an
//! example because only packages need them: `cargo xtask dist` runs it.

use std::io;
use std::path::PathBuf;

use clap::CommandFactory as _;
use clap_complete::Shell;
use leakmon::cli::Cli;

fn main() -> io::Result<()> {
    let folder = PathBuf::from(
        std::env::args_os()
            .nth(1)
            .ok_or_else(|| io::Error::other("which folder to write to?"))?,
    );
    clap_mangen::generate_to(Cli::command(), &folder)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "leakmon", &folder)?;
    }
    Ok(())
}
