//! What tasks wait for, in tokio's words.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use crate::task::{WaitClass, WaitKind};

use super::cells::Cell;
use super::layout::{Version, state};
use super::uses::Uses;
use super::wakers::{Found, Holder, Notify, Timer};

/// What stands for a holder of the task's waker that is not known.
const UNKNOWN: &str = "?";

/// Different words that are told apart in one process.
const MAX_WORDS: usize = 4096;

/// Judges what a task waits for: `a|b` for both at once, `a or b` for one of them.
pub fn classify(reason: &str) -> WaitKind {
    let mut kinds = reason
        .split('|')
        .flat_map(|both| both.split(" or "))
        .map(one);
    let first = kinds.next().unwrap_or_default();
    let rest: Vec<WaitKind> = kinds.collect();
    let silent = |kind: &WaitKind| kind.class == WaitClass::Silent;
    if silent(&first) || rest.iter().any(silent) {
        // What the clock or a socket ends says nothing.
        return WaitKind::default();
    }
    if rest.iter().all(|kind| *kind == first) {
        return first;
    }
    // As in a select: whatever comes first ends it.
    WaitKind {
        class: WaitClass::Idle,
        missing: Some("none of these came"),
    }
}

/// Judges one word.
fn one(reason: &str) -> WaitKind {
    let (class, missing) = match reason {
        "mpsc send" => (WaitClass::Hanging, "nobody received"),
        "mutex" | "rwlock read" | "rwlock write" => (WaitClass::Lock, "nobody unlocked"),
        "mpsc recv" | "broadcast recv" => (WaitClass::Idle, "nobody sent or closed"),
        "oneshot recv" => (WaitClass::Idle, "nobody sent, and the sender is held"),
        "mpsc closed" | "oneshot closed" | "watch closed" | "broadcast closed" => {
            (WaitClass::Idle, "nobody closed")
        }
        "watch changed" => (WaitClass::Idle, "nobody changed the value"),
        "notify" => (WaitClass::Idle, "nobody notified"),
        "semaphore" => (WaitClass::Idle, "nobody released"),
        "barrier" => (WaitClass::Idle, "too few arrived"),
        "once cell" | "set once" => (WaitClass::Idle, "nobody initialised it"),
        "join" | "join set" => (WaitClass::Idle, "it did not end"),
        "pending" => (WaitClass::Idle, "nothing can wake it"),
        // Nobody can tell what for.
        "waiting" | UNKNOWN => {
            return WaitKind {
                class: WaitClass::Idle,
                missing: None,
            };
        }
        _ => return WaitKind::default(),
    };
    WaitKind {
        class,
        missing: Some(missing),
    }
}

/// What a task waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    /// In words; `None` when nothing is known.
    pub(super) words: Option<String>,
    /// The header of the task whose end it waits for, if for nothing else.
    pub(super) on: u64,
}

/// The wakers that an idle task has, by its references: its list has one, its
/// JoinHandle another. An AbortHandle counts as a waker that is not found.
pub(super) fn wakers(cell: &Cell) -> u64 {
    let references = cell.state / state::REFERENCE;
    references.saturating_sub(1 + u64::from(cell.is(state::JOIN_INTEREST)))
}

/// What a task waits for of which these wakers were `found`.
pub(super) fn waiting(
    cell: &Cell,
    found: &[Found],
    version: Option<Version>,
    uses: impl Fn() -> Uses,
    sockets: &mut Sockets,
) -> Waiting {
    let expected = wakers(cell);
    if expected == 0 {
        // Nobody can wake it.
        return Waiting {
            words: Some("pending".to_owned()),
            on: 0,
        };
    }
    let mut parts = BTreeSet::new();
    let mut told = 0;
    let mut on = 0;
    for found in found {
        let Some(holder) = found.holder else {
            continue;
        };
        if let Holder::Join(header) = holder {
            on = header;
        }
        if let Some(words) = words(holder, version, &uses, sockets) {
            told += 1;
            parts.insert(words);
        }
    }
    // More than there are: some of it is not what it looks like.
    if told > expected || told == 0 {
        return Waiting::default();
    }
    let mut words: Vec<String> = parts.into_iter().collect();
    if told < expected {
        words.push(UNKNOWN.to_owned());
    }
    // Of two that it waits for either may end.
    let alone = (expected, told) == (1, 1) && words == ["join"];
    Waiting {
        on: if alone { on } else { 0 },
        words: Some(words.join("|")),
    }
}

