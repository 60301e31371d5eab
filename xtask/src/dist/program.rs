//! leakmon as one file that needs no library, and the documents that its command line defines.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Source;
use crate::arch::Arch;
use crate::command::Run;
use crate::cross::{Compiler, Libc};
use crate::setup;
use crate::workspace;

/// Builds the program and gives its path in the folder.
pub(super) fn build(source: &Source, arch: Arch, folder: &Path) -> Result<PathBuf> {
    let compiler = Compiler::ensure(arch, Libc::Musl)?;
    let target = source.root.join("target/dist/build");
    let flags = without_paths(source, &compiler)?;
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    compiler
        .cargo("build", &flags)
        .dir(&source.root)
        .args(["--release", "--locked", "--quiet"])
        .args(["--package", "leakmon", "--bin", "leakmon"])
        .arg("--target-dir")
        .arg(&target)
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("SOURCE_DATE_EPOCH", &source.date)
        .run()?;
    let path = folder.join(format!("leakmon-{}-linux-{}", source.version, arch.name()));
    workspace::create(folder)?;
    std::fs::copy(
        target.join(compiler.target()).join("release/leakmon"),
        &path,
    )
    .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// What rustc is told, so that the program names no folder of this machine.
fn without_paths(source: &Source, compiler: &Compiler) -> Result<Vec<String>> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let mut names = vec![
        (source.root.clone(), "leakmon"),
        (home.join("registry/src"), "registry"),
    ];
    names.extend(compiler.std_sources()?.map(|folder| (folder, "rust")));
    Ok(names
        .iter()
        .map(|(folder, name)| format!("--remap-path-prefix={}=/{name}", folder.display()))
        .collect())
}

/// Writes the manual's pages and the shells' completions into a folder, and gives it.
pub(super) fn documents(source: &Source, folder: &Path) -> Result<PathBuf> {
    Run::new("rm").arg("-rf").arg(folder).capture()?;
    workspace::create(folder)?;
    setup::cargo()
        .dir(&source.root)
        .args(["run", "--release", "--locked", "--quiet"])
        .args(["--package", "leakmon", "--example", "documents"])
        // One for all checkouts: it is the text that counts.
        .arg("--target-dir")
        .arg(workspace::target())
        .arg("--")
        .arg(folder)
        .env("SOURCE_DATE_EPOCH", &source.date)
        .run()?;
    Ok(folder.to_owned())
}
