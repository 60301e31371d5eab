//! Unwinding by call frame information: `.eh_frame` with or without
//! `.eh_frame_hdr`, and `.debug_frame`.
//!
//! [`Table`] answers, for one file, how to get from an instruction to its
//! caller; [`step`] carries the answer out on a set of [`Registers`] of which
//! some may be unknown. Nothing is guessed: where there is no information, or
//! it needs a register that nobody knows, the stack ends there. (A frame
//! pointer followed on faith would give a frame that is wrong now and then,
//! which is why no unwinder with fall-backs is used.)

use gimli::{
    BaseAddresses, CfaRule, DebugFrame, EhFrame, EhFrameHdr, EndianSlice, Evaluation,
    EvaluationResult, LittleEndian, Location, Register, RegisterRule, UnwindContext, UnwindSection,
    Value,
};

use super::addr::Vaddr;
use super::elf::{Arch, Elf, ReadAt};

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// Most bytes of a section with unwind information that are read. Chromium's
/// has 40 MB.
const MAX_SECTION: u64 = 128 << 20;

/// Registers whose value is followed: x86-64's 0 to 16 (its ABI's figure 3.36),
/// AArch64's x0 to x30 and sp.
const REGISTERS: usize = 32;

/// Steps that an expression may take. Those of signal frames and of PLTs take
/// under ten.
const MAX_EXPRESSION: u32 = 1000;

/// What an architecture's DWARF numbers its registers.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    sp: usize,
    bp: usize,
    /// The register or column of the return address.
    ra: usize,
    /// Whether a call leaves register `n` as it was.
    saved: fn(usize) -> bool,
}

fn numbers(arch: Arch) -> Numbers {
    match arch {
        // rbx, rbp, r12 to r15: System V ABI, figure 3.4.
        Arch::X86_64 => Numbers {
            sp: 7,
            bp: 6,
            ra: 16,
            saved: |n| matches!(n, 3 | 6 | 12..=15),
        },
        // x19 to x28 and x29: AAPCS64, 6.1.1.
        Arch::Aarch64 => Numbers {
            sp: 31,
            bp: 29,
            ra: 30,
            saved: |n| matches!(n, 19..=29),
        },
    }
}

/// The registers of one frame, as far as they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    arch: Arch,
    ip: u64,
    values: [Option<u64>; REGISTERS],
}

impl Registers {
    /// Of a thread at `ip` with its stack pointer; `bp` is the frame pointer
    /// and `lr` AArch64's link register, where they are known.
    pub fn new(arch: Arch, ip: u64, sp: u64, bp: Option<u64>, lr: Option<u64>) -> Registers {
        let n = numbers(arch);
        let mut values = [None; REGISTERS];
        values[n.sp] = Some(sp);
        values[n.bp] = bp;
        if arch == Arch::Aarch64 {
            values[n.ra] = lr;
        }
        Registers { arch, ip, values }
    }

    /// The instruction pointer.
    pub fn ip(&self) -> u64 {
        self.ip
    }

    /// The stack pointer.
    pub fn sp(&self) -> u64 {
        self.values[numbers(self.arch).sp].unwrap_or(0)
    }

    fn get(&self, register: u16) -> Option<u64> {
        *self.values.get(usize::from(register))?
    }
}

/// How the frame's address is found.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cfa {
    Register(u16, i64),
    Expression(Box<[u8]>),
}

/// How a register of the caller is found.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Saved {
    Unknown,
    Same,
    At(i64),
    Is(i64),
    In(u16),
    AtExpression(Box<[u8]>),
    IsExpression(Box<[u8]>),
}

/// How to get from one instruction to its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// First instruction of the function (or of its part) that the information
    /// is of.
    pub function: Vaddr,
    /// It is the frame that the kernel makes for a signal handler: the caller
    /// was interrupted, and not at a call.
    pub signal: bool,
    cfa: Cfa,
    saved: Box<[(u16, Saved)]>,
}

/// How a step ended that led nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The frame has no caller, and says so.
    Top,
    /// The information needs a register whose value is not known.
    UnknownRegister,
    /// Memory that could not be read; above what was read of the stack.
    Memory(u64),
    /// The information is damaged, or leads nowhere.
    Damaged,
}

/// The unwind information of one file.
#[derive(Debug)]
pub struct Table {
    arch: Arch,
    header: Option<(u64, Vec<u8>)>,
    eh_frame: Option<(u64, Vec<u8>)>,
    text: u64,
    debug_frame: Option<Vec<u8>>,
    /// Start and end of each function, and the offset of its entry, where no
    /// header leads to it: sorted by start.
    eh_index: Vec<(u64, u64, usize)>,
    debug_index: Vec<(u64, u64, usize)>,
}

