//! What cannot be watched, stops being so, or is awkward to watch: every case
//! has its message and its exit code, and none a wrong number.
//!
//! Needs root, and the fixtures (see `common`).

mod common;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{
    Done, Owned, Running, Started, fixture, leakmon, patched, run, scratch, signal_to, state,
    wait_until,
};
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use serde_json::Value;

const MICROSECOND: Duration = Duration::from_micros(1);

/// Whether this runs as root; says so once where it does not.
fn root() -> bool {
    let root = Uid::effective().is_root();
    if !root {
        eprintln!("this needs root: nothing is tested");
    }
    root
}

fn senders() -> Option<PathBuf> {
    let fixture = fixture("senders", "plain").filter(|_| root())?;
    Some(fs::canonicalize(fixture.path).expect("the fixture"))
}

/// leakmon's first report on a process, as JSON.
#[track_caller]
fn once(pid: u32) -> (Done, Value) {
    let pid = pid.to_string();
    let done = run(&mut leakmon(["--pid", &pid, "--once", "--format", "json"]));
    let mut reports = done.json();
    assert_eq!(reports.len(), 1, "{done:#?}");
    (done, reports.remove(0))
}

/// Watches a process by JSON until it has been reported twice.
fn watch<'a>(pid: u32, more: impl IntoIterator<Item = &'a str>) -> Started {
    let pid = pid.to_string();
    let args = ["--pid", &pid, "--interval", "50ms", "--format", "json"];
    let watch = Started::start(leakmon(args).args(more));
    watch.wait_for_line();
    watch.wait_for_line();
    watch
}

/// Without what differs from run to run: the time after `watched for`.
fn timeless(text: &str) -> String {
    match text.split_once("(watched for ") {
        Some((head, rest)) => {
            let tail = rest.split_once(')').map_or("", |(_, tail)| tail);
            format!("{head}(watched for T){tail}")
        }
        None => text.to_owned(),
    }
}

/// The process cannot be watched at all: this message, this code, no report.
#[track_caller]
fn unwatchable(pid: u32, message: &str, code: i32) {
    let number = pid.to_string();
    for args in [
        &["--pid", &number, "--once"][..],
        &["--pid", &number, "--tier", "blocking"],
        &["stacks", "--pid", &number],
    ] {
        let done = run(&mut leakmon(args));
        assert_eq!(done.err, format!("leakmon: pid {pid}{message}\n"));
        assert_eq!(done.out, "");
        done.expect_code(code);
    }
}

/// Its goroutines cannot be read for this reason: its threads are counted, and
/// the exit code says so.
#[track_caller]
fn refused(pid: u32, executable: &Path, reason: &str) {
    let (done, report) = once(pid);
    assert_eq!(done.err, "");
    done.expect_code(6);
    assert_eq!(report["refusal"], reason);
    assert!(report["tasks"].is_null() && report["sites"].is_null());
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    assert_eq!(report["threads"], tasks.count());

    let done = run(&mut leakmon(["stacks", "--pid", &pid.to_string()]));
    let executable = executable.display();
    assert_eq!(
        done.err,
        format!("leakmon: pid {pid} ({executable}): {reason}\n")
    );
    assert_eq!(done.out, "");
    done.expect_code(6);
}

/// The census counts what the program itself counts, in dumps and reports.
#[track_caller]
fn exact(running: &mut Running) {
    let pid = running.pid();
    exact_as(running, pid);
}

/// The same of a program that has this pid here, and another for itself.
#[track_caller]
fn exact_as(running: &mut Running, pid: u32) {
    let count = running.count();
    let (done, report) = once(pid);
    done.expect_code(0);
    assert_eq!(report["tasks"]["live"], count, "{report:#}");
    let done = run(&mut leakmon(["stacks", "--pid", &pid.to_string()]));
    done.expect_code(0);
    let headers = done
        .out
        .lines()
        .filter(|line| line.starts_with("goroutine "));
    assert_eq!(headers.count() as u64, count);
}