/// What a waker's holder stands for; what it may stand for, where the code
/// leaves several.
fn words(
    holder: Holder,
    version: Option<Version>,
    uses: &impl Fn() -> Uses,
    sockets: &mut Sockets,
) -> Option<String> {
    let of = |candidates: &[(Uses, &'static str)]| {
        let uses = uses();
        let possible = candidates.iter().filter(|(by, _)| uses.any(*by));
        let possible: Vec<&str> = possible.map(|(_, words)| *words).collect();
        (!possible.is_empty()).then(|| possible.join(" or "))
    };
    let but = |excluded, uses| if excluded { Uses::NONE } else { uses };
    let minor = version.map(|version| version.minor);
    // One list for all receivers.
    let small_watch = minor.is_none_or(|minor| minor < 26);
    let broadcast_closes = minor.is_none_or(|minor| minor >= 44);
    match holder {
        Holder::Join(_) => Some("join".to_owned()),
        Holder::Acquire { sender: true, .. } => of(&[(Uses::MPSC, "mpsc send")]),
        Holder::Acquire { write: true, .. } => of(&[(Uses::RWLOCK, "rwlock write")]),
        Holder::Acquire { alone, .. } => of(&[
            (Uses::MUTEX, "mutex"),
            (Uses::RWLOCK, "rwlock read"),
            (Uses::ONCE_CELL, "once cell"),
            (Uses::SEMAPHORE, "semaphore"),
            (but(alone, Uses::MPSC), "mpsc send"),
        ]),
        Holder::Notified(Notify::Chan) => of(&[(Uses::MPSC, "mpsc closed")]),
        Holder::Notified(Notify::Barrier) => of(&[(Uses::BARRIER, "barrier")]),
        Holder::Notified(Notify::Watch { closed }) => {
            let receiver = closed != Some(true);
            of(&[
                (but(!receiver, Uses::WATCH), "watch changed"),
                (but(!receiver, Uses::BARRIER), "barrier"),
                (
                    but(closed == Some(false), Uses::WATCH_CLOSED),
                    "watch closed",
                ),
            ])
        }
        Holder::Notified(Notify::Plain { alone }) => of(&[
            (Uses::NOTIFY, "notify"),
            (but(alone, Uses::MPSC), "mpsc closed"),
            (but(!small_watch, Uses::BARRIER), "barrier"),
            (but(!small_watch, Uses::WATCH), "watch changed"),
            (Uses::WATCH_CLOSED, "watch closed"),
            (but(!broadcast_closes, Uses::BROADCAST), "broadcast closed"),
            (Uses::SET_ONCE, "set once"),
        ]),
        Holder::Broadcast => of(&[(Uses::BROADCAST, "broadcast recv")]),
        Holder::Sleep(_) if !uses().any(Uses::SLEEP.and(Uses::INTERVAL)) => None,
        Holder::Sleep(Timer::Own) => Some("sleep".to_owned()),
        Holder::Sleep(Timer::Boxed) => Some(match uses().any(Uses::INTERVAL) {
            true => "interval or sleep".to_owned(),
            false => "sleep".to_owned(),
        }),
        Holder::Sleep(Timer::Periodic) => Some(match uses().any(Uses::INTERVAL) {
            true => "interval".to_owned(),
            false => "sleep".to_owned(),
        }),
        Holder::Io { fds, write } => Some(sockets.words(fds, write).to_owned()),
        Holder::Mpsc => Some("mpsc recv".to_owned()),
        Holder::Oneshot { recv, closed } => of(&[(
            Uses::ONESHOT,
            match (recv, closed) {
                (true, false) => "oneshot recv",
                (false, true) => "oneshot closed",
                _ => "oneshot recv or oneshot closed",
            },
        )]),
        Holder::JoinSet => of(&[(Uses::JOIN_SET, "join set")]),
    }
}

/// Words that were met in one process, by numbers from 1.
#[derive(Debug, Default)]
pub(super) struct Words {
    numbers: FxHashMap<Arc<str>, u16>,
    words: Vec<Arc<str>>,
}

impl Words {
    /// The number of `words`; 0 when there are too many.
    pub(super) fn number(&mut self, words: &str) -> u16 {
        if let Some(number) = self.numbers.get(words) {
            return *number;
        }
        if self.words.len() >= MAX_WORDS {
            return 0;
        }
        let words: Arc<str> = words.into();
        self.words.push(Arc::clone(&words));
        let number = self.words.len() as u16;
        self.numbers.insert(words, number);
        number
    }

    /// The words with this number.
    pub(super) fn get(&self, number: u16) -> Option<Arc<str>> {
        self.words.get(usize::from(number).checked_sub(1)?).cloned()
    }
}

/// What is known of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Socket {
    TcpListener,
    TcpConnecting,
    Tcp,
    Udp,
    UnixListener,
    UnixStream,
    UnixDatagram,
}

