//! What the end-to-end tests share: the fixtures, their protocol, and leakmon
//! itself as a child with a time limit.
//!
//! Fixtures are found by `LEAKMON_FIXTURES`, the directory with the
//! manifest.json that `cargo xtask fixtures` writes. Without it these tests
//! have nothing to do.

// Each test binary uses another part.
#![allow(dead_code)]

pub(crate) mod daemon;
pub(crate) mod prometheus;

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take before it counts as hung.
pub(crate) fn limit() -> Duration {
    Duration::from_secs(30) * slowness()
}

/// How many of something are done where `total` are done on a machine that is not
/// slow.
pub(crate) fn so_many(total: u64) -> u64 {
    total / u64::from(slowness())
}

/// Cases that differ in nothing that hangs on the kernel: all of them or, on a
/// machine that is slow, the last one.
pub(crate) fn alike<T>(cases: &[T]) -> &[T] {
    let first = match slowness() {
        1 => 0,
        _ => cases.len().saturating_sub(1),
    };
    &cases[first..]
}

/// How many times as long as elsewhere things take: `LEAKMON_SLOWNESS`, for
/// guests whose processor is emulated.
pub(crate) fn slowness() -> u32 {
    let slowness = std::env::var("LEAKMON_SLOWNESS").ok();
    slowness.map_or(1, |slowness| slowness.parse().expect("a number"))
}

/// The folder of fixtures; `None`, which says so once, where there is none.
pub(crate) fn fixtures() -> Option<PathBuf> {
    let folder = std::env::var_os("LEAKMON_FIXTURES").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("LEAKMON_FIXTURES names no folder of fixtures: nothing is tested");
    }
    folder
}

/// One Go program of the manifest.
#[derive(Clone, Debug)]
pub(crate) struct Fixture {
    /// `zoo`.
    pub(crate) program: String,
    /// `1.26`.
    pub(crate) go: String,
    /// `go1.26.8`.
    pub go_version: String,
    /// `plain`.
    pub(crate) variant: String,
    /// Where it is.
    pub(crate) path: PathBuf,
}

/// Every Go program of the manifest.
pub(crate) fn manifest() -> Vec<Fixture> {
    let Some(folder) = fixtures() else {
        return Vec::new();
    };
    let text = std::fs::read(folder.join("manifest.json")).expect("a manifest of fixtures");
    let manifest: Value = serde_json::from_slice(&text).expect("a manifest in JSON");
    let word = |value: &Value| value.as_str().expect("a word").to_owned();
    manifest["fixtures"]
        .as_array()
        .expect("a list of fixtures")
        .iter()
        .filter(|fixture| fixture["go"].is_string())
        .map(|fixture| Fixture {
            program: word(&fixture["program"]),
            go: word(&fixture["go"]),
            go_version: word(&fixture["go_version"]),
            variant: word(&fixture["variant"]),
            path: folder.join(word(&fixture["path"])),
        })
        .collect()
}

/// The programs called `program` in this variant, oldest Go first.
pub(crate) fn all(program: &str, variant: &str) -> Vec<Fixture> {
    let minor = |fixture: &Fixture| -> u32 {
        let minor = fixture.go.strip_prefix("1.").expect("Go 1");
        minor.parse().expect("a version")
    };
    let mut found: Vec<Fixture> = manifest()
        .into_iter()
        .filter(|fixture| fixture.program == program && fixture.variant == variant)
        .collect();
    found.sort_by_key(minor);
    found
}

/// The program called `program` in this variant, built by Go 1.26 where there
/// is one, else by the newest. `None`, which says so, where there is none.
pub(crate) fn fixture(program: &str, variant: &str) -> Option<Fixture> {
    fixtures()?;
    let mut found = all(program, variant);
    let at_hand = found.iter().position(|fixture| fixture.go == "1.26");
    let found = at_hand.map(|index| found.remove(index)).or(found.pop());
    if found.is_none() {
        eprintln!("there is no fixture {variant}/{program}: it is not tested");
    }
    found
}

