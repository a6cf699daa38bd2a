//! VHDX files go between this project and QEMU, which reads and writes them with code of its own.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, LazyLock},
};

use tempfile::TempDir;
use vhdx::{Settings, Vhdx};
use vmbus_host::disk::{self, Disk, Format};

use crate::{
    packages::{DiskTools, Packages},
    workspace::Workspace,
};

static TOOLS: LazyLock<DiskTools> = LazyLock::new(|| {
    let workspace = Workspace::find().unwrap();
    let mut packages = Packages::new(&workspace.store()).unwrap();
    packages.disk_tools().unwrap()
});

/// Starts a tool; what it prints, or what it says when it fails.
fn tool(command: &[String], arguments: &[&str]) -> Result<String, String> {
    let (program, before) = command.split_first().unwrap();
    let output = Command::new(program).args(before).args(arguments).output();
    let output = output.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stdout) + &text(&output.stderr))
    }
}

fn qemu_img(arguments: &[&str]) -> String {
    tool(&TOOLS.img, arguments).unwrap_or_else(|error| panic!("qemu-img {arguments:?}: {error}"))
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// QEMU finds nothing wrong.
fn is_sound(path: &Path) {
    let said = qemu_img(&["check", "-f", "vhdx", name(path)]);
    assert!(said.contains("No errors were found"), "{said}");
}

/// The disk's bytes, as QEMU reads them.
fn read_by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("read");
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", name(path), name(&raw)]);
    fs::read(raw).unwrap()
}

/// The disk's bytes, as they are read here.
fn read_here(path: &Path) -> Vec<u8> {
    let options = disk::Options {
        read_only: true,
        ..disk::Options::default()
    };
    let disk = disk::open(path, options).unwrap();
    let mut bytes = vec![0; disk.geometry().bytes() as usize];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

/// Bytes that say where they are, with runs of zeros between them.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (number, sector) in (seed..).zip(bytes.chunks_mut(512)) {
        if number * 7 % 5 < 2 && number / 3000 % 3 != 1 {
            for (at, byte) in (number..).zip(sector) {
                *byte = (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8;
            }
        }
    }
    bytes
}

fn assert_same(left: &[u8], right: &[u8], what: &str) {
    assert_eq!(left.len(), right.len(), "{what}");
    let differs = left
        .iter()
        .zip(right)
        .position(|(left, right)| left != right);
    assert_eq!(differs, None, "{what}: the first byte that differs");
}

fn made(directory: &TempDir, settings: &Settings) -> PathBuf {
    let path = directory.path().join("ours.vhdx");
    let _ = fs::remove_file(&path);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    vhdx::create(&(Arc::new(file.unwrap()) as _), settings).unwrap();
    path
}

fn open(path: &Path) -> Arc<dyn Disk> {
    let options = disk::Options {
        format: Some(Format::Vhdx),
        ..disk::Options::default()
    };
    disk::open(path, options).unwrap()
}

#[test]
fn qemu_reads_what_is_written_here() {
    let directory = tempfile::tempdir().unwrap();
    // QEMU knows logical sectors of 512 bytes only.
    for (fixed, block_size) in [(false, 1 << 20), (false, 8 << 20), (true, 2 << 20)] {
        let settings = Settings {
            fixed,
            block_size,
            ..Settings::new((21 << 20) + 4096)
        };
        let what = format!("{settings:?}");
        let path = made(&directory, &settings);
        is_sound(&path);
        assert_same(
            &read_by_qemu(&path),
            &vec![0; settings.size as usize],
            &what,
        );
        let bytes = pattern(settings.size as usize, 1);
        let disk = open(&path);
        for (at, run) in (0..).step_by(300 << 10).zip(bytes.chunks(300 << 10)) {
            if run.iter().any(|byte| *byte != 0) {
                disk.write(at, run).unwrap();
            }
        }
        drop(disk);
        is_sound(&path);
        assert_same(&read_by_qemu(&path), &bytes, &what);
        let said = qemu_img(&["info", "-f", "vhdx", name(&path)]);
        assert!(
            said.contains(&format!("({} bytes)", settings.size)),
            "{said}"
        );
        // Given back, and written anew elsewhere.
        let disk = open(&path);
        disk.unmap(0, 17 << 20).unwrap();
        disk.flush().unwrap();
        disk.write(18 << 20, &vec![0xA5; 2 << 20]).unwrap();
        disk.write(4 << 20, &[0x5A; 4096]).unwrap();
        drop(disk);
        is_sound(&path);
        assert_same(&read_by_qemu(&path), &read_here(&path), &what);
    }
}

