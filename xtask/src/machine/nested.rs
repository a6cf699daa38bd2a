//! The nested machine: QEMU's emulator runs a small Linux, whose KVM has the
//! Hyper-V enlightenments that this computer lacks. The agent is that Linux's
//! first process and runs the guests.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use command_fds::{CommandFdExt, FdMapping};

use super::{Clock, cpio::Archive, link::Link, linux::Linux, process};
use crate::{
    keep::{kept, stamp},
    packages::Qemu,
    progress,
};

/// Longest boot of the small Linux; usually some ten seconds.
const BOOT: Duration = Duration::from_secs(180);

/// The same with counted instructions, which runs on one thread.
const BOOT_COUNTED: Duration = Duration::from_secs(600);

/// File descriptor on which the outer QEMU finds the agent's stream.
const AGENT_FD: i32 = 3;

/// Firmware that QEMU needs for a guest started by PVH.
const FIRMWARE: [&str; 4] = [
    "bios-256k.bin",
    "pvh.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
];

/// What the small Linux needs to run guests, and for networks between it and them.
const MODULES: [&str; 2] = ["kvm_amd", "tun"];

/// The small Linux's command line. What it says at boot costs time (each byte is
/// emulated), and so does what it does for a computer's safety: this one lives
/// for a test.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off audit=0 lsm= \
     random.trust_cpu=on tsc=reliable no_timer_check cryptomgr.notests -- agent";

/// Control of the small Linux's scheduler.
///
/// QEMU's hv-balloon sends a request from its timer or monitor, then looks at
/// once whether the guest has answered; an answer found there, and not announced
/// by the guest's signal, ends QEMU (vmbus.c: `assert(iter->active)` in
/// gpadl_iter_seek; 10.0.2). With one processor that happens when the guest,
/// woken by the request, is let run in between. So a thread that wakes up waits
/// for its turn here.
const SCHEDULER: &str = "/sys/kernel/debug/sched/features";

/// How to start QEMU inside the small Linux.
const INNER_QEMU: [&str; 6] = [
    "/lib/loader",
    "--library-path",
    "/lib",
    "/bin/qemu-system-x86_64",
    "-L",
    "/firmware",
];

/// How many have been booted.
static BOOTS: AtomicU32 = AtomicU32::new(0);

/// The running outer QEMU. Dropping it ends it.
pub struct Outer {
    child: Child,
}

impl Drop for Outer {
    fn drop(&mut self) {
        // It may have ended already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Kernel and initial RAM file system of the small Linux, kept below `store`.
#[derive(Debug)]
pub struct Image {
    kernel: PathBuf,
    initrd: PathBuf,
    directory: PathBuf,
}

impl Image {
    /// Builds the files unless they are there for exactly this agent, inner QEMU (if
    /// there is to be one) and kernel.
    pub fn prepare(store: &Path, qemu: Option<&Qemu>, linux: &Path, agent: &Path) -> Result<Self> {
        let directory = store.join("nested");
        let agent = fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
        let package = stamp(linux)?;
        let linux = Linux::of_tree(linux)?;
        let kernel = kept(&directory, "vmlinux", &[&package], || {
            let _step = progress::step("unpacking the test machine's kernel");
            linux.elf()
        })?;
        let (kind, program) = match qemu {
            Some(qemu) => ("initrd", stamp(qemu.program())?),
            None => ("small-initrd", Vec::new()),
        };
        let modules = MODULES.join(" ");
        let parts = [&agent[..], &program, &package, modules.as_bytes()];
        let initrd = kept(&directory, kind, &parts, || {
            let _step = progress::step("packing the test machine");
            pack(qemu, &linux, &agent)
        })?;
        Ok(Self {
            kernel,
            initrd,
            directory,
        })
    }

    /// Boots it and connects to its agent.
    pub fn boot(&self, qemu: &Qemu, clock: Clock) -> Result<(Outer, Link)> {
        let _step = progress::step("booting the test machine");
        let (near, far) = UnixStream::pair()?;
        // Several may run at a time.
        let number = BOOTS.fetch_add(1, Ordering::Relaxed);
        let log = self.directory.join(format!("console-{number}.log"));
        let console =
            fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let accelerator = match clock {
            Clock::Wall => "-accel tcg,thread=multi",
            Clock::Instructions => "-accel tcg,thread=single -icount shift=0,sleep=off",
        };
        let options = format!(
            "{accelerator} -machine q35 -cpu max -smp 1 -m 3072 -nodefaults -no-user-config \
             -display none -vga none -no-reboot -chardev stdio,id=console,signal=off \
             -serial chardev:console -device virtio-serial-pci \
             -chardev socket,id=agent,fd={AGENT_FD} -device virtserialport,chardev=agent,name=enlit"
        );
        let mut words = process::tied_to_us(qemu.command()).into_iter();
        let mut command = Command::new(words.next().context("QEMU has no name")?);
        command
            .args(words)
            .args(options.split_whitespace())
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", CMDLINE])
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console)
            .fd_mappings(vec![FdMapping {
                parent_fd: OwnedFd::from(far),
                child_fd: AGENT_FD,
            }])?;
        let child = command.spawn().context("cannot start QEMU")?;
        // Our copy of the far end must go for its closing to be seen here.
        drop(command);
        let outer = Outer { child };
        process::close_on_interrupt(near.try_clone()?);
        let limit = match clock {
            Clock::Wall => BOOT,
            Clock::Instructions => BOOT_COUNTED,
        };
        let link = Link::new(near.try_clone()?, near, limit).map_err(|error| {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let last: Vec<_> = said.lines().rev().take(5).collect();
            let last: Vec<_> = last.into_iter().rev().collect();
            anyhow!(
                "the test machine does not boot ({error}); it said last:\n{}",
                last.join("\n")
            )
        })?;
        link.write(SCHEDULER, b"NO_WAKEUP_PREEMPTION")?;
        Ok((outer, link))
    }

    /// How to start QEMU inside.
    pub fn inner_qemu() -> Vec<String> {
        INNER_QEMU.iter().map(|&word| word.to_owned()).collect()
    }
}

fn pack(qemu: Option<&Qemu>, linux: &Linux, agent: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in [
        "bin", "dev", "firmware", "lib", "modules", "proc", "sys", "tmp",
    ] {
        archive.directory(directory);
    }
    archive.file("init", agent);
    if let Some(qemu) = qemu {
        pack_qemu(&mut archive, qemu)?;
    }
    for (index, (name, module)) in linux.modules(&MODULES)?.iter().enumerate() {
        archive.file(&format!("modules/{index:02}-{name}.ko"), module);
    }
    Ok(archive.finish())
}

/// QEMU with its libraries and firmware.
fn pack_qemu(archive: &mut Archive, qemu: &Qemu) -> Result<()> {
    let mut add = |to: &str, from: &Path| -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        archive.file(to, &content);
        Ok(())
    };
    add("bin/qemu-system-x86_64", qemu.program())?;
    let libraries = qemu.libraries().context("cannot list QEMU's libraries")?;
    for (index, library) in libraries.iter().enumerate() {
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        match index {
            0 => add("lib/loader", library)?,
            _ => add(&format!("lib/{name}"), library)?,
        }
    }
    for name in FIRMWARE {
        let file = qemu
            .firmware(name)
            .ok_or_else(|| anyhow!("this QEMU comes without the firmware file {name}"))?;
        add(&format!("firmware/{name}"), &file)?;
    }
    Ok(())
}
