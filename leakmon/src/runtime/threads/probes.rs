//! What is probed for the threads of a process, and names for the sites that
//! the probes tell apart.
//!
//! The kernel's tracepoints see every birth and every end; `pthread_create`
//! says where a thread is made. It lies in libc (glibc 2.34 and later, musl),
//! in libpthread (older glibc), or in a static program itself. A thread that
//! is made without it (Go's), or by one that is not found (a static program
//! without symbols), is counted, and its site is not known.

use std::sync::Arc;

use leakmon_common::threads::{Layout, Shared};

use crate::binary::addr::{RuntimeAddr, Vaddr};
use crate::binary::disasm::{
    Access, Assignment, Base, Code as Instructions, Kind, MAX_CODE, Register,
};
use crate::binary::elf::Arch;
use crate::binary::unwind::Registers;
use crate::probe::{Code, CreationStack, Place, Plan, Role};
use crate::process::memory::Memory;
use crate::task::{Frame, Site, SiteKey};

use super::modules::{Image, Module, Modules, Pc, Resolved, Whose};
use super::sites::{self, plain};
use super::stack::unwind_bytes;

/// What can be probed in a process.
pub(super) struct Found {
    pub(super) plan: Plan,
    /// Why sites are not known, if they are not.
    pub(super) no_sites: Option<Arc<str>>,
}

/// The plan for a process with these files, whose machine code is `arch`'s.
pub(super) fn find(modules: &Modules, arch: Option<Arch>) -> Found {
    let mut places = vec![
        Place::nowhere(Role::ThreadStart),
        Place::nowhere(Role::ThreadExit),
        Place::nowhere(Role::ThreadSwitch),
    ];
    // The C library's own, or a static program's: one that merely passes on
    // what it is called with (a sanitizer's) calls the library's in turn.
    let of_libc = modules.files().filter(|file| file.is_libc());
    let mut found: Vec<Place> = of_libc.flat_map(|file| creators(&file.image)).collect();
    if found.is_empty() {
        let others = modules.files().filter(|file| !file.is_libc());
        found = others.flat_map(|file| creators(&file.image)).collect();
    }
    let no_sites = match (arch, found.is_empty()) {
        (None, _) => Some("of a program of this kind pthread_create is not probed".into()),
        (_, true) => Some(
            "this process has no pthread_create, or it has no name there (a static program \
             without symbols)"
                .into(),
        ),
        (_, false) => None,
    };
    places.append(&mut found);
    let mut shared: Vec<Shared> = modules
        .files()
        .filter_map(|file| rust_start(file, arch?))
        .collect();
    let mut layout = Layout::default();
    shared.truncate(layout.shared.len());
    layout.shared[..shared.len()].copy_from_slice(&shared);
    Found {
        plan: Plan {
            layout: layout.words(),
            places,
        },
        no_sites,
    }
}

/// The file's definitions of `pthread_create`: one for each version of its
/// interface that differs.
fn creators(image: &Image) -> Vec<Place> {
    let Some(file) = image.file() else {
        return Vec::new();
    };
    let all = image.symbols().all(|name| name == b"pthread_create");
    all.filter_map(|(_, start, size)| {
        let code = decode(image, start, size)?;
        Some(Place {
            code: Code::File(Arc::clone(file)),
            offset: image.elf.file_offset(place(&code, image.elf.arch)?)?,
            role: Role::ThreadCreate,
            argument: 0,
        })
    })
    .collect()
}

/// The instructions of a function that is in code.
fn decode(image: &Image, start: Vaddr, size: u64) -> Option<Instructions> {
    let in_code = image.elf.segments.iter().any(|segment| {
        let within = start.offset_from(segment.vaddr);
        segment.executable && within.is_some_and(|within| within < segment.file_size)
    });
    if !in_code || size == 0 {
        return None;
    }
    let bytes = image.read(start, size.min(MAX_CODE as u64))?;
    Some(Instructions::decode(image.elf.arch, start, &bytes))
}

