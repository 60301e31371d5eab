//! A Debian package of the program, made with dpkg-deb.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Source;
use crate::arch::Arch;
use crate::command::Run;
use crate::workspace;

/// Files of the checkout, and where they are installed.
const FILES: &[(&str, &str)] = &[
    ("deploy/leakmon.toml", "etc/leakmon/leakmon.toml"),
    (
        "deploy/leakmon.service",
        "usr/lib/systemd/system/leakmon.service",
    ),
    ("README.md", "usr/share/doc/leakmon/README.md"),
    (
        "docs/how-it-works.md",
        "usr/share/doc/leakmon/docs/how-it-works.md",
    ),
    ("docs/json.md", "usr/share/doc/leakmon/docs/json.md"),
    ("docs/metrics.md", "usr/share/doc/leakmon/docs/metrics.md"),
    (
        "deploy/grafana-dashboard.json",
        "usr/share/doc/leakmon/examples/grafana-dashboard.json",
    ),
    (
        "deploy/otel-collector.yaml",
        "usr/share/doc/leakmon/examples/otel-collector.yaml",
    ),
    (
        "deploy/prometheus-rules.yml",
        "usr/share/doc/leakmon/examples/prometheus-rules.yml",
    ),
    (
        "deploy/debian/lintian-overrides",
        "usr/share/lintian/overrides/leakmon",
    ),
];

/// The completions, and where the shells look for them.
const COMPLETIONS: &[(&str, &str)] = &[
    (
        "leakmon.bash",
        "usr/share/bash-completion/completions/leakmon",
    ),
    ("_leakmon", "usr/share/zsh/vendor-completions/_leakmon"),
    (
        "leakmon.fish",
        "usr/share/fish/vendor_completions.d/leakmon.fish",
    ),
];

const MANUAL: &str = "usr/share/man/man1";
const CHANGELOG: &str = "usr/share/doc/leakmon/changelog";

/// Builds the package and gives its path in the folder.
pub(super) fn build(
    source: &Source,
    arch: Arch,
    program: &Path,
    documents: &Path,
    folder: &Path,
) -> Result<PathBuf> {
    if !Run::new("dpkg-deb").arg("--version").succeeds() {
        bail!("dpkg-deb is missing, which makes Debian's packages");
    }
    check_changelog(source)?;
    let version = &source.version;
    let root = folder.join(format!("package-{}", arch.name()));
    Run::new("rm").arg("-rf").arg(&root).capture()?;
    let deploy = source.root.join("deploy/debian");
    copy(program, &root.join("usr/bin/leakmon"), 0o755)?;
    for (from, to) in FILES {
        copy(&source.root.join(from), &root.join(to), 0o644)?;
    }
    for (from, to) in COMPLETIONS {
        copy(&documents.join(from), &root.join(to), 0o644)?;
    }
    copy(&deploy.join("changelog"), &root.join(CHANGELOG), 0o644)?;
    let mut compressed = vec![root.join(CHANGELOG)];
    for page in files(documents)? {
        if page.extension().is_some_and(|extension| extension == "1") {
            let to = root.join(MANUAL).join(page.file_name().unwrap_or_default());
            copy(&page, &to, 0o644)?;
            compressed.push(to);
        }
    }
    Run::new("gzip")
        .args(["-9", "--no-name"])
        .args(&compressed)
        .capture()?;
    let licence = fs::read_to_string(source.root.join("LICENSE-MIT"))?;
    fill(
        &deploy.join("copyright"),
        &root.join("usr/share/doc/leakmon/copyright"),
        &[("@MIT@", &paragraph(&licence))],
    )?;

    let size = installed_size(&root)?.to_string();
    let sums = Run::new("sh")
        .arg("-c")
        .arg("find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum")
        .dir(&root)
        .capture()?;
    let control = root.join("DEBIAN");
    for name in ["postinst", "prerm", "postrm"] {
        copy(&deploy.join(name), &control.join(name), 0o755)?;
    }
    copy(&deploy.join("conffiles"), &control.join("conffiles"), 0o644)?;
    write(&control.join("md5sums"), &sums)?;
    fill(
        &deploy.join("control"),
        &control.join("control"),
        &[
            ("@VERSION@", version),
            ("@ARCHITECTURE@", arch.debian()),
            ("@SIZE@", &size),
        ],
    )?;
    // Whatever the umask was.
    Run::new("find")
        .arg(&root)
        .args(["-type", "d", "-exec", "chmod", "755", "{}", "+"])
        .capture()?;

    let path = folder.join(format!("leakmon_{version}_{}.deb", arch.debian()));
    Run::new("dpkg-deb")
        .args(["--root-owner-group", "-Zxz", "--build"])
        .arg(&root)
        .arg(&path)
        .env("SOURCE_DATE_EPOCH", &source.date)
        .capture()?;
    Ok(path)
}

/// The package's changelog must begin with the program's version.
fn check_changelog(source: &Source) -> Result<()> {
    let changelog = fs::read_to_string(source.root.join("deploy/debian/changelog"))
        .context("cannot read the package's changelog")?;
    if !changelog.starts_with(&format!("leakmon ({}) ", source.version)) {
        bail!(
            "leakmon is {}: begin deploy/debian/changelog with an entry for it",
            source.version
        );
    }
    Ok(())
}

/// A text as a field of a Debian control file has it.
fn paragraph(text: &str) -> String {
    let lines: Vec<String> = text
        .trim_end()
        .lines()
        .map(|line| match line.trim_end() {
            "" => " .".to_owned(),
            line => format!(" {line}"),
        })
        .collect();
    lines.join("\n")
}

fn fill(from: &Path, to: &Path, values: &[(&str, &str)]) -> Result<()> {
    let mut text =
        fs::read_to_string(from).with_context(|| format!("cannot read {}", from.display()))?;
    for (name, value) in values {
        text = text.replace(name, value);
    }
    write(to, &text)
}

fn write(to: &Path, text: &str) -> Result<()> {
    make_way(to)?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))?;
    allow(to, 0o644)
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    make_way(to)?;
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    allow(to, mode)
}

fn make_way(to: &Path) -> Result<()> {
    to.parent().map_or(Ok(()), workspace::create)
}

fn allow(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

/// KiB, as dpkg-gencontrol counts them: each file's, rounded up, and one for anything else.
fn installed_size(path: &Path) -> Result<u64> {
    if !path.is_dir() {
        return Ok(fs::metadata(path)?.len().div_ceil(1024));
    }
    files(path)?
        .iter()
        .try_fold(1, |sum, path| Ok(sum + installed_size(path)?))
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    Ok(files)
}
