//! Memory: page frames, the heap's growth, and pages shared with the host.

pub mod frames;
#[cfg(target_os = "none")]
pub mod heap;
#[cfg(target_os = "none")]
pub mod manager;

/// Bytes in a page frame.
pub const FRAME_SIZE: u64 = 4096;