/// The cheapest instruction of `pthread_create` at which its arguments, the
/// stack pointer and the return address are still those of the call.
fn place(code: &Instructions, arch: Arch) -> Option<Vaddr> {
    let needed: &[u8] = match arch {
        // RCX, RDX, RSP.
        Arch::X86_64 => &[1, 2, 4],
        // X2, X3, X30, SP.
        Arch::Aarch64 => &[2, 3, 30, 31],
    };
    let first = code.instructions().first()?;
    if matches!(first.kind, Kind::Invalid | Kind::Trap) || first.exclusive {
        return None;
    }
    for instruction in code.instructions() {
        let again = code.is_target(instruction.addr);
        if instruction.emulated && !instruction.exclusive && !again {
            return Some(instruction.addr);
        }
        let moves = |number: &u8| instruction.writes.contains(Register::new(*number));
        if !matches!(instruction.kind, Kind::Other | Kind::Nop) || needed.iter().any(moves) {
            break;
        }
    }
    Some(first.addr)
}

/// The start routine of all threads of Rust's std in this file, and where what
/// it is called with has the vtable of the thread's closure. Both are proven by
/// its code, which calls the closure through it.
fn rust_start(module: &Module, arch: Arch) -> Option<Shared> {
    if !module.image.is_rust() {
        return None;
    }
    // `<std::sys::thread::unix::Thread>::new::thread_start`, in other folders of
    // std before 1.91.
    let named = |name: &[u8]| name.windows(12).any(|word| word == b"thread_start");
    let symbols = module.image.symbols();
    let mut found = symbols.all(named).filter_map(|(name, start, size)| {
        let name = crate::binary::symbols::demangle(&String::from_utf8_lossy(name));
        if !plain(&name).starts_with("std::sys::") || !name.ends_with("::new::thread_start") {
            return None;
        }
        let code = decode(&module.image, start, size)?;
        Some(Shared {
            start: module.bias.runtime(start).0,
            offset: closure_word(arch, &code)?,
        })
    });
    match (found.next(), found.next()) {
        (Some(shared), None) => Some(shared),
        _ => None,
    }
}

/// Of a function with one argument, an object: the offset in it of the vtable
/// whose first method it calls.
fn closure_word(arch: Arch, code: &Instructions) -> Option<u64> {
    // The argument, RDI or X0, and what a call leaves as it was: RBX, RBP, R12 to
    // R15 (System V ABI); X19 to X28 (Procedure Call Standard for the Arm 64-bit
    // Architecture, 6.1.1).
    let (argument, kept): (u8, &[u8]) = match arch {
        Arch::X86_64 => (7, &[3, 5, 12, 13, 14, 15]),
        Arch::Aarch64 => (0, &[19, 20, 21, 22, 23, 24, 25, 26, 27, 28]),
    };
    if !code.is_whole() || code.jumps_indirectly() {
        return None;
    }
    let kept = |register: Register| kept.iter().any(|n| Register::new(*n) == register);
    let argument = Register::new(argument);
    // In the order of addresses: what a register held last.
    let last = |register: Register, before: usize| {
        code.instructions()[..before]
            .iter()
            .rposition(|i| i.writes.contains(register))
    };
    let mut found = None;
    for call in 0..code.instructions().len() {
        let Some((at, vtable)) = method_call(arch, code, call) else {
            continue;
        };
        let load = last(vtable, at).filter(|_| kept(vtable))?;
        let memory = code.instructions()[load].memory?;
        let Base::Register(object, offset) = memory.base else {
            return None;
        };
        let copy = last(object, load).filter(|_| kept(object))?;
        let copied = Some(Assignment::Sum {
            to: object,
            from: argument,
            addend: 0,
        });
        // A pointer to a closure is two words, of which the vtable is the second.
        // AArch64 loads both at once: the other is what the method is called with.
        let offset = match memory.width {
            8 => Some(offset),
            16 => {
                let passed = code.instructions()[last(argument, call)?].assigns;
                let Some(Assignment::Sum { from: data, .. }) = passed else {
                    return None;
                };
                let both = data != vtable && last(data, call) == Some(load);
                both.then(|| offset.checked_add(8)).flatten()
            }
            _ => None,
        };
        // Nothing has changed the argument before it was copied.
        if code.instructions()[copy].assigns != copied
            || last(argument, copy).is_some()
            || found.is_some()
        {
            return None;
        }
        found = Some(u64::try_from(offset?).ok()?);
    }
    found
}

