//! What a blocked thread waits for: what the futex that it waits on is.
//!
//! A futex is a word in memory, and says not what it is part of. Functions on
//! the thread's stack do, where they have names; where they have none, only
//! what no other use of a futex looks like is named, and the rest is `futex`.
//!
//! | wait | seen in |
//! |---|---|
//! | `FUTEX_WAIT`, value 2, owner's thread id 8 bytes on | glibc's mutex: nptl/pthread_mutex_lock.c, 2.3 to 2.42 |
//! | `FUTEX_WAIT`, value 0x80000000 + owner's thread id | glibc's robust mutexes; musl's recursive and error-checking ones: pthread_mutex_timedlock.c |
//! | `FUTEX_LOCK_PI`, owner's thread id in the word | any priority-inheriting mutex: Documentation/locking/pi-futex.rst |
//! | libc's own `FUTEX_WAIT_BITSET`, value 0, somebody waiting 4 bytes on, the futex's sharing 8 bytes on | glibc's semaphore: struct new_sem, 2.21 to 2.42 |
//! | shared `FUTEX_WAIT` or `FUTEX_WAIT_BITSET`, value the joined thread's id | glibc's join: nptl/pthread_join_common.c |
//! | `FUTEX_WAIT_BITSET`, value 0xffffffff | Rust's park: std/src/sys/sync/thread_parking/futex.rs, 1.57 and later |

use crate::task::{WaitClass, WaitKind};

/// Operations of futex(2), without [`OP_PRIVATE`] and [`OP_REALTIME`]:
/// include/uapi/linux/futex.h.
const WAIT: u32 = 0;
const LOCK_PI: u32 = 6;
const WAIT_BITSET: u32 = 9;
const LOCK_PI2: u32 = 13;
const OP_PRIVATE: u32 = 128;
const OP_REALTIME: u32 = 256;

/// The bits of a futex word that hold a thread id, and the one that says that
/// somebody waits: include/uapi/linux/futex.h.
const TID_MASK: u32 = 0x3fff_ffff;
const WAITERS: u32 = 0x8000_0000;

/// What musl writes into a mutex that keeps no owner: EBUSY.
const MUSL_LOCKED: u32 = 16;

/// Rust's std: PARKED of thread_parking/futex.rs.
const PARKED: u32 = u32::MAX;

/// A call of futex(2) that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Futex {
    /// The word's address.
    pub(super) addr: u64,
    op: u32,
    private: bool,
    value: u32,
}

impl Futex {
    /// From the call's arguments.
    pub(super) fn of(args: &[u64; 6]) -> Futex {
        let op = args[1] as u32;
        Futex {
            addr: args[0],
            op: op & !(OP_PRIVATE | OP_REALTIME),
            private: op & OP_PRIVATE != 0,
            value: args[2] as u32,
        }
    }

    /// What an operation says of the wait by itself: only one of the kernel's own
    /// locks has operations of its own.
    pub(super) fn reason_of(op: u32) -> &'static str {
        match op & !(OP_PRIVATE | OP_REALTIME) {
            LOCK_PI | LOCK_PI2 => "mutex lock",
            _ => "futex",
        }
    }
}

/// What a thread waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum On {
    /// A lock, and who holds it where the lock says so.
    Lock { addr: u64, owner: Option<Owner> },
    /// The end of a thread: an id in the process's own pid namespace.
    Thread(u32),
    /// Another use of a futex.
    Futex(u64),
    /// A file descriptor.
    Fd(u64),
    /// Nothing that has a name.
    Nothing,
}

/// The thread that holds a lock, by the lock's own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// Its id in the process's own pid namespace.
    pub(super) tid: u32,
    /// Where the lock says so.
    pub(super) at: u64,
}

impl Owner {
    /// Whether the word that names it still does.
    pub(super) fn holds(self, word: u32) -> bool {
        word & TID_MASK == self.tid
    }
}

/// What names of functions say of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Primitive {
    Mutex,
    /// A mutex that says not who holds it, at the futex's address: Rust's std.
    RustMutex,
    /// A mutex whose futex is not part of it: parking_lot's.
    RemoteMutex,
    Condvar,
    RwLock,
    Semaphore,
    Barrier,
    Once,
    Join,
    Park,
    /// Rust's std channels, by the words of std::sync::mpsc.
    Receive,
    Send,
}

