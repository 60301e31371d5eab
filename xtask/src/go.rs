//! Go toolchains: the one that is there, and those of other versions.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::command::Run;
use crate::debian::{self, View};
use crate::progress::note;
use crate::workspace;

/// The releases that the fixtures are built with: the newest of each minor version, which is what Go's own toolchain
/// switch fetches and checks against its checksum database.
pub(crate) const RELEASES: &[(u32, u32)] = &[
    (18, 10),
    (19, 13),
    (20, 14),
    (21, 13),
    (22, 12),
    (23, 12),
    (24, 13),
    (25, 14),
    (26, 11),
    (27, 4),
];

/// Debian's releases that have packages of those versions.
const SUITES: &[&str] = &[
    "bookworm",
    "bookworm-backports",
    "trixie",
    "trixie-backports",
];

/// The first version that can fetch others.
const FIRST_SWITCHING: u32 = 21;

/// How long a download of a toolchain may take.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// A Go toolchain.
#[derive(Clone)]
pub(crate) struct Go {
    program: PathBuf,
    version: String,
    minor: u32,
}

impl Go {
    /// The Go in PATH where it is new enough, else Debian's newest, unpacked into the cache.
    pub(crate) fn ensure() -> Result<Self> {
        let present = Self::at(Path::new("go"));
        if let Ok(go) = present
            && go.minor >= FIRST_SWITCHING
        {
            return Ok(go);
        }
        note("no Go 1.21 or later in PATH: looking for Debian's");
        let mut refusals = Vec::new();
        for &(minor, _) in RELEASES.iter().rev() {
            if minor < FIRST_SWITCHING {
                break;
            }
            match Self::from_debian(minor) {
                Ok(go) => return Ok(go),
                Err(error) => refusals.push(format!("{error:#}")),
            }
        }
        bail!(
            "the fixtures need Go 1.21 or later and none can be had here; install Go and put it in PATH. \
             Debian's packages: {}",
            refusals.join("; ")
        )
    }

    /// The toolchain of one minor version: through Go's own switch, else from Debian.
    pub(crate) fn of(driver: &Self, minor: u32, patch: u32) -> Result<Self> {
        if driver.minor == minor {
            return Ok(driver.clone());
        }
        let switched = Self::switched(driver, minor, patch);
        let Err(why) = switched else {
            return switched;
        };
        Self::from_debian(minor)
            .map_err(|debian| anyhow::anyhow!("{why:#}\nand from Debian: {debian:#}"))
    }

    /// The `go` program.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// The version, as in `1.26.8`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The minor version: 26 for 1.26.8.
    pub(crate) fn minor(&self) -> u32 {
        self.minor
    }

    /// A `go` command of exactly this version.
    pub(crate) fn command(&self) -> Run {
        let run = Run::new(&self.program).env("GOTOOLCHAIN", "local");
        if self.minor == 19 {
            // Inside the module cache 1.19 finds no package through its index ("import of unknown directory").
            run.env("GODEBUG", "goindex=0")
        } else {
            run
        }
    }

    /// The same toolchain in a folder of its own; copied when it is not there.
    pub(crate) fn copied(&self, folder: &Path) -> Result<Self> {
        let program = folder.join("bin/go");
        if !program.exists() {
            let root = self.command().args(["env", "GOROOT"]).capture()?;
            let partial = folder.with_extension("partial");
            Run::new("rm").arg("-rf").arg(&partial).capture()?;
            Run::new("cp")
                .args(["-r", "--dereference", root.trim()])
                .arg(&partial)
                .capture()?;
            std::fs::rename(&partial, folder)?;
        }
        Self::at(&program)
    }

    fn at(program: &Path) -> Result<Self> {
        let said = Run::new(program)
            .arg("version")
            .env("GOTOOLCHAIN", "local")
            .dir(workspace::root())
            .capture()?;
        let version = said
            .split_whitespace()
            .nth(2)
            .and_then(|word| word.strip_prefix("go"))
            .with_context(|| format!("cannot understand `go version`: {said}"))?;
        let minor = version
            .split('.')
            .nth(1)
            .and_then(|minor| minor.parse().ok())
            .with_context(|| format!("cannot understand Go's version {version}"))?;
        Ok(Self {
            program: program.to_owned(),
            version: version.to_owned(),
            minor,
        })
    }

    /// Has the driver fetch the version, with its checksum verified, and takes the program out of the module cache.
    fn switched(driver: &Self, minor: u32, patch: u32) -> Result<Self> {
        let root = Run::new(&driver.program)
            .args(["env", "GOROOT"])
            .env("GOTOOLCHAIN", format!("go1.{minor}.{patch}"))
            .dir(workspace::root())
            .limit(DOWNLOAD_LIMIT)
            .capture()?;
        Self::at(&Path::new(root.trim()).join("bin/go"))
    }

    /// Unpacks Debian's packages of the version into the cache, without installing them.
    fn from_debian(minor: u32) -> Result<Self> {
        let folder = workspace::cache("go")?.join(format!("1.{minor}"));
        let program = folder.join(format!("usr/lib/go-1.{minor}/bin/go"));
        if let Ok(go) = Self::at(&program) {
            return Ok(go);
        }
        if !debian::is_debian() {
            bail!("this system has no apt-get");
        }
        let view = View::open("go", SUITES)?;
        for package in [
            format!("golang-1.{minor}-go"),
            format!("golang-1.{minor}-src"),
        ] {
            if !view.offers(&package) {
                bail!("{package} is in none of {}", SUITES.join(", "));
            }
            note(format!("unpacking {package}"));
            view.unpack(&package, &folder)?;
        }
        Self::at(&program)
    }
}
