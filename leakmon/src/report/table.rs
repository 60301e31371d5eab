//! The report that people read: a head, then a table of sites.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use super::text::{FileNames, function, shorten, width};
use super::{FlowTotals, Report, Runtime, RuntimeReport, SiteReport, Tasks, TierReason};
use crate::leak::VerdictKind;
use crate::task::human::{change, count, duration, safe, things};
use crate::task::{Cycle, Frame, Scheduler, State};

/// How to draw a report.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Columns of the terminal; fewer than 72 are drawn as 72.
    pub width: usize,
    /// Use colours and weights (ANSI escapes).
    pub colour: bool,
    /// Sites to show, besides suspects, which are shown in any case.
    pub top: usize,
    /// Show the threads of a process that has tasks of another runtime as fully
    /// as these.
    pub all_runtimes: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            width: 80,
            colour: false,
            top: 10,
            all_runtimes: false,
        }
    }
}

/// The narrowest table that can be read.
const LEAST_WIDTH: usize = 72;

/// Column in which the head's values begin.
const HEAD_INDENT: usize = 12;

/// Column in which a site's further lines begin, and their values.
const SITE_INDENT: usize = 11;
const SITE_VALUES: usize = 18;

/// Suspects shown beyond the sites asked for.
const MORE_SUSPECTS: usize = 20;

/// Further waits of a site that are named.
const MORE_WAITS: usize = 2;

#[derive(Clone, Copy)]
enum Style {
    Title,
    Label,
    Suspect,
    Leak,
    Heading,
}

struct Canvas {
    out: String,
    width: usize,
    colour: bool,
}

impl Canvas {
    fn styled<'a>(&self, style: Style, text: &'a str) -> Cow<'a, str> {
        if !self.colour {
            return text.into();
        }
        let code = match style {
            Style::Title => "1",
            Style::Label => "2",
            Style::Suspect => "1;33",
            Style::Leak => "1;31",
            Style::Heading => "7",
        };
        format!("\x1b[{code}m{text}\x1b[0m").into()
    }

    fn line(&mut self, text: &str) {
        self.out.push_str(text.trim_end());
        self.out.push('\n');
    }

    /// A row of the head: parts that are kept whole, on as many lines as they
    /// need.
    fn row(&mut self, label: &str, parts: &[String]) {
        let mut line = format!("{label:HEAD_INDENT$}");
        let label_end = line.len();
        let mut first = true;
        let mut lines = Vec::new();
        for part in parts.iter().filter(|part| !part.is_empty()) {
            if !first && width(&line) + 2 + width(part) > self.width {
                lines.push(std::mem::replace(&mut line, " ".repeat(HEAD_INDENT)));
                first = true;
            }
            if !first {
                line.push_str("  ");
            }
            // A part of its own that is too long is folded at words.
            if first && width(&line) + width(part) > self.width {
                let mut folded = fold(part, self.width - HEAD_INDENT).into_iter();
                if let Some(start) = folded.next() {
                    line.push_str(&start);
                }
                for rest in folded {
                    let next = format!("{:HEAD_INDENT$}{rest}", "");
                    lines.push(std::mem::replace(&mut line, next));
                }
            } else {
                line.push_str(part);
            }
            first = false;
        }
        lines.push(line);
        for (i, line) in lines.iter().enumerate() {
            if i == 0 && label_end <= line.len() {
                let (label, rest) = line.split_at(label_end);
                let text = format!("{}{rest}", self.styled(Style::Label, label));
                self.line(&text);
            } else {
                self.line(line);
            }
        }
    }

    /// A further line of a site: what, and then `function  file:line`.
    fn place(&mut self, label: &str, before: &str, frame: &Frame, files: &str) {
        let name = function(&frame.function);
        let room = self.width.saturating_sub(SITE_VALUES + width(before));
        // The line number must be seen: of both, it is the function that gives way first.
        let file = shorten(files, room / 2 + room / 10);
        let name = shorten(&name, room.saturating_sub(width(&file) + 2));
        let label = format!("{:SITE_INDENT$}{label:1$}", "", SITE_VALUES - SITE_INDENT);
        let text = format!(
            "{}{before}{name}  {file}",
            self.styled(Style::Label, &label)
        );
        self.line(&text);
    }

    /// A further line of a site in plain words.
    fn words(&mut self, label: &str, style: Style, text: &str) {
        let lines = fold(text, self.width.saturating_sub(SITE_VALUES));
        for (i, line) in lines.iter().enumerate() {
            let label = if i == 0 { label } else { "" };
            let label = format!("{:SITE_INDENT$}{label:1$}", "", SITE_VALUES - SITE_INDENT);
            let text = match style {
                Style::Label => format!("{}{line}", self.styled(style, &label)),
                _ => format!("{}{}", self.styled(style, &label), self.styled(style, line)),
            };
            self.line(&text);
        }
    }
}

