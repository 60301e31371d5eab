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

use super::names::Finder;

/// Functions that are looked at for one task.
const MAX_FUNCTIONS: usize = 1 << 15;

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
    /// sync/watch.rs; it waits for a [`Uses::NOTIFY`].
    pub const WATCH: Uses = Uses(1 << 6);
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

    /// By tokio's module, as in a symbol or with `/` in a path: its start.
    fn of_module(module: &str) -> Uses {
        const MODULES: [(&str, Uses); 15] = [
            ("sync/mutex", Uses::MUTEX),
            ("sync/rwlock", Uses::RWLOCK),
            ("sync/semaphore", Uses::SEMAPHORE),
            ("sync/once_cell", Uses::ONCE_CELL),
            ("sync/set_once", Uses::SET_ONCE),
            ("sync/barrier", Uses::BARRIER),
            ("sync/watch", Uses::WATCH),
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

    /// By the path of a source file of tokio's.
    fn of_path(path: &str) -> Uses {
        let tokio = path
            .split_once("/tokio-1.")
            .or_else(|| path.strip_prefix("tokio-1.").map(|rest| ("", rest)));
        let inner = tokio.and_then(|(_, rest)| rest.split_once("/src/"));
        let inner = inner.or_else(|| path.split_once("tokio/src/"));
        inner.map_or(Uses::NONE, |(_, module)| Uses::of_module(module))
    }

    /// By a function's symbol; nothing of what does not wait.
    fn of_symbol(symbol: &str) -> Uses {
        if !is_async(symbol) {
            return Uses::NONE;
        }
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
    if let Some((symbol, _)) = finder.symbols.function(addr, Some(addr)) {
        said.uses = Uses::of_symbol(&symbol);
        // What these wait for themselves is their own affair.
        let whole = Uses::ONCE_CELL.and(Uses::BARRIER).and(Uses::INTERVAL);
        if ends(&symbol) || said.uses.any(whole) {
            return said;
        }
    }
    let function = finder.function(addr);
    said.next.extend(&function.calls);
    for mention in &function.mentions {
        // Passed to another function, which calls it: catch_unwind does.
        if finder.starts.binary_search(&mention.0).is_ok() {
            said.next.push(*mention);
        } else if let Some(location) = finder.read_location(*mention) {
            said.uses = said.uses.and(Uses::of_path(&location.file));
        }
    }
    said
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
            ("tokio::sync::mutex::Mutex<T>::try_lock", Uses::NONE),
            ("tokio::sync::mutexes::poll", Uses::NONE),
        ] {
            assert_eq!(Uses::of_symbol(symbol), uses, "{symbol}");
        }
    }

    #[test]
    fn by_path() {
        for (path, uses) in [
            (
                "/root/.cargo/registry/src/x/tokio-1.44.2/src/sync/mpsc/chan.rs",
                Uses::MPSC,
            ),
            ("tokio-1.20.6/src/sync/batch_semaphore.rs", Uses::BATCH),
            ("/build/tokio/tokio/src/time/interval.rs", Uses::INTERVAL),
            ("/x/tokio-1.54.1/src/time/driver/sleep.rs", Uses::SLEEP),
            ("/x/tokio-util-0.7.1/src/sync/mpsc.rs", Uses::NONE),
            ("src/sync/mutex.rs", Uses::NONE),
        ] {
            assert_eq!(Uses::of_path(path), uses, "{path}");
        }
    }
}
