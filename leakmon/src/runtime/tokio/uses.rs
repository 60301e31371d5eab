//! What the code of a task can wait for: which of tokio's futures its `poll`
//! leads to.
//!
//! A future that lies in the task's own cell is polled by functions that
//! `poll` leads to, since a call through a pointer needs a future behind one.
//! So what is not found there is not what such a task waits for. What is found
//! may be waited for at another time, or never.
//!
//! A function is known by its symbol, or by the places in the source that its
//! code gives to panics: every `async fn` has one, "resumed after completion",
//! which neither stripping nor inlining removes.

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::binary::addr::Vaddr;
use crate::binary::elf::ReadAt;

use super::names::{Finder, Location};

/// Functions that are looked at for one task.
const MAX_FUNCTIONS: usize = 1 << 15;

/// A line of sync/watch.rs before tokio 1.28 that is behind `Receiver::changed`,
/// 454 to 616, and before `Sender::closed`, 692 to 957: in 1.18 to 1.27. From 1.26
/// on the two wait in different lists.
const SENDER: u32 = 650;

/// Both ends of a watch channel.
const WATCHES: Uses = Uses::WATCH.and(Uses::WATCH_CLOSED);

/// A set of tokio's futures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses(u32);

impl Uses {
    /// None of them.
    pub const NONE: Uses = Uses(0);
    /// Any of them.
    pub const ANY: Uses = Uses(u32::MAX);
    /// sync/mutex.rs.
    pub const MUTEX: Uses = Uses(1);
    /// sync/rwlock.rs.
    pub const RWLOCK: Uses = Uses(1 << 1);
    /// sync/semaphore.rs.
    pub const SEMAPHORE: Uses = Uses(1 << 2);
    /// sync/once_cell.rs; it waits for a [`Uses::SEMAPHORE`].
    pub const ONCE_CELL: Uses = Uses(1 << 3);
    /// sync/set_once.rs.
    pub const SET_ONCE: Uses = Uses(1 << 4);
    /// sync/barrier.rs; it waits for a [`Uses::WATCH`].
    pub const BARRIER: Uses = Uses(1 << 5);
    /// sync/watch.rs, by a receiver; it waits for a [`Uses::NOTIFY`].
    pub const WATCH: Uses = Uses(1 << 6);
    /// The same, by a sender, for the receivers to go.
    pub const WATCH_CLOSED: Uses = Uses(1 << 15);
    /// sync/notify.rs.
    pub const NOTIFY: Uses = Uses(1 << 7);
    /// sync/broadcast.rs.
    pub const BROADCAST: Uses = Uses(1 << 8);
    /// sync/oneshot.rs.
    pub const ONESHOT: Uses = Uses(1 << 9);
    /// sync/mpsc/.
    pub const MPSC: Uses = Uses(1 << 10);
    /// time/sleep.rs.
    pub const SLEEP: Uses = Uses(1 << 11);
    /// time/interval.rs; it waits for a [`Uses::SLEEP`].
    pub const INTERVAL: Uses = Uses(1 << 12);
    /// task/join_set.rs.
    pub const JOIN_SET: Uses = Uses(1 << 13);
    /// sync/batch_semaphore.rs, which all but one of the locks are made of.
    pub const BATCH: Uses = Uses(1 << 14);

    /// Whether it has any of `others`.
    pub const fn any(self, others: Uses) -> bool {
        self.0 & others.0 != 0
    }

    /// Both together.
    pub const fn and(self, others: Uses) -> Uses {
        Uses(self.0 | others.0)
    }

    /// Those that `others` has not.
    const fn without(self, others: Uses) -> Uses {
        Uses(self.0 & !others.0)
    }

    /// By tokio's module, as in a symbol or with `/` in a path: its start.
    fn of_module(module: &str) -> Uses {
        const MODULES: [(&str, Uses); 18] = [
            ("sync/mutex", Uses::MUTEX),
            ("sync/rwlock", Uses::RWLOCK),
            ("sync/semaphore", Uses::SEMAPHORE),
            ("sync/once_cell", Uses::ONCE_CELL),
            ("sync/set_once", Uses::SET_ONCE),
            ("sync/barrier", Uses::BARRIER),
            ("sync/watch/Receiver", Uses::WATCH),
            ("sync/watch/changed_impl", Uses::WATCH),
            ("sync/watch/Sender", Uses::WATCH_CLOSED),
            ("sync/watch", Uses::WATCH.and(Uses::WATCH_CLOSED)),
            ("sync/notify", Uses::NOTIFY),
            ("sync/broadcast", Uses::BROADCAST),
            ("sync/oneshot", Uses::ONESHOT),
            ("sync/mpsc", Uses::MPSC),
            ("time/interval", Uses::INTERVAL),
            ("time/", Uses::SLEEP),
            ("task/join_set", Uses::JOIN_SET),
            ("sync/batch_semaphore", Uses::BATCH),
        ];
        let found = MODULES.iter().find(|(start, _)| {
            module.strip_prefix(start).is_some_and(|rest| {
                start.ends_with('/') || !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
            })
        });
        found.map_or(Uses::NONE, |(_, uses)| *uses)
    }

