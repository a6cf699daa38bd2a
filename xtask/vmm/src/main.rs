//! The test machine: `enlit-vmm CONFIG.json [--control-fd N] [--control PATH]`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    vmm::program::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("enlit-vmm needs Linux and its KVM");
    ExitCode::FAILURE
}
