//! Where to probe a Go program: the plan of its probe places.
//!
//! | role | place | what is in the registers (amd64 / arm64) |
//! |---|---|---|
//! | spawn | `CALL runqput` in `newproc.func1` | BX / R1: the new `g`; R14 / R28: `g0` |
//! | spawn (returned) | behind `CALL newproc1` in `newproc.func1`, where `runqput` is inlined, and in `newcoro.func1` | AX / R0: the new `g` |
//! | the same | `CALL casgstatus` from dead in `newproc.func1`, where `newproc1` is inlined | AX / R0: the new `g` |
//! | exit | `gdestroy` (from Go 1.22) or `goexit0`, at or behind the stack check | AX / R0: the `g` |
//! | park | every `CALL gopark` in the functions that block on channels and sync | R14 / R28: the `g`; CX / R2: the reason |
//! | resume | behind that call | R14 / R28: the `g` |
//! | park (universal) | `park_m` behind its stack check | AX / R0: the `g` |
//! | ready | `ready` behind its stack check | AX / R0: the woken `g` |
//!
//! Every place is the start of an instruction by disassembly from the
//! function's entry, one that every supported kernel emulates, and is executed
//! exactly once each time that the thing happens, by the function's control
//! flow. A place for which this is not proven is refused. All functions named
//! here are in `runtime/proc.go`, `chan.go`, `select.go`, `sema.go` and `coro.go`
//! of Go 1.18 to 1.27.

pub use crate::probe::Role;

use super::variables::{Convention, Functions, Refused, decode};
use crate::binary::addr::Vaddr;
use crate::binary::disasm::values::{Value, walk};
use crate::binary::disasm::{Code, Instruction, Kind, Register};
use crate::binary::elf::Arch;

/// One place to probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// Address of the instruction, in the file.
    pub vaddr: Vaddr,
    /// What happens there.
    pub role: Role,
    /// How many return addresses of the stack to keep, so that the list
    /// reaches the caller of the channel or sync operation.
    pub depth: u8,
    /// The function that the place is in.
    pub function: &'static str,
}

/// The places that see every wait on channels and sync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocking {
    /// The places.
    pub places: Vec<Found>,
    /// Why not the call sites of `gopark` are used, but `park_m` and `ready`,
    /// which see every wait of any kind.
    pub universal: Option<Refused>,
}

/// The plan for a program, tier by tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Spawns and exits.
    pub lifecycle: Result<Vec<Found>, Refused>,
    /// Waits.
    pub blocking: Result<Blocking, Refused>,
}

impl Places {
    /// Makes the plan.
    pub fn find(architecture: Arch, functions: &impl Functions) -> Places {
        let finder = Finder {
            architecture,
            convention: Convention::of(architecture),
            functions,
        };
        Places {
            lifecycle: finder.lifecycle(),
            blocking: finder.blocking(),
        }
    }
}

/// A function in which goroutines wait on channels or sync.
struct Waits {
    name: &'static str,
    /// Return addresses from the call of `gopark` up to the operation's caller.
    depth: u8,
    /// A goroutine that waits here goes on some day.
    goes_on: bool,
    /// It always waits by `gopark`. The others do so only if the compiler has
    /// inlined one of these into them.
    itself: bool,
}

const fn waits(name: &'static str, depth: u8, itself: bool) -> Waits {
    Waits {
        name,
        depth,
        goes_on: true,
        itself,
    }
}

