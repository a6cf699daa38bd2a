//! What a VM on QEMU is made of, and QEMU's arguments for it.

use agent::protocol::CONTROL_FD;

/// Accelerator, and with it whether Hyper-V is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM, with QEMU's Hyper-V enlightenments.
    KvmHyperV,
    /// QEMU's emulator; Hyper-V does not exist.
    Tcg,
}

/// What is booted; files are named as in the agent's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// An ELF with a PVH note, started by QEMU itself.
    Kernel {
        /// The ELF.
        file: String,
        /// Initial RAM file system, for Linux.
        initrd: Option<String>,
    },
    /// An EFI application, started by OVMF with the command line as its options.
    Efi {
        /// The application.
        file: String,
        /// The firmware.
        firmware: String,
    },
    /// A raw disk, booted by OVMF.
    Disk {
        /// The disk image.
        file: String,
        /// The firmware.
        firmware: String,
    },
}

/// A VM to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// What is booted.
    pub boot: Boot,
    /// Words of the guest's command line.
    pub cmdline: Vec<String>,
    /// Memory in MiB.
    pub memory: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Processor flags after the usual ones, for hosts that offer something else (KVM only).
    pub cpu_flags: Vec<&'static str>,
    /// Whether there is a VMBus (KVM only).
    pub vmbus: bool,
    /// Whether the VMBus has a dynamic-memory device.
    pub balloon: bool,
    /// Devices of virtio in place of VMBus and Hyper-V's enlightenments (KVM only).
    pub virtio: Option<Virtio>,
    /// TCP port of QEMU's debugger stub; the VM waits for `continue`.
    pub gdb: Option<u16>,
}

/// A VM as QEMU makes it best: virtio over PCI, and KVM's own enlightenments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Virtio {
    /// A raw file, the disk of virtio-blk; its data pass through the page cache.
    pub disk: String,
    /// The TAP interface that virtio-net is plugged into; it is made if it does not exist.
    pub tap: String,
}

impl Virtio {
    fn arguments(&self) -> Vec<String> {
        // File names may hold commas, which are doubled.
        let disk = self.disk.replace(',', ",,");
        [
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-object",
            "iothread,id=disk-thread",
            "-blockdev",
            &format!("raw,node-name=disk,file.driver=file,file.filename={disk}"),
            "-device",
            "virtio-blk-pci,drive=disk,iothread=disk-thread,disable-legacy=on",
            "-netdev",
            &format!("tap,id=net,ifname={},script=no,downscript=no", self.tap),
            "-device",
            // Nobody boots by it, so its firmware is left out.
            "virtio-net-pci,netdev=net,disable-legacy=on,romfile=",
        ]
        .map(str::to_owned)
        .into()
    }
}

/// Port of the device that ends the VM with a failing status.
const DEBUG_EXIT: u16 = 0xf4;

/// Id of the balloon device.
const BALLOON_ID: &str = "balloon";

/// Every enlightenment that QEMU has and the nested machine bears.
const ENLIGHTENED_CPU: &str = "host,kvm=off,hv-relaxed,hv-vapic,hv-spinlocks=0x1fff,hv-vpindex,\
     hv-runtime,hv-time,hv-synic,hv-stimer,hv-stimer-direct,hv-reset,hv-frequencies,hv-crash,\
     hv-tlbflush,hv-ipi";

impl VmConfig {
    /// A usual VM: 256 MiB, one processor, VMBus and balloon.
    pub fn new(boot: Boot) -> Self {
        Self {
            boot,
            cmdline: Vec::new(),
            memory: 256,
            cpus: 1,
            cpu_flags: Vec::new(),
            vmbus: true,
            balloon: true,
            virtio: None,
            gdb: None,
        }
    }