/// Breaks text into lines at spaces, and words that are too long anywhere.
pub(super) fn fold(text: &str, max: usize) -> Vec<String> {
    let max = max.max(1);
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.is_empty() && width(&line) + 1 + width(word) > max {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        for c in word.chars() {
            if width(&line) == max {
                lines.push(std::mem::take(&mut line));
            }
            line.push(c);
        }
    }
    lines.push(line);
    lines
}

/// Draws a report.
pub fn render(report: &Report, options: &Options) -> String {
    let mut canvas = Canvas {
        out: String::new(),
        width: options.width.max(LEAST_WIDTH),
        colour: options.colour,
    };
    title(&mut canvas, report);
    let mut others = false;
    let mut drawn = false;
    for RuntimeReport { runtime, tasks } in &report.runtimes {
        match tasks {
            Err(reason) => {
                let text = format!("not read: {}", safe(reason));
                canvas.row(runtime.tasks, &[text]);
            }
            // What a runtime's own threads do is seldom of interest.
            Ok(tasks) if others && runtime.name == "threads" && !options.all_runtimes => {
                if tasks.is_suspicious() {
                    section(&mut canvas, runtime, tasks, options.top, drawn);
                } else {
                    canvas.row(runtime.tasks, &states(tasks));
                }
            }
            Ok(tasks) => {
                section(&mut canvas, runtime, tasks, options.top, drawn);
                others = true;
                drawn = true;
            }
        }
    }
    canvas.out
}

/// One runtime: a head and a table of sites.
fn section(canvas: &mut Canvas, runtime: &Runtime, tasks: &Tasks, top: usize, further: bool) {
    if further {
        canvas.line("");
    }
    head(canvas, runtime, tasks);
    sites(canvas, tasks, top);
}

fn title(canvas: &mut Canvas, report: &Report) {
    let process = &report.process;
    let name = process.executable.file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    let name = safe(&name);
    let mut rest = format!("  pid {}", process.pid);
    for RuntimeReport { runtime, tasks } in &report.runtimes {
        if tasks.is_ok() && !runtime.version.is_empty() {
            let _ = write!(rest, "  {}", safe(&runtime.version));
        }
    }
    let _ = write!(
        rest,
        "  {}  watched for {}",
        things(report.threads, "thread"),
        duration(whole_seconds(report.when.elapsed)),
    );
    let name = shorten(&name, canvas.width.saturating_sub(width(&rest)).max(8)).into_owned();
    let text = format!("{}{rest}", canvas.styled(Style::Title, &name));
    canvas.line(&text);
    let command = process.command.join(" ");
    let command = safe(&command);
    if !command.trim().is_empty() {
        let command = cut(&command, canvas.width - HEAD_INDENT);
        canvas.row("command", &[command]);
    }
}

/// Cuts the end off.
fn cut(text: &str, max: usize) -> String {
    if width(text) <= max {
        return text.to_owned();
    }
    text.chars()
        .take(max.saturating_sub(1))
        .chain(['…'])
        .collect()
}

fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs())
}

fn percent(percent: f64) -> String {
    if percent > 0.0 && percent < 0.05 {
        "<0.1%".to_owned()
    } else if percent < 10.0 {
        format!("{percent:.1}%")
    } else {
        format!("{percent:.0}%")
    }
}

fn rate(rate: f64) -> String {
    if rate >= 100.0 {
        count(rate.round() as u64)
    } else {
        format!("{rate:.1}")
    }
}

/// The live tasks, in all and by state.
fn states(tasks: &Tasks) -> Vec<String> {
    let mut states = vec![count(tasks.count)];
    let mut by_count: Vec<(State, u64)> = tasks.states.iter().map(|(s, n)| (*s, *n)).collect();
    by_count.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    for (state, number) in by_count {
        states.push(format!("{} {}", count(number), state.name()));
    }
    if tasks.system > 0 {
        states.push(format!(
            "(and {} of the runtime's own)",
            count(tasks.system)
        ));
    }
    if tasks.unstable > 0 {
        states.push(format!("({} changed while read)", count(tasks.unstable)));
    }
    states
}

