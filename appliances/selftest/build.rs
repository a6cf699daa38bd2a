//! Links the appliance as a kernel image.

fn main() {
    let script =
        std::env::var("DEP_ENLIT_LINKER_SCRIPT").expect("the kernel's build script sets it");
    println!("cargo::rustc-link-arg-bins=-T{script}");
    println!("cargo::rustc-link-arg-bins=--no-pie");
    println!("cargo::rerun-if-changed={script}");
}
