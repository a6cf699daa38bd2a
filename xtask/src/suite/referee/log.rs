//! What Linux's kernel has to say about its Hyper-V drivers.

use anyhow::{Result, ensure};

use super::{Session, Test};

/// After everything else of a group without faults.
pub(super) const TEST: Test = Test {
    name: "referee/log/no-warnings",
    run: no_warnings,
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

/// Warnings that a sound host gives cause for, with the reason.
const ALLOWED: &[(&str, &str)] = &[
    // Hot added disks say so once, as every disk does.
    ("Power-on or device reset occurred", "a new disk"),
    // The tests of read-only disks write to them.
    ("critical target error", "a write to a read-only disk"),
];

fn no_warnings(session: &mut Session) -> Result<String> {
    let log = session.sh("dmesg -r")?;
    let lines = log.lines().count();
    let found: Vec<_> = log.lines().filter(|line| is_complaint(line)).collect();
    ensure!(
        found.is_empty(),
        "Linux's drivers complain:\n{}",
        found.join("\n")
    );
    Ok(format!(
        "{lines} lines of the kernel's log, none of them a complaint about the host"
    ))
}

/// Whether a line `<priority>[time] text` is a warning or worse (priorities 4 to 0) of one of the
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
    let allowed = ALLOWED.iter().any(|(text, _)| line.contains(text));
    !allowed && (trouble || (priority <= 4 && subject()))
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
