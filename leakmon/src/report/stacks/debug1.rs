//! `pprof.Lookup("goroutine").WriteTo(w, 1)`, from Go's runtime/pprof/pprof.go.

use std::io;

use super::super::text::{function, width};
use super::{alike, call_address};
use crate::task::human::safe;
use crate::task::{Dump, Frame};

pub(super) fn write(dump: &Dump, out: &mut dyn io::Write) -> io::Result<()> {
    writeln!(out, "{} profile: total {}", dump.noun, dump.tasks.len())?;
    for alike in alike(dump) {
        writeln!(out, "{} {}", alike.count, alike.key)?;
        let lines: Vec<[String; 3]> = visible(&alike.frames[..alike.recorded]).map(line).collect();
        // As Go's tabwriter aligns: columns end at the next multiple of eight
        // after their longest cell and one space.
        let column = |cell: usize| {
            let longest = lines.iter().map(|line| width(&line[cell])).max();
            (longest.unwrap_or(0) + 1).next_multiple_of(8)
        };
        let columns = [column(0), column(1)];
        for line in &lines {
            out.write_all(b"#\t")?;
            for (cell, end) in line.iter().zip(columns) {
                let tabs = (end - width(cell)).div_ceil(8);
                write!(out, "{cell}{}", "\t".repeat(tabs))?;
            }
            writeln!(out, "{}", line[2])?;
        }
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// Go's rule for this format: no frame of the runtime before the first other
/// one, unless there is no other.
fn visible(frames: &[Frame]) -> impl Iterator<Item = &Frame> {
    let runtime = |frame: &Frame| {
        frame.function.starts_with("runtime.") || frame.function.starts_with("internal/runtime/")
    };
    let first = frames.iter().position(|frame| !runtime(frame)).unwrap_or(0);
    frames[first..]
        .iter()
        .filter(|frame| &*frame.function != "runtime.goexit")
}

fn line(frame: &Frame) -> [String; 3] {
    let address = call_address(frame);
    [
        format!("{address:#x}"),
        format!(
            "{}+{:#x}",
            function(&frame.function),
            address.saturating_sub(frame.entry)
        ),
        format!("{}:{}", safe(&frame.file), frame.line),
    ]
}