/// A shell whose `read` keeps it there, started from a script or as such.
fn script(text: &str) -> Owned {
    let mut command = Command::new("sh");
    Owned::spawn(command.args(["-c", text]).stdin(Stdio::piped()))
}

/// A C program, compiled with these arguments; `None`, which says so, where
/// there is no compiler.
fn c_program(folder: &Path, source: &str, args: &[&str]) -> Option<PathBuf> {
    let path = folder.join("program");
    let mut compiler = Command::new("cc");
    compiler.args(["-x", "c", "-", "-o"]).arg(&path).args(args);
    let child = compiler.stdin(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        eprintln!("there is no C compiler: C programs are not tested");
        return None;
    };
    let mut input = child.stdin.take().expect("its input");
    input.write_all(source.as_bytes()).expect("it reads");
    drop(input);
    assert!(child.wait().expect("a child").success());
    Some(path)
}

#[test]
fn no_such_process() {
    // Beyond PID_MAX_LIMIT, include/linux/threads.h.
    for pid in [0, 4_194_305, u32::MAX] {
        unwatchable(pid, ": no such process", 3);
    }
}

#[test]
fn a_process_that_has_ended_and_is_not_reaped() {
    let mut child = Command::new("true").spawn().expect("true");
    wait_until("it has ended", || state(child.id()) == Some('Z'));
    let message = " (true): has ended; its parent has yet to reap it";
    unwatchable(child.id(), message, 3);
    child.wait().expect("a child");
    unwatchable(child.id(), ": no such process", 3);
}

#[test]
fn a_kernel_thread() {
    // PF_KTHREAD, include/linux/sched.h, in field 9 of /proc/PID/stat.
    let kernel_thread = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let flags = stat.rsplit_once(") ")?.1.split(' ').nth(6)?;
        (flags.parse::<u64>().ok()? & 0x0020_0000 != 0).then_some(())
    };
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let Some(pid) = pids.find(|pid| kernel_thread(pid).is_some()) else {
        eprintln!("no kernel thread can be seen from here: none is tested");
        return;
    };
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).expect("its name");
    let message = format!(
        " ({}): a kernel thread, it runs no program",
        comm.trim_end()
    );
    unwatchable(pid, &message, 3);
}

#[test]
fn a_process_whose_main_thread_has_ended() {
    let folder = scratch();
    let source = "#include <pthread.h>\n#include <unistd.h>\n\
        static void *run(void *p) { for (;;) pause(); return p; }\n\
        int main(void) { pthread_t t; pthread_create(&t, 0, run, 0); pthread_exit(0); }\n";
    let Some(program) = c_program(folder.path(), source, &["-pthread"]) else {
        return;
    };
    let child = Owned::spawn(&mut Command::new(program));
    wait_until("its main thread has ended", || {
        state(child.pid()) == Some('Z')
    });
    let message = " (program): its main thread has ended while others run on; such a process \
                   cannot be read";
    unwatchable(child.pid(), message, 3);
}

/// It has threads and nothing else, as many as /proc says, and each in a dump.
#[track_caller]
fn threads_alone(pid: u32) {
    let (done, report) = once(pid);
    done.expect_code(0);
    let runtimes = report["runtimes"].as_array().expect("runtimes");
    assert_eq!(runtimes.len(), 1, "{report:#}");
    assert_eq!(runtimes[0]["runtime"]["name"], "threads");
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let tasks = tasks.count();
    assert_eq!(runtimes[0]["tasks"]["live"], tasks, "{report:#}");
    let done = run(&mut leakmon(["stacks", "--pid", &pid.to_string()]));
    done.expect_code(0);
    let headers = done.out.lines().filter(|line| line.starts_with("thread "));
    assert_eq!(headers.count(), tasks, "{}", done.out);
    let go = ["stacks", "--runtime", "go", "--pid", &pid.to_string()];
    let done = run(&mut leakmon(go));
    done.expect_code(6);
    assert!(done.err.contains("has no goroutines"), "{}", done.err);
}