/// How many there are, and the tasks of those that have the most.
fn schedulers(schedulers: &[Scheduler]) -> Vec<String> {
    /// Those that are named.
    const MOST: usize = 8;
    let mut most: Vec<&Scheduler> = schedulers.iter().collect();
    most.sort_by_key(|scheduler| (std::cmp::Reverse(scheduler.live), scheduler.id));
    let mut parts = vec![count(schedulers.len() as u64)];
    for scheduler in most.iter().take(MOST) {
        parts.push(format!(
            "{} in number {}",
            count(scheduler.live),
            scheduler.id
        ));
    }
    if most.len() > MOST {
        let rest: u64 = most[MOST..].iter().map(|scheduler| scheduler.live).sum();
        parts.push(format!("{} in the others", count(rest)));
    }
    parts
}

fn head(canvas: &mut Canvas, runtime: &Runtime, tasks: &Tasks) {
    let mut tier = vec![tasks.tier.name().to_owned()];
    match &tasks.flow {
        Some(flow) => {
            let budget = match (&tasks.tier_reason, flow.overhead.budget_percent) {
                (_, Some(budget)) => format!(" (allowed: {})", percent(budget)),
                (_, None) => String::new(),
            };
            let overhead = &flow.overhead;
            // A process that hardly runs uses less than probes may always cost.
            tier.push(match overhead.budget_percent {
                Some(budget) if overhead.percent > budget && overhead.core_percent < 0.75 => {
                    format!(
                        "costs the target {} of a core (0.5% is always allowed)",
                        percent(overhead.core_percent)
                    )
                }
                _ => format!(
                    "costs the target {} of its CPU{budget}",
                    percent(overhead.percent)
                ),
            });
            if flow.sampled() {
                tier.push(format!(
                    "sampled: attached {} of the time",
                    percent(flow.overhead.attached * 100.0)
                ));
            }
        }
        None => tier.push("costs the target nothing".to_owned()),
    }
    match &tasks.tier_reason {
        TierReason::Pending => tier.push("nothing is attached yet".to_owned()),
        TierReason::Once => tier.push("a single one, as asked for".to_owned()),
        TierReason::Fixed => tier.push("as asked for".to_owned()),
        TierReason::Governed => {}
        TierReason::SteppedDown => tier.push("stepped down to stay within the budget".to_owned()),
        TierReason::OthersPay => tier.push(
            "no higher tier while the machine's threads switch so often that programs which \
             nobody watches would pay for it"
                .to_owned(),
        ),
        TierReason::Unavailable(reason) => tier.push(format!("no higher tier: {}", safe(reason))),
    }
    canvas.row("tier", &tier);

    canvas.row(runtime.tasks, &states(tasks));
    if tasks.schedulers.len() > 1 {
        canvas.row("schedulers", &schedulers(&tasks.schedulers));
    }

    if let Some(flow) = &tasks.flow {
        flow_rows(canvas, flow);
    }
    if tasks.untracked_waits > 0 {
        canvas.row(
            "dropped",
            &[format!(
                "{} more than can be followed",
                things(tasks.untracked_waits, "wait")
            )],
        );
    }
    if tasks.untold > 0 {
        canvas.row(
            "dropped",
            &[format!(
                "places of {} {}: too many different stacks",
                count(tasks.untold),
                runtime.tasks
            )],
        );
    }
    for cycle in &tasks.cycles {
        deadlock(canvas, runtime, cycle);
    }
    for warning in &tasks.warnings {
        canvas.row("warning", &[safe(warning).into_owned()]);
    }
    let suspects = tasks.suspects().count() as u64;
    if suspects > 0 {
        let text = format!(
            "{} of {} {} like a leak",
            count(suspects),
            things(tasks.sites.len() as u64, "site"),
            if suspects == 1 { "looks" } else { "look" }
        );
        canvas.row("suspects", &[text]);
    } else {
        let sites = things(tasks.sites.len() as u64, "site");
        let text = match tasks.judged {
            true => format!("none of {sites}"),
            false => format!("not judged yet: {sites}, seen only once"),
        };
        canvas.row("suspects", &[text]);
    }
}

