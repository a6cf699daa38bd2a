//! `cargo xtask`: builds, images, runs, tests and measures guests.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, unused_imports, reason = "VMs are run on Linux only")
)]

mod bench;
mod cli;
mod console;
mod ctl;
mod disk;
mod floor;
mod fuzz;
mod guest;
mod header;
mod image;
mod keep;
mod linux_boot;
mod machine;
mod miri;
mod nightly;
mod packages;
mod progress;
mod pvh;
mod referee;
mod run;
mod sim;
mod suite;
mod workspace;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
