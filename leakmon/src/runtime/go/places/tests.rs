//! Functions of real programs, of both architectures; the whole programs are
//! examined in `tests/places.rs`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::*;
use crate::runtime::go::variables::Variables;

const GO118_AMD64: &str = include_str!("../testdata/go1.18-amd64.txt");
const GO120_AMD64_PROFILE: &str = include_str!("../testdata/go1.20-amd64-profile.txt");
const GO127_ARM64: &str = include_str!("../testdata/go1.27-arm64.txt");

/// What one of the files says.
#[derive(Clone, Default)]
struct Binary {
    entries: BTreeMap<&'static str, u64>,
    code: BTreeMap<&'static str, Vec<u8>>,
    variables: BTreeMap<&'static str, u64>,
}

impl Binary {
    fn read(text: &'static str) -> Binary {
        let mut binary = Binary::default();
        let mut current = None;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some(hex) = line.strip_prefix("    ") {
                let code = binary.code.entry(current.expect("a function")).or_default();
                code.extend((0..hex.len() / 2).map(|byte| {
                    u8::from_str_radix(&hex[2 * byte..2 * byte + 2], 16).expect("hex")
                }));
                continue;
            }
            let mut words = line.split(' ');
            let mut word = || words.next().expect("three words");
            let (what, name, addr) = (word(), word(), word());
            let addr = u64::from_str_radix(addr.trim_start_matches("0x"), 16).expect("hex");
            match what {
                "variable" => binary.variables.insert(name, addr),
                _ => binary.entries.insert(name, addr),
            };
            current = Some(name);
        }
        binary
    }

    fn at(&self, function: &str, offset: u64) -> Vaddr {
        Vaddr(self.entries[function] + offset)
    }
}

impl Functions for Binary {
    fn entry(&self, name: &str) -> Option<Vaddr> {
        self.entries.get(name).copied().map(Vaddr)
    }

    fn code(&self, name: &str) -> Option<(Vaddr, Cow<'_, [u8]>)> {
        Some((self.entry(name)?, self.code.get(name)?.into()))
    }

    fn containing(&self, addr: Vaddr) -> Option<(&str, Vaddr)> {
        self.entries
            .iter()
            .find(|(_, entry)| **entry == addr.0)
            .map(|(name, entry)| (*name, Vaddr(*entry)))
    }
}

fn found(places: &[Found]) -> Vec<(Role, Vaddr, u8)> {
    places
        .iter()
        .map(|place| (place.role, place.vaddr, place.depth))
        .collect()
}

#[test]
fn variables_are_where_the_symbols_say() {
    for (text, architecture, status, ngsys) in [
        (GO118_AMD64, Arch::X86_64, 144, 72),
        (GO127_ARM64, Arch::Aarch64, 144, 96),
    ] {
        let binary = Binary::read(text);
        let variables = Variables::find(architecture, &binary).expect("found");
        let addr = |name| Vaddr(binary.variables[name]);
        assert_eq!(variables.allgs, addr("runtime.allgs"));
        assert_eq!(variables.allgptr, addr("runtime.allgptr"));
        assert_eq!(variables.allglen, addr("runtime.allglen"));
        assert_eq!(variables.sched, addr("runtime.sched"));
        assert_eq!(variables.ngsys, Vaddr(variables.sched.0 + ngsys));
        assert_eq!(variables.atomicstatus, status);
    }
}

#[test]
fn places_in_go_1_18_on_amd64() {
    let binary = Binary::read(GO118_AMD64);
    let places = Places::find(Arch::X86_64, &binary);
    assert_eq!(
        found(&places.lifecycle.expect("proven")),
        [
            // CALL runqput.
            (Role::Spawn, binary.at("runtime.newproc.func1", 0x40), 0),
            // CALL casgstatus.
            (Role::Exit, binary.at("runtime.goexit0", 0x40), 0),
        ]
    );
    let blocking = places.blocking.expect("proven");
    assert_eq!(blocking.universal, None);
    let wait = "sync.runtime_notifyListWait";
    assert_eq!(
        found(&blocking.places),
        [
            (Role::Park, binary.at(wait, 0x138), 2),
            // JE behind it.
            (Role::Resume, binary.at(wait, 0x145), 0),
            // For ever.
            (Role::Park, binary.at("runtime.block", 0x27), 1),
        ]
    );
}

#[test]
fn places_in_go_1_27_on_arm64() {
    let binary = Binary::read(GO127_ARM64);
    let places = Places::find(Arch::Aarch64, &binary);
    assert_eq!(
        found(&places.lifecycle.expect("proven")),
        [
            (Role::Spawn, binary.at("runtime.newproc.func1", 0x40), 0),
            (Role::Exit, binary.at("runtime.gdestroy", 0x34), 0),
        ]
    );
    let wait = "sync.runtime_notifyListWait";
    assert_eq!(
        found(&places.blocking.expect("proven").places),
        [
            (Role::Park, binary.at(wait, 0x190), 2),
            (Role::Resume, binary.at(wait, 0x198), 0),
            (Role::Park, binary.at("runtime.block", 0x2c), 1),
        ]
    );
}

