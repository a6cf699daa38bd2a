//! What Linux's kernel has to say about its Hyper-V drivers.

use anyhow::{Result, ensure};

use super::{Session, Test};

/// After the tests of disks, before those with faults.
pub(super) const OF_DISKS: Test = Test {
    name: "referee/log/no-warnings-of-disks",
    run: |session| no_warnings(session, ALLOWED_OF_DISKS),
};

/// After the tests of everything else, before those with faults.
pub(super) const OF_EVERYTHING_ELSE: Test = Test {
    name: "referee/log/no-warnings-of-everything-else",
    run: |session| no_warnings(session, &[]),
};

/// Lines that name one of these are the drivers'.
const SUBJECTS: [&str; 14] = [
    "hv_", "hyperv", "hyper-v", "vmbus", "storvsc", "netvsc", "balloon", "scsi", " sd ", " sr ",
    "eth", "kvp", "vsock", "blk",
];

/// Whatever the subject, these are trouble.
const TROUBLE: [&str; 6] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "Call Trace",
    "blocked for more than",
    "soft lockup",
];

/// Warnings that sound disks give cause for, with the reason.
const ALLOWED_OF_DISKS: &[(&str, &str)] = &[
    // Hot added disks say so once, as every disk does.
    ("Power-on or device reset occurred", "a new disk"),
    // The tests of read-only disks write to them.
    ("critical target error", "a write to a read-only disk"),
];

fn no_warnings(session: &mut Session, allowed: &[(&str, &str)]) -> Result<String> {
    // All of it would take long over the serial port.
    let log = session.sh(&format!(
        "dmesg -r >/tmp/log; wc -l </tmp/log; grep -E '^<[0-4]>|{}' /tmp/log || true",
        TROUBLE.join("|")
    ))?;
    let (lines, log) = log.split_once('\n').unwrap_or((&log, ""));
    let found: Vec<_> = log
        .lines()
        .filter(|line| is_complaint(line))
        .filter(|line| !allowed.iter().any(|(text, _)| line.contains(text)))
        .collect();
    ensure!(
        found.is_empty(),
        "Linux's drivers complain:\n{}",
        found.join("\n")
    );
    Ok(format!(
        "{lines} lines of the kernel's log, none of them a complaint about the host"
    ))
}

/// Whatever the drivers had to complain about: nothing has hung or broken.
pub(super) fn no_trouble(session: &mut Session) -> Result<()> {
    let found = session.sh(&format!("dmesg | grep -E '{}' || true", TROUBLE.join("|")))?;
    ensure!(found.is_empty(), "Linux is in trouble:\n{found}");
    Ok(())
}

/// Whether a line `<priority>[time] text` of the kernel's is a warning or worse (priorities 4 to 0) of one of the
/// drivers, or trouble of anybody's.
fn is_complaint(line: &str) -> bool {
    let priority = line
        .strip_prefix('<')
        .and_then(|rest| rest.split_once('>'))
        .and_then(|(number, _)| number.parse::<u32>().ok())
        .map_or(7, |number| number & 7);
    let subject = || {
        let lower = line.to_lowercase();
        SUBJECTS.iter().any(|subject| lower.contains(subject))
    };
    let trouble = TROUBLE.iter().any(|word| line.contains(word));
    trouble || (priority <= 4 && subject())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_of_the_drivers_and_trouble_of_anybodys_are_complaints() {
        assert!(is_complaint(
            "<4>[    1.0] hv_netvsc 1-2 eth0: unknown rndis message"
        ));
        assert!(is_complaint("<3>[    1.0] sd 0:0:0:1: [sdb] Write error"));
        assert!(is_complaint(
            "<6>[    9.0] WARNING: CPU: 0 PID: 1 at mm/x.c"
        ));
        assert!(!is_complaint("<6>[    1.0] hv_vmbus: Vmbus version:5.3"));
        assert!(!is_complaint(
            "<4>[    1.0] mtrr: your CPUs had inconsistent settings"
        ));
    }
}
