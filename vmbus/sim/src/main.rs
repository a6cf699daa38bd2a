//! The command behind `cargo xtask sim`.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

/// Simulate VMBus: guest and host in one process, every step decided by a seed
#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim", max_term_width = 100)]
struct Options {
    /// What decides everything; without it a fresh one
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many decisions to take
    #[arg(long, value_name = "M", default_value_t = 1_000_000)]
    steps: u64,
    /// Print every action
    #[arg(long)]
    trace: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let seed = options.seed.unwrap_or_else(vmbus_sim::fresh_seed);
    let begin = Instant::now();
    let outcome = vmbus_sim::run(seed, options.steps, options.trace);
    println!("{outcome}, {:.1} s", begin.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
