//! Debian's packages: installed with apt-get, or only unpacked, from this release or another one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::arch::Arch;
use crate::command::Run;
use crate::privilege;
use crate::progress::note;
use crate::workspace;

/// Whether this system has apt-get and dpkg.
pub(crate) fn is_debian() -> bool {
    Run::new("apt-get").arg("--version").succeeds() && Run::new("dpkg").arg("--version").succeeds()
}

/// Of these packages, those that are not installed.
pub(crate) fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages
        .iter()
        .copied()
        .filter(|package| {
            let status = Run::new("dpkg-query")
                .args(["-W", "-f", "${db:Status-Status}", package])
                .capture();
            !status.is_ok_and(|status| status == "installed")
        })
        .collect()
}

/// Installs packages on this system.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    note(format!("installing {}", packages.join(", ")));
    let update = || privilege::as_root("apt-get").args(["-qq", "update"]).run();
    if !packages.iter().all(|package| offered(package)) {
        update()?;
    }
    let install = || {
        privilege::as_root("env")
            .args([
                "DEBIAN_FRONTEND=noninteractive",
                "apt-get",
                "-qq",
                "-y",
                "--no-install-recommends",
                "install",
            ])
            .args(packages)
            .capture()
    };
    // The lists may be older than what the archive still has.
    if install().is_err() {
        update()?;
        install()?;
    }
    Ok(())
}

/// Whether the package lists at hand know a version of the package.
fn offered(package: &str) -> bool {
    Run::new("apt-cache")
        .args(["show", package])
        .capture()
        .is_ok_and(|shown| !shown.trim().is_empty())
}

/// A view of the archive with sources, lists and state of its own: packages are downloaded through it and unpacked,
/// and nothing on the system changes.
pub(crate) struct View {
    folder: PathBuf,
    /// Of the packages, where it is not this system's own.
    arch: Option<Arch>,
}

impl View {
    /// A view of these releases of Debian, from where this system gets its own packages.
    pub(crate) fn open(name: &str, suites: &[&str]) -> Result<Self> {
        Self::read(name, suites, &[], None)
    }

    /// A view of these releases of Debian and of their security updates, for another architecture than this system's
    /// too.
    pub(crate) fn of(name: &str, suites: &[&str], security: &[&str], arch: Arch) -> Result<Self> {
        Self::read(name, suites, security, Some(arch))
    }

    fn read(name: &str, suites: &[&str], security: &[&str], arch: Option<Arch>) -> Result<Self> {
        let view = Self {
            folder: workspace::cache("apt")?.join(name),
            arch,
        };
        for part in ["lists/partial", "cache/archives/partial", "downloads"] {
            workspace::create(&view.folder.join(part))?;
        }
        view.write("status", "")?;
        let mut sources = String::new();
        let own = codename()?;
        for (own, suites) in [(own.clone(), suites), (format!("{own}-security"), security)] {
            if suites.is_empty() {
                continue;
            }
            for archive in archives(&own)? {
                for suite in suites {
                    writeln!(sources, "{}", archive.line(suite))?;
                }
            }
        }
        view.write("sources.list", &sources)?;
        note(format!(
            "reading package lists of {}",
            [suites, security].concat().join(", ")
        ));
        // apt-get update also succeeds with some of its lists missing, which is what is wanted: a suite that this
        // archive does not have offers nothing.
        view.apt("apt-get").args(["-qq", "update"]).capture()?;
        Ok(view)
    }

    /// A view of this system's own release.
    pub(crate) fn own() -> Result<Self> {
        Self::open("own", &[&codename()?])
    }

    /// The lines of a sources.list for a release of Debian, from where this system gets its own packages.
    pub(crate) fn sources(suite: &str) -> Result<Vec<String>> {
        let archives = archives(&codename()?)?;
        Ok(archives.iter().map(|archive| archive.line(suite)).collect())
    }

    /// Whether the view offers the package.
    pub(crate) fn offers(&self, package: &str) -> bool {
        self.apt("apt-cache")
            .args(["show", package])
            .capture()
            .is_ok_and(|shown| !shown.trim().is_empty())
    }

    /// The names of the packages that begin with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = self.apt("apt-cache").args(["pkgnames", prefix]).capture()?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads a package, or that of one release (`package/release`), and unpacks it below a folder. Its scripts do
    /// not run.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let downloads = self.folder.join("downloads").join(package);
        if downloads.exists() {
            std::fs::remove_dir_all(&downloads)?;
        }
        workspace::create(&downloads)?;
        self.apt("apt-get")
            .args(["-qq", "download", package])
            .dir(&downloads)
            .capture()?;
        let archive = std::fs::read_dir(&downloads)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get download left no file for {package}"))?;
        workspace::create(into)?;
        Run::new("dpkg")
            .arg("-x")
            .arg(&archive)
            .arg(into)
            .capture()?;
        std::fs::remove_dir_all(&downloads)?;
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// One of apt's programs, looking at this view only.
    fn apt(&self, program: &str) -> Run {
        let option = |name: &str, path: &str| {
            [
                "-o".to_owned(),
                format!("{name}={}", self.folder.join(path).display()),
            ]
        };
        let mut run = Run::new(program);
        if let Some(arch) = self.arch {
            run = run
                .args(["-o", &format!("APT::Architecture={}", arch.debian())])
                .args(["-o", &format!("APT::Architectures={}", arch.debian())]);
        }
        run.args(option("Dir::Etc::sourcelist", "sources.list"))
            .args(["-o", "Dir::Etc::sourceparts=-"])
            .args(option("Dir::State::lists", "lists"))
            .args(option("Dir::State::status", "status"))
            .args(option("Dir::Cache", "cache"))
            // The download user may not enter the cache of the one who runs this.
            .args(["-o", "APT::Sandbox::User="])
            .env("LC_ALL", "C")
    }
}