#[test]
fn a_process_that_is_not_go() {
    if !root() {
        return;
    }
    let sleep = Owned::spawn(Command::new("sleep").arg("600"));
    threads_alone(sleep.pid());
    let shell = script("read line");
    threads_alone(shell.pid());

    let folder = scratch();
    let source = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n";
    for args in [&["-static"][..], &["-s"], &["-static-pie", "-s"]] {
        if let Some(program) = c_program(folder.path(), source, args) {
            let child = Owned::spawn(&mut Command::new(&program));
            threads_alone(child.pid());
        }
    }
}

#[test]
fn a_32_bit_process() {
    let Some(fixture) = fixture("senders", "386").filter(|_| root()) else {
        return;
    };
    let running = Running::start(&fixture.path);
    let executable = fs::canonicalize(&fixture.path).expect("the fixture");
    let reason = "its executable is a 32-bit program; only 64-bit programs are supported";
    refused(running.pid(), &executable, reason);
}

#[test]
fn a_garbled_program() {
    let fixture = common::all("senders", "garbled").pop();
    let Some(fixture) = fixture.filter(|_| root()) else {
        return;
    };
    let running = Running::start(&fixture.path);
    let executable = fs::canonicalize(&fixture.path).expect("the fixture");
    let reason = "obfuscated (it looks like garble): its function table is encrypted; build it \
                  without garble";
    refused(running.pid(), &executable, reason);
}

#[test]
fn versions_of_go_that_nobody_knows() {
    let Some(fixture) = fixture("senders", "plain").filter(|_| root()) else {
        return;
    };
    let folder = scratch();
    let known = fixture.go_version.as_bytes();
    assert_eq!(known.len(), "go1.26.8".len());
    let unknown = |version: &str| {
        format!(
            "built by {version}, whose layout this leakmon does not know (it reads Go 1.18 to \
             1.27); a newer leakmon may"
        )
    };
    let too_old = "built by Go 1.17 or older; leakmon reads Go 1.18 to 1.27".to_owned();
    for (version, reason) in [
        ("go1.99.8", unknown("go1.99.8")),
        ("go1.28.1", unknown("go1.28.1")),
        ("go1.17.9", too_old.clone()),
        ("go1.2.99", too_old),
        ("devel +1", unknown("devel +1")),
        ("go2.0.0!", unknown("go2.0.0!")),
        // A terminal does not see the escape sequence.
        ("\u{1b}[31mgo", unknown("?[31mgo")),
    ] {
        let mut version = version.as_bytes().to_vec();
        version.resize(known.len(), b' ');
        let program = patched(&fixture.path, folder.path(), known, &version);
        let running = Running::start(&program);
        refused(
            running.pid(),
            &program,
            reason.replace("mgo", "mgo ").trim_end(),
        );
    }
}

#[test]
fn the_wrong_version_of_two_that_are_known() {
    // The layout of 1.24 does not fit a program of 1.26: this is found out.
    let Some(fixture) = fixture("senders", "plain").filter(|_| root()) else {
        return;
    };
    let folder = scratch();
    let known = fixture.go_version.as_bytes();
    for claimed in ["go1.18.8", "go1.20.8", "go1.23.8", "go1.24.8"] {
        let program = patched(&fixture.path, folder.path(), known, claimed.as_bytes());
        let running = Running::start(&program);
        let (done, report) = once(running.pid());
        done.expect_code(6);
        assert!(report["tasks"].is_null(), "{claimed}: {report:#}");
    }
}

#[test]
fn it_dies_while_it_is_watched() {
    let Some(path) = senders() else { return };
    for (tier, reaped) in [("census", false), ("census", true), ("blocking", false)] {
        let mut running = Running::start(&path);
        let pid = running.pid();
        let watch = watch(pid, ["--tier", tier]);
        running.child.signal(Signal::SIGKILL);
        if reaped {
            running.child.kill();
        }
        let done = watch.finish();
        assert_eq!(
            timeless(&done.err),
            format!(
                "leakmon: pid {pid} ({}): the process has ended (watched for T)\n",
                path.display()
            )
        );
        done.expect_code(5);
        for report in done.json() {
            assert_eq!(report["tasks"]["live"], 1, "{report:#}");
        }
    }
}

