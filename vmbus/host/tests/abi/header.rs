//! The header: up to date, taken by C and C++ compilers, and laid out in C as in Rust.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use vmbus::kmcl::abi::{self, Interface};

fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../include")
}

#[test]
fn the_header_is_what_the_declarations_make_it() {
    let kept = fs::read_to_string(include().join("vmbkmcl.h")).unwrap();
    assert!(
        kept.replace("\r\n", "\n") == abi::header(),
        "vmbus/include/vmbkmcl.h is stale: `cargo xtask header` writes it anew"
    );
}

/// Has a compiler look at the layout assertions. `false`: there is no such compiler.
fn compiles(compiler: &str, arguments: &[&str]) -> bool {
    let source = env::temp_dir().join(format!("vmbkmcl-{}-{compiler}.c", std::process::id()));
    fs::write(&source, abi::layout_assertions()).unwrap();
    let output = Command::new(compiler)
        .args(arguments)
        .args([
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-fsyntax-only",
            "-I",
        ])
        .arg(include())
        .arg(&source)
        .output();
    fs::remove_file(&source).unwrap();
    match output {
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{compiler}: {errors}");
            true
        }
        Err(_) => false,
    }
}

#[test]
fn c_lays_everything_out_as_rust_does() {
    let c = compiles("cc", &["-std=c11", "-x", "c"]) | compiles("clang", &["-std=c11", "-x", "c"]);
    assert!(
        c,
        "a C compiler is needed: the drivers in C are built with it"
    );
}

#[test]
fn cpp_lays_everything_out_as_rust_does_where_there_is_a_compiler() {
    for compiler in ["g++", "clang++"] {
        compiles(compiler, &["-std=c++17", "-x", "c++"]);
    }
}

#[test]
fn the_list_of_functions_is_that_of_the_sheet() {
    let places: Vec<(u8, u8)> = abi::FUNCTIONS
        .iter()
        .filter_map(|function| match function.interface {
            Interface::Client { version, slot } => Some((version, slot)),
            _ => None,
        })
        .collect();
    let slots: Vec<u8> = places.iter().map(|&(_, slot)| slot).collect();
    assert_eq!(slots, (1..=57).collect::<Vec<u8>>());
    for (version, count) in [(1, 41), (2, 3), (3, 2), (4, 2), (5, 9)] {
        let of_version = places.iter().filter(|(of, _)| *of == version);
        assert_eq!(of_version.count(), count, "version {version}");
    }
    let servers: Vec<u8> = abi::FUNCTIONS
        .iter()
        .filter_map(|function| match function.interface {
            Interface::Server { slot, .. } => Some(slot),
            _ => None,
        })
        .collect();
    assert_eq!(servers, (1..=15).collect::<Vec<u8>>());
    let linked: Vec<&str> = abi::FUNCTIONS
        .iter()
        .filter(|function| function.interface == Interface::Linked)
        .map(|function| function.name)
        .collect();
    assert_eq!(
        linked,
        [
            "VmbChannelCreateGpadl",
            "VmbChannelGetSystemAddressForGpadl"
        ]
    );
}

/// Places of the sheet's table, spot by spot: where a shift would show.
#[test]
fn functions_stand_where_the_sheet_has_them() {
    for (name, place) in [
        ("VmbChannelAllocate", 1),
        ("VmbChannelGetInterfaceInstance", 8),
        ("VmbChannelInitSetProcessPacketCallbacks", 16),
        ("VmbChannelPacketComplete", 18),
        ("VmbChannelPause", 22),
        ("VmbChannelStart", 29),
        ("VmbPacketAllocate", 32),
        ("VmbPacketSend", 37),
        ("VmbPacketSetPointer", 41),
        ("VmbChannelPacketGetClientContext", 42),
        ("VmbChannelInitSetBounceBufferSizes", 45),
        ("VmbChannelCreateGpadlFromPfnList", 48),
        ("VmbSizeofChannel", 53),
        ("VmbPacketSetCompletionRoutineEx", 57),
    ] {
        let function = abi::FUNCTIONS.iter().find(|it| it.name == name).unwrap();
        let Interface::Client { slot, .. } = function.interface else {
            panic!("{name} is no client function");
        };
        assert_eq!(slot, place, "{name}");
    }
}

#[test]
fn every_function_says_what_it_does() {
    for function in abi::FUNCTIONS {
        assert!(!function.doc.is_empty(), "{}", function.name);
    }
}
