//! What holds the wakers of an idle task.
//!
//! A waker is two words, the task's header and a vtable of four functions. It
//! lies in what the task waits for, and each has a reference to the task in the
//! state word: so it is known how many there are, and when all are found.
//!
//! Most lie in the task's own cell, in a node of a list that hangs on a lock or
//! channel, or in what the cell's words lead to. The compiler orders the
//! fields of structs, so hardly any offset is relied upon: a holder is believed
//! where its parts lead to each other. What was freed or moved away may still
//! look like a waker, but its node is in no list, its timer has no deadline,
//! its `Arc` no count.

use std::ops::Range;
use std::time::Instant;

use super::layout::Version;

/// Bytes of an object that are looked at, from where a pointer leads to: the
/// shared part of an mpsc channel, 0x210, and of a watch channel, 0x180.
pub(super) const OBJECT: usize = 0x280;

/// Bytes of a list's node at the most that lie in front of its waker.
const BEFORE: u64 = 0x18;

/// Shapes that are remembered; a program has a handful.
const MAX_SHAPES: usize = 64;

/// Largest `Arc` count that is believed.
const MAX_COUNT: u64 = 1 << 32;

/// Permits that a writer takes of an RwLock: `MAX_READS`, sync/rwlock.rs.
const MAX_READS: u64 = u32::MAX as u64 >> 3;

/// `Semaphore::MAX_PERMITS`, sync/batch_semaphore.rs.
const MAX_PERMITS: u64 = u64::MAX >> 3;

/// Slots of a watch channel's list of receivers: `BigNotify`, sync/watch.rs.
const BIG: u64 = 8;

/// Bytes of a `Notify`: state, lock and list.
const NOTIFY: u64 = 32;

/// Where a `ScheduledIo` has its parts, in bytes from what a registration points
/// to.
pub(super) struct Place {
    /// It is in an `Arc` of its own, which is aligned to 128 bytes.
    is_alone: bool,
    readiness: u64,
    lock: u64,
    list: u64,
    reader: u64,
    writer: u64,
}

/// As compilers order it (runtime/io/scheduled_io.rs): since 1.32 in an `Arc`
/// and aligned to 128 bytes, until 1.28 in a slab, at 1.20 with the readiness last.
const PLACES: [Place; 3] = [
    Place {
        is_alone: true,
        readiness: 0x90,
        lock: 0x98,
        list: 0xa0,
        reader: 0xb0,
        writer: 0xc0,
    },
    Place {
        is_alone: false,
        readiness: 0,
        lock: 8,
        list: 0x10,
        reader: 0x20,
        writer: 0x30,
    },
    Place {
        is_alone: false,
        readiness: 0x40,
        lock: 0,
        list: 8,
        reader: 0x18,
        writer: 0x28,
    },
];

/// Where `version` may have the parts of a `ScheduledIo`; of an unknown one, by
/// whether a runtime's handle says its kind.
pub(super) fn places(version: Option<Version>, kinds: bool) -> &'static [Place] {
    let places = match (version.map(|version| version.minor), kinds) {
        (Some(32..), _) => 0..1,
        (Some(23..29), _) => 1..2,
        // 1.30 has it in an `Arc` that is not aligned, in another order.
        (Some(29..32), _) => 0..2,
        (Some(_), _) | (None, false) => 1..3,
        (None, true) => 0..2,
    };
    PLACES.get(places).unwrap_or_default()
}

/// Bytes of a runtime's handle, at most: nothing in it is a `ScheduledIo`.
const HANDLE: u64 = 0x280;

/// What looks like a `Registration` (runtime/io/registration.rs).
struct Registration {
    /// A runtime's.
    handle: u64,
    /// The `ScheduledIo`.
    shared: u64,
    /// Two words behind it, of which one may be the descriptor.
    fds: [u32; 2],
}

/// What a waker is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    /// The task with this header: its end.
    Join(u64),
    /// An `Acquire` in the list of a batch_semaphore.
    Acquire {
        /// Of a bounded channel.
        sender: bool,
        /// Of all permits of an RwLock.
        write: bool,
        /// Directly in an `Arc`, as no part of a channel is.
        alone: bool,
    },
    /// A `Notified` in the list of a `Notify`.
    Notified(Notify),
    /// A receiver in the list of a broadcast channel.
    Broadcast,
    /// A timer.
    Sleep(Timer),
    /// A socket, or whatever else the kernel tells the readiness of.
    Io {
        /// Its descriptor is one of the first two, or if these are none, of the
        /// others; [`NO_FD`] is none.
        fds: [u32; 4],
        /// For what; `None` when that is not clear.
        write: Option<bool>,
    },
    /// The receiver of an mpsc channel.
    Mpsc,
    /// A oneshot channel.
    Oneshot {
        /// By its receiver.
        recv: bool,
        /// By its sender, for the receiver to go.
        closed: bool,
    },
    /// A `JoinSet`, or another list of tasks.
    JoinSet,
}

/// `ScheduledIo.readiness` is below: flags, a tick, whether it is shut down.
const MAX_READINESS: u64 = 1 << 33;

/// No descriptor.
pub(super) const NO_FD: u32 = u32::MAX;

/// Whose a `Notify` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Notify {
    /// Nobody's that is known.
    Plain {
        /// Directly in an `Arc`, as no channel has it.
        alone: bool,
    },
    /// An mpsc channel's, for the receiver to go.
    Chan,
    /// A watch channel's.
    Watch {
        /// For its senders, which wait for the receivers to go, or for its
        /// receivers; `None` when that is not clear.
        closed: Option<bool>,
    },
    /// A watch channel's that is a barrier's.
    Barrier,
}