#[test]
fn what_qemu_makes_is_read_and_written_here() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("data.raw");
    for (subformat, block_size) in [
        ("dynamic", "1M"),
        ("dynamic", "8M"),
        ("fixed", "1M"),
        ("fixed", "8M"),
    ] {
        // Not a whole number of blocks: QEMU ends a fixed file within the last one.
        let mut bytes = pattern((19 << 20) + 5 * 512, 2);
        fs::write(&raw, &bytes).unwrap();
        let path = directory.path().join("theirs.vhdx");
        let options = format!("subformat={subformat},block_size={block_size}");
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "vhdx",
            "-o",
            &options,
            name(&raw),
            name(&path),
        ]);
        assert_same(&read_here(&path), &bytes, &options);
        let disk = open(&path);
        for (at, length) in [(512, 1024), (5 << 20, 3 << 20), (bytes.len() - 512, 512)] {
            let run = pattern(length, 77).into_iter().map(|byte| byte | 1);
            let run: Vec<_> = run.collect();
            disk.write(at as u64, &run).unwrap();
            bytes[at..at + length].copy_from_slice(&run);
        }
        disk.flush().unwrap();
        drop(disk);
        is_sound(&path);
        assert_same(&read_by_qemu(&path), &bytes, &options);
        assert_same(&read_here(&path), &bytes, &options);
    }
}

#[test]
fn an_empty_disk_of_qemus_is_filled_here() {
    let directory = tempfile::tempdir().unwrap();
    for subformat in ["dynamic", "fixed"] {
        let path = directory.path().join("empty.vhdx");
        let options = format!("subformat={subformat}");
        qemu_img(&["create", "-f", "vhdx", "-o", &options, name(&path), "20M"]);
        assert_same(&read_here(&path), &vec![0; 20 << 20], &options);
        let bytes = pattern(20 << 20, 3);
        let disk = open(&path);
        disk.write(0, &bytes).unwrap();
        drop(disk);
        is_sound(&path);
        assert_same(&read_by_qemu(&path), &bytes, &options);
    }
}

#[test]
fn a_log_entry_of_qemus_is_replayed_here() {
    // Where QEMU puts it.
    const BAT: u64 = 2 << 20;
    const LOG: u64 = 1 << 20;
    const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("crashed.vhdx");
    qemu_img(&["create", "-f", "vhdx", name(&path), "64M"]);
    let write = ["-f", "vhdx", "-c", "write -P 0x11 33M 64k", "-c", "abort"];
    let killed = tool(&TOOLS.io, &[&write[..], &[name(&path)]].concat());
    killed.expect_err("it ends without closing the disk");
    // QEMU ends its log with each entry. As a moment before: the headers name the log, and the BAT has not been written.
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut entry = [0; 48];
    file.read_exact_at(&mut entry, LOG).unwrap();
    assert_eq!(&entry[..4], b"loge");
    for at in HEADERS {
        let mut header = [0; 4096];
        file.read_exact_at(&mut header, at).unwrap();
        header[48..64].copy_from_slice(&entry[32..]);
        header[4..8].fill(0);
        let sum = crc32c::crc32c(&header);
        header[4..8].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&header, at).unwrap();
    }
    file.write_all_at(&[0; 4096], BAT).unwrap();
    let storage: Arc<dyn vhdx::Storage> = Arc::new(file);
    let report = vhdx::check(&storage).unwrap();
    assert!(report.findings.contains(&vhdx::Finding::LogInUse));
    let mut bytes = vec![0; 64 << 20];
    bytes[33 << 20..][..64 << 10].fill(0x11);
    assert_same(&read_here(&path), &bytes, "over the file");
    drop(open(&path));
    let report = vhdx::check(&storage).unwrap();
    assert!(!report.findings.contains(&vhdx::Finding::LogInUse));
    assert_same(&read_here(&path), &bytes, "in the file");
    is_sound(&path);
    assert_same(&read_by_qemu(&path), &bytes, "by QEMU");
}

#[test]
fn a_log_that_is_left_here_is_replayed_by_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings::new(64 << 20);
    let path = made(&directory, &settings);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let disk = Vhdx::open(Arc::new(file), false).unwrap();
    disk.write(0, &[0x33; 4096]).unwrap();
    disk.flush().unwrap();
    disk.write(40 << 20, &vec![0x44; 3 << 20]).unwrap();
    disk.flush().unwrap();
    // As after a power failure: the log is in use, and the BAT in its place has not been written.
    let crashed = directory.path().join("crashed.vhdx");
    fs::copy(&path, &crashed).unwrap();
    drop(disk);
    const BAT: u64 = 3 << 20;
    let file = File::options().write(true).open(&crashed).unwrap();
    file.write_all_at(&[0; 4096], BAT).unwrap();
    drop(file);
    let mut bytes = vec![0; 64 << 20];
    bytes[..4096].fill(0x33);
    bytes[40 << 20..43 << 20].fill(0x44);
    let said = qemu_img(&["check", "-f", "vhdx", "-r", "all", name(&crashed)]);
    assert!(said.contains("No errors were found"), "{said}");
    assert_same(&read_by_qemu(&crashed), &bytes, "by QEMU");
    assert_same(&read_here(&crashed), &bytes, "here, after QEMU");
}
