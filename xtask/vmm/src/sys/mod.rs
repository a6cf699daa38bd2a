//! All that is `unsafe` in the VMM: guest memory's mapping, and the KVM calls that kvm-ioctls does not have.

#![allow(unsafe_code)]

pub mod kvm;
pub mod mapping;
