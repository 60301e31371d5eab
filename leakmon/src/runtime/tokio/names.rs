//! What the tasks of a vtable are called.

use std::fs::File;
use std::sync::Arc;

use crate::binary::addr::Vaddr;
use crate::binary::elf::Elf;

use super::vtables::Vtable;

/// The name of what a vtable's tasks run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// `app::serve::{{closure}}`, or what is known instead of it.
    pub function: Arc<str>,
    /// Source file; empty when it is not known.
    pub file: Arc<str>,
    /// Line in it, from 1; 0 when it is not known.
    pub line: u32,
    /// `poll`, which stands for all of the name.
    pub poll: Vaddr,
    /// Why it may be another task's.
    pub doubt: Option<Arc<str>>,
}

/// The names of `vtables`, in their order.
pub fn find(_elf: &Elf, _file: &File, vtables: &[Vtable]) -> Vec<Arc<Name>> {
    let unnamed = |vtable: &Vtable| Name {
        function: format!("unnamed task, poll at {} (stripped)", vtable.poll).into(),
        file: "".into(),
        line: 0,
        poll: vtable.poll,
        doubt: None,
    };
    vtables
        .iter()
        .map(|vtable| Arc::new(unnamed(vtable)))
        .collect()
}