impl Table {
    /// The information of `file`; one without any when it has none.
    pub fn read<R: ReadAt + ?Sized>(elf: &Elf, file: &R) -> Table {
        let bytes = |name: &str| {
            let section = elf.section(name)?;
            if section.size == 0 || section.size > MAX_SECTION {
                return None;
            }
            let bytes = file.bytes_at(section.offset, section.size).ok()?;
            Some((section.vaddr.0, bytes))
        };
        let mut table = Table {
            arch: elf.arch,
            header: bytes(".eh_frame_hdr"),
            eh_frame: bytes(".eh_frame"),
            text: elf.section(".text").map_or(0, |s| s.vaddr.0),
            // A compressed one reads as damaged, and is then passed over.
            debug_frame: bytes(".debug_frame").map(|(_, bytes)| bytes),
            eh_index: Vec::new(),
            debug_index: Vec::new(),
        };
        if !table.has_header_table()
            && let Some((_, bytes)) = &table.eh_frame
        {
            table.eh_index = index(&table.eh_section(bytes), &table.bases());
        }
        if let Some(bytes) = &table.debug_frame {
            table.debug_index = index(&table.debug_section(bytes), &BaseAddresses::default());
        }
        table
    }

    /// Whether the file has none at all.
    pub fn is_empty(&self) -> bool {
        self.eh_frame.is_none() && self.debug_index.is_empty()
    }

    fn eh_section<'a>(&self, bytes: &'a [u8]) -> EhFrame<Slice<'a>> {
        let mut section = EhFrame::new(bytes, LittleEndian);
        section.set_address_size(8);
        if self.arch == Arch::Aarch64 {
            section.set_vendor(gimli::Vendor::AArch64);
        }
        section
    }

    fn debug_section<'a>(&self, bytes: &'a [u8]) -> DebugFrame<Slice<'a>> {
        let mut section = DebugFrame::new(bytes, LittleEndian);
        section.set_address_size(8);
        if self.arch == Arch::Aarch64 {
            section.set_vendor(gimli::Vendor::AArch64);
        }
        section
    }

    fn bases(&self) -> BaseAddresses {
        BaseAddresses::default()
            .set_eh_frame_hdr(self.header.as_ref().map_or(0, |(at, _)| *at))
            .set_eh_frame(self.eh_frame.as_ref().map_or(0, |(at, _)| *at))
            .set_text(self.text)
    }

    fn has_header_table(&self) -> bool {
        let Some((_, bytes)) = &self.header else {
            return false;
        };
        EhFrameHdr::new(bytes, LittleEndian)
            .parse(&self.bases(), 8)
            .is_ok_and(|header| header.table().is_some())
    }

    /// How to get from the instruction at `at` to its caller; `None` where the
    /// file does not say.
    pub fn rule(&self, at: Vaddr) -> Option<Rule> {
        self.eh_rule(at.0).or_else(|| {
            let section = self.debug_section(self.debug_frame.as_ref()?);
            let offset = find(&self.debug_index, at.0)?;
            rule(
                &section,
                &BaseAddresses::default(),
                gimli::DebugFrameOffset(offset),
                at.0,
                self.arch,
            )
        })
    }

    fn eh_rule(&self, at: u64) -> Option<Rule> {
        let (_, bytes) = self.eh_frame.as_ref()?;
        let section = self.eh_section(bytes);
        let bases = self.bases();
        let offset = match &self.header {
            Some((_, header)) if self.eh_index.is_empty() => {
                let header = EhFrameHdr::new(header, LittleEndian)
                    .parse(&bases, 8)
                    .ok()?;
                let table = header.table()?;
                table
                    .pointer_to_offset(table.lookup(at, &bases).ok()?)
                    .ok()?
            }
            _ => gimli::EhFrameOffset(find(&self.eh_index, at)?),
        };
        rule(&section, &bases, offset, at, self.arch)
    }
}

/// Every function of a section without a search table.
fn index<'a, S>(section: &S, bases: &BaseAddresses) -> Vec<(u64, u64, usize)>
where
    S: UnwindSection<Slice<'a>>,
{
    let mut found = Vec::new();
    let mut entries = section.entries(bases);
    // What follows a damaged entry is not known.
    while let Ok(Some(entry)) = entries.next() {
        if let gimli::CieOrFde::Fde(partial) = entry
            && let Ok(fde) = partial.parse(S::cie_from_offset)
            && fde.initial_address() != 0
            && fde.initial_address() < fde.end_address()
        {
            found.push((fde.initial_address(), fde.end_address(), fde.offset()));
        }
    }
    found.sort_unstable();
    found
}

