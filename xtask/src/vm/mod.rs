//! `cargo xtask vm`: the end-to-end suite on other kernels and processors than this machine's.

mod build;
mod guest;
mod initramfs;
mod kernels;
mod suite;

use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::arch::Arch;
use crate::command::Run;
use crate::debian;
use crate::fixtures;
use crate::go::Go;
use crate::progress::{note, seconds, step};
use crate::setup;
pub(crate) use build::Ahead;
use guest::{Guest, Report};
use kernels::{Archive, Kernel};
use suite::Suite;

/// Guests that run at the same time: each waits for a part of its time.
const AT_ONCE: usize = 3;

/// Which kernels to boot.
#[derive(Args)]
pub(crate) struct Options {
    /// Kernels as in 6.1, or `newest`; 5.10, 6.1, 6.12 and the newest unless some are named
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Processors of the guests; x86_64 and aarch64 unless some are named
    #[arg(long, value_name = "ARCH")]
    arch: Vec<Arch>,
    /// Run only the tests with this in their names, as in `probe::blocks`
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// Programs that boot guests and pack what is in them, and Debian's package of each.
fn tools(arch: Arch) -> [(&'static str, &'static str); 2] {
    let qemu = match arch {
        Arch::X86_64 => ("qemu-system-x86_64", "qemu-system-x86"),
        Arch::Aarch64 => ("qemu-system-aarch64", "qemu-system-arm"),
    };
    [qemu, ("cpio", "cpio")]
}

/// Sets up, builds, and runs the suite in guests as the user asked.
pub(crate) fn run(options: &Options) -> Result<()> {
    let go = setup::run()?;
    let series: Vec<&str> = match options.kernels[..] {
        [] => kernels::SERIES.into(),
        ref named => named.iter().map(String::as_str).collect(),
    };
    let archs = match options.arch[..] {
        [] => &[Arch::X86_64, Arch::Aarch64],
        ref named => named,
    };
    let wanted: Vec<_> = archs.iter().map(|&arch| (arch, &series[..])).collect();
    boot(&go, false, options.only.as_deref(), &wanted)
}

/// Where the brief suite has to hold before a change lands.
const WANTED: [(Arch, &[&str]); 2] = [
    (Arch::X86_64, kernels::SERIES),
    (Arch::Aarch64, kernels::TWO),
];

/// Begins to compile what [`test()`] needs.
pub(crate) fn ahead() -> Result<Ahead> {
    let archs = WANTED.iter().map(|&(arch, _)| arch);
    Ahead::start(archs, &Suite::new(true, None))
}

/// Runs the brief suite.
pub(crate) fn test(go: &Go) -> Result<()> {
    boot(go, true, None, &WANTED)
}

/// Runs the suite, or the brief one, or `only` some tests, in these guests.
fn boot(go: &Go, brief: bool, only: Option<&str>, wanted: &[(Arch, &[&str])]) -> Result<()> {
    let suite = Suite::new(brief, only);
    ensure!(
        !suite.tests().is_empty(),
        "no test that runs in guests has {:?} in its name",
        only.unwrap_or_default()
    );
    let mut guests = Vec::new();
    for &(arch, series) in wanted {
        guests.extend(prepare(arch, go, &suite, series)?);
    }
    let start = Instant::now();
    println!("==> {} guests, {AT_ONCE} at once", guests.len());
    let reports = boot_all(&guests)?;
    println!(
        "==> {} guests in {}",
        guests.len(),
        seconds(start.elapsed())
    );
    for (guest, report) in guests.iter().zip(&reports) {
        note(format!(
            "{:<8} {:<7} {:<34} {:>3} passed, {} failed in {}",
            guest.arch.name(),
            guest.kernel.series,
            guest.kernel.release,
            report.passed(),
            report.failed(),
            seconds(report.took)
        ));
    }
    let failed = reports.iter().filter(|report| !report.is_good()).count();
    if failed > 0 {
        bail!("{failed} guests failed; what they said is above");
    }
    Ok(())
}

/// Gets the kernels of one architecture, and builds what is in their guests.
fn prepare(arch: Arch, go: &Go, suite: &Suite, series: &[&str]) -> Result<Vec<Guest>> {
    step("qemu", || install(arch))?;
    let mut archive = Archive::open(arch)?;
    let (kernels, tools) = step(&format!("kernels for {}", arch.name()), || {
        let kernels: Result<Vec<Kernel>> =
            series.iter().map(|series| archive.kernel(series)).collect();
        let kernels = kernels?;
        for kernel in &kernels {
            note(format!("{}: {}", kernel.series, kernel.release));
        }
        Ok((kernels, archive.tools()?))
    })?;
    let built = build::build(arch, go, suite)?;
    let fixtures = fixtures::of(arch, go, suite::GO, suite::TOKIO)?;
    let initramfs = step("initramfs", || {
        let file = initramfs::pack(arch, &tools, &built, suite, &fixtures)?;
        note(format!("{} MB", file.metadata()?.len() >> 20));
        Ok(file)
    })?;
    let guests = kernels.into_iter().map(|kernel| Guest {
        arch,
        kernel,
        initramfs: initramfs.clone(),
        tests: suite.tests().len(),
    });
    Ok(guests.collect())
}

/// Installs what is missing, where this system is Debian.
fn install(arch: Arch) -> Result<()> {
    let missing: Vec<&str> = tools(arch)
        .iter()
        .filter(|(program, _)| !Run::new(program).arg("--version").succeeds())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !debian::is_debian() {
        bail!(
            "guests need {}, and this system has no apt-get",
            missing.join(" and ")
        );
    }
    debian::install(&missing)
}

/// Boots the guests, [`AT_ONCE`] at a time, and tells of each as it ends.
fn boot_all(guests: &[Guest]) -> Result<Vec<Report>> {
    let next = Mutex::new(guests.iter().enumerate());
    let told = Mutex::new(());
    let worker = || -> Result<Vec<(usize, Report)>> {
        let mut reports = Vec::new();
        loop {
            let Some((index, guest)) = next.lock().ok().and_then(|mut next| next.next()) else {
                return Ok(reports);
            };
            let report = guest::run(guest)?;
            let _one_at_a_time = told.lock();
            tell(guest, &report);
            reports.push((index, report));
        }
    };
    let mut all = Vec::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            match worker.join() {
                Ok(reports) => all.extend(reports?),
                Err(_) => bail!("a guest's thread panicked"),
            }
        }
        Ok(())
    })?;
    all.sort_by_key(|&(index, _)| index);
    Ok(all.into_iter().map(|(_, report)| report).collect())
}

/// Prints what became of a guest, as a test run of this machine does.
fn tell(guest: &Guest, report: &Report) {
    let Guest { arch, kernel, .. } = guest;
    println!(
        "==> {} {}: {}",
        arch.name(),
        kernel.series,
        if report.release.is_empty() {
            &kernel.release
        } else {
            &report.release
        }
    );
    for outcome in &report.outcomes {
        let word = if outcome.passed { "ok" } else { "FAILED" };
        note(format!(
            "test {} ... {word} ({:.1} s)",
            outcome.name, outcome.seconds
        ));
        for line in outcome.untested() {
            note(format!("    {}", line.trim()));
        }
    }
    for outcome in report.outcomes.iter().filter(|outcome| !outcome.passed) {
        println!(
            "---- {} on {} ----\n{}",
            outcome.name, kernel.series, outcome.output
        );
    }
    for complaint in &report.complaints {
        note(format!("the kernel complained: {complaint}"));
    }
    if let Some(why) = &report.cut_short {
        note(format!("NOT ALL TESTS RAN: {why}"));
    }
    note(format!(
        "{} passed, {} failed, in {}; the console is in {}",
        report.passed(),
        report.failed(),
        seconds(report.took),
        guest.log().display()
    ));
}
