//! First process of a Linux VM: the test machine's agent, the init of the
//! Linux guest that stands beside ours in the benchmarks, or the shell of the
//! one that judges our host.
//!
//! The kernel passes the role after ` -- ` on its command line: `agent`,
//! `referee` or `shell`. `init=`-style fallbacks do not exist: with a wrong word, or on a
//! failure, the reason is printed and the VM powers off.

#![forbid(unsafe_code)]

#[cfg(target_os = "linux")]
mod fetch;
#[cfg(target_os = "linux")]
mod init;
#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
mod referee;
#[cfg(target_os = "linux")]
mod shell;

#[cfg(target_os = "linux")]
fn main() {
    init::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("error: the agent is the first process of a Linux VM and runs nowhere else");
    std::process::exit(1);
}
