//! Made-up populations for tests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::task::{Age, Frame, Group, Population, Site, SiteId, SiteKey, Stack, StackId, State};

/// The waits of these populations are Go's.
pub(crate) use crate::runtime::go::waits::kind as wait_kind;

/// A frame in `/src/app/main.go`.
pub(crate) fn frame(function: &str, line: u32) -> Frame {
    frame_in(function, "/src/app/main.go", line)
}

/// A frame in a file.
pub(crate) fn frame_in(function: &str, file: &str, line: u32) -> Frame {
    let entry = 0x48_0000 + 0x100 * function.bytes().map(u64::from).sum::<u64>();
    let offset = 0x10 + u64::from(line);
    Frame {
        function: function.into(),
        file: file.into(),
        line,
        pc: entry + offset,
        offset,
        entry,
        inlined: false,
        hidden: function.starts_with("runtime."),
    }
}

/// A site whose statement is in `creator` at `line`.
pub(crate) fn site(creator: &str, line: u32, entry: &str) -> Site {
    let created_by = frame(creator, line);
    let entry = frame(entry, line + 1);
    Site {
        doubt: None,
        key: SiteKey {
            created_at: created_by.pc,
            entry: entry.entry,
        },
        entry: Some(entry),
        created_by: Some(created_by),
    }
}

/// The stack of a task parked in `function` at `line`.
pub(crate) fn stack(reason: &str, function: &str, line: u32) -> Stack {
    let mut frames = vec![frame_in("runtime.gopark", "/go/src/runtime/proc.go", 462)];
    if reason.starts_with("chan") {
        frames.push(frame_in("runtime.chansend", "/go/src/runtime/chan.go", 283));
    }
    frames.push(frame(function, line));
    let place = Some(frames.len() - 1);
    frames.push(frame_in(
        "runtime.goexit",
        "/go/src/runtime/asm_amd64.s",
        1771,
    ));
    Stack { frames, place }
}

/// A population under construction.
pub(crate) struct Census {
    groups: Vec<Group>,
    sites: Vec<Site>,
    stacks: Vec<Stack>,
}

impl Census {
    pub(crate) fn new() -> Census {
        Census {
            groups: Vec::new(),
            sites: Vec::new(),
            stacks: Vec::new(),
        }
    }

    /// Adds waiting tasks.
    pub(crate) fn group(
        &mut self,
        site: &Site,
        reason: &str,
        function: &str,
        line: u32,
        count: u64,
        not_run: u64,
    ) -> &mut Group {
        let index = match self.sites.iter().position(|known| known == site) {
            Some(index) => index,
            None => {
                self.sites.push(site.clone());
                self.sites.len() - 1
            }
        };
        self.stacks.push(stack(reason, function, line));
        self.groups.push(Group {
            site: SiteId(index as u32),
            state: State::Waiting,
            reason: Some(reason.into()),
            stack: Some(StackId(self.stacks.len() as u32 - 1)),
            count,
            not_run,
            oldest: None,
            sample: self.groups.len() as u64 + 18,
        });
        self.groups.last_mut().unwrap()
    }

    /// Sets how long the oldest of the group added last has been blocked.
    pub(crate) fn aged(&mut self, seconds: u64) {
        self.groups.last_mut().unwrap().oldest = Some(Age {
            at_least: Duration::from_secs(seconds),
        });
    }

    pub(crate) fn done(self) -> Population {
        let mut states = BTreeMap::new();
        for group in &self.groups {
            *states.entry(group.state).or_default() += group.count;
        }
        Population {
            cycles: Vec::new(),
            schedulers: Vec::new(),
            warnings: Vec::new(),
            taken_at: 0,
            took: Duration::from_millis(1),
            count: self.groups.iter().map(|group| group.count).sum(),
            system: 5,
            unstable: 0,
            untold: 0,
            states,
            groups: self.groups,
            sites: Arc::new(self.sites),
            stacks: Arc::new(self.stacks),
        }
    }
}
