//! What cannot be watched, stops being so, or is awkward to watch: every case
//! has its message and its exit code, and none a wrong number.

mod common;

use common::{leakmon, run};

#[test]
fn no_such_process() {
    // Beyond PID_MAX_LIMIT, include/linux/threads.h.
    let done = run(&mut leakmon(["--pid", "4194305", "--once"]));
    assert_eq!(done.err, "leakmon: pid 4194305: no such process\n");
    assert_eq!(done.out, "");
    done.expect_code(3);
}