impl Primitive {
    fn reason(self) -> &'static str {
        match self {
            Primitive::Mutex | Primitive::RustMutex | Primitive::RemoteMutex => "mutex lock",
            Primitive::Condvar => "condvar wait",
            Primitive::RwLock => "rwlock",
            Primitive::Semaphore => "semaphore",
            Primitive::Barrier => "barrier",
            Primitive::Once => "once",
            Primitive::Join => "join",
            Primitive::Park => "park",
            Primitive::Receive => "mpsc recv",
            Primitive::Send => "mpsc send",
        }
    }

    /// What the functions that a thread is in say together, innermost first:
    /// the innermost primitive, or what of Rust's std is made of it.
    pub(super) fn among<'a>(functions: impl Iterator<Item = &'a str>) -> Option<Primitive> {
        let mut found = None;
        for function in functions {
            match found {
                None => found = Primitive::of(function),
                Some(Primitive::Condvar) if function.contains("std::sync::barrier::") => {
                    return Some(Primitive::Barrier);
                }
                Some(Primitive::Park) => {
                    let channel = ["std::sync::mpmc::", "std::sync::mpsc::"];
                    if channel.iter().any(|c| function.contains(c)) {
                        if function.contains("recv") {
                            return Some(Primitive::Receive);
                        }
                        if function.contains("send") {
                            return Some(Primitive::Send);
                        }
                    }
                }
                Some(_) => {}
            }
        }
        found
    }

    /// Which one the function is of, if it is of one.
    pub(super) fn of(function: &str) -> Option<Primitive> {
        let plain = function.trim_start_matches('_');
        let c = plain.split('@').next().unwrap_or(plain);
        if c.starts_with("pthread_") || c.starts_with("sem_") || c.starts_with("new_sem_") {
            let has = |word: &str| c.contains(word);
            return if has("mutex") && has("lock") {
                Some(Primitive::Mutex)
            } else if has("cond_") && has("wait") {
                Some(Primitive::Condvar)
            } else if has("rwlock") {
                Some(Primitive::RwLock)
            } else if has("sem_") && has("wait") {
                Some(Primitive::Semaphore)
            } else if has("barrier") {
                Some(Primitive::Barrier)
            } else if has("once") {
                Some(Primitive::Once)
            } else if has("join") {
                Some(Primitive::Join)
            } else {
                None
            };
        }
        let rust = function.trim_start_matches('<');
        let parking_lot = rust.starts_with("parking_lot::");
        if !parking_lot && !rust.starts_with("std::") {
            return None;
        }
        let has = |word: &str| rust.contains(word);
        if has("condvar") || has("Condvar") {
            Some(Primitive::Condvar)
        } else if has("rwlock") || has("RwLock") {
            Some(Primitive::RwLock)
        } else if has("mutex") || has("Mutex") {
            Some(match parking_lot {
                true => Primitive::RemoteMutex,
                false => Primitive::RustMutex,
            })
        } else if has("thread_park") || has("Parker") || has("thread::park") {
            Some(Primitive::Park)
        } else if has("::once") {
            Some(Primitive::Once)
        } else {
            None
        }
    }
}

/// What a thread waits for on a futex: the reason, and on what.
///
/// `primitive` is what the innermost named functions of its stack say, and
/// `in_libc` whether the call is the C library's (a file of its own); `word`
/// reads 32 bits of the process's memory; `lives` tells whether a thread of the
/// process has an id (in the process's own pid namespace).
pub(super) fn decode(
    futex: Futex,
    primitive: Option<Primitive>,
    in_libc: bool,
    word: impl Fn(u64) -> Option<u32>,
    lives: impl Fn(u32) -> bool,
) -> (&'static str, On) {
    let Futex {
        addr,
        op,
        private,
        value,
    } = futex;
    let lock = |owner| ("mutex lock", On::Lock { addr, owner });
    // glibc's mutex: lock, count, owner, nusers, kind.
    let glibc_owner = || {
        let owner = word(addr.checked_add(8)?)?;
        let users = word(addr.checked_add(12)?)?;
        let kind = word(addr.checked_add(16)?)?;
        // PTHREAD_MUTEX_*_NP 0 to 3, shared 128, elision 256 and 512: the kinds
        // that wait by this operation.
        let sane = kind & !0x383 == 0 && users > 0;
        (word(addr)? == 2 && sane && owner != 0 && lives(owner)).then_some(Owner {
            tid: owner,
            at: addr.wrapping_add(8),
        })
    };
    // glibc's semaphore: value, threads that wait, and its sharing.
    let glibc_semaphore = || {
        let waiters = addr.checked_add(4).and_then(&word);
        let sharing = addr.checked_add(8).and_then(&word);
        waiters.is_some_and(|n| (1..=TID_MASK).contains(&n))
            && sharing == Some(if private { 0 } else { OP_PRIVATE })
    };
    match op {
        LOCK_PI | LOCK_PI2 => {
            let owner = word(addr).map(|word| word & TID_MASK);
            let owner = owner.filter(|owner| lives(*owner));
            return lock(owner.map(|tid| Owner { tid, at: addr }));
        }
        WAIT if value == 2 && matches!(primitive, Some(Primitive::Mutex | Primitive::Condvar)) => {
            // A condition variable's mutex, on the way out of the wait: glibc
            // waits for a condition by FUTEX_WAIT_BITSET.
            return lock(glibc_owner());
        }
        WAIT if value & WAITERS != 0
            && value != MUSL_LOCKED | WAITERS
            && matches!(primitive, None | Some(Primitive::Mutex))
            && lives(value & TID_MASK)
            && word(addr) == Some(value) =>
        {
            return lock(Some(Owner {
                tid: value & TID_MASK,
                at: addr,
            }));
        }
        _ => {}
    }
    match primitive {
        Some(Primitive::Join) if value != 0 && lives(value) => ("join", On::Thread(value)),
        Some(Primitive::RustMutex | Primitive::Mutex) => lock(None),
        Some(
            primitive @ (Primitive::RemoteMutex
            | Primitive::Park
            | Primitive::Receive
            | Primitive::Send),
        ) => (primitive.reason(), On::Nothing),
        Some(primitive) => (primitive.reason(), On::Futex(addr)),
        None if op == WAIT && value == 2 => match glibc_owner() {
            Some(owner) => lock(Some(owner)),
            None => ("futex", On::Futex(addr)),
        },
        None if in_libc && op == WAIT_BITSET && value == 0 && glibc_semaphore() => {
            ("semaphore", On::Futex(addr))
        }
        None if matches!(op, WAIT | WAIT_BITSET)
            && !private
            && value != 0
            && lives(value)
            && word(addr) == Some(value) =>
        {
            ("join", On::Thread(value))
        }
        None if op == WAIT_BITSET && value == PARKED => ("park", On::Nothing),
        None => ("futex", On::Futex(addr)),
    }
}

