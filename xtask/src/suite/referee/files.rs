//! What a VM of Linux is given from this computer: disk images, made anew for each boot, and a
//! place for sockets.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vhdx::{Settings, create};
use vmm::config::Lun;

use super::iso;
use crate::machine::{Access, Machine};

/// What the file on the DVD says.
pub const ON_DISC: &str = "Linux reads this from a disc of Hyper-V's";

/// Bytes of the source, the disk that data are copied from.
pub const SOURCE_BYTES: usize = 64 << 20;

/// Files of one boot. They go with it.
pub struct Files<'a> {
    machine: &'a Machine,
    directory: TempDir,
    source: Vec<u8>,
}

impl<'a> Files<'a> {
    /// No files yet.
    pub fn new(machine: &'a Machine) -> Result<Self> {
        Ok(Self {
            machine,
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
        self.machine
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
            file: Some(self.machine.share(&self.path(name), access)?.into()),
            memory_mib: None,
            read_only: access == Access::Read,
        })
    }

    /// The SHA-256 of the source, after each of its `parts` was moved to the front in turn: what
    /// `rotate` of the storage tests writes.
    pub fn rotations_digest(&self, parts: usize) -> String {
        let mut hash = Sha256::new();
        for part in 0..parts {
            let (front, back) = self.source.split_at(self.source.len() / parts * part);
            hash.update(back);
            hash.update(front);
        }
        hex(hash)
    }

    /// The SHA-256 of the source's first MiB.
    pub fn start_digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.source.get(..1 << 20).unwrap_or_default());
        hex(hash)
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
fn pattern(length: usize) -> Vec<u8> {
    let words = 0..length as u64 / 8;
    let mut bytes = Vec::with_capacity(length);
    for word in words {
        let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 29)).to_le_bytes());
    }
    bytes
}

fn hex(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
