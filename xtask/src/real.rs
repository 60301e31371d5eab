//! Go programs that nobody here wrote: Debian's, unpacked and never installed, so that no service starts, and the
//! OpenTelemetry Collector, which Debian does not have, built from its modules.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::debian::{self, View};
use crate::fixtures;
use crate::go::{Go, RELEASES};
use crate::progress::note;
use crate::workspace;

/// Packages, and the program that each is wanted for.
const PROGRAMS: &[(&str, &str)] = &[
    ("prometheus-node-exporter", "prometheus-node-exporter"),
    ("etcd-server", "etcd"),
    ("caddy", "caddy"),
    ("prometheus", "prometheus"),
    ("prometheus", "promtool"),
];

/// The Go that the Collector's modules want.
const COLLECTOR_GO: u32 = 26;

/// Makes sure that the programs are in the cache, and gives their folder.
pub(crate) fn ensure(go: &Go) -> Result<PathBuf> {
    let folder = workspace::cache("real")?;
    let programs = folder.join("bin");
    workspace::create(&programs)?;
    unpack(&folder, &programs)?;
    collector(go, &programs)?;
    Ok(programs)
}

/// Takes the programs that are not there out of their packages.
fn unpack(folder: &Path, programs: &Path) -> Result<()> {
    let wanted: Vec<_> = PROGRAMS
        .iter()
        .filter(|(_, program)| !programs.join(program).exists())
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    if !debian::is_debian() {
        bail!("the tests watch programs out of Debian's packages, and this system has no apt-get");
    }
    let view = View::own()?;
    for (package, program) in wanted {
        note(format!("unpacking {package}"));
        let unpacked = folder.join(package);
        view.unpack(package, &unpacked)?;
        let from = unpacked.join("usr/bin").join(program);
        let partial = programs.join(format!(".{program}"));
        std::fs::copy(&from, &partial)
            .and_then(|_| std::fs::rename(&partial, programs.join(program)))
            .with_context(|| format!("{package} has no {}", from.display()))?;
        std::fs::remove_dir_all(&unpacked)?;
    }
    Ok(())
}

/// Builds `otelcol` out of fixtures/collector, which pins its modules, unless it was built from the same.
fn collector(driver: &Go, programs: &Path) -> Result<()> {
    let source = workspace::root().join("fixtures/collector");
    let key = fixtures::hash_of(&[&source])?.to_string();
    let stamp = programs.join(".otelcol.key");
    let program = programs.join("otelcol");
    if program.exists() && std::fs::read_to_string(&stamp).is_ok_and(|built| built == key) {
        return Ok(());
    }
    let go = match driver.minor() >= COLLECTOR_GO {
        true => driver.clone(),
        false => {
            let release = RELEASES.iter().find(|(minor, _)| *minor == COLLECTOR_GO);
            let &(minor, patch) = release.context("the Collector's Go is not listed")?;
            Go::of(driver, minor, patch)?
        }
    };
    note("building the OpenTelemetry Collector");
    go.command()
        .args([
            "build",
            "-buildvcs=false",
            "-trimpath",
            "-ldflags=-s -w",
            "-o",
        ])
        .arg(&program)
        .arg(".")
        .dir(&source)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off")
        .capture()?;
    std::fs::write(&stamp, key).with_context(|| format!("cannot write {}", stamp.display()))
}
