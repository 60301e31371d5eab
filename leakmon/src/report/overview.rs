//! All processes of a machine in one table.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::json::{SCHEMA_VERSION, line};
use super::text::{shorten, width};
use crate::leak::{Verdict, VerdictKind};
use crate::task::human::{change, count, duration, safe};

/// The narrowest table that can be read.
const LEAST_WIDTH: usize = 79;

/// Columns before the command.
const FIXED: usize = 66;

/// Every process that is watched, at one moment.
#[derive(Clone, Debug)]
pub struct Overview {
    /// Wall clock.
    pub at: SystemTime,
    /// Since the watch began.
    pub elapsed: Duration,
    /// Processes: what grows or blocks first.
    pub rows: Vec<Row>,
    /// Processes of the machine that came and that went since the watch began.
    pub came: u64,
    /// See `came`.
    pub went: u64,
    /// The longest time since a process was read: what costs much to read is
    /// read less often.
    pub oldest_reading: Duration,
}

/// One process.
#[derive(Clone, Debug)]
pub struct Row {
    /// Process id.
    pub pid: u32,
    /// Clock ticks from boot to its start.
    pub start_time: u64,
    /// Its user.
    pub user: Arc<str>,
    /// File name of its executable.
    pub name: String,
    /// Its command line; empty when it has none.
    pub command: String,
    /// Its control group.
    pub cgroup: Option<String>,
    /// Live threads.
    pub threads: u64,
    /// Their change a minute since the process was first seen; `None` at first.
    pub threads_per_minute: Option<f64>,
    /// Its runtimes that are read.
    pub runtimes: Vec<RuntimeRow>,
    /// Why something of it is not read.
    pub not_read: Option<String>,
    /// The strongest verdict on any of its sites.
    pub verdict: Option<Verdict>,
}

/// One runtime of a process.
#[derive(Clone, Debug, Default)]
pub struct RuntimeRow {
    /// `go`.
    pub name: &'static str,
    /// `goroutines`.
    pub tasks: &'static str,
    /// As it prints itself.
    pub version: String,
    /// Live tasks.
    pub live: u64,
    /// Of these, blocked.
    pub blocked: u64,
    /// The longest any has been blocked, at least.
    pub oldest: Option<Duration>,
    /// Change of `live` a minute since it was first read.
    pub per_minute: Option<f64>,
    /// Circles of tasks that wait for each other.
    pub deadlocks: u64,
}

impl Row {
    /// What changes most; `None` while nothing is known of its tasks' change.
    fn per_minute(&self) -> Option<f64> {
        let tasks = || self.runtimes.iter().map(|runtime| runtime.per_minute);
        if !self.runtimes.is_empty() && tasks().all(|change| change.is_none()) {
            return None;
        }
        tasks()
            .flatten()
            .chain(self.threads_per_minute)
            .max_by(|a, b| a.abs().total_cmp(&b.abs()))
    }

    fn deadlocks(&self) -> u64 {
        self.runtimes.iter().map(|runtime| runtime.deadlocks).sum()
    }

    fn blocked(&self) -> u64 {
        self.runtimes.iter().map(|runtime| runtime.blocked).sum()
    }

    fn oldest(&self) -> Option<Duration> {
        self.runtimes
            .iter()
            .filter_map(|runtime| runtime.oldest)
            .max()
    }

    fn live(&self, runtime: &str) -> Option<u64> {
        let mut of_it = self.runtimes.iter().filter(|row| row.name == runtime);
        of_it.next().map(|row| row.live)
    }

    fn is_suspect(&self) -> bool {
        self.verdict.is_some() || self.deadlocks() > 0
    }
}

