//! leakmon's kernel side: programs for uprobes that count in maps.
//!
//! They read the target's memory and write maps; nothing is sent to user space
//! for a hit.
#![no_std]
#![no_main]
// One atomic instruction; the BPF target has no stable inline assembly.
#![feature(asm_experimental_arch)]

mod go;
mod hit;
mod maps;
mod registers;
mod threads;
mod tokio;

use aya_ebpf::{macros::uprobe, programs::ProbeContext};

/// Does nothing: what an empty probe costs, for benchmarks.
#[uprobe]
pub fn empty(_ctx: ProbeContext) -> u32 {
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing here panics; the verifier refuses a program that could get stuck.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
