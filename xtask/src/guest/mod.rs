//! Guests: built by cargo, stripped for booting, unstripped for symbolising.

mod build;
mod strip;
mod symbolise;

pub use self::{
    build::{Guest, Profile, build, build_agent, build_efi, build_vmm},
    strip::strip,
    symbolise::Symboliser,
};
