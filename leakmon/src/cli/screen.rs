//! Where reports are printed: a terminal that is redrawn, or a stream.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use crate::report::{Report, json, table};

use super::keys::Keys;
use super::{Colour, Format, WatchArgs};

/// Sites that are shown when nobody says how many.
const SITES: usize = 10;

/// Where reports are printed.
pub(super) struct Screen {
    format: Format,
    options: table::Options,
    /// Redrawn in place, on the terminal's second screen.
    live: bool,
    terminal: Terminal,
    latest: BTreeMap<u32, Report>,
    /// What ended, shown under the table and again at the end.
    notes: Vec<String>,
}

impl Screen {
    pub(super) fn new(args: &WatchArgs) -> Screen {
        Screen {
            format: args.format,
            options: table::Options {
                colour: coloured(args.color),
                top: args.top.unwrap_or(SITES),
                all_runtimes: args.all_runtimes,
                ..table::Options::default()
            },
            live: io::stdout().is_terminal() && args.format == Format::Table && !args.once,
            terminal: Terminal::default(),
            latest: BTreeMap::new(),
            notes: Vec::new(),
        }
    }

    /// What is typed while it is redrawn.
    pub(super) fn keys(&self) -> Keys {
        Keys::listen(self.live)
    }

    pub(super) fn show(&mut self, report: Report) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match self.format {
            Format::Json => json::write(&report, Some(self.options.top), &mut out)?,
            Format::Table if self.live => {
                self.latest.insert(report.process.pid, report);
                return self.redraw();
            }
            Format::Table => writeln!(out, "{}", table::render(&report, &self.options))?,
        }
        out.flush()
    }

    fn redraw(&mut self) -> io::Result<()> {
        let (width, height) = size();
        self.options.width = width;
        // Each process has its share of the screen.
        let share = (height.saturating_sub(self.notes.len()) / self.latest.len().max(1)).max(2);
        let mut lines: Vec<String> = Vec::new();
        for report in self.latest.values() {
            let text = table::render(report, &self.options) + "\n";
            let all: Vec<&str> = text.lines().collect();
            if all.len() <= share {
                lines.extend(all.iter().map(|line| (*line).to_owned()));
            } else {
                let shown = &all[..share - 1];
                lines.extend(shown.iter().map(|line| (*line).to_owned()));
                lines.push(format!("… {} more lines", all.len() - shown.len()));
            }
        }
        lines.extend(self.notes.iter().cloned());
        lines.truncate(height);
        self.terminal.draw(&lines, height)
    }

    /// The process is no longer watched.
    pub(super) fn forget(&mut self, pid: u32) {
        if self.latest.len() > 1 {
            self.latest.remove(&pid);
        }
    }

    pub(super) fn note(&mut self, message: &str) {
        if self.live {
            self.notes.push(format!("leakmon: {message}"));
        } else {
            eprintln!("leakmon: {message}");
        }
    }

    /// Leaves the second screen; the last reports stay to be read.
    pub(super) fn finish(&mut self) {
        if !self.terminal.leave() {
            return;
        }
        let mut out = io::stdout().lock();
        for report in self.latest.values() {
            let _ = writeln!(out, "{}", table::render(report, &self.options));
        }
        for note in &self.notes {
            let _ = writeln!(out, "{note}");
        }
        let _ = out.flush();
    }
}

/// Whether to dress what is printed.
pub(super) fn coloured(colour: Colour) -> bool {
    match colour {
        Colour::Always => true,
        Colour::Never => false,
        Colour::Auto => io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    }
}

/// Columns and lines of the terminal; without one, 80 and any number.
pub(super) fn size() -> (usize, usize) {
    terminal_size::terminal_size().map_or((80, usize::MAX), |(w, h)| (w.0.into(), h.0.into()))
}

/// A terminal's second screen, redrawn in place.
#[derive(Default)]
pub(super) struct Terminal {
    entered: bool,
}

impl Terminal {
    /// Shows these lines, as many as there is room for.
    pub(super) fn draw<S: AsRef<str>>(&mut self, lines: &[S], height: usize) -> io::Result<()> {
        let mut frame = String::new();
        if !self.entered {
            // The second screen, without a cursor; a line that is too long for it
            // ends at its edge.
            frame.push_str("\x1b[?1049h\x1b[?25l\x1b[?7l");
            self.entered = true;
        }
        frame.push_str("\x1b[H");
        for (i, line) in lines.iter().take(height).enumerate() {
            let end = if i + 1 == height { "" } else { "\r\n" };
            // Cleared first: behind a line as wide as the screen the cursor is still
            // on its last character.
            let _ = write!(frame, "\x1b[K{}{end}", line.as_ref());
        }
        if lines.len() < height {
            frame.push_str("\x1b[J");
        }
        let mut out = io::stdout().lock();
        out.write_all(frame.as_bytes())?;
        out.flush()
    }

    /// Goes back to the first screen; false when it was never left.
    pub(super) fn leave(&mut self) -> bool {
        if self.entered {
            let mut out = io::stdout().lock();
            let _ = write!(out, "\x1b[?7h\x1b[?25h\x1b[?1049l");
            let _ = out.flush();
        }
        std::mem::take(&mut self.entered)
    }
}
