//! What Go's wait reasons let one conclude.

use crate::task::{WaitClass, WaitKind};

/// Judges a wait reason (`waitReasonStrings`, runtime/runtime2.go).
pub fn kind(reason: &str) -> WaitKind {
    // `chan send (durable)` is a send inside Go's testing/synctest.
    let reason = reason.strip_suffix(" (durable)").unwrap_or(reason);
    let (class, missing) = match reason {
        "chan send" => (WaitClass::Hanging, "nobody received"),
        "chan send (nil chan)" | "chan receive (nil chan)" => {
            (WaitClass::Hanging, "a nil channel is never ready")
        }
        "sync.Mutex.Lock" | "sync.RWMutex.RLock" | "sync.RWMutex.Lock" => {
            (WaitClass::Lock, "nobody unlocked")
        }
        "chan receive" => (WaitClass::Idle, "nobody sent or closed"),
        "select" => (WaitClass::Idle, "no case became ready"),
        "select (no cases)" => (WaitClass::Idle, "nothing can wake it"),
        "semacquire" => (WaitClass::Idle, "nobody released"),
        "sync.Cond.Wait" => (WaitClass::Idle, "nobody signalled"),
        "sync.WaitGroup.Wait" => (WaitClass::Idle, "the counter did not reach zero"),
        _ => return WaitKind::default(),
    };
    WaitKind {
        class,
        missing: Some(missing),
    }
}