/// The name of this system's Debian release.
pub(crate) fn codename() -> Result<String> {
    let release = std::fs::read_to_string("/etc/os-release").context("cannot read os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no VERSION_CODENAME, so this is no Debian release")
}

/// A place that this system gets Debian's packages from.
struct Archive {
    uri: String,
    signed_by: Option<String>,
}

impl Archive {
    /// The line of a sources.list for one suite.
    fn line(&self, suite: &str) -> String {
        let signed_by = self
            .signed_by
            .as_ref()
            .map_or_else(String::new, |key| format!("[signed-by={key}] "));
        format!("deb {signed_by}{} {suite} main", self.uri)
    }
}

/// The archives of this system that hold a suite of its own release, read from its own sources.
fn archives(own: &str) -> Result<Vec<Archive>> {
    let mut texts = Vec::new();
    let list = Path::new("/etc/apt/sources.list");
    if list.exists() {
        texts.push((list.to_owned(), std::fs::read_to_string(list)?));
    }
    for entry in
        std::fs::read_dir("/etc/apt/sources.list.d").context("cannot list apt's sources")?
    {
        let path = entry?.path();
        if let Ok(text) = std::fs::read_to_string(&path) {
            texts.push((path, text));
        }
    }
    let mut found = BTreeMap::new();
    for (path, text) in texts {
        let archives = match path.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => from_stanzas(&text, own),
            Some("list") => from_lines(&text, own),
            _ => continue,
        };
        for archive in archives {
            found.insert(archive.uri.clone(), archive);
        }
    }
    if found.is_empty() {
        bail!("none of apt's sources on this system offers {own}");
    }
    Ok(found.into_values().collect())
}

/// Archives with the suite in a file of deb822 stanzas.
fn from_stanzas(text: &str, suite: &str) -> Vec<Archive> {
    let uncommented: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect();
    let mut archives = Vec::new();
    for stanza in uncommented.split("\n\n") {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let offers = |name: &str, word: &str| {
            field(name).is_some_and(|value| value.split_whitespace().any(|item| item == word))
        };
        if !offers("Types", "deb") || !offers("Suites", suite) || field("Enabled") == Some("no") {
            continue;
        }
        for uri in field("URIs").unwrap_or_default().split_whitespace() {
            archives.push(Archive {
                uri: uri.to_owned(),
                signed_by: field("Signed-By")
                    .filter(|key| key.starts_with('/'))
                    .map(str::to_owned),
            });
        }
    }
    archives
}

/// Archives with the suite in a file of one-line entries.
fn from_lines(text: &str, suite: &str) -> Vec<Archive> {
    text.lines()
        .filter_map(|line| {
            let rest = line.trim().strip_prefix("deb ")?.trim();
            let (options, rest) = match rest.strip_prefix('[') {
                Some(inner) => inner.split_once(']')?,
                None => ("", rest),
            };
            let mut words = rest.split_whitespace();
            let uri = words.next()?;
            (words.next()? == suite).then(|| Archive {
                uri: uri.to_owned(),
                signed_by: options
                    .split_whitespace()
                    .find_map(|option| option.strip_prefix("signed-by="))
                    .map(str::to_owned),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_of_the_release_are_found() {
        let text = "Types: deb\n# a comment\nURIs: mirror:/a\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /keys/a.gpg\n\n\
                    Types: deb\nURIs: mirror:/b\nSuites: bookworm-security\n";
        let archives = from_stanzas(text, "bookworm");
        assert_eq!(archives.len(), 1);
        assert_eq!(
            archives[0].line("trixie"),
            "deb [signed-by=/keys/a.gpg] mirror:/a trixie main"
        );
    }

    #[test]
    fn lines_of_the_release_are_found() {
        let text = "# deb mirror:/no bookworm main\n\
                    deb [arch=amd64 signed-by=/keys/a.gpg] mirror:/a bookworm main contrib\n\
                    deb mirror:/b bookworm-security main\n\
                    deb mirror:/c bookworm main\n";
        let archives = from_lines(text, "bookworm");
        let lines: Vec<String> = archives.iter().map(|archive| archive.line("sid")).collect();
        assert_eq!(
            lines,
            [
                "deb [signed-by=/keys/a.gpg] mirror:/a sid main",
                "deb mirror:/c sid main"
            ]
        );
    }
}
