//! Debian's kernels, unpacked and never installed.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};

use crate::arch::Arch;
use crate::debian::{self, View};
use crate::progress::note;
use crate::workspace;

/// What stands for the newest kernel that Debian's stable release can have.
pub(super) const NEWEST: &str = "newest";

/// The kernels that are booted when the user names none: the oldest that leakmon supports, those of Debian's releases,
/// and the newest. No Debian release has had 5.15; the nearest ones are 5.10 and 6.1, and 6.1 has what came with 5.15.
pub(super) const SERIES: &[&str] = &["5.10", "6.1", "6.12", NEWEST];

/// Of these, the two that are farthest apart.
pub(super) const TWO: &[&str] = &["5.10", NEWEST];

/// Debian's releases that have them. What one has lost, the next may have.
const SUITES: &[&str] = &[
    "bullseye",
    "bookworm",
    "bookworm-backports",
    "trixie",
    "trixie-backports",
];

/// The same in the archive of security updates, which keeps some kernels longer.
const SECURITY_SUITES: &[&str] = &["bullseye-security", "bookworm-security", "trixie-security"];

/// Packages of what guests have besides leakmon: a shell with its commands, and what busybox has in too simple a form.
const TOOLS: &[&str] = &["busybox-static", "util-linux", "libcap-ng0"];

/// How long a kernel in the cache is taken for the latest of its series.
const FRESH: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How many packages of a series are tried: the lists may name some that the archive no longer has.
const TRIES: usize = 12;

/// Files of a kernel in the cache: its image, and its name, written when it was downloaded.
const IMAGE: &str = "image";
const RELEASE: &str = "release";

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// As the user asks for it: `6.1`.
    pub(super) series: String,
    /// As it calls itself: `6.1.0-50-cloud-amd64`.
    pub(super) release: String,
    /// The image.
    pub(super) image: PathBuf,
}

/// Debian's packages for guests of one architecture.
pub(super) struct Archive {
    arch: Arch,
    folder: PathBuf,
    view: Option<View>,
}

impl Archive {
    pub(super) fn open(arch: Arch) -> Result<Self> {
        Ok(Self {
            arch,
            folder: workspace::cache("kernels")?.join(arch.name()),
            view: None,
        })
    }

    /// The view of the packages, read when it is first needed.
    fn view(&mut self) -> Result<&View> {
        let view = match self.view.take() {
            Some(view) => view,
            None => View::of(
                &format!("kernels-{}", self.arch.name()),
                SUITES,
                SECURITY_SUITES,
                self.arch,
            )?,
        };
        Ok(self.view.insert(view))
    }

