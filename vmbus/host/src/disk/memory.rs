//! A disk in memory. Only what has been written takes room.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;

use super::{Disk, DiskError, Geometry};
use crate::sync::Mutex;

/// Bytes that are kept or not kept together.
const PAGE: u64 = 64 * 1024;

/// A disk in memory, zeros at first. It lives as long as this value; a write is as durable as it gets at once.
#[derive(Debug)]
pub struct MemoryDisk {
    geometry: Geometry,
    identity: [u8; 16],
    read_only: bool,
    pages: Mutex<BTreeMap<u64, Box<[u8]>>>,
}

impl MemoryDisk {
    /// An empty disk. Its identity is zeros: see [`with_identity`](Self::with_identity).
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            identity: [0; 16],
            read_only: false,
            pages: Mutex::new(BTreeMap::new()),
        }
    }

    /// The same disk under another name.
    pub fn with_identity(mut self, identity: [u8; 16]) -> Self {
        self.identity = identity;
        self
    }

    /// The same disk with its content, written to no more.
    pub fn into_read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Bytes of host memory that the content takes.
    pub fn allocated(&self) -> u64 {
        let pages = self.pages.lock().len();
        u64::try_from(pages).map_or(u64::MAX, |pages| pages.saturating_mul(PAGE))
    }

    fn writable(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.geometry.check(offset, length)
    }
}

/// The parts of a run of bytes that lie in one page each: page, offset in it, length.
fn parts(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset.saturating_add(length);
    let mut at = offset;
    core::iter::from_fn(move || {
        (at < end).then(|| {
            let within = at % PAGE;
            let length = (PAGE - within).min(end - at);
            let part = (at / PAGE, within as usize, length as usize);
            at += length;
            part
        })
    })
}

impl Disk for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn identity(&self) -> [u8; 16] {
        self.identity
    }

    fn write_cache(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.geometry.check(offset, data.len() as u64)?;
        let pages = self.pages.lock();
        let mut rest = data;
        for (page, within, length) in parts(offset, rest.len() as u64) {
            let (part, after) = rest.split_at_mut(length);
            match pages.get(&page) {
                Some(page) => part.copy_from_slice(&page[within..within + length]),
                None => part.fill(0),
            }
            rest = after;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.writable(offset, data.len() as u64)?;
        let mut pages = self.pages.lock();
        let mut rest = data;
        for (page, within, length) in parts(offset, data.len() as u64) {
            let (part, after) = rest.split_at(length);
            let page = pages
                .entry(page)
                .or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
            page[within..within + length].copy_from_slice(part);
            rest = after;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.writable(offset, length)?;
        let mut pages = self.pages.lock();
        let end = offset + length;
        // From page to page that is there: a disk may be large and empty.
        let mut next = offset / PAGE;
        while let Some((&page, bytes)) = pages.range_mut(next..).next() {
            let start = page * PAGE;
            if start >= end {
                break;
            }
            let from = offset.saturating_sub(start).min(PAGE);
            let to = (end - start).min(PAGE);
            if (from, to) == (0, PAGE) {
                pages.remove(&page);
            } else {
                bytes[from as usize..to as usize].fill(0);
            }
            next = page + 1;
        }
        Ok(())
    }

    fn can_unmap(&self) -> bool {
        !self.read_only
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_never_written_reads_as_zeros_and_takes_no_room() {
        let disk = MemoryDisk::new(Geometry::of_bytes(1 << 50));
        let mut data = [1; 1024];
        disk.read((1 << 50) - 1024, &mut data).unwrap();
        assert_eq!(data, [0; 1024]);
        disk.unmap(0, 1 << 50).unwrap();
        assert_eq!(disk.allocated(), 0);
    }

    #[test]
    fn only_whole_sectors_within_the_disk_are_accepted() {
        let disk = MemoryDisk::new(Geometry::of_bytes(4096));
        let mut data = [0; 1024];
        for (offset, length) in [
            (4096, 512),
            (3584, 1024),
            (1, 512),
            (0, 511),
            (u64::MAX, 512),
        ] {
            let data = &mut data[..length];
            assert_eq!(disk.read(offset, data), Err(DiskError::OutOfRange));
            assert_eq!(disk.write(offset, data), Err(DiskError::OutOfRange));
            let unmapped = disk.unmap(offset, length as u64);
            assert_eq!(unmapped, Err(DiskError::OutOfRange));
        }
        disk.write(4096, &[]).unwrap();
    }

    #[test]
    fn a_read_only_disk_keeps_its_content() {
        let disk = MemoryDisk::new(Geometry::of_bytes(4096));
        disk.write(512, &[7; 512]).unwrap();
        let disk = disk.into_read_only();
        assert_eq!(disk.write(512, &[8; 512]), Err(DiskError::ReadOnly));
        assert_eq!(disk.unmap(512, 512), Err(DiskError::ReadOnly));
        let mut data = [0; 512];
        disk.read(512, &mut data).unwrap();
        assert_eq!(data, [7; 512]);
    }

    proptest! {
        #[test]
        fn a_memory_disk_is_a_run_of_bytes(
            steps in prop::collection::vec((0..3u8, 0..600u64, 0..300u64, any::<u8>()), 1..40)
        ) {
            const SECTORS: u64 = 600;
            let disk = MemoryDisk::new(Geometry::of_bytes(SECTORS * 512));
            let mut model = vec![0; (SECTORS * 512) as usize];
            for (kind, sector, count, value) in steps {
                let count = count.min(SECTORS - sector);
                let (offset, length) = (sector * 512, count * 512);
                let range = offset as usize..(offset + length) as usize;
                match kind {
                    0 => {
                        let data = vec![value; length as usize];
                        disk.write(offset, &data).unwrap();
                        model[range].copy_from_slice(&data);
                    }
                    1 => {
                        disk.unmap(offset, length).unwrap();
                        model[range].fill(0);
                    }
                    _ => {
                        let mut data = vec![1; length as usize];
                        disk.read(offset, &mut data).unwrap();
                        prop_assert_eq!(&data[..], &model[range]);
                    }
                }
            }
        }
    }
}