    /// By a place in a source file of tokio's.
    fn of_location(location: &Location) -> Uses {
        let path = location.file.as_str();
        let tokio = path
            .split_once("/tokio-1.")
            .or_else(|| path.strip_prefix("tokio-1.").map(|rest| ("", rest)));
        let minor = tokio.and_then(|(_, rest)| rest.split_once('.')?.0.parse().ok());
        let inner = tokio.and_then(|(_, rest)| rest.split_once("/src/"));
        let inner = inner.or_else(|| path.split_once("tokio/src/"));
        let uses = inner.map_or(Uses::NONE, |(_, module)| Uses::of_module(module));
        match minor {
            Some(..28) if uses == WATCHES => match location.line {
                ..SENDER => Uses::WATCH,
                _ => Uses::WATCH_CLOSED,
            },
            _ => uses,
        }
    }

    /// By a function's symbol; nothing of what does not wait.
    fn of_symbol(symbol: &str) -> Uses {
        /// Their futures have no `async fn`: a closure there waits for nothing.
        const WITHOUT_ASYNC: Uses = Uses::BATCH.and(Uses::NOTIFY);
        match is_async(symbol) {
            true if symbol.contains("poll") => Uses::named(symbol),
            true => Uses::named(symbol).without(WITHOUT_ASYNC),
            false => Uses::NONE,
        }
    }

    /// By tokio's modules in a function's symbol.
    fn named(symbol: &str) -> Uses {
        let mut uses = Uses::NONE;
        let mut rest = symbol;
        while let Some((_, behind)) = rest.split_once("tokio::") {
            let end = behind
                .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
                .unwrap_or(behind.len());
            uses = uses.and(Uses::of_module(&behind[..end].replace("::", "/")));
            rest = behind;
        }
        uses
    }
}

/// Whether a function polls.
fn is_async(symbol: &str) -> bool {
    (symbol.contains("{{closure}}") || symbol.contains("{closure") || symbol.contains("poll"))
        && !ends(symbol)
}

/// The path of one of tokio's functions, up to the first type that it is given.
fn own_path(symbol: &str) -> Option<&str> {
    let symbol = symbol.trim_start_matches('<');
    let path = symbol.split(['<', ' ', '{', '(']).next()?;
    path.starts_with("tokio::").then_some(path)
}

/// Whether a function ends what others began, or shows it: it waits for
/// nothing.
fn ends(symbol: &str) -> bool {
    symbol.starts_with("core::ptr::drop_in_place")
        || symbol.contains(" as core::ops::drop::Drop>")
        || symbol.contains("::drop_slow")
        || symbol.contains(" as core::fmt::")
        || symbol.starts_with("core::fmt::")
        || symbol.starts_with("core::panicking::")
}

/// What one function says.
#[derive(Clone, Debug, Default)]
struct Said {
    /// What it polls: by its symbol, and by what was put into its code and says
    /// that it was resumed after its end.
    polls: Uses,
    /// Whose places in the source its code has otherwise.
    mentions: Uses,
    /// What it leads to.
    next: Vec<Vaddr>,
    /// The futures of which it is the function, or has that function's code in its
    /// own. None where not all of its code is known.
    whole: Uses,
    /// Whether it is one of tokio's functions.
    is_own: bool,
}

/// Finds what tasks can wait for.
pub(super) struct Reach<'a, R: ?Sized> {
    finder: Finder<'a, R>,
    said: FxHashMap<Vaddr, Arc<Said>>,
    /// What functions lead to that polls.
    polls: FxHashMap<Vaddr, Uses>,
}

