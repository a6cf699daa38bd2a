//! The Linux referee: the nested machine's own kernel as a guest, with its
//! Hyper-V drivers and our init.

use std::path::Path;

use anyhow::{Context, Result};

use crate::machine::{Archive, Boot, Linux, Machine, VmConfig};

/// What its init prints when the balloon driver has bound its device.
pub const READY: &str = "^referee: hv_balloon has bound .*$";

/// How that line begins.
pub const FIRST_WORD: &[u8] = b"referee:";

/// Its command line: without what a guest of Hyper-V has no use for, which is to
/// its advantage here.
const CMDLINE: &str = "console=ttyS0 loglevel=1 panic=-1 pci=off i8042.nokbd i8042.noaux i8042.nopnp \
     8250.nr_uarts=1 tsc=reliable no_timer_check mitigations=off audit=0 lsm= \
     random.trust_cpu=on cryptomgr.notests -- referee";

/// Memory in MiB that it comes up in with ease.
const MEMORY: u32 = 256;

/// Makes it ready to boot on `machine`; gives its VM and the size of kernel and
/// initial RAM file system in bytes.
pub fn prepare(machine: &Machine, linux: &Path, agent: &Path) -> Result<(VmConfig, u64)> {
    let linux = Linux::of_tree(linux)?;
    let kernel = linux.elf()?;
    let mut archive = Archive::default();
    for directory in ["dev", "modules", "proc", "sys"] {
        archive.directory(directory);
    }
    let agent = std::fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
    archive.file("init", &agent);
    for (index, (name, module)) in linux.modules(&["hv_balloon"])?.iter().enumerate() {
        archive.file(&format!("modules/{index:02}-{name}.ko"), module);
    }
    let initrd = archive.finish();
    machine.put("linux.elf", &kernel)?;
    machine.put("linux.initrd", &initrd)?;
    let mut config = VmConfig::new(Boot::Kernel {
        file: "linux.elf".into(),
        initrd: Some("linux.initrd".into()),
    });
    config.memory = MEMORY;
    config.cmdline = CMDLINE.split_whitespace().map(str::to_owned).collect();
    Ok((config, (kernel.len() + initrd.len()) as u64))
}
