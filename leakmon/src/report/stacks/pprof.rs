//! A goroutine profile in the format of `go tool pprof`: a gzipped
//! `perftools.profiles.Profile`.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::time::SystemTime;

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;

use super::{Origin, alike, call_address};
use crate::task::{Dump, Frame};

/// The messages of profile.proto, as far as they are used here.
pub(super) mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Profile {
        #[prost(message, repeated, tag = "1")]
        pub(crate) sample_type: Vec<ValueType>,
        #[prost(message, repeated, tag = "2")]
        pub(crate) sample: Vec<Sample>,
        #[prost(message, repeated, tag = "3")]
        pub(crate) mapping: Vec<Mapping>,
        #[prost(message, repeated, tag = "4")]
        pub(crate) location: Vec<Location>,
        #[prost(message, repeated, tag = "5")]
        pub(crate) function: Vec<Function>,
        #[prost(string, repeated, tag = "6")]
        pub(crate) string_table: Vec<String>,
        #[prost(int64, tag = "9")]
        pub(crate) time_nanos: i64,
        #[prost(message, optional, tag = "11")]
        pub(crate) period_type: Option<ValueType>,
        #[prost(int64, tag = "12")]
        pub(crate) period: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(crate) struct ValueType {
        #[prost(int64, tag = "1")]
        pub(crate) kind: i64,
        #[prost(int64, tag = "2")]
        pub(crate) unit: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Sample {
        #[prost(uint64, repeated, tag = "1")]
        pub(crate) location_id: Vec<u64>,
        #[prost(int64, repeated, tag = "2")]
        pub(crate) value: Vec<i64>,
        #[prost(message, repeated, tag = "3")]
        pub(crate) label: Vec<Label>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(crate) struct Label {
        #[prost(int64, tag = "1")]
        pub(crate) key: i64,
        #[prost(int64, tag = "2")]
        pub(crate) str: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(crate) struct Mapping {
        #[prost(uint64, tag = "1")]
        pub(crate) id: u64,
        #[prost(uint64, tag = "2")]
        pub(crate) memory_start: u64,
        #[prost(uint64, tag = "3")]
        pub(crate) memory_limit: u64,
        #[prost(int64, tag = "5")]
        pub(crate) filename: i64,
        #[prost(int64, tag = "6")]
        pub(crate) build_id: i64,
        #[prost(bool, tag = "7")]
        pub(crate) has_functions: bool,
        #[prost(bool, tag = "8")]
        pub(crate) has_filenames: bool,
        #[prost(bool, tag = "9")]
        pub(crate) has_line_numbers: bool,
        #[prost(bool, tag = "10")]
        pub(crate) has_inline_frames: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Location {
        #[prost(uint64, tag = "1")]
        pub(crate) id: u64,
        #[prost(uint64, tag = "2")]
        pub(crate) mapping_id: u64,
        #[prost(uint64, tag = "3")]
        pub(crate) address: u64,
        #[prost(message, repeated, tag = "4")]
        pub(crate) line: Vec<Line>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(crate) struct Line {
        #[prost(uint64, tag = "1")]
        pub(crate) function_id: u64,
        #[prost(int64, tag = "2")]
        pub(crate) line: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(crate) struct Function {
        #[prost(uint64, tag = "1")]
        pub(crate) id: u64,
        #[prost(int64, tag = "2")]
        pub(crate) name: i64,
        #[prost(int64, tag = "3")]
        pub(crate) system_name: i64,
        #[prost(int64, tag = "4")]
        pub(crate) filename: i64,
    }
}

use proto::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType};

#[derive(Default)]
struct Builder<'a> {
    profile: Profile,
    strings: HashMap<&'a str, i64>,
    functions: HashMap<(&'a str, &'a str), u64>,
    /// By the frames of one call: the ones inlined, and the one that they are
    /// inlined into.
    locations: HashMap<&'a [Frame], u64>,
}

impl<'a> Builder<'a> {
    fn string(&mut self, text: &'a str) -> i64 {
        let table = &mut self.profile.string_table;
        *self.strings.entry(text).or_insert_with(|| {
            table.push(text.to_owned());
            table.len() as i64 - 1
        })
    }

    fn function(&mut self, frame: &'a Frame) -> u64 {
        let key = (&*frame.function, &*frame.file);
        if let Some(id) = self.functions.get(&key) {
            return *id;
        }
        let name = self.string(key.0);
        let filename = self.string(key.1);
        let id = self.functions.len() as u64 + 1;
        self.functions.insert(key, id);
        self.profile.function.push(Function {
            id,
            name,
            system_name: name,
            filename,
        });
        id
    }

    fn location(&mut self, call: &'a [Frame]) -> u64 {
        if let Some(id) = self.locations.get(call) {
            return *id;
        }
        let line = call
            .iter()
            .map(|frame| Line {
                function_id: self.function(frame),
                line: i64::from(frame.line),
            })
            .collect();
        let id = self.locations.len() as u64 + 1;
        self.locations.insert(call, id);
        self.profile.location.push(Location {
            id,
            mapping_id: 1,
            address: call.first().map_or(0, call_address),
            line,
        });
        id
    }
}

/// Whether both are frames of one call: Go's pcDeck.tryAdd,
/// runtime/pprof/proto.go. What an inlined frame was inlined into may be left
/// out of the stack, as compiler-made.
fn is_inlined_into(frame: &Frame, next: &Frame) -> bool {
    frame.inlined && frame.entry == next.entry && frame.function != next.function
}

/// The profile of a dump.
pub(super) fn profile<'a>(dump: &'a Dump, origin: Origin<'a>) -> Profile {
    let alike = alike(dump);
    let mut builder = Builder::default();
    // The format wants the empty string first.
    builder.string("");
    let goroutine = ValueType {
        kind: builder.string("goroutine"),
        unit: builder.string("count"),
    };
    builder.profile.sample_type.push(goroutine);
    builder.profile.period_type = Some(goroutine);
    builder.profile.period = 1;
    builder.profile.time_nanos = origin
        .at
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0);
    for group in &alike {
        let location_id = group
            .frames
            .chunk_by(is_inlined_into)
            // The call that the last recorded frame belongs to is kept whole:
            // runtime_expandFinalInlineFrame.
            .scan(0, |before, call| {
                let start = std::mem::replace(before, *before + call.len());
                (start < group.recorded).then_some(call)
            })
            // Go leaves it out of its profiles.
            .filter(|call| {
                call.iter()
                    .all(|frame| &*frame.function != "runtime.goexit")
            })
            .map(|call| builder.location(call))
            .collect();
        let label = group
            .labels
            .iter()
            .map(|(key, value)| Label {
                key: builder.string(key),
                str: builder.string(value),
            })
            .collect();
        builder.profile.sample.push(Sample {
            location_id,
            value: vec![i64::try_from(group.count).unwrap_or(i64::MAX)],
            label,
        });
    }

    let addresses = || {
        builder
            .profile
            .location
            .iter()
            .map(|location| location.address)
    };
    let page = 0x1000;
    let memory_start = addresses().min().unwrap_or(0) & !(page - 1);
    let memory_limit = (addresses().max().unwrap_or(0) | (page - 1)).saturating_add(1);
    let filename = builder.string(origin.executable);
    let build_id = builder.string(origin.build_id.unwrap_or_default());
    let mut profile = builder.profile;
    profile.mapping.push(Mapping {
        id: 1,
        memory_start,
        memory_limit,
        filename,
        build_id,
        has_functions: true,
        has_filenames: true,
        has_line_numbers: true,
        has_inline_frames: true,
    });
    profile
}

pub(super) fn write(dump: &Dump, origin: Origin<'_>, out: &mut dyn io::Write) -> io::Result<()> {
    let mut gzip = GzEncoder::new(out, Compression::fast());
    gzip.write_all(&profile(dump, origin).encode_to_vec())?;
    gzip.finish()?;
    Ok(())
}