/// All functions that wait on channels and sync, and those that a profile may
/// have had them inlined into: their only callers.
const WAITS: &[Waits] = &[
    waits("runtime.chansend", 2, true),
    waits("runtime.chanrecv", 2, true),
    waits("runtime.selectgo", 1, true),
    // Through `sync.runtime_SemacquireMutex`, `(*Mutex).lockSlow`,
    // `(*Mutex).Lock`.
    waits("runtime.semacquire1", 4, true),
    waits("sync.runtime_notifyListWait", 2, true),
    // `select {}`: for ever.
    Waits {
        name: "runtime.block",
        depth: 1,
        goes_on: false,
        itself: true,
    },
    waits("runtime.chansend1", 1, false),
    waits("runtime.chanrecv1", 1, false),
    waits("runtime.chanrecv2", 1, false),
    waits("runtime.selectnbsend", 1, false),
    waits("runtime.selectnbrecv", 1, false),
    waits("reflect.chansend", 2, false),
    waits("reflect.chansend0", 2, false),
    waits("reflect.chanrecv", 2, false),
    waits("reflect.rselect", 2, false),
    waits("runtime.semacquire", 3, false),
    waits("sync.runtime_Semacquire", 3, false),
    waits("sync.runtime_SemacquireWaitGroup", 3, false),
    waits("sync.runtime_SemacquireMutex", 3, false),
    waits("sync.runtime_SemacquireRWMutex", 3, false),
    waits("sync.runtime_SemacquireRWMutexR", 3, false),
    waits("internal/sync.runtime_SemacquireMutex", 3, false),
    waits("internal/poll.runtime_Semacquire", 3, false),
];

/// The functions that wake goroutines which wait on channels and sync: the body
/// of `goready`, under the names of those that it is inlined into (up to Go
/// 1.20 `.func1`, later `.goready.func1`).
const WAKES: &[&str] = &[
    "runtime.goready.func1",
    "runtime.send.func1",
    "runtime.recv.func1",
    "runtime.closechan.func1",
    "runtime.readyWithTime.func1",
    "runtime.goroutineReady.func1",
    "runtime.send.goready.func1",
    "runtime.recv.goready.func1",
    "runtime.closechan.goready.func1",
    "runtime.readyWithTime.goready.func1",
    "runtime.goroutineReady.goready.func1",
];

/// The wait's stack at `park_m`, from the waiting goroutine's saved frame
/// pointer: `gopark`'s caller comes first.
const UNIVERSAL_DEPTH: u8 = 4;

struct Finder<'a, F> {
    architecture: Arch,
    convention: Convention,
    functions: &'a F,
}