    /// QEMU's arguments. The VM is created stopped, its console is standard
    /// output, and it ends rather than reset.
    pub fn arguments(&self, accelerator: Accelerator) -> Vec<String> {
        let mut list = vec![
            "-machine q35 -nodefaults -no-user-config -display none -vga none -S".into(),
            "-chardev stdio,id=console,signal=off -serial chardev:console".into(),
            "-action reboot=shutdown,panic=exit-failure".into(),
            format!("-m {} -smp {}", self.memory, self.cpus),
            format!("-device isa-debug-exit,iobase={DEBUG_EXIT:#x},iosize=4"),
            format!("-chardev socket,id=qmp,fd={CONTROL_FD} -mon chardev=qmp,mode=control"),
        ];
        match accelerator {
            // Its words come behind these.
            Accelerator::KvmHyperV if self.virtio.is_some() => {}
            Accelerator::KvmHyperV => {
                let flags: String = self
                    .cpu_flags
                    .iter()
                    .map(|flag| format!(",{flag}"))
                    .collect();
                list.push(format!("-accel kvm -cpu {ENLIGHTENED_CPU}{flags}"));
                if self.vmbus {
                    list.push("-device vmbus-bridge".into());
                    if self.balloon {
                        list.push(format!(
                            "-device hv-balloon,id={BALLOON_ID},status-report=on"
                        ));
                    }
                }
            }
            Accelerator::Tcg => list.push("-accel tcg -cpu max".into()),
        }
        if let Some(port) = self.gdb {
            list.push(format!("-gdb tcp:127.0.0.1:{port}"));
        }
        let mut arguments: Vec<String> = list
            .iter()
            .flat_map(|words| words.split(' '))
            .map(str::to_owned)
            .collect();
        if let Some(virtio) = &self.virtio {
            arguments.extend(virtio.arguments());
        }
        // File names may hold blanks, so these are not split.
        let mut add = |words: &[&str]| arguments.extend(words.iter().copied().map(str::to_owned));
        let cmdline = self.full_cmdline();
        match &self.boot {
            Boot::Kernel { file, initrd } => {
                add(&["-kernel", file, "-append", &cmdline]);
                if let Some(initrd) = initrd {
                    add(&["-initrd", initrd]);
                }
            }
            Boot::Efi { file, firmware } => {
                add(&["-bios", firmware, "-kernel", file, "-append", &cmdline]);
            }
            Boot::Disk { file, firmware } => add(&[
                "-bios",
                firmware,
                "-drive",
                &format!("file={},format=raw,snapshot=on", file.replace(',', ",,")),
            ]),
        }
        arguments
    }

    /// The command line with the word that names the debug-exit port.
    pub fn full_cmdline(&self) -> String {
        // First: for Linux, what follows `--` is its init's.
        let mut words = vec![debug_exit_word()];
        words.extend_from_slice(&self.cmdline);
        words.join(" ")
    }
}

/// The word that tells a guest of the debug-exit device. A disk image brings its
/// own command line and so needs it there.
pub fn debug_exit_word() -> String {
    format!("debug-exit={DEBUG_EXIT:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig::new(Boot::Kernel {
            file: "k.elf".into(),
            initrd: None,
        })
    }

    #[test]
    fn devices_of_hyper_v_need_kvm_and_can_be_left_out() {
        let line = |config: &VmConfig, accelerator| config.arguments(accelerator).join(" ");
        let plain = config();
        let mut config = plain.clone();
        let full = line(&config, Accelerator::KvmHyperV);
        assert!(
            full.contains("-device vmbus-bridge -device hv-balloon,id=balloon,status-report=on")
        );
        assert!(full.contains("hv-synic"));
        config.balloon = false;
        let bus = line(&config, Accelerator::KvmHyperV);
        assert!(bus.contains("vmbus-bridge") && !bus.contains("hv-balloon"));
        config.vmbus = false;
        assert!(!line(&config, Accelerator::KvmHyperV).contains("vmbus"));
        let tcg = line(&plain, Accelerator::Tcg);
        assert!(!tcg.contains("hv-") && tcg.contains("-accel tcg"));
    }

    #[test]
    fn virtio_comes_in_place_of_vmbus() {
        let mut config = config();
        config.virtio = Some(Virtio {
            disk: "a b.img".into(),
            tap: "tap1".into(),
        });
        let arguments = config.arguments(Accelerator::KvmHyperV);
        let disk = "raw,node-name=disk,file.driver=file,file.filename=a b.img";
        assert!(arguments.iter().any(|word| word == disk));
        let line = arguments.join(" ");
        assert!(line.contains("-accel kvm -cpu host ") && line.contains("ifname=tap1"));
        assert!(!line.contains("vmbus") && !line.contains("hv-"));
    }

    #[test]
    fn a_file_name_may_hold_blanks_and_commas() {
        let mut config = config();
        config.boot = Boot::Disk {
            file: "/a b/c,d.img".into(),
            firmware: "/o v".into(),
        };
        let arguments = config.arguments(Accelerator::Tcg);
        assert!(arguments.contains(&"file=/a b/c,,d.img,format=raw,snapshot=on".to_owned()));
        assert!(arguments.contains(&"/o v".to_owned()));
    }

    #[test]
    fn the_guest_is_told_of_the_debug_exit_port() {
        let mut config = config();
        config.cmdline = vec!["log=debug".into()];
        assert_eq!(config.full_cmdline(), "debug-exit=0xf4 log=debug");
        assert!(
            config
                .arguments(Accelerator::Tcg)
                .contains(&"debug-exit=0xf4 log=debug".to_owned())
        );
    }
}
