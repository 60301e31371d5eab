//! The Rust toolchain that compiles the kernel side, and the linker for it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::command::Run;
use crate::debian;
use crate::progress::note;
use crate::workspace;

/// The variable that names another toolchain; leakmon's build script reads it too.
const CHOSEN: &str = "LEAKMON_BPF_TOOLCHAIN";

/// The rustup toolchain that stands for Debian's Rust.
const LINKED: &str = "leakmon-bpf";

/// Debian's Rust with its sources: it can build core for the BPF target.
const DEBIAN_RUST: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];

/// The bpf-linker that has been tried.
const LINKER_VERSION: &str = "0.13.0";

/// How long a download of Rust's own may take before the next way is tried.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// The smallest program of the kernel side's kind.
const PROGRAM: &str = r#"//! Says whether the toolchain and the linker fit together.
#![no_std]
#![no_main]

#[unsafe(no_mangle)]
#[unsafe(link_section = "socket")]
extern "C" fn program(context: *mut u8) -> u32 {
    context as u32
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
"#;

/// Its manifest; the empty workspace keeps cargo from looking further up.
const MANIFEST: &str = "[package]\nname = \"check\"\nedition = \"2024\"\n\n[workspace]\n";

/// Makes sure that the kernel side can be compiled; gives the toolchain, which has the standard library's sources.
pub(crate) fn ensure() -> Result<String> {
    if !Run::new("rustup").arg("--version").succeeds() {
        bail!(
            "rustup is missing, and leakmon's kernel side is compiled by a toolchain of its own: \
             install rustup, then run this again"
        );
    }
    if let Ok(name) = std::env::var(CHOSEN) {
        return has_sources(&name)
            .and_then(|()| require_linker(&name))
            .and_then(|()| compiles(&name))
            .with_context(|| {
                format!("{CHOSEN} names `{name}`, which cannot compile the kernel side")
            })
            .map(|()| {
                note(format!("`{name}` (from {CHOSEN}) and bpf-linker work"));
                name
            });
    }
    for name in [LINKED, "nightly"] {
        if has_sources(name).is_ok() && linker_works() && compiles(name).is_ok() {
            note(format!("`{name}` and bpf-linker work"));
            return Ok(name.to_owned());
        }
    }
    let Err(nightly) = from_nightly() else {
        return Ok("nightly".to_owned());
    };
    note(format!("nightly Rust is not to be had: {nightly:#}"));
    note("trying Debian's Rust");
    from_debian().map(|()| LINKED.to_owned()).map_err(|debian| {
        anyhow::anyhow!(
            "no Rust toolchain for the kernel side can be installed.\n\
             - nightly: {nightly:#}\n- Debian: {debian:#}\n\
             Install one by hand (`rustup toolchain install nightly --component rust-src`, and bpf-linker \
             from its own releases), or name one that has rust-src in {CHOSEN}"
        )
    })
}

/// Checks that rustup has the toolchain, with the standard library's sources.
fn has_sources(name: &str) -> Result<()> {
    let sysroot = Run::new("rustup")
        .args(["run", name, "rustc", "--print", "sysroot"])
        .capture()?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !core.exists() {
        bail!("the toolchain `{name}` lacks the component rust-src");
    }
    Run::new("rustup")
        .args(["run", name, "cargo", "--version"])
        .capture()
        .map(drop)
}

fn linker_works() -> bool {
    Run::new("bpf-linker").arg("--version").succeeds()
}

/// Compiles and links a small program, because a linker whose LLVM is older than the compiler's cannot read what the
/// compiler writes. What has worked once is remembered.
fn compiles(name: &str) -> Result<()> {
    let toolchain = Run::new("rustup")
        .args(["run", name, "rustc", "-vV"])
        .capture()?;
    let linker = Run::new("bpf-linker").arg("--version").capture()?;
    let pair = format!("{toolchain}{linker}");
    let folder = workspace::cache("bpf")?.join(name);
    let remembered = folder.join("works");
    if std::fs::read_to_string(&remembered).is_ok_and(|text| text == pair) {
        return Ok(());
    }
    note(format!(
        "checking that `{name}` and bpf-linker fit together"
    ));
    workspace::create(&folder.join("src"))?;
    std::fs::write(folder.join("Cargo.toml"), MANIFEST)?;
    std::fs::write(folder.join("src/main.rs"), PROGRAM)?;
    Run::new("rustup")
        .args(["run", name, "cargo", "build", "--quiet", "--release"])
        .args(["--target", "bpfel-unknown-none", "-Zbuild-std=core"])
        .args(["--target-dir", "target"])
        .dir(&folder)
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTC")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .capture()?;
    std::fs::remove_dir_all(folder.join("target"))?;
    std::fs::write(&remembered, pair)?;
    Ok(())
}

/// Installs bpf-linker, with the LLVM that the toolchain's compiler has.
fn require_linker(name: &str) -> Result<()> {
    if linker_works() {
        return Ok(());
    }
    let version = Run::new("rustup")
        .args(["run", name, "rustc", "-vV"])
        .capture()?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
        .with_context(|| format!("the rustc of `{name}` does not name its LLVM"))?;
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if debian::is_debian() {
        let packages = [
            format!("llvm-{llvm}-dev"),
            format!("libpolly-{llvm}-dev"),
            "libzstd-dev".to_owned(),
            "zlib1g-dev".to_owned(),
        ];
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        let missing = debian::missing(&packages);
        if !missing.is_empty() {
            debian::install(&missing)?;
        }
    }
    note(format!(
        "building bpf-linker {LINKER_VERSION}, which links the kernel side, with LLVM {llvm}"
    ));
    let install = Run::new("cargo")
        .args([
            "install",
            "--quiet",
            "bpf-linker",
            "--version",
            LINKER_VERSION,
        ])
        .args(["--no-default-features", "--features"])
        .arg(format!("llvm-{llvm}"));
    if Path::new(&prefix).exists() {
        install.env("LLVM_PREFIX", prefix).capture()?;
    } else {
        install.capture()?;
    }
    if !linker_works() {
        bail!("bpf-linker is installed but does not start: is cargo's bin folder in PATH?");
    }
    Ok(())
}

/// Nightly Rust with its sources, and bpf-linker.
fn from_nightly() -> Result<()> {
    if has_sources("nightly").is_err() {
        note("installing nightly Rust with rust-src, which compiles the kernel side");
        let has_nightly = Run::new("rustup")
            .args(["run", "nightly", "rustc", "--version"])
            .succeeds();
        let install = if has_nightly {
            Run::new("rustup").args(["component", "add", "rust-src", "--toolchain", "nightly"])
        } else {
            Run::new("rustup")
                .args(["toolchain", "install", "nightly", "--profile", "minimal"])
                .args(["--component", "rust-src"])
        };
        install.limit(DOWNLOAD_LIMIT).capture()?;
        has_sources("nightly")?;
    }
    require_linker("nightly")?;
    compiles("nightly")
}

/// Debian's Rust, linked into rustup, and bpf-linker.
fn from_debian() -> Result<()> {
    if !debian::is_debian() {
        bail!("this system has no apt-get");
    }
    let missing = debian::missing(DEBIAN_RUST);
    if !missing.is_empty() {
        debian::install(&missing)?;
    }
    note(format!("linking Debian's Rust into rustup as `{LINKED}`"));
    Run::new("rustup")
        .args(["toolchain", "link", LINKED, "/usr"])
        .capture()?;
    has_sources(LINKED)?;
    require_linker(LINKED)?;
    compiles(LINKED)
}
