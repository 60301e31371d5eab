//! The expected text is what Go 1.26.8 wrote about the same goroutines, but
//! for the arguments of calls.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use prost::Message;

use super::*;
use crate::task::{Site, SiteKey, Stack, State};

fn frame(function: &str, file: &str, line: u32, pc: u64, entry: u64) -> Frame {
    Frame {
        function: function.into(),
        file: file.into(),
        line,
        pc,
        offset: pc.saturating_sub(entry),
        entry,
        inlined: false,
        hidden: function.starts_with("runtime."),
    }
}

fn gopark() -> Frame {
    let file = "/usr/local/go/src/runtime/proc.go";
    frame("runtime.gopark", file, 462, 0x47d9ae, 0x47d8e0)
}

fn goexit() -> Frame {
    let file = "/usr/local/go/src/runtime/asm_amd64.s";
    frame("runtime.goexit", file, 1771, 0x483ec1, 0x483ec0)
}

fn chan(call: &str) -> [Frame; 2] {
    let file = "/usr/local/go/src/runtime/chan.go";
    match call {
        "send" => [
            frame("runtime.chansend", file, 283, 0x41491c, 0x414520),
            frame("runtime.chansend1", file, 161, 0x414517, 0x414500),
        ],
        _ => [
            frame("runtime.chanrecv", file, 667, 0x4158ee, 0x415480),
            frame("runtime.chanrecv1", file, 509, 0x415432, 0x415420),
        ],
    }
}

const MAIN: &str = "/tmp/gx/main.go";

struct Maker {
    tasks: Vec<Task>,
    sites: Vec<Site>,
    stacks: Vec<Stack>,
}

impl Maker {
    fn new() -> Maker {
        Maker {
            tasks: Vec::new(),
            sites: Vec::new(),
            stacks: Vec::new(),
        }
    }

    /// A goroutine that main spawned at `line`; its stack without goexit.
    fn task(
        &mut self,
        id: u64,
        reason: &str,
        line: u32,
        offset: u64,
        calls: Vec<Frame>,
    ) -> &mut Task {
        let created_by = frame("main.main", MAIN, line, 0x4dc2e0 + offset, 0x4dc2e0);
        let mut entry = calls.last().unwrap().clone();
        entry.pc = entry.entry;
        self.sites.push(Site {
            doubt: None,
            key: SiteKey {
                created_at: created_by.pc,
                entry: entry.entry,
            },
            created_by: Some(created_by),
            entry: Some(entry),
        });
        let mut frames = vec![gopark()];
        frames.extend(calls);
        frames.push(goexit());
        self.stacks.push(Stack {
            frames,
            place: None,
        });
        self.tasks.push(Task {
            on: None,
            name: None,
            id,
            parent: Some(1),
            state: State::Waiting,
            reason: Some(reason.into()),
            scan: false,
            waited: None,
            locked_to_thread: false,
            site: SiteId(self.sites.len() as u32 - 1),
            stack: Some(StackId(self.stacks.len() as u32 - 1)),
            labels: Vec::new(),
        });
        self.tasks.last_mut().unwrap()
    }

    fn block(&mut self, id: u64) -> &mut Task {
        let mut calls = chan("send").to_vec();
        calls.push(frame("main.block", MAIN, 14, 0x4dc25a, 0x4dc240));
        self.task(id, "chan send", 33, 0x3a, calls)
    }

    fn inlined(&mut self, id: u64) -> &mut Task {
        let mut calls = chan("receive").to_vec();
        let entry = 0x4dc7a0;
        for (function, line, pc) in [
            ("main.inl", 16, 0x4dc7ba),
            ("main.inl2", 17, 0x4dc7b3),
            ("main.main.func1", 36, 0x4dc7af),
        ] {
            let mut call = frame(function, MAIN, line, pc, entry);
            call.offset = 0x1a;
            call.inlined = function != "main.main.func1";
            calls.push(call);
        }
        self.task(id, "chan receive", 36, 0xd8, calls)
    }

    fn generic(&mut self, id: u64) -> &mut Task {
        let mut calls = chan("receive").to_vec();
        let mut call = frame("main.gen[go.shape.int]", MAIN, 19, 0x4dc779, 0x4dc760);
        call.offset = 0;
        calls.push(call);
        self.task(id, "chan receive", 37, 0x136, calls)
    }

    fn deep(&mut self, id: u64) -> &mut Task {
        let mut calls = chan("receive").to_vec();
        calls.push(frame("main.deep", MAIN, 24, 0x4dc29d, 0x4dc280));
        for _ in 0..120 {
            calls.push(frame("main.deep", MAIN, 27, 0x4dc2ab, 0x4dc280));
        }
        self.task(id, "chan receive", 38, 0x15a, calls)
    }

    fn sleep(&mut self, id: u64) -> &mut Task {
        let file = "/usr/local/go/src/runtime/time.go";
        let calls = vec![frame("time.Sleep", file, 363, 0x480ba5, 0x480a40)];
        self.task(id, "sleep", 43, 0x200, calls)
    }

