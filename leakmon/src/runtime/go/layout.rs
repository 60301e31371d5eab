//! Where the fields of Go's runtime structs lie, by version.
//!
//! Everything that is dated is here: adding a Go version is one diff of this
//! file. The offsets are those of the DWARF that the toolchains themselves
//! write for a program; amd64 and arm64 agree on all of them.

use super::buildinfo::Version;

/// Oldest minor version that is read.
pub const OLDEST: u32 = 18;
/// Newest minor version that is read.
pub const NEWEST: u32 = 27;

/// Offsets in bytes, of one Go version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `runtime.g`.
    pub g: G,
    /// `runtime.moduledata.gofunc`.
    pub moduledata_gofunc: u64,
    /// `runtime.moduledata.textsectmap`, a slice.
    pub moduledata_textsectmap: u64,
    /// `runtime.funcID_wrapper` (abi.FuncIDWrapper): compiler-made functions
    /// that stack traces leave out.
    pub func_id_wrapper: u8,
    /// `g.labels` points to `runtime/pprof.labelMap`, which holds a slice from
    /// Go 1.24 on and a map before.
    pub labels_are_slice: bool,
    /// A goroutine that enters a system call shows that in trackingSeq: up to
    /// Go 1.25; since then a plain compare-and-swap moves its status
    /// (reentersyscall, runtime/proc.go).
    pub syscalls_are_counted: bool,
    /// The 26 of 1.26.
    pub minor: u32,
}

/// Offsets in `runtime.g` (runtime/runtime2.go), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct G {
    /// `syscallsp`; `syscallpc` follows.
    pub syscallsp: usize,
    /// `atomicstatus`, 32 bits.
    pub atomicstatus: usize,
    /// `goid`.
    pub goid: usize,
    /// `waitsince`, CLOCK_MONOTONIC nanoseconds.
    pub waitsince: usize,
    /// `waitreason`, 8 bits.
    pub waitreason: usize,
    /// `trackingSeq`, 8 bits: moves when the goroutine leaves running.
    pub tracking_seq: usize,
    /// `lockedm`.
    pub lockedm: usize,
    /// `parentGoid`, from Go 1.21 on.
    pub parent_goid: Option<usize>,
    /// `gopc`: return address of the go statement.
    pub gopc: usize,
    /// `startpc`: entry of the goroutine's function.
    pub startpc: usize,
    /// `waiting`: first sudog.
    pub waiting: usize,
    /// `labels`.
    pub labels: usize,
    /// `sched.bp`.
    pub sched_bp: usize,
}

// The same in every version: runtime/runtime2.go.

/// `g.stack.lo`; `hi` follows.
pub const G_STACK_LO: usize = 0;
/// `g.stack.hi`.
pub const G_STACK_HI: usize = 8;
/// `g.m`.
pub const G_M: usize = 48;
/// `g.sched.sp`.
pub const G_SCHED_SP: usize = 56;
/// `g.sched.pc`.
pub const G_SCHED_PC: usize = 64;
/// `g.sched.g`, a pointer to the g itself once it has been scheduled.
pub const G_SCHED_G: usize = 72;

/// `moduledata.funcnametab`, a slice (runtime/symtab.go).
pub const MODULEDATA_FUNCNAMETAB: u64 = 8;
/// `moduledata.pclntable`, a slice.
pub const MODULEDATA_PCLNTABLE: u64 = 104;
/// `moduledata.text`; `etext` follows.
pub const MODULEDATA_TEXT: u64 = 176;

/// `runtime.g` of 1.18 to 1.20.
const G_118: G = G {
    syscallsp: 112,
    atomicstatus: 144,
    goid: 152,
    waitsince: 168,
    waitreason: 176,
    tracking_seq: 189,
    lockedm: 232,
    parent_goid: None,
    gopc: 296,
    startpc: 312,
    waiting: 328,
    labels: 360,
    sched_bp: 104,
};

