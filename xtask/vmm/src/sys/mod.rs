//! All that is `unsafe` in the VMM: guest memory's mapping, the KVM calls that kvm-ioctls does not have, and inherited
//! descriptors.

#![allow(unsafe_code)]

pub mod descriptor;
pub mod kvm;
pub mod mapping;