#[test]
fn it_ends_while_it_is_watched() {
    let Some(path) = senders() else { return };
    let mut running = Running::start(&path);
    let watch = watch(running.pid(), []);
    running.end();
    let done = watch.finish();
    assert!(done.err.contains("the process has ended"), "{done:#?}");
    done.expect_code(5);
}

#[test]
fn one_that_is_not_go_ends_or_is_replaced_while_it_is_watched() {
    if !root() {
        return;
    }
    let mut shell = script("read line; exec sh -c 'read line'");
    let pid = shell.pid();
    let executable = fs::read_link(format!("/proc/{pid}/exe")).expect("its executable");
    let executable = executable.display();

    let first = watch(pid, []);
    let mut input = shell.0.stdin.take().expect("its input");
    input.write_all(b"\n").expect("it reads");
    let done = first.finish();
    assert_eq!(
        timeless(&done.err),
        format!(
            "leakmon: pid {pid} ({executable}): the process replaced its program by exec \
             (watched for T); start leakmon again to watch the new one\n"
        )
    );
    done.expect_code(5);

    let second = watch(pid, []);
    drop(input);
    let done = second.finish();
    assert_eq!(
        timeless(&done.err),
        format!("leakmon: pid {pid} ({executable}): the process has ended (watched for T)\n")
    );
    done.expect_code(5);
}

#[test]
fn exec_replaces_it_while_it_is_watched() {
    let Some(path) = senders() else { return };
    let zoo = fixture("zoo", "pie").map(|fixture| fixture.path.display().to_string());
    let itself = path.display().to_string();
    for (tier, program) in [
        ("census", "/bin/sleep 600".to_owned()),
        ("census", itself.clone()),
        ("blocking", itself),
        ("lifecycle", zoo.unwrap_or("/bin/cat".to_owned())),
    ] {
        let mut running = Running::start(&path);
        running.ask("call 3");
        assert_eq!(running.count(), 7);
        let pid = running.pid();
        let watch = watch(pid, ["--tier", tier]);
        running.tell(&format!("exec {program}"));
        let done = watch.finish();
        assert_eq!(
            timeless(&done.err),
            format!(
                "leakmon: pid {pid} ({}): the process replaced its program by exec (watched \
                 for T); start leakmon again to watch the new one\n",
                path.display()
            )
        );
        done.expect_code(5);
        for report in done.json() {
            assert_eq!(report["tasks"]["live"], 7, "{program}: {report:#}");
        }
    }
}

/// Death at any moment of a census or a dump: the right numbers, or none.
#[test]
fn it_dies_in_the_middle_of_a_census() {
    let Some(path) = senders() else { return };
    let mut ended = 0;
    for round in 0..40 {
        let mut running = Running::start(&path);
        running.ask("call 500");
        let count = running.count();
        let pid = running.pid().to_string();
        let dump = ["stacks", "--pid", &pid, "--format", "json"];
        let census = ["--pid", &pid, "--once", "--format", "json"];
        let started = if round % 2 == 0 {
            Started::start(&mut leakmon(dump))
        } else {
            Started::start(&mut leakmon(census))
        };
        std::thread::sleep(MICROSECOND * (1500 * (round / 2)));
        running.child.signal(Signal::SIGKILL);
        let done = started.finish();
        match done.code {
            Some(0) if round % 2 == 0 => assert_eq!(done.out.lines().count() as u64, count),
            Some(0) => assert_eq!(done.json()[0]["tasks"]["live"], count),
            Some(3) => assert!(done.out.is_empty(), "{done:#?}"),
            Some(5) => {
                ended += 1;
                assert!(done.out.is_empty(), "{done:#?}");
                assert!(done.err.contains(": the process has ended"), "{done:#?}");
            }
            _ => panic!("{done:#?}"),
        }
    }
    eprintln!("{ended} of 40 ended in the middle");
}