#[test]
fn a_profile_that_inlines_runqput_and_gopark() {
    let mut binary = Binary::read(GO120_AMD64_PROFILE);
    // A function that should call gopark and does not.
    let ready = binary.code["runtime.ready"].clone();
    binary
        .entries
        .insert("runtime.semacquire1", binary.entries["runtime.ready"]);
    binary.code.insert("runtime.semacquire1", ready);
    let places = Places::find(Arch::X86_64, &binary);
    assert_eq!(
        found(&places.lifecycle.expect("proven")),
        [
            (
                Role::SpawnReturned,
                binary.at("runtime.newproc.func1", 0x34),
                0
            ),
            (Role::Exit, binary.at("runtime.goexit0", 0x2d), 0),
        ]
    );
    let blocking = places.blocking.expect("proven");
    assert_eq!(
        blocking.universal.map(|refused| refused.to_string()),
        Some("runtime.semacquire1: does not call gopark".to_owned())
    );
    assert_eq!(
        found(&blocking.places),
        [
            (
                Role::ParkUniversal,
                binary.at("runtime.park_m", 0x2d),
                UNIVERSAL_DEPTH
            ),
            (Role::Ready, binary.at("runtime.ready", 0x2e), 0),
        ]
    );
}

#[test]
fn a_missing_function_is_named() {
    let mut binary = Binary::read(GO118_AMD64);
    binary.entries.remove("runtime.goexit0");
    let places = Places::find(Arch::X86_64, &binary);
    assert_eq!(
        places.lifecycle.map_err(|refused| refused.to_string()),
        Err("runtime.goexit0: not in the function table".to_owned())
    );
    assert!(places.blocking.is_ok());
}

#[test]
fn a_branch_into_the_gap_behind_a_wait_refuses_the_resume() {
    // call gopark; mov rax, [rsp]; je +2; nop; ret; jmp back to the je
    let code = [
        0xe8, 0x0b, 0, 0, 0, 0x48, 0x8b, 0x04, 0x24, 0x74, 2, 0x90, 0xc3, 0xeb, 0xfa,
    ];
    let binary = Binary {
        entries: [
            ("runtime.semacquire1", 0x1000),
            ("runtime.gopark", 0x1010),
            ("runtime.mcall", 0x2000),
        ]
        .into(),
        code: [("runtime.semacquire1", code.to_vec())].into(),
        variables: BTreeMap::new(),
    };
    let finder = Finder {
        architecture: Arch::X86_64,
        convention: Convention::of(Arch::X86_64),
        functions: &binary,
    };
    assert_eq!(
        finder.call_sites().map_err(|refused| refused.why),
        Err("behind a call, another path joins before an emulated instruction".to_owned())
    );
    let mut straight = binary.clone();
    straight
        .code
        .insert("runtime.semacquire1", code[..13].to_vec());
    let finder = Finder {
        functions: &straight,
        ..finder
    };
    assert_eq!(
        found(&finder.call_sites().expect("proven")),
        [
            (Role::Park, Vaddr(0x1000), 4),
            (Role::Resume, Vaddr(0x1009), 0),
        ]
    );
}

/// Changed and shortened code gives places on instruction boundaries or a
/// refusal; it never panics and always ends.
#[test]
fn mutated_functions() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    for (text, architecture) in [
        (GO118_AMD64, Arch::X86_64),
        (GO120_AMD64_PROFILE, Arch::X86_64),
        (GO127_ARM64, Arch::Aarch64),
    ] {
        let whole = Binary::read(text);
        for _ in 0..500 {
            let mut binary = whole.clone();
            for code in binary.code.values_mut() {
                for _ in 0..random(4) {
                    let at = random(code.len());
                    code[at] = random(256) as u8;
                }
                if random(4) == 0 {
                    code.truncate(random(code.len()));
                }
            }
            if random(8) == 0 {
                for entry in binary.entries.values_mut() {
                    *entry = entry.wrapping_sub(0x45_0000);
                }
            }
            let _ = Variables::find(architecture, &binary);
            let places = Places::find(architecture, &binary);
            let blocking = places.blocking.map_or(vec![], |blocking| blocking.places);
            for place in places.lifecycle.unwrap_or_default().iter().chain(&blocking) {
                let code = finder_code(architecture, &binary, place.function);
                assert!(code.index_of(place.vaddr).is_some(), "{place:?}");
            }
        }
    }
}

fn finder_code(architecture: Arch, binary: &Binary, function: &'static str) -> Code {
    decode(architecture, binary, function).expect("a place was found in it")
}
