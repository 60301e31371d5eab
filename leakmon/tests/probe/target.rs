//! A small Go program to be probed, and where its probe places lie.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use leakmon::binary::addr::FileOffset;
use leakmon::probe::{Code, Place, Plan, Role};
use leakmon_common::go::Layout;
use object::{Object as _, ObjectSegment as _, ObjectSymbol as _};

/// Functions that call `gopark` for channels and locks.
const PARKING: [&str; 5] = [
    "runtime.chansend",
    "runtime.chanrecv",
    "runtime.selectgo",
    "runtime.semacquire1",
    "sync.runtime_notifyListWait",
];

/// Compiles the program once.
pub(crate) fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY
        .get_or_init(|| {
            let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probe-target");
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/probe/target.go");
            // A second process (the one to be killed) finds it compiled.
            let newer = |a: &Path, b: &Path| {
                let time = |path: &Path| path.metadata().and_then(|meta| meta.modified()).ok();
                time(a) > time(b)
            };
            if !newer(&out, &source) {
                let status = Command::new("go")
                    .args(["build", "-o"])
                    .arg(&out)
                    .arg(&source)
                    .status()
                    .expect("a Go toolchain");
                assert!(status.success());
            }
            out
        })
        .clone()
}

/// A running target.
pub(crate) struct Target {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    functions: BTreeMap<u64, (u64, String)>,
}

