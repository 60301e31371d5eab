//! What is probed in a program with tokio, and what the counts mean.
//!
//! | role | place | what is in the registers (amd64 / arm64) |
//! |---|---|---|
//! | poll | in each vtable's `poll`, where the stack is as at its entry | RDI / X0: the task's header; the return address at RSP / in X30 |
//! | shutdown | in each vtable's `shutdown` | RDI / X0: the task's header |
//!
//! A task is known by its first poll, and so counted as spawned then; it has ended
//! when a poll leaves it complete, or `shutdown` ends it. The functions are in
//! `runtime/task/raw.rs` and `harness.rs`, tokio 1.18 to 1.54; each is called
//! through its vtable only, and by nobody else. Some linkers fold equal ones into
//! one: a place then stands for several vtables.
//!
//! Before 1.23 nothing says where a task's id is. A task that is polled in the
//! memory of one whose last poll has not returned yet is taken for that one then:
//! a spawn and an exit are missing, and the number of live tasks is right.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use leakmon_common::tokio::{Argument, Layout};
use rustc_hash::FxHashMap;

use crate::binary::addr::Vaddr;
use crate::binary::disasm::{self, Code, Instruction, Kind, Register};
use crate::binary::elf::Arch;
use crate::probe::{self, Counts, KnownTask, Place, Plan, Role, TaskRun};
use crate::process::memory::Memory;
use crate::runtime::{Probes, Refusal};
use crate::task::human::duration;
use crate::task::{Flow, Histogram, SiteFlow, SiteId, SiteKey, Stack, WaitFlow};

use super::census::Census;
use super::layout;
use super::program::Program;
use super::vtables;

/// Places that are attached at once, at most. A large program has a thousand kinds
/// of tasks; the kernel takes a link with some thousand places in less than a
/// second.
const MAX_PLACES: usize = 4096;

/// Bytes of a function whose end is not known that are decoded: its first
/// instruction.
const ONE_INSTRUCTION: u64 = 16;

/// A poll that takes longer than this holds up the other tasks of its worker.
const LONG_POLL: Duration = Duration::from_secs(1);

/// Warnings of one kind, at most.
const MAX_WARNINGS: usize = 10;

/// Finds the probe places of `program`.
///
/// # Errors
/// [`Refusal::Unreadable`] says what is not proven; the census goes on without.
pub fn find(program: &Program) -> Result<Probes, Refusal> {
    let starts = vtables::function_starts(&program.elf, &program.file);
    let mut places = Vec::new();
    for (role, function) in [
        (
            Role::Poll,
            (|vtable| vtable.poll) as fn(&vtables::Vtable) -> Vaddr,
        ),
        (Role::Shutdown, |vtable| vtable.shutdown),
    ] {
        for (entry, argument) in arguments(&program.vtables, function)? {
            let unproven =
                |why: &str| Refusal::Unreadable(format!("{} at {entry}: {why}", role.name()));
            let code = code(program, &starts, entry).ok_or_else(|| unproven("unreadable"))?;
            let found = place(program.elf.arch, &code, role).map_err(unproven)?;
            let offset = program.elf.file_offset(found.addr);
            let stepped = role == Role::Poll && !found.emulated;
            places.push(Place {
                code: probe::Code::File(Arc::clone(&program.file)),
                offset: offset.ok_or_else(|| unproven("it lies outside of the file"))?,
                role: if stepped { Role::PollStepped } else { role },
                argument: Argument {
                    stepped,
                    ..argument
                }
                .pack(),
            });
        }
    }
    if places.len() > MAX_PLACES {
        return Err(Refusal::Unreadable(format!(
            "its {} kinds of tasks have more places to probe than the {MAX_PLACES} that are probed at once",
            program.vtables.len()
        )));
    }
    places.push(Place::nowhere(Role::Idle));
    Ok(Probes {
        plan: Plan {
            layout: Layout {
                vtable: (program.layout.vtable() / 8) as u8,
            }
            .words(),
            places,
        },
        blocking_refused: None,
    })
}