/// Judges a wait: what lasts in a lock is wrong, what lasts elsewhere in user
/// space's own synchronisation is when it becomes more and more. System calls
/// say nothing: a thread for each connection waits in `read` for ever.
pub(super) fn kind(reason: &str) -> WaitKind {
    let (class, missing) = match reason {
        "mutex lock" | "rwlock" => (WaitClass::Lock, "nobody unlocked"),
        "condvar wait" => (WaitClass::Idle, "nobody signalled"),
        "semaphore" => (WaitClass::Idle, "nobody posted"),
        "barrier" => (WaitClass::Idle, "the others did not come"),
        "once" => (WaitClass::Lock, "the first did not finish"),
        "join" => (WaitClass::Idle, "the other thread did not end"),
        "park" => (WaitClass::Idle, "nobody unparked"),
        "mpsc recv" => (WaitClass::Idle, "nobody sent"),
        "mpsc send" => (WaitClass::Hanging, "nobody received"),
        "futex" => (WaitClass::Idle, "nobody woke"),
        _ => return WaitKind::default(),
    };
    WaitKind {
        class,
        missing: Some(missing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn futex(op: u32, value: u32) -> Futex {
        Futex::of(&[0x1000, op.into(), value.into(), 0, 0, 0])
    }

    /// Words of memory from 0x1000 on.
    fn words(words: &'static [u32]) -> impl Fn(u64) -> Option<u32> {
        move |at| {
            words
                .get(usize::try_from(at.checked_sub(0x1000)? / 4).ok()?)
                .copied()
        }
    }

    fn held(owner: Option<(u32, u64)>) -> (&'static str, On) {
        let addr = 0x1000;
        let owner = owner.map(|(tid, at)| Owner { tid, at });
        ("mutex lock", On::Lock { addr, owner })
    }

    const HELD: &[u32] = &[2, 0, 77, 1, 0];

    #[test]
    fn a_mutex_of_glibc_says_who_holds_it() {
        let lives = |tid| tid == 77;
        for primitive in [None, Some(Primitive::Mutex), Some(Primitive::Condvar)] {
            let found = decode(futex(0x80, 2), primitive, false, words(HELD), lives);
            assert_eq!(found, held(Some((77, 0x1008))));
        }
        // Recursive, error-checking, shared; but not what no kind is.
        for (kind, known) in [(1, true), (2, true), (128, true), (0x7f31_c0de, false)] {
            let memory = move |at: u64| match at {
                0x1010 => Some(kind),
                _ => words(HELD)(at),
            };
            let found = decode(futex(0x80, 2), None, false, memory, lives);
            assert_eq!(found.0 == "mutex lock", known);
        }
    }

    #[test]
    fn what_is_no_mutex_is_none() {
        let lives = |tid| tid == 77;
        let plain = ("futex", On::Futex(0x1000));
        // The lock of a FILE: lock, count, owner's address.
        let file: &[u32] = &[2, 1, 0x7f00_1740, 0x7f31, 0];
        assert_eq!(
            decode(futex(0x80, 2), None, false, words(file), lives),
            plain
        );
        // Nobody has this id.
        assert_eq!(
            decode(futex(0x80, 2), None, false, words(HELD), |_| false),
            plain
        );
        assert_eq!(
            decode(
                futex(0x80, 2),
                Some(Primitive::Mutex),
                false,
                words(HELD),
                |_| { false }
            ),
            held(None)
        );
        // Memory that cannot be read.
        assert_eq!(decode(futex(0x80, 2), None, false, |_| None, lives), plain);
        // musl's plain mutex, in a namespace where a thread has id 16.
        let busy: &[u32] = &[0x8000_0010];
        assert_eq!(
            decode(futex(0x80, 0x8000_0010), None, false, words(busy), |_| true),
            plain
        );
    }

    #[test]
    fn owners_in_the_word_itself() {
        let lives = |tid| tid == 77;
        let pi: &[u32] = &[77 | 0x8000_0000];
        for op in [0x86, 0x8d, 6] {
            assert_eq!(
                decode(futex(op, 0), None, false, words(pi), lives),
                held(Some((77, 0x1000)))
            );
        }
        let found = decode(futex(0x80, 77 | 0x8000_0000), None, false, words(pi), lives);
        assert_eq!(found, held(Some((77, 0x1000))));
    }

    #[test]
    fn joins_and_parks() {
        let lives = |tid| tid == 77;
        let tid: &[u32] = &[77];
        let joins = ("join", On::Thread(77));
        assert_eq!(
            decode(futex(0x109, 77), None, false, words(tid), lives),
            joins
        );
        let named = Some(Primitive::Join);
        assert_eq!(
            decode(futex(0x109, 77), named, false, words(tid), lives),
            joins
        );
        let park = decode(futex(0x89, u32::MAX), None, false, words(tid), lives);
        assert_eq!(park, ("park", On::Nothing));
        // Two is what both a std lock and a condition may wait for.
        let plain = ("futex", On::Futex(0x1000));
        assert_eq!(
            decode(futex(0x89, 2), None, false, words(&[2]), lives),
            plain
        );
        let rust = Some(Primitive::RustMutex);
        assert_eq!(
            decode(futex(0x89, 2), rust, false, words(&[2]), lives),
            held(None)
        );
    }

    #[test]
    fn semaphores_of_glibc() {
        let waits = |words_of: &'static [u32], op, in_libc| {
            decode(futex(op, 0), None, in_libc, words(words_of), |_| false).0
        };
        assert_eq!(waits(&[0, 1, 0], 0x189, true), "semaphore");
        assert_eq!(waits(&[0, 2, 128], 0x109, true), "semaphore");
        assert_eq!(waits(&[0, 1, 0], 0x189, false), "futex");
        assert_eq!(waits(&[0, 0, 0], 0x189, true), "futex");
        assert_eq!(waits(&[0, 1, 128], 0x189, true), "futex");
        assert_eq!(waits(&[0, 1], 0x189, true), "futex");
    }

    #[test]
    fn what_is_made_of_primitives() {
        let among = |functions: &[&str]| Primitive::among(functions.iter().copied());
        let park = "std::thread::park";
        assert_eq!(among(&["syscall", park]), Some(Primitive::Park));
        assert_eq!(
            among(&[park, "std::sync::mpmc::list::Channel<T>::recv::{{closure}}"]),
            Some(Primitive::Receive)
        );
        let condvar = "<std::sys::sync::condvar::futex::Condvar>::wait";
        assert_eq!(
            among(&[condvar, "<std::sync::barrier::Barrier>::wait"]),
            Some(Primitive::Barrier)
        );
        assert_eq!(among(&["start_thread"]), None);
    }

    #[test]
    fn functions_name_what_they_are_of() {
        use Primitive::*;
        for (function, expected) in [
            ("__pthread_mutex_lock", Some(Mutex)),
            ("pthread_mutex_timedlock", Some(Mutex)),
            ("pthread_cond_wait@@GLIBC_2.3.2", Some(Condvar)),
            ("__pthread_clockjoin_ex", Some(Join)),
            ("pthread_rwlock_wrlock", Some(RwLock)),
            ("__new_sem_wait_slow64.constprop.0", Some(Semaphore)),
            ("pthread_barrier_wait", Some(Barrier)),
            ("pthread_create", None),
            (
                "std::sys::sync::mutex::futex::Mutex::lock_contended",
                Some(RustMutex),
            ),
            (
                "std::sys::unix::locks::futex_condvar::Condvar::wait",
                Some(Condvar),
            ),
            ("std::thread::park", Some(Park)),
            (
                "parking_lot::raw_mutex::RawMutex::lock_slow",
                Some(RemoteMutex),
            ),
            ("parking_lot_core::parking_lot::park", None),
            ("app::mutex::lock", None),
            ("start_thread", None),
        ] {
            assert_eq!(Primitive::of(function), expected, "{function}");
        }
    }
}
