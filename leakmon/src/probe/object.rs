//! The compiled kernel side, its instructions tied to the maps that aya made:
//! each program is loaded when it is first needed, so that one that a kernel
//! refuses takes no other with it.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya_obj::generated::bpf_insn;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::error::Error;
use super::sys::{self, ProgramType};

/// The object that the build script compiled.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/leakmon"));

/// `BPF_F_NO_PREALLOC` of include/uapi/linux/bpf.h.
const NO_PREALLOC: u32 = 1;

/// Where `struct bpf_map_def` has its flags, in bytes.
const MAP_FLAGS: usize = 16;

/// The object, to be loaded by aya: with maps whose entries are allocated when they
/// are needed, where the kernel can do so in any context, else beforehand.
pub(super) struct Image {
    bytes: Vec<u8>,
    start: usize,
}

impl Image {
    pub(super) fn new(allocator: bool) -> Result<Image, Error> {
        // aya wants it aligned.
        let mut bytes = vec![0; OBJECT.len() + align_of::<u64>()];
        let start = bytes.as_ptr().align_offset(align_of::<u64>());
        let image = bytes
            .get_mut(start..start.wrapping_add(OBJECT.len()))
            .ok_or_else(|| Error::Object("it cannot be aligned".to_owned()))?;
        image.copy_from_slice(OBJECT);
        if !allocator {
            preallocate(image)?;
        }
        Ok(Image { bytes, start })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + OBJECT.len()]
    }
}

/// Unsets [`NO_PREALLOC`] of every map.
fn preallocate(image: &mut [u8]) -> Result<(), Error> {
    let broken = |what: &str| Error::Object(what.to_owned());
    let file = object::File::parse(OBJECT).map_err(|error| broken(&error.to_string()))?;
    let maps = file
        .section_by_name("maps")
        .ok_or_else(|| broken("it has no maps"))?;
    let (start, _) = maps.file_range().ok_or_else(|| broken("it has no maps"))?;
    for symbol in file.symbols() {
        if symbol.section_index() != Some(maps.index()) || symbol.size() == 0 {
            continue;
        }
        let at = start as usize + symbol.address() as usize + MAP_FLAGS;
        let flags = image
            .get_mut(at..at + size_of::<u32>())
            .and_then(|bytes| <&mut [u8; 4]>::try_from(bytes).ok())
            .ok_or_else(|| broken("a map lies outside of it"))?;
        *flags = (u32::from_le_bytes(*flags) & !NO_PREALLOC).to_le_bytes();
    }
    Ok(())
}

/// `BPF_JMP | BPF_CALL` of include/uapi/linux/bpf.h.
const CALL: u8 = 0x85;

/// `src_reg` of a call of one of the kernel's functions, by its BTF id
/// (include/uapi/linux/bpf.h).
const BPF_PSEUDO_KFUNC_CALL: u8 = 2;

/// `bpf_get_attach_cookie`, and an instruction that does nothing (`BPF_JMP |
/// BPF_JA`, 0): leakmon-ebpf leaves room for a constant of two instructions.
const ATTACH_COOKIE: i32 = 174;
const JUMP: u8 = 0x05;

/// `BPF_LD | BPF_DW | BPF_IMM`: a constant of 64 bits.
const LOAD_CONSTANT: u8 = 0x18;

/// What a program learns of the place that it is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cookies {
    /// The attach cookie, from the kernel.
    Kernel,
    /// This one, whatever the place: for kernels that keep none.
    Constant(u64),
}

/// A program's instructions, ready to be loaded.
struct Function {
    instructions: Vec<bpf_insn>,
    license: CString,
}

/// Every program of the object. The maps are aya's: they must stay open for as
/// long as programs are loaded.
pub(super) struct Object(HashMap<String, Function>);

impl Object {
    /// Ties the programs to the maps that `ebpf` made.
    pub(super) fn new(ebpf: &Ebpf) -> Result<Object, Error> {
        let broken = |error: &dyn std::fmt::Display| Error::Object(error.to_string());
        let mut object = aya_obj::Object::parse(OBJECT).map_err(|error| broken(&error))?;
        let maps: Vec<(String, aya_obj::Map)> = object.maps.drain().collect();
        let mut located = Vec::with_capacity(maps.len());
        for (name, map) in &maps {
            let data = ebpf
                .map(name)
                .and_then(map_data)
                .ok_or_else(|| Error::Object(format!("it has no map {name}")))?;
            let fd = data.fd().as_fd().as_raw_fd();
            located.push((name.as_str(), fd, map));
        }
        let sections = object
            .functions
            .keys()
            .map(|&(section, _)| section)
            .collect();
        object
            .relocate_maps(located.into_iter(), &sections)
            .map_err(|error| broken(&error))?;
        object
            .relocate_calls(&sections)
            .map_err(|error| broken(&error))?;
        object.sanitize_functions(aya::features());
        let functions = object
            .programs
            .iter()
            .filter_map(|(name, program)| {
                let function = object.functions.get(&program.function_key())?;
                let function = Function {
                    instructions: function.instructions.clone(),
                    license: program.license.clone(),
                };
                Some((name.clone(), function))
            })
            .collect();
        Ok(Object(functions))
    }

