//! The C header, made of the declarations in this module: `cargo xtask header` writes it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::callbacks::CALLBACKS;
use super::declare::{Function, Interface, Prototype, Structure};
use super::table::{self, FUNCTIONS};
use super::types::{CONSTANTS, GUIDS, STRUCTURES};

/// What does not come of a declaration: the base types, and what is written in C alone.
const BASE: &str = include_str!("base.h");
const INLINE: &str = include_str!("inline.h");

/// A function table as C sees it: name, size, and its members' names and offsets.
pub type TableLayout = (&'static str, usize, &'static [(&'static str, usize)]);

/// Every function table.
pub const TABLES: &[TableLayout] = {
    macro_rules! layout {
        ($name:literal, $of:ident) => {{
            let (size, members) = table::$of();
            ($name, size, members)
        }};
    }
    &[
        layout!("KMCL_CLIENT_INTERFACE_V1", client_v1),
        layout!("KMCL_CLIENT_INTERFACE_V2", client_v2),
        layout!("KMCL_CLIENT_INTERFACE_V3", client_v3),
        layout!("KMCL_CLIENT_INTERFACE_V4", client_v4),
        layout!("KMCL_CLIENT_INTERFACE_V5", client_v5),
        layout!("KMCL_SERVER_ONLY_METHODS", server_only_v1),
        layout!("KMCL_SERVER_ONLY_METHODS_V5", server_only_v5),
        layout!("KMCL_SERVER_INTERFACE_V1", server_v1),
        layout!("KMCL_SERVER_INTERFACE_V5", server_v5),
    ]
};

/// The whole header.
pub fn header() -> String {
    let mut text = String::new();
    let mut add = |part: &str| text.push_str(part);
    add(BASE);
    for (name, guid) in GUIDS {
        let tail: Vec<String> = guid
            .Data4
            .iter()
            .map(|byte| format!("{byte:#04x}"))
            .collect();
        add(&format!(
            "#define {name}_INIT {{ {:#010x}, {:#06x}, {:#06x}, {{ {} }} }}\n",
            guid.Data1,
            guid.Data2,
            guid.Data3,
            tail.join(", ")
        ));
        add(&format!(
            "static const GUID {name} VMBKMCL_UNUSED = {name}_INIT;\n"
        ));
    }
    let mut group = None;
    for constant in CONSTANTS {
        if constant.group != group {
            group = constant.group;
            add(&format!("\n/* {} */\n", group.unwrap_or_default()));
        }
        let value = match constant.ty {
            "NTSTATUS" => format!("((NTSTATUS)0x{:08X})", constant.value),
            _ => format!("{:#x}u", constant.value),
        };
        let doc = one_line(constant.doc);
        add(&format!("#define {} {value} /* {doc} */\n", constant.name));
    }

    add("\n/* Functions that drivers write. */\n");
    for callback in CALLBACKS {
        add(&comment(callback.doc));
        add(&function_type(callback.name, &callback.prototype));
        add(&format!(
            "typedef {} *{};\n",
            callback.name, callback.pointer
        ));
    }

    add("\n/* Structures. */\n");
    for structure in STRUCTURES.iter().filter(|it| it.name != "GUID") {
        add(&structure_of(structure));
    }

    add(
        "\n/* Functions that drivers call: their types, and their names for linking without a table. */\n",
    );
    for function in FUNCTIONS {
        let name = screaming(function.name);
        add(&format!("\n/* {} */\n", place(function)));
        add(&comment(function.doc));
        add(&function_type(&format!("FN_{name}"), &function.prototype));
        add(&format!("typedef FN_{name} *PFN_{name};\n"));
        add(&format!("extern FN_{name} {};\n", function.name));
    }

    add("\n/* The function tables. */\n");
    for (name, _, members) in TABLES {
        add(&format!("typedef struct _{name} {{\n"));
        if !name.starts_with("KMCL_SERVER_ONLY") {
            add("    INTERFACE Interface;\n");
        }
        for (member, _) in *members {
            add(&format!("    PFN_{} {member};\n", screaming(member)));
        }
        add(&format!("}} {name}, *P{name};\n\n"));
    }
    add(INLINE);
    text
}

/// A C program of nothing but assertions: that C lays everything out as Rust does.
pub fn layout_assertions() -> String {
    let mut text = String::from("#include <stddef.h>\n#include \"vmbkmcl.h\"\n\n");
    text.push_str(
        "#ifdef __cplusplus\n#define CHECK(e) static_assert(e, #e)\n#else\n#define CHECK(e) _Static_assert(e, #e)\n#endif\n",
    );
    let mut check = |what: String| {
        text.push_str(&format!("CHECK({what});\n"));
    };
    for structure in STRUCTURES {
        let name = structure.name;
        check(format!("sizeof({name}) == {}", structure.size));
        for field in structure.fields {
            check(format!(
                "offsetof({name}, {}) == {}",
                field.name, field.offset
            ));
        }
    }
    check(format!(
        "sizeof(LARGE_INTEGER) == {}",
        size_of::<super::types::LARGE_INTEGER>()
    ));
    for (name, size, members) in TABLES {
        check(format!("sizeof({name}) == {size}"));
        for (member, offset) in *members {
            check(format!("offsetof({name}, {member}) == {offset}"));
        }
    }
    for constant in CONSTANTS {
        let ty = constant.ty;
        check(format!(
            "(UINT32){} == {:#x}u && sizeof(({ty}){}) == 4",
            constant.name, constant.value, constant.name
        ));
    }
    text
}

/// Where a function is found, in words.
fn place(function: &Function) -> String {
    match function.interface {
        Interface::Client { version, slot } => format!("Client version {version}, place {slot}"),
        Interface::Server { version, slot } => {
            format!("Servers only, version {version}, place {slot}: refuses in a guest")
        }
        Interface::Linked => "In no table".into(),
        Interface::Extension => "In no table: an extension of this implementation".into(),
    }
}

fn function_type(name: &str, prototype: &Prototype) -> String {
    let parameters: Vec<String> = prototype
        .parameters
        .iter()
        .map(|(name, ty)| declarator(ty, name))
        .collect();
    let parameters = match parameters.is_empty() {
        true => "void".to_string(),
        false => parameters.join(", "),
    };
    let result = prototype.result.unwrap_or("VOID");
    format!("typedef {result} VMBKMCL_CALL {name}({parameters});\n")
}

fn structure_of(structure: &Structure) -> String {
    let Structure { name, tag, .. } = structure;
    let mut text = comment(structure.doc);
    text.push_str(&format!("typedef struct {tag} {{\n"));
    for field in structure.fields {
        let ty = if field.ty == format!("*mut {name}") {
            format!("*mut struct {tag}")
        } else {
            field.ty.to_string()
        };
        text.push_str(&format!(
            "    {}; /* {} */\n",
            declarator(&ty, field.name),
            one_line(field.doc)
        ));
    }
    text.push_str(&format!("}} {name}, *P{name};\n\n"));
    text
}

/// `name` declared with a type that Rust writes so.
fn declarator(ty: &str, name: &str) -> String {
    if let Some(target) = ty.strip_prefix("*mut ") {
        format!("{target} *{name}")
    } else if let Some(target) = ty.strip_prefix("*const ") {
        format!("const {target} *{name}")
    } else if let Some((element, count)) = ty
        .strip_prefix('[')
        .and_then(|array| array.strip_suffix(']'))
        .and_then(|array| array.split_once("; "))
    {
        format!("{element} {name}[{count}]")
    } else {
        format!("{ty} {name}")
    }
}

/// `VmbPacketSend` as `VMB_PACKET_SEND`.
fn screaming(name: &str) -> String {
    let mut text = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.extend(letter.to_uppercase());
    }
    text
}

fn one_line(doc: &[&str]) -> String {
    let lines: Vec<&str> = doc.iter().map(|line| line.trim()).collect();
    lines.join(" ")
}

fn comment(doc: &[&str]) -> String {
    let lines: Vec<&str> = doc.iter().map(|line| line.trim()).collect();
    format!("/* {} */\n", lines.join("\n * "))
}
