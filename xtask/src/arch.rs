//! The processors that leakmon is built for.

use std::path::Path;

use anyhow::{Context as _, Result};
use clap::ValueEnum;

/// A processor's architecture, by the name that Linux and Rust give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// 64-bit x86.
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit Arm.
    #[value(name = "aarch64")]
    Aarch64,
}

impl Arch {
    /// This machine's.
    pub(crate) fn native() -> Result<Self> {
        [Self::X86_64, Self::Aarch64]
            .into_iter()
            .find(|arch| arch.is_native())
            .with_context(|| format!("leakmon does not run on {}", std::env::consts::ARCH))
    }

    /// As Linux and Rust call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian and Go call it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// As GNU's tools call it.
    pub(crate) fn gnu(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu",
            Self::Aarch64 => "aarch64-linux-gnu",
        }
    }

    /// Whether it is this machine's.
    pub(crate) fn is_native(self) -> bool {
        self.name() == std::env::consts::ARCH
    }

    /// The C compiler for it.
    pub(crate) fn gcc(self) -> String {
        if self.is_native() {
            "gcc".to_owned()
        } else {
            format!("{}-gcc", self.gnu())
        }
    }

    /// Where this machine has the architecture's shared libraries: its own, and Debian's for a cross compiler.
    pub(crate) fn libraries(self) -> &'static Path {
        Path::new(match self {
            Self::X86_64 => "/lib/x86_64-linux-gnu",
            Self::Aarch64 => "/usr/aarch64-linux-gnu/lib",
        })
    }

    /// The program that loads shared libraries: its file in [`Arch::libraries`], and the path in every executable.
    pub(crate) fn loader(self) -> (&'static str, &'static str) {
        match self {
            Self::X86_64 => ("ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"),
            Self::Aarch64 => ("ld-linux-aarch64.so.1", "lib/ld-linux-aarch64.so.1"),
        }
    }

    /// The program that takes symbols out of executables.
    pub(crate) fn strip(self) -> &'static str {
        match self {
            Self::X86_64 => "strip",
            Self::Aarch64 => "aarch64-linux-gnu-strip",
        }
    }
}