/// The register with the vtable of which the instruction at index `at` calls the
/// first method, and the index of the instruction that reads the method's address.
fn method_call(arch: Arch, code: &Instructions, at: usize) -> Option<(usize, Register)> {
    /// Behind a vtable's drop glue, size and alignment.
    const METHOD: i64 = 24;
    /// Instructions between the load of an address and the call of it.
    const NEAR: usize = 3;
    let instructions = code.instructions();
    if instructions[at].kind != Kind::CallIndirect {
        return None;
    }
    let from = match arch {
        Arch::X86_64 => at,
        Arch::Aarch64 => at.saturating_sub(NEAR),
    };
    let read = |index: usize| {
        let memory = instructions[index].memory?;
        match memory.base {
            Base::Register(vtable, METHOD) if memory.access == Access::Load => {
                Some((index, vtable))
            }
            _ => None,
        }
    };
    // The last one, and nothing that goes elsewhere is between.
    (from..=at)
        .rev()
        .take_while(|index| *index == at || instructions[*index].kind == Kind::Other)
        .find_map(read)
}

/// A site of the probes.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) site: Site,
    /// The start routine, where it tells what the threads do.
    pub(super) start: Option<u64>,
    /// The vtable of a closure of Rust's std tells it from others.
    pub(super) closure: bool,
    /// It was made by a library that is not the C library.
    pub(super) by_library: bool,
}

impl Made {
    /// Whether it says more of a thread than the site that a census has found
    /// (`by_stack`, or else by its name).
    pub(super) fn tells_more(&self, census: &Site, by_stack: bool) -> bool {
        match (self.start, by_stack) {
            // What a thread runs behind a start routine that is the same for
            // many is known by its stack alone.
            (Some(start), true) => census.key.entry == start,
            // A library that makes threads for whoever wants some (a JVM) gives
            // them names.
            (_, false) => !self.by_library && self.is_told_apart(),
            (None, true) => self.is_told_apart(),
        }
    }

    /// Whether threads of other places have other sites.
    fn is_told_apart(&self) -> bool {
        self.start.is_some() || self.closure
    }
}

/// A site of which only the addresses are known.
pub(super) fn unnamed(key: SiteKey) -> Made {
    Made {
        site: Site {
            key,
            entry: None,
            created_by: None,
            doubt: Some("the process's memory and files cannot be read".into()),
        },
        start: None,
        closure: false,
        by_library: false,
    }
}

