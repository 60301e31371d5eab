//! The compiled kernel side, its instructions tied to the maps that aya made:
//! each program is loaded when it is first needed, so that one that a kernel
//! refuses takes no other with it.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya_obj::generated::bpf_insn;

use super::error::Error;
use super::sys::{self, ProgramType};

/// The object that the build script compiled.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/leakmon"));

/// `BPF_JMP | BPF_CALL` of include/uapi/linux/bpf.h.
const CALL: u8 = 0x85;

/// `src_reg` of a call of one of the kernel's functions, by its BTF id
/// (include/uapi/linux/bpf.h).
const BPF_PSEUDO_KFUNC_CALL: u8 = 2;

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

    /// Loads the program `name`. Its calls of helpers with numbers of `functions`
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
        sys::load_program(name, program_type, &instructions, &function.license).map_err(
            |(source, log)| {
                Error::or_permission("bpf", source, |source| Error::Program {
                    program: name,
                    source,
                    log,
                })
            },
        )
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