#[test]
fn its_executable_is_deleted_or_replaced() {
    let Some(path) = senders() else { return };
    let decoy = fixture("zoo", "pie").map(|fixture| fixture.path);
    let folder = scratch();
    let program = folder.path().join("program");

    // Deleted.
    fs::copy(&path, &program).expect("a copy");
    let mut running = Running::start(&program);
    running.ask("call 4");
    fs::remove_file(&program).expect("its file");
    exact(&mut running);
    probes(&mut running);

    // Replaced by rename, first by no program at all, then by another.
    fs::copy(&path, &program).expect("a copy");
    let mut running = Running::start(&program);
    running.ask("call 5");
    fs::write(folder.path().join("new"), "not a program").expect("a file");
    fs::rename(folder.path().join("new"), &program).expect("a rename");
    exact(&mut running);
    if let Some(decoy) = &decoy {
        fs::copy(decoy, folder.path().join("new")).expect("a copy");
        fs::rename(folder.path().join("new"), &program).expect("a rename");
        exact(&mut running);
        probes(&mut running);
    }
    fs::remove_file(&program).expect("a file");

    // Renamed itself, while it is watched.
    fs::copy(&path, &program).expect("a copy");
    let mut running = Running::start(&program);
    let watch = watch(running.pid(), []);
    fs::rename(&program, folder.path().join("moved")).expect("a rename");
    watch.wait_for_line();
    watch.wait_for_line();
    watch.signal(Signal::SIGINT);
    watch.finish().expect_code(0);
    exact(&mut running);

    // The same of one that is not Go.
    fs::copy("/bin/sleep", &program).expect("a copy");
    let sleep = Owned::spawn(Command::new(&program).arg("600"));
    let watch = self::watch(sleep.pid(), []);
    fs::remove_file(&program).expect("a file");
    watch.wait_for_line();
    watch.wait_for_line();
    watch.signal(Signal::SIGINT);
    let done = watch.finish();
    assert_eq!(done.err, "");
}

/// The probes count exactly what the program spawns.
#[track_caller]
fn probes(running: &mut Running) {
    let watch = watch(running.pid(), ["--tier", "blocking"]);
    for _ in 0..4 {
        watch.wait_for_line();
    }
    running.ask("call 10");
    for _ in 0..3 {
        watch.wait_for_line();
    }
    watch.signal(Signal::SIGINT);
    let done = watch.finish();
    done.expect_code(0);
    let last = done.json().pop().expect("a report");
    assert_eq!(last["tier"]["name"], "blocking", "{last:#}");
    // Three senders each, of which two are left.
    assert_eq!(last["probes"]["spawned"], 30, "{last:#}");
    assert_eq!(last["probes"]["exited"], 10, "{last:#}");
    assert_eq!(last["tasks"]["live"], running.count());
}

#[test]
fn another_mount_namespace_and_another_root() {
    let Some(path) = senders() else { return };
    let folder = scratch();
    let (folder, source) = (folder.path().display(), path.display());

    // The program lies on a file system that nobody else sees.
    let commands =
        format!("mount -t tmpfs none {folder} && cp {source} {folder}/p && exec {folder}/p");
    let unshare = ["-m", "--propagation", "private", "sh", "-c", &commands];
    let mut running = Running::command(Command::new("unshare").args(unshare));
    running.ask("call 6");
    exact(&mut running);
    probes(&mut running);

    // Another program lies at its path for everybody else.
    let program = scratch();
    let target = program.path().join("p");
    fs::write(&target, "not a program").expect("a file");
    let target = target.display();
    let commands = format!("mount --bind {source} {target} && exec {target}");
    let unshare = ["-m", "--propagation", "private", "sh", "-c", &commands];
    let mut running = Running::command(Command::new("unshare").args(unshare));
    running.ask("call 7");
    exact(&mut running);
    probes(&mut running);

    // Another root, and pids of its own.
    let jail = scratch();
    fs::copy(&path, jail.path().join("p")).expect("a copy");
    let root = format!("--root={}", jail.path().display());
    let unshare = ["--pid", "--fork", "--kill-child", &root, "/p"];
    let mut running = Running::command(Command::new("unshare").args(unshare));
    assert_eq!(running.says, 1);
    let parent = running.pid();
    let children = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(children).expect("its children");
    let pid: u32 = children.trim().parse().expect("one child");
    running.ask("call 8");
    exact_as(&mut running, pid);
}

