//! The loader in front of real firmware: QEMU without acceleration, OVMF, and the probe kernel, which
//! checks from inside what it was handed.
//!
//! These tests want QEMU and OVMF, so they run only when asked for (`cargo test -p boot -- --ignored`).
//! `ENLIT_QEMU` and `ENLIT_OVMF` name the program and the firmware image (code and variables in
//! one file) where they are not in the places that Debian has them.

#![allow(clippy::unwrap_used)] // The helpers of a test fail by panicking, like the test.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// OVMF needs some four seconds to get to an application; a busy machine may need far more.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// The probe's verdicts, through isa-debug-exit.
const PROBE_OK: i32 = 33;

/// How a line of the loader begins when it gives up.
const FAILURE: &str = "Enlit cannot start: ";

fn cargo_build(package: &str, target: &str, kernel: Option<&Path>) -> Output {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args([
            "build",
            "--release",
            "--package",
            package,
            "--target",
            target,
        ])
        .args(["--config", "profile.release.strip='symbols'"])
        .arg("--target-dir")
        .arg(env!("CARGO_TARGET_TMPDIR"))
        .env_remove("ENLIT_KERNEL");
    if let Some(kernel) = kernel {
        cargo.env("ENLIT_KERNEL", kernel);
    }
    cargo.output().unwrap()
}

/// The EFI application with the probe inside, built once.
fn application() -> &'static Path {
    static APPLICATION: OnceLock<PathBuf> = OnceLock::new();
    APPLICATION.get_or_init(|| {
        let built = |target: &str, name: &str| {
            Path::new(env!("CARGO_TARGET_TMPDIR"))
                .join(target)
                .join("release")
                .join(name)
        };
        let probe = cargo_build("probe", "x86_64-unknown-none", None);
        assert!(probe.status.success(), "{probe:?}");
        let probe = built("x86_64-unknown-none", "probe");
        let boot = cargo_build("boot", "x86_64-unknown-uefi", Some(&probe));
        assert!(boot.status.success(), "{boot:?}");
        built("x86_64-unknown-uefi", "boot.efi")
    })
}

/// Makes the folder of a boot volume, with the application and perhaps a command line file.
fn volume(name: &str, command_line: Option<&[u8]>) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let folder = root.join("EFI/BOOT");
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&folder).unwrap();
    fs::copy(application(), folder.join("BOOTX64.EFI")).unwrap();
    if let Some(text) = command_line {
        fs::write(folder.join("CMDLINE.TXT"), text).unwrap();
    }
    root
}

fn ovmf() -> PathBuf {
    env::var_os("ENLIT_OVMF").map_or_else(|| "/usr/share/ovmf/OVMF.fd".into(), PathBuf::from)
}

/// A line of the firmware's console without the escape sequences that it puts before the first one.
fn without_escapes(line: &str) -> &str {
    match line.rsplit_once('\x1b') {
        Some((_, last)) => last
            .split_once(|char: char| char.is_ascii_alphabetic())
            .map_or("", |(_, text)| text),
        None => line,
    }
}

/// What came of a run.
struct Run {
    /// QEMU's status; none if it was ended because the loader had given up.
    status: Option<i32>,
    console: Vec<String>,
}