    /// The latest kernel of a series.
    pub(super) fn kernel(&mut self, series: &str) -> Result<Kernel> {
        let folder = self.folder.join(series);
        let cached = cached(series, &folder);
        if let Some(kernel) = &cached
            && is_fresh(&folder.join(RELEASE))
        {
            return Ok(kernel.clone());
        }
        match (self.fetch(series, &folder), cached) {
            (Ok(kernel), _) => Ok(kernel),
            (Err(error), Some(kernel)) => {
                note(format!("keeping {}: {error:#}", kernel.release));
                Ok(kernel)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// A folder with the packages of [`TOOLS`], of this system's own release: they need its C library.
    pub(super) fn tools(&mut self) -> Result<PathBuf> {
        let folder = self.folder.join("tools");
        if folder.exists() {
            return Ok(folder);
        }
        note(format!(
            "unpacking {} for {}",
            TOOLS.join(", "),
            self.arch.name()
        ));
        let release = debian::codename()?;
        let partial = folder.with_extension("partial");
        for package in TOOLS {
            self.view()?
                .unpack(&format!("{package}/{release}"), &partial)?;
        }
        std::fs::rename(&partial, &folder)?;
        Ok(folder)
    }

    fn fetch(&mut self, series: &str, folder: &Path) -> Result<Kernel> {
        let suffix = format!("-cloud-{}", self.arch.debian());
        let view = self.view()?;
        let packages = view.names("linux-image-")?;
        let releases = releases(&packages, &suffix, series);
        if releases.is_empty() {
            bail!(
                "Debian has no kernel {series} for this architecture; it has {}",
                known(&packages, &suffix).join(", ")
            );
        }
        let mut refusals = Vec::new();
        for release in releases.iter().take(TRIES) {
            note(format!("unpacking the kernel {release}"));
            let unpacked = folder.with_extension("unpacked");
            match unpack(view, release, &unpacked) {
                Ok(image) => {
                    workspace::create(folder)?;
                    std::fs::rename(image, folder.join(IMAGE))?;
                    std::fs::write(folder.join(RELEASE), release)?;
                    std::fs::remove_dir_all(&unpacked)?;
                    return cached(series, folder).context("the kernel was not kept");
                }
                Err(error) => refusals.push(format!("{error:#}")),
            }
        }
        bail!(
            "no kernel {series} can be downloaded:\n{}",
            refusals.join("\n")
        )
    }
}

/// The kernel in the cache.
fn cached(series: &str, folder: &Path) -> Option<Kernel> {
    let image = folder.join(IMAGE);
    let release = std::fs::read_to_string(folder.join(RELEASE)).ok()?;
    image.exists().then(|| Kernel {
        series: series.to_owned(),
        release,
        image,
    })
}

/// Whether a file was written lately.
fn is_fresh(path: &Path) -> bool {
    let written = path.metadata().and_then(|meta| meta.modified()).ok();
    let age = written.and_then(|time| SystemTime::now().duration_since(time).ok());
    age.is_some_and(|age| age < FRESH)
}

/// Unpacks one kernel and gives the path of its image.
fn unpack(view: &View, release: &str, folder: &Path) -> Result<PathBuf> {
    // From 7.0 on the first is empty and wants the second. The archive may have lost either, and still have the one that
    // was not signed.
    let mut refusals = Vec::new();
    for package in [
        format!("linux-image-{release}"),
        format!("linux-binary-{release}"),
        format!("linux-image-{release}-unsigned"),
    ] {
        if folder.exists() {
            std::fs::remove_dir_all(folder)?;
        }
        if let Err(error) = view.unpack(&package, folder) {
            refusals.push(format!("{package}: {error:#}"));
            continue;
        }
        for path in ["boot", "usr/lib/linux/boot"] {
            let image = folder.join(path).join(format!("vmlinuz-{release}"));
            if image.exists() {
                return Ok(image);
            }
        }
        refusals.push(format!("{package} has no image"));
    }
    bail!("{}", refusals.join("; "))
}

/// The releases of a series among the packages, the latest first.
fn releases(packages: &[String], suffix: &str, series: &str) -> Vec<String> {
    let wanted = (series != NEWEST).then(|| numbers(series));
    let mut found: Vec<(Vec<u64>, &str)> = all(packages, suffix)
        .filter(|(version, _)| {
            wanted
                .as_ref()
                .is_none_or(|wanted| version.starts_with(wanted))
        })
        .collect();
    found.sort();
    found
        .into_iter()
        .rev()
        .map(|(_, release)| release.to_owned())
        .collect()
}

/// The series that there are.
fn known(packages: &[String], suffix: &str) -> Vec<String> {
    let mut series: Vec<(u64, u64)> = all(packages, suffix)
        .filter_map(|(version, _)| Some((*version.first()?, *version.get(1)?)))
        .collect();
    series.sort_unstable();
    series.dedup();
    series
        .iter()
        .map(|(major, minor)| format!("{major}.{minor}"))
        .collect()
}

/// Every release with its numbers. Packages that only depend on one have two numbers in their names.
fn all<'a>(
    packages: &'a [String],
    suffix: &str,
) -> impl Iterator<Item = (Vec<u64>, &'a str)> + use<'a> {
    let suffix = suffix.to_owned();
    packages.iter().filter_map(move |package| {
        let release = package.strip_prefix("linux-image-")?;
        let version = numbers(release.strip_suffix(&suffix)?);
        (version.len() > 2).then_some((version, release))
    })
}

/// The numbers of a version, for comparison.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packages() -> Vec<String> {
        [
            "linux-image-cloud-amd64",
            "linux-image-6.1-cloud-amd64",
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64-unsigned",
            "linux-image-6.1.0-57-amd64",
            "linux-image-6.1.0-0.deb11.52-cloud-amd64",
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-cloud-amd64",
            "linux-image-7.3.4+deb13-cloud-amd64",
        ]
        .map(str::to_owned)
        .into()
    }

    #[test]
    fn the_latest_of_a_series_comes_first() {
        let of = |series| releases(&packages(), "-cloud-amd64", series);
        assert_eq!(
            of("6.1"),
            [
                "6.1.0-56-cloud-amd64",
                "6.1.0-9-cloud-amd64",
                "6.1.0-0.deb11.52-cloud-amd64"
            ]
        );
        assert_eq!(of("6.12")[0], "6.12.118+deb12-cloud-amd64");
        assert_eq!(of(NEWEST)[0], "7.3.4+deb13-cloud-amd64");
        assert!(of("5.15").is_empty());
        assert_eq!(known(&packages(), "-cloud-amd64"), ["6.1", "6.12", "7.3"]);
    }
}
