//! Rust for a target that rustup may not have: another processor, or musl for programs that need no library.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::arch::Arch;
use crate::bpf;
use crate::command::Run;
use crate::debian::{self, View};
use crate::progress::note;
use crate::setup;
use crate::workspace;

/// How long rustup may take to fetch what a target needs.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(180);

/// The release of Debian whose musl is linked, with these packages.
const SUITE: &str = "bookworm";
const MUSL: &str = "musl-dev";
const UNWINDER: &str = "libunwind-16-dev";

/// Where the unwinder's package has it.
const UNWINDER_FILE: &str = "usr/lib/llvm-16/lib/libunwind.a";

/// A C library.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Libc {
    /// The one that most systems have.
    Gnu,
    /// What a static program is linked with. glibc would load the system's modules that look up users and hosts into
    /// it, made for the system's own glibc.
    Musl,
}

impl Libc {
    /// The target of programs that are linked with it, as Rust calls it.
    pub(crate) fn target(self, arch: Arch) -> String {
        let libc = match self {
            Self::Gnu => "gnu",
            Self::Musl => "musl",
        };
        format!("{}-unknown-linux-{libc}", arch.name())
    }
}

/// Compiles for one target.
pub(crate) struct Compiler {
    arch: Arch,
    target: String,
    /// The toolchain that compiles the standard library, too; `None`: rustup has it.
    with_std: Option<String>,
    /// What rustc is told for the target's sake.
    flags: Vec<String>,
}

impl Compiler {
    /// Makes sure that the target can be compiled for.
    pub(crate) fn ensure(arch: Arch, libc: Libc) -> Result<Self> {
        require_c(arch)?;
        let mut compiler = Self {
            arch,
            target: libc.target(arch),
            with_std: None,
            flags: Vec::new(),
        };
        let target = &compiler.target;
        if has_std(target) {
            return Ok(compiler);
        }
        if debian::is_debian() {
            // The toolchain of the kernel side has the library's sources.
            compiler.with_std = Some(bpf::ensure()?);
            if libc == Libc::Musl {
                compiler.flags = musl(arch)?;
            }
            return Ok(compiler);
        }
        note(format!("fetching the standard library for {target}"));
        add_std(target)?;
        Ok(compiler)
    }

    /// The target, as Rust calls it.
    pub(crate) fn target(&self) -> &str {
        &self.target
    }

    /// What the compiler says of itself.
    pub(crate) fn version(&self) -> Result<String> {
        match &self.with_std {
            Some(toolchain) => Run::new("rustup").args(["run", toolchain, "rustc", "-vV"]),
            None => Run::new("rustc").arg("-vV"),
        }
        .dir(workspace::root())
        .capture()
    }

    /// The folder with the sources of the standard library that is compiled, too.
    pub(crate) fn std_sources(&self) -> Result<Option<PathBuf>> {
        let Some(toolchain) = &self.with_std else {
            return Ok(None);
        };
        let sysroot = Run::new("rustup")
            .args(["run", toolchain, "rustc", "--print", "sysroot"])
            .capture()?;
        Ok(Some(Path::new(sysroot.trim()).join("lib/rustlib/src/rust")))
    }

    /// One of cargo's commands, for the target; rustc is told `flags` of every crate for it.
    pub(crate) fn cargo(&self, command: &str, flags: &[&str]) -> Run {
        let run = match &self.with_std {
            Some(toolchain) => Run::new("rustup")
                .args(["run", toolchain, "cargo", command])
                .arg("-Zbuild-std=std,panic_unwind")
                // Debian's is a stable one.
                .env("RUSTC_BOOTSTRAP", "1"),
            None => Run::new("cargo").arg(command),
        };
        let flags: Vec<&str> = self
            .flags
            .iter()
            .map(String::as_str)
            .chain(flags.iter().copied())
            .collect();
        let run = setup::apart(run)
            // Named even where it is the machine's own: so the flags do not reach macros and build scripts.
            .args(["--target", &self.target])
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        if self.arch.is_native() {
            return run;
        }
        let name = self.target.replace('-', "_");
        let linker = format!("CARGO_TARGET_{}_LINKER", name.to_uppercase());
        run.env(&linker, self.arch.gcc())
            .env(&format!("CC_{name}"), self.arch.gcc())
            .env(&format!("AR_{name}"), format!("{}-ar", self.arch.gnu()))
    }
}

