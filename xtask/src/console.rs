//! What our guests print: the patterns that tests and benchmarks wait for.

/// The table is complete and the device is served.
pub const READY: &str = "^[a-z]+: ready$";
