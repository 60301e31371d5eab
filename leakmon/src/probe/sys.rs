//! The calls of bpf(2) that aya 0.14 does not make: programs and links of
//! `BPF_TRACE_UPROBE_MULTI`, and batches of map entries.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use aya::Pod;
use aya_obj::generated::bpf_insn;

// Numbers of include/uapi/linux/bpf.h.
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_NOEXIST: u64 = 1;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;
const BPF_TRACE_UPROBE_MULTI: u32 = 48;
const BPF_TRACE_UPROBE_SESSION: u32 = 57;
const BPF_PERF_EVENT: u32 = 41;
const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;

// Numbers of include/uapi/linux/perf_event.h: `_IOW('$', 8, __u32)` and
// `_IO('$', 0)`.
const PERF_EVENT_IOC_SET_BPF: libc::Ioctl = 0x4004_2408;
const PERF_EVENT_IOC_ENABLE: libc::Ioctl = 0x2400;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;

/// What a program is loaded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProgramType {
    /// For nothing but to try what a kernel has.
    SocketFilter,
    /// For [`attach_uprobe`].
    Uprobe,
    /// For [`link_uprobes`].
    UprobeMulti,
    /// For [`link_uprobes`]: a program that sees a call and its return.
    UprobeSession,
    /// For [`link_tracepoint`].
    RawTracepoint,
    /// For [`iterate_tasks`]; the BTF id of the kernel's `bpf_iter_task`.
    TaskIterator(u32),
}

impl ProgramType {
    /// `bpf_attr`'s `prog_type`, `expected_attach_type` and `attach_btf_id`.
    fn numbers(self) -> (u32, u32, u32) {
        match self {
            ProgramType::SocketFilter => (BPF_PROG_TYPE_SOCKET_FILTER, 0, 0),
            ProgramType::Uprobe => (BPF_PROG_TYPE_KPROBE, 0, 0),
            ProgramType::UprobeMulti => (BPF_PROG_TYPE_KPROBE, BPF_TRACE_UPROBE_MULTI, 0),
            ProgramType::UprobeSession => (BPF_PROG_TYPE_KPROBE, BPF_TRACE_UPROBE_SESSION, 0),
            ProgramType::RawTracepoint => (BPF_PROG_TYPE_RAW_TRACEPOINT, 0, 0),
            ProgramType::TaskIterator(id) => (BPF_PROG_TYPE_TRACING, BPF_TRACE_ITER, id),
        }
    }
}

/// Bytes of verifier output that are taken when a program is refused: the most
/// that kernels before 5.13 give (`bpf_check`, kernel/bpf/verifier.c). Why it is
/// refused stands at the end.
const LOG_SIZE: usize = (1 << 24) - 1;

/// Lines of it that are kept.
const LOG_LINES: usize = 16;

/// `bpf_attr` of `BPF_PROG_LOAD`, as far as it is used.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

/// `bpf_attr` of `BPF_LINK_CREATE` with its `uprobe_multi` part.
#[repr(C)]
#[derive(Clone, Copy)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    ref_ctr_offsets: u64,
    cookies: u64,
    cnt: u32,
    multi_flags: u32,
    pid: u32,
    reserved: u32,
}

/// `bpf_attr` of `BPF_LINK_CREATE` with its iterator part.
#[repr(C)]
#[derive(Clone, Copy)]
struct IteratorLink {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_len: u32,
    reserved: u32,
}

/// `bpf_iter_link_info` for the task iterator (kernel 6.1 and later).
#[repr(C)]
#[derive(Clone, Copy)]
struct TaskInfo {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    reserved: u32,
}

/// `bpf_attr` of `BPF_ITER_CREATE`.
#[repr(C)]
#[derive(Clone, Copy)]
struct IteratorCreate {
    link_fd: u32,
    flags: u32,
}

/// `bpf_attr` of the batch calls.
#[repr(C)]
#[derive(Clone, Copy)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Calls bpf(2). `attr` holds no padding.
///
/// # Safety
///
/// Every pointer in `attr` must be valid for what `command` does with it.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes size_of::<T>() bytes at `attr`; the
    // caller vouches for the pointers in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Loads a program. The error's second part is the end of the verifier's output:
