//! What an appliance calls: thin adapters over the drivers.

#[cfg(target_os = "none")]
pub mod clock;
mod hook;
#[cfg(target_os = "none")]
pub mod shutdown;
mod utc;

pub use hook::Decision;
#[cfg(target_os = "none")]
pub(crate) use hook::Hook;
pub use utc::Utc;
