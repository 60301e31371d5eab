//! What a guest has: busybox, leakmon, its tests with what they read, and a script that runs them.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::build::Built;
use super::suite::{self, Suite};
use crate::arch::Arch;
use crate::command::Run;
use crate::workspace;

/// Shared libraries that fixtures may be linked against.
const LIBRARIES: &[&str] = &[
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
];

/// Sources that tests read, below the checkout.
const SOURCES: &[&str] = &["fixtures", "leakmon/tests"];

/// What begins each line of the script's own, among those of the tests and the kernel.
pub(super) const MARK: &str = "@@ ";

/// How long one test may take in a guest, in seconds.
const TEST_SECONDS: u32 = 300;

/// Where fixtures are in a guest.
const FIXTURES: &str = "fixtures";

/// `go` as tests call it: what it would build was built beforehand.
const GO: &str = r#"#!/bin/sh
case "$1" in
build)
    source="${4##*/}"
    exec cp "/go/${source%.go}" "$3"
    ;;
tool)
    shift 2
    exec /go/pprof "$@"
    ;;
esac
echo "this guest has no Go: $*" >&2
exit 1
"#;

/// A folder that becomes a guest's first file system.
struct Tree {
    root: PathBuf,
    arch: Arch,
}

impl Tree {
    /// The path in the tree of what a guest has at `path`; the folder above it is made.
    fn place(&self, path: &Path) -> Result<PathBuf> {
        let place = self.root.join(path.strip_prefix("/").unwrap_or(path));
        if let Some(parent) = place.parent() {
            workspace::create(parent)?;
        }
        Ok(place)
    }

    fn copy(&self, from: &Path, to: impl AsRef<Path>) -> Result<PathBuf> {
        let to = self.place(to.as_ref())?;
        std::fs::copy(from, &to)
            .with_context(|| format!("cannot copy {} to a guest", from.display()))?;
        Ok(to)
    }

    /// Where the loader finds libraries without being told.
    fn library_folder(&self) -> PathBuf {
        match self.arch {
            Arch::X86_64 => "lib/x86_64-linux-gnu".into(),
            Arch::Aarch64 => "lib/aarch64-linux-gnu".into(),
        }
    }

    /// Copies a program of this build without its debug information, to the same path.
    fn copy_program(&self, path: &Path) -> Result<()> {
        let copy = self.copy(path, path)?;
        Run::new(self.arch.strip())
            .arg("--strip-debug")
            .arg(&copy)
            .capture()
            .map(drop)
    }

    fn write(&self, path: &str, text: &str, mode: u32) -> Result<()> {
        let place = self.place(Path::new(path))?;
        std::fs::write(&place, text)?;
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(mode))?;
        Ok(())
    }
}

/// Programs of [`Archive::tools`], and a library that one of them needs.
///
/// [`Archive::tools`]: super::kernels::Archive::tools
const TOOLS: &[&str] = &["busybox", "unshare", "setpriv", "libcap-ng.so.0"];

/// Packs everything into a file that a kernel unpacks when it boots. `fixtures` is the folder with all of them.
pub(super) fn pack(
    arch: Arch,
    tools: &Path,
    built: &Built,
    suite: &Suite,
    fixtures: &Path,
) -> Result<PathBuf> {
    let folder = workspace::target().join("vm").join(arch.name());
    let root = folder.join("root");
    if root.exists() {
        std::fs::remove_dir_all(&root)?;
    }
    let tree = Tree { root, arch };
    for directory in [
        "dev", "proc", "sys", "tmp", "root", "bin", "usr/bin", "sbin",
    ] {
        workspace::create(&tree.root.join(directory))?;
    }
    for tool in TOOLS {
        let from =
            find(tools, tool)?.with_context(|| format!("Debian's packages have no {tool}"))?;
        let to = if tool.contains(".so") {
            tree.library_folder()
        } else {
            "usr/bin".into()
        };
        tree.copy(&from, to.join(tool))?;
    }
    symlink("/usr/bin/busybox", tree.root.join("bin/sh"))?;
    tree.write(
        "etc/passwd",
        "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
        0o644,
    )?;
    tree.write("etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644)?;
    tree.write("usr/bin/go", GO, 0o755)?;
    for program in &built.go {
        let name = program.file_name().context("a program has a name")?;
        tree.copy(program, Path::new("go").join(name))?;
    }
    libraries(&tree)?;
    tree.copy_program(&built.leakmon)?;
    for path in built.tests.values() {
        tree.copy_program(path)?;
    }
    for source in SOURCES {
        sources(&tree, &workspace::root().join(source))?;
    }
    select(&tree, fixtures)?;
    tree.write("init", &script(built, suite)?, 0o755)?;

    let archive = folder.join("initramfs");
    Run::new("sh")
        .args([
            "-c",
            "find . | cpio --quiet -o -H newc -R 0:0 > \"$1\"",
            "sh",
        ])
        .arg(&archive)
        .dir(&tree.root)
        .capture()?;
    Ok(archive)
}

/// A program of this name below a folder, or a library.
fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    let is_program = folder.ends_with("bin") || name.contains(".so");
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if is_program && path.ends_with(name) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// The C library's shared objects.
fn libraries(tree: &Tree) -> Result<()> {
    let (from, to) = (tree.arch.libraries(), tree.library_folder());
    for library in LIBRARIES {
        tree.copy(&from.join(library), to.join(library))?;
    }
    let (loader, path) = tree.arch.loader();
    tree.copy(&from.join(loader), path).map(drop)
}

/// Copies the text files below a folder.
fn sources(tree: &Tree, folder: &Path) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            sources(tree, &path)?;
        } else if ["rs", "go", "c"]
            .map(OsStr::new)
            .contains(&path.extension().unwrap_or_default())
        {
            tree.copy(&path, &path)?;
        }
    }
    Ok(())
}