/// A program that nobody here wrote, by name, in the folder that `LEAKMON_REAL`
/// names; `None`, which says so, where there is none.
pub(crate) fn real(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("LEAKMON_REAL").map(PathBuf::from);
    let found = folder.map(|folder| folder.join(name));
    let found = found.filter(|path| path.exists());
    if found.is_none() {
        eprintln!("LEAKMON_REAL has no {name}: it is not tested");
    }
    found
}

/// A directory of its own for one test, removed with it.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("leakmon-test-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("a scratch directory")
}

/// A copy of the program at `path` in which `to` stands for each `from`.
pub(crate) fn patched(path: &Path, folder: &Path, from: &[u8], to: &[u8]) -> PathBuf {
    assert_eq!(from.len(), to.len());
    use std::os::unix::fs::PermissionsExt;
    let mut bytes = std::fs::read(path).expect("the fixture");
    let mut found = 0;
    for at in 0..bytes.len() - from.len() {
        if bytes[at..].starts_with(from) {
            bytes[at..at + to.len()].copy_from_slice(to);
            found += 1;
        }
    }
    assert!(found > 0, "nothing to patch");
    let copy =
        folder.join(String::from_utf8_lossy(to).replace(|c: char| !c.is_alphanumeric(), "_"));
    std::fs::write(&copy, bytes).expect("the copy");
    std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).expect("its mode");
    std::fs::canonicalize(copy).expect("the copy")
}

/// A child that is killed and reaped with this value, and nothing but it.
#[derive(Debug)]
pub(crate) struct Owned(pub(crate) Child);

impl Owned {
    /// Starts it.
    pub(crate) fn spawn(command: &mut Command) -> Owned {
        loop {
            match command.spawn() {
                Ok(child) => return Owned(child),
                // A program that was just written, and that another test's child
                // has open until its own exec.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => panic!("{command:?}: {error}"),
            }
        }
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        signal_to(self.pid(), signal);
    }

    /// Kills and reaps it.
    pub(crate) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Sends a signal to a process that the test started.
pub(crate) fn signal_to(pid: u32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    nix::sys::signal::kill(pid, signal).expect("a signal to a child");
}

/// A running fixture that speaks the protocol of fixtures/README.md.
#[derive(Debug)]
pub(crate) struct Running {
    /// Its process: of a program started through another (`unshare`) the outer
    /// one.
    pub(crate) child: Owned,
    /// The pid that it says it has. In a pid namespace of its own it is not
    /// the one that others see.
    pub(crate) says: u32,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Running {
    /// Starts the program at `path`, and waits until it is ready.
    pub(crate) fn start(path: &Path) -> Running {
        Running::command(&mut Command::new(path))
    }

    /// Starts `command`, which ends up as a fixture, and waits until it is
    /// ready.
    pub(crate) fn command(command: &mut Command) -> Running {
        let mut child = Owned::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let input = child.0.stdin.take();
        let output = BufReader::new(child.0.stdout.take().expect("its output"));
        let mut running = Running {
            child,
            says: 0,
            input,
            output,
        };
        let ready = running.line();
        let pid = ready
            .strip_prefix("ready ")
            .and_then(|pid| pid.parse().ok());
        running.says = pid.unwrap_or_else(|| panic!("{command:?} says {ready:?}"));
        running
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Its answer to a command that is answered by one line.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        let answer = self.line();
        assert!(!answer.starts_with("error "), "{answer}");
        answer
    }

    /// Its answer to a command that is answered by `text`.
    pub(crate) fn text(&mut self, command: &str) -> Vec<u8> {
        let answer = self.ask(command);
        self.block(&answer)
    }

    /// The block of bytes that the line `text BYTES` announces.
    pub(crate) fn block(&mut self, announcement: &str) -> Vec<u8> {
        let len = announcement
            .strip_prefix("text ")
            .and_then(|len| len.parse().ok());
        let len = len.unwrap_or_else(|| panic!("{announcement:?} announces no text"));
        let mut text = vec![0; len];
        self.output
            .read_exact(&mut text)
            .expect("the announced text");
        text
    }

    /// `runtime.NumGoroutine()`.
    pub(crate) fn count(&mut self) -> u64 {
        let answer = self.ask("count");
        let count = answer
            .strip_prefix("count ")
            .and_then(|count| count.parse().ok());
        count.unwrap_or_else(|| panic!("count: {answer:?}"))
    }

    /// Sends a command and does not wait for the answer.
    pub(crate) fn tell(&mut self, command: &str) {
        let input = self.input.as_mut().expect("its input is open");
        writeln!(input, "{command}").expect("it reads its input");
    }

    /// The next line of its output.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("its output");
        line.trim_end().to_owned()
    }

