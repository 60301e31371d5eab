//! The processors that leakmon is built for.

use std::path::Path;

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

    /// Rust's target of glibc.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
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