/// One of the functions of all vtables, and what the probe there must know.
fn arguments(
    vtables: &[vtables::Vtable],
    function: fn(&vtables::Vtable) -> Vaddr,
) -> Result<BTreeMap<Vaddr, Argument>, Refusal> {
    let mut found = BTreeMap::new();
    for vtable in vtables {
        let argument = Argument {
            id: vtable.id.unwrap_or(0),
            located: vtable.spawn_location.is_some(),
            stepped: false,
        };
        match found.entry(function(vtable)) {
            Entry::Vacant(vacant) => drop(vacant.insert(argument)),
            // The code of a function names the offset, so that this never is.
            Entry::Occupied(there) if *there.get() != argument => {
                return Err(Refusal::Unreadable(format!(
                    "the function at {} is that of tasks whose ids lie at different places",
                    there.key()
                )));
            }
            Entry::Occupied(_) => {}
        }
    }
    Ok(found)
}

/// The function at `entry`; its first instruction where its end is not known.
fn code(program: &Program, starts: &[u64], entry: Vaddr) -> Option<Code> {
    let end = starts.get(starts.partition_point(|start| *start <= entry.0));
    let known = starts.binary_search(&entry.0).is_ok();
    let len = match end.filter(|_| known) {
        Some(end) => (end - entry.0).min(disasm::MAX_CODE as u64),
        None => ONE_INSTRUCTION,
    };
    let bytes = program.elf.read(&program.file, entry, len).ok()?;
    Some(Code::decode(program.elf.arch, entry, &bytes))
}

/// The instruction to probe: the first one that every kernel emulates, if each call
/// passes it once with the header still in its register and the return address
/// where it was; otherwise the function's first.
fn place(arch: Arch, code: &Code, role: Role) -> Result<Instruction, &'static str> {
    let (header, stack) = match arch {
        Arch::X86_64 => (Register::new(7), Register::new(4)),
        Arch::Aarch64 => (Register::new(0), Register::new(31)),
    };
    let first = code.instructions().first().ok_or("no instruction")?;
    if matches!(first.kind, Kind::Trap | Kind::Invalid) {
        return Err("its first instruction is not understood");
    }
    if code.is_target(first.addr) {
        return Err("it jumps to its first instruction");
    }
    for instruction in code.instructions() {
        if code.is_target(instruction.addr) {
            break;
        }
        if instruction.emulated {
            return Ok(*instruction);
        }
        // On AArch64 any store may be that of the return address, which a probe
        // of the return must come before.
        let keeps_return =
            role == Role::Shutdown || arch == Arch::X86_64 && !instruction.writes.contains(stack);
        if !matches!(instruction.kind, Kind::Other | Kind::Nop)
            || instruction.writes.contains(header)
            || instruction.exclusive
            || !keeps_return
        {
            break;
        }
    }
    Ok(*first)
}

/// The tasks of the latest census, for the kernel side.
pub fn known<M: Memory>(census: &Census<M>) -> Vec<KnownTask> {
    let program = census.program();
    let bias = census.bias();
    let known = census.known.iter().filter(|(_, known)| known.alive);
    known
        .map(|(addr, known)| {
            let vtable = &program.vtables[known.vtable as usize];
            KnownTask {
                header: *addr,
                // Where tokio does not say where it is, the probes do not read it.
                id: vtable.id.map_or(0, |_| known.id),
                site: SiteKey {
                    created_at: known.location,
                    entry: bias.runtime(vtable.addr).0,
                },
            }
        })
        .collect()
}

/// Puts names to what the probes counted.
pub fn flow<M: Memory>(census: &mut Census<M>, counts: &Counts) -> Flow {
    let mut sites: FxHashMap<SiteId, SiteFlow> = FxHashMap::default();
    let mut waits: FxHashMap<SiteId, WaitFlow> = FxHashMap::default();
    for (key, flow) in &counts.sites {
        if let Some(site) = site(census, *key) {
            sites.entry(site).or_default().add(*flow);
        }
    }
    for wait in &counts.waits {
        let Some(site) = site(census, wait.site) else {
            continue;
        };
        sites.entry(site).or_default().add(SiteFlow {
            runs: Some(wait.runs),
            ..SiteFlow::default()
        });
        if wait.parks == 0 {
            // Waits are not timed.
            continue;
        }
        let sum = waits.entry(site).or_insert_with(|| WaitFlow {
            site: census.sites[site.0 as usize].key,
            reason: "idle".into(),
            stack: Stack {
                frames: Vec::new(),
                place: None,
            },
            parks: 0,
            resumes: 0,
            durations: Histogram::default(),
        });
        sum.parks += wait.parks;
        sum.resumes += wait.resumes;
        sum.durations.add(&wait.durations);
    }
    Flow {
        sites: sites
            .into_iter()
            .map(|(site, flow)| (census.sites[site.0 as usize].clone(), flow))
            .collect(),
        waits: waits.into_values().collect(),
        hits: counts.hits.total(),
        dropped: counts.drops.losses().collect(),
    }
}

