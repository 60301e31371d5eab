//! What the kernel's type information (BTF, Documentation/bpf/btf.rst) says of
//! its structs and functions: aya does not give out the members of a struct.

use std::collections::HashMap;

/// The kernel's types.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";

/// `BTF_MAGIC` of include/uapi/linux/btf.h.
const MAGIC: u16 = 0xeb9f;

// `BTF_KIND_*` of include/uapi/linux/btf.h.
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;
const INT: u32 = 1;
const VAR: u32 = 14;
const LAST_KIND: u32 = ENUM64;

/// Functions that are kept: the kernel has tens of thousands.
const FUNCTIONS: &str = "bpf_";

/// Structs within structs that are followed, at most.
const DEPTH: usize = 8;

/// A struct's or union's members, as they lie in the data.
#[derive(Clone, Copy)]
struct Members {
    at: usize,
    count: usize,
    /// Bytes of the whole.
    size: u32,
    /// The offsets' upper 8 bits are sizes of bit fields.
    bit_fields: bool,
}

/// The kernel's types.
pub(super) struct Btf {
    data: Vec<u8>,
    /// Where the strings begin and end in `data`.
    strings: (usize, usize),
    structs: HashMap<u32, Members>,
    /// The same by name; the first of each name.
    named: HashMap<String, u32>,
    functions: HashMap<String, u32>,
}

impl Btf {
    /// The running kernel's.
    ///
    /// # Errors
    ///
    /// Why there are none, in words.
    pub(super) fn of_kernel() -> Result<Btf, String> {
        let data = std::fs::read(KERNEL)
            .map_err(|error| format!("{KERNEL}: {error} (CONFIG_DEBUG_INFO_BTF)"))?;
        Btf::parse(data).ok_or_else(|| format!("{KERNEL} is malformed"))
    }

    /// Reads the types; `None` when they are malformed.
    pub(super) fn parse(data: Vec<u8>) -> Option<Btf> {
        if u16::from_le_bytes(data.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(&data, 4)? as usize;
        let section = |at: usize| {
            let start = header.checked_add(word(&data, at)? as usize)?;
            let end = start.checked_add(word(&data, at + 4)? as usize)?;
            (end <= data.len()).then_some((start, end))
        };
        let (mut at, end) = section(8)?;
        let strings = section(16)?;
        let mut btf = Btf {
            data,
            strings,
            structs: HashMap::new(),
            named: HashMap::new(),
            functions: HashMap::new(),
        };
        let mut id = 0;
        while at < end {
            id += 1;
            let name = word(&btf.data, at)?;
            let info = word(&btf.data, at + 4)?;
            let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
            at += 12;
            let length = match kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => 12 * count,
                ENUM | FUNC_PROTO => 8 * count,
                _ if kind <= LAST_KIND => 0,
                // How long it is is not known.
                _ => return None,
            };
            match kind {
                STRUCT | UNION => {
                    let members = Members {
                        at,
                        count,
                        size: word(&btf.data, at - 4)?,
                        bit_fields: info >> 31 != 0,
                    };
                    btf.structs.insert(id, members);
                    if name != 0 {
                        let name = btf.string(name)?.to_owned();
                        btf.named.entry(name).or_insert(id);
                    }
                }
                FUNC => {
                    let name = btf.string(name)?;
                    if name.starts_with(FUNCTIONS) {
                        let name = name.to_owned();
                        btf.functions.entry(name).or_insert(id);
                    }
                }
                _ => {}
            }
            at = at.checked_add(length)?;
        }
        (at == end).then_some(btf)
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let (start, end) = self.strings;
        let rest = self.data.get(start.checked_add(offset as usize)?..end)?;
        let length = rest.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&rest[..length]).ok()
    }

    /// The id of a function of the kernel whose name begins with [`FUNCTIONS`].
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        self.functions.get(name).copied()
    }

    /// Where a member lies in a struct, in bytes; members of its nameless
    /// structs and unions are its own.
    pub(super) fn offset(&self, of: &str, member: &str) -> Option<u32> {
        self.find(*self.named.get(of)?, member, DEPTH)
    }

    /// Bytes of a struct or union.
    pub(super) fn size(&self, of: &str) -> Option<u32> {
        Some(self.structs.get(self.named.get(of)?)?.size)
    }

    fn find(&self, id: u32, member: &str, depth: usize) -> Option<u32> {
        let members = self.structs.get(&id)?;
        (0..members.count).find_map(|index| {
            let at = members.at + 12 * index;
            let name = word(&self.data, at)?;
            let mut bits = word(&self.data, at + 8)?;
            if members.bit_fields {
                if name != 0 && bits >> 24 != 0 {
                    return None;
                }
                bits &= 0xff_ffff;
            }
            if name == 0 {
                let inner = self.find(word(&self.data, at + 4)?, member, depth.checked_sub(1)?)?;
                return inner.checked_add(bits / 8);
            }
            (self.string(name)? == member && bits % 8 == 0).then_some(bits / 8)
        })
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct s { int a; struct { int b; long c : 3; }; }; void bpf_f();`
    fn made_up() -> Vec<u8> {
        let strings = b"\0s\0a\0b\0c\0bpf_f\0";
        let (s, a, b, c, f) = (1, 3, 5, 7, 9);
        let types: &[u32] = &[
            // 1: an int
            0,
            INT << 24,
            4,
            32, //
            // 2: the nameless struct, with a bit field
            0,
            1 << 31 | STRUCT << 24 | 2,
            16,
            b,
            1,
            0,
            c,
            1,
            3 << 24 | 64, //
            // 3: s
            s,
            STRUCT << 24 | 2,
            24,
            a,
            1,
            0,
            0,
            2,
            64, //
            // 4: f
            f,
            FUNC << 24,
            1,
        ];
        let mut data = Vec::new();
        data.extend(MAGIC.to_le_bytes());
        data.extend([1, 0]);
        let length = (types.len() * 4) as u32;
        for word in [24, 0, length, length, strings.len() as u32] {
            data.extend(u32::to_le_bytes(word));
        }
        data.extend(types.iter().flat_map(|word| word.to_le_bytes()));
        data.extend(strings);
        data
    }

    #[test]
    fn members_are_found_in_nameless_structs() {
        let btf = Btf::parse(made_up()).unwrap();
        assert_eq!(btf.offset("s", "a"), Some(0));
        assert_eq!(btf.offset("s", "b"), Some(8));
        assert_eq!(btf.offset("s", "c"), None);
        assert_eq!(btf.offset("s", "d"), None);
        assert_eq!(btf.offset("t", "a"), None);
        assert_eq!((btf.size("s"), btf.size("t")), (Some(24), None));
        assert_eq!(btf.function("bpf_f"), Some(4));
    }

    #[test]
    fn no_part_of_it_makes_it_panic() {
        let data = made_up();
        for length in 0..data.len() {
            Btf::parse(data[..length].to_vec());
        }
        for at in 0..data.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut broken = data.clone();
                broken[at] = value;
                if let Some(btf) = Btf::parse(broken) {
                    btf.offset("s", "b");
                }
            }
        }
    }

    #[test]
    fn the_running_kernel_has_what_is_read() {
        let Ok(data) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            return;
        };
        let btf = Btf::parse(data).unwrap();
        let pid = btf.offset("task_struct", "pid").unwrap();
        assert_eq!(btf.offset("task_struct", "tgid"), Some(pid + 4));
        assert!(btf.function("bpf_iter_task").is_some());
    }
}
