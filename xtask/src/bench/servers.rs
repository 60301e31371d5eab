//! CPU time that a request costs a server that is watched, of that which it costs a copy that is not.
//!
//! The two are asked in turn, for a moment each, by the same client: what else happens on the machine happens to both.
//! So small differences show that are lost in two measurements one after the other.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::sample::Sample;
use super::table::Table;
use super::throughput::WANTED;
use super::watcher::Watcher;
use super::{Bench, Verdict};
use crate::fixtures;
use crate::program::Program;
use crate::progress::note;

/// Who watches, by the table's column: leakmon with these arguments, or nobody.
const WATCHERS: &[(&str, Option<&[&str]>)] = &[
    ("nobody", None),
    ("census", Some(&["--tier", "census"])),
    ("lifecycle", Some(&["--tier", "lifecycle"])),
    ("blocking", Some(&["--tier", "blocking"])),
    ("default (5 %)", Some(&[])),
];

/// How far two copies that nobody watches may differ.
const MOST_NOISE: f64 = 0.02;

/// How long each of the two is asked before it is the other one's turn.
const TURN: Duration = Duration::from_millis(20);

/// How long the two are asked before it counts, for a governor to get to know the one that it watches.
const WARM_UP: Duration = Duration::from_millis(1500);

/// Connections to each server, which ask at once.
const CONNECTIONS: usize = 4;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Measures and adds the table.
pub(super) fn run(bench: &mut Bench<'_>) -> Result<()> {
    let servers: [(&str, PathBuf, &[&str]); 2] = [
        ("axum", fixtures::newest_tokio("axumleak")?, &["/hello"]),
        (
            "Go's HTTP",
            fixtures::one(&bench.go, "heavy")?,
            &["/json", "/template", "/pool", "/fanout"],
        ),
    ];
    let mut columns = vec!["server", "us/request"];
    columns.extend(WATCHERS.iter().map(|(name, _)| *name));
    let mut table = Table::new(&columns);
    for (name, path, requests) in &servers {
        note(*name);
        let mut pair = [
            Server::start(path, requests)?,
            Server::start(path, requests)?,
        ];
        let mut micros = Sample::default();
        let mut kept = vec![Sample::default(); WATCHERS.len()];
        for _ in 0..bench.rounds {
            for (sample, (_, watcher)) in kept.iter_mut().zip(WATCHERS) {
                sample.add(measure(bench, &mut pair, *watcher, &mut micros)?);
            }
        }
        let mut row = vec![(*name).to_owned(), format!("{:.1}", micros.median())];
        row.extend(kept.iter().map(Sample::percent));
        table.add(row);
        let (nobody, governed) = (&kept[0], &kept[kept.len() - 1]);
        let noise = (nobody.min() - 1.0).abs().max((nobody.max() - 1.0).abs());
        let verdict = match noise > MOST_NOISE {
            true => Verdict::Noisy,
            false => (governed.median() >= WANTED).into(),
        };
        bench.report.target(
            &format!("{name} under the default governor, by CPU time"),
            &format!("at least {:.0} %", 100.0 * WANTED),
            governed.percent(),
            verdict,
        );
    }
    bench.report.tables.push((
        "Requests for the same CPU time, of those of a copy beside it that nobody watches (median, least–most of the rounds)",
        table,
    ));
    Ok(())
}

/// What a watched server keeps. Each of the two is watched once, so that a difference between them, of where they lie in
/// memory, shows in neither direction.
fn measure(
    bench: &Bench<'_>,
    pair: &mut [Server; 2],
    watcher: Option<&[&str]>,
    micros: &mut Sample,
) -> Result<f64> {
    let mut product = 1.0;
    for watched in 0..pair.len() {
        let pid = pair[watched].program.pid();
        let watcher = watcher.map(|arguments| Watcher::leakmon(&bench.leakmon, pid, arguments));
        let _watcher = watcher.transpose()?;
        costs(pair, WARM_UP)?;
        let costs = costs(pair, Duration::from_secs(bench.seconds.into()))?;
        let alone = costs[1 - watched];
        micros.add(1e6 * alone);
        product *= alone / costs[watched];
    }
    Ok(product.sqrt())
}

/// Seconds of its CPU time that a request costs each of the two, which are asked in turn.
fn costs(pair: &mut [Server; 2], time: Duration) -> Result<[f64; 2]> {
    let before = [pair[0].cpu_time()?, pair[1].cpu_time()?];
    let mut answered = [0u32; 2];
    let until = Instant::now() + time;
    while Instant::now() < until {
        for (server, answered) in pair.iter_mut().zip(&mut answered) {
            let turn = Instant::now() + TURN;
            while Instant::now() < turn {
                *answered += server.ask()?;
            }
        }
    }
    let after = [pair[0].cpu_time()?, pair[1].cpu_time()?];
    Ok([0, 1].map(|index| {
        let spent = after[index].saturating_sub(before[index]);
        spent.as_secs_f64() / f64::from(answered[index])
    }))
}

/// A server and connections to it.
struct Server {
    program: Program,
    connections: Vec<TcpStream>,
    /// Whole requests, made in this order, and which one is the next.
    requests: Vec<String>,
    next: usize,
}

impl Server {
    fn start(path: &std::path::Path, requests: &[&str]) -> Result<Self> {
        let mut program = Program::start(path, &[])?;
        let address = program.address()?;
        let connect = |_| {
            let connection = TcpStream::connect(&address).context("cannot reach the server")?;
            connection.set_nodelay(true)?;
            connection.set_read_timeout(Some(PATIENCE))?;
            Ok(connection)
        };
        Ok(Self {
            program,
            connections: (0..CONNECTIONS).map(connect).collect::<Result<_>>()?,
            requests: requests
                .iter()
                .map(|path| format!("GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n"))
                .collect(),
            next: 0,
        })
    }

    /// CPU time that all its threads have used.
    fn cpu_time(&self) -> Result<Duration> {
        let clock = clock_getcpuclockid(Pid::from_raw(self.program.pid().cast_signed()))?;
        Ok(clock_gettime(clock)?.into())
    }

    /// Asks over all connections at once; the number of answers.
    fn ask(&mut self) -> Result<u32> {
        let request = &self.requests[self.next];
        self.next = (self.next + 1) % self.requests.len();
        for connection in &mut self.connections {
            connection.write_all(request.as_bytes())?;
        }
        let mut answered = 0;
        for connection in &mut self.connections {
            read_answer(connection)?;
            answered += 1;
        }
        Ok(answered)
    }
}

/// Reads one answer, which must be that all is well.
fn read_answer(connection: &mut TcpStream) -> Result<()> {
    let mut answer = [0; 8192];
    let mut len = 0;
    loop {
        let read = connection.read(&mut answer[len..])?;
        if read == 0 {
            bail!("the server ended a connection, or answers more than is looked for");
        }
        len += read;
        let text = std::str::from_utf8(&answer[..len])?;
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        if !head.starts_with("HTTP/1.1 200") {
            bail!("the server answered: {head}");
        }
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse::<usize>().ok())?
        });
        if body.len() >= length.context("an answer without its length")? {
            return Ok(());
        }
    }
}