impl Overview {
    /// Puts first what grows or blocks.
    pub fn new(
        at: SystemTime,
        elapsed: Duration,
        mut rows: Vec<Row>,
        (came, went): (u64, u64),
        oldest_reading: Duration,
    ) -> Overview {
        rows.sort_by_cached_key(|row| {
            let verdict = row.verdict.as_ref().map(|verdict| verdict.kind);
            let growth = row.per_minute().unwrap_or(0.0).max(0.0).round() as u64;
            let live: u64 = row.runtimes.iter().map(|runtime| runtime.live).sum();
            Reverse((
                row.deadlocks() > 0,
                verdict,
                growth,
                row.blocked(),
                live,
                row.threads,
                Reverse(row.pid),
            ))
        });
        Overview {
            at,
            elapsed,
            rows,
            came,
            went,
            oldest_reading,
        }
    }

    /// Live tasks of a runtime, and how many processes have it.
    fn total(&self, runtime: &str) -> (u64, u64) {
        self.rows
            .iter()
            .filter_map(|row| row.live(runtime))
            .fold((0, 0), |(live, processes), more| {
                (live + more, processes + 1)
            })
    }
}

/// How to draw the table.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Columns; fewer than 79 are drawn as 79.
    pub width: usize,
    /// Use colours and weights (ANSI escapes).
    pub colour: bool,
    /// Processes to show; suspects are shown in any case.
    pub top: usize,
}

/// Draws the table.
pub fn render(overview: &Overview, options: &Options) -> String {
    let columns = options.width.max(LEAST_WIDTH);
    let mut out = String::new();
    let styled = |code: &str, text: &str| match options.colour {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text.to_owned(),
    };
    for text in head(overview) {
        for folded in super::table::fold(&text, columns) {
            out.push_str(&folded);
            out.push('\n');
        }
    }
    out.push('\n');
    let heading = format!(
        "{:>8} {:8} {:>10}{:>8}{:>8}{:>8}{:>8}{:>7}  COMMAND",
        "PID", "USER", "GOROUTINES", "TASKS", "THREADS", "+/MIN", "BLOCKED", "OLDEST"
    );
    let heading = format!("{heading:columns$}");
    out.push_str(styled("7", &heading).trim_end());
    out.push('\n');
    let mut hidden = 0;
    for (i, row) in overview.rows.iter().enumerate() {
        if i >= options.top && !row.is_suspect() {
            hidden += 1;
            continue;
        }
        let code = match (row.deadlocks(), row.verdict.as_ref().map(|v| v.kind)) {
            (1.., _) | (_, Some(VerdictKind::RuntimeProven | VerdictKind::Growing)) => Some("1;31"),
            (_, Some(VerdictKind::Stuck)) => Some("1;33"),
            _ => None,
        };
        let text = draw(row, columns);
        out.push_str(&match code {
            Some(code) => styled(code, text.trim_end()),
            None => text.trim_end().to_owned(),
        });
        out.push('\n');
        let mut note = |label: &str, text: &str| {
            let indent = FIXED.min(columns / 3);
            for (n, folded) in super::table::fold(text, columns - indent)
                .iter()
                .enumerate()
            {
                let label = if n == 0 { label } else { "" };
                let label = styled("2", &format!("{label:>0$}  ", indent - 2));
                let _ = writeln!(out, "{}", format!("{label}{folded}").trim_end());
            }
        };
        if let Some(verdict) = &row.verdict {
            let label = match verdict.kind {
                VerdictKind::RuntimeProven => "LEAK",
                VerdictKind::Growing => "LEAK?",
                VerdictKind::Stuck => "STUCK",
            };
            note(label, &safe(&verdict.sentence));
        }
        if row.deadlocks() > 0 {
            note("DEADLOCK", &format!("leakmon --pid {} says more", row.pid));
        }
        if let Some(why) = &row.not_read {
            note("not read", &safe(why));
        }
    }
    if hidden > 0 {
        let _ = writeln!(
            out,
            "… and {} more processes (--top shows more)",
            count(hidden)
        );
    }
    out
}

