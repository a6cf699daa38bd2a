//! `cargo xtask`: build, image, run, test and bench.
fn main() {}