/// Names a site of the probes. `stack` is that of the first of its threads'
/// maker, where it was kept; `is_program` tells whether code is the program's,
/// not a library's.
pub(super) fn name<M: Memory>(
    key: SiteKey,
    stack: Option<&CreationStack>,
    arch: Arch,
    modules: &mut Modules,
    memory: &M,
    is_program: impl Fn(&Modules, u64) -> bool,
) -> Made {
    let call = Pc {
        addr: key.created_at,
        exact: false,
    };
    let direct = modules.frames(call);
    let own = |frame: &&Resolved| frame.whose == Whose::Program;
    let caller = direct.iter().find(own).cloned();
    // A library calls for the program: whoever called it is on the stack.
    let (caller, first) = match (caller, stack) {
        (None, Some(stack)) => {
            let outer = outer(stack, key, arch, modules);
            let found = outer.is_some();
            (outer, found)
        }
        (caller, _) => (caller, false),
    };
    let by_program = caller
        .as_ref()
        .is_some_and(|caller| is_program(modules, caller.frame.pc));
    let created_by = caller.map(|caller| caller.frame);
    let mut site = Site {
        key,
        created_by: created_by.or_else(|| Some(direct.first()?.frame.clone())),
        entry: None,
        doubt: None,
    };
    if modules.is_code(key.entry) {
        let start = Pc {
            addr: key.entry,
            exact: true,
        };
        let start = modules.frames(start).last().cloned();
        let own = start.as_ref().is_some_and(|s| s.whose == Whose::Program);
        site.entry = start.map(|start| modules.first_line(&start.frame));
        if !own {
            // Threads of every kind start there: what is known is true of all.
            site.created_by = direct.first().map(|resolved| resolved.frame.clone());
            site.doubt = Some(
                "threads of different places: what makes and starts them is the same for all"
                    .into(),
            );
        } else if first {
            site.doubt = Some(FIRST.into());
        } else if modules.is_rust(key.entry) && direct.iter().all(|frame| !frame.named) {
            site.doubt = Some(sites::MAYBE_STD.into());
        }
        return Made {
            site,
            start: own.then_some(key.entry),
            closure: false,
            by_library: !by_program,
        };
    }
    let closure = closure(key.entry, modules, memory);
    let is_closure = closure.is_some();
    match closure {
        Some(closure) => {
            let creator = site.created_by.as_ref().map(|frame| &*frame.function);
            let within = |name: &String| creator.is_some_and(|creator| is_within(name, creator));
            let name = closure.name.filter(within);
            site.doubt = (first && name.is_none()).then(|| FIRST.into());
            let name = name.or_else(|| modules.offset_name(closure.call));
            site.entry = name.map(|name| Frame {
                function: name.into(),
                file: "".into(),
                line: 0,
                pc: closure.call,
                offset: 0,
                entry: closure.call,
                inlined: false,
                hidden: false,
            });
        }
        None => site.doubt = Some("what these threads run could not be read".into()),
    }
    Made {
        site,
        start: None,
        closure: is_closure,
        by_library: !by_program,
    }
}

/// What is known of a site whose maker was found on the first one's stack.
const FIRST: &str = "where the first of these threads was made; others that run the same code may \
                     have been made elsewhere";

/// The innermost frame of the program on a maker's stack.
fn outer(
    stack: &CreationStack,
    key: SiteKey,
    arch: Arch,
    modules: &mut Modules,
) -> Option<Resolved> {
    let link = (arch == Arch::Aarch64).then_some(stack.link);
    let registers = Registers::new(arch, stack.ip, stack.sp, Some(stack.frame), link);
    let (unwound, _) = unwind_bytes(modules, &registers, arch, &stack.bytes);
    let mut callers = unwound.pcs.into_iter().skip(1).peekable();
    // Otherwise it is not the stack of this call.
    callers.next_if(|pc| pc.addr == key.created_at)?;
    callers.find_map(|pc| {
        let frames = modules.frames(pc);
        let own = |frame: &&Resolved| frame.whose == Whose::Program;
        frames.iter().find(own).cloned()
    })
}

/// A closure, by its vtable.
struct Closure {
    /// `app::run::{closure#0}`.
    name: Option<String>,
    /// Its code, in the process.
    call: u64,
}

/// The closure of a thread of Rust's std with this vtable: drop glue (0 where
/// nothing is to be dropped), size, alignment, `call_once`. What does not look
/// like one is none.
fn closure<M: Memory>(vtable: u64, modules: &mut Modules, memory: &M) -> Option<Closure> {
    /// Largest alignment of a type, `1 << 29` bytes, and of a size that is
    /// believed.
    const MOST: u64 = 1 << 29;
    modules.data(vtable)?;
    let mut bytes = [0; 32];
    memory.read(RuntimeAddr(vtable), &mut bytes).ok()?;
    let word = |at: usize| u64::from_le_bytes(bytes[at * 8..][..8].try_into().unwrap_or_default());
    let (drop, size, align, call) = (word(0), word(1), word(2), word(3));
    let sane = size <= MOST && align <= MOST && align.is_power_of_two();
    if !sane || !modules.is_code(call) || drop != 0 && !modules.is_code(drop) {
        return None;
    }
    let mut name = |at: u64| {
        let exact = Pc {
            addr: at,
            exact: true,
        };
        let function = modules.frames(exact).last().cloned()?;
        // One that shares its code starts elsewhere.
        (function.named && function.frame.entry == at).then_some(function.frame.function)
    };
    let names = [Some(call), (drop != 0).then_some(drop)];
    let name = names
        .into_iter()
        .flatten()
        .find_map(|at| of_spawn(&name(at)?).map(str::to_owned));
    Some(Closure { name, call })
}