    /// Loads the program `name`, for a place with this cookie. Its calls of helpers with numbers of `functions`
    /// become calls of the kernel's functions with the BTF ids beside them.
    ///
    /// # Errors
    ///
    /// [`Error::Program`] with the verifier's output.
    pub(super) fn load(
        &self,
        name: &'static str,
        program_type: ProgramType,
        functions: &[(u32, u32)],
        cookies: Cookies,
    ) -> Result<OwnedFd, Error> {
        let function = self
            .0
            .get(name)
            .ok_or_else(|| Error::Object(format!("it has no program {name}")))?;
        let mut instructions = function.instructions.clone();
        for instruction in &mut instructions {
            let called = functions.iter().find(|&&(number, _)| {
                instruction.code == CALL
                    && instruction.src_reg() == 0
                    && instruction.imm == number.cast_signed()
            });
            if let Some(&(_, id)) = called {
                instruction.set_src_reg(BPF_PSEUDO_KFUNC_CALL);
                instruction.imm = id.cast_signed();
            }
        }
        if let Cookies::Constant(cookie) = cookies {
            set_cookie(&mut instructions, cookie);
        }
        sys::load_program(name, program_type, &instructions, &function.license)
            .map_err(|(source, log)| Error::refused(name, source, log))
    }
}

/// Puts a constant in the place of the kernel's cookie.
fn set_cookie(instructions: &mut [bpf_insn], cookie: u64) {
    let mut rest = instructions;
    while let [call, room, ..] = rest {
        let is_cookie = call.code == CALL && call.src_reg() == 0 && call.imm == ATTACH_COOKIE;
        if is_cookie && room.code == JUMP && room.off == 0 {
            let (low, high) = (cookie as u32, (cookie >> 32) as u32);
            *call = bpf_insn {
                code: LOAD_CONSTANT,
                _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
                imm: low.cast_signed(),
                ..*call
            };
            *room = bpf_insn {
                code: 0,
                _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
                imm: high.cast_signed(),
                ..*room
            };
        }
        rest = &mut rest[1..];
    }
}

fn map_data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::PerCpuArray(data)
        | Map::HashMap(data)
        | Map::PerCpuHashMap(data)
        | Map::Queue(data)
        | Map::RingBuf(data) => Some(data),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object() -> HashMap<String, Vec<bpf_insn>> {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        let programs = object.programs.iter();
        programs
            .map(|(name, program)| {
                let function = &object.functions[&program.function_key()];
                (name.clone(), function.instructions.clone())
            })
            .collect()
    }

    fn cookies(instructions: &[bpf_insn]) -> usize {
        let calls = instructions
            .iter()
            .filter(|call| call.code == CALL && call.src_reg() == 0 && call.imm == ATTACH_COOKIE);
        calls.count()
    }

    /// Every program that asks for its cookie can be given one.
    #[test]
    fn cookies_become_constants() {
        let mut changed = 0;
        for (name, before) in object() {
            let mut after = before.clone();
            set_cookie(&mut after, 0x1234_5678_9abc_def0);
            assert_eq!(cookies(&after), 0, "{name}");
            assert_eq!(before.len(), after.len());
            let constants = after.windows(2).filter(|pair| {
                let value = (pair[0].imm as u32, pair[1].imm as u32);
                (pair[0].code, pair[1].code) == (LOAD_CONSTANT, 0)
                    && (pair[0].dst_reg(), pair[0].src_reg()) == (0, 0)
                    && value == (0x9abc_def0, 0x1234_5678)
            });
            assert_eq!(constants.count(), cookies(&before), "{name}");
            changed += cookies(&before);
        }
        assert!(changed >= 10, "{changed}");
    }

    /// Kernels without an allocator of their own take no map that allocates.
    #[test]
    fn maps_are_allocated_beforehand() {
        let flags = |image: &[u8]| {
            let object = aya_obj::Object::parse(image).unwrap();
            let maps = object.maps.values().map(|map| map.map_flags());
            maps.filter(|flags| flags & NO_PREALLOC != 0).count()
        };
        assert!(flags(Image::new(true).unwrap().bytes()) >= 5);
        assert_eq!(flags(Image::new(false).unwrap().bytes()), 0);
    }
}