/// Where a timer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Timer {
    /// In the task.
    Own,
    /// In a box.
    Boxed,
    /// In a box with a period beside it, as an `Interval` has it.
    Periodic,
}

/// A waker, found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Where it lies.
    pub(super) at: u64,
    /// What for; `None` where nothing is proven of it.
    pub(super) holder: Option<Holder>,
}

/// Memory, as words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) addr: u64,
    pub(super) words: Vec<u64>,
}

impl Part {
    /// Of `bytes` at `addr`.
    pub(super) fn new(addr: u64, bytes: &[u8]) -> Part {
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        Part {
            addr,
            words: bytes.chunks_exact(8).map(word).collect(),
        }
    }

    fn end(&self) -> u64 {
        self.addr.saturating_add(self.words.len() as u64 * 8)
    }

    fn word(&self, addr: u64) -> Option<u64> {
        let delta = addr.checked_sub(self.addr)?;
        let word = *self.words.get(usize::try_from(delta / 8).ok()?)?;
        (delta % 8 == 0).then_some(word)
    }

    /// Whether an `Arc`'s counts are at its start.
    fn is_counted(&self) -> bool {
        matches!(self.words[..], [strong, weak, ..] if is_count(strong) && is_count(weak))
    }

    /// Each word and its address.
    fn each(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let addrs = (0..).map(|index| self.addr.wrapping_add(index * 8));
        addrs.zip(self.words.iter().copied())
    }
}

/// Whether a mutex is free: std's has 32 bits, parking_lot's a byte.
fn is_free(lock: u64) -> bool {
    lock & 0xff == 0
}

fn is_count(word: u64) -> bool {
    (1..MAX_COUNT).contains(&word)
}

/// Whether a word may be the address of something.
pub(super) fn is_pointer(word: u64) -> bool {
    word.is_multiple_of(8) && (1 << 16..1 << 47).contains(&word)
}

/// Where the fields of a node are that were met at the end of a list, for its
/// like in the middle of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// From the node to the waker.
    waker: u64,
    /// From the node to its links.
    links: u64,
    /// From the node to the pointer to what the list is in.
    pointer: u64,
    /// From there to the list.
    list: u64,
}

/// What was learned of a program's structs.
#[derive(Debug, Default)]
pub(super) struct Shapes(Vec<Shape>);

impl Shapes {
    /// Learns from the node of a waker at `at`.
    fn learn<T>(&mut self, scene: &Scene<T>, at: u64, node: Node, owner: &Owner) {
        /// Bytes between a node and the pointer that its future has, at most.
        const NEAR: u64 = 0x60;
        for (addr, word) in scene.cell.each() {
            let near = addr.abs_diff(node.start) <= NEAR;
            if !near || !owner.objects.contains(&word) || self.0.len() >= MAX_SHAPES {
                continue;
            }
            let shape = Shape {
                waker: at - node.start,
                links: node.links - node.start,
                pointer: addr.wrapping_sub(node.start),
                list: owner.list.wrapping_sub(word),
            };
            if !self.0.contains(&shape) {
                self.0.push(shape);
            }
        }
    }
}

/// Wakers of one task that are looked at: a select has as many as branches.
const MAX_WAKERS: usize = 256;

/// What is known of the tasks, for one of them.
pub(super) trait Tasks {
    /// Whether this is the address of a waker's vtable.
    fn is_waker_vtable(&self, word: u64) -> bool;

    /// Where in the task at `header` the waker of who awaits it lies: anywhere
    /// in the range; `None` when there is no such task, or nobody does.
    fn awaited(&self, header: u64) -> Option<Range<u64>>;
}

/// One idle task and what is around it.
pub(super) struct Scene<'a, T> {
    pub(super) tasks: &'a T,
    /// Its header.
    pub(super) task: u64,
    /// Its whole cell.
    pub(super) cell: &'a Part,
    /// Where in it the future is.
    pub(super) future: Range<u64>,
    /// The scheduler's word.
    pub(super) scheduler: u64,
    /// Whether a runtime's handle says its kind.
    pub(super) kinds: bool,
    /// See [`places`].
    pub(super) places: &'static [Place],
    /// What its words lead to.
    pub(super) objects: &'a [&'a Part],
    /// When there is no more time.
    pub(super) deadline: Instant,
}

/// A node in a list.
#[derive(Clone, Copy, Debug)]
struct Node {
    start: u64,
    links: u64,
    /// The word of it that is neither links nor waker.
    rest: u64,
}

/// What a list is in.
#[derive(Clone, Debug, Default)]
struct Owner {
    /// Of the list's head.
    list: u64,
    /// What was pointed to, from which the list was found.
    objects: Vec<u64>,
}