/// The closure that a function of Rust's std for a thread has in its name: `F`
/// of `drop_in_place<std::thread::lifecycle::spawn_unchecked<F, ()>::{closure#1}>`.
fn of_spawn(function: &str) -> Option<&str> {
    let at = function.find("spawn_unchecked")?;
    let arguments = function[at..].find('<')? + at + 1;
    sites::first_argument(&function[arguments..])
}

/// Whether a closure is written in the function `creator`: its path starts with
/// that of the function, whatever their type arguments.
fn is_within(closure: &str, creator: &str) -> bool {
    let within = |closure: &str, creator: &str| {
        let rest = closure.strip_prefix(creator);
        rest.is_some_and(|rest| rest.starts_with("::{"))
    };
    // A method's type is in such brackets, too.
    if creator.starts_with('<') || closure.starts_with('<') {
        return within(closure, creator);
    }
    within(&without_arguments(closure), &without_arguments(creator))
}

/// A path without the type arguments in it.
fn without_arguments(path: &str) -> String {
    let mut depth = 0usize;
    let mut bare = String::with_capacity(path.len());
    for c in path.chars() {
        match c {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            c if depth == 0 => bare.push(c),
            _ => {}
        }
    }
    // `start::<F>::{closure#0}` has one `::` too many.
    while let Some(at) = bare.find("::::") {
        bare.replace_range(at..at + 2, "");
    }
    bare.trim_end_matches("::").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closures_by_the_name_of_their_drop_glue() {
        for (function, closure) in [
            (
                "core::ptr::drop_in_place<std::thread::lifecycle::spawn_unchecked<app::churn::{{closure}},()>::{{closure}}>",
                Some("app::churn::{{closure}}"),
            ),
            (
                "<std::thread::lifecycle::spawn_unchecked<app::start<app::zoo::{closure#3}>::{closure#0}, ()>::{closure#1} as core::ops::function::FnOnce<()>>::call_once::{shim:vtable#0}",
                Some("app::start<app::zoo::{closure#3}>::{closure#0}"),
            ),
            (
                "core::ptr::drop_in_place<std::thread::Builder::spawn_unchecked_<app::f::{{closure}}, ()>::{{closure}}>",
                Some("app::f::{{closure}}"),
            ),
            (
                "core::ops::function::FnOnce::call_once{{vtable.shim}}",
                None,
            ),
            ("spawn_unchecked", None),
            ("spawn_unchecked<", None),
        ] {
            assert_eq!(of_spawn(function), closure, "{function}");
        }
    }

    #[test]
    fn closures_lie_within_the_function_that_has_them() {
        for (closure, creator, within) in [
            ("app::churn::{{closure}}", "app::churn", true),
            (
                "app::start<app::zoo::{closure#3}>::{closure#0}",
                "app::start",
                true,
            ),
            (
                "app::start<app::zoo::{closure#3}>::{closure#0}",
                "app::start::<app::zoo::{closure#3}>",
                true,
            ),
            ("app::churn::{{closure}}", "app::chur", false),
            ("app::churn::{{closure}}", "app::answer", false),
            (
                "app::churn::{{closure}}::{{closure}}",
                "app::churn::{{closure}}",
                true,
            ),
            ("app::churn", "app::churn", false),
            ("<app::S>::run::{closure#0}", "<app::S>::run", true),
            ("<app::S>::run::{closure#0}", "<app::T>::run", false),
        ] {
            assert_eq!(is_within(closure, creator), within, "{closure} {creator}");
        }
    }

    #[test]
    fn the_argument_is_probed_where_it_is_still_there() {
        let at = |bytes: &[u8]| {
            place(
                &Instructions::decode(Arch::X86_64, Vaddr(0x1000), bytes),
                Arch::X86_64,
            )
        };
        // push r15
        assert_eq!(at(&[0x41, 0x57, 0xc3]), Some(Vaddr(0x1000)));
        // endbr64; push rbp
        assert_eq!(
            at(&[0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0xc3]),
            Some(Vaddr(0x1004))
        );
        // mov rax, rdi; push rbp
        assert_eq!(at(&[0x48, 0x89, 0xf8, 0x55, 0xc3]), Some(Vaddr(0x1003)));
        // mov rdx, rdi; push rbp: the start routine is gone by then.
        assert_eq!(at(&[0x48, 0x89, 0xfa, 0x55, 0xc3]), Some(Vaddr(0x1000)));
        // sub rsp, 8; push rbp
        assert_eq!(at(&[0x48, 0x83, 0xec, 8, 0x55, 0xc3]), Some(Vaddr(0x1000)));
        // ret; push rbp
        assert_eq!(at(&[0xc3, 0x55]), Some(Vaddr(0x1000)));
        // A loop back to the push.
        assert_eq!(
            at(&[0x48, 0x89, 0xf8, 0x55, 0xeb, 0xfd]),
            Some(Vaddr(0x1000))
        );
        assert_eq!(at(&[0x0f, 0x0b]), None);
        assert_eq!(at(&[]), None);
    }

    #[test]
    fn the_word_by_which_a_closure_is_called() {
        let word = |bytes: &[u8]| {
            let code = Instructions::decode(Arch::X86_64, Vaddr(0x1000), bytes);
            closure_word(Arch::X86_64, &code)
        };
        // mov rbx, rdi; mov r15, [rbx+16]; xor edi, edi; call [r15+24]; ret
        let code = [
            0x48, 0x89, 0xfb, 0x4c, 0x8b, 0x7b, 0x10, 0x31, 0xff, 0x41, 0xff, 0x57, 0x18, 0xc3,
        ];
        assert_eq!(word(&code), Some(16));
        // Another method.
        let mut other = code;
        other[12] = 0x20;
        assert_eq!(word(&other), None);
        // The object is not the argument: mov rbx, rsi.
        let mut other = code;
        other[1..3].copy_from_slice(&[0x89, 0xf3]);
        assert_eq!(word(&other), None);
        // Called twice.
        let twice = [&code[..13], &code[9..]].concat();
        assert_eq!(word(&twice), None);
        assert_eq!(word(&[]), None);
    }

    #[test]
    fn the_word_by_which_a_closure_is_called_on_aarch64() {
        let word = |words: &[u32]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let code = Instructions::decode(Arch::Aarch64, Vaddr(0x1000), &bytes);
            closure_word(Arch::Aarch64, &code)
        };
        // mov x19, x0; ldp x21, x22, [x19, #8]; bl back; ldr x8, [x22, #24];
        // mov x0, x21; blr x8; ret
        let code = [
            0xaa00_03f3,
            0xa940_da75,
            0x97ff_fff0,
            0xf940_0ec8,
            0xaa15_03e0,
            0xd63f_0100,
            0xd65f_03c0,
        ];
        assert_eq!(word(&code), Some(16));
        // The vtable alone: ldr x22, [x19, #16].
        let mut alone = code;
        alone[1] = 0xf940_0a76;
        assert_eq!(word(&alone), Some(16));
        // Another method; a register that is not kept over the call: ldr x8, [x9, #24].
        for other in [0xf940_12c8, 0xf940_0d28] {
            let mut code = code;
            code[3] = other;
            assert_eq!(word(&code), None, "{other:x}");
        }
        // Called with something else: mov x0, x20.
        let mut other = code;
        other[4] = 0xaa14_03e0;
        assert_eq!(word(&other), None);
        // The object is not the argument: mov x19, x1. Called twice.
        let mut other = code;
        other[0] = 0xaa01_03f3;
        assert_eq!(word(&other), None);
        assert_eq!(word(&[&code[..6], &code[3..]].concat()), None);
        assert_eq!(word(&[]), None);
    }
}