#[test]
fn a_stopped_process() {
    let Some(path) = senders() else { return };
    let mut running = Running::start(&path);
    running.ask("call 9");
    let count = running.count();
    running.child.signal(Signal::SIGSTOP);
    wait_until("it has stopped", || state(running.pid()) == Some('T'));
    let (done, report) = once(running.pid());
    done.expect_code(0);
    assert_eq!(report["tasks"]["live"], count);
    running.child.signal(Signal::SIGCONT);
    exact(&mut running);
}

#[test]
fn another_users_process() {
    let Some(path) = senders() else { return };
    let folder = tempfile::tempdir().expect("a folder that all may enter");
    open(folder.path());
    let program = folder.path().join("program");
    fs::copy(&path, &program).expect("a copy");
    let mut running = Running::command(as_nobody().arg(&program));
    running.ask("call 2");
    exact(&mut running);
    probes(&mut running);
}

fn open(folder: &Path) {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("its mode");
}

fn as_nobody() -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--",
    ]);
    command
}

/// leakmon where everybody may run it.
fn public_leakmon(folder: &Path) -> PathBuf {
    open(folder);
    let copy = folder.join("leakmon");
    fs::copy(env!("CARGO_BIN_EXE_leakmon"), &copy).expect("a copy");
    copy
}

const REMEDY: &str = "run as root, or: setcap cap_sys_ptrace,cap_bpf,cap_perfmon+ep \
                      path/to/leakmon";

#[test]
fn leakmon_without_privileges() {
    let Some(path) = senders() else { return };
    let running = Running::start(&path);
    let pid = running.pid();
    let folder = tempfile::tempdir().expect("a folder that all may enter");
    let leakmon = public_leakmon(folder.path());
    for args in [&["--once"][..], &["--tier", "census"], &[]] {
        let mut command = as_nobody();
        let done = run(command
            .arg(&leakmon)
            .arg("--pid")
            .arg(pid.to_string())
            .args(args));
        let message = format!(
            "leakmon: pid {pid} (senders): reading its auxiliary vector is not permitted: \
             CAP_SYS_PTRACE is missing, to read the memory of other users' processes: {REMEDY}"
        );
        assert!(done.err.starts_with(&message), "{done:#?}");
        assert!(!done.err.contains("CAP_BPF"), "{done:#?}");
        assert_eq!(done.out, "");
        done.expect_code(4);
    }
}

#[test]
fn leakmon_without_one_capability() {
    let Some(path) = senders() else { return };
    let mut running = Running::start(&path);
    running.ask("call 2");
    let pid = running.pid().to_string();
    let limited = |capability: &str, args: &[&str]| {
        // CAP_SYS_ADMIN stands for both others.
        let without = format!("--bounding-set=-{capability},-sys_admin");
        let mut command = Command::new("setpriv");
        command.args([&without, "--", env!("CARGO_BIN_EXE_leakmon")]);
        run(command.args(["--pid", &pid, "--format", "json"]).args(args))
    };
    for (capability, name, other, purpose) in [
        (
            "bpf",
            "CAP_BPF",
            "CAP_PERFMON is",
            "to load what counts in the kernel",
        ),
        ("perfmon", "CAP_PERFMON", "CAP_BPF is", "to attach probes"),
    ] {
        let why = format!("{name} is missing, {purpose}: {REMEDY}");
        // The census goes on, and says why it is no more.
        let done = limited(capability, &["--interval", "200ms", "--duration", "2s"]);
        done.expect_code(0);
        assert_eq!(done.err, "");
        let reports = done.json();
        assert!(reports.iter().all(|report| report["tasks"]["live"] == 5));
        let last = reports.last().expect("a report");
        assert_eq!(last["tier"]["name"], "census");
        assert_eq!(last["tier"]["reason"], "unavailable");
        let detail = last["tier"]["detail"].as_str().expect("a reason");
        assert!(detail.contains(&why) && !detail.contains(other), "{detail}");
        // Who asks for the tier gets it or an error.
        for tier in ["lifecycle", "blocking"] {
            let done = limited(capability, &["--tier", tier]);
            assert!(done.err.contains(&why), "{done:#?}");
            assert!(!done.err.contains(other), "{done:#?}");
            done.expect_code(4);
        }
        limited(capability, &["--once"]).expect_code(0);
    }
    for args in [&["--once"][..], &["--tier", "blocking"]] {
        let done = limited("sys_ptrace", args);
        let why = format!(
            ": CAP_SYS_PTRACE is missing, to read the memory of other users' processes: {REMEDY}"
        );
        assert!(done.err.contains(&why), "{done:#?}");
        assert_eq!(done.out, "");
        done.expect_code(4);
    }
}

