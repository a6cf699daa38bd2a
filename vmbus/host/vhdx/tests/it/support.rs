//! Disks in memory, and where things are in them.

use std::sync::Arc;

use vhdx::{MIB, MemoryStorage, Settings, Storage, Vhdx, create};

/// Where `create` puts the BAT.
pub const BAT: u64 = 3 * MIB;

/// A dynamic disk with blocks of 1 MiB.
pub fn small(size: u64) -> Settings {
    Settings {
        block_size: 1 << 20,
        ..Settings::new(size)
    }
}

/// A new disk's file.
pub fn made(settings: &Settings) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    let file: Arc<dyn Storage> = storage.clone();
    create(&file, settings).unwrap();
    storage
}

/// The disk in a file, open for writing.
pub fn open(storage: &Arc<MemoryStorage>) -> Vhdx {
    Vhdx::open(storage.clone(), false).unwrap()
}

/// What opening a file says.
pub fn refusal(storage: &Arc<MemoryStorage>) -> String {
    match Vhdx::open(storage.clone(), true) {
        Ok(_) => panic!("the disk opens"),
        Err(error) => error.to_string(),
    }
}

/// Bytes of a file.
pub fn bytes(storage: &dyn Storage, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    storage.read_at(offset, &mut bytes).unwrap();
    bytes
}

/// Sectors of a disk.
pub fn read(disk: &Vhdx, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; length];
    disk.read(offset, &mut bytes).unwrap();
    bytes
}

/// Numbers that look random and are the same each time.
pub struct Random(pub u64);

impl Random {
    /// A number below the bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}