impl<T: Tasks> Scene<'_, T> {
    /// The wakers that were found, each once; none where there are more than are
    /// believed, or no time: whoever fills its memory with what looks like wakers
    /// has nothing said of it.
    pub(super) fn wakers(&self, shapes: &mut Shapes) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::new();
        let too_much =
            |found: &[Found]| found.len() >= MAX_WAKERS || Instant::now() >= self.deadline;
        for at in self.places(self.cell, |at| self.future.contains(&at)) {
            if too_much(&found) {
                return Vec::new();
            }
            // Where the cell ends is not always known.
            let behind = || (!self.kinds).then(|| self.holder(at, self.task)).flatten();
            let holder = self.own_holder(at, shapes).or_else(behind);
            found.push(Found { at, holder });
        }
        let inside = self.cell.addr..self.cell.end();
        for object in self.objects {
            for at in self.places(object, |at| !inside.contains(&at)) {
                if found.iter().any(|found| found.at == at) {
                    continue;
                }
                if too_much(&found) {
                    return Vec::new();
                }
                let holder = self.holder(at, 0);
                found.push(Found { at, holder });
            }
        }
        found
    }

    /// Where in `part` wakers of the task are.
    fn places(&self, part: &Part, within: impl Fn(u64) -> bool) -> Vec<u64> {
        let words = part.words.windows(2);
        let is = |pair: &[u64]| pair[1] == self.task && self.tasks.is_waker_vtable(pair[0]);
        part.each()
            .zip(words)
            .filter(|((at, _), pair)| is(pair) && within(*at))
            .map(|((at, _), _)| at)
            .collect()
    }

    fn object(&self, addr: u64) -> Option<&Part> {
        self.objects
            .iter()
            .copied()
            .find(|object| object.addr == addr)
    }

    /// The word at `addr`, wherever it was read.
    fn word(&self, addr: u64) -> Option<u64> {
        let parts = std::iter::once(self.cell).chain(self.objects.iter().copied());
        parts.filter_map(|part| part.word(addr)).next()
    }

    /// The future's words, and their addresses.
    fn own_words(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.cell
            .each()
            .filter(|(addr, _)| self.future.contains(addr))
    }

    /// What a waker at `at` in the task's own cell is for; `None`, too, when it
    /// may be for either of two things.
    fn own_holder(&self, at: u64, shapes: &mut Shapes) -> Option<Holder> {
        let mut found = None;
        let mut ends = self.end_nodes(at);
        ends.extend(self.middle_nodes(at, shapes));
        for (node, owner) in ends {
            let Some(holder) = self.list_holder(node, &owner) else {
                continue;
            };
            shapes.learn(self, at, node, &owner);
            if found.replace(holder).is_some_and(|other| other != holder) {
                return None;
            }
        }
        let timer = || {
            self.is_timer(at, self.cell, self.future.start)
                .then_some(Holder::Sleep(Timer::Own))
        };
        found.or_else(timer)
    }

    /// The nodes that the waker at `at` may be in, each at an end of a list,
    /// and what these are in.
    fn end_nodes(&self, at: u64) -> Vec<(Node, Owner)> {
        let mut found: Vec<(Node, Owner)> = Vec::new();
        for object in self.objects {
            for ((list, head), (_, tail)) in object.each().zip(object.each().skip(1)) {
                if !is_pointer(head) || !is_pointer(tail) || self.cell.word(list).is_some() {
                    continue;
                }
                let near = |addr: &u64| (at - BEFORE..=at).contains(addr);
                let Some(start) = [head, tail].into_iter().find(|addr| near(addr)) else {
                    continue;
                };
                let Some(node) = self.end_node(at, start, head, tail) else {
                    continue;
                };
                match found.iter_mut().find(|(_, owner)| owner.list == list) {
                    Some((_, owner)) => owner.objects.push(object.addr),
                    None => {
                        let objects = vec![object.addr];
                        found.push((node, Owner { list, objects }));
                    }
                }
            }
        }
        found
    }

    /// The node at `start`, which is at an end of a list.
    fn end_node(&self, at: u64, start: u64, head: u64, tail: u64) -> Option<Node> {
        links(start, at).find_map(|links| {
            let (prev, next) = (self.cell.word(links)?, self.cell.word(links + 8)?);
            let fits = |is_end: bool, link: u64| match is_end {
                true => link == 0,
                false => is_pointer(link),
            };
            let fits = fits(head == start, prev) && fits(tail == start, next);
            fits.then(|| self.with_rest(start, at, links)).flatten()
        })
    }

    fn with_rest(&self, start: u64, at: u64, links: u64) -> Option<Node> {
        let rest = (0..5).map(|index| start + index * 8);
        let rest = rest
            .filter(|addr| ![at, at + 8, links, links + 8].contains(addr))
            .find_map(|addr| self.cell.word(addr))?;
        Some(Node { start, links, rest })
    }

    /// The nodes that the waker at `at` may be in, each between two others, as
    /// their links prove, and what their lists are in.
    fn middle_nodes(&self, at: u64, shapes: &Shapes) -> Vec<(Node, Owner)> {
        let node = |shape: &Shape| {
            let start = at.checked_sub(shape.waker)?;
            let links = start.checked_add(shape.links)?;
            let (prev, next) = (self.cell.word(links)?, self.cell.word(links + 8)?);
            let back = self.word(prev.checked_add(shape.links + 8)?)?;
            let forth = self.word(next.checked_add(shape.links)?)?;
            let pointer = self.cell.word(start.wrapping_add(shape.pointer))?;
            let list = pointer.checked_add(shape.list)?;
            let (head, tail) = (self.word(list)?, self.word(list.checked_add(8)?)?);
            if back != start || forth != start || !is_pointer(head) || !is_pointer(tail) {
                return None;
            }
            let objects = vec![pointer];
            Some((self.with_rest(start, at, links)?, Owner { list, objects }))
        };
        shapes.0.iter().filter_map(node).collect()
    }

    /// What the list is of that a node of the task is in.
    fn list_holder(&self, node: Node, owner: &Owner) -> Option<Holder> {
        // `Interest`, io/interest.rs: READABLE 1, WRITABLE 2.
        let (write, interest) = match node.rest & 3 {
            1 => (Some(false), 1),
            2 => (Some(true), 2),
            _ => (None, 0),
        };
        for Registration { handle, shared, .. } in self.registrations() {
            let mut places = self.places.iter();
            let place = places.find(|place| {
                shared.checked_add(place.list) == Some(owner.list) && self.may_be(shared, place)
            });
            // A lock in an `Arc`, beside the pointer to it, looks like a
            // registration; at the start of one it is a lock.
            let Some(place) = place.filter(|_| !self.is_alone(shared)) else {
                continue;
            };
            let inside = handle != self.scheduler && shared.wrapping_sub(handle) < HANDLE;
            let fds = self.fds(shared);
            return (!inside && self.is_unready(shared, place, interest))
                .then_some(Holder::Io { fds, write });
        }
        for object in owner.objects.iter().filter_map(|addr| self.object(*addr)) {
            // `notification`: none so far, which is 2 in a byte in old versions.
            if self.is_notify(object, owner.list) && [0, 2].contains(&(node.rest & 0xff)) {
                return Some(Holder::Notified(self.notify_of(object.addr)));
            }
            if self.is_semaphore(object, owner.list) && (1..=MAX_PERMITS).contains(&node.rest) {
                let near = node.start.saturating_sub(0x18)..node.start + 0x40;
                let mut own = self.cell.each();
                // Before 1.38 it has 32 bits.
                let is_all = |word: u64| {
                    word == MAX_READS || word as u32 == MAX_READS as u32 || word >> 32 == MAX_READS
                };
                let write = own.any(|(addr, word)| near.contains(&addr) && is_all(word));
                return Some(Holder::Acquire {
                    sender: self.is_of_chan(object.addr, |chan| chan.semaphore),
                    write,
                    alone: self.is_alone(object.addr),
                });
            }
        }
        let shared = owner.objects.iter().filter_map(|addr| self.object(*addr));
        let mut shared = shared.filter(|object| object.is_counted());
        // `queued`, a flag.
        (node.rest & 0xff == 1 && shared.any(|object| owner.list >= object.addr + 0x10))
            .then_some(Holder::Broadcast)
    }

    /// Whether a `Notify` with this list is at `object`, and somebody waits:
    /// state, lock, list.
    fn is_notify(&self, object: &Part, list: u64) -> bool {
        let word = |at: u64| object.word(object.addr + at);
        // WAITING.
        let waits = word(0).is_some_and(|state| state & 3 == 1);
        list == object.addr + 0x10 && waits && word(8).is_some_and(is_free)
    }

    /// Whose the `Notify` at `addr` is.
    fn notify_of(&self, addr: u64) -> Notify {
        if self.is_of_chan(addr, |chan| chan.closed) {
            return Notify::Chan;
        }
        let calls = self.word(addr).map(|state| state >> 2);
        let slot = |at: u64| {
            let field = |field: u64| self.word(at + field);
            let state = field(0)?;
            let waits = state & 3 == 1;
            let ends = [field(0x10)?, field(0x18)?];
            let mut ends = ends.iter();
            let is = Some(state >> 2) == calls
                && is_free(field(8)?)
                && ends.all(|end| (*end != 0) == waits && (*end == 0 || is_pointer(*end)));
            Some(is)
        };
        // Those that lie side by side with this one among them: how many, and how
        // many before it.
        let run = |first: u64| {
            let is = |at: &u64| *at >= first && slot(*at) == Some(true);
            let before = (1..=BIG + 1)
                .map_while(|index| addr.checked_sub(index * NOTIFY).filter(is))
                .count() as u64;
            let behind = (1..=BIG + 1).map_while(|index| Some(addr + index * NOTIFY).filter(is));
            (before, before + 1 + behind.count() as u64)
        };
        let shared = self.objects.iter().copied().find_map(|object| {
            let first = object.addr + 0x10;
            if !object.is_counted() || addr < first {
                return None;
            }
            let (before, all) = run(first);
            let end = addr + (all - before) * NOTIFY;
            let counts = (0..12).filter_map(|index| object.word(end + index * 8));
            // Receivers and senders, among what is behind.
            let has_ends = counts.filter(|word| (1..1 << 24).contains(word)).count() >= 1;
            (all >= BIG && has_ends).then_some((object, before, all))
        });
        let Some((shared, before, all)) = shared else {
            let alone = self.is_alone(addr);
            return Notify::Plain { alone };
        };
        // The sender's own lies behind the receivers', and is like them until
        // something is sent.
        let closed = match all {
            BIG => Some(false),
            _ if all == BIG + 1 => Some(before == BIG),
            _ => None,
        };
        // A barrier has both ends of its channel.
        let barrier = self.objects.iter().any(|object| {
            let ends = object.words.iter().take(12);
            object.addr != shared.addr && ends.filter(|word| **word == shared.addr).count() >= 2
        });
        match barrier {
            true => Notify::Barrier,
            false => Notify::Watch { closed },
        }
    }

    /// Whether a batch_semaphore with this list is at `object`: lock, list,
    /// `closed`, and no permits, for somebody waits.
    fn is_semaphore(&self, object: &Part, list: u64) -> bool {
        let word = |at: u64| object.word(object.addr + at);
        list == object.addr + 8
            && word(0).is_some_and(is_free)
            && word(0x18).is_some_and(|closed| closed & 0xff == 0)
            && word(0x20) == Some(0)
    }

    /// Whether an `Arc` has what is at `addr` at its start.
    fn is_alone(&self, addr: u64) -> bool {
        let arc = addr.checked_sub(0x10).and_then(|arc| self.object(arc));
        arc.is_some_and(Part::is_counted)
    }

    /// Whether `addr` is a field of the shared part of an mpsc channel.
    fn is_of_chan(&self, addr: u64, field: impl Fn(&Chan) -> u64) -> bool {
        let mut around = self.objects.iter();
        around.any(|object| {
            chan(object).is_some_and(|chan| object.addr.checked_add(field(chan)) == Some(addr))
        })
    }

    /// What the kernel tells the readiness of: where its state is, and two words
    /// of which one is the descriptor. `Registration` is a handle of the
    /// runtime, of one of two kinds, and a pointer; in `PollEvented` the
    /// descriptor follows, in debug builds behind another word (mio's).
    fn registrations(&self) -> impl Iterator<Item = Registration> + '_ {
        let parts = std::iter::once(self.cell).chain(self.objects.iter().copied());
        parts.flat_map(|part| {
            let words = part.words.windows(4).enumerate();
            words.filter_map(|(index, words)| {
                let (kind, handle, shared) = (words[0] as u32, words[1], words[2]);
                let fd = words[3] as u32;
                let further = part.words.get(index + 4).map_or(NO_FD, |word| *word as u32);
                let is = is_pointer(shared)
                    && shared != handle
                    && fd < 1 << 20
                    && (handle == self.scheduler || self.is_handle(kind, handle));
                is.then_some(Registration {
                    handle,
                    shared,
                    fds: [fd, further],
                })
            })
        })
    }

    /// Whether what is at `shared` may have its parts at `place`.
    fn may_be(&self, shared: u64, place: &Place) -> bool {
        let is_counted = || self.object(shared).is_some_and(Part::is_counted);
        !place.is_alone || shared.is_multiple_of(128) && is_counted()
    }

    /// The descriptors of what has its state at `shared`. What was moved away
    /// may have left others.
    fn fds(&self, shared: u64) -> [u32; 4] {
        let mut fds = [NO_FD; 4];
        let mut add = |slots: Range<usize>, fd: u32| {
            if !fds[slots.clone()].contains(&fd)
                && let Some(free) = fds[slots].iter_mut().find(|fd| **fd == NO_FD)
            {
                *free = fd;
            }
        };
        for registration in self.registrations().filter(|it| it.shared == shared) {
            let [fd, further] = registration.fds;
            add(0..2, fd);
            add(2..4, further);
        }
        fds
    }

    /// Whether `handle` is a runtime's: one of two kinds, and an `Arc`; only an
    /// `Arc` before 1.23.
    fn is_handle(&self, kind: u32, handle: u64) -> bool {
        (kind <= 1 || !self.kinds)
            && (handle == self.scheduler && handle != 0
                || self.object(handle).is_some_and(Part::is_counted))
    }

    /// Whether a timer holds the waker at `at` of `part`: an entry that is
    /// registered with the time driver says twice when it is due, in
    /// milliseconds, in front of its waker; at 1.20 the second time behind it.
    fn is_timer(&self, at: u64, part: &Part, start: u64) -> bool {
        /// Five hundred years. No heap lies so low.
        const LATEST: u64 = 1 << 44;
        let before = |words: u64| {
            let addr = at.checked_sub(words * 8).filter(|addr| *addr >= start)?;
            part.word(addr)
        };
        let is_due = |due: &u64| (2..LATEST).contains(due) && self.object(*due).is_none();
        let earlier =
            |due: u64, times| (1..=24).filter(|far| before(*far) == Some(due)).count() >= times;
        // AtomicWaker: nobody is just registering or waking.
        let rests = part.word(at + 16) == Some(0);
        if !self.kinds {
            let due = part.word(at + 0x80).filter(is_due);
            return rests && due.is_some_and(|due| earlier(due, 1));
        }
        let mut near = (1..=3).filter_map(before).filter(is_due);
        let due = near.any(|due| earlier(due, 2));
        let handle = (1..=32).any(|far| {
            let kind = before(far + 1).unwrap_or(0) as u32;
            before(far).is_some_and(|handle| self.is_handle(kind, handle))
        });
        due && rests && handle
    }

    /// What a waker at `at` in what the task's words lead to is for. What lies
    /// beside it in memory is looked at, too: so what is known by more counts
    /// before what is known by less.
    ///
    /// Only what lies behind `from` is looked at.
    fn holder(&self, at: u64, from: u64) -> Option<Holder> {
        let objects = || {
            let around = self.objects.iter().copied();
            around.filter(|object| object.addr > from && object.word(at).is_some())
        };
        let one = |holders: Vec<Holder>| {
            let first = *holders.first()?;
            Some(holders.iter().all(|other| *other == first).then_some(first))
        };
        let shared = objects().filter_map(|object| self.shared_holder(at, object));
        let counted = || objects().filter_map(|object| self.counted_holder(at, object));
        one(shared.collect())
            .or_else(|| one(counted().collect()))
            .flatten()
    }

    /// What is known for certain to hold the waker at `at` in `object`.
    fn shared_holder(&self, at: u64, object: &Part) -> Option<Holder> {
        let awaited = self.tasks.awaited(object.addr);
        if awaited.is_some_and(|awaited| awaited.contains(&at)) {
            return Some(Holder::Join(object.addr));
        }
        let rests = object.word(at + 16) == Some(0);
        if let Some(chan) = chan(object).filter(|_| rests)
            && chan.wakers.iter().any(|waker| object.addr + waker == at)
        {
            return Some(Holder::Mpsc);
        }
        for Registration { shared, .. } in self.registrations() {
            for place in self.places.iter().filter(|it| self.may_be(shared, it)) {
                let write = match at.checked_sub(shared) {
                    Some(at) if at == place.reader => false,
                    Some(at) if at == place.writer => true,
                    _ => continue,
                };
                if self.is_unready(shared, place, 1 + u64::from(write)) {
                    return Some(Holder::Io {
                        fds: self.fds(shared),
                        write: Some(write),
                    });
                }
            }
        }
        None
    }

    /// Whether what has its state at `shared` is not ready for `interest`: who waits
    /// does so because it is not. `Ready`, io/ready.rs: READABLE 1, WRITABLE 2.
    fn is_unready(&self, shared: u64, place: &Place, interest: u64) -> bool {
        let word = |at| self.word(shared.checked_add(at)?);
        word(place.lock).is_some_and(is_free)
            && word(place.readiness)
                .is_some_and(|ready| ready & interest == 0 && ready < MAX_READINESS)
    }

    /// What seems to hold the waker at `at` in `object`.
    fn counted_holder(&self, at: u64, object: &Part) -> Option<Holder> {
        if self.is_timer(at, object, object.addr) {
            return Some(Holder::Sleep(self.boxed(object.addr)));
        }
        if !object.is_counted() {
            return None;
        }
        let oneshot = self.oneshot(at, object);
        if oneshot.is_some() {
            return oneshot;
        }
        // `Lists`, util/idle_notified_set.rs: lock, the list of the tasks that
        // have ended, that of the others, the waker.
        let words = object.words.get(2..7)?;
        let is_list = |ends: &[u64]| is_pointer(ends[0]) && is_pointer(ends[1]);
        let is = at == object.addr + 0x38
            && is_free(words[0])
            && (words[1..3] == [0, 0] || is_list(&words[1..3]))
            && is_list(&words[3..5]);
        is.then_some(Holder::JoinSet)
    }

    /// Whether the box at `addr` is an `Interval`'s: its period is beside it.
    fn boxed(&self, addr: u64) -> Timer {
        let words = || self.own_words().map(|(_, word)| word);
        let all: Vec<u64> = words().collect();
        let periodic = all.windows(4).any(|near| {
            let at = near.iter().position(|word| *word == addr);
            let nanos = |word: u64| (word as u32) < 1_000_000_000;
            match at {
                Some(0) => near[1] < 1 << 40 && nanos(near[2]),
                Some(2) => near[0] < 1 << 40 && nanos(near[1]),
                _ => false,
            }
        });
        match periodic {
            true => Timer::Periodic,
            false => Timer::Boxed,
        }
    }

    /// The shared part of a oneshot channel: the sender's waker, the
    /// receiver's, then the state (sync/oneshot.rs: RX_TASK_SET 1, VALUE_SENT
    /// 2, CLOSED 4, TX_TASK_SET 8).
    fn oneshot(&self, at: u64, object: &Part) -> Option<Holder> {
        let [strong, weak, ..] = object.words[..] else {
            return None;
        };
        if !(1..=2).contains(&strong) || weak != 1 {
            return None;
        }
        let state = |addr: u64| object.word(addr);
        let recv =
            at >= object.addr + 0x20 && state(at + 16).is_some_and(|state| [1, 9].contains(&state));
        let closed =
            at >= object.addr + 0x10 && state(at + 32).is_some_and(|state| [8, 9].contains(&state));
        (recv || closed).then_some(Holder::Oneshot { recv, closed })
    }
}

