//! What the Linux guest boots from: its kernel, and an initial RAM file system with drivers and
//! tools. Nothing of it is on a disk: disks are what is judged.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};

use crate::{
    keep::{kept, stamp},
    machine::{Archive, Linux},
    packages::Tree,
    progress,
};

/// What is in an initial RAM file system besides busybox, the loader and our first process.
#[derive(Debug, Clone, Copy)]
pub struct Contents {
    /// What kind of archive it is, in the name of its file.
    pub kind: &'static str,
    /// Drivers, in the order in which they are loaded.
    pub modules: &'static [&'static str],
    /// Programs; their libraries come with them. Everything else is busybox.
    pub programs: &'static [&'static str],
    /// Other files of the packages.
    pub files: &'static [&'static str],
}

impl Contents {
    /// What Linux judges our host with.
    pub const JUDGE: Self = Self {
        kind: "initrd",
        modules: &MODULES,
        programs: &PROGRAMS,
        files: &FILES,
    };
}

/// Drivers, and what the tests use them with. The kernel has ext4 built in.
const MODULES: [&str; 11] = [
    "hv_vmbus",
    "hv_storvsc",
    "hv_netvsc",
    "hv_utils",
    "hv_balloon",
    "hv_sock",
    "sd_mod",
    "sr_mod",
    "isofs",
    "8021q",
    "vsock_diag",
];

/// Programs with their libraries. Everything else is busybox.
const PROGRAMS: [&str; 14] = [
    "mkfs.ext4",
    "e2fsck",
    "ethtool",
    "sfdisk",
    "hv_kvp_daemon",
    "socat",
    "sg_inq",
    "sg_luns",
    "sg_readcap",
    "sg_requests",
    "sg_turs",
    "sg_unmap",
    "sg_vpd",
    "xxhsum",
];

/// Other files of the packages.
const FILES: [&str; 3] = [
    "etc/mke2fs.conf",
    "usr/libexec/hypervkvpd/hv_get_dhcp_info",
    "usr/libexec/hypervkvpd/hv_get_dns_info",
];

/// Each distribution has to bring this one itself. Ours takes the addresses of the file that
/// the daemon wrote in the form of Red Hat's `ifcfg` files, and keeps the file.
const SET_ADDRESSES: &str = "\
#!/bin/sh
. \"$1\"
cp \"$1\" /tmp/injected
ip address flush dev \"$DEVICE\"
for n in '' 0 1 2 3; do
    eval address=\\$IPADDR$n mask=\\$NETMASK$n
    [ -z \"$address\" ] || ip address add \"$address/$mask\" dev \"$DEVICE\"
done
";

/// What the kernel runs for an orderly end. There is no init that busybox could ask.
const POWER: &str = "#!/bin/sh\nsync\nexec busybox HOW -f\n";

/// Where Debian's daemon looks for its scripts.
const SCRIPTS: &str = "usr/libexec/hypervkvpd";

/// The guest's command line: what makes it slow where each exit is emulated is left out, and
/// nothing else. It prints warnings while it boots.
pub const CMDLINE: &str = "console=ttyS0 loglevel=5 panic=-1 8250.nr_uarts=1 tsc=reliable \
     no_timer_check mitigations=off audit=0 lsm= random.trust_cpu=on cryptomgr.notests \
     net.ifnames=0 -- shell";

/// Kernel and initial RAM file system, kept below `store`.
#[derive(Debug)]
pub struct Image {
    /// The kernel: an ELF with a PVH note.
    pub kernel: PathBuf,
    /// The archive.
    pub initrd: PathBuf,
}

impl Image {
    /// Makes the files from an unpacked kernel package, the tools and our first process, unless
    /// they are there for exactly these.
    pub fn prepare(
        store: &Path,
        linux: &Path,
        contents: &Contents,
        tools: &Tree,
        agent: &Path,
    ) -> Result<Self> {
        let directory = store.join("referee");
        let agent = fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
        let package = stamp(linux)?;
        let linux = Linux::of_tree(linux)?;
        let kernel = kept(&directory, "vmlinux", &[&package], || {
            let _step = progress::step("unpacking the guest's kernel");
            linux.elf()
        })?;
        let lists = [contents.programs, contents.files, contents.modules];
        let lists = lists.concat().join(" ");
        let parts = [
            &agent[..],
            &package,
            &stamp(tools.root())?,
            lists.as_bytes(),
            SET_ADDRESSES.as_bytes(),
            POWER.as_bytes(),
        ];
        let initrd = kept(&directory, contents.kind, &parts, || {
            let _step = progress::step("packing the guest's tools");
            pack(&linux, contents, tools, &agent)
        })?;
        Ok(Self { kernel, initrd })
    }
}

fn pack(linux: &Linux, contents: &Contents, tools: &Tree, agent: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/x86_64-linux-gnu",
        "lib64",
        "modules",
        "proc",
        "sys",
        "tmp",
        "usr",
        "usr/libexec",
        SCRIPTS,
        "var",
        "var/lib",
    ] {
        archive.directory(directory);
    }
    for (path, target) in [
        ("sbin", "bin"),
        ("usr/bin", "../bin"),
        ("usr/sbin", "../bin"),
        ("var/run", "/tmp"),
    ] {
        archive.link(path, target);
    }
    archive.file("init", agent);
    for how in ["poweroff", "reboot"] {
        let script = POWER.replace("HOW", how);
        archive.file(&format!("bin/{how}"), script.as_bytes());
    }
    let mut add = |to: &str, from: &Path| -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        archive.file(to, &content);
        Ok(())
    };
    add("bin/busybox", &program(tools, "busybox")?)?;
    add("lib64/ld-linux-x86-64.so.2", &tools.loader())?;
    let mut libraries = Vec::new();
    for name in contents.programs {
        let file = program(tools, name)?;
        libraries.extend(
            tools
                .libraries(&file)
                .with_context(|| format!("cannot list the libraries of {name}"))?,
        );
        add(&format!("bin/{name}"), &file)?;
    }
    libraries.sort();
    libraries.dedup();
    for file in libraries {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        add(&format!("lib/x86_64-linux-gnu/{name}"), &file)?;
    }
    for name in contents.files {
        add(name, &tools.root().join(name))?;
    }
    archive.file(
        &format!("{SCRIPTS}/hv_set_ifconfig"),
        SET_ADDRESSES.as_bytes(),
    );
    for (index, (name, module)) in linux.modules(contents.modules)?.iter().enumerate() {
        archive.file(&format!("modules/{index:02}-{name}.ko"), module);
    }
    Ok(archive.finish())
}

fn program(tools: &Tree, name: &str) -> Result<PathBuf> {
    tools.program(name).ok_or_else(|| {
        anyhow!(
            "the packages in {} are without {name}: remove that directory and start again",
            tools.root().display()
        )
    })
}
