//! `pprof.Lookup("goroutine").WriteTo(w, 2)`, from Go's runtime/traceback.go;
//! tasks of other runtimes in the same form.

use std::io;

use super::super::text::function;
use super::{frames, minor_version, shown};
use crate::task::human::safe;
use crate::task::{Dump, Frame, State, Task};

/// Frames that Go 1.21 and later print from each end of a long stack.
const ENDS: usize = 50;

/// Calls that Go before 1.21 goes through, hidden ones included.
const INNERMOST: usize = 100;

pub(super) fn write(dump: &Dump, out: &mut dyn io::Write) -> io::Result<()> {
    let both_ends = minor_version(&dump.version).is_none_or(|minor| minor >= 21);
    for (i, task) in dump.tasks.iter().enumerate() {
        if i > 0 {
            out.write_all(b"\n")?;
        }
        header(dump.noun, task, out)?;
        let stack = frames(dump, task.stack);
        if stack.is_empty() {
            if task.state == State::Running {
                let noun = dump.noun;
                writeln!(out, "\t{noun} running on other thread; stack unavailable")?;
            } else {
                out.write_all(b"\tstack unavailable\n")?;
            }
        } else if both_ends {
            ends(stack, out)?;
        } else {
            innermost(stack, out)?;
        }
        let site = dump.sites.get(task.site.0 as usize);
        if let Some(creator) = site.and_then(|site| site.created_by.as_ref())
            && !creator.hidden
            && task.id != 1
        {
            created_by(creator, dump.noun, task.parent, out)?;
        }
    }
    Ok(())
}

fn header(noun: &str, task: &Task, out: &mut dyn io::Write) -> io::Result<()> {
    let waits = task.state.is_blocked();
    let reason = task
        .reason
        .as_deref()
        .filter(|reason| waits && !reason.is_empty());
    let status = safe(reason.unwrap_or(task.state.name()));
    write!(out, "{noun} {} ", task.id)?;
    if let Some(name) = &task.name {
        write!(out, "{:?} ", safe(name))?;
    }
    write!(out, "[{status}")?;
    if task.state == State::Leaked {
        out.write_all(b" (leaked)")?;
    }
    if task.scan {
        out.write_all(b" (scan)")?;
    }
    if matches!(task.state, State::Waiting | State::Syscall) {
        let minutes = task.waited.map_or(0, |waited| waited.as_secs() / 60);
        if minutes >= 1 {
            write!(out, ", {minutes} minutes")?;
        }
    }
    if let Some(on) = &task.on {
        write!(out, ", {}", safe(on))?;
    }
    if task.locked_to_thread {
        out.write_all(b", locked to thread")?;
    }
    out.write_all(b"]:\n")
}

fn ends(stack: &[Frame], out: &mut dyn io::Write) -> io::Result<()> {
    let total = shown(stack).count();
    let elided = total.saturating_sub(2 * ENDS);
    for (i, frame) in shown(stack).enumerate() {
        if elided > 0 && i == ENDS {
            writeln!(out, "...{elided} frames elided...")?;
        }
        if i < ENDS || i >= ENDS + elided {
            call(frame, out)?;
        }
    }
    Ok(())
}

fn innermost(stack: &[Frame], out: &mut dyn io::Write) -> io::Result<()> {
    let all = stack.iter().all(|frame| frame.hidden);
    let (mut calls, mut printed) = (0, 0);
    for frame in stack {
        if all || !frame.hidden {
            call(frame, out)?;
            printed += 1;
        }
        // Inlined calls do not count, but the one that they end in.
        calls += usize::from(!frame.inlined);
        if calls == INNERMOST {
            break;
        }
    }
    if printed == INNERMOST {
        out.write_all(b"...additional frames elided...\n")?;
    }
    Ok(())
}

fn call(frame: &Frame, out: &mut dyn io::Write) -> io::Result<()> {
    writeln!(out, "{}(...)", name(frame))?;
    position(frame, !frame.inlined, out)
}

/// Where a call is: file and line, as far as they are known, and the offset.
fn position(frame: &Frame, offset: bool, out: &mut dyn io::Write) -> io::Result<()> {
    match (frame.file.is_empty(), frame.line) {
        (true, _) => write!(out, "\t?")?,
        (false, line) => write!(out, "\t{}:{line}", safe(&frame.file))?,
    }
    if offset && frame.offset > 0 {
        write!(out, " +{:#x}", frame.offset)?;
    }
    out.write_all(b"\n")
}

fn created_by(
    creator: &Frame,
    noun: &str,
    parent: Option<u64>,
    out: &mut dyn io::Write,
) -> io::Result<()> {
    write!(out, "created by {}", name(creator))?;
    if let Some(parent) = parent.filter(|parent| *parent != 0) {
        write!(out, " in {noun} {parent}")?;
    }
    out.write_all(b"\n")?;
    position(creator, true, out)
}

fn name(frame: &Frame) -> std::borrow::Cow<'_, str> {
    match &*frame.function {
        "runtime.gopanic" => "panic".into(),
        other => function(other),
    }
}
