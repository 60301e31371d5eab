//! `cargo xtask fixtures`: the programs of fixtures/go, built with every Go version in every shape that leakmon reads.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::big;
use crate::command::Run;
use crate::garble::Garble;
use crate::go::{Go, RELEASES};
use crate::progress::{note, step};
use crate::setup;
use crate::workspace;

/// Which fixtures to build.
#[derive(Args, Default)]
pub(crate) struct Options {
    /// A Go version to build with, as in 1.24; may be repeated [default: all]
    #[arg(long = "go", value_name = "1.N")]
    versions: Vec<String>,
    /// Build the 100 MB program of the benches too
    #[arg(long)]
    big: bool,
}

/// The versions that may be missing without a loss of what is promised.
const OPTIONAL: &[u32] = &[18, 20];

/// The version of the manifest's format.
const MANIFEST_VERSION: u32 = 1;

/// What has been built, and what could not be.
pub(crate) struct Built {
    /// The folder with the programs and manifest.json.
    pub(crate) folder: PathBuf,
    /// The versions that leakmon promises to read and that could not be had, each with the reason.
    pub(crate) lacking: Vec<String>,
}

/// How a program is built.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Variant {
    Plain,
    Stripped,
    Pie,
    CgoStripped,
    Pgo,
    Bits32,
    Garbled,
}

impl Variant {
    /// The folder's name.
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Stripped => "stripped",
            Self::Pie => "pie",
            Self::CgoStripped => "cgo-stripped",
            Self::Pgo => "pgo",
            Self::Bits32 => "386",
            Self::Garbled => "garbled",
        }
    }

    /// What `go build` is told.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Plain | Self::Pgo | Self::Bits32 | Self::Garbled => &[],
            Self::Stripped => &["-ldflags=-s -w"],
            Self::Pie => &["-buildmode=pie"],
            Self::CgoStripped => &["-tags=cgofixture", "-ldflags=-linkmode=external -s -w"],
        }
    }
}

/// Programs of every Go version, and how.
const OF_EVERY_VERSION: &[(&str, &[Variant])] = &[
    ("pingpong", &[Variant::Plain]),
    (
        "zoo",
        &[
            Variant::Plain,
            Variant::Stripped,
            Variant::Pie,
            Variant::CgoStripped,
            Variant::Pgo,
        ],
    ),
    ("senders", &[Variant::Plain, Variant::Pgo]),
    ("churner", &[Variant::Plain, Variant::Pgo]),
];

/// Programs of the Go version at hand only.
const OF_ONE_VERSION: &[(&str, &[Variant])] = &[
    (
        "senders",
        &[Variant::Stripped, Variant::Pie, Variant::Bits32],
    ),
    ("sum", &[Variant::Plain, Variant::Stripped]),
    ("heavy", &[Variant::Plain]),
    ("holder", &[Variant::Plain]),
];

/// The first version that knows profile-guided optimization for good.
const FIRST_PGO: u32 = 21;

/// Builds the fixtures as the user asked.
pub(crate) fn run(options: &Options) -> Result<Built> {
    let driver = setup::run()?;
    build(&driver, options)
}

/// Builds the fixtures; what is up to date stays as it is.
pub(crate) fn build(driver: &Go, options: &Options) -> Result<Built> {
    let releases = wanted(&options.versions)?;
    let folder = folder();
    workspace::create(&folder)?;
    let mut builder = Builder {
        manifest: Manifest::read(&folder),
        sources: hash_of_sources()?,
        built: 0,
    };
    let mut lacking = Vec::new();
    for (minor, patch) in releases {
        step(&format!("fixtures with Go 1.{minor}"), || {
            let go = match Go::of(driver, minor, patch) {
                Ok(go) => go,
                Err(error) => {
                    note(format!(
                        "NOT BUILT: Go 1.{minor} cannot be had here: {error:#}"
                    ));
                    builder.manifest.lack(&format!("go1.{minor}"), &error);
                    if !OPTIONAL.contains(&minor) {
                        lacking.push(format!("Go 1.{minor}: {error:#}"));
                    }
                    return Ok(());
                }
            };
            builder.version(&go, minor == driver.minor())
        })?;
    }
    if options.versions.is_empty() {
        step("garbled fixture", || builder.garbled(driver))?;
    }
    if options.big {
        step("the big program", || {
            big::build(driver, &folder.join("big")).map(drop)
        })?;
    }
    builder.manifest.write(&folder)?;
    note(format!(
        "{} programs in {}, {} of them built now",
        builder.manifest.programs.len(),
        folder.display(),
        builder.built
    ));
    Ok(Built { folder, lacking })
}