    /// Ends its input, at which it ends; its parent does not reap it.
    pub(crate) fn end(&mut self) {
        self.input = None;
    }
}

/// leakmon with these arguments.
pub(crate) fn leakmon<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leakmon"));
    command.args(args).env_remove("NO_COLOR");
    command
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    /// Its exit code; `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
    /// How long it took.
    pub(crate) took: Duration,
}

impl Done {
    /// Panics with everything that it said unless it ended with this code.
    #[track_caller]
    pub(crate) fn expect_code(&self, code: i32) -> &Done {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// The objects of `--format json`, one a line.
    #[track_caller]
    pub(crate) fn json(&self) -> Vec<Value> {
        self.out.lines().map(parse).collect()
    }
}

/// Runs `command` to its end, which must come within [`limit`].
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Done {
    Started::start(command).finish()
}

/// A command that runs, with its output read as it comes.
#[derive(Debug)]
pub(crate) struct Started {
    child: Owned,
    out: JoinHandle<Vec<u8>>,
    err: JoinHandle<()>,
    errors: Arc<Mutex<Vec<u8>>>,
    lines: std::sync::mpsc::Receiver<String>,
    since: Instant,
    command: String,
}

impl Started {
    /// Starts `command` without input.
    pub(crate) fn start(command: &mut Command) -> Started {
        let command = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let since = Instant::now();
        let mut child = Owned::spawn(command);
        let out = child.0.stdout.take().expect("its output");
        let mut err = child.0.stderr.take().expect("its errors");
        let (line, lines) = std::sync::mpsc::channel();
        let errors = Arc::new(Mutex::new(Vec::new()));
        let wrote = Arc::clone(&errors);
        Started {
            child,
            errors,
            out: std::thread::spawn(move || {
                let mut out = BufReader::new(out);
                let mut all = Vec::new();
                let mut seen = 0;
                while out.read_until(b'\n', &mut all).is_ok_and(|len| len > 0) {
                    // Nobody need read them.
                    let _ = line.send(String::from_utf8_lossy(&all[seen..]).into_owned());
                    seen = all.len();
                }
                all
            }),
            err: std::thread::spawn(move || {
                let mut some = [0; 4096];
                while let Ok(len @ 1..) = err.read(&mut some) {
                    wrote.lock().expect("what it wrote").extend(&some[..len]);
                }
            }),
            lines,
            since,
            command: format!("{command:?}"),
        }
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until it has printed another line, and gives it.
    #[track_caller]
    pub(crate) fn wait_for_line(&self) -> String {
        let line = self.lines.recv_timeout(limit());
        line.unwrap_or_else(|error| {
            // It has ended, perhaps: what it said last is on its way.
            std::thread::sleep(Duration::from_millis(100));
            let errors = self.errors.lock().expect("what it wrote");
            let errors = String::from_utf8_lossy(&errors);
            panic!("{} prints nothing: {error}\n{errors}", self.command)
        })
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        self.child.signal(signal);
    }

    /// Waits for its end, which must come within [`limit`].
    #[track_caller]
    pub(crate) fn finish(mut self) -> Done {
        let status = self.wait();
        let took = self.since.elapsed();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let out = self.out.join().expect("a reader");
        self.err.join().expect("a reader");
        Done {
            code: status.code(),
            out: text(&out),
            err: text(&self.errors.lock().expect("what it wrote")),
            took,
        }
    }

    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + limit();
        loop {
            if let Some(status) = self.child.0.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < until, "{} hangs", self.command);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits until `condition` holds, which must come within [`limit`].
#[track_caller]
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + limit();
    while !condition() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The letter that /proc/PID/stat has for a process's state; `None` when it is
/// gone.
pub(crate) fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The `go` command: what `LEAKMON_GO` names, or the one in `PATH`.
pub(crate) fn go() -> PathBuf {
    std::env::var_os("LEAKMON_GO").map_or_else(|| PathBuf::from("go"), PathBuf::from)
}

/// An HTTP connection that is kept between requests.
#[derive(Debug)]
pub(crate) struct Connection {
    address: String,
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects to `address`.
    pub(crate) fn open(address: &str) -> std::io::Result<Connection> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(limit()))?;
        Ok(Connection {
            address: address.to_owned(),
            stream: BufReader::new(stream),
        })
    }

