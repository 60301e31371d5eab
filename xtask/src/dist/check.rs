//! Whether what was made is what it should be: the same bytes from another folder, good by Debian's rules, and gone without
//! a trace when it is removed.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Made, Source, make};
use crate::command::Run;
use crate::debian::{self, View};
use crate::privilege;
use crate::progress::{note, step};
use crate::workspace;

/// How long the daemon may take until it is ready.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Builds everything once more from a copy of the checkout, and demands the same bytes.
pub(super) fn same_elsewhere(source: &Source, made: &[Made]) -> Result<()> {
    let root = workspace::target().join("dist/elsewhere/leakmon-checkout");
    Run::new("rm").arg("-rf").arg(&root).capture()?;
    workspace::create(&root)?;
    Run::new("sh")
        .arg("-c")
        .arg("git ls-files -z | xargs -0 cp --parents --no-dereference --target-directory=\"$0\"")
        .arg(&root)
        .dir(&source.root)
        .capture()?;
    let copy = Source {
        root: root.clone(),
        version: source.version.clone(),
        date: source.date.clone(),
    };
    let arches: Vec<_> = made.iter().map(|each| each.arch).collect();
    let again = step("all of it again, elsewhere", || {
        make(&copy, &arches, &root.join("made"))
    })?;
    for (first, second) in made.iter().zip(&again) {
        for (first, second) in [
            (&first.program, &second.program),
            (&first.package, &second.package),
        ] {
            let (a, b) = (std::fs::read(first)?, std::fs::read(second)?);
            ensure!(
                a == b,
                "{} and {} differ, and were built from the same sources",
                first.display(),
                second.display()
            );
            note(format!(
                "{} bytes are the same: {}",
                a.len(),
                first.display()
            ));
        }
    }
    std::fs::remove_dir_all(&root)?;
    Ok(())
}

/// Asks lintian, whose warnings count, too.
pub(super) fn lintian(made: &[Made]) -> Result<()> {
    step("lintian", || {
        require("lintian")?;
        made.iter().try_for_each(|each| {
            Run::new("lintian")
                .args(["--fail-on", "error,warning", "--tag-display-limit", "0"])
                .arg(&each.package)
                .run()
        })
    })
}

/// Installs the package for this machine in Debian's stable release, starts the daemon, and removes it.
pub(super) fn installs(made: &[Made]) -> Result<()> {
    let Some(native) = made.iter().find(|each| each.arch.is_native()) else {
        note("not installed: no package is for this machine");
        return Ok(());
    };
    step("installation in Debian's stable release", || {
        let root = Root::open()?;
        let before = root.files()?;
        let inside = root.folder.join("leakmon.deb");
        std::fs::copy(&native.package, &inside)?;
        root.run(&["dpkg", "--install", "/leakmon.deb"]).capture()?;
        std::fs::remove_file(&inside)?;
        let said = root.run(&["leakmon", "--version"]).capture()?;
        note(said.trim());
        root.daemon_answers()?;

        let configuration = root.folder.join("etc/leakmon/leakmon.toml");
        root.run(&["dpkg", "--remove", "leakmon"]).capture()?;
        ensure!(
            configuration.exists(),
            "removal took the configuration, which only a purge may"
        );
        root.run(&["dpkg", "--purge", "leakmon"]).capture()?;
        let after = root.files()?;
        let left: Vec<&PathBuf> = after.difference(&before).collect();
        ensure!(left.is_empty(), "the purge left {left:?}");
        let lost: Vec<&PathBuf> = before.difference(&after).collect();
        ensure!(lost.is_empty(), "the purge took {lost:?}");
        note("installed, started, removed and purged; nothing is left");
        Ok(())
    })
}

/// A root file system of Debian's stable release.
struct Root {
    folder: PathBuf,
}

impl Root {
    fn open() -> Result<Self> {
        ensure!(privilege::is_root(), "only root can install a package");
        require("mmdebstrap")?;
        let root = Self {
            folder: workspace::target().join("dist/root"),
        };
        // What an interrupted run left.
        root.unmount();
        Run::new("rm")
            .args(["-rf", "--one-file-system"])
            .arg(&root.folder)
            .capture()?;
        Run::new("mmdebstrap")
            .args(["--quiet", "--variant=essential", "--mode=root", "stable"])
            .arg(&root.folder)
            .args(View::sources("stable")?)
            .capture()?;
        Run::new("mount")
            .args(["--bind", "/proc"])
            .arg(root.folder.join("proc"))
            .capture()?;
        Ok(root)
    }

    /// A command in it.
    fn run(&self, command: &[&str]) -> Run {
        Run::new("chroot")
            .arg(&self.folder)
            .args(command)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
    }

    /// Every path but those in which dpkg keeps its accounts.
    fn files(&self) -> Result<BTreeSet<PathBuf>> {
        let listed = Run::new("find")
            .arg(&self.folder)
            .args(["-xdev", "-not", "-path", "*/var/lib/dpkg/*"])
            .args(["-not", "-path", "*/var/log/dpkg.log"])
            .capture()?;
        Ok(listed.lines().map(PathBuf::from).collect())
    }

    /// Starts the daemon as its unit does, and waits until it is ready.
    fn daemon_answers(&self) -> Result<()> {
        // A daemon may run on this machine; this one has a port of its own.
        let path = self.folder.join("etc/leakmon/leakmon.toml");
        let text = std::fs::read_to_string(&path)?;
        std::fs::write(&path, text.replace("127.0.0.1:9464", "127.0.0.1:0"))?;
        let unit = self.folder.join("usr/lib/systemd/system/leakmon.service");
        let unit = std::fs::read_to_string(unit)?;
        let command: Vec<&str> = unit
            .lines()
            .find_map(|line| line.strip_prefix("ExecStart="))
            .context("the unit starts nothing")?
            .split(' ')
            .collect();
        let mut daemon = Daemon(self.run(&command).start()?);
        let said = daemon.0.stdout.take().context("the daemon has no output")?;
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        let address = line
            .trim_end()
            .strip_prefix("listening on ")
            .with_context(|| format!("the daemon began with `{line}`"))?;
        let start = Instant::now();
        while !is_ready(address)? {
            if start.elapsed() > START_LIMIT {
                bail!("the daemon is not ready after {START_LIMIT:?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn unmount(&self) {
        // It may not be mounted.
        let _ = Run::new("umount").arg(self.folder.join("proc")).capture();
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// The daemon, ended when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself, which the caller has noticed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether the daemon says that it is.
fn is_ready(address: &str) -> Result<bool> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(START_LIMIT))?;
    connection.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer
        .lines()
        .next()
        .is_some_and(|line| line.contains(" 200 ")))
}

/// Installs a program of Debian's package of the same name.
fn require(program: &str) -> Result<()> {
    if Run::new(program).arg("--version").succeeds() {
        return Ok(());
    }
    debian::install(&[program])
}