/// Where the fixtures are built.
pub(crate) fn folder() -> PathBuf {
    workspace::target().join("fixtures")
}

/// The path of a fixture of the Go version at hand.
pub(crate) fn path(go: &Go, program: &str) -> PathBuf {
    folder().join(place(go, Variant::Plain)).join(program)
}

/// Builds one program, plainly, with the Go at hand.
pub(crate) fn one(go: &Go, program: &str) -> Result<PathBuf> {
    let folder = folder();
    let mut builder = Builder {
        manifest: Manifest::read(&folder),
        sources: hash_of_sources()?,
        built: 0,
    };
    builder.program(go, program, Variant::Plain)?;
    builder.manifest.write(&folder)?;
    Ok(path(go, program))
}

/// The releases behind the versions that the user named, or all.
fn wanted(versions: &[String]) -> Result<Vec<(u32, u32)>> {
    if versions.is_empty() {
        return Ok(RELEASES.to_vec());
    }
    versions
        .iter()
        .map(|version| {
            RELEASES
                .iter()
                .copied()
                .find(|(minor, _)| *version == format!("1.{minor}"))
                .with_context(|| {
                    let known: Vec<String> = RELEASES
                        .iter()
                        .map(|(minor, _)| format!("1.{minor}"))
                        .collect();
                    format!(
                        "no fixtures for Go {version}; there are: {}",
                        known.join(", ")
                    )
                })
        })
        .collect()
}

/// The folder of a version's variant, below that of the fixtures.
fn place(go: &Go, variant: Variant) -> PathBuf {
    Path::new(&format!("go1.{}", go.minor())).join(variant.name())
}

/// Builds what the manifest does not have yet.
struct Builder {
    manifest: Manifest,
    sources: u64,
    built: usize,
}

impl Builder {
    /// Everything of one Go version.
    fn version(&mut self, go: &Go, at_hand: bool) -> Result<()> {
        let lists = [OF_EVERY_VERSION, if at_hand { OF_ONE_VERSION } else { &[] }];
        for (program, variants) in lists.into_iter().flatten() {
            for &variant in *variants {
                if variant != Variant::Pgo || go.minor() >= FIRST_PGO {
                    self.program(go, program, variant)?;
                }
            }
        }
        Ok(())
    }

    /// One program in one variant.
    fn program(&mut self, go: &Go, program: &str, variant: Variant) -> Result<()> {
        self.unless_built(go, program, variant, |path| {
            let mut build = go
                .command()
                .args(["build", "-buildvcs=false", "-o"])
                .arg(path)
                .args(variant.flags());
            if variant == Variant::Pgo {
                build = build.arg(format!("-pgo={}", profile(go)?.display()));
            }
            in_module(build, variant)
                .arg(format!("./{program}"))
                .capture()?;
            if variant == Variant::CgoStripped {
                Run::new("strip").arg(path).capture()?;
            }
            Ok(())
        })
    }

    /// The program that garble made unreadable, with the newest Go.
    fn garbled(&mut self, driver: &Go) -> Result<()> {
        let garble = match Garble::ensure(driver) {
            Ok(garble) => garble,
            Err(error) => {
                note(format!("NOT BUILT: garble cannot be had here: {error:#}"));
                self.manifest.lack("garble", &error);
                return Ok(());
            }
        };
        self.unless_built(garble.go(), "senders", Variant::Garbled, |path| {
            in_module(garble.command(), Variant::Garbled)
                .args(["build", "-o"])
                .arg(path)
                .arg("./senders")
                .capture()
                .map(drop)
        })
    }