/// Copies the fixtures that guests have, with a manifest that names only those.
fn select(tree: &Tree, fixtures: &Path) -> Result<()> {
    let text = std::fs::read(fixtures.join("manifest.json")).context("there are no fixtures")?;
    let mut manifest: Value = serde_json::from_slice(&text)?;
    let all = manifest["fixtures"]
        .as_array_mut()
        .context("a manifest of fixtures")?;
    all.retain(|fixture| {
        let path = fixture["path"].as_str().map(Path::new);
        path.and_then(Path::parent).is_some_and(|folder| {
            suite::FIXTURES
                .iter()
                .any(|wanted| folder == Path::new(wanted))
        })
    });
    for wanted in suite::FIXTURES {
        let has = |fixture: &Value| {
            fixture["path"]
                .as_str()
                .is_some_and(|path| Path::new(path).starts_with(wanted))
        };
        ensure!(all.iter().any(has), "there are no fixtures {wanted}");
    }
    for fixture in all.iter() {
        let path = fixture["path"].as_str().context("a fixture's path")?;
        tree.copy(&fixtures.join(path), Path::new(FIXTURES).join(path))?;
    }
    tree.write(
        &format!("{FIXTURES}/manifest.json"),
        &format!("{manifest:#}\n"),
        0o644,
    )
}

/// The guest's first process. Nothing is mounted on `/tmp`, where the checkout may be.
fn script(built: &Built, suite: &Suite) -> Result<String> {
    let mut script = String::from(
        "#!/bin/sh\n\
         /usr/bin/busybox --install -s /bin\n\
         export PATH=/usr/bin:/bin HOME=/root RUST_BACKTRACE=0\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         mount -t devtmpfs dev /dev\n\
         mkdir -p /dev/shm\n\
         chmod 1777 /tmp\n\
         mount -t securityfs securityfs /sys/kernel/security 2>/dev/null\n\
         ifconfig lo 127.0.0.1 up\n\
         now() { cut -d' ' -f1 /proc/uptime; }\n",
    );
    writeln!(script, "export LEAKMON_FIXTURES=/{FIXTURES} LEAKMON_GO=go")?;
    writeln!(
        script,
        "export LEAKMON_GO_VERSIONS='{}'",
        suite::GO.join(" ")
    )?;
    writeln!(script, "export LEAKMON_SLOWNESS={}", suite::SLOWNESS)?;
    // Where tests make files of their own.
    let scratch = built
        .leakmon
        .parent()
        .and_then(Path::parent)
        .context("a target folder")?;
    writeln!(script, "mkdir -p {}", scratch.join("tmp").display())?;
    writeln!(
        script,
        "run() {{\n\
         \techo \"{MARK}begin $1 $3\"\n\
         \tbegun=$(now)\n\
         \ttimeout -s KILL {TEST_SECONDS} \"$2\" --exact \"$3\" --show-output --test-threads=1 2>&1 </dev/null\n\
         \techo \"{MARK}end $? $begun $(now)\"\n\
         }}"
    )?;
    writeln!(script, "echo \"{MARK}boot $(uname -r) $(now)\"")?;
    for (binary, test) in suite.tests() {
        let path = built.tests.get(*binary);
        let path = path.with_context(|| format!("there is no test {binary}"))?;
        writeln!(script, "run {binary} {} {test}", path.display())?;
    }
    // What the kernel has to complain of is leakmon's failure as well.
    writeln!(
        script,
        "dmesg | grep -E 'BUG:|WARNING:|Oops|general protection|Call Trace' | sed 's/^/{MARK}kernel /'"
    )?;
    writeln!(script, "echo \"{MARK}done $(now)\"\nreboot -f")?;
    Ok(script)
}
