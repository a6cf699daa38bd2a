//! First process of a Linux VM: the test machine's agent, or the init of the
//! Linux guest that stands beside ours in the benchmarks.
//!
//! The kernel passes the role after ` -- ` on its command line: `agent` or
//! `referee`. `init=`-style fallbacks do not exist: with a wrong word, or on a
//! failure, the reason is printed and the VM powers off.

#![forbid(unsafe_code)]

#[cfg(target_os = "linux")]
mod init;
#[cfg(target_os = "linux")]
mod referee;

#[cfg(target_os = "linux")]
fn main() {
    init::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("error: the agent is the first process of a Linux VM and runs nowhere else");
    std::process::exit(1);
}