    /// Builds and enters into the manifest what is not there or was built from something else.
    fn unless_built(
        &mut self,
        go: &Go,
        program: &str,
        variant: Variant,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let place = place(go, variant);
        let path = folder().join(&place).join(program);
        let key = {
            let mut hasher = DefaultHasher::new();
            (self.sources, go.version(), variant.name(), variant.flags()).hash(&mut hasher);
            format!("{:016x}", hasher.finish())
        };
        let entry = place.join(program).to_string_lossy().into_owned();
        if path.exists() && self.manifest.has(&entry, &key) {
            return Ok(());
        }
        workspace::create(&folder().join(&place))?;
        build(&path).with_context(|| format!("cannot build the fixture {entry}"))?;
        note(&entry);
        self.built += 1;
        self.manifest.add(
            entry.clone(),
            json!({
                "program": program,
                "go": format!("1.{}", go.minor()),
                "go_version": format!("go{}", go.version()),
                "variant": variant.name(),
                "path": entry,
                "key": key,
            }),
        );
        // Written each time, so that an interrupted build goes on where it stopped.
        self.manifest.write(&folder())
    }
}

/// A build in the fixtures' module, for the target that the variant wants.
fn in_module(build: Run, variant: Variant) -> Run {
    let cgo = if variant == Variant::CgoStripped {
        "1"
    } else {
        "0"
    };
    let build = build
        .dir(&sources_folder())
        .env("CGO_ENABLED", cgo)
        .env("GOWORK", "off")
        .env("GOOS", "linux");
    if variant == Variant::Bits32 {
        build.env("GOARCH", "386")
    } else {
        build.env_remove("GOARCH")
    }
}

fn sources_folder() -> PathBuf {
    workspace::root().join("fixtures/go")
}

/// A CPU profile of the version's own ping-pong, whose hottest calls are those into the scheduler.
fn profile(go: &Go) -> Result<PathBuf> {
    let version = folder().join(format!("go1.{}", go.minor()));
    let path = version.join("pingpong.pprof");
    if !path.exists() {
        Run::new(path_of_pingpong(&version))
            .args(["-mode", "pingpong", "-d", "3s", "-cpuprofile"])
            .arg(&path)
            .capture()?;
    }
    Ok(path)
}

fn path_of_pingpong(version: &Path) -> PathBuf {
    version.join(Variant::Plain.name()).join("pingpong")
}

/// A hash of every file of the fixtures' module.
fn hash_of_sources() -> Result<u64> {
    let mut files = Vec::new();
    collect(&sources_folder(), &mut files)?;
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.strip_prefix(workspace::root())?.hash(&mut hasher);
        std::fs::read(&file)
            .with_context(|| format!("cannot read {}", file.display()))?
            .hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// target/fixtures/manifest.json: what there is, by path, and what could not be had.
struct Manifest {
    programs: HashMap<String, Value>,
    lacking: Vec<Value>,
}

impl Manifest {
    /// What the last run left; nothing when there is none that can be read.
    fn read(folder: &Path) -> Self {
        let programs = std::fs::read(folder.join("manifest.json"))
            .ok()
            .and_then(|text| serde_json::from_slice::<Value>(&text).ok())
            .filter(|manifest| manifest["version"] == MANIFEST_VERSION)
            .and_then(|manifest| manifest["fixtures"].as_array().cloned())
            .unwrap_or_default()
            .into_iter()
            .filter_map(|program| Some((program["path"].as_str()?.to_owned(), program)))
            .filter(|(path, _)| folder.join(path).exists())
            .collect();
        Self {
            programs,
            lacking: Vec::new(),
        }
    }

    fn has(&self, path: &str, key: &str) -> bool {
        self.programs
            .get(path)
            .is_some_and(|program| program["key"] == key)
    }

    fn add(&mut self, path: String, program: Value) {
        self.programs.insert(path, program);
    }

    fn lack(&mut self, what: &str, why: &anyhow::Error) {
        self.lacking
            .push(json!({ "what": what, "why": format!("{why:#}") }));
    }

    fn write(&self, folder: &Path) -> Result<()> {
        let mut programs: Vec<&Value> = self.programs.values().collect();
        programs.sort_by_key(|program| program["path"].as_str());
        let manifest = json!({
            "version": MANIFEST_VERSION,
            "fixtures": programs,
            "unavailable": self.lacking,
        });
        let path = folder.join("manifest.json");
        std::fs::write(&path, format!("{manifest:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Fails when a version that leakmon promises to read could not be had.
pub(crate) fn require_all(built: &Built) -> Result<()> {
    if built.lacking.is_empty() {
        return Ok(());
    }
    bail!(
        "the tests need fixtures of Go versions that cannot be had here:\n{}",
        built.lacking.join("\n")
    )
}
