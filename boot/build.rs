//! Finds the kernel that the EFI application carries, and refuses one that it could not start.
//!
//! `ENLIT_KERNEL` names the kernel's ELF file (stripped, to keep the application small). It is
//! needed only for the EFI target; a host build has the library and its tests, and no kernel.

use std::path::Path;
use std::{env, fs, process};

#[allow(dead_code)] // The loader uses more of it than the check here does.
#[path = "src/image.rs"]
mod image;

const KERNEL: &str = "ENLIT_KERNEL";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/image.rs");
    println!("cargo::rerun-if-env-changed={KERNEL}");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("uefi") {
        return;
    }
    // The file must depend on its sources alone: no time stamp, no path of the debug symbols.
    println!("cargo::rustc-link-arg-bins=/Brepro");
    println!("cargo::rustc-link-arg-bins=/PDBALTPATH:boot.pdb");

    match kernel() {
        Ok(path) => println!("cargo::rustc-env=ENLIT_KERNEL_FILE={path}"),
        Err(reason) => {
            println!("cargo::error={reason}");
            process::exit(1);
        }
    }
}

/// Returns the absolute path of a kernel that the loader can start.
fn kernel() -> Result<String, String> {
    let name = env::var(KERNEL).map_err(|_| {
        format!("{KERNEL} is not set: it must name the kernel's ELF file that the EFI application carries")
    })?;
    let path = fs::canonicalize(Path::new(&name))
        .map_err(|error| format!("{KERNEL}: cannot find {name}: {error}"))?;
    let path = path
        .into_os_string()
        .into_string()
        .map_err(|_| format!("{KERNEL}: the path of {name} is not UTF-8"))?;
    println!("cargo::rerun-if-changed={path}");
    let bytes =
        fs::read(&path).map_err(|error| format!("{KERNEL}: cannot read {path}: {error}"))?;
    image::Kernel::parse(&bytes).map_err(|error| format!("{KERNEL}: {path}: {error}"))?;
    Ok(path)
}