impl Target {
    pub(crate) fn start() -> Target {
        let binary = binary();
        let mut child = Command::new(&binary)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let data = std::fs::read(&binary).unwrap();
        let file = object::File::parse(&*data).unwrap();
        let functions = functions(&file);
        let mut target = Target {
            child,
            input,
            output,
            functions,
        };
        assert_eq!(target.line(), "ready");
        target
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn plan(&self) -> Plan {
        plan(&binary())
    }

    /// Runs a command of the program to its end and says how long it took.
    pub(crate) fn run(&mut self, command: &str) -> Duration {
        writeln!(self.input, "{command}").unwrap();
        let line = self.line();
        let nanos = line.strip_prefix("done ").unwrap();
        Duration::from_nanos(nanos.parse().unwrap())
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// CPU time used so far, with the scheduler's own resolution.
    pub(crate) fn cpu(&self) -> Duration {
        let mut sum = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap() {
            let stat = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            sum += stat.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
        Duration::from_nanos(sum)
    }

    /// The function that holds an address.
    pub(crate) fn function(&self, address: u64) -> &str {
        match self.functions.range(..=address).next_back() {
            Some((start, (size, name))) if address < start + size => name,
            _ => "",
        }
    }

    /// The address of a function.
    pub(crate) fn symbol(&self, name: &str) -> u64 {
        let found = self.functions.iter().find(|(_, (_, other))| other == name);
        *found.unwrap().0
    }

    /// The first byte of each place in the running process.
    pub(crate) fn code(&self, places: &[Place]) -> Vec<u8> {
        let data = std::fs::read(binary()).unwrap();
        let file = object::File::parse(&*data).unwrap();
        let memory = std::fs::File::open(format!("/proc/{}/mem", self.pid())).unwrap();
        places
            .iter()
            .map(|place| {
                let mut byte = [0];
                memory
                    .read_exact_at(&mut byte, vaddr(&file, place.offset))
                    .unwrap();
                byte[0]
            })
            .collect()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn functions(file: &object::File<'_>) -> BTreeMap<u64, (u64, String)> {
    file.symbols()
        .filter(|symbol| symbol.kind() == object::SymbolKind::Text)
        .map(|symbol| {
            let name = symbol.name().unwrap().to_owned();
            (symbol.address(), (symbol.size(), name))
        })
        .collect()
}

fn offset(file: &object::File<'_>, address: u64) -> FileOffset {
    let segment = file
        .segments()
        .find(|segment| (segment.address()..segment.address() + segment.size()).contains(&address))
        .unwrap();
    FileOffset(address - segment.address() + segment.file_range().0)
}

fn vaddr(file: &object::File<'_>, offset: FileOffset) -> u64 {
    let segment = file
        .segments()
        .find(|segment| {
            let (start, size) = segment.file_range();
            (start..start + size).contains(&offset.0)
        })
        .unwrap();
    offset.0 - segment.file_range().0 + segment.address()
}

/// What the places are found by, of one instruction.
#[derive(Clone, Copy)]
struct Instruction {
    address: u64,
    /// Where the next one is.
    next: u64,
    /// What it calls.
    call: Option<u64>,
    /// Where it may go instead of the next one, without a call.
    branch: Option<u64>,
    /// The kernel emulates it instead of stepping over it.
    emulated: bool,
}

/// One function's instructions.
fn decode(file: &object::File<'_>, start: u64, size: u64) -> Vec<Instruction> {
    let segment = file
        .segments()
        .find(|segment| (segment.address()..segment.address() + segment.size()).contains(&start))
        .unwrap();
    let from = (start - segment.address()) as usize;
    instructions(&segment.data().unwrap()[from..from + size as usize], start)
}

#[cfg(target_arch = "x86_64")]
fn instructions(code: &[u8], start: u64) -> Vec<Instruction> {
    use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic, OpKind};

    Decoder::with_ip(64, code, start, DecoderOptions::NONE)
        .into_iter()
        .map(|instruction| {
            let target = instruction.near_branch_target();
            let is_push = instruction.mnemonic() == Mnemonic::Push
                && instruction.op0_kind() == OpKind::Register;
            let flow = instruction.flow_control();
            let is_branch = matches!(
                flow,
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
            );
            Instruction {
                address: instruction.ip(),
                next: instruction.next_ip(),
                call: instruction.is_call_near().then_some(target),
                branch: is_branch.then_some(target),
                emulated: is_push || is_branch || flow == FlowControl::Call,
            }
        })
        .collect()
}

/// By the Arm Architecture Reference Manual, C4.1, "A64 instruction set encoding"; what the kernel emulates is in its
/// arch/arm64/kernel/probes/decode-insn.c.
#[cfg(target_arch = "aarch64")]
fn instructions(code: &[u8], start: u64) -> Vec<Instruction> {
    let words = code
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    words
        .zip((start..).step_by(4))
        .map(|(word, address)| {
            // A number of `bits` bits from bit `low` on counts words from here.
            let target = |low: u32, bits: u32| {
                let words = (word << (32 - low - bits)) as i32 >> (32 - bits);
                address.wrapping_add_signed(4 * i64::from(words))
            };
            let branch = match word {
                _ if word >> 26 == 0b00_0101 => Some(target(0, 26)),
                _ if word >> 24 == 0x54 || word & 0x7e00_0000 == 0x3400_0000 => Some(target(5, 19)),
                _ if word & 0x7e00_0000 == 0x3600_0000 => Some(target(5, 14)),
                _ => None,
            };
            let call = (word >> 26 == 0b10_0101).then(|| target(0, 26));
            Instruction {
                address,
                next: address + 4,
                call,
                branch,
                emulated: branch.is_some() || call.is_some(),
            }
        })
        .collect()
}

/// Behind a function's check that its stack is large enough, which may run it twice.
fn behind_check(code: &[Instruction]) -> u64 {
    // It begins with the check: a load, a comparison, a branch.
    let check = code.iter().take(6).find(|i| i.branch.is_some());
    check.expect("a check of the stack").next
}

/// The probe places of a Go 1.26 binary with symbols.
pub(crate) fn plan(binary: &Path) -> Plan {
    let data = std::fs::read(binary).unwrap();
    let file = object::File::parse(&*data).unwrap();
    let functions = functions(&file);
    let find = |name: &str| {
        let (start, (size, _)) = functions.iter().find(|(_, (_, n))| n == name)?;
        Some((*start, decode(&file, *start, *size)))
    };
    let mut places = Vec::new();
    let mut place = |address, role, depth| {
        places.push(Place {
            code: Code::Executable,
            offset: offset(&file, address),
            role,
            argument: depth,
        });
    };
    let (runqput, _) = find("runtime.runqput").unwrap();
    let (gopark, _) = find("runtime.gopark").unwrap();

    let (_, newproc) = find("runtime.newproc.func1").unwrap();
    let spawn = newproc.iter().find(|i| i.call == Some(runqput)).unwrap();
    place(spawn.address, Role::Spawn, 0);

    let (_, goexit0) = find("runtime.goexit0").unwrap();
    place(behind_check(&goexit0), Role::Exit, 0);

    for name in PARKING {
        let Some((_, code)) = find(name) else {
            continue;
        };
        for (index, call) in code.iter().enumerate() {
            if call.call != Some(gopark) {
                continue;
            }
            let mut rest = code[index + 1..].iter();
            let resume = rest.find(|instruction| instruction.emulated).unwrap();
            let gap = call.next..=resume.address;
            let mut branches = code.iter().filter_map(|i| i.branch);
            assert!(
                !branches.any(|target| gap.contains(&target)),
                "a branch into the gap of {name}"
            );
            place(call.address, Role::Park, 2);
            place(resume.address, Role::Resume, 0);
        }
    }
    Plan {
        layout: LAYOUT.words(),
        places,
    }
}

/// The fields of `runtime.g` in Go 1.26.
const LAYOUT: Layout = Layout {
    goid: 152,
    gopc: 288,
    waitreason: 176,
    sched_bp: 96,
    reasons: !0,
};

/// The places for a binary in which the others were inlined.
pub(crate) fn universal_plan(binary: &Path, reasons: u64) -> Plan {
    let data = std::fs::read(binary).unwrap();
    let file = object::File::parse(&*data).unwrap();
    let functions = functions(&file);
    let code = |name: &str| {
        let (start, (size, _)) = functions.iter().find(|(_, (_, n))| n == name).unwrap();
        (*start, decode(&file, *start, *size))
    };
    let place = |address, role| Place {
        code: Code::Executable,
        offset: offset(&file, address),
        role,
        argument: 4,
    };
    let start = |name| behind_check(&code(name).1);
    // This binary has no emulated instruction behind the call that still finds
    // the result in its register: take the first one, which is single-stepped.
    let (newproc1, _) = code("runtime.newproc1");
    let (_, newproc) = code("runtime.newproc.func1");
    let call = newproc
        .iter()
        .position(|i| i.call == Some(newproc1))
        .unwrap();
    let spawn = &newproc[call + 1];
    Plan {
        layout: Layout { reasons, ..LAYOUT }.words(),
        places: vec![
            place(spawn.address, Role::SpawnReturned),
            place(start("runtime.goexit0"), Role::Exit),
            place(start("runtime.park_m"), Role::ParkUniversal),
            place(start("runtime.ready"), Role::Ready),
        ],
    }
}
