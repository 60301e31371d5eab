//! Every task of a process, in the formats that Go's own tools write and read.
//!
//! All of them write as they go: what they keep in memory grows with the
//! number of different stacks, not with the number of tasks.

mod debug1;
mod debug2;
mod folded;
mod json;
mod pprof;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::time::SystemTime;

use crate::task::{Dump, Frame, SiteId, StackId, Task};

/// How to write a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Every task, as Go's `pprof.Lookup("goroutine").WriteTo(w, 2)` does.
    /// Arguments are not read: each call is printed as `f(...)`.
    Debug2,
    /// Tasks counted by stack and labels, as `WriteTo(w, 1)` does.
    Debug1,
    /// One JSON object a task, each on a line.
    Json,
    /// Stacks on one line each, root first, with a count: for flame graphs.
    Folded,
    /// A gzipped goroutine profile for `go tool pprof`.
    Pprof,
}

/// What a profile says about where it comes from.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// The file that the process runs.
    pub executable: &'a str,
    /// Its build id as GNU tools have it, if it has one.
    pub build_id: Option<&'a str>,
    /// When the dump was taken.
    pub at: SystemTime,
}

/// Writes a dump. The writer should be buffered.
pub fn write(
    format: Format,
    dump: &Dump,
    origin: Origin<'_>,
    out: &mut dyn io::Write,
) -> io::Result<()> {
    match format {
        Format::Debug2 => debug2::write(dump, out),
        Format::Debug1 => debug1::write(dump, out),
        Format::Json => json::write(dump, out),
        Format::Folded => folded::write(dump, out),
        Format::Pprof => pprof::write(dump, origin, out),
    }
}

/// The frames of a stack, innermost first; none when it could not be read.
fn frames(dump: &Dump, stack: Option<StackId>) -> &[Frame] {
    stack
        .and_then(|id| dump.stacks.get(id.0 as usize))
        .map_or(&[], |stack| &stack.frames)
}

/// The frames by which a task is counted. All that is known of one that runs
/// is the function that it was started with.
fn counted_frames(dump: &Dump, site: SiteId, stack: Option<StackId>) -> &[Frame] {
    let known = frames(dump, stack);
    if !known.is_empty() {
        return known;
    }
    let site = dump.sites.get(site.0 as usize);
    site.and_then(|site| site.entry.as_ref())
        .map_or(&[], std::slice::from_ref)
}

/// Frames as the runtime's own traces show them: without hidden ones, unless
/// all are.
fn shown(frames: &[Frame]) -> impl Iterator<Item = &Frame> {
    let all = frames.iter().all(|frame| frame.hidden);
    frames.iter().filter(move |frame| all || !frame.hidden)
}

/// Key and value of each label of a task.
type Labels = [(std::sync::Arc<str>, std::sync::Arc<str>)];

/// Tasks with the same stack and labels.
struct Alike<'a> {
    /// `@ 0x47d9ae 0x41491c`, and the labels: what Go sorts by.
    key: String,
    count: u64,
    /// All frames, of which a profile keeps [`Alike::recorded`].
    frames: &'a [Frame],
    /// How many the runtime's own profiles keep.
    recorded: usize,
    labels: &'a Labels,
}

/// Innermost frames that the runtime's own profiles keep: `StackRecord.Stack0`
/// in runtime/mprof.go up to Go 1.22, and since then what GODEBUG calls
/// `profstackdepth`, of which this is the default.
fn depth_of_profiles(version: &str) -> usize {
    match minor_version(version) {
        Some(..=22) => 32,
        _ => 128,
    }
}

/// 26 of `go1.26.8`.
fn minor_version(version: &str) -> Option<u32> {
    let (_, rest) = version.split_once("go1.")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// Tasks counted by stack and labels, in the order of Go's own profiles: the
/// most first, and then by key.
fn alike(dump: &Dump) -> Vec<Alike<'_>> {
    // First by number, which is fast, and then by what the numbers mean: equal
    // stacks may have been met under several.
    let mut by_id: HashMap<(Option<StackId>, Option<SiteId>, &Labels), u64> = HashMap::new();
    for Task {
        stack,
        site,
        labels,
        ..
    } in &dump.tasks
    {
        let site = stack.is_none().then_some(*site);
        *by_id.entry((*stack, site, labels.as_slice())).or_default() += 1;
    }
    let depth = depth_of_profiles(&dump.version);
    let mut by_key: HashMap<String, Alike<'_>> = HashMap::new();
    for ((stack, site, labels), count) in by_id {
        let frames = match site {
            Some(site) => counted_frames(dump, site, None),
            None => frames(dump, stack),
        };
        let recorded = frames.len().min(depth);
        let key = key(&frames[..recorded], labels);
        by_key
            .entry(key.clone())
            .or_insert(Alike {
                key,
                count: 0,
                frames,
                recorded,
                labels,
            })
            .count += count;
    }
    let mut alike: Vec<Alike<'_>> = by_key.into_values().collect();
    alike.sort_unstable_by(|a, b| b.count.cmp(&a.count).then_with(|| a.key.cmp(&b.key)));
    alike
}

fn key(frames: &[Frame], labels: &Labels) -> String {
    let mut key = "@".to_owned();
    for frame in frames {
        let _ = write!(key, " {:#x}", frame.pc);
    }
    if !labels.is_empty() {
        let mut pairs: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{}:{}", quoted(name), quoted(value)))
            .collect();
        pairs.sort_unstable();
        let _ = write!(key, "\n# labels: {{{}}}", pairs.join(", "));
    }
    key
}

/// As Go's `%q`: on one line, and harmless.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x0b' => out.push_str("\\v"),
            c if c < ' ' || c == '\x7f' => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The address of the call that a frame's program counter returns to.
fn call_address(frame: &Frame) -> u64 {
    if frame.pc > frame.entry {
        frame.pc - 1
    } else {
        frame.pc
    }
}
