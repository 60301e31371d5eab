//! The vtables that leakmon finds in programs, against their symbols, and in
//! every program of this machine that has nothing of tokio.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use leakmon::binary::addr::Vaddr;
use leakmon::binary::elf::{Elf, ReadAt as _};
use leakmon::runtime::tokio::vtables::{self, Found};

/// Every `zoo` of `target/fixtures/tokio-VERSION/CONFIGURATION`, and of AArch64's
/// beside it.
fn zoos() -> Vec<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let roots = ["fixtures", "fixtures-aarch64"].map(|folder| target.join(folder));
    let folders = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let all = roots.iter().flat_map(|root| folders(root));
    let versions = all.filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("tokio-"))
    });
    versions
        .flat_map(|version| folders(&version))
        .map(|configuration| configuration.join("zoo"))
        .filter(|zoo| zoo.exists())
        .collect()
}

fn find(path: &Path) -> Result<Option<Found>, vtables::Unknown> {
    let file = File::open(path).unwrap();
    let elf = Elf::parse(&file).unwrap();
    vtables::find(&elf, &file)
}

/// The functions called `raw::poll`, by the symbol table: both manglings have
/// the words in this order.
fn polls_by_symbol(path: &Path) -> BTreeSet<Vaddr> {
    use object::read::elf::ElfFile64;
    use object::{Object as _, ObjectSymbol as _};
    let bytes = fs::read(path).unwrap();
    let elf = ElfFile64::<object::LittleEndian>::parse(&*bytes).unwrap();
    elf.symbols()
        .filter(|symbol| {
            let name = format!(
                "{:#}",
                rustc_demangle::demangle(symbol.name().unwrap_or(""))
            );
            let name = name.split('<').next().unwrap_or("");
            name.trim_end_matches("::") == "tokio::runtime::task::raw::poll"
        })
        .map(|symbol| Vaddr(symbol.address()))
        .collect()
}

#[test]
fn every_poll_that_has_a_symbol_is_found_and_nothing_else() {
    let zoos = zoos();
    for zoo in &zoos {
        let started = Instant::now();
        let found = find(zoo)
            .unwrap()
            .unwrap_or_else(|| panic!("{}", zoo.display()));
        let took = started.elapsed();
        let polls: BTreeSet<Vaddr> = found.vtables.iter().map(|vtable| vtable.poll).collect();
        let symbols = polls_by_symbol(zoo);
        println!(
            "{}: {:?} {} vtables, {} polls, {} by symbol, {took:?}",
            zoo.display(),
            found.version,
            found.vtables.len(),
            polls.len(),
            symbols.len()
        );
        let version = found.version.unwrap().to_string();
        assert!(
            zoo.to_str()
                .unwrap()
                .contains(&format!("tokio-{}", version.rsplit_once('.').unwrap().0))
        );
        if symbols.is_empty() {
            assert!(polls.len() > 30, "{}", zoo.display());
        } else {
            assert_eq!(polls, symbols, "{}", zoo.display());
        }
    }
}

/// Whether a file has a path of tokio's among its bytes.
fn mentions_tokio(path: &Path) -> bool {
    let bytes = fs::read(path).unwrap();
    bytes
        .windows(11)
        .any(|window| window.starts_with(b"tokio-1.") || window.starts_with(b"tokio/src/r"))
}

#[test]
fn programs_without_tokio_have_none() {
    let mut looked = 0;
    let mut longest = (Duration::ZERO, PathBuf::new());
    let mut next: Vec<PathBuf> = ["/usr/bin", "/usr/sbin", "/usr/lib", "/usr/libexec"]
        .map(PathBuf::from)
        .to_vec();
    while let Some(path) = next.pop() {
        let Ok(about) = fs::symlink_metadata(&path) else {
            continue;
        };
        if about.is_dir() {
            let entries = fs::read_dir(&path).into_iter().flatten().flatten();
            next.extend(entries.map(|entry| entry.path()));
        }
        if !about.is_file() {
            continue;
        }
        let Ok(file) = File::open(&path) else {
            continue;
        };
        let Ok(elf) = Elf::parse(&file) else { continue };
        let started = Instant::now();
        let found = vtables::find(&elf, &file);
        let took = started.elapsed();
        looked += 1;
        if took > longest.0 {
            longest = (took, path.clone());
        }
        if found != Ok(None) {
            println!("{}: {found:?}", path.display());
            assert!(mentions_tokio(&path), "{}: {found:?}", path.display());
        }
        assert!(file.size() > 0);
    }
    println!("{looked} files, the longest {longest:?}");
    assert!(looked > 0);
}
