//! Where threads come from: the function that a thread runs, by the outermost
//! frames of its stack, or else its name.

use std::sync::Arc;

use crate::task::{Frame, Site, SiteKey, Stack};

use super::modules::{Modules, Resolved, Whose};

/// Marks a key that is made of a thread's name, not of an address.
const NAMED: u64 = 1 << 63;

/// Of what is named by its address alone in a program that rustc made.
pub(super) const MAYBE_STD: &str = "the program has no names: this may be a part of Rust's std";

/// The stack of these frames, innermost first, which may be cut short (not
/// `whole`). Without libc as a file of its own (`has_libc`), a frame without a
/// name may be libc's, and what is outside of it is not known.
pub(super) fn stack(frames: &[Resolved], whole: bool, has_libc: bool) -> Stack {
    // Where libc is part of the program the call is still libc's own.
    let call = usize::from(!has_libc);
    let outside = frames
        .iter()
        .skip(call)
        .position(|f| f.whose == Whose::Program);
    let place = match outside.map(|at| at + call) {
        Some(at) if !has_libc && !frames[at].named => None,
        Some(at) => Some(at),
        None if !has_libc => None,
        // Of a stack that ends within a library as near to it as is known.
        None if !whole => frames.len().checked_sub(1),
        None => (!frames.is_empty()).then_some(0),
    };
    Stack {
        place,
        frames: frames.iter().map(|frame| frame.frame.clone()).collect(),
    }
}

/// The function that a thread with this whole stack runs: the outermost frame
/// that is neither libc's nor a standard library's.
pub(super) fn entry(frames: &[Resolved], modules: &mut Modules) -> Option<Site> {
    // Without a name nobody knows where libc ends in a static program.
    let libc = frames.iter().rposition(|f| f.whose == Whose::System)?;
    let outermost = frames.last()?;
    // The main thread's stack ends in the program's own start code.
    if outermost.whose == Whose::Program {
        return None;
    }
    let mut program = frames[..libc]
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, f)| f.whose == Whose::Program);
    let (mut at, mut found) = program.next()?;
    let mut doubt: Option<Arc<str>> = None;
    // Rust's std starts each thread by one function of its own, which calls the
    // thread's: without names both look like the program's.
    if !found.named && modules.is_rust(found.frame.entry) {
        if let Some(next) = program.next() {
            (at, found) = next;
        }
        doubt = Some(MAYBE_STD.into());
    }
    let mut frame = modules.first_line(&found.frame);
    // The closure itself, where it was inlined into the function that Rust's
    // std starts threads by: its type is in that one's name.
    if let Some(caller) = frames.get(at + 1)
        && caller
            .frame
            .function
            .contains("__rust_begin_short_backtrace")
        && !frame.function.ends_with('}')
    {
        match generic(&caller.frame.function) {
            Some(closure) => {
                frame = Frame {
                    function: closure.into(),
                    line: 0,
                    file: "".into(),
                    ..modules.first_line(&caller.frame)
                };
            }
            None => {
                doubt = Some(
                    "the thread's closure may have been inlined: this is what it calls".into(),
                );
            }
        }
    }
    Some(Site {
        key: SiteKey {
            created_at: 0,
            entry: frame.entry & !NAMED,
        },
        entry: Some(frame),
        created_by: None,
        doubt,
    })
}

/// The first type argument of a function: `a::{closure#0}` of
/// `f::<a::{closure#0}, ()>`.
fn generic(function: &str) -> Option<&str> {
    let start = function.find("__rust_begin_short_backtrace::<")?;
    first_argument(&function[start + "__rust_begin_short_backtrace::<".len()..])
}

/// The first of a list of type arguments, which ends by `>`.
pub(super) fn first_argument(arguments: &str) -> Option<&str> {
    let mut depth = 0usize;
    for (at, c) in arguments.char_indices() {
        match c {
            '<' | '(' | '[' => depth += 1,
            '>' | ')' | ']' if depth == 0 => return Some(&arguments[..at]),
            '>' | ')' | ']' => depth -= 1,
            ',' if depth == 0 => return Some(&arguments[..at]),
            _ => {}
        }
    }
    None
}

/// A function's path without what a method's has in front of it:
/// `std::thread::Thread>::park` of `<std::thread::Thread>::park`.
pub(super) fn plain(function: &str) -> &str {
    function.trim_start_matches(['<', '&'])
}

/// The site of a process's first thread.
pub(super) fn of_main() -> Site {
    Site {
        key: SiteKey {
            created_at: 0,
            entry: NAMED,
        },
        entry: Some(unplaced("main".to_owned())),
        created_by: None,
        doubt: None,
    }
}

fn unplaced(function: String) -> Frame {
    Frame {
        function: function.into(),
        file: "".into(),
        line: 0,
        pc: 0,
        offset: 0,
        entry: 0,
        inlined: false,
        hidden: false,
    }
}

/// The site of threads whose stacks do not lead to where they started: those
/// with one name are one site.
pub(super) fn by_name(name: &str) -> Site {
    let folded = fold(name);
    // FNV-1a, as SiteHash has it.
    let hash = folded.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let key = SiteKey {
        created_at: 0,
        entry: hash | NAMED,
    };
    Site {
        key,
        entry: Some(unplaced(format!("thread \"{folded}\""))),
        created_by: None,
        doubt: Some(
            "told apart by the threads' names: their stacks do not show where they started".into(),
        ),
    }
}

/// A thread's name without what tells it from its brothers: `worker-12` is
/// `worker-`, `Thread-#3` is `Thread-`.
pub(super) fn fold(name: &str) -> &str {
    let folded = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let folded = match folded.len() < name.len() {
        true => folded.strip_suffix('#').unwrap_or(folded),
        false => folded,
    };
    if folded.is_empty() { name } else { folded }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_brothers_are_one() {
        for (name, folded) in [
            ("worker-12", "worker-"),
            ("tokio-runtime-w", "tokio-runtime-w"),
            ("Thread-#3", "Thread-"),
            ("C#", "C#"),
            ("42", "42"),
            ("", ""),
        ] {
            assert_eq!(fold(name), folded);
        }
        let (a, b, c) = (by_name("w1"), by_name("w2"), by_name("x"));
        assert_eq!(a.key, b.key);
        assert_ne!(a.key, c.key);
    }

    #[test]
    fn closures_in_the_name_of_what_starts_them() {
        let name = "std::sys::backtrace::__rust_begin_short_backtrace::<app::run::<[u8; 4], (i32, u8)>::{closure#0}, ()>";
        assert_eq!(
            generic(name),
            Some("app::run::<[u8; 4], (i32, u8)>::{closure#0}")
        );
        assert_eq!(
            generic("std::sys::backtrace::__rust_begin_short_backtrace"),
            None
        );
    }
}
