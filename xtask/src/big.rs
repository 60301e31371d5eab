//! A Go program of 100 MB, as big servers are, generated from a few lines: very many functions, and data beside them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::go::Go;
use crate::progress::note;
use crate::workspace;

/// How many packages of functions, which the compiler takes side by side.
const PACKAGES: usize = 32;

/// How many functions in each.
const FUNCTIONS: usize = 2500;

/// The size of the data that the program embeds.
const DATA: usize = 48 << 20;

/// Generates and builds the program below a folder and gives its path. It is kept when it is there already.
pub(crate) fn build(go: &Go, folder: &Path) -> Result<PathBuf> {
    let program = folder.join("big");
    if program.exists() {
        return Ok(program);
    }
    let sources = folder.join("source");
    workspace::create(&sources)?;
    write(&sources.join("go.mod"), "module leakmon/big\n\ngo 1.18\n")?;
    write(&sources.join("data.bin"), noise(DATA))?;
    let mut imports = String::new();
    let mut tables = String::new();
    for package in 0..PACKAGES {
        let name = format!("part{package}");
        workspace::create(&sources.join(&name))?;
        write(
            &sources.join(&name).join("part.go"),
            functions(&name, package),
        )?;
        writeln!(imports, "\t\"leakmon/big/{name}\"")?;
        writeln!(tables, "\tlen({name}.Names()) +")?;
    }
    write(
        &sources.join("main.go"),
        MAIN.replace("IMPORTS\n", &imports)
            .replace("TABLES\n", &tables),
    )?;
    go.command()
        .args(["build", "-buildvcs=false", "-o"])
        .arg(&program)
        .arg(".")
        .dir(&sources)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off")
        .capture()?;
    let size = std::fs::metadata(&program)?.len();
    note(format!("{} MB: {}", size >> 20, program.display()));
    Ok(program)
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

/// The program itself: it calls one of its functions, leaks one goroutine and waits.
const MAIN: &str = r#"// Big is a large program that leaks one goroutine.
package main

import (
	_ "embed"
	"fmt"
	"os"

IMPORTS
)

//go:embed data.bin
var data string

// size keeps the linker from dropping any of the functions.
var size = 0 +
TABLES
	0

func leak(c chan int) {
	c <- 1 // leaks: nobody receives
}

func main() {
	go leak(make(chan int))
	fmt.Println("ready", os.Getpid())
	fmt.Fprintln(os.Stderr, "big:", size, "functions and data that begins with", data[0])
	os.Stdin.Read(make([]byte, 1))
}
"#;

/// One package of functions that differ, with loops, errors, calls and closures as code has.
fn functions(name: &str, package: usize) -> String {
    let mut text = format!(
        "package {name}\n\nimport \"fmt\"\n\n// RequestHandler has many methods.\ntype RequestHandler struct{{}}\n\n"
    );
    let mut table =
        String::from("var Table = []func(*RequestHandler, int, []string) (int, error){\n");
    for index in 0..FUNCTIONS {
        let unlike = package * FUNCTIONS + index;
        let next = (index + 1) % FUNCTIONS;
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "// HandleRequest{index} is one of many.\n\
             func (h *RequestHandler) HandleRequest{index}(n int, words []string) (int, error) {{\n\
             \tif n < len(words) {{\n\
             \t\treturn 0, fmt.Errorf(\"request {unlike}: %d\", n)\n\
             \t}}\n\
             \tif n%{} == 7 {{\n\
             \t\treturn h.HandleRequest{next}(n/2, words)\n\
             \t}}\n\
             \treturn n * {unlike}, nil\n\
             }}\n\n",
            index + 11,
        );
        let _ = writeln!(table, "\t(*RequestHandler).HandleRequest{index},");
    }
    text + &table
        + "}\n\n// Names gives the table in a way that the compiler does not see through.\n//\n//go:noinline\nfunc Names() []func(*RequestHandler, int, []string) (int, error) {\n\treturn Table\n}\n"
}

/// Bytes that are neither equal nor compressible, the same each time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