fn find(index: &[(u64, u64, usize)], at: u64) -> Option<usize> {
    let before = index.partition_point(|(start, ..)| *start <= at);
    let (_, end, offset) = index.get(before.checked_sub(1)?)?;
    (at < *end).then_some(*offset)
}

fn rule<'a, S>(
    section: &S,
    bases: &BaseAddresses,
    offset: S::Offset,
    at: u64,
    arch: Arch,
) -> Option<Rule>
where
    S: UnwindSection<Slice<'a>>,
{
    let fde = section
        .fde_from_offset(bases, offset, S::cie_from_offset)
        .ok()?;
    if !fde.contains(at) || usize::from(fde.cie().return_address_register().0) != numbers(arch).ra {
        return None;
    }
    let mut context = UnwindContext::new();
    let row = fde
        .unwind_info_for_address(section, bases, &mut context, at)
        .ok()?;
    let expression = |expression: &gimli::UnwindExpression<usize>| {
        let expression = expression.get(section).ok()?;
        Some(Box::from(expression.0.slice()))
    };
    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => Cfa::Register(register.0, *offset),
        CfaRule::Expression(e) => Cfa::Expression(expression(e)?),
    };
    let mut saved = Vec::new();
    for (register, rule) in row.registers() {
        let rule = match rule {
            RegisterRule::Undefined => Saved::Unknown,
            RegisterRule::SameValue => Saved::Same,
            RegisterRule::Offset(offset) => Saved::At(*offset),
            RegisterRule::ValOffset(offset) => Saved::Is(*offset),
            RegisterRule::Register(register) => Saved::In(register.0),
            RegisterRule::Expression(e) => Saved::AtExpression(expression(e)?),
            RegisterRule::ValExpression(e) => Saved::IsExpression(expression(e)?),
            // AArch64's state of a signed return address: no register.
            RegisterRule::Constant(_) => continue,
            _ => return None,
        };
        saved.push((register.0, rule));
    }
    Some(Rule {
        function: Vaddr(fde.initial_address()),
        signal: fde.is_signal_trampoline(),
        cfa,
        saved: saved.into(),
    })
}

/// The caller's registers, by `rule`. `read` gives the word at an address of
/// the process, or `None`.
///
/// # Errors
/// [`End`] says why there is no caller to be found.
pub fn step(
    registers: &Registers,
    rule: &Rule,
    read: &mut impl FnMut(u64) -> Option<u64>,
) -> Result<Registers, End> {
    let n = numbers(registers.arch);
    let cfa = match &rule.cfa {
        Cfa::Register(register, offset) => registers
            .get(*register)
            .ok_or(End::UnknownRegister)?
            .wrapping_add_signed(*offset),
        Cfa::Expression(expression) => evaluate(expression, registers, None, read)?,
    };
    let mut caller = Registers {
        arch: registers.arch,
        ip: 0,
        values: [None; REGISTERS],
    };
    // What a rule is silent about is as the ABI has it.
    for (register, value) in caller.values.iter_mut().enumerate() {
        if (n.saved)(register) {
            *value = registers.values[register];
        }
    }
    caller.values[n.sp] = Some(cfa);
    let mut return_address = match registers.arch {
        Arch::X86_64 => None,
        Arch::Aarch64 => registers.values[n.ra],
    };
    let mut missing = End::UnknownRegister;
    for (register, saved) in &rule.saved {
        let value = match saved {
            Saved::Unknown => Ok(None),
            Saved::Same => Ok(registers.get(*register)),
            Saved::At(offset) => {
                let at = cfa.wrapping_add_signed(*offset);
                read(at).map(Some).ok_or(End::Memory(at))
            }
            Saved::Is(offset) => Ok(Some(cfa.wrapping_add_signed(*offset))),
            Saved::In(other) => Ok(registers.get(*other)),
            Saved::AtExpression(e) => evaluate(e, registers, Some(cfa), read)
                .and_then(|at| read(at).map(Some).ok_or(End::Memory(at))),
            Saved::IsExpression(e) => evaluate(e, registers, Some(cfa), read).map(Some),
        };
        if usize::from(*register) == n.ra {
            if *saved == Saved::Unknown {
                return Err(End::Top);
            }
            return_address = match value {
                Ok(value) => value,
                Err(end) => {
                    missing = end;
                    None
                }
            };
            continue;
        }
        let value = match value {
            Ok(value) => value,
            // More of the stack may have it.
            Err(end @ End::Memory(_)) => return Err(end),
            Err(_) => None,
        };
        if let Some(slot) = caller.values.get_mut(usize::from(*register)) {
            *slot = value;
        }
    }
    // A signal frame restores everything, also what a call would not keep.
    if rule.signal && registers.arch == Arch::Aarch64 {
        let restored = rule.saved.iter().any(|(r, _)| usize::from(*r) == n.ra);
        if !restored {
            return Err(End::Damaged);
        }
    }
    caller.ip = return_address.ok_or(missing)?;
    if caller.ip == 0 {
        return Err(End::Top);
    }
    // A stack grows downwards, and x86-64's call leaves its return address
    // there; a leaf of AArch64 may have no frame.
    let leaf = registers.arch == Arch::Aarch64
        && caller.sp() == registers.sp()
        && caller.ip != registers.ip;
    let moved = caller.sp() > registers.sp() || leaf;
    if !moved && !rule.signal {
        return Err(End::Damaged);
    }
    Ok(caller)
}

