//! Go programs that nobody here wrote: Debian's, unpacked and never installed, so that no service starts.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::debian::{self, View};
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

/// Makes sure that the programs are in the cache, and gives their folder.
pub(crate) fn ensure() -> Result<PathBuf> {
    let folder = workspace::cache("real")?;
    let programs = folder.join("bin");
    workspace::create(&programs)?;
    let wanted: Vec<_> = PROGRAMS
        .iter()
        .filter(|(_, program)| !programs.join(program).exists())
        .collect();
    if wanted.is_empty() {
        return Ok(programs);
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
    Ok(programs)
}
