//! This partition: what the hypervisor offers a guest, and the ways to ask it for something.
//!
//! One module for each subject of the Hypervisor Top Level Functional Specification (TLFS):
//!
//! | module | subject |
//! |---|---|
//! | [`features`] | what this hypervisor offers, by CPUID |
//! | [`msr`] | synthetic MSRs by name, with typed values |
//! | [`overlay`] | pages that guest and hypervisor share |
//! | [`hypercall`] | guest OS id, hypercall page, posting messages, signalling events |
//! | [`message`] | a message slot and how to empty it without losing the next message |
//! | [`event`] | event flags and how to scan them |
//! | [`synic`] | the synthetic interrupt controller of one VP |
//! | [`clock`] | partition reference time |
//! | [`stimer`] | synthetic timer 0 of one VP |
//! | [`vp`] | one virtual processor: its index and all of the above that belongs to it |
//! | [`crash`] | crash reports by MSR |
//! | [`reset`] | reset by MSR |
//!
//! `unsafe` lives in `instructions` (the instructions themselves), [`overlay`] (the memory) and
//! [`hypercall`] (the calls); the other modules forbid it and work on typed registers and pages.

pub mod clock;
pub mod crash;
pub mod event;
pub mod features;
pub mod hypercall;
mod instructions;
pub mod message;
pub mod msr;
pub mod overlay;
pub mod reset;
pub mod stimer;
pub mod synic;
pub mod vp;

pub use features::Features;
pub use overlay::{CodePage, Page};
pub use vp::VirtualProcessor;
