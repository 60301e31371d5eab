//! Compiles the kernel side from source, for `src/probe` to embed.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain};

/// Names the rustup toolchain that compiles the kernel side. It needs the
/// rust-src component.
const TOOLCHAIN: &str = "LEAKMON_BPF_TOOLCHAIN";

/// What `cargo xtask setup` links where nightly's rust-src cannot be had: a
/// stable toolchain with its sources.
const LINKED: &str = "leakmon-bpf";

fn main() -> ExitCode {
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<()> {
    println!("cargo:rerun-if-env-changed={TOOLCHAIN}");
    println!("cargo:rerun-if-changed=../leakmon-common/src");
    println!("cargo:rerun-if-changed=../Cargo.lock");

    let chosen = std::env::var(TOOLCHAIN).ok();
    let toolchain = match &chosen {
        Some(name) => name.as_str(),
        None if exists(LINKED) => LINKED,
        None => "nightly",
    };
    // aya-build shows what its cargo says as warnings of this build: have it say
    // no more than is wrong.
    // SAFETY: the build script has one thread.
    unsafe { std::env::set_var("CARGO_TERM_QUIET", "true") };
    // The object names no folder of the machine that compiles it, so that it is the same wherever that is. aya-build
    // lets nobody tell rustc so.
    for (name, value) in [
        ("CARGO_UNSTABLE_TRIM_PATHS", "true"),
        ("CARGO_PROFILE_RELEASE_TRIM_PATHS", "all"),
    ] {
        // SAFETY: as above.
        unsafe { std::env::set_var(name, value) };
    }
    if toolchain == LINKED {
        // SAFETY: as above.
        unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    }
    aya_build::build_ebpf(
        [Package {
            name: "leakmon-ebpf",
            root_dir: "../leakmon-ebpf",
            ..Package::default()
        }],
        Toolchain::Custom(toolchain),
    )
    .with_context(|| {
        format!(
            "cannot compile the kernel side with the Rust toolchain `{toolchain}`: \
             run `cargo xtask setup`, which installs what it needs \
             (or name another toolchain in {TOOLCHAIN})"
        )
    })
}

/// rustup has a toolchain of this name.
fn exists(toolchain: &str) -> bool {
    Command::new("rustup")
        .args(["run", toolchain, "rustc", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