impl<F: Functions> Finder<'_, F> {
    fn lifecycle(&self) -> Result<Vec<Found>, Refused> {
        let mut places = vec![self.spawn()?];
        places.extend(self.exits()?);
        places.extend(self.coroutine_spawn());
        Ok(places)
    }

    fn blocking(&self) -> Result<Blocking, Refused> {
        let refused = match self.call_sites() {
            Ok(places) => {
                return Ok(Blocking {
                    places,
                    universal: None,
                });
            }
            Err(refused) => refused,
        };
        let park = self.behind_stack_check("runtime.park_m", Role::ParkUniversal, UNIVERSAL_DEPTH);
        let ready = self.behind_stack_check("runtime.ready", Role::Ready, 0);
        let places = vec![park?, ready?];
        self.ready_is_whole()?;
        Ok(Blocking {
            places,
            universal: Some(refused),
        })
    }

    /// Every function that wakes a goroutine by `ready` calls it.
    fn ready_is_whole(&self) -> Result<(), Refused> {
        let ready = self.entry("runtime.ready")?;
        for name in WAKES {
            if self.functions.entry(name).is_some()
                && calls(&self.decode(name)?, ready).next().is_none()
            {
                return Err(Refused::new(name, "ready is inlined into it"));
            }
        }
        Ok(())
    }

    /// Entry of a function that must be there.
    fn entry(&self, name: &'static str) -> Result<Vaddr, Refused> {
        self.functions
            .entry(name)
            .ok_or_else(|| Refused::new(name, "not in the function table"))
    }

    fn decode(&self, name: &'static str) -> Result<Code, Refused> {
        decode(self.architecture, self.functions, name)
    }

    fn spawn(&self) -> Result<Found, Refused> {
        const NAME: &str = "runtime.newproc.func1";
        let code = self.decode(NAME)?;
        let newproc1 = self.entry("runtime.newproc1")?;
        let place = |vaddr, role| Found {
            vaddr,
            role,
            depth: 0,
            function: NAME,
        };
        if calls(&code, newproc1).next().is_none() {
            return self
                .made_runnable(&code)
                .map(|vaddr| place(vaddr, Role::SpawnReturned))
                .map_err(|why| Refused::new(NAME, format!("newproc1 is inlined into it: {why}")));
        }
        let made = self.only_call(&code, NAME, newproc1, "newproc1")?;
        if let Some(runqput) = self.functions.entry("runtime.runqput")
            && let Some(queued) = self.queued(&code, made, newproc1, runqput)
        {
            return Ok(place(queued, Role::Spawn));
        }
        self.behind_call(&code, made, self.convention.arguments[0])
            .map(|vaddr| place(vaddr, Role::SpawnReturned))
            .map_err(|why| Refused::new(NAME, why))
    }

    /// In a function that `newproc1` is inlined into, the call
    /// `casgstatus(newg, _Gdead, ...)`, by which a new goroutine comes to life.
    /// Everything that a spawn is counted by (`gopc`, `startpc`) is set by then in
    /// every version; its id only from Go 1.24 on.
    fn made_runnable(&self, code: &Code) -> Result<Vaddr, String> {
        /// `_Gdead` in `runtime/runtime2.go`, Go 1.18 to 1.27.
        const DEAD: u64 = 6;
        let [first, second, _] = self.convention.arguments;
        let casgstatus = self
            .functions
            .entry("runtime.casgstatus")
            .ok_or("there is no casgstatus")?;
        let mut revived = Vec::new();
        let mut unclear = false;
        walk(code, first, |instruction, values| {
            if instruction.kind == Kind::Call(casgstatus) {
                match values.get(second) {
                    Value::Constant(DEAD) => revived.push(instruction.addr),
                    Value::Constant(_) => {}
                    _ => unclear = true,
                }
            }
        });
        let &[place] = revived.as_slice() else {
            return Err("it does not call casgstatus once to revive a g".to_owned());
        };
        if unclear {
            return Err("a call of casgstatus is not understood".to_owned());
        }
        let index = code.index_of(place).ok_or("no instruction")?;
        if !self.exactly_once(code, index) {
            return Err("the call of casgstatus may be passed by or repeated".to_owned());
        }
        Ok(place)
    }

    /// The call at `index` ends the program.
    fn never_returns(&self, code: &Code, index: usize) -> bool {
        code.instructions()
            .get(index)
            .and_then(|instruction| match instruction.kind {
                Kind::Call(callee) => self.functions.containing(callee),
                _ => None,
            })
            .is_some_and(|(name, entry)| {
                matches!(name, "runtime.throw" | "runtime.fatal")
                    || name.starts_with("runtime.panic")
                        && self.functions.entry(name) == Some(entry)
            })
    }

    /// The instruction at `index` is executed once, no more and no less, in
    /// every run of the function that returns.
    fn exactly_once(&self, code: &Code, index: usize) -> bool {
        let passed_by = code.reachable([0], |at| at == index || self.never_returns(code, at));
        let returns = code
            .instructions()
            .iter()
            .zip(&passed_by)
            .any(|(instruction, &reached)| reached && instruction.kind == Kind::Ret);
        let behind = code.reachable([index + 1], |at| self.never_returns(code, at));
        !returns && passed_by.get(index) == Some(&true) && behind.get(index) == Some(&false)
    }

    /// The call of `runqput` on the only way from the call of `newproc1` at
    /// `made`. Its second argument is what that returned: either in its register
    /// all the way, or (without optimisation) by way of the stack, where values
    /// are not followed.
    fn queued(&self, code: &Code, made: usize, newproc1: Vaddr, runqput: Vaddr) -> Option<Vaddr> {
        let [first, second, _] = self.convention.arguments;
        let straight = code.instructions()[made..]
            .iter()
            .skip(1)
            .take_while(|instruction| {
                instruction.kind.goes_on() && !matches!(instruction.kind, Kind::CondJump(_))
            })
            .find(|instruction| instruction.kind == Kind::Call(runqput))?
            .addr;
        let mut passed = false;
        walk(code, first, |instruction, values| {
            if instruction.addr == straight {
                passed = instruction.emulated
                    && match values.get(second) {
                        Value::Returned(call, offset) => call == newproc1 && offset == 0,
                        Value::Unknown => true,
                        Value::Constant(_) | Value::Argument(..) => false,
                    };
            }
        });
        passed.then_some(straight)
    }

    fn exits(&self) -> Result<Vec<Found>, Refused> {
        const GOEXIT: &str = "runtime.goexit0";
        const DESTROY: &str = "runtime.gdestroy";
        let Some(destroy) = self.functions.entry(DESTROY) else {
            return Ok(vec![self.behind_stack_check(GOEXIT, Role::Exit, 0)?]);
        };
        let goexit = self.decode(GOEXIT)?;
        let mut places = vec![self.behind_stack_check(DESTROY, Role::Exit, 0)?];
        if calls(&goexit, destroy).next().is_none() {
            // Inlined here; coroutines still call it.
            places.push(self.behind_stack_check(GOEXIT, Role::Exit, 0)?);
        }
        Ok(places)
    }

    /// Where `iter.Pull` makes a coroutine, if its end is seen too.
    fn coroutine_spawn(&self) -> Option<Found> {
        const NAME: &str = "runtime.newcoro.func1";
        let newproc1 = self.functions.entry("runtime.newproc1")?;
        let destroy = self.functions.entry("runtime.gdestroy")?;
        let switch = self.decode("runtime.coroswitch_m").ok()?;
        calls(&switch, destroy).next()?;
        let code = self.decode(NAME).ok()?;
        let made = self.only_call(&code, NAME, newproc1, "newproc1").ok()?;
        Some(Found {
            vaddr: self
                .behind_call(&code, made, self.convention.arguments[0])
                .ok()?,
            role: Role::SpawnReturned,
            depth: 0,
            function: NAME,
        })
    }

    /// Index of the only call of `target`.
    fn only_call(
        &self,
        code: &Code,
        function: &'static str,
        target: Vaddr,
        name: &str,
    ) -> Result<usize, Refused> {
        let mut found = calls(code, target);
        match (found.next(), found.next()) {
            (Some(index), None) => Ok(index),
            (None, _) => Err(Refused::new(function, format!("does not call {name}"))),
            (Some(_), Some(_)) => Err(Refused::new(
                function,
                format!("calls {name} more than once"),
            )),
        }
    }

    /// The first emulated instruction behind the call at index `call` that is
    /// reached from it alone and always, with `kept` unchanged since it
    /// returned.
    fn behind_call(&self, code: &Code, call: usize, kept: Register) -> Result<Vaddr, String> {
        let behind = code.instructions().get(call + 1..).unwrap_or_default();
        self.first_emulated(code, behind, kept)
            .map_err(|why| format!("behind a call, {why}"))
    }

    /// The first emulated instruction of `run`, adjacent instructions of
    /// `code`, if it is reached whenever the first one is and in no other way,
    /// with `kept` unchanged.
    fn first_emulated(
        &self,
        code: &Code,
        run: &[Instruction],
        kept: Register,
    ) -> Result<Vaddr, &'static str> {
        for instruction in run {
            if code.is_target(instruction.addr) {
                return Err("another path joins before an emulated instruction");
            }
            if instruction.emulated {
                return Ok(instruction.addr);
            }
            if instruction.exclusive {
                return Err("an exclusive sequence starts before an emulated instruction");
            }
            if instruction.writes.contains(kept) {
                return Err("the g is overwritten before an emulated instruction");
            }
            if !instruction.kind.goes_on()
                || matches!(instruction.kind, Kind::CondJump(_) | Kind::CallIndirect)
            {
                return Err("the path divides before an emulated instruction");
            }
        }
        Err("there is no emulated instruction")
    }

    /// The first emulated instruction behind the stack check of a function that
    /// runs on a thread's own stack (`g0`), with its first argument, a `g`,
    /// still in its register.
    ///
    /// Where there is none, the branch of the check itself: on this stack it is
    /// never taken in a program that lives, for `morestack` on `g0` is fatal
    /// (`badmorestackg0` in `runtime/stubs.go`, Go 1.18 to 1.27), so that the
    /// function is never started anew.
    fn behind_stack_check(
        &self,
        function: &'static str,
        role: Role,
        depth: u8,
    ) -> Result<Found, Refused> {
        let code = self.decode(function)?;
        let refused = |why: &str| Refused::new(function, why);
        let check = self.stack_check(&code).map_err(refused)?;
        let run = &code.instructions()[check.map_or(0, |index| index + 1)..];
        let vaddr = match (
            self.first_emulated(&code, run, self.convention.arguments[0]),
            check.map(|index| &code.instructions()[index]),
        ) {
            (Ok(vaddr), _) => vaddr,
            (Err(_), Some(branch)) if branch.emulated => branch.addr,
            (Err(why), _) => return Err(refused(&format!("behind the stack check, {why}"))),
        };
        Ok(Found {
            vaddr,
            role,
            depth,
            function,
        })
    }

    /// Index of the branch of the stack check; `None` for a function that has
    /// none.
    ///
    /// The check is the first branch of a function, and goes to a call of
    /// `runtime.morestack` or one of its variants, behind which the function
    /// starts anew: what lies before may be executed twice in a call.
    fn stack_check(&self, code: &Code) -> Result<Option<usize>, &'static str> {
        let argument = self.convention.arguments[0];
        for (index, instruction) in code.instructions().iter().enumerate() {
            if index > 0 && code.is_target(instruction.addr) {
                return Err("a path joins before the stack check");
            }
            match instruction.kind {
                Kind::CondJump(target) if self.grows_stack(code, target) => {
                    return Ok(Some(index));
                }
                Kind::Other | Kind::Nop if !instruction.writes.contains(argument) => {}
                _ => break,
            }
        }
        // Without a check nothing starts the function anew.
        let entry = code.instructions().first().map(|first| first.addr);
        match entry {
            Some(entry) if !code.is_target(entry) => Ok(None),
            _ => Err("the stack check is not understood"),
        }
    }

    /// The code at `target` goes straight to a call of `morestack`.
    fn grows_stack(&self, code: &Code, target: Vaddr) -> bool {
        let Some(index) = code.index_of(target) else {
            return false;
        };
        code.instructions()[index..]
            .iter()
            .find(|instruction| !matches!(instruction.kind, Kind::Other | Kind::Nop))
            .and_then(|instruction| match instruction.kind {
                Kind::Call(callee) => self.functions.containing(callee),
                _ => None,
            })
            .is_some_and(|(name, _)| name.starts_with("runtime.morestack"))
    }

    /// Every wait on channels and sync by its call of `gopark`.
    fn call_sites(&self) -> Result<Vec<Found>, Refused> {
        let gopark = self.entry("runtime.gopark")?;
        let mcall = self.entry("runtime.mcall")?;
        let mut places = Vec::new();
        for waits in WAITS {
            // The linker leaves out what is never called.
            if self.functions.entry(waits.name).is_none() {
                continue;
            }
            let code = self.decode(waits.name)?;
            let refused = |why: &str| Refused::new(waits.name, why);
            if calls(&code, mcall).next().is_some() {
                return Err(refused("gopark is inlined into it"));
            }
            let before = places.len();
            for call in calls(&code, gopark) {
                let instruction = &code.instructions()[call];
                if !instruction.emulated {
                    return Err(refused("its call of gopark is not emulated"));
                }
                let place = |vaddr, role, depth| Found {
                    vaddr,
                    role,
                    depth,
                    function: waits.name,
                };
                places.push(place(instruction.addr, Role::Park, waits.depth));
                if waits.goes_on
                    && let Some(vaddr) = self.resume(&code, call).map_err(|why| refused(&why))?
                {
                    places.push(place(vaddr, Role::Resume, 0));
                }
            }
            if waits.itself && places.len() == before {
                return Err(refused("does not call gopark"));
            }
        }
        Ok(places)
    }

    /// Where a goroutine goes on after the wait at index `call`; `None` if it
    /// never does: a wait on a nil channel, which the runtime follows with
    /// `throw("unreachable")`.
    fn resume(&self, code: &Code, call: usize) -> Result<Option<Vaddr>, String> {
        let behind = code.instructions().get(call + 1..).unwrap_or_default();
        let leaves = behind
            .iter()
            .zip(call + 1..)
            .find(|(instruction, _)| !matches!(instruction.kind, Kind::Other | Kind::Nop));
        if let Some((_, index)) = leaves
            && self.never_returns(code, index)
        {
            return Ok(None);
        }
        self.behind_call(code, call, self.convention.g).map(Some)
    }
}

/// Indices of the direct calls of `target`.
fn calls(code: &Code, target: Vaddr) -> impl Iterator<Item = usize> {
    code.instructions()
        .iter()
        .enumerate()
        .filter(move |(_, instruction)| instruction.kind == Kind::Call(target))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests;
