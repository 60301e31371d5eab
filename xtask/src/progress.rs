//! What the user reads while things happen: steps, and lines below them.

use std::time::{Duration, Instant};

use anyhow::Result;

/// Prints a line below the present step.
pub(crate) fn note(text: impl AsRef<str>) {
    println!("    {}", text.as_ref());
}

/// Announces a step, does it, and says how long it took.
pub(crate) fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("==> {title}");
    let start = Instant::now();
    let result = work()?;
    let took = start.elapsed();
    if took >= Duration::from_secs(1) {
        note(format!("done in {}", seconds(took)));
    }
    Ok(result)
}

/// A duration as a person says it.
pub(crate) fn seconds(duration: Duration) -> String {
    match duration.as_secs() {
        0..=9 => format!("{:.1} s", duration.as_secs_f64()),
        whole @ 10..=119 => format!("{whole} s"),
        whole => format!("{} min {} s", whole / 60, whole % 60),
    }
}