/// empty where it did not come to the verifier.
pub(super) fn load_program(
    name: &str,
    program_type: ProgramType,
    instructions: &[bpf_insn],
    license: &CStr,
) -> Result<OwnedFd, (io::Error, String)> {
    let (prog_type, expected_attach_type, attach_btf_id) = program_type.numbers();
    let load = |log: &mut [u8]| {
        let mut prog_name = [0; 16];
        for (to, from) in prog_name.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        let mut attr = ProgLoad {
            prog_type,
            insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            insns: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            log_level: u32::from(!log.is_empty()),
            log_size: u32::try_from(log.len()).map_err(io::Error::other)?,
            log_buf: if log.is_empty() {
                0
            } else {
                log.as_mut_ptr() as u64
            },
            kern_version: 0,
            prog_flags: 0,
            prog_name,
            prog_ifindex: 0,
            expected_attach_type,
            prog_btf_fd: 0,
            func_info_rec_size: 0,
            func_info: 0,
            func_info_cnt: 0,
            line_info_rec_size: 0,
            line_info: 0,
            line_info_cnt: 0,
            attach_btf_id,
        };
        // SAFETY: the pointers are of slices that outlive the call, with their
        // own lengths, and of a terminated string.
        unsafe { bpf(BPF_PROG_LOAD, &mut attr) }.and_then(owned)
    };
    load(&mut []).map_err(|error| {
        let mut log = vec![0; LOG_SIZE];
        let _ = load(&mut log);
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..end]);
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
        (error, last.join("\n"))
    })
}

/// When a program of uprobes runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// At the instruction.
    Entry,
    /// When the function returns of which it is a part.
    Return,
    /// Both; the program is a [`ProgramType::UprobeSession`].
    Session,
}

/// Attaches `program` at every offset of the file `path` for one process. What
/// is attached goes when the descriptor is closed.
pub(super) fn link_uprobes(
    program: BorrowedFd<'_>,
    when: When,
    path: &str,
    offsets: &[u64],
    cookies: &[u64],
    pid: u32,
) -> io::Result<OwnedFd> {
    if offsets.len() != cookies.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let path = CString::new(path)?;
    let mut attr = LinkCreate {
        prog_fd: raw(program),
        target_fd: 0,
        attach_type: match when {
            When::Session => BPF_TRACE_UPROBE_SESSION,
            When::Entry | When::Return => BPF_TRACE_UPROBE_MULTI,
        },
        flags: 0,
        path: path.as_ptr() as u64,
        offsets: offsets.as_ptr() as u64,
        ref_ctr_offsets: 0,
        cookies: cookies.as_ptr() as u64,
        cnt: u32::try_from(offsets.len()).map_err(io::Error::other)?,
        multi_flags: if when == When::Return {
            BPF_F_UPROBE_MULTI_RETURN
        } else {
            0
        },
        pid,
        reserved: 0,
    };
    // SAFETY: a terminated string and two slices of `cnt` elements, all of which
    // outlive the call.
    unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.and_then(owned)
}

/// `struct perf_event_attr` of include/uapi/linux/perf_event.h, as far as
/// `PERF_ATTR_SIZE_VER1`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PerfEvent {
    event_type: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
}

/// `bpf_attr` of `BPF_LINK_CREATE` with its part for perf events.
#[repr(C)]
#[derive(Clone, Copy)]
struct PerfLink {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    cookie: u64,
}

/// Where the kernel describes its perf events of uprobes.
const UPROBE_PMU: &str = "/sys/bus/event_source/devices/uprobe";

/// What makes the event one of a function's return: the bit of `config` that the
/// kernel names (`config:0`).
fn return_bit() -> io::Result<u64> {
    let format = std::fs::read_to_string(format!("{UPROBE_PMU}/format/retprobe"))?;
    let bit = format
        .trim()
        .strip_prefix("config:")
        .and_then(|bit| bit.parse().ok());
    let mask = bit.and_then(|bit| 1u64.checked_shl(bit));
    mask.ok_or_else(|| io::Error::other("the kernel does not say how it probes returns"))
}

