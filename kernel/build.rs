//! Tells appliances where the kernel's linker script is: their build scripts read
//! `DEP_ENLIT_LINKER_SCRIPT`.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    println!("cargo::metadata=LINKER_SCRIPT={directory}/enlit.ld");
    println!("cargo::rerun-if-changed=build.rs");
}