/// The census's site of what the kernel side knows by its vtable: all vtables of
/// one name are one site.
fn site<M: Memory>(census: &mut Census<M>, key: SiteKey) -> Option<SiteId> {
    let vtable = census.loaded.index(census.program(), key.entry)?;
    Some(census.site_of(vtable, key.created_at))
}

/// Spawns and exits, as far as they explain the latest census: what it found that
/// has never been polled is spawned, too.
pub fn totals<M: Memory>(census: &Census<M>, counts: &Counts) -> SiteFlow {
    let mut sum = SiteFlow::default();
    for (_, site) in &counts.sites {
        sum.add(*site);
    }
    let runs = Runs::of(census.program(), Some(counts));
    let scheduled = census.known.iter().filter(|(_, known)| {
        // A task waits for its first poll as one does that was woken.
        known.alive && known.scheduled
    });
    sum.spawned += scheduled
        .filter(|(addr, known)| runs.find(**addr, known.id).is_none())
        .count() as u64;
    sum
}

/// What the probes know of single tasks; nothing where they are not attached.
#[derive(Clone, Copy)]
pub(super) struct Runs<'a> {
    counts: Option<&'a Counts>,
    /// They know tasks by tokio's ids, and not only by their headers.
    by_id: bool,
}

impl<'a> Runs<'a> {
    pub(super) fn of(program: &Program, counts: Option<&'a Counts>) -> Runs<'a> {
        Runs {
            counts,
            by_id: program.layout == layout::Layout::V23,
        }
    }

    /// The task with this header and id.
    fn find(self, header: u64, id: u64) -> Option<&'a TaskRun> {
        let tasks = &self.counts?.tasks;
        let at = tasks.binary_search_by_key(&header, |task| task.header);
        let task = &tasks[at.ok()?];
        (task.id == id || !self.by_id).then_some(task)
    }

    /// When the latest poll of a task ended, CLOCK_MONOTONIC nanoseconds.
    pub(super) fn last(self, header: u64, id: u64) -> Option<u64> {
        self.find(header, id)?.last_poll_end
    }

    /// Tells of polls that take long, or took long.
    pub(super) fn warnings<M: Memory>(
        self,
        census: &Census<M>,
        now: u64,
        warnings: &mut Vec<String>,
    ) {
        let Some(counts) = self.counts else {
            return;
        };
        let program = census.program();
        let name = |key: SiteKey| {
            let vtable = census.loaded.index(program, key.entry)?;
            Some(&*program.names()[vtable as usize].function)
        };
        let long = LONG_POLL.as_nanos() as u64;
        let mut polled: Vec<(u64, &TaskRun)> = counts
            .tasks
            .iter()
            .filter_map(|task| Some((now.saturating_sub(task.polling_since?), task)))
            .filter(|(nanos, _)| *nanos > long)
            .collect();
        polled.sort_unstable_by_key(|(nanos, task)| (Reverse(*nanos), task.header));
        list(
            polled,
            "tasks have run for long",
            warnings,
            |(nanos, task)| {
                let known = census.known.get(&task.header).map(|known| known.id);
                let id = if self.by_id { Some(task.id) } else { known };
                let task_id = match id.filter(|id| *id != 0) {
                    Some(id) => format!("task {id}"),
                    None => "a task".to_owned(),
                };
                Some(format!(
                    "{task_id} ({}) has run for {} without yielding",
                    name(task.site)?,
                    duration(Duration::from_nanos(nanos))
                ))
            },
        );
        let mut longest: BTreeMap<&str, u64> = BTreeMap::new();
        for wait in &counts.waits {
            if wait.runs.longest_ns > long
                && let Some(name) = name(wait.site)
            {
                let longest = longest.entry(name).or_default();
                *longest = wait.runs.longest_ns.max(*longest);
            }
        }
        let mut longest: Vec<(&str, u64)> = longest.into_iter().collect();
        longest.sort_unstable_by_key(|(name, nanos)| (Reverse(*nanos), *name));
        list(
            longest,
            "sites had long polls",
            warnings,
            |(name, nanos)| {
                Some(format!(
                    "the longest poll of {name} took {}",
                    duration(Duration::from_nanos(nanos))
                ))
            },
        );
    }
}

