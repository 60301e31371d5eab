//! `cargo xtask dist`: what is given to others. Static programs and Debian packages, the same bytes wherever they are
//! built.

mod check;
mod package;
mod program;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::arch::Arch;
use crate::command::Run;
use crate::progress::{note, step};
use crate::workspace;

/// What to make.
#[derive(Args)]
pub(crate) struct Options {
    /// For this architecture only
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Then build all of it once more in another folder and compare, ask lintian, and install it in Debian's stable
    /// release
    #[arg(long)]
    check: bool,
}

/// A checkout that is built from.
struct Source {
    root: PathBuf,
    version: String,
    /// Seconds since 1970: everything that is built says that it is from then.
    date: String,
}

/// What was made for one architecture.
struct Made {
    arch: Arch,
    program: PathBuf,
    package: PathBuf,
}

/// Makes it, and says where it is.
pub(crate) fn run(options: &Options) -> Result<()> {
    let arches = match options.arch {
        Some(arch) => vec![arch],
        None => vec![Arch::X86_64, Arch::Aarch64],
    };
    let source = Source::of_checkout()?;
    let folder = workspace::target().join("dist");
    let made = make(&source, &arches, &folder)?;
    if options.check {
        check::lintian(&made)?;
        check::installs(&made)?;
        check::same_elsewhere(&source, &made)?;
    }
    for each in &made {
        for path in [&each.program, &each.package] {
            note(path.display().to_string());
        }
    }
    Ok(())
}

impl Source {
    fn of_checkout() -> Result<Self> {
        let root = workspace::root().to_owned();
        let date = Run::new("git")
            .args(["log", "-1", "--format=%ct"])
            .dir(&root)
            .capture()
            .context("what is built has the date of its commit")?;
        Ok(Self {
            root,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            date: date.trim().to_owned(),
        })
    }
}

/// Makes everything for the architectures, into a folder.
fn make(source: &Source, arches: &[Arch], folder: &Path) -> Result<Vec<Made>> {
    let documents = step("manual and completions", || {
        program::documents(source, &folder.join("documents"))
    })?;
    arches
        .iter()
        .map(|&arch| {
            let name = arch.name();
            let program = step(&format!("static program for {name}"), || {
                program::build(source, arch, folder)
            })?;
            let package = step(&format!("package for {name}"), || {
                package::build(source, arch, &program, &documents, folder)
            })?;
            Ok(Made {
                arch,
                program,
                package,
            })
        })
        .collect()
}