impl<'a, R: ReadAt + ?Sized> Reach<'a, R> {
    /// In the program that `finder` looks into.
    pub(super) fn new(finder: Finder<'a, R>) -> Reach<'a, R> {
        Reach {
            finder,
            said: FxHashMap::default(),
            polls: FxHashMap::default(),
        }
    }

    /// What the function at `poll` leads to and may wait for: of futures that wait
    /// for one of another kind the whole, and not the part.
    pub(super) fn uses(&mut self, poll: Vaddr) -> Uses {
        self.walk(poll, uses, |reach, said| reach.part(said))
    }

    /// What the function at `addr` and all that it leads to say.
    fn all(&mut self, addr: Vaddr, what: fn(&Said) -> Uses) -> Uses {
        let none = |_: &mut Self, _: &Said| None;
        self.walk(addr, what, none)
    }

    /// What the function at `addr` and all that it leads to poll.
    fn polls(&mut self, addr: Vaddr) -> Uses {
        if let Some(known) = self.polls.get(&addr) {
            return *known;
        }
        let polls = self.all(addr, |said| said.polls);
        self.polls.insert(addr, polls);
        polls
    }

    /// What the function at `start` and all that it leads to say, without what
    /// `part` names: a callee, and of what it leads to what does not count.
    fn walk(
        &mut self,
        start: Vaddr,
        what: fn(&Said) -> Uses,
        mut part: impl FnMut(&mut Self, &Said) -> Option<(Vaddr, Uses)>,
    ) -> Uses {
        let mut found = Uses::NONE;
        let mut seen = FxHashSet::from_iter([start]);
        let mut next = vec![start];
        while let Some(addr) = next.pop() {
            let said = self.said(addr);
            if seen.len() > MAX_FUNCTIONS {
                // What was not looked at may be any of them.
                return Uses::ANY;
            }
            let part = part(self, &said);
            let (callee, hidden) = part.unwrap_or((Vaddr(0), Uses::NONE));
            if hidden == Uses::NONE {
                found = found.and(what(&said));
            } else {
                // A Notify that is polled here without a call may be any.
                let mentions = said.mentions.without(hidden.without(Uses::NOTIFY));
                let own = said.polls.without(hidden).and(mentions);
                let parts = self.all(callee, uses).without(hidden);
                found = found.and(own).and(parts);
            }
            let others = said.next.iter().copied();
            let others = others.filter(|other| hidden == Uses::NONE || *other != callee);
            next.extend(others.filter(|callee| seen.insert(*callee)));
        }
        found
    }

    /// What a function waits for only as a part of another future: that one polls
    /// its part by a call, of one of tokio's functions. Where only one of the calls
    /// leads to such a part it is that one's; it is given with the part.
    fn part(&mut self, said: &Said) -> Option<(Vaddr, Uses)> {
        let parts = WHOLE
            .into_iter()
            .filter(|&(whole, _)| said.whole.any(whole));
        // The first is the outermost.
        for (_, parts) in parts {
            let mut leading = Vec::new();
            for callee in &said.next {
                if self.polls(*callee).any(parts) {
                    leading.push(*callee);
                }
            }
            if let [callee] = leading[..]
                && self.said(callee).is_own
            {
                return Some((callee, parts));
            }
        }
        None
    }

    fn said(&mut self, addr: Vaddr) -> Arc<Said> {
        let finder = &mut self.finder;
        let said = self.said.entry(addr);
        Arc::clone(said.or_insert_with(|| Arc::new(said_of(finder, addr))))
    }
}

fn uses(said: &Said) -> Uses {
    said.polls.and(said.mentions)
}

fn said_of<R: ReadAt + ?Sized>(finder: &mut Finder<R>, addr: Vaddr) -> Said {
    let mut said = Said::default();
    let symbol = finder.symbols.function(addr, Some(addr));
    let symbol = symbol.map(|(symbol, _)| symbol).unwrap_or_default();
    if ends(&symbol) {
        return said;
    }
    // The symbol of one of tokio's own says more than the file that it is in.
    let own = own_path(&symbol);
    let named = own.map_or(Uses::NONE, Uses::named);
    let told = match named.any(WATCHES) {
        true => named.and(WATCHES),
        false => named,
    };
    said.is_own = own.is_some();
    let function = finder.function(addr);
    // A function that is mentioned is called by way of a register, or by another
    // that it is passed to: catch_unwind does.
    let is_function = |addr: &Vaddr| finder.starts.binary_search(&addr.0).is_ok();
    let (called, data): (Vec<Vaddr>, Vec<Vaddr>) = function
        .mentions
        .iter()
        .partition(|mention| is_function(mention));
    said.next.extend(function.calls.iter().copied());
    said.next.extend(called);
    let of = |mention: Vaddr| {
        finder
            .read_location(mention)
            .map(|it| Uses::of_location(&it))
    };
    let resumed = function.passes.iter();
    let resumed = resumed.filter(|(callee, _)| finder.is_resumed(*callee));
    let resumed = resumed
        .filter_map(|(_, what)| of(*what))
        .fold(Uses::NONE, Uses::and);
    let mentions = data.into_iter().filter_map(of).fold(Uses::NONE, Uses::and);
    let by_symbol = Uses::of_symbol(&symbol);
    said.polls = by_symbol.and(resumed.without(told));
    said.mentions = mentions.without(told).without(said.polls);
    if function.is_complete {
        let own = if is_async(&symbol) { named } else { Uses::NONE };
        said.whole = own.and(resumed);
    }
    said
}

/// Futures that wait for one of another kind, and what of; what waits for more
/// than one before what it waits for.
const WHOLE: [(Uses, Uses); 3] = [
    (Uses::ONCE_CELL, Uses::SEMAPHORE.and(Uses::BATCH)),
    (Uses::BARRIER, WATCHES.and(Uses::NOTIFY)),
    (WATCHES, Uses::NOTIFY),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_symbol() {
        for (symbol, uses) in [
            (
                "tokio::sync::mutex::Mutex<T>::lock::{{closure}}",
                Uses::MUTEX,
            ),
            (
                "<tokio::sync::mutex::Mutex<u8>>::lock::{closure#0}",
                Uses::MUTEX,
            ),
            (
                "<tokio::sync::oneshot::Receiver<T> as core::future::future::Future>::poll",
                Uses::ONESHOT,
            ),
            (
                "<tokio::time::timeout::Timeout<tokio::sync::mpsc::Recv> as core::future::future::Future>::poll",
                Uses::SLEEP.and(Uses::MPSC),
            ),
            (
                "core::ptr::drop_in_place<tokio::sync::mutex::Mutex<T>::lock::{{closure}}>",
                Uses::NONE,
            ),
            (
                "tokio::sync::watch::Receiver<T>::changed::{{closure}}",
                Uses::WATCH,
            ),
            (
                "<tokio::sync::watch::Sender<u8>>::closed::{closure#0}",
                Uses::WATCH_CLOSED,
            ),
            ("tokio::sync::mutex::Mutex<T>::try_lock", Uses::NONE),
            (
                "tokio::sync::batch_semaphore::Semaphore::close::{{closure}}",
                Uses::NONE,
            ),
            ("tokio::sync::mutexes::poll", Uses::NONE),
        ] {
            assert_eq!(Uses::of_symbol(symbol), uses, "{symbol}");
        }
    }

    #[test]
    fn tokios_own_functions() {
        for (symbol, path) in [
            (
                "tokio::sync::watch::Receiver<T>::changed::{{closure}}",
                Some("tokio::sync::watch::Receiver"),
            ),
            (
                "<tokio::sync::notify::Notified as core::future::future::Future>::poll",
                Some("tokio::sync::notify::Notified"),
            ),
            (
                "<tokio::runtime::task::core::Core<app::run<tokio::sync::watch::Sender<u8>>::{closure#0}, x>>::poll",
                Some("tokio::runtime::task::core::Core"),
            ),
            (
                "app::run<tokio::sync::watch::Sender<u8>>::{closure#0}",
                None,
            ),
            ("", None),
        ] {
            assert_eq!(own_path(symbol), path, "{symbol}");
        }
    }

    #[test]
    fn by_place() {
        for (path, line, uses) in [
            (
                "/root/.cargo/registry/src/x/tokio-1.44.2/src/sync/mpsc/chan.rs",
                1,
                Uses::MPSC,
            ),
            ("tokio-1.20.6/src/sync/batch_semaphore.rs", 900, Uses::BATCH),
            ("tokio-1.20.6/src/sync/watch.rs", 523, Uses::WATCH),
            ("tokio-1.20.6/src/sync/watch.rs", 849, Uses::WATCH_CLOSED),
            ("tokio-1.28.0/src/sync/watch.rs", 597, WATCHES),
            ("/build/tokio/tokio/src/sync/watch.rs", 597, WATCHES),
            ("/build/tokio/tokio/src/time/interval.rs", 7, Uses::INTERVAL),
            ("/x/tokio-1.54.1/src/time/driver/sleep.rs", 8, Uses::SLEEP),
            ("/x/tokio-util-0.7.1/src/sync/mpsc.rs", 9, Uses::NONE),
            ("src/sync/mutex.rs", 10, Uses::NONE),
        ] {
            let file = path.to_owned();
            let location = Location { file, line };
            assert_eq!(Uses::of_location(&location), uses, "{path}:{line}");
        }
    }
}
