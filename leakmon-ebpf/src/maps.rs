//! Every map. Sizes are the defaults; user space scales some of them when it
//! loads the object.
//!
//! Two programs can run on one CPU at a time (a program can be preempted), so
//! counters are added to atomically even where there is one for each CPU.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, PerCpuArray, PerCpuHashMap, Queue, RingBuf},
};
use leakmon_common::{
    Counters, MAX_TARGETS, Parked, SiteCount, SiteKey, Target, TargetSite, WaitCount, WaitKey,
    threads::{BLOCKED_PLACES, KernelOffsets, StackCopy, ThreadEntry, WATCHED_WORDS},
    tokio::{Polls, TaskEntry},
};

/// What is known of each watched process. Written by user space only.
#[map]
pub static TARGETS: Array<Target> = Array::with_max_entries(MAX_TARGETS, 0);

/// The processes that share the links of a pool, by
/// [`leakmon_common::member_key`]. Written by user space only.
#[map]
pub static MEMBERS: HashMap<u64, u64> =
    HashMap::with_max_entries(2 * MAX_TARGETS, BPF_F_NO_PREALLOC);

/// Hits and drops of each target.
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(MAX_TARGETS, 0);

/// Spawns and exits by site.
#[map]
pub static SITES: PerCpuHashMap<TargetSite, SiteCount> =
    PerCpuHashMap::with_max_entries(16 * 1024, BPF_F_NO_PREALLOC);

/// The latest park of every goroutine struct, by
/// [`leakmon_common::parked_key`].
#[map]
pub static PARKED: HashMap<u64, Parked> = HashMap::with_max_entries(1 << 20, BPF_F_NO_PREALLOC);

/// Slots of the kinds of wait.
#[map]
pub static WAITS: HashMap<WaitKey, u32> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// Slots that are not in use. Filled by user space.
#[map]
pub static FREE_SLOTS: Queue<u32> = Queue::with_max_entries(4096, 0);

/// What is counted of each kind of wait, by slot.
#[map]
pub static WAIT_COUNTS: PerCpuArray<WaitCount> = PerCpuArray::with_max_entries(4096, 0);

/// Where this kernel's structs have their fields. Written by user space once.
#[map]
pub static KERNEL_OFFSETS: Array<KernelOffsets> = Array::with_max_entries(1, 0);

/// The process whose threads are being read. Written by user space only.
#[map]
pub static ITERATED: Array<u32> = Array::with_max_entries(1, 0);

/// The latest task of every header, by [`leakmon_common::parked_key`].
#[map]
pub static TASKS: HashMap<u64, TaskEntry> = HashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);

/// Words of entries that are being changed, by their address, where there is no
/// instruction for it (before kernel 5.12): one for each CPU, for a moment.
#[map]
pub static LOCKS: HashMap<u64, u8> = HashMap::with_max_entries(8 * 1024, 0);

/// The polls that a thread is in, by process and thread id.
#[map]
pub static POLLING: HashMap<u64, Polls> = HashMap::with_max_entries(16 * 1024, BPF_F_NO_PREALLOC);

/// A bit for each value of the low 16 bits of a watched process's id. Written by
/// user space only.
#[map]
pub static WATCHED: Array<u64> = Array::with_max_entries(WATCHED_WORDS, 0);

/// Not 0 where a watched thread has blocked, by [`blocked_place`]: others with the
/// same place are looked at more closely for nothing. It is never unset, for a
/// place may stand for several; the kernel uses the memory of its threads again.
///
/// [`blocked_place`]: leakmon_common::threads::blocked_place
#[map]
pub static BLOCKED: Array<u64> = Array::with_max_entries(BLOCKED_PLACES, 0);

/// Switches of threads, of whatever process.
#[map]
pub static SWITCHES: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// The cookies of the processes whose threads are watched. Written by user space
/// only.
#[map]
pub static PROCESSES: HashMap<u32, u64> = HashMap::with_max_entries(MAX_TARGETS, BPF_F_NO_PREALLOC);

/// Threads of watched processes, by thread id.
#[map]
pub static THREADS: HashMap<u32, ThreadEntry> =
    HashMap::with_max_entries(64 * 1024, BPF_F_NO_PREALLOC);

/// Sites of threads that are being made, by process and thread id of the maker.
#[map]
pub static CREATING: HashMap<u64, SiteKey> = HashMap::with_max_entries(8 * 1024, BPF_F_NO_PREALLOC);

/// Where the first thread of each site was made.
#[map]
pub static STACKS: HashMap<TargetSite, StackCopy> = HashMap::with_max_entries(128, 0);

/// A stack on its way to `STACKS`: too large for a program's own stack.
#[map]
pub static SCRATCH: PerCpuArray<StackCopy> = PerCpuArray::with_max_entries(1, 0);

/// What became of processes: kind and process id.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Events that found `EVENTS` full.
#[map]
pub static EVENTS_LOST: Array<u64> = Array::with_max_entries(1, 0);