/// Who waits for whom.
fn deadlock(canvas: &mut Canvas, runtime: &Runtime, cycle: &Cycle) {
    let members = &cycle.members;
    let mut parts = vec![format!(
        "{} {} wait for each other{}",
        count(members.len() as u64),
        runtime.tasks,
        match &cycle.doubt {
            Some(doubt) => format!(" (not proven: {})", safe(doubt)),
            None => String::new(),
        }
    )];
    for (i, member) in members.iter().enumerate() {
        let holder = members[(i + 1) % members.len()].task;
        let name = member.name.as_deref().map(safe).unwrap_or_default();
        let at = match &member.place {
            Some(frame) if frame.file.is_empty() => {
                format!(" in {}", function(&frame.function))
            }
            Some(frame) => format!(
                " in {} at {}",
                function(&frame.function),
                super::text::file_line(frame)
            ),
            None => String::new(),
        };
        let name = match name.is_empty() {
            true => String::new(),
            false => format!(" ({name})"),
        };
        let hold = match cycle.doubt {
            Some(_) => "it seems that",
            None => "which",
        };
        let what = match member.lock {
            Some(lock) => format!("lock {lock:#x}, {hold} {holder} holds"),
            None => format!("{holder} to end"),
        };
        parts.push(format!("{}{name} waits{at} for {what}", member.task));
    }
    for (i, part) in parts.iter().enumerate() {
        canvas.row(
            if i == 0 { "deadlock" } else { "" },
            std::slice::from_ref(part),
        );
    }
}

fn flow_rows(canvas: &mut Canvas, flow: &FlowTotals) {
    let about = if flow.coverage.spawns < 1.0 {
        "about "
    } else {
        ""
    };
    canvas.row(
        "flow",
        &[
            format!("{about}{}/s spawned", rate(flow.rates.spawned_per_second)),
            format!("{about}{}/s ended", rate(flow.rates.exited_per_second)),
            format!(
                "({} and {} {})",
                count(flow.spawned),
                count(flow.exited),
                if flow.coverage.all_spawns {
                    "in all"
                } else {
                    "counted"
                }
            ),
        ],
    );
    if let Some(held) = flow.reconciliation {
        let size = held.difference.unsigned_abs();
        let text = if size == 0 {
            "and probes agree".to_owned()
        } else if size <= held.uncertainty {
            format!(
                "and probes agree (difference {}, within ±{} spawned or ended meanwhile)",
                change(held.difference as f64),
                count(held.uncertainty)
            )
        } else {
            format!(
                "and probes DISAGREE by {} (±{})",
                change(held.difference as f64),
                count(held.uncertainty)
            )
        };
        canvas.row("census", &[text]);
    }
    if !flow.dropped.is_empty() {
        let dropped: Vec<String> = flow
            .dropped
            .iter()
            .map(|(why, number)| format!("{}: {why}", things(*number, "hit")))
            .collect();
        canvas.row("dropped", &dropped);
    }
}

fn sites(canvas: &mut Canvas, tasks: &Tasks, top: usize) {
    let shown: Vec<&SiteReport> = tasks
        .sites
        .iter()
        .enumerate()
        .filter(|(i, site)| *i < top || site.verdict.is_some())
        .map(|(_, site)| site)
        .take(top.saturating_add(MORE_SUSPECTS))
        .collect();
    let files = FileNames::new(shown.iter().flat_map(|site| {
        let state = &site.state;
        let waits = state.waits.iter().filter_map(|wait| wait.place.as_ref());
        waits
            .chain(&state.site.created_by)
            .chain(&state.site.entry)
            .map(|frame| &*frame.file)
    }));
    canvas.line("");
    let heading = format!(
        "{:>9}{:>9}{:>10}{:>9}{:>8}{:>8}  WAITS FOR",
        "LIVE", "+/MIN", "BLOCKED", "OLDEST", "P50", "P99"
    );
    let heading = format!("{heading:0$}", canvas.width);
    let text = canvas.styled(Style::Heading, &heading).into_owned();
    canvas.line(&text);
    let flow = tasks.flow.as_ref();
    let all_waits = flow.is_none_or(|flow| flow.coverage.all_waits);
    for site in &shown {
        draw(canvas, site, &files, all_waits);
    }
    let hidden = tasks.sites.len() - shown.len();
    if hidden > 0 {
        let live: u64 = tasks.sites.iter().map(|site| site.state.live).sum();
        let seen: u64 = shown.iter().map(|site| site.state.live).sum();
        let text = format!(
            "… and {} in {} (--top shows more)",
            count(live.saturating_sub(seen)),
            things(hidden as u64, "more site")
        );
        canvas.line(&text);
    }
}