    fn done(self, version: &str) -> Dump {
        Dump {
            noun: "goroutine",
            tasks: self.tasks,
            sites: Arc::new(self.sites),
            stacks: Arc::new(self.stacks),
            version: version.to_owned(),
        }
    }
}

fn bytes(format: Format, dump: &Dump) -> Vec<u8> {
    let origin = Origin {
        executable: "/tmp/gx/gx",
        build_id: None,
        at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
    };
    let mut out = Vec::new();
    write(format, dump, origin, &mut out).unwrap();
    out
}

fn text(format: Format, dump: &Dump) -> String {
    String::from_utf8(bytes(format, dump)).unwrap()
}

/// The program of the expected texts.
fn program() -> Dump {
    let mut maker = Maker::new();
    for id in [18, 19, 20] {
        maker.block(id);
    }
    maker.inlined(21);
    maker.generic(22);
    maker.block(24).labels = vec![("a".into(), "b\"x".into()), ("k".into(), "v w".into())];
    maker.sleep(26);
    maker.done("go1.26.8")
}

#[test]
fn debug1_is_as_go_writes_it() {
    let expected = r#"goroutine profile: total 7
3 @ 0x47d9ae 0x41491c 0x414517 0x4dc25a 0x483ec1
#	0x4dc259	main.block+0x19	/tmp/gx/main.go:14

1 @ 0x47d9ae 0x41491c 0x414517 0x4dc25a 0x483ec1
# labels: {"a":"b\"x", "k":"v w"}
#	0x4dc259	main.block+0x19	/tmp/gx/main.go:14

1 @ 0x47d9ae 0x4158ee 0x415432 0x4dc779 0x483ec1
#	0x4dc778	main.gen[...]+0x18	/tmp/gx/main.go:19

1 @ 0x47d9ae 0x4158ee 0x415432 0x4dc7ba 0x4dc7b3 0x4dc7af 0x483ec1
#	0x4dc7b9	main.inl+0x19		/tmp/gx/main.go:16
#	0x4dc7b2	main.inl2+0x12		/tmp/gx/main.go:17
#	0x4dc7ae	main.main.func1+0xe	/tmp/gx/main.go:36

1 @ 0x47d9ae 0x480ba5 0x483ec1
#	0x480ba4	time.Sleep+0x164	/usr/local/go/src/runtime/time.go:363

"#;
    assert_eq!(text(Format::Debug1, &program()), expected);
}

#[test]
fn debug2_is_as_go_writes_it() {
    let mut maker = Maker::new();
    maker.block(18);
    maker.inlined(21);
    maker.generic(22);
    maker.block(23).waited = Some(Duration::from_secs(125));
    maker.block(24).locked_to_thread = true;
    let running = maker.block(25);
    running.state = State::Running;
    running.stack = None;
    let leaked = maker.block(26);
    leaked.state = State::Leaked;
    leaked.scan = true;
    let expected = "\
goroutine 18 [chan send]:
main.block(...)
	/tmp/gx/main.go:14 +0x1a
created by main.main in goroutine 1
	/tmp/gx/main.go:33 +0x3a

goroutine 21 [chan receive]:
main.inl(...)
	/tmp/gx/main.go:16
main.inl2(...)
	/tmp/gx/main.go:17
main.main.func1(...)
	/tmp/gx/main.go:36 +0x1a
created by main.main in goroutine 1
	/tmp/gx/main.go:36 +0xd8

goroutine 22 [chan receive]:
main.gen[...](...)
	/tmp/gx/main.go:19
created by main.main in goroutine 1
	/tmp/gx/main.go:37 +0x136

goroutine 23 [chan send, 2 minutes]:
main.block(...)
	/tmp/gx/main.go:14 +0x1a
created by main.main in goroutine 1
	/tmp/gx/main.go:33 +0x3a

goroutine 24 [chan send, locked to thread]:
main.block(...)
	/tmp/gx/main.go:14 +0x1a
created by main.main in goroutine 1
	/tmp/gx/main.go:33 +0x3a

goroutine 25 [running]:
	goroutine running on other thread; stack unavailable
created by main.main in goroutine 1
	/tmp/gx/main.go:33 +0x3a

goroutine 26 [chan send (leaked) (scan)]:
main.block(...)
	/tmp/gx/main.go:14 +0x1a
created by main.main in goroutine 1
	/tmp/gx/main.go:33 +0x3a
";
    assert_eq!(text(Format::Debug2, &maker.done("go1.26.8")), expected);
}

#[test]
fn debug2_elides_as_each_version_does() {
    let lines = |version: &str| {
        let mut maker = Maker::new();
        maker.deep(18).parent = None;
        let text = text(Format::Debug2, &maker.done(version));
        assert!(text.contains("created by main.main\n"), "{text}");
        let calls = text
            .lines()
            .filter(|line| *line == "main.deep(...)")
            .count();
        let elided = text.lines().position(|line| line.contains("elided"));
        (
            calls,
            elided.map(|at| (at, text.lines().nth(at).unwrap().to_owned())),
        )
    };
    let new = Some((101, "...21 frames elided...".to_owned()));
    assert_eq!(lines("go1.26.8"), (100, new.clone()));
    assert_eq!(lines("devel go1.27-abcdef"), (100, new));
    // Go 1.20 went through 100 calls, the three hidden ones included, and then
    // found that it had not printed 100.
    assert_eq!(lines("go1.20.14"), (97, None));
}

