//! Programs that the tests run: the languages of fixtures/threads/languages, a debugger that reads what leakmon reads, and
//! what judges the systemd unit.

use crate::command::Run;
use crate::debian;
use crate::progress::note;

/// The programs, and Debian's package that has each. The JDK, for the JVM compiles a source before it runs it.
const TOOLS: &[(&str, &str)] = &[
    ("javac", "default-jdk-headless"),
    ("node", "nodejs"),
    ("python3", "python3"),
    ("gdb", "gdb"),
    ("strip", "binutils"),
    ("systemd-analyze", "systemd"),
];

/// Installs what is missing, where this system is Debian. The tests say what they could not run.
pub(crate) fn ensure() {
    let missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(program, _)| !Run::new(program).arg("--version").succeeds())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return;
    }
    let installed = match debian::is_debian() {
        true => debian::install(&missing),
        false => Err(anyhow::anyhow!("this system has no apt-get")),
    };
    if let Err(error) = installed {
        note(format!(
            "some programs cannot be tested without {}: {error:#}",
            missing.join(", ")
        ));
    }
}