/// Where the shared part of an mpsc channel has what it is known by
/// (sync/mpsc/chan.rs), in bytes behind the counts of its `Arc`.
struct Chan {
    /// `list::Tx`: the block that is written to, and the position in the list
    /// of blocks.
    tx: u64,
    /// `list::Rx`: the block that is read from, the first that is to be used
    /// again, and the position.
    rx: u64,
    /// The receiver's waker, of a bounded channel and of another.
    wakers: &'static [u64],
    /// `notify_rx_closed`.
    closed: u64,
    /// The semaphore of a bounded channel.
    semaphore: u64,
}

/// As compilers since Rust 1.67 order it: since tokio 1.33 in cache lines of
/// their own, and before.
const CHANS: [Chan; 2] = [
    Chan {
        tx: 0x80,
        rx: 0x1a0,
        wakers: &[0x100],
        closed: 0x180,
        semaphore: 0x1c0,
    },
    Chan {
        tx: 0x50,
        rx: 0x30,
        wakers: &[0x90, 0x68],
        closed: 0x10,
        semaphore: 0x60,
    },
];

/// Whether `object` is the shared part of an mpsc channel: its sender is not
/// behind its receiver, and both are in one block of 32, or in later ones.
fn chan(object: &Part) -> Option<&'static Chan> {
    /// `BLOCK_CAP`, sync/mpsc/mod.rs.
    const BLOCK: u64 = 32;
    /// Messages in all that are believed.
    const MOST: u64 = 1 << 48;
    if !object.is_counted() {
        return None;
    }
    CHANS.iter().find(|chan| {
        let word = |at: u64| object.word(object.addr + at);
        let (Some(tail), Some(sent)) = (word(chan.tx), word(chan.tx + 8)) else {
            return false;
        };
        let (Some(head), Some(free)) = (word(chan.rx), word(chan.rx + 8)) else {
            return false;
        };
        let received = word(chan.rx + 16);
        let blocks = [tail, head, free].iter().all(|block| is_pointer(*block));
        let one = tail == head && head == free;
        blocks
            && sent < MOST
            && received.is_some_and(|received| received <= sent)
            && (one || sent >= BLOCK)
    })
}

