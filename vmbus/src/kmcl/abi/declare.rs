//! How constants, structures, callbacks and functions are declared: once, for Rust and for the header.

/// A named number.
#[derive(Clone, Copy, Debug)]
pub struct Constant {
    /// What it belongs to; only on the first of a group.
    pub group: Option<&'static str>,
    /// Its name in both languages.
    pub name: &'static str,
    /// `UINT32` or `NTSTATUS`.
    pub ty: &'static str,
    /// The bits.
    pub value: u64,
    /// What it means.
    pub doc: &'static [&'static str],
}

/// A structure of the interface.
#[derive(Clone, Copy, Debug)]
pub struct Structure {
    /// Its name in both languages.
    pub name: &'static str,
    /// Its tag in C.
    pub tag: &'static str,
    /// Bytes.
    pub size: usize,
    /// Its alignment in bytes.
    pub align: usize,
    /// What it is for.
    pub doc: &'static [&'static str],
    /// The fields in order.
    pub fields: &'static [Field],
}

/// A field of a [`Structure`].
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in both languages.
    pub name: &'static str,
    /// Its type, as Rust writes it.
    pub ty: &'static str,
    /// Bytes from the start of the structure.
    pub offset: usize,
    /// What it is for.
    pub doc: &'static [&'static str],
}

/// A function's parameters and result, as Rust writes them.
#[derive(Clone, Copy, Debug)]
pub struct Prototype {
    /// Names and types, in order.
    pub parameters: &'static [(&'static str, &'static str)],
    /// The result, if there is one.
    pub result: Option<&'static str>,
}

/// A type of function that drivers write.
#[derive(Clone, Copy, Debug)]
pub struct Callback {
    /// The name of the function type in C.
    pub name: &'static str,
    /// The name of the pointer type in both languages.
    pub pointer: &'static str,
    /// Parameters and result.
    pub prototype: Prototype,
    /// When it is called.
    pub doc: &'static [&'static str],
}

/// Where a function is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interface {
    /// In the client table, from this version on, at this place of the whole table, counted from 1.
    Client {
        /// 1 to 5.
        version: u8,
        /// 1 to 57.
        slot: u8,
    },
    /// In the block that only servers have, from this version on, at this place of the block, counted from 1.
    Server {
        /// 1 or 5.
        version: u8,
        /// 1 to 15.
        slot: u8,
    },
    /// In no table: linked by its name.
    Linked,
    /// An extension of this implementation, linked by its name.
    Extension,
}

/// A function that drivers call.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Its name in both languages.
    pub name: &'static str,
    /// Where it is found.
    pub interface: Interface,
    /// Whether it does its work in a guest; those that do not return their documented failure.
    pub applies_to_guest: bool,
    /// Parameters and result.
    pub prototype: Prototype,
    /// What it does and returns.
    pub doc: &'static [&'static str],
}

/// Declares constants and the list of them.
macro_rules! constants {
    (@of NTSTATUS $value:literal) => { NTSTATUS::from_bits($value) };
    (@of UINT32 $value:literal) => { $value };
    ($(group $group:literal; $($(#[doc = $doc:literal])+ $name:ident: $ty:ident = $value:literal;)+)+) => {
        $($($(#[doc = $doc])+ pub const $name: $ty = constants!(@of $ty $value);)+)+

        /// Every constant, in the order of the header.
        pub const CONSTANTS: &[$crate::kmcl::abi::declare::Constant] = &[$($(
            $crate::kmcl::abi::declare::Constant {
                group: Some($group),
                name: stringify!($name),
                ty: stringify!($ty),
                value: $value,
                doc: &[$($doc),+],
            },
        )+)+];
    };
}

/// Declares structures in C's layout and the list of them.
macro_rules! structures {
    ($($(#[doc = $doc:literal])+ $(#[derive($($derive:ident),+)])? struct $name:ident, $tag:ident {
        $($(#[doc = $about:literal])+ $field:ident: $ty:ty,)+
    })+) => {
        $(
            $(#[doc = $doc])+
            #[repr(C)]
            #[derive(Clone, Copy, Debug $($(, $derive)+)?)]
            pub struct $name {
                $($(#[doc = $about])+ pub $field: $ty,)+
            }
        )+

        /// Every structure but the function tables, in the order of the header.
        pub const STRUCTURES: &[$crate::kmcl::abi::declare::Structure] = &[$(
            $crate::kmcl::abi::declare::Structure {
                name: stringify!($name),
                tag: stringify!($tag),
                size: size_of::<$name>(),
                align: align_of::<$name>(),
                doc: &[$($doc),+],
                fields: &[$(
                    $crate::kmcl::abi::declare::Field {
                        name: stringify!($field),
                        ty: stringify!($ty),
                        offset: offset_of!($name, $field),
                        doc: &[$($about),+],
                    },
                )+],
            },
        )+];
    };
}

/// Declares types of callbacks, which may be null, and the list of them.
macro_rules! callbacks {
    ($($(#[doc = $doc:literal])+ fn $name:ident $pointer:ident($($parameter:ident: $ty:ty),+) $(-> $result:ident)?;)+) => {
        $(
            $(#[doc = $doc])+
            pub type $pointer = Option<unsafe extern "win64" fn($($parameter: $ty),+) $(-> $result)?>;
        )+

        /// Every type of callback, in the order of the header.
        pub const CALLBACKS: &[$crate::kmcl::abi::declare::Callback] = &[$(
            $crate::kmcl::abi::declare::Callback {
                name: stringify!($name),
                pointer: stringify!($pointer),
                prototype: $crate::kmcl::abi::declare::prototype!(($($parameter: $ty),+) $(-> $result)?),
                doc: &[$($doc),+],
            },
        )+];
    };
}

/// What a list says of parameters and result.
macro_rules! prototype {
    (($($parameter:ident: $ty:ty),*) $(-> $result:ident)?) => {
        $crate::kmcl::abi::declare::Prototype {
            parameters: &[$((stringify!($parameter), stringify!($ty))),*],
            result: [$(Some(stringify!($result)),)? None][0],
        }
    };
}

pub(super) use {callbacks, constants, prototype, structures};