/// Fetches a target's standard library.
pub(crate) fn add_std(target: &str) -> Result<()> {
    Run::new("rustup")
        .args(["target", "add", target])
        .dir(workspace::root())
        .limit(DOWNLOAD_LIMIT)
        .capture()
        .map(drop)
}

/// Whether the compiler has the standard library of a target.
pub(crate) fn has_std(target: &str) -> bool {
    Run::new("rustc")
        .args(["--print", "target-libdir", "--target", target])
        .dir(workspace::root())
        .capture()
        .is_ok_and(|folder| Path::new(folder.trim()).exists())
}

/// Makes sure that there is a C compiler, which also links what Rust compiles.
pub(crate) fn require_c(arch: Arch) -> Result<()> {
    if arch.is_native() {
        return Ok(());
    }
    let works = || Run::new(arch.gcc()).arg("--version").succeeds();
    if !works() && debian::is_debian() {
        let gcc = format!("gcc-{}", arch.gnu().replace('_', "-"));
        let libc = format!("libc6-dev-{}-cross", arch.debian());
        debian::install(&[&gcc, &libc])?;
    }
    if !works() {
        bail!(
            "{} is missing, which compiles and links for {}",
            arch.gcc(),
            arch.name()
        );
    }
    Ok(())
}

/// What links a program with musl where Rust's own copy of it is not to be had: Debian's.
fn musl(arch: Arch) -> Result<Vec<String>> {
    let folder = workspace::cache("musl")?.join(arch.name());
    if !folder.exists() {
        fetch_musl(arch, &folder)?;
    }
    let object = |name: &str| format!("-Clink-arg={}", folder.join(name).display());
    Ok(vec![
        "-Ctarget-feature=+crt-static".to_owned(),
        // Not every target of musl's can be position independent.
        "-Crelocation-model=static".to_owned(),
        "-Clink-self-contained=no".to_owned(),
        "-Clink-arg=-nostartfiles".to_owned(),
        object("crt1.o"),
        object("crti.o"),
        "-Clink-arg=-lc".to_owned(),
        // The end of .eh_frame, which the unwinder looks for.
        object("crtend.o"),
        object("crtn.o"),
        // The unwinder was compiled for glibc, whose checked fprintf it calls to say why it aborts.
        "-Clink-arg=-Wl,--defsym=__fprintf_chk=abort".to_owned(),
        format!("-Lnative={}", folder.display()),
    ])
}

fn fetch_musl(arch: Arch, folder: &Path) -> Result<()> {
    let view = View::of(&format!("musl-{}", arch.name()), &[SUITE], &[], arch)?;
    let unpacked = folder.with_extension("unpacked");
    for package in [MUSL, UNWINDER] {
        note(format!("unpacking {package} for {}", arch.name()));
        view.unpack(package, &unpacked)?;
    }
    let partial = folder.with_extension("partial");
    Run::new("rm").arg("-rf").arg(&partial).capture()?;
    std::fs::rename(
        unpacked.join(format!("usr/lib/{}-linux-musl", arch.name())),
        &partial,
    )
    .with_context(|| format!("{MUSL} has no libraries for {}", arch.name()))?;
    let end = Run::new(arch.gcc())
        .arg("-print-file-name=crtend.o")
        .capture()?;
    for (from, name) in [
        (unpacked.join(UNWINDER_FILE), "libunwind.a"),
        (PathBuf::from(end.trim()), "crtend.o"),
    ] {
        std::fs::copy(&from, partial.join(name))
            .with_context(|| format!("cannot copy {}", from.display()))?;
    }
    std::fs::remove_dir_all(&unpacked)?;
    std::fs::rename(&partial, folder).with_context(|| format!("cannot make {}", folder.display()))
}
