//! A kernel that does nothing but check what it was handed, line by line of the `handover` contract.
//!
//! It looks at the processor and at the page tables that are really in force, prints what is wrong
//! on COM1 (or `handover ok`), and ends QEMU through its isa-debug-exit device at port 0xF4: with
//! status 33 if all is well, 35 if not. As test code on bare metal it is `unsafe` throughout.

#![cfg_attr(target_os = "none", no_main, no_std)]

#[cfg(target_os = "none")]
mod checks;
#[cfg(target_os = "none")]
mod machine;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("This is a kernel: build it for the target x86_64-unknown-none.");
    std::process::exit(1);
}