/// Where the links of a node at `start` with a waker at `at` can be: the node
/// has five words.
fn links(start: u64, at: u64) -> impl Iterator<Item = u64> {
    let places = (0..4).map(move |index| start + index * 8);
    places.filter(move |links| links + 16 <= at || *links >= at + 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: u64 = 0x5555_0000_1000;
    const VTABLE: u64 = 0x5555_7777_0630;
    const LOCK: u64 = 0x5555_0000_9000;
    const SCHEDULER: u64 = 0x5555_0000_8000;
    const OTHER: u64 = 0x5555_0000_2000;

    /// Knows the waker's vtable, and that somebody awaits the task at [`OTHER`].
    struct Known;

    impl Tasks for Known {
        fn is_waker_vtable(&self, word: u64) -> bool {
            word == VTABLE
        }

        fn awaited(&self, header: u64) -> Option<Range<u64>> {
            (header == OTHER).then_some(OTHER + 0x60..OTHER + 0x61)
        }
    }

    /// A cell whose future has these words, from 0x30 on.
    fn cell(future: &[u64]) -> Part {
        let mut words = vec![0xc8, 0, 0x5555_6666_0000, 1, SCHEDULER, 7];
        words.extend(future);
        Part { addr: TASK, words }
    }

    fn part(addr: u64, words: &[u64]) -> Part {
        let words = words.to_vec();
        Part { addr, words }
    }

    fn scene<'a>(cell: &'a Part, objects: &'a [&'a Part]) -> Scene<'a, Known> {
        Scene {
            tasks: &Known,
            task: TASK,
            cell,
            future: TASK + 0x30..cell.end(),
            scheduler: SCHEDULER,
            kinds: true,
            places: places(None, true),
            objects,
            deadline: Instant::now() + std::time::Duration::from_secs(60),
        }
    }

    fn look(cell: &Part, objects: &[Part], shapes: &mut Shapes) -> Vec<Found> {
        let objects: Vec<&Part> = objects.iter().collect();
        scene(cell, &objects).wakers(shapes)
    }

    fn holder(cell: &Part, objects: &[Part]) -> Option<Holder> {
        let found = look(cell, objects, &mut Shapes::default());
        assert_eq!(found.len(), 1, "{found:x?}");
        found[0].holder
    }

    /// The words of an `Acquire` in a cell, of which the node is at 0x38.
    fn acquire(prev: u64, next: u64) -> Part {
        cell(&[LOCK, VTABLE, TASK, prev, next, 1, 1, 1])
    }

    const NODE: u64 = TASK + 0x38;

    #[test]
    fn a_lock_whose_list_leads_to_the_task() {
        let alone = acquire(0, 0);
        let lock = part(LOCK, &[0, NODE, NODE, 0, 0, 0]);
        let expected = Holder::Acquire {
            sender: false,
            write: false,
            alone: false,
        };
        assert_eq!(holder(&alone, &[lock]), Some(expected));
        for lock in [
            // Nobody is in it, it has permits, it is held just now.
            [0, 0, 0, 0, 0, 0],
            [0, NODE, NODE, 0, 2, 0],
            [1, NODE, NODE, 0, 0, 0],
        ] {
            assert_eq!(holder(&alone, &[part(LOCK, &lock)]), None, "{lock:x?}");
        }
        // The links do not say the same as the list.
        assert_eq!(
            holder(&acquire(0, LOCK), &[part(LOCK, &[0, NODE, NODE, 0, 0, 0])]),
            None
        );
    }

    /// In a cell are, in this order, what looks like a registration at tokio
    /// before 1.23: an `Arc`, what its list is behind, a small number.
    #[test]
    fn a_cell_that_has_a_lock_beside_its_arc_waits_for_no_socket() {
        let words = [2, 1, 7, 0, NODE, NODE, 0, 0, 0, 0, 0, 0];
        let lock = part(LOCK, &words[3..]);
        // The lock is not the first in the `Arc`: it may be another's state.
        let task = cell(&[LOCK, VTABLE, TASK, 0, 0, 1, LOCK - 0x18, LOCK, 1, 1]);
        let arc = part(LOCK - 0x18, &words);
        let objects = [&arc, &lock];
        let inside = Scene {
            kinds: false,
            places: places(None, false),
            ..scene(&task, &objects)
        };
        assert_eq!(inside.wakers(&mut Shapes::default())[0].holder, None);
        let task = cell(&[LOCK, VTABLE, TASK, 0, 0, 1, LOCK - 0x10, LOCK, 1, 1]);
        let mut words = words[1..].to_vec();
        words[..2].copy_from_slice(&[2, 1]);
        let once = part(LOCK - 0x10, &words);
        let objects = [&once, &lock];
        let scene = Scene {
            kinds: false,
            places: places(None, false),
            ..scene(&task, &objects)
        };
        let found = scene.wakers(&mut Shapes::default());
        let alone = matches!(
            found[..],
            [Found {
                holder: Some(Holder::Acquire { alone: true, .. }),
                ..
            }]
        );
        assert!(alone, "{found:x?}");
    }

    /// In a cell are, in this order, an `Arc`, another, a small number, and the
    /// list that the task is in lies in memory behind the second.
    #[test]
    fn what_lies_behind_another_arc_is_no_socket() {
        let io = |shared: u64, strong: u64| {
            let task = cell(&[shared, VTABLE, TASK, 0, 0, 2, 0, OTHER, shared, 2, 1]);
            let handle = part(OTHER, &[3, 1, 0, 0]);
            let mut words = [0; 30];
            words[..2].copy_from_slice(&[strong, 1]);
            words[0x90 / 8..0xb0 / 8].copy_from_slice(&[1, 0, NODE, NODE]);
            let state = part(shared, &words);
            let objects = [&handle, &state];
            scene(&task, &objects).wakers(&mut Shapes::default())[0].holder
        };
        assert!(matches!(io(0x5555_0000_c080, 2), Some(Holder::Io { .. })));
        // It is not aligned; it has no counts.
        assert_eq!(io(0x5555_0000_c060, 2), None);
        assert_eq!(io(0x5555_0000_c080, 0), None);
    }

    #[test]
    fn where_each_version_has_its_sockets() {
        let first = |version: Option<u32>, kinds| {
            let version = version.map(|minor| Version { minor, patch: 0 });
            let places = places(version, kinds).iter();
            places.map(|place| place.readiness).collect::<Vec<_>>()
        };
        assert_eq!(first(Some(54), true), [0x90]);
        assert_eq!(first(Some(28), true), [0]);
        assert_eq!(first(Some(20), false), [0, 0x40]);
        assert_eq!(first(None, true), [0x90, 0]);
    }

    #[test]
    fn a_list_of_those_that_wait_for_a_socket() {
        const STATE: u64 = 0x5555_0000_c000;
        // `Readiness` of 1.20: the state, the waker, the links, for what.
        let task = cell(&[STATE, VTABLE, TASK, 0, 0, 1, OTHER, STATE, 17, 1]);
        let handle = part(OTHER, &[3, 1, 0, 0]);
        let state = |lock, readiness| part(STATE, &[lock, NODE, NODE, 0, 0, 0, 0, 0, readiness, 0]);
        let io = |state: Part| {
            let objects = [&handle, &state];
            let scene = Scene {
                kinds: false,
                places: places(None, false),
                ..scene(&task, &objects)
            };
            scene.wakers(&mut Shapes::default())[0].holder
        };
        let expected = Holder::Io {
            fds: [17, NO_FD, 1, NO_FD],
            write: Some(false),
        };
        assert_eq!(io(state(0, 2)), Some(expected));
        // It is ready; it is held just now; that is no readiness.
        for state in [state(0, 1), state(1, 2), state(0, STATE)] {
            assert_eq!(io(state.clone()), None, "{state:x?}");
        }
    }

    #[test]
    fn a_node_in_the_middle_is_believed_by_its_links() {
        let mut shapes = Shapes::default();
        let (before, behind) = (0x5555_0000_a000, 0x5555_0000_b000);
        let middle = acquire(before, behind);
        let lock = part(LOCK, &[0, before, behind, 0, 0, 0]);
        let neighbours = |back: u64, forth: u64| {
            let before = part(before, &[VTABLE, OTHER, 0, back, 1]);
            let behind = part(behind, &[VTABLE, OTHER, forth, 0, 1]);
            [lock.clone(), before, behind]
        };
        let linked = neighbours(NODE, NODE);
        // Where the fields are is learned from one at the end.
        assert_eq!(look(&middle, &linked, &mut shapes)[0].holder, None);
        look(
            &acquire(0, 0),
            &[part(LOCK, &[0, NODE, NODE, 0, 0, 0])],
            &mut shapes,
        );
        let found = look(&middle, &linked, &mut shapes)[0].holder;
        assert!(matches!(found, Some(Holder::Acquire { .. })), "{found:?}");
        assert_eq!(
            look(&middle, &neighbours(NODE, 0), &mut shapes)[0].holder,
            None
        );
    }

    #[test]
    fn a_notify_and_a_timer() {
        let future = [LOCK, 0, 0, 0, VTABLE, TASK, 0, 1];
        let node = TASK + 0x40;
        let plain = Holder::Notified(Notify::Plain { alone: false });
        let waits = part(LOCK, &[5, 0, node, node]);
        assert_eq!(holder(&cell(&future), &[waits]), Some(plain));
        let notified = part(LOCK, &[6, 0, node, node]);
        assert_eq!(holder(&cell(&future), &[notified]), None);
        let timer = |due, cached| cell(&[1, SCHEDULER, 0, 0, cached, due, VTABLE, TASK, 0]);
        let sleep = Some(Holder::Sleep(Timer::Own));
        assert_eq!(holder(&timer(3_600_042, 3_600_042), &[]), sleep);
        // It has fired; it is another number.
        assert_eq!(holder(&timer(u64::MAX, u64::MAX), &[]), None);
        assert_eq!(holder(&timer(3_600_042, 3_600_041), &[]), None);
    }

    #[test]
    fn what_lies_elsewhere() {
        let leads = cell(&[LOCK, OTHER]);
        let mut task = vec![0; 16];
        task[12..14].copy_from_slice(&[VTABLE, TASK]);
        assert_eq!(
            holder(&leads, &[part(OTHER, &task)]),
            Some(Holder::Join(OTHER))
        );
        let oneshot = |counts: [u64; 2], state| {
            part(LOCK, &[counts[0], counts[1], 9, 9, VTABLE, TASK, state, 0])
        };
        let recv = Holder::Oneshot {
            recv: true,
            closed: false,
        };
        assert_eq!(holder(&leads, &[oneshot([2, 1], 1)]), Some(recv));
        // It was sent; it was freed.
        assert_eq!(holder(&leads, &[oneshot([2, 1], 3)]), None);
        assert_eq!(holder(&leads, &[oneshot([0, 0], 1)]), None);
    }

    #[test]
    fn any_words_give_an_answer() {
        let interesting = [
            0,
            1,
            2,
            8,
            TASK,
            VTABLE,
            LOCK,
            OTHER,
            NODE,
            SCHEDULER,
            u64::MAX,
            1 << 63,
            40,
            !7,
        ];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            interesting[(state % interesting.len() as u64) as usize]
        };
        let mut shapes = Shapes::default();
        for len in 0..2000 {
            let words: Vec<u64> = (0..len % 60).map(|_| next()).collect();
            let objects = [
                part(LOCK, &(0..80).map(|_| next()).collect::<Vec<_>>()),
                part(OTHER, &(0..7).map(|_| next()).collect::<Vec<_>>()),
                part(u64::MAX - 7, &[next()]),
                Part::default(),
            ];
            look(&cell(&words), &objects, &mut shapes);
        }
        assert!(shapes.0.len() <= MAX_SHAPES);
    }
}