/// 1.21 dropped the tracer's fields and added parentGoid.
const G_121: G = G {
    tracking_seq: 188,
    lockedm: 208,
    parent_goid: Some(272),
    gopc: 280,
    startpc: 296,
    waiting: 312,
    labels: 344,
    ..G_118
};

/// 1.22 added flags in front of trackingSeq.
const G_122: G = G {
    tracking_seq: 191,
    ..G_121
};

/// 1.23 added syscallbp in front of stktopsp.
const G_123: G = G {
    atomicstatus: 152,
    goid: 160,
    waitsince: 176,
    waitreason: 184,
    tracking_seq: 199,
    lockedm: 216,
    parent_goid: Some(280),
    gopc: 288,
    startpc: 304,
    waiting: 320,
    labels: 352,
    ..G_122
};

/// 1.25 dropped gobuf.ret.
const G_125: G = G {
    syscallsp: 104,
    atomicstatus: 144,
    goid: 152,
    waitsince: 168,
    waitreason: 176,
    tracking_seq: 191,
    lockedm: 208,
    parent_goid: Some(272),
    gopc: 280,
    startpc: 296,
    waiting: 312,
    labels: 344,
    sched_bp: 96,
};

/// 1.26 added flags and secret behind runningCleanups.
const G_126: G = G {
    parent_goid: Some(280),
    gopc: 288,
    startpc: 304,
    waiting: 320,
    labels: 352,
    ..G_125
};

impl Layout {
    /// The layout of a Go version; `None` when it is not known.
    pub fn of(version: &Version) -> Option<Layout> {
        let minor = version.minor;
        let g = match minor {
            18..=20 => G_118,
            21 => G_121,
            22 => G_122,
            23..=24 => G_123,
            25 => G_125,
            26..=27 => G_126,
            _ => return None,
        };
        Some(Layout {
            g,
            // 1.20 added the coverage counters, 1.27 moved the type tables.
            moduledata_gofunc: match minor {
                18..=19 => 304,
                20..=26 => 320,
                _ => 344,
            },
            // 1.26 put epclntab between the two.
            moduledata_textsectmap: match minor {
                18..=19 => 312,
                20..=25 => 328,
                26 => 336,
                _ => 360,
            },
            // 1.22 added corostart, 1.25 runCleanups in front of it.
            func_id_wrapper: match minor {
                18..=21 => 21,
                22..=24 => 22,
                _ => 23,
            },
            labels_are_slice: minor >= 24,
            syscalls_are_counted: minor <= 25,
            minor,
        })
    }

    /// Bytes of a g that hold every field leakmon reads.
    pub fn g_len(&self) -> usize {
        self.g.labels + 8
    }
}

/// `runtime.g.atomicstatus` values: runtime/runtime2.go.
pub mod status {
    /// `_Gidle`.
    pub const IDLE: u32 = 0;
    /// `_Grunnable`.
    pub const RUNNABLE: u32 = 1;
    /// `_Grunning`.
    pub const RUNNING: u32 = 2;
    /// `_Gsyscall`.
    pub const SYSCALL: u32 = 3;
    /// `_Gwaiting`.
    pub const WAITING: u32 = 4;
    /// `_Gdead`.
    pub const DEAD: u32 = 6;
    /// `_Gcopystack`.
    pub const COPYSTACK: u32 = 8;
    /// `_Gpreempted`.
    pub const PREEMPTED: u32 = 9;
    /// `_Gleaked`, from Go 1.26 on.
    pub const LEAKED: u32 = 10;
    /// `_Gdeadextra`, from Go 1.26 on.
    pub const DEADEXTRA: u32 = 11;
    /// `_Gscan`: set on top of another status while its stack is scanned.
    pub const SCAN: u32 = 0x1000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_supported_version_has_a_layout_and_no_other() {
        for minor in 0..100 {
            let version = Version {
                minor,
                text: format!("go1.{minor}"),
            };
            let layout = Layout::of(&version);
            assert_eq!(
                layout.is_some(),
                (OLDEST..=NEWEST).contains(&minor),
                "1.{minor}"
            );
        }
    }
}
