//! `bench ring`: what a packet costs, natively and in one process.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use clap::Args;
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{progress, workspace::Workspace};

/// Options of `bench ring`.
#[derive(Debug, Args)]
pub struct Options {
    /// Print one JSON object per row in place of the table
    #[arg(long)]
    json: bool,
    /// Rounds of measuring, besides one that warms up
    #[arg(long, value_name = "N", default_value_t = 15)]
    rounds: u32,
    /// Count instructions per packet too, with valgrind
    #[arg(long)]
    instructions: bool,
}

/// The largest packets whose instructions are counted: the tool counts a string instruction once for each word that it moves,
/// which says nothing about longer ones.
const COUNTED_BYTES: u32 = 64;

/// Packets of the two runs whose difference is counted, so that what happens once drops out.
const COUNTED_PACKETS: [u32; 2] = [1280, 12800];

/// A row as the bench program prints it.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    row: String,
    bytes: u32,
    /// Packets that are timed together.
    batch: u32,
    /// Nanoseconds per packet: the median of all rounds, and its spread.
    ns: f64,
    ns_low: f64,
    ns_high: f64,
    gb_per_s: f64,
    signals_per_packet: f64,
    allocations: u64,
    /// Time in proportion to the memcpy of the same bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    times_memcpy: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    instructions: Option<f64>,
}

/// Runs it.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let program = build(&workspace)?;
    if options.instructions {
        Command::new("valgrind")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .context(
                "instructions are counted by valgrind, which cannot be started; \
                 install the package `valgrind` or leave out --instructions",
            )?;
    }
    let mut rows = measure(&program, options.rounds)?;
    compare(&mut rows);
    if options.instructions {
        for row in rows.iter_mut().filter(|row| row.bytes <= COUNTED_BYTES) {
            row.instructions = Some(count(&program, row)?);
        }
    }
    if options.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
    } else {
        print(&rows);
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the bench program; gives its path.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let _step = progress::step("building the bench");
    let mut child = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "bench",
            "--quiet",
            "--no-run",
            "--package=vmbus-host",
            "--bench=ring",
        ])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(workspace.root())
        .env("CARGO_TARGET_DIR", workspace.target())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut program = None;
    for message in Message::parse_stream(BufReader::new(output)) {
        if let Message::CompilerArtifact(artifact) = message?
            && artifact.target.name == "ring"
        {
            program = artifact.executable;
        }
    }
    if !child.wait()?.success() {
        bail!("the bench does not build");
    }
    Ok(program.context("cargo built no bench")?.into_std_path_buf())
}

/// Runs the program and reads its rows.
fn measure(program: &Path, rounds: u32) -> Result<Vec<Row>> {
    let step = progress::step("measuring");
    let mut child = Command::new(program)
        .arg("--rounds")
        .arg(rounds.max(1).to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the bench")?;
    let output = child.stdout.take().context("the bench has no output")?;
    let rows = BufReader::new(output)
        .lines()
        .map(|line| serde_json::from_str(&line?).context("the bench prints something else"))
        .collect();
    drop(step);
    if !child.wait()?.success() {
        bail!("the bench failed; what it printed last says why");
    }
    rows
}

/// Compares each row with the memcpy of as many bytes in the same direction.
fn compare(rows: &mut [Row]) {
    let memcpy: Vec<(String, u32, f64)> = rows
        .iter()
        .filter(|row| row.row.starts_with("memcpy"))
        .map(|row| (row.row.clone(), row.bytes, row.ns))
        .collect();
    for row in rows {
        let other = match row.row.as_str() {
            "send" => "memcpy in",
            "receive" | "dispatch" => "memcpy out",
            _ => continue,
        };
        row.times_memcpy = memcpy
            .iter()
            .find(|(name, bytes, _)| name == other && *bytes == row.bytes)
            .map(|(.., ns)| row.ns / ns);
    }
}

/// Instructions per packet of a row.
fn count(program: &Path, row: &Row) -> Result<f64> {
    let _step = progress::step(&format!("counting: {}, {} bytes", row.row, row.bytes));
    let pattern = Regex::new(r"Collected\s*:\s*(\d+)")?;
    let run = |packets: u32| -> Result<u64> {
        let output = Command::new("valgrind")
            .args([
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                // Where the bench does what the row is about.
                "--toggle-collect=ring::counted",
            ])
            .arg(program)
            .args(["--row", &row.row])
            .args(["--bytes", &row.bytes.to_string()])
            .args(["--packets", &packets.to_string()])
            .output()
            .context("cannot start valgrind")?;
        let text = String::from_utf8_lossy(&output.stderr);
        let found = pattern
            .captures(&text)
            .filter(|_| output.status.success())
            .with_context(|| format!("valgrind counted nothing:\n{text}"))?;
        Ok(found[1].parse()?)
    };
    let [few, many] = COUNTED_PACKETS;
    let more = run(many)?.saturating_sub(run(few)?);
    Ok(more as f64 / f64::from(many - few))
}

fn print(rows: &[Row]) {
    println!(
        "{:<10} {:>6} {:>5}  {:>9} {:>19}  {:>7} {:>8} {:>9} {:>6} {:>6}",
        "row",
        "bytes",
        "batch",
        "ns/packet",
        "10 to 90 %",
        "GB/s",
        "x memcpy",
        "signals",
        "allocs",
        "instr"
    );
    for row in rows {
        let spread = format!("{:.1} to {:.1}", row.ns_low, row.ns_high);
        let times = row
            .times_memcpy
            .map_or_else(String::new, |times| format!("{times:.2}"));
        let instructions = row
            .instructions
            .map_or_else(String::new, |count| format!("{count:.0}"));
        println!(
            "{:<10} {:>6} {:>5}  {:>9.1} {spread:>19}  {:>7.2} {times:>8} {:>9.4} {:>6} {instructions:>6}",
            row.row,
            row.bytes,
            row.batch,
            row.ns,
            row.gb_per_s,
            row.signals_per_packet,
            row.allocations,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, bytes: u32, ns: f64) -> Row {
        let text = format!(
            r#"{{"row":"{name}","bytes":{bytes},"batch":64,"ns":{ns},"ns_low":1,"ns_high":9,"gb_per_s":1,
                "signals_per_packet":0,"allocations":0}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn each_row_is_compared_with_the_memcpy_of_its_own_size_and_direction() {
        let mut rows = [
            row("memcpy in", 16, 2.0),
            row("memcpy out", 16, 4.0),
            row("memcpy in", 64, 5.0),
            row("send", 16, 20.0),
            row("receive", 16, 20.0),
            row("send", 64, 20.0),
            row("round trip", 64, 20.0),
        ];
        compare(&mut rows);
        let times = rows.map(|row| row.times_memcpy);
        assert_eq!(times[3..], [Some(10.0), Some(5.0), Some(4.0), None]);
        assert_eq!(times[..3], [None; 3]);
    }
}