#[test]
fn several_processes_of_which_one_is_bad() {
    let Some(path) = senders() else { return };
    let mut good = Running::start(&path);
    good.ask("call 2");
    let mut doomed = Running::start(&path);
    let (good_pid, doomed_pid) = (good.pid().to_string(), doomed.pid().to_string());

    // Known to be bad from the start: nothing is watched.
    let pids = ["--pid", &good_pid, "--pid", "4194305", "--once"];
    let done = run(&mut leakmon(pids));
    assert_eq!(done.err, "leakmon: pid 4194305: no such process\n");
    assert_eq!(done.out, "");
    done.expect_code(3);

    // One that is not Go besides: both are reported, the code tells.
    let sleep = Owned::spawn(Command::new("sleep").arg("600"));
    let sleep_pid = sleep.pid().to_string();
    let pids = [
        "--pid", &good_pid, "--pid", &sleep_pid, "--once", "--format", "json",
    ];
    let done = run(&mut leakmon(pids));
    done.expect_code(0);
    assert_eq!(done.json().len(), 2);

    // One ends: the other is watched on, the code tells.
    let watched = watch(good.pid(), ["--pid", &doomed_pid]);
    doomed.child.kill();
    for _ in 0..6 {
        watched.wait_for_line();
    }
    watched.signal(Signal::SIGINT);
    let done = watched.finish();
    assert_eq!(
        timeless(&done.err),
        format!(
            "leakmon: pid {doomed_pid} ({}): the process has ended (watched for T)\n",
            path.display()
        )
    );
    done.expect_code(5);
    let reports = done.json();
    let last = reports.last().expect("a report");
    assert_eq!(
        (&last["process"]["pid"], &last["tasks"]["live"]),
        (&good.pid().into(), &5.into())
    );
}

#[test]
fn a_watch_that_is_asked_to_end() {
    let Some(path) = senders() else { return };
    let mut running = Running::start(&path);
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let watch = watch(running.pid(), []);
        signal_to(watch.pid(), signal);
        let done = watch.finish();
        assert_eq!(done.err, "");
        done.expect_code(0);
    }
    assert_eq!(running.count(), 1);
}

/// Intervals shorter than a census are passed over, and the reports say how
/// long it was between them.
#[test]
fn intervals_are_what_they_are() {
    let Some(path) = senders() else { return };
    let running = Running::start(&path);
    let pid = running.pid().to_string();
    let args = [
        "--pid",
        &pid,
        "--interval",
        "10ms",
        "--duration",
        "1s",
        "--format",
        "json",
    ];
    let watch = Started::start(&mut leakmon(args));
    watch.wait_for_line();
    watch.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_millis(500));
    watch.signal(Signal::SIGCONT);
    let done = watch.finish();
    done.expect_code(0);
    assert!(done.took < Duration::from_secs(4), "{:?}", done.took);
    let reports = done.json();
    let seconds = |report: &Value, field: &str| report[field].as_f64().expect("seconds");
    let longest = reports
        .iter()
        .map(|report| seconds(report, "interval_seconds"));
    assert!(longest.fold(0.0, f64::max) >= 0.4);
    for pair in reports.windows(2) {
        let between = seconds(&pair[1], "elapsed_seconds") - seconds(&pair[0], "elapsed_seconds");
        let said = seconds(&pair[1], "interval_seconds");
        assert!((between - said).abs() < 1e-6, "{between} {said}");
    }
}