fn head(overview: &Overview) -> Vec<String> {
    let threads: u64 = overview.rows.iter().map(|row| row.threads).sum();
    let (goroutines, go) = overview.total("go");
    let (tasks, tokio) = overview.total("tokio");
    let of = |number, noun: &str, processes| {
        format!(
            "{} {noun} in {} {}",
            count(number),
            count(processes),
            if processes == 1 {
                "process"
            } else {
                "processes"
            }
        )
    };
    let mut first = format!(
        "{}  {}  {}",
        of(threads, "threads", overview.rows.len() as u64),
        of(goroutines, "goroutines", go),
        of(tasks, "tokio tasks", tokio),
    );
    let seconds = overview.elapsed.as_secs();
    if seconds > 0 {
        let _ = write!(
            first,
            "  watched for {}",
            duration(Duration::from_secs(seconds))
        );
    }
    if overview.came + overview.went > 0 {
        let _ = write!(
            first,
            "  {} came and {} went since",
            count(overview.came),
            count(overview.went)
        );
    }
    if overview.oldest_reading > Duration::from_secs(1) {
        let _ = write!(
            first,
            "  (oldest reading: {})",
            duration(Duration::from_secs(overview.oldest_reading.as_secs()))
        );
    }
    let suspects = overview.rows.iter().filter(|row| row.is_suspect()).count() as u64;
    let mut runtimes = overview.rows.iter().flat_map(|row| &row.runtimes);
    let suspects = match suspects {
        0 if overview.rows.iter().all(|row| row.runtimes.is_empty()) => {
            "no process has goroutines or tokio tasks that could be read".to_owned()
        }
        0 if runtimes.all(|runtime| runtime.per_minute.is_none()) => {
            "not judged yet: one reading cannot tell a leak".to_owned()
        }
        0 => "no process looks like a leak".to_owned(),
        1 => "1 process looks like a leak".to_owned(),
        many => format!("{} processes look like a leak", count(many)),
    };
    vec![first, suspects]
}

fn draw(row: &Row, columns: usize) -> String {
    let dash = || "-".to_owned();
    let of = |runtime| row.live(runtime).map_or_else(dash, count);
    let blocked = match row.runtimes.is_empty() {
        true => dash(),
        false => count(row.blocked()),
    };
    let oldest = row
        .oldest()
        .map(|age| Duration::from_secs(age.as_secs()))
        .filter(|age| !age.is_zero())
        .map_or_else(dash, duration);
    let user = safe(&row.user);
    let before = format!(
        "{:>8} {:8} {:>10}{:>8}{:>8}{:>8}{:>8}{:>7}  ",
        row.pid,
        shorten(&user, 8),
        of("go"),
        of("tokio"),
        count(row.threads),
        row.per_minute().map_or_else(dash, change),
        blocked,
        oldest
    );
    let command = match row.command.trim().is_empty() {
        true => format!("[{}]", row.name),
        false => row.command.clone(),
    };
    let before = match (row.is_suspect(), before.strip_prefix(' ')) {
        (true, Some(rest)) => format!("!{rest}"),
        _ => before,
    };
    let command = safe(&command);
    let room = columns.saturating_sub(width(&before));
    let command: String = match width(&command) <= room {
        true => command.into_owned(),
        false => without_folder(&command)
            .chars()
            .take(room.saturating_sub(1))
            .chain(['…'])
            .collect(),
    };
    format!("{before}{command}")
}

/// A command line without the folder of its program: there many are alike.
fn without_folder(command: &str) -> &str {
    let program = command.find(' ').unwrap_or(command.len());
    let name = command[..program].rfind('/').map_or(0, |slash| slash + 1);
    &command[name..]
}

#[derive(Serialize)]
struct OverviewJson<'a> {
    schema_version: u32,
    time_unix_seconds: f64,
    elapsed_seconds: f64,
    came: u64,
    went: u64,
    oldest_reading_seconds: f64,
    processes: Vec<RowJson<'a>>,
    processes_omitted: u64,
}