/// The value of a DWARF expression.
fn evaluate(
    expression: &[u8],
    registers: &Registers,
    initial: Option<u64>,
    read: &mut impl FnMut(u64) -> Option<u64>,
) -> Result<u64, End> {
    let encoding = gimli::Encoding {
        address_size: 8,
        format: gimli::Format::Dwarf32,
        version: 4,
    };
    let n = numbers(registers.arch);
    let mut evaluation = Evaluation::new(EndianSlice::new(expression, LittleEndian), encoding);
    evaluation.set_max_iterations(MAX_EXPRESSION);
    if let Some(value) = initial {
        evaluation.set_initial_value(value);
    }
    let mut result = evaluation.evaluate();
    loop {
        result = match result.map_err(|_| End::Damaged)? {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresMemory { address, size, .. } => {
                let word = read(address).ok_or(End::Memory(address))?;
                let bits = u32::from(size.clamp(1, 8)) * 8;
                let word = word & (u64::MAX >> (64 - bits));
                evaluation.resume_with_memory(Value::Generic(word))
            }
            EvaluationResult::RequiresRegister {
                register: Register(register),
                ..
            } => {
                let x86_ip = registers.arch == Arch::X86_64 && usize::from(register) == n.ra;
                let value = match x86_ip {
                    true => Some(registers.ip),
                    false => registers.get(register),
                };
                evaluation.resume_with_register(Value::Generic(value.ok_or(End::UnknownRegister)?))
            }
            _ => return Err(End::Damaged),
        };
    }
    match evaluation.as_result() {
        [piece] => match piece.location {
            Location::Address { address } => Ok(address),
            Location::Value {
                value: Value::Generic(value),
            } => Ok(value),
            _ => Err(End::Damaged),
        },
        _ => Err(End::Damaged),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn rule_of(cfa: Cfa, saved: &[(u16, Saved)]) -> Rule {
        Rule {
            function: Vaddr(0x1000),
            signal: false,
            cfa,
            saved: saved.into(),
        }
    }

    /// Words of a stack that starts at 0x7000.
    fn words(words: &'static [u64]) -> impl FnMut(u64) -> Option<u64> {
        move |at| {
            let index = usize::try_from(at.checked_sub(0x7000)? / 8).ok()?;
            words.get(index).copied()
        }
    }

    #[test]
    fn a_frame_of_each_architecture() {
        // push %rbp; mov %rsp,%rbp
        let rule = rule_of(
            Cfa::Register(6, 16),
            &[(6, Saved::At(-16)), (16, Saved::At(-8))],
        );
        let start = Registers::new(Arch::X86_64, 0x1010, 0x7000, Some(0x7008), None);
        let caller = step(&start, &rule, &mut words(&[1, 0x7100, 0x2020])).unwrap();
        assert_eq!((caller.ip(), caller.sp()), (0x2020, 0x7018));
        assert_eq!(caller.get(6), Some(0x7100));
        // stp x29, x30, [sp, #-16]!
        let rule = rule_of(
            Cfa::Register(31, 16),
            &[(29, Saved::At(-16)), (30, Saved::At(-8))],
        );
        let start = Registers::new(Arch::Aarch64, 0x1010, 0x7000, None, None);
        let caller = step(&start, &rule, &mut words(&[0x7100, 0x2020])).unwrap();
        assert_eq!((caller.ip(), caller.sp()), (0x2020, 0x7010));
        assert_eq!(caller.get(29), Some(0x7100));
        // A leaf without a frame returns by its link register.
        let leaf = rule_of(Cfa::Register(31, 0), &[]);
        let start = Registers::new(Arch::Aarch64, 0x1010, 0x7000, None, Some(0x2020));
        assert_eq!(step(&start, &leaf, &mut words(&[])).unwrap().ip(), 0x2020);
    }

    #[test]
    fn what_is_not_known_ends_the_stack() {
        let saved = &[(16, Saved::At(-8))];
        let start = Registers::new(Arch::X86_64, 0x1010, 0x7000, None, None);
        let by_bp = rule_of(Cfa::Register(6, 16), saved);
        let by_sp = rule_of(Cfa::Register(7, 8), saved);
        let end = |rule: &Rule, memory| step(&start, rule, &mut words(memory)).unwrap_err();
        assert_eq!(end(&by_bp, &[1, 2, 3]), End::UnknownRegister);
        assert_eq!(end(&by_sp, &[]), End::Memory(0x7000));
        assert_eq!(end(&by_sp, &[0]), End::Top);
        let top = rule_of(Cfa::Register(7, 8), &[(16, Saved::Unknown)]);
        assert_eq!(end(&top, &[1]), End::Top);
        // A stack that does not grow is none.
        let loops = rule_of(Cfa::Register(7, 0), &[(16, Saved::Is(0))]);
        assert_eq!(end(&loops, &[1]), End::Damaged);
        // A leaf of AArch64 whose link register nobody knows.
        let leaf = rule_of(Cfa::Register(31, 0), &[]);
        let start = Registers::new(Arch::Aarch64, 0x1010, 0x7000, None, None);
        let end = step(&start, &leaf, &mut words(&[])).unwrap_err();
        assert_eq!(end, End::UnknownRegister);
    }

    #[test]
    fn expressions_of_a_plt() {
        // breg7 (rsp) 8; breg16 (rip) 0; lit15; and; lit11; ge; lit3; shl; plus
        let plt = [0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22];
        let at = |ip| {
            let registers = Registers::new(Arch::X86_64, ip, 0x7000, None, None);
            evaluate(&plt, &registers, None, &mut |_| None)
        };
        assert_eq!(at(0x1000), Ok(0x7008));
        assert_eq!(at(0x100b), Ok(0x7010));
        let registers = Registers::new(Arch::X86_64, 0, 0, None, None);
        for end in 0..plt.len() {
            let _ = evaluate(&plt[..end], &registers, None, &mut |_| None);
        }
        // skip -3: for ever.
        let endless = [0x2f, 0xfd, 0xff];
        let result = evaluate(&endless, &registers, None, &mut |_| None);
        assert_eq!(result, Err(End::Damaged));
    }

    /// This test's own executable.
    fn own() -> (Table, Vaddr) {
        let file = File::open("/proc/self/exe").unwrap();
        let elf = Elf::parse(&file).unwrap();
        let process = crate::process::identity::Process::open(std::process::id()).unwrap();
        let here = own as fn() -> (Table, Vaddr) as usize as u64;
        let at = process
            .load_bias(elf.entry)
            .vaddr(super::super::addr::RuntimeAddr(here));
        (Table::read(&elf, &file), at)
    }

    #[test]
    fn with_and_without_a_search_table() {
        let (mut table, at) = own();
        let found = table.rule(at).unwrap();
        assert_eq!(found.function, at);
        table.header = None;
        table.eh_index = index(
            &table.eh_section(&table.eh_frame.as_ref().unwrap().1),
            &table.bases(),
        );
        assert_eq!(table.rule(at), Some(found));
        assert_eq!(table.rule(Vaddr(1)), None);
    }

    #[test]
    fn every_damage_is_an_answer() {
        let (mut table, at) = own();
        let header = table.header.clone().unwrap();
        for byte in 0..header.1.len().min(64) {
            for flip in [0xff, 0x80, 1] {
                let mut damaged = header.clone();
                damaged.1[byte] ^= flip;
                table.header = Some(damaged);
                let _ = table.rule(at);
            }
        }
        table.header = Some(header);
        let frames = table.eh_frame.clone().unwrap();
        for byte in 0..frames.1.len().min(4096) {
            let mut damaged = (frames.0, frames.1[..4096.min(frames.1.len())].to_vec());
            damaged.1[byte] ^= 0xff;
            let section = table.eh_section(&damaged.1);
            for (start, _, offset) in index(&section, &table.bases()).into_iter().take(20) {
                let offset = gimli::EhFrameOffset(offset);
                let _ = rule(&section, &table.bases(), offset, start, table.arch);
            }
        }
    }
}
