//! Compiles the drivers with the computer's C compiler: for a kernel, wherever they are linked.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=heartbeat.c");
    println!("cargo::rerun-if-changed=../include/vmbkmcl.h");
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return;
    }
    let mut build = cc::Build::new();
    build
        .file("heartbeat.c")
        .include("../include")
        .debug(false)
        .warnings(true)
        .extra_warnings(true);
    if build.get_compiler().is_like_msvc() {
        build.flag("/std:c11");
    } else {
        // No C library, no floating point registers, no bytes below the stack pointer (an interrupt may overwrite them), and
        // code that runs at any address.
        build
            .std("c11")
            .pic(true)
            .flag("-ffreestanding")
            .flag("-mno-red-zone")
            .flag("-mgeneral-regs-only")
            .flag("-fno-stack-protector")
            .flag("-fno-asynchronous-unwind-tables")
            .flag("-fno-omit-frame-pointer")
            .flag("-fcf-protection=none")
            .flag("-Wpedantic")
            .flag("-Werror");
    }
    build.compile("vmbus_c_drivers");
}
