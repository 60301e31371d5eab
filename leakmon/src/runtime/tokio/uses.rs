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

use rustc_hash::{FxHashMap, FxHashSet};

use crate::binary::addr::Vaddr;
use crate::binary::elf::ReadAt;

use super::names::{Finder, Function, Location};

/// Functions that are looked at for one task.
const MAX_FUNCTIONS: usize = 1 << 15;

/// A line of sync/watch.rs before tokio 1.28 that is behind `Receiver::changed`,
/// 454 to 616, and before `Sender::closed`, 692 to 957: in 1.18 to 1.27. Since
/// then the two are told apart by what they wait in.
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
        match is_async(symbol) {
            true => Uses::named(symbol),
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

/// Whether a function is one of tokio's.
fn is_own(symbol: &str) -> bool {
    symbol.trim_start_matches('<').starts_with("tokio::")
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
    uses: Uses,
    /// What it leads to.
    next: Vec<Vaddr>,
}

/// Finds what tasks can wait for.
pub(super) struct Reach<'a, R: ?Sized> {
    finder: Finder<'a, R>,
    said: FxHashMap<Vaddr, Said>,
}

impl<'a, R: ReadAt + ?Sized> Reach<'a, R> {
    /// In the program that `finder` looks into.
    pub(super) fn new(finder: Finder<'a, R>) -> Reach<'a, R> {
        Reach {
            finder,
            said: FxHashMap::default(),
        }
    }

    /// What the function at `poll` leads to.
    pub(super) fn uses(&mut self, poll: Vaddr) -> Uses {
        let mut uses = Uses::NONE;
        let mut seen = FxHashSet::from_iter([poll]);
        let mut next = vec![poll];
        while let Some(addr) = next.pop() {
            let finder = &mut self.finder;
            let said = self.said.entry(addr).or_insert_with(|| said(finder, addr));
            uses = uses.and(said.uses);
            if seen.len() > MAX_FUNCTIONS {
                // What was not looked at may be any of them.
                return Uses::ANY;
            }
            next.extend(said.next.iter().filter(|callee| seen.insert(**callee)));
        }
        uses
    }
}

fn said<R: ReadAt + ?Sized>(finder: &mut Finder<R>, addr: Vaddr) -> Said {
    let mut said = Said::default();
    let symbol = finder.symbols.function(addr, Some(addr));
    let symbol = symbol.map(|(symbol, _)| symbol).unwrap_or_default();
    if ends(&symbol) {
        return said;
    }
    said.uses = Uses::of_symbol(&symbol);
    // The symbol of one of tokio's own says more than the file that it is in.
    let named = match is_own(&symbol) {
        true => Uses::named(&symbol),
        false => Uses::NONE,
    };
    let told = match named.any(WATCHES) {
        true => named.and(WATCHES),
        false => named,
    };
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
    let hidden = hidden(finder, &symbol, &function, &said.next);
    said.next
        .retain(|callee| !polled(finder, *callee).any(hidden));
    for mention in data {
        if let Some(location) = finder.read_location(mention) {
            let uses = Uses::of_location(&location).without(hidden.and(told));
            said.uses = said.uses.and(uses);
        }
    }
    said
}

/// Futures that wait for one of another kind, and by what calls they do.
const WHOLE: [(Uses, Uses); 3] = [
    (Uses::ONCE_CELL, Uses::SEMAPHORE.and(Uses::BATCH)),
    (Uses::BARRIER, WATCHES.and(Uses::NOTIFY)),
    (WATCHES, Uses::NOTIFY),
];

/// What `function` waits for only as a part of another future, which it is or
/// whose code was put into its own: that one's `async fn` says that it was
/// resumed after its end, and polls its part by a call. Where there is one such
/// call it is that one's.
fn hidden<R: ReadAt + ?Sized>(
    finder: &Finder<R>,
    symbol: &str,
    function: &Function,
    called: &[Vaddr],
) -> Uses {
    if !function.is_complete {
        return Uses::NONE;
    }
    let own = match is_own(symbol) {
        true => Uses::of_symbol(symbol),
        false => Uses::NONE,
    };
    let resumed = function.passes.iter().filter_map(|(callee, what)| {
        let location = finder.read_location(*what)?;
        let uses = Uses::of_location(&location);
        (uses != Uses::NONE && finder.is_resumed(*callee)).then_some(uses)
    });
    let inlined = resumed.fold(own, Uses::and);
    let is_lone = |parts: Uses| {
        let polls = called.iter().filter(|it| polled(finder, **it).any(parts));
        polls.count() == 1
    };
    WHOLE
        .into_iter()
        .filter(|&(whole, parts)| inlined.any(whole) && is_lone(parts))
        .fold(Uses::NONE, |hidden, (_, parts)| hidden.and(parts))
}

/// What the function at `addr` polls, by its symbol.
fn polled<R: ReadAt + ?Sized>(finder: &Finder<R>, addr: Vaddr) -> Uses {
    let symbol = finder.symbols.function(addr, Some(addr));
    symbol.map_or(Uses::NONE, |(symbol, _)| Uses::of_symbol(&symbol))
}

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
            ("tokio::sync::mutexes::poll", Uses::NONE),
        ] {
            assert_eq!(Uses::of_symbol(symbol), uses, "{symbol}");
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