impl Run {
    /// Starts a machine and follows its console until it ends or the loader gives up.
    fn start(arguments: &[&str]) -> Self {
        let qemu = env::var_os("ENLIT_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        let mut machine = Command::new(qemu)
            .args([
                "-accel",
                "tcg",
                "-machine",
                "q35",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args(["-serial", "stdio", "-no-reboot"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .arg("-bios")
            .arg(ovmf())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = machine.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        let reader = thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output
                .read_until(b'\n', &mut line)
                .is_ok_and(|count| count != 0)
            {
                let text = String::from_utf8_lossy(&line);
                let _ = sender.send(without_escapes(text.trim_end()).to_owned());
                line.clear();
            }
        });
        let start = Instant::now();
        let mut run = Self {
            status: None,
            console: Vec::new(),
        };
        let gave_up = loop {
            match lines.recv_timeout(TIME_LIMIT.saturating_sub(start.elapsed())) {
                Ok(line) => {
                    let gave_up = line.starts_with(FAILURE);
                    run.console.push(line);
                    if gave_up {
                        break true;
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break false,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let _ = machine.kill();
                    panic!("no end within {TIME_LIMIT:?}: {:#?}", run.console);
                }
            }
        };
        if gave_up {
            machine.kill().unwrap();
        }
        run.status = machine.wait().unwrap().code();
        reader.join().unwrap();
        run
    }

    /// Starts a machine from a volume.
    fn start_from(volume: &Path, arguments: &[&str]) -> Self {
        let drive = format!(
            "if=virtio,readonly=on,format=raw,file=fat:{}",
            volume.display()
        );
        let mut all = vec!["-drive", drive.as_str()];
        all.extend(arguments);
        Self::start(&all)
    }

    #[track_caller]
    fn assert_handed_over(&self, expected: &[&str]) {
        assert_eq!(self.status, Some(PROBE_OK), "{:#?}", self.console);
        for line in expected.iter().chain(&["handover ok"]) {
            assert!(
                self.console.iter().any(|l| l == line),
                "{line}: {:#?}",
                self.console
            );
        }
    }

    #[track_caller]
    fn assert_refused(&self, reason: &str) {
        let expected = format!("{FAILURE}{reason}.");
        assert_eq!(self.console.last(), Some(&expected), "{:#?}", self.console);
    }
}

#[test]
#[ignore = "needs QEMU and OVMF"]
fn load_options_are_the_command_line() {
    let application = application().to_str().unwrap();
    let arguments = ["-cpu", "max", "-m", "128", "-kernel", application];
    let run = Run::start(&[&arguments[..], &["-append", "boot.efi log=debug  x"]].concat());
    run.assert_handed_over(&["command line [log=debug  x]", "no framebuffer"]);
}

#[test]
#[ignore = "needs QEMU and OVMF"]
fn a_file_is_the_command_line_where_nothing_else_is() {
    let volume = volume(
        "file",
        Some(b"\xEF\xBB\xBFlog=trace\r\nname=Gr\xC3\xBC\xC3\x9Fe\r\n"),
    );
    // A processor without 1 GiB pages, and a screen.
    let run = Run::start_from(&volume, &["-cpu", "qemu64", "-m", "256", "-device", "VGA"]);
    run.assert_handed_over(&["command line [log=trace  name=Gr\u{FC}\u{DF}e]"]);
    assert!(
        run.console
            .iter()
            .any(|line| line.starts_with("framebuffer "))
    );
}

#[test]
#[ignore = "needs QEMU and OVMF"]
fn there_need_be_no_command_line_and_memory_may_lie_above_4_gib() {
    let run = Run::start_from(
        &volume("none", None),
        &["-cpu", "max", "-m", "5G", "-smp", "2"],
    );
    run.assert_handed_over(&["command line []"]);
    let usable = run.console.iter().find_map(|line| {
        let (_, rest) = line.split_once(" regions, ")?;
        rest.split_once(" KiB usable")?.0.parse::<u64>().ok()
    });
    assert!(
        usable.is_some_and(|kib| kib > 5_000_000),
        "{:#?}",
        run.console
    );
}

#[test]
#[ignore = "needs QEMU and OVMF"]
fn a_command_line_that_is_too_long_is_refused() {
    let run = Run::start_from(&volume("long", Some(&[b'x'; 5000])), &["-m", "128"]);
    run.assert_refused(r"the command line in \EFI\BOOT\CMDLINE.TXT is longer than 4096 bytes");
}

#[test]
#[ignore = "needs QEMU and OVMF"]
fn a_command_line_that_is_not_utf_8_is_refused() {
    let run = Run::start_from(&volume("text", Some(b"caf\xE9")), &["-m", "128"]);
    run.assert_refused(r"the command line in \EFI\BOOT\CMDLINE.TXT is not text");
}

#[test]
#[ignore = "needs QEMU and OVMF"]
fn a_processor_without_nx_is_refused() {
    let run = Run::start_from(&volume("nx", None), &["-m", "128", "-cpu", "qemu64,-nx"]);
    run.assert_refused(
        "the processor cannot forbid execution (NX), which the kernel's protection needs",
    );
}

#[test]
fn the_build_says_which_kernel_it_wants() {
    let refused = |kernel: Option<&Path>, reason: &str| {
        let output = cargo_build("boot", "x86_64-unknown-uefi", kernel);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains(reason),
            "{errors}"
        );
    };
    refused(None, "ENLIT_KERNEL is not set");
    refused(Some(Path::new("no/such/file")), "cannot find no/such/file");
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    refused(Some(&manifest), "the kernel is not a sound ELF file");
    // This very program is an ELF file for the host.
    let program = env::current_exe().unwrap();
    refused(Some(&program), "the kernel wants relocation");
}