    /// The body of the answer to `GET path`, which must be 200.
    #[track_caller]
    pub(crate) fn get(&mut self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address);
        let sent = self.stream.get_mut().write_all(request.as_bytes());
        sent.expect("a request");
        let status = self.line();
        assert!(status.starts_with("HTTP/1.1 200 "), "{path}: {status}");
        let (mut len, mut chunked) = (None, false);
        loop {
            let line = self.line().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            chunked |= line == "transfer-encoding: chunked";
            let length = line.strip_prefix("content-length: ");
            len = len.or(length.and_then(|len| len.parse().ok()));
        }
        let mut body = Vec::new();
        if chunked {
            loop {
                let len = usize::from_str_radix(&self.line(), 16).expect("a chunk");
                self.read(len, &mut body);
                assert_eq!(self.line(), "");
                if len == 0 {
                    break;
                }
            }
        } else {
            self.read(len.expect("a length"), &mut body);
        }
        String::from_utf8(body).expect("a body in UTF-8")
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("an answer");
        line.trim_end().to_owned()
    }

    fn read(&mut self, len: usize, body: &mut Vec<u8>) {
        let start = body.len();
        body.resize(start + len, 0);
        self.stream
            .read_exact(&mut body[start..])
            .expect("an answer");
    }
}

/// The goroutines of a debug=2 dump, in its order, without the arguments of
/// calls.
pub(crate) fn goroutines(dump: &str) -> Vec<String> {
    let without_arguments = |goroutine: &str| {
        let mut lines = goroutine.trim_end().lines();
        let mut kept = lines.next().unwrap_or_default().to_owned();
        for line in lines {
            // Arguments hold no parenthesis, names do.
            let call = !line.starts_with('\t') && !line.starts_with("created by ");
            kept.push('\n');
            match line.rfind('(').filter(|_| call) {
                Some(arguments) => kept.extend([&line[..arguments], "(...)"]),
                None => kept.push_str(line),
            }
        }
        kept
    };
    dump.split("\n\n").map(without_arguments).collect()
}

/// Seconds since 1970, as reports tell the time.
pub(crate) fn now() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.expect("a clock").as_secs_f64()
}

/// A line of `--format json`. What is said of the process's first runtime, the
/// goroutines of a Go program, stands beside what is said of the process.
#[track_caller]
pub(crate) fn parse(line: &str) -> Value {
    let mut object: Value =
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    if let Some(Value::Object(first)) = object["runtimes"].get(0).cloned() {
        object.as_object_mut().expect("an object").extend(first);
    }
    object
}