/// An instruction of a process that has a program, until it is dropped.
#[derive(Debug)]
pub(super) struct Uprobe {
    // In this order: the link holds the event.
    _link: Option<OwnedFd>,
    _event: OwnedFd,
}

/// Attaches `program` at an offset of the file `path` for one process, by a perf
/// event. Without a cookie the kernel need not know such.
pub(super) fn attach_uprobe(
    program: BorrowedFd<'_>,
    when: When,
    path: &str,
    offset: u64,
    cookie: Option<u64>,
    pid: u32,
) -> io::Result<Uprobe> {
    let event_type = std::fs::read_to_string(format!("{UPROBE_PMU}/type"))?;
    let path = CString::new(path)?;
    let attr = PerfEvent {
        event_type: event_type.trim().parse().map_err(io::Error::other)?,
        size: u32::try_from(size_of::<PerfEvent>()).map_err(io::Error::other)?,
        config: match when {
            When::Entry => 0,
            When::Return => return_bit()?,
            When::Session => return Err(io::ErrorKind::Unsupported.into()),
        },
        sample_period: 0,
        sample_type: 0,
        read_format: 0,
        flags: 0,
        wakeup_events: 0,
        bp_type: 0,
        config1: path.as_ptr() as u64,
        config2: offset,
    };
    let (any_cpu, no_group) = (-1, -1);
    // SAFETY: the kernel reads the struct, which has the size that it says, and
    // the terminated string in it; both outlive the call.
    let event = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attr,
            pid.cast_signed(),
            any_cpu,
            no_group,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if event < 0 {
        return Err(io::Error::last_os_error());
    }
    let event = owned(event)?;
    let link = match cookie {
        Some(cookie) => {
            let mut attr = PerfLink {
                prog_fd: raw(program),
                target_fd: raw(event.as_fd()),
                attach_type: BPF_PERF_EVENT,
                flags: 0,
                cookie,
            };
            // SAFETY: no pointers.
            Some(unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.and_then(owned)?)
        }
        None => {
            ioctl(event.as_fd(), PERF_EVENT_IOC_SET_BPF, program.as_raw_fd())?;
            None
        }
    };
    ioctl(event.as_fd(), PERF_EVENT_IOC_ENABLE, 0)?;
    Ok(Uprobe {
        _link: link,
        _event: event,
    })
}

fn ioctl(file: BorrowedFd<'_>, request: libc::Ioctl, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: both requests take an int.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the kernel has such uprobe_multi links, tried with a path that no
/// program can be attached to: one that has them says so (EBADF), one without
/// knows no such link (EINVAL).
pub(super) fn has_uprobe_links(program: BorrowedFd<'_>, when: When) -> bool {
    let link = link_uprobes(program, when, "/", &[0], &[0], 0);
    link.is_err_and(|error| error.raw_os_error() == Some(libc::EBADF))
}

/// `bpf_attr` of `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawTracepoint {
    name: u64,
    prog_fd: u32,
    reserved: u32,
}

/// Attaches `program` to a tracepoint, until the descriptor is closed.
pub(super) fn link_tracepoint(program: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let mut attr = RawTracepoint {
        name: name.as_ptr() as u64,
        prog_fd: raw(program),
        reserved: 0,
    };
    // SAFETY: a terminated string that outlives the call.
    unsafe { bpf(BPF_RAW_TRACEPOINT_OPEN, &mut attr) }.and_then(owned)
}

/// `bpf_attr` of `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Clone, Copy)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

/// Runs a program of a tracepoint once in this thread, with the tracepoint's
/// arguments.
pub(super) fn run_tracepoint(program: BorrowedFd<'_>, arguments: &[u64]) -> io::Result<()> {
    let mut attr = TestRun {
        prog_fd: raw(program),
        retval: 0,
        data_size_in: 0,
        data_size_out: 0,
        data_in: 0,
        data_out: 0,
        repeat: 0,
        duration: 0,
        ctx_size_in: u32::try_from(size_of_val(arguments)).map_err(io::Error::other)?,
        ctx_size_out: 0,
        ctx_in: arguments.as_ptr() as u64,
        ctx_out: 0,
    };
    // SAFETY: `arguments` outlives the call and has its length.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }.map(drop)
}

