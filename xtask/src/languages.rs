//! The languages of fixtures/threads/languages: their programs are run as they are.

use crate::command::Run;
use crate::debian;
use crate::progress::note;

/// Programs that run them, and Debian's package that has each. The JDK, for the JVM compiles a source before it runs it.
const LANGUAGES: &[(&str, &str)] = &[
    ("javac", "default-jdk-headless"),
    ("node", "nodejs"),
    ("python3", "python3"),
];

/// Installs what is missing, where this system is Debian. The tests say what they could not run.
pub(crate) fn ensure() {
    let missing: Vec<&str> = LANGUAGES
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
            "threads of some languages are not tested without {}: {error:#}",
            missing.join(", ")
        ));
    }
}
