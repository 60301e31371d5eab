//! The kernel's own tasks: threads of a child.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use leakmon::probe::Kernel;

use super::alone;

/// A child that waits on its standard input, and is killed in the end.
struct Blocked(Child);

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn registers_of_a_blocked_thread_are_those_of_proc() {
    let _alone = alone();
    let child = Blocked(Command::new("cat").stdin(Stdio::piped()).spawn().unwrap());
    let pid = child.0.id();
    let kernel = Kernel::load().unwrap();
    // "NUMBER six arguments SP PC", or "running".
    let proc = || {
        let line = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/syscall")).unwrap();
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        (words.len() == 9).then_some(words)
    };
    let start = Instant::now();
    let words = loop {
        // read(2) of its standard input.
        match proc() {
            Some(words) if words[0] == libc::SYS_read.to_string() && words[1] == "0x0" => {
                break words;
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
        assert!(start.elapsed() < Duration::from_secs(10));
    };
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
    let threads = kernel.registers(pid).unwrap();
    assert_eq!(threads.len(), 1, "{threads:?}");
    let thread = threads[0];
    assert!(thread.is_blocked());
    assert_eq!(thread.tid, pid);
    assert_eq!(thread.syscall, Some(libc::SYS_read as u32));
    assert_eq!((thread.sp, thread.ip), (hex(&words[7]), hex(&words[8])));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    assert_eq!(thread.voluntary_switches, field("voluntary_ctxt_switches:"));
    assert_eq!(
        thread.involuntary_switches,
        field("nonvoluntary_ctxt_switches:")
    );

    // All threads of a process, and only its own.
    let own = kernel.registers(std::process::id()).unwrap();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert_eq!(own.len(), tasks);
    let start = Instant::now();
    for _ in 0..100 {
        kernel.registers(pid).unwrap();
    }
    println!("one thread's registers: {:?}", start.elapsed() / 100);
    drop(child);
    assert_eq!(kernel.registers(pid).unwrap(), []);
}
