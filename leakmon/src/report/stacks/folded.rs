//! Folded stacks, as flame graph tools read them: `root;caller;callee COUNT`.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::super::text::function;
use super::{counted_frames, shown};
use crate::task::{Dump, SiteId, StackId, State};

pub(super) fn write(dump: &Dump, out: &mut dyn io::Write) -> io::Result<()> {
    type Key<'a> = (SiteId, Option<StackId>, State, Option<&'a str>);
    let mut by_id: HashMap<Key<'_>, u64> = HashMap::new();
    for task in &dump.tasks {
        let reason = task.reason.as_deref().filter(|_| task.state.is_blocked());
        *by_id
            .entry((task.site, task.stack, task.state, reason))
            .or_default() += 1;
    }
    let mut by_line: BTreeMap<String, u64> = BTreeMap::new();
    for ((site, stack, state, reason), count) in by_id {
        let mut line = String::new();
        let creator = dump.sites.get(site.0 as usize);
        if let Some(creator) = creator.and_then(|site| site.created_by.as_ref())
            && !creator.hidden
        {
            line.push_str("created by ");
            line.push_str(&part(&creator.function));
            line.push(';');
        }
        let frames: Vec<_> = shown(counted_frames(dump, site, stack)).collect();
        for frame in frames.iter().rev() {
            line.push_str(&part(&frame.function));
            line.push(';');
        }
        let leaf = reason.unwrap_or(state.name());
        line.push('[');
        line.push_str(&part(leaf));
        if state == State::Leaked {
            line.push_str(" (leaked)");
        }
        line.push(']');
        *by_line.entry(line).or_default() += count;
    }
    for (line, count) in by_line {
        writeln!(out, "{line} {count}")?;
    }
    Ok(())
}

/// A name that does not contain the separator.
fn part(name: &str) -> String {
    function(name).replace(';', ",")
}