/// Adds a sentence for each of `what`, up to so many.
fn list<T>(
    what: Vec<T>,
    words: &str,
    warnings: &mut Vec<String>,
    sentence: impl FnMut(T) -> Option<String>,
) {
    let more = what.len().saturating_sub(MAX_WARNINGS);
    warnings.extend(what.into_iter().take(MAX_WARNINGS).filter_map(sentence));
    if more > 0 {
        warnings.push(format!("{more} more {words}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn x86(code: &[u8]) -> Result<(u64, bool), &'static str> {
        let code = Code::decode(Arch::X86_64, Vaddr(0x1000), code);
        place(Arch::X86_64, &code, Role::Poll).map(|found| (found.addr.0, found.emulated))
    }

    #[test]
    fn the_first_emulated_instruction_before_the_stack_changes() {
        // push rbp; ret
        assert_eq!(x86(&[0x55, 0xc3]), Ok((0x1000, true)));
        // mov rax, [rdi]; push r15
        assert_eq!(x86(&[0x48, 0x8b, 0x07, 0x41, 0x57]), Ok((0x1003, true)));
        // xor eax, eax; jmp away: a thunk
        assert_eq!(x86(&[0x31, 0xc0, 0xe9, 0, 1, 0, 0]), Ok((0x1002, true)));
    }

    #[test]
    fn otherwise_the_entry() {
        for code in [
            // sub rsp, 8; push rbx: the return address is elsewhere by then
            &[0x48, 0x83, 0xec, 8, 0x53][..],
            // mov rdi, [rdi]; push rbx: the header is gone
            &[0x48, 0x8b, 0x3f, 0x53],
            // ret; push rbx
            &[0xc3, 0x53],
            // xor eax, eax; push rbx; pop rbx; je to the push: not once a call
            &[0x31, 0xc0, 0x53, 0x5b, 0x74, 0xfc],
        ] {
            assert_eq!(x86(code), Ok((0x1000, false)), "{code:x?}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        // ud2; nothing; an instruction cut off; mov eax, ebx; jmp to the entry
        for code in [
            &[0x0f, 0x0b][..],
            &[],
            &[0xe8, 0],
            &[0x89, 0xd8, 0xeb, 0xfc],
        ] {
            assert!(x86(code).is_err(), "{code:x?}");
        }
    }

    #[test]
    fn a_shutdown_need_not_return() {
        // sub rsp, 8; call away
        let bytes = [0x48, 0x83, 0xec, 8, 0xe8, 0, 1, 0, 0];
        let code = Code::decode(Arch::X86_64, Vaddr(0x1000), &bytes);
        let found = place(Arch::X86_64, &code, Role::Shutdown).unwrap();
        assert_eq!(found.addr, Vaddr(0x1004));
    }

    #[test]
    fn on_aarch64_a_poll_is_probed_at_its_entry() {
        // mov x1, x0; cbz x1, on
        let bytes = [0xaa00_03e1u32, 0xb400_0041].map(u32::to_le_bytes);
        let code = Code::decode(Arch::Aarch64, Vaddr(0x1000), bytes.as_flattened());
        let of = |role| place(Arch::Aarch64, &code, role).unwrap().addr;
        assert_eq!(of(Role::Poll), Vaddr(0x1000));
        assert_eq!(of(Role::Shutdown), Vaddr(0x1004));
    }

    #[test]
    fn only_so_much_is_listed() {
        let mut warnings = Vec::new();
        list((0..12).collect(), "numbers", &mut warnings, |n: u32| {
            Some(n.to_string())
        });
        assert_eq!(warnings.len(), MAX_WARNINGS + 1);
        assert_eq!(warnings.last().unwrap(), "2 more numbers");
    }
}