/// The sockets of a network namespace, by their inodes.
#[derive(Debug)]
struct Table {
    /// The namespace's own inode.
    namespace: u64,
    read_at: Instant,
    /// How long that took.
    took: Duration,
    sockets: FxHashMap<u64, Socket>,
}

impl Table {
    /// Whether it still says what is: a machine has many processes, and a table
    /// with 100,000 sockets takes the kernel 0.1 s.
    fn is_fresh(&self) -> bool {
        self.read_at.elapsed() < (20 * self.took).max(Duration::from_secs(1))
    }
}

/// The latest table of each namespace. All processes in one have the same.
static TABLES: Mutex<Vec<Arc<Table>>> = Mutex::new(Vec::new());

/// The table of the namespace of process `pid`, one that was read after `since`
/// or is fresh otherwise; `None` when the process is gone.
fn table(pid: u32, since: Option<Instant>) -> Option<Arc<Table>> {
    let namespace = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino();
    // A panic leaves the list as it was. The lock is held while a table is read:
    // nobody else is to read the same meanwhile.
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let known = tables.iter().find(|table| table.namespace == namespace);
    if let Some(known) = known
        && known.is_fresh()
        && since.is_none_or(|since| known.read_at >= since)
    {
        return Some(Arc::clone(known));
    }
    let read_at = Instant::now();
    let sockets = read_sockets(pid);
    let table = Arc::new(Table {
        namespace,
        read_at,
        took: read_at.elapsed(),
        sockets,
    });
    tables.retain(|table| table.is_fresh() && table.namespace != namespace);
    tables.push(Arc::clone(&table));
    Some(table)
}

/// The sockets of a process, as `/proc` shows them when one is first asked for.
#[derive(Debug)]
pub(super) struct Sockets {
    pid: u32,
    began: Instant,
    table: Option<Arc<Table>>,
}

impl Sockets {
    /// Of process `pid`.
    pub(super) fn new(pid: u32) -> Sockets {
        Sockets {
            pid,
            began: Instant::now(),
            table: None,
        }
    }

    /// What a task waits for that waits until one of `fds` is ready to `write`,
    /// or to read.
    fn words(&mut self, fds: [u32; 4], write: Option<bool>) -> &'static str {
        for fds in fds.chunks(2) {
            let mut sockets = fds.iter().filter_map(|fd| self.socket(*fd));
            if let Some(first) = sockets.next() {
                let one = sockets.all(|other| other == first);
                return words_of(one.then_some(first), write);
            }
        }
        words_of(None, write)
    }

    fn socket(&mut self, fd: u32) -> Option<Socket> {
        let link = fs::read_link(format!("/proc/{}/fd/{fd}", self.pid)).ok()?;
        let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        let inode: u64 = inode.parse().ok()?;
        if self.table.is_none() {
            self.table = table(self.pid, None);
        }
        let known = self.table.as_ref()?;
        if let Some(socket) = known.sockets.get(&inode) {
            return Some(*socket);
        }
        // It may be newer than a table that was read for another process.
        if known.read_at < self.began {
            self.table = table(self.pid, Some(self.began));
        }
        self.table.as_ref()?.sockets.get(&inode).copied()
    }
}

fn words_of(socket: Option<Socket>, write: Option<bool>) -> &'static str {
    match (socket, write) {
        (Some(Socket::TcpListener), Some(false)) => "tcp accept",
        (Some(Socket::TcpConnecting), Some(true)) => "tcp connect",
        (Some(Socket::Tcp), Some(false)) => "tcp read",
        (Some(Socket::Tcp), Some(true)) => "tcp write",
        (Some(Socket::Udp), Some(false)) => "udp recv",
        (Some(Socket::Udp), Some(true)) => "udp send",
        (Some(Socket::UnixListener), Some(false)) => "unix accept",
        (Some(Socket::UnixStream), Some(false)) => "unix read",
        (Some(Socket::UnixStream), Some(true)) => "unix write",
        (Some(Socket::UnixDatagram), Some(false)) => "unix recv",
        (Some(Socket::UnixDatagram), Some(true)) => "unix send",
        (_, Some(false)) => "io read",
        (_, Some(true)) => "io write",
        (_, None) => "io",
    }
}

