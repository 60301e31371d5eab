//! The layouts of Go's runtime that leakmon knows are those that each toolchain
//! writes into the DWARF of what it builds.

mod common;

use std::collections::HashMap;
use std::io::Read as _;
use std::path::Path;

use flate2::read::ZlibDecoder;
use gimli::{AttributeValue, Dwarf, EndianRcSlice, LittleEndian, Reader as _};
use object::{Object as _, ObjectSection as _};

use leakmon::runtime::go::buildinfo::Version;
use leakmon::runtime::go::layout::{self, Layout, status};

type Slice = EndianRcSlice<LittleEndian>;

/// What the DWARF of a Go program says about its types and constants.
#[derive(Default)]
struct Described {
    /// `runtime.g.goid` to 152.
    offsets: HashMap<String, u64>,
    /// `runtime._Gdead` to 6.
    constants: HashMap<String, u64>,
}

impl Described {
    fn read(program: &Path) -> Described {
        let bytes = std::fs::read(program).expect("a program");
        let file = object::File::parse(&*bytes).expect("an ELF file");
        let dwarf = Dwarf::load(|id| {
            // Up to Go 1.18 compressed sections are called .zdebug_info.
            let old_name = id.name().replacen('.', ".z", 1);
            let section = file
                .section_by_name(id.name())
                .or_else(|| file.section_by_name(&old_name));
            let data = section
                .map(|section| uncompressed(&section))
                .unwrap_or_default();
            Ok::<_, gimli::Error>(EndianRcSlice::new(data.into(), LittleEndian))
        })
        .expect("sections");
        let mut described = Described::default();
        let mut units = dwarf.units();
        while let Some(header) = units.next().expect("a unit") {
            let unit = dwarf.unit(header).expect("a unit");
            let mut entries = unit.entries();
            let mut of = String::new();
            while let Some(entry) = entries.next_dfs().expect("an entry") {
                let name = |entry: &gimli::DebuggingInformationEntry<Slice>| {
                    let name = entry.attr_value(gimli::DW_AT_name)?;
                    let name = dwarf.attr_string(&unit, name).ok()?;
                    Some(name.to_string_lossy().ok()?.into_owned())
                };
                let number = |at| entry.attr(at).and_then(gimli::Attribute::udata_value);
                match entry.tag() {
                    gimli::DW_TAG_structure_type => of = name(entry).unwrap_or_default(),
                    gimli::DW_TAG_member => {
                        let at = number(gimli::DW_AT_data_member_location);
                        if let (Some(member), Some(at)) = (name(entry), at) {
                            described.offsets.insert(format!("{of}.{member}"), at);
                        }
                    }
                    gimli::DW_TAG_constant => {
                        let value = match entry.attr_value(gimli::DW_AT_const_value) {
                            Some(AttributeValue::Sdata(value)) => u64::try_from(value).ok(),
                            _ => number(gimli::DW_AT_const_value),
                        };
                        if let (Some(name), Some(value)) = (name(entry), value) {
                            described.constants.insert(name, value);
                        }
                    }
                    _ => {}
                }
            }
        }
        described
    }

    fn offset(&self, of: &str, members: &str) -> Option<u64> {
        self.offsets.get(&format!("{of}.{members}")).copied()
    }
}

/// The bytes of a section; Go's linker compresses those of DWARF.
fn uncompressed(section: &object::Section<'_, '_>) -> Vec<u8> {
    let data = section.compressed_data().expect("a section");
    if data.format == object::CompressionFormat::None {
        return data.data.to_vec();
    }
    let mut bytes = Vec::new();
    ZlibDecoder::new(data.data)
        .read_to_end(&mut bytes)
        .expect("a compressed section");
    bytes
}

