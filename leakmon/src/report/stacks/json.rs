//! One JSON object a task, each on a line. `docs/json.md` describes every
//! field.

use std::collections::BTreeMap;
use std::io;

use serde::Serialize;

use super::super::json::{FrameJson, SCHEMA_VERSION, line};
use super::frames;
use crate::task::{Dump, Frame};

#[derive(Serialize)]
struct TaskJson<'a> {
    schema_version: u32,
    id: u64,
    parent_id: Option<u64>,
    state: &'static str,
    reason: Option<&'a str>,
    on: Option<&'a str>,
    name: Option<&'a str>,
    scan: bool,
    waited_seconds: Option<f64>,
    locked_to_thread: bool,
    labels: BTreeMap<&'a str, &'a str>,
    created_by: Option<FrameJson<'a>>,
    entry: Option<FrameJson<'a>>,
    stack: Option<Vec<CallJson<'a>>>,
}

#[derive(Serialize)]
struct CallJson<'a> {
    #[serde(flatten)]
    frame: FrameJson<'a>,
    offset: u64,
    inlined: bool,
    hidden: bool,
}

impl<'a> CallJson<'a> {
    fn new(frame: &'a Frame) -> CallJson<'a> {
        CallJson {
            frame: FrameJson::new(frame),
            offset: frame.offset,
            inlined: frame.inlined,
            hidden: frame.hidden,
        }
    }
}

pub(super) fn write(dump: &Dump, out: &mut dyn io::Write) -> io::Result<()> {
    for task in &dump.tasks {
        let site = dump.sites.get(task.site.0 as usize);
        let waits = task.state.is_blocked();
        let object = TaskJson {
            schema_version: SCHEMA_VERSION,
            id: task.id,
            parent_id: task.parent,
            state: task.state.name(),
            reason: task.reason.as_deref().filter(|_| waits),
            on: task.on.as_deref(),
            name: task.name.as_deref(),
            scan: task.scan,
            waited_seconds: task.waited.map(|waited| waited.as_secs_f64()),
            locked_to_thread: task.locked_to_thread,
            labels: task
                .labels
                .iter()
                .map(|(name, value)| (&**name, &**value))
                .collect(),
            created_by: site.and_then(|site| site.created_by.as_ref().map(FrameJson::new)),
            entry: site.and_then(|site| site.entry.as_ref().map(FrameJson::new)),
            stack: task
                .stack
                .map(|id| frames(dump, Some(id)).iter().map(CallJson::new).collect()),
        };
        line(&object, out)?;
    }
    Ok(())
}