fn read_sockets(pid: u32) -> FxHashMap<u64, Socket> {
    /// Bytes of one of the tables that are read: 400,000 sockets.
    const MOST: u64 = 64 << 20;
    let mut sockets = FxHashMap::default();
    for table in ["tcp", "tcp6", "udp", "udp6", "unix"] {
        let mut text = String::new();
        let opened = fs::File::open(format!("/proc/{pid}/net/{table}"));
        if opened.is_ok_and(|file| file.take(MOST).read_to_string(&mut text).is_ok()) {
            sockets.extend(text.lines().skip(1).filter_map(|line| socket(table, line)));
        }
    }
    sockets
}

/// A line of one of the tables in `/proc/PID/net`: Documentation/networking/
/// proc_net_tcp.rst; net/unix/af_unix.c, unix_seq_show.
fn socket(table: &str, line: &str) -> Option<(u64, Socket)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let inode = match table {
        "unix" => fields.get(6)?,
        _ => fields.get(9)?,
    };
    let socket = match table {
        // include/net/tcp_states.h: TCP_SYN_SENT 2, TCP_LISTEN 10.
        "tcp" | "tcp6" => match *fields.get(3)? {
            "0A" => Socket::TcpListener,
            "02" => Socket::TcpConnecting,
            _ => Socket::Tcp,
        },
        "udp" | "udp6" => Socket::Udp,
        // __SO_ACCEPTCON; SOCK_DGRAM.
        _ => match (*fields.get(3)?, *fields.get(4)?) {
            ("00010000", _) => Socket::UnixListener,
            (_, "0002") => Socket::UnixDatagram,
            _ => Socket::UnixStream,
        },
    };
    Some((inode.parse().ok()?, socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_let_one_conclude() {
        for (reason, class) in [
            ("mpsc send", WaitClass::Hanging),
            ("mutex", WaitClass::Lock),
            ("rwlock read or mutex", WaitClass::Lock),
            ("oneshot recv", WaitClass::Idle),
            ("waiting", WaitClass::Idle),
            ("?", WaitClass::Idle),
            ("pending", WaitClass::Idle),
            ("mpsc recv|notify", WaitClass::Idle),
            ("mpsc send|notify", WaitClass::Idle),
            ("mutex or semaphore", WaitClass::Idle),
            ("sleep", WaitClass::Silent),
            ("mpsc recv|sleep", WaitClass::Silent),
            ("interval or sleep", WaitClass::Silent),
            ("tcp read", WaitClass::Silent),
            ("io read|?", WaitClass::Silent),
            ("idle", WaitClass::Silent),
            ("", WaitClass::Silent),
        ] {
            assert_eq!(classify(reason).class, class, "{reason}");
        }
    }

    #[test]
    fn a_task_that_waits_for_two_ends_waits_for_none_alone() {
        let cell = |wakers: u64| Cell {
            addr: 0x1000,
            vtable: 0,
            state: (wakers + 1) * state::REFERENCE,
            owner: 1,
            id: 1,
            scheduler: 0x2000,
            prev: 0,
            next: 0,
            location: 0,
            hash: 0,
        };
        let join = |header| Found {
            at: header + 0x80,
            holder: Some(Holder::Join(header)),
        };
        let told = |wakers, found: &[Found]| {
            let mut sockets = Sockets::new(0);
            let told = waiting(&cell(wakers), found, None, Uses::default, &mut sockets);
            (told.words, told.on)
        };
        let words = |words: &str| Some(words.to_owned());
        assert_eq!(told(1, &[join(0x3000)]), (words("join"), 0x3000));
        let both = [join(0x3000), join(0x4000)];
        assert_eq!(told(2, &both), (words("join"), 0));
        assert_eq!(told(2, &[join(0x3000)]), (words("join|?"), 0));
        assert_eq!(told(1, &both), (None, 0));
        assert_eq!(told(0, &[]), (words("pending"), 0));
    }
}