#[test]
fn layouts_are_those_of_the_toolchains() {
    for zoo in common::all("zoo", "plain") {
        let dwarf = Described::read(&zoo.path);
        let minor = zoo.go.trim_start_matches("1.").parse().expect("a version");
        let version = Version {
            minor,
            text: zoo.go_version.clone(),
        };
        let layout = Layout::of(&version).expect("a known version");
        let g = &layout.g;
        let gobuf = |member| {
            Some(dwarf.offset("runtime.g", "sched")? + dwarf.offset("runtime.gobuf", member)?)
        };
        let stack = |member| {
            Some(dwarf.offset("runtime.g", "stack")? + dwarf.offset("runtime.stack", member)?)
        };
        let in_g = |member| dwarf.offset("runtime.g", member);
        let in_moduledata = |member| dwarf.offset("runtime.moduledata", member);
        let offsets = [
            ("stack.lo", stack("lo"), Some(layout::G_STACK_LO)),
            ("stack.hi", stack("hi"), Some(layout::G_STACK_HI)),
            ("m", in_g("m"), Some(layout::G_M)),
            ("sched.sp", gobuf("sp"), Some(layout::G_SCHED_SP)),
            ("sched.pc", gobuf("pc"), Some(layout::G_SCHED_PC)),
            ("sched.g", gobuf("g"), Some(layout::G_SCHED_G)),
            ("sched.bp", gobuf("bp"), Some(g.sched_bp)),
            ("syscallsp", in_g("syscallsp"), Some(g.syscallsp)),
            ("syscallpc", in_g("syscallpc"), Some(g.syscallsp + 8)),
            ("atomicstatus", in_g("atomicstatus"), Some(g.atomicstatus)),
            ("goid", in_g("goid"), Some(g.goid)),
            ("waitsince", in_g("waitsince"), Some(g.waitsince)),
            ("waitreason", in_g("waitreason"), Some(g.waitreason)),
            ("trackingSeq", in_g("trackingSeq"), Some(g.tracking_seq)),
            ("lockedm", in_g("lockedm"), Some(g.lockedm)),
            ("parentGoid", in_g("parentGoid"), g.parent_goid),
            ("gopc", in_g("gopc"), Some(g.gopc)),
            ("startpc", in_g("startpc"), Some(g.startpc)),
            ("waiting", in_g("waiting"), Some(g.waiting)),
            ("labels", in_g("labels"), Some(g.labels)),
            (
                "funcnametab",
                in_moduledata("funcnametab"),
                Some(layout::MODULEDATA_FUNCNAMETAB as usize),
            ),
            (
                "pclntable",
                in_moduledata("pclntable"),
                Some(layout::MODULEDATA_PCLNTABLE as usize),
            ),
            (
                "text",
                in_moduledata("text"),
                Some(layout::MODULEDATA_TEXT as usize),
            ),
            (
                "etext",
                in_moduledata("etext"),
                Some(layout::MODULEDATA_TEXT as usize + 8),
            ),
            (
                "gofunc",
                in_moduledata("gofunc"),
                Some(layout.moduledata_gofunc as usize),
            ),
            (
                "textsectmap",
                in_moduledata("textsectmap"),
                Some(layout.moduledata_textsectmap as usize),
            ),
        ];
        for (what, theirs, ours) in offsets {
            assert_eq!(
                ours.map(|ours| ours as u64),
                theirs,
                "{what} of {}",
                zoo.go_version
            );
        }

        let constant = |name: &str| dwarf.constants.get(name).copied();
        let wrapper = constant("internal/abi.FuncIDWrapper").or(constant("runtime.funcID_wrapper"));
        assert_eq!(
            Some(u64::from(layout.func_id_wrapper)),
            wrapper,
            "{}",
            zoo.go_version
        );
        for (name, value) in [
            ("_Gidle", status::IDLE),
            ("_Grunnable", status::RUNNABLE),
            ("_Grunning", status::RUNNING),
            ("_Gsyscall", status::SYSCALL),
            ("_Gwaiting", status::WAITING),
            ("_Gdead", status::DEAD),
            ("_Gcopystack", status::COPYSTACK),
            ("_Gpreempted", status::PREEMPTED),
            ("_Gscan", status::SCAN),
        ] {
            let theirs = constant(&format!("runtime.{name}"));
            assert_eq!(
                Some(u64::from(value)),
                theirs,
                "{name} of {}",
                zoo.go_version
            );
        }
        let newer = |value: u32| (minor >= 26).then_some(u64::from(value));
        assert_eq!(
            newer(status::LEAKED),
            constant("runtime._Gleaked"),
            "{}",
            zoo.go_version
        );
        assert_eq!(
            newer(status::DEADEXTRA),
            constant("runtime._Gdeadextra"),
            "{}",
            zoo.go_version
        );
    }
}
