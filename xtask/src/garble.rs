//! garble, which makes Go programs unreadable: leakmon has to refuse them.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::command::Run;
use crate::go::{Go, RELEASES};
use crate::progress::note;
use crate::workspace;

/// The release of garble, which wants the newest Go.
const VERSION: &str = "v0.18.0";

/// garble and the Go that it works with.
pub(crate) struct Garble {
    program: PathBuf,
    go: Go,
}

impl Garble {
    /// garble in the cache, built when it is not there.
    pub(crate) fn ensure(driver: &Go) -> Result<Self> {
        let folder = workspace::cache("garble")?;
        let &(minor, patch) = RELEASES.last().context("no Go releases are listed")?;
        let newest = Go::of(driver, minor, patch)?;
        // garble overlays files of the toolchain, which Go forbids in its module cache.
        let go = newest.copied(&folder.join(format!("go{}", newest.version())))?;
        let program = folder.join(VERSION).join("garble");
        if !program.exists() {
            note(format!("building garble {VERSION}"));
            go.command()
                .args(["install", &format!("mvdan.cc/garble@{VERSION}")])
                .env("GOBIN", folder.join(VERSION))
                .capture()?;
        }
        Ok(Self { program, go })
    }

    /// The Go that garble builds with.
    pub(crate) fn go(&self) -> &Go {
        &self.go
    }

    /// A `garble` command that finds this Go and no other.
    pub(crate) fn command(&self) -> Run {
        let mut path = self
            .go
            .program()
            .parent()
            .map_or_else(Default::default, |folder| folder.as_os_str().to_owned());
        if let Some(inherited) = std::env::var_os("PATH") {
            path.push(":");
            path.push(inherited);
        }
        Run::new(&self.program)
            .env("PATH", path)
            .env("GOTOOLCHAIN", "local")
    }
}