#[derive(Serialize)]
struct RowJson<'a> {
    pid: u32,
    start_time_ticks: u64,
    user: &'a str,
    name: &'a str,
    command: &'a str,
    cgroup: Option<&'a str>,
    threads: u64,
    threads_per_minute: Option<f64>,
    runtimes: Vec<RuntimeRowJson<'a>>,
    not_read: Option<&'a str>,
    verdict: Option<VerdictJson<'a>>,
}

#[derive(Serialize)]
struct RuntimeRowJson<'a> {
    name: &'a str,
    version: &'a str,
    live: u64,
    blocked: u64,
    oldest_wait_seconds: Option<f64>,
    change_per_minute: Option<f64>,
    deadlocks: u64,
}

#[derive(Serialize)]
struct VerdictJson<'a> {
    kind: &'static str,
    sentence: &'a str,
}

/// Writes the table as one JSON object and a line feed; `top` leaves out all
/// but so many processes (and the suspects).
///
/// # Errors
/// Of `out`.
pub fn write_json(overview: &Overview, top: usize, out: &mut dyn io::Write) -> io::Result<()> {
    let processes: Vec<RowJson<'_>> = overview
        .rows
        .iter()
        .enumerate()
        .filter(|(i, row)| *i < top || row.is_suspect())
        .map(|(_, row)| RowJson {
            pid: row.pid,
            start_time_ticks: row.start_time,
            user: &row.user,
            name: &row.name,
            command: &row.command,
            cgroup: row.cgroup.as_deref(),
            threads: row.threads,
            threads_per_minute: row.threads_per_minute,
            runtimes: row
                .runtimes
                .iter()
                .map(|runtime| RuntimeRowJson {
                    name: runtime.name,
                    version: &runtime.version,
                    live: runtime.live,
                    blocked: runtime.blocked,
                    oldest_wait_seconds: runtime.oldest.map(|age| age.as_secs_f64()),
                    change_per_minute: runtime.per_minute,
                    deadlocks: runtime.deadlocks,
                })
                .collect(),
            not_read: row.not_read.as_deref(),
            verdict: row.verdict.as_ref().map(|verdict| VerdictJson {
                kind: verdict.kind.name(),
                sentence: &verdict.sentence,
            }),
        })
        .collect();
    let object = OverviewJson {
        schema_version: SCHEMA_VERSION,
        time_unix_seconds: overview
            .at
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0.0, |time| time.as_secs_f64()),
        elapsed_seconds: overview.elapsed.as_secs_f64(),
        came: overview.came,
        went: overview.went,
        oldest_reading_seconds: overview.oldest_reading.as_secs_f64(),
        processes_omitted: (overview.rows.len() - processes.len()) as u64,
        processes,
    };
    line(&object, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pid: u32, live: u64, per_minute: f64) -> Row {
        Row {
            pid,
            start_time: 7,
            user: "www-data".into(),
            name: "server".to_owned(),
            command: format!("/usr/bin/server --port {pid}"),
            cgroup: None,
            threads: 9,
            threads_per_minute: Some(0.0),
            runtimes: vec![RuntimeRow {
                name: "go",
                tasks: "goroutines",
                version: "go1.26.8".to_owned(),
                live,
                blocked: live - 1,
                oldest: Some(Duration::from_secs(90)),
                per_minute: Some(per_minute),
                deadlocks: 0,
            }],
            not_read: None,
            verdict: None,
        }
    }

    fn overview(rows: Vec<Row>) -> Overview {
        let elapsed = Duration::from_secs(65);
        Overview::new(
            SystemTime::UNIX_EPOCH,
            elapsed,
            rows,
            (2, 1),
            Duration::ZERO,
        )
    }

    fn options(width: usize) -> Options {
        Options {
            width,
            colour: false,
            top: 10,
        }
    }

    #[test]
    fn what_grows_or_blocks_comes_first() {
        let mut leaking = row(4, 50, 1.0);
        leaking.verdict = Some(Verdict {
            kind: VerdictKind::Growing,
            sentence: "+1/min for 50s".to_owned(),
            wait: 0,
        });
        let mut plain = row(5, 1, 0.0);
        plain.runtimes.clear();
        plain.command.clear();
        plain.not_read = Some("goroutines: obfuscated".to_owned());
        let overview = overview(vec![plain, row(2, 10, 3.0), row(3, 400, 0.0), leaking]);
        let order: Vec<u32> = overview.rows.iter().map(|row| row.pid).collect();
        assert_eq!(order, [4, 2, 3, 5]);
        let expected = "\
36 threads in 4 processes  460 goroutines in 3 processes  0 tokio tasks in 0
processes  watched for 1m5s  2 came and 1 went since
1 process looks like a leak

     PID USER     GOROUTINES   TASKS THREADS   +/MIN BLOCKED OLDEST  COMMAND
!      4 www-data         50       -       9      +1      49  1m30s  server --p…
                   LEAK?  +1/min for 50s
       2 www-data         10       -       9      +3       9  1m30s  server --p…
       3 www-data        400       -       9       0     399  1m30s  server --p…
       5 www-data          -       -       9       0       -      -  [server]
                not read  goroutines: obfuscated
";
        assert_eq!(render(&overview, &options(80)), expected);
    }

    #[test]
    fn nothing_is_wider_than_the_terminal_or_acts_on_it() {
        let mut evil = row(4_000_000, 4_000_000, 1e9);
        evil.command = "\x1b[2J\r\u{9b}x".repeat(50);
        evil.user = "\x1b]0;x\x07".into();
        evil.not_read = Some("a\tb\u{7f} ".repeat(60));
        let overview = overview(vec![evil]);
        for columns in 0..200 {
            for line in render(&overview, &options(columns)).lines() {
                assert!(width(line) <= columns.max(LEAST_WIDTH), "{columns}: {line}");
                assert!(!line.chars().any(char::is_control), "{line:?}");
            }
        }
    }

    #[test]
    fn where_there_is_no_room_the_folder_goes_first() {
        let mut far = row(7, 5, 0.0);
        far.command = "/srv/a/folder/that/many/have/server --port /1".to_owned();
        let overview = overview(vec![far]);
        let shown = |columns| render(&overview, &options(columns));
        assert!(shown(160).contains(" /srv/a/folder/that/many/have/server --port /1"));
        assert!(shown(80).contains("  server --p…"), "{}", shown(80));
    }

    #[test]
    fn a_leak_is_judged_from_the_second_reading_on() {
        let mut read_once = row(7, 5, 0.0);
        read_once.runtimes[0].per_minute = None;
        let text = render(&overview(vec![read_once]), &options(80));
        assert!(text.contains("not judged yet"), "{text}");
        assert!(text.contains("9       -       4"), "{text}");
        let mut unread = row(7, 5, 0.0);
        unread.runtimes.clear();
        let text = render(&overview(vec![unread]), &options(80));
        assert!(text.contains("no process has goroutines"), "{text}");
        let text = render(&overview(vec![row(7, 5, 0.0)]), &options(80));
        assert!(text.contains("no process looks like a leak"), "{text}");
    }

    #[test]
    fn suspects_are_shown_beyond_the_top() {
        let mut suspect = row(9, 5, 0.0);
        suspect.runtimes[0].deadlocks = 1;
        let overview = overview(vec![row(1, 5, 0.0), suspect]);
        let mut few = options(80);
        few.top = 0;
        let text = render(&overview, &few);
        assert!(
            text.contains("DEADLOCK") && !text.contains("--port 1"),
            "{text}"
        );
        assert!(text.contains("… and 1 more process"), "{text}");
        let mut json = Vec::new();
        write_json(&overview, 0, &mut json).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["processes"][0]["pid"], 9);
        assert_eq!(json["processes_omitted"], 1);
    }
}