/// A file whose bytes are what the iterator `program` writes for the threads of
/// process `pid`; before kernel 6.1, for every thread of the machine.
pub(super) fn iterate_tasks(program: BorrowedFd<'_>, pid: u32) -> io::Result<File> {
    let info = TaskInfo {
        tid: 0,
        pid,
        pid_fd: 0,
        reserved: 0,
    };
    let mut attr = IteratorLink {
        prog_fd: raw(program),
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        info: &raw const info as u64,
        info_len: u32::try_from(size_of::<TaskInfo>()).map_err(io::Error::other)?,
        reserved: 0,
    };
    // SAFETY: `info` outlives the call and has its length.
    let mut link = unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.and_then(owned);
    // The kernel does not know how to name a process there.
    if link
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == Some(libc::E2BIG))
    {
        (attr.info, attr.info_len) = (0, 0);
        // SAFETY: no pointers.
        link = unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.and_then(owned);
    }
    let link = link?;
    let mut attr = IteratorCreate {
        link_fd: raw(link.as_fd()),
        flags: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_ITER_CREATE, &mut attr) }
        .and_then(owned)
        .map(File::from)
}

/// Every entry of a hash map with `width` values for each key (1, or one for
/// each possible CPU). An entry that comes or goes meanwhile may be missed.
///
/// The kernel stores each value of a per-CPU map in a multiple of 8 bytes; `V`
/// must have such a size then.
pub(super) fn entries<K: Pod + Default, V: Pod + Default>(
    map: BorrowedFd<'_>,
    width: usize,
) -> io::Result<Vec<(K, Vec<V>)>> {
    let mut batch = 512;
    let mut all = Vec::new();
    // The kernel's place in its table; its first call takes none.
    let mut place = 0u64;
    let mut first = true;
    loop {
        let mut keys = vec![K::default(); batch];
        let mut values = vec![V::default(); batch * width];
        let mut next = 0u64;
        let mut attr = Batch {
            in_batch: if first { 0 } else { &raw const place as u64 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(batch).map_err(io::Error::other)?,
            map_fd: raw(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: room for `count` keys and for `count * width` values, and for
        // the kernel's place, which has 4 bytes in a hash map.
        let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) };
        let last = match result {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                // One of the table's buckets holds more than a batch.
                Some(libc::ENOSPC) => {
                    batch *= 2;
                    continue;
                }
                Some(libc::EINTR) => continue,
                _ => return Err(error),
            },
        };
        let count = (attr.count as usize).min(batch);
        all.extend(
            keys.into_iter()
                .zip(values.chunks_exact(width).map(<[V]>::to_vec))
                .take(count),
        );
        if last {
            return Ok(all);
        }
        place = next;
        first = false;
    }
}

/// `bpf_attr` of the calls for one entry.
#[repr(C)]
#[derive(Clone, Copy)]
struct Element {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Adds an entry unless its key is there, or the map is full.
pub(super) fn insert<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = Element {
        map_fd: raw(map),
        reserved: 0,
        key: std::ptr::from_ref(key) as u64,
        value: std::ptr::from_ref(value) as u64,
        flags: BPF_NOEXIST,
    };
    // SAFETY: a key and a value, which the kernel only reads.
    match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) } {
        Err(error) if !matches!(error.raw_os_error(), Some(libc::EEXIST | libc::E2BIG)) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// Removes `keys`; those that are not there are passed over.
pub(super) fn remove<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    let mut rest = keys;
    while !rest.is_empty() {
        let mut attr = Batch {
            in_batch: 0,
            out_batch: 0,
            keys: rest.as_ptr() as u64,
            values: 0,
            count: u32::try_from(rest.len()).map_err(io::Error::other)?,
            map_fd: raw(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: `count` keys, which the kernel only reads.
        let result = unsafe { bpf(BPF_MAP_DELETE_BATCH, &mut attr) };
        match result {
            Ok(_) => break,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                // `count` were removed, the next one was not there.
                rest = rest.get(attr.count as usize + 1..).unwrap_or_default();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