#[test]
fn debug2_shows_hidden_frames_when_there_are_no_others() {
    let mut maker = Maker::new();
    maker.task(2, "force gc (idle)", 1, 0, Vec::from(chan("send")));
    let mut dump = maker.done("go1.26.8");
    for site in Arc::make_mut(&mut dump.sites) {
        site.created_by.as_mut().unwrap().hidden = true;
    }
    let text = text(Format::Debug2, &dump);
    assert!(text.contains("runtime.gopark(...)"), "{text}");
    assert!(!text.contains("created by"), "{text}");
}

#[test]
fn folded_stacks_begin_at_the_root() {
    let mut dump = program();
    dump.tasks[0].state = State::Running;
    dump.tasks[0].stack = None;
    assert_eq!(
        text(Format::Folded, &dump),
        "\
created by main.main;main.block;[chan send] 3
created by main.main;main.block;[running] 1
created by main.main;main.gen[...];[chan receive] 1
created by main.main;main.main.func1;main.inl2;main.inl;[chan receive] 1
created by main.main;time.Sleep;[sleep] 1
"
    );
}

#[test]
fn json_has_one_object_a_task() {
    let text = text(Format::Json, &program());
    let objects: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(objects.len(), 7);
    assert_eq!(objects[3]["id"], 21);
    assert_eq!(objects[3]["parent_id"], 1);
    assert_eq!(objects[3]["stack"][3]["function"], "main.inl");
    assert_eq!(objects[3]["stack"][3]["inlined"], true);
    assert_eq!(objects[3]["stack"][0]["hidden"], true);
    assert_eq!(objects[5]["labels"]["k"], "v w");
}

#[test]
fn pprof_holds_what_go_puts_there() {
    let dump = program();
    let compressed = bytes(Format::Pprof, &dump);
    let mut raw = Vec::new();
    flate2::read::GzDecoder::new(&compressed[..])
        .read_to_end(&mut raw)
        .unwrap();
    let profile = pprof::proto::Profile::decode(&raw[..]).unwrap();
    let string = |i: i64| profile.string_table[i as usize].as_str();
    assert_eq!(string(0), "");
    assert_eq!(string(profile.sample_type[0].kind), "goroutine");
    assert_eq!(string(profile.sample_type[0].unit), "count");
    assert_eq!(profile.period, 1);
    let counts: Vec<i64> = profile
        .sample
        .iter()
        .map(|sample| sample.value[0])
        .collect();
    assert_eq!(counts, [3, 1, 1, 1, 1]);
    let names = |sample: usize| -> Vec<Vec<(&str, i64)>> {
        profile.sample[sample]
            .location_id
            .iter()
            .map(|id| {
                profile.location[*id as usize - 1]
                    .line
                    .iter()
                    .map(|line| {
                        let function = profile.function[line.function_id as usize - 1];
                        (string(function.name), line.line)
                    })
                    .collect()
            })
            .collect()
    };
    assert_eq!(
        names(3),
        [
            vec![("runtime.gopark", 462)],
            vec![("runtime.chanrecv", 667)],
            vec![("runtime.chanrecv1", 509)],
            vec![("main.inl", 16), ("main.inl2", 17), ("main.main.func1", 36)],
        ]
    );
    assert_eq!(names(2)[3], [("main.gen[go.shape.int]", 19)]);
    let label = profile.sample[1].label[1];
    assert_eq!((string(label.key), string(label.str)), ("k", "v w"));
    let first = &profile.location[profile.sample[0].location_id[3] as usize - 1];
    assert_eq!(first.address, 0x4dc259);
}

#[test]
fn a_dump_that_contradicts_itself_does_no_harm() {
    let mut dump = program();
    dump.sites = Arc::new(Vec::new());
    dump.stacks = Arc::new(Vec::new());
    dump.version = "weekly".to_owned();
    for format in [
        Format::Debug2,
        Format::Debug1,
        Format::Json,
        Format::Folded,
        Format::Pprof,
    ] {
        assert!(!bytes(format, &dump).is_empty());
    }
}

#[test]
fn names_cannot_act_on_the_terminal() {
    let evil = "main.\u{1b}[2J\u{9b}x";
    let mut maker = Maker::new();
    maker
        .task(5, evil, 1, 0, vec![frame(evil, evil, 1, 2, 1)])
        .labels = vec![(evil.into(), evil.into())];
    let dump = maker.done("go1.26.8");
    for format in [Format::Debug2, Format::Debug1, Format::Folded, Format::Json] {
        let text = text(format, &dump);
        let harmful = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
        assert!(!text.chars().any(harmful), "{format:?}: {text:?}");
    }
}
