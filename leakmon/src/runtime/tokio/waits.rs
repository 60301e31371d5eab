//! What tasks wait for.

use crate::task::{WaitClass, WaitKind};

/// Judges what a task waits for.
pub fn classify(reason: &str) -> WaitKind {
    let (class, missing) = match reason {
        "mpsc send" => (WaitClass::Hanging, "nobody received"),
        "mutex" | "rwlock read" | "rwlock write" => (WaitClass::Lock, "nobody unlocked"),
        // Nobody can tell what for.
        "waiting" => {
            return WaitKind {
                class: WaitClass::Idle,
                missing: None,
            };
        }
        _ => return WaitKind::default(),
    };
    WaitKind {
        class,
        missing: Some(missing),
    }
}
