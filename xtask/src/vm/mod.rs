//! `cargo xtask vm`: the end-to-end suite on other kernels and processors than this machine's.

mod build;
mod guest;
mod initramfs;
mod kernels;
mod suite;

use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::arch::Arch;
use crate::command::Run;
use crate::debian;
use crate::fixtures;
use crate::go::Go;
use crate::progress::{note, seconds, step};
use crate::setup;
use crate::workspace;
use guest::Report;
use kernels::{Archive, Kernel};

/// Guests that run at the same time.
const AT_ONCE: usize = 2;

/// Which kernels to boot.
#[derive(Args, Default)]
pub(crate) struct Options {
    /// Kernels as in 6.1, or `newest`; 5.10, 6.1, 6.12 and the newest unless some are named
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Processors of the guests; x86_64 unless some are named
    #[arg(long, value_name = "ARCH")]
    arch: Vec<Arch>,
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
    test(&go, options)
}

/// Runs the suite in guests.
pub(crate) fn test(go: &Go, options: &Options) -> Result<()> {
    let start = Instant::now();
    let mut guests = Vec::new();
    let mut failed = 0;
    let archs = match options.arch[..] {
        [] => &[Arch::X86_64],
        ref named => named,
    };
    for &arch in archs {
        failed += of_arch(arch, go, options, &mut guests)?;
    }
    println!(
        "==> {} guests in {}",
        guests.len(),
        seconds(start.elapsed())
    );
    for (arch, kernel, report) in &guests {
        note(format!(
            "{:<8} {:<7} {:<34} {:>3} passed, {} failed in {}",
            arch.name(),
            kernel.series,
            kernel.release,
            report.passed(),
            suite::count() - report.passed(),
            seconds(report.took)
        ));
    }
    if failed > 0 {
        bail!("{failed} guests failed; what they said is above");
    }
    Ok(())
}

/// Runs the suite in every guest of one architecture; gives how many failed.
fn of_arch(
    arch: Arch,
    go: &Go,
    options: &Options,
    guests: &mut Vec<(Arch, Kernel, Report)>,
) -> Result<usize> {
    step("qemu", || install(arch))?;
    let mut archive = Archive::open(arch)?;
    let (kernels, tools) = step(&format!("kernels for {}", arch.name()), || {
        let named: Vec<&str> = options.kernels.iter().map(String::as_str).collect();
        let series = if named.is_empty() {
            kernels::SERIES
        } else {
            &named
        };
        let kernels: Result<Vec<Kernel>> =
            series.iter().map(|series| archive.kernel(series)).collect();
        let kernels = kernels?;
        for kernel in &kernels {
            note(format!("{}: {}", kernel.series, kernel.release));
        }
        Ok((kernels, archive.tools()?))
    })?;
    let built = build::build(arch, go)?;
    let fixtures = fixtures::of(arch, go, suite::GO, suite::TOKIO)?;
    let initramfs = step("initramfs", || {
        let file = initramfs::pack(arch, &tools, &built, &fixtures)?;
        note(format!("{} MB", file.metadata()?.len() >> 20));
        Ok(file)
    })?;
    println!(
        "==> {} kernels on {}, {} tests each, {AT_ONCE} at once",
        kernels.len(),
        arch.name(),
        suite::count()
    );
    let reports = boot_all(arch, &kernels, &initramfs)?;
    let failed = reports.iter().filter(|report| !report.is_good()).count();
    guests.extend(
        kernels
            .into_iter()
            .zip(reports)
            .map(|(kernel, report)| (arch, kernel, report)),
    );
    Ok(failed)
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

/// Boots the kernels, [`AT_ONCE`] at a time, and tells of each as it ends.
fn boot_all(arch: Arch, kernels: &[Kernel], initramfs: &Path) -> Result<Vec<Report>> {
    let folder = workspace::target().join("vm").join(arch.name());
    let next = Mutex::new(kernels.iter().enumerate());
    let told = Mutex::new(());
    let worker = || -> Result<Vec<(usize, Report)>> {
        let mut reports = Vec::new();
        loop {
            let Some((index, kernel)) = next.lock().ok().and_then(|mut next| next.next()) else {
                return Ok(reports);
            };
            let log = folder.join(format!("{}.log", kernel.series));
            let report = guest::run(arch, kernel, initramfs, &log)?;
            let _one_at_a_time = told.lock();
            tell(arch, kernel, &report, &log);
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
fn tell(arch: Arch, kernel: &Kernel, report: &Report, log: &Path) {
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
        suite::count() - report.passed(),
        seconds(report.took),
        log.display()
    ));
}