fn draw(canvas: &mut Canvas, site: &SiteReport, files: &FileNames<'_>, all_waits: bool) {
    let state = &site.state;
    let main = site.verdict.as_ref().map_or(0, |verdict| verdict.wait);
    let wait = state.waits.get(main);
    let dash = || "-".to_owned();
    let quantile = |q| {
        wait.and_then(|wait| wait.durations.as_ref()?.quantile(q))
            .map_or_else(dash, |time| {
                let about = if all_waits { "" } else { "~" };
                format!("{about}{}", duration(time))
            })
    };
    let reason = match wait {
        Some(wait) => safe(&wait.reason),
        None => match state.states.iter().max_by_key(|(_, number)| **number) {
            Some((state, _)) => format!("({})", state.name()).into(),
            None => "(all ended)".into(),
        },
    };
    let row = format!(
        "{:>9}{:>9}{:>10}{:>9}{:>8}{:>8}  ",
        count(state.live),
        site.per_minute.map_or_else(dash, change),
        count(state.blocked),
        state
            .oldest
            .map(whole_seconds)
            .filter(|age| !age.is_zero())
            .map_or_else(dash, duration),
        quantile(0.5),
        quantile(0.99),
    );
    let reason = shorten(&reason, canvas.width.saturating_sub(width(&row)));
    let row = format!("{row}{reason}");
    let row = match &site.verdict {
        Some(verdict) => {
            let style = style(verdict.kind);
            let marked = match row.strip_prefix(' ') {
                Some(rest) => format!("!{rest}"),
                None => row,
            };
            canvas.styled(style, &marked).into_owned()
        }
        None => canvas.styled(Style::Title, &row).into_owned(),
    };
    canvas.line(&row);

    let place = wait.and_then(|wait| wait.place.as_ref());
    match (&state.site.created_by, &state.site.entry) {
        (Some(frame), _) => canvas.place("spawn", "", frame, &files.place(frame)),
        // Nobody saw who spawned it: what it runs is the best name.
        (None, Some(frame)) => canvas.place("runs", "", frame, &files.place(frame)),
        (None, None) => {}
    }
    match (place, &state.site.created_by, &state.site.entry) {
        (Some(frame), ..) => canvas.place("wait", "", frame, &files.place(frame)),
        (None, Some(_), Some(frame)) => canvas.place("runs", "", frame, &files.place(frame)),
        _ => {}
    }
    if let Some(doubt) = &state.site.doubt {
        canvas.words("", Style::Label, &safe(doubt));
    }
    if let Some(runs) = &state.runs {
        let mean = Duration::from_nanos(runs.busy_ns / runs.count.max(1));
        let text = format!(
            "{} times, {} each, the longest {}",
            count(runs.count),
            duration(mean),
            duration(Duration::from_nanos(runs.longest_ns))
        );
        if runs.count > 0 {
            canvas.words("ran", Style::Label, &text);
        }
    }
    if state.live == 0 && (state.spawned, state.exited) != (None, None) {
        let text = format!(
            "{} spawned, {} ended",
            count(state.spawned.unwrap_or(0)),
            count(state.exited.unwrap_or(0))
        );
        canvas.words("flow", Style::Label, &text);
    }
    let mut more = state
        .waits
        .iter()
        .enumerate()
        .filter(|(i, wait)| *i != main && wait.count > 0)
        .map(|(_, wait)| wait);
    for wait in more.by_ref().take(MORE_WAITS) {
        let reason = safe(&wait.reason);
        let reason = shorten(&reason, canvas.width / 3);
        let before = format!("{} in {reason}  ", count(wait.count));
        match &wait.place {
            Some(frame) => canvas.place("also", &before, frame, &files.place(frame)),
            None => canvas.words("also", Style::Label, &before),
        }
    }
    let (waits, tasks) = more.fold((0, 0), |(waits, tasks), wait| {
        (waits + 1, tasks + wait.count)
    });
    if waits > 0 {
        let text = format!("{} in {}", count(tasks), things(waits, "more wait"));
        canvas.words("", Style::Label, &text);
    }
    if let Some(verdict) = &site.verdict {
        let label = match verdict.kind {
            VerdictKind::RuntimeProven => "LEAK",
            VerdictKind::Growing => "LEAK?",
            VerdictKind::Stuck => "STUCK",
        };
        canvas.words(label, style(verdict.kind), &safe(&verdict.sentence));
    }
}

fn style(kind: VerdictKind) -> Style {
    match kind {
        VerdictKind::Stuck => Style::Suspect,
        VerdictKind::Growing | VerdictKind::RuntimeProven => Style::Leak,
    }
}

#[cfg(test)]
pub(crate) mod tests;
