//! The Rust toolchain that compiles the kernel side, and the linker for it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::command::Run;
use crate::debian;
use crate::progress::note;

/// The variable that names another toolchain; leakmon's build script reads it too.
const CHOSEN: &str = "LEAKMON_BPF_TOOLCHAIN";

/// The rustup toolchain that stands for Debian's Rust.
const LINKED: &str = "leakmon-bpf";

/// Debian's Rust with its sources: it can build core for the BPF target.
const DEBIAN_RUST: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];

/// What bpf-linker is linked against: the LLVM of Debian's Rust.
const DEBIAN_LLVM: &[&str] = &[
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
];

/// Where Debian puts that LLVM.
const DEBIAN_LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// The bpf-linker that has been tried with it.
const LINKER_VERSION: &str = "0.13.0";

/// How long a download of Rust's own may take before the next way is tried.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// Makes sure that the kernel side can be compiled, and gives the toolchain's name.
pub(crate) fn ensure() -> Result<String> {
    if !Run::new("rustup").arg("--version").succeeds() {
        bail!(
            "rustup is missing, and leakmon's kernel side is compiled by a toolchain of its own: \
             install rustup, then run this again"
        );
    }
    if let Ok(name) = std::env::var(CHOSEN) {
        if let Err(why) = usable(&name) {
            bail!("{CHOSEN} names the toolchain `{name}`, but {why}");
        }
        require_linker()?;
        note(format!("Rust for the kernel side: `{name}`, from {CHOSEN}"));
        return Ok(name);
    }
    let names = [LINKED, "nightly"];
    if let Some(name) = names.into_iter().find(|name| usable(name).is_ok())
        && linker_works()
    {
        note(format!(
            "Rust for the kernel side: `{name}` and bpf-linker are there"
        ));
        return Ok(name.to_owned());
    }
    let nightly = match from_nightly() {
        Ok(()) => return Ok("nightly".to_owned()),
        Err(error) => error,
    };
    note("nightly Rust with its sources and bpf-linker cannot be had here; trying Debian's Rust");
    match from_debian() {
        Ok(()) => Ok(LINKED.to_owned()),
        Err(debian) => bail!(
            "no Rust toolchain for the kernel side can be installed.\n\
             - nightly: {nightly:#}\n- Debian: {debian:#}\n\
             Install one by hand (`rustup toolchain install nightly --component rust-src` and \
             `cargo install bpf-linker`), or name one that has rust-src in {CHOSEN}"
        ),
    }
}

/// Checks that rustup has the toolchain and that it has the standard library's sources; otherwise says what is missing.
fn usable(name: &str) -> Result<(), String> {
    let sysroot = Run::new("rustup")
        .args(["run", name, "rustc", "--print", "sysroot"])
        .capture()
        .map_err(|_| "rustup cannot run its rustc".to_owned())?;
    let sources =
        PathBuf::from(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !sources.exists() {
        return Err("it lacks the component rust-src".to_owned());
    }
    let cargo = Run::new("rustup").args(["run", name, "cargo", "--version"]);
    if !cargo.succeeds() {
        return Err("rustup cannot run its cargo".to_owned());
    }
    Ok(())
}

fn linker_works() -> bool {
    Run::new("bpf-linker").arg("--version").succeeds()
}

fn require_linker() -> Result<()> {
    if linker_works() {
        return Ok(());
    }
    note("installing bpf-linker, which links the kernel side");
    Run::new("cargo")
        .args(["install", "--quiet", "bpf-linker"])
        .run()
        .context("cannot install bpf-linker")
}

/// Nightly Rust with its sources, and bpf-linker with the LLVM that cargo finds.
fn from_nightly() -> Result<()> {
    if usable("nightly").is_err() {
        note("installing nightly Rust with rust-src, which compiles the kernel side");
        let has_nightly = Run::new("rustup")
            .args(["run", "nightly", "rustc", "--version"])
            .succeeds();
        let install = if has_nightly {
            Run::new("rustup").args(["component", "add", "rust-src", "--toolchain", "nightly"])
        } else {
            Run::new("rustup").args([
                "toolchain",
                "install",
                "nightly",
                "--profile",
                "minimal",
                "--component",
                "rust-src",
            ])
        };
        install.limit(DOWNLOAD_LIMIT).capture()?;
        usable("nightly").map_err(anyhow::Error::msg)?;
    }
    require_linker()
}

/// Debian's Rust, linked into rustup, and bpf-linker with the same LLVM.
fn from_debian() -> Result<()> {
    if !debian::is_debian() {
        bail!("this system has no apt-get");
    }
    let packages: Vec<&str> = if linker_works() {
        DEBIAN_RUST.to_vec()
    } else {
        [DEBIAN_RUST, DEBIAN_LLVM].concat()
    };
    let missing = debian::missing(&packages);
    if !missing.is_empty() {
        debian::install(&missing)?;
    }
    if !linker_works() {
        note(format!(
            "building bpf-linker {LINKER_VERSION}, which links the kernel side"
        ));
        Run::new("cargo")
            .args([
                "install",
                "--quiet",
                "bpf-linker",
                "--version",
                LINKER_VERSION,
            ])
            .args(["--no-default-features", "--features", "llvm-22"])
            .env("LLVM_PREFIX", DEBIAN_LLVM_PREFIX)
            .run()?;
    }
    note(format!("linking Debian's Rust into rustup as `{LINKED}`"));
    Run::new("rustup")
        .args(["toolchain", "link", LINKED, "/usr"])
        .capture()?;
    usable(LINKED).map_err(anyhow::Error::msg)
}
