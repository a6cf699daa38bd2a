//! What a VM of Linux is given from this computer: disk images, made anew for each boot, and a
//! place for sockets.

use std::{
    cell::RefCell,
    fs::{self, File},
    hash::Hasher,
    net::{Ipv4Addr, TcpListener},
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::Command,
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use twox_hash::XxHash64;
use vhdx::{Settings, create};
use vmm::config::{Backend, Lun};

use super::{On, iso, user_network};
use crate::{
    machine::{Access, Machine},
    run::{Forward, Passt},
};

/// What the file on the DVD says.
pub const ON_DISC: &str = "Linux reads this from a disc of Hyper-V's";

/// Bytes of each copy of the source that the storage tests make.
pub const COPY_BYTES: usize = 16 << 20;

/// Copy n begins so many bytes times n behind the source's begin, so that no two places hold the
/// same.
pub const COPY_STEP: usize = 8;

/// Bytes of the source, the disk that data are copied from.
const SOURCE_BYTES: usize = COPY_BYTES + (64 << 10);

/// Files of one boot. They go with it.
pub struct Files<'a> {
    on: On<'a>,
    /// The user's network, and the port of this computer that leads into it.
    user_network: RefCell<Option<(Passt, u16)>>,
    directory: TempDir,
    source: Vec<u8>,
}

impl<'a> Files<'a> {
    /// No files yet.
    pub fn new(on: On<'a>) -> Result<Self> {
        Ok(Self {
            on,
            user_network: RefCell::new(None),
            // A socket's path must be short.
            directory: tempfile::tempdir().context("cannot make a scratch directory")?,
            source: pattern(SOURCE_BYTES),
        })
    }

    /// A file's path on this computer.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The machine that the VM runs on.
    pub fn machine(&self) -> &Machine {
        self.on.machine
    }

    /// The user's network, with a port of this computer that leads to the guest.
    pub fn user_network(&self) -> Result<Backend> {
        // Should another take the port before passt does, the test fails and says so.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let host = free.local_addr()?.port();
        drop(free);
        let port = Forward {
            address: Ipv4Addr::LOCALHOST.into(),
            host,
            guest: user_network::PORT,
            udp: false,
        };
        let passt = Passt::start(self.on.passt, &[port])?;
        let socket = self.on.machine.reach(passt.socket())?;
        *self.user_network.borrow_mut() = Some((passt, host));
        Ok(Backend::Passt(socket.into()))
    }

    /// The port of this computer that leads to the guest.
    pub fn forwarded(&self) -> Result<u16> {
        let network = self.user_network.borrow();
        let (_, port) = network.as_ref().context("there is no user's network")?;
        Ok(*port)
    }

    /// A raw disk of zeros.
    pub fn raw(&self, lun: u8, name: &str, mib: u64) -> Result<Lun> {
        File::create(self.path(name))?.set_len(mib << 20)?;
        self.disk(lun, name, Access::Write)
    }

    /// The source.
    pub fn source(&self, lun: u8) -> Result<Lun> {
        fs::write(self.path("source.img"), &self.source)?;
        self.disk(lun, "source.img", Access::Read)
    }

    /// A new VHDX.
    pub fn vhdx(&self, lun: u8, name: &str, settings: &Settings) -> Result<Lun> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(self.path(name))?;
        let storage: Arc<dyn vhdx::Storage> = Arc::new(file);
        create(&storage, settings).with_context(|| format!("cannot make {name}"))?;
        drop(storage);
        self.disk(lun, name, Access::Write)
    }

    /// A DVD with one file.
    pub fn disc(&self, lun: u8) -> Result<Lun> {
        let image = iso::image("ENLIT", "READ.ME", ON_DISC.as_bytes());
        fs::write(self.path("disc.iso"), image)?;
        self.disk(lun, "disc.iso", Access::Read)
    }

    fn disk(&self, lun: u8, name: &str, access: Access) -> Result<Lun> {
        Ok(Lun {
            lun,
            file: Some(self.on.machine.share(&self.path(name), access)?.into()),
            memory_mib: None,
            read_only: access == Access::Read,
        })
    }

    /// The checksum (XXH64, as `xxhsum` prints it) of these copies of the source, one behind the
    /// other.
    pub fn copies_sum(&self, copies: Range<usize>) -> String {
        let mut hash = XxHash64::default();
        for copy in copies {
            let from = self.source.get(copy * COPY_STEP..).unwrap_or_default();
            hash.write(from.get(..COPY_BYTES).unwrap_or_default());
        }
        hex(&hash)
    }

    /// The checksum of the source's first MiB.
    pub fn start_sum(&self) -> String {
        sum(self.source.get(..1 << 20).unwrap_or_default())
    }

    /// Nothing is wrong with a VHDX that nobody uses any more: not by our own check, nor by QEMU's,
    /// which does not know sectors of 4096 bytes.
    pub fn is_sound(&self, name: &str, sector: u32) -> Result<()> {
        // The machine keeps the file itself locked.
        let copy = self.path(&format!("copy-of-{name}"));
        fs::copy(self.path(name), &copy)?;
        let said = crate::disk::check(&copy)?;
        ensure!(!said.contains("note:"), "`disk check` says: {said}");
        if sector != 512 {
            return Ok(fs::remove_file(copy)?);
        }
        let (program, arguments) = self.on.tools.img.split_first().context("no qemu-img")?;
        let output = Command::new(program)
            .args(arguments)
            .args(["check", "-f", "vhdx"])
            .arg(&copy)
            .output()
            .context("cannot start qemu-img")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && said.contains("No errors were found"),
            "`qemu-img check` of {name} says: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(fs::remove_file(copy)?)
    }

    /// The file begins with this many bytes of the source, as this computer sees it.
    pub fn begins_with_source(&self, name: &str, bytes: usize) -> Result<()> {
        let mut found = vec![0; bytes];
        File::open(self.path(name))?.read_exact_at(&mut found, 0)?;
        ensure!(
            self.source.starts_with(&found),
            "{name} on the host does not hold what Linux wrote and flushed"
        );
        Ok(())
    }
}

/// Bytes that are different everywhere: the n-th word is n times an odd number, folded.
pub fn pattern(length: usize) -> Vec<u8> {
    let words = 0..length as u64 / 8;
    let mut bytes = Vec::with_capacity(length);
    for word in words {
        let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 29)).to_le_bytes());
    }
    bytes
}

/// The checksum of these bytes, as `xxhsum` prints it.
pub fn sum(bytes: &[u8]) -> String {
    let mut hash = XxHash64::default();
    hash.write(bytes);
    hex(&hash)
}

fn hex(hash: &XxHash64) -> String {
    format!("{:016x}", hash.finish())
}
