//! What a VHDX file lies on: positioned reads and writes, and a way to make them durable.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// A file, as far as VHDX needs one. Any thread, any order.
pub trait Storage: Send + Sync {
    /// Length in bytes.
    ///
    /// # Errors
    /// As the storage has them; so in all methods.
    fn length(&self) -> io::Result<u64>;

    /// Fills `data` from `offset` on; `UnexpectedEof` when the storage ends before.
    ///
    /// # Errors
    /// See [`length`](Self::length).
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `offset`, and grows the storage to hold it.
    ///
    /// # Errors
    /// See [`length`](Self::length).
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Cuts the storage, or grows it with zeros that need take no room.
    ///
    /// # Errors
    /// See [`length`](Self::length).
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Grows the storage with zeros that are sure to have room.
    ///
    /// # Errors
    /// See [`length`](Self::length).
    fn reserve(&self, length: u64) -> io::Result<()> {
        self.set_length(length)
    }

    /// Makes `length` bytes within the storage zeros, if possible without writing them.
    ///
    /// # Errors
    /// See [`length`](Self::length).
    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        write_zeros(self, offset, length)
    }

    /// Makes every earlier write and change of length durable.
    ///
    /// # Errors
    /// See [`length`](Self::length). What is durable is not known then.
    fn sync(&self) -> io::Result<()>;
}

/// Zeros, the slow way.
fn write_zeros<S: Storage + ?Sized>(storage: &S, offset: u64, length: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    let mut done = 0;
    while done < length {
        let part = (length - done).min(ZEROS.len() as u64);
        storage.write_at(offset + done, &ZEROS[..part as usize])?;
        done += part;
    }
    Ok(())
}

impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn length(&self) -> io::Result<u64> {
        (**self).length()
    }
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, data)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, data)
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        (**self).set_length(length)
    }
    fn reserve(&self, length: u64) -> io::Result<()> {
        (**self).reserve(length)
    }
    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        (**self).zero(offset, length)
    }
    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }
}

impl Storage for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    #[cfg(unix)]
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, data, offset)
    }

    #[cfg(windows)]
    fn read_at(&self, offset: u64, mut data: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        while !data.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_read(self, data, at)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            data = &mut data[count..];
            at += count as u64;
        }
        Ok(())
    }

    #[cfg(unix)]
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, data, offset)
    }

    #[cfg(windows)]
    fn write_at(&self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        let mut at = offset;
        while !data.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_write(self, data, at)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            data = &data[count..];
            at += count as u64;
        }
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    #[cfg(target_os = "linux")]
    fn reserve(&self, length: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        match fallocate(self, FallocateFlags::empty(), 0, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.set_length(length),
            result => Ok(result?),
        }
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        if punch_hole(self, offset, length)? {
            Ok(())
        } else {
            write_zeros(self, offset, length)
        }
    }

    fn sync(&self) -> io::Result<()> {
        // The length is among what is needed to read the data again.
        self.sync_data()
    }
}

/// Gives the room of these bytes of a file or block device back to what it lies on: they read as zeros. Whether that can be done
/// there; if not, nothing has changed.
///
/// # Errors
/// As the file has them.
pub fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<bool> {
    if length == 0 {
        return Ok(true);
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(file, hole, offset, length) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, offset);
        Ok(false)
    }
}

/// Bytes that are kept or not kept together.
const PAGE: u64 = 4096;

/// A file in memory, for tests; what was never written takes no room.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    content: Mutex<Content>,
}

#[derive(Debug, Default)]
struct Content {
    length: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl MemoryStorage {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file with this content.
    pub fn with_content(bytes: &[u8]) -> Self {
        let storage = Self::new();
        storage.with(|content| content.write(0, bytes));
        storage
    }

    /// A file of its own with the same content.
    pub fn copy(&self) -> Self {
        let copy = Self::new();
        let (length, pages) = self.with(|content| (content.length, content.pages.clone()));
        copy.with(|content| *content = Content { length, pages });
        copy
    }

    /// Bytes of memory that the content takes.
    pub fn allocated(&self) -> u64 {
        self.with(|content| content.pages.len() as u64 * PAGE)
    }

    fn with<R>(&self, work: impl FnOnce(&mut Content) -> R) -> R {
        work(&mut self.content.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Content {
    fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, within, from) in parts(offset, data.len()) {
            let page = self
                .pages
                .entry(page)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            page[within.clone()].copy_from_slice(&data[from..from + within.len()]);
        }
        self.length = self.length.max(offset + data.len() as u64);
    }

    /// Zeros from here to there; both may be far apart.
    fn clear(&mut self, from: u64, to: u64) {
        let pages: Vec<u64> = self
            .pages
            .range(from / PAGE..to.div_ceil(PAGE))
            .map(|(page, _)| *page)
            .collect();
        for page in pages {
            let start = page * PAGE;
            let (first, last) = (from.max(start) - start, to.min(start + PAGE) - start);
            if (first, last) == (0, PAGE) {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[first as usize..last as usize].fill(0);
            }
        }
    }
}

/// The pages of a run of bytes: number, range in the page, start in the run.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < length).then(|| {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let count = (PAGE as usize - within).min(length - done);
            let part = (at / PAGE, within..within + count, done);
            done += count;
            part
        })
    })
}

impl Storage for MemoryStorage {
    fn length(&self) -> io::Result<u64> {
        Ok(self.with(|content| content.length))
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.with(|content| {
            let end = offset.checked_add(data.len() as u64);
            if end.is_none_or(|end| end > content.length) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for (page, within, from) in parts(offset, data.len()) {
                let into = &mut data[from..from + within.len()];
                match content.pages.get(&page) {
                    Some(page) => into.copy_from_slice(&page[within]),
                    None => into.fill(0),
                }
            }
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        offset
            .checked_add(data.len() as u64)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.with(|content| content.write(offset, data));
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.with(|content| {
            content.clear(length, content.length.max(length));
            content.length = length;
        });
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset
            .checked_add(length)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.with(|content| {
            content.clear(offset, end);
            content.length = content.length.max(end);
        });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn behaves(storage: &dyn Storage) {
        storage.write_at(5000, b"abc").unwrap();
        assert_eq!(storage.length().unwrap(), 5003);
        storage.set_length(20_000).unwrap();
        let mut data = [1; 8];
        storage.read_at(4998, &mut data).unwrap();
        assert_eq!(&data, b"\0\0abc\0\0\0");
        let beyond = storage.read_at(19_996, &mut data).unwrap_err();
        assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
        storage.write_at(8190, b"defg").unwrap();
        storage.zero(5001, 3190).unwrap();
        storage.read_at(8188, &mut data).unwrap();
        assert_eq!(&data, b"\0\0\0efg\0\0");
        storage.set_length(8192).unwrap();
        storage.set_length(8200).unwrap();
        storage.read_at(8192, &mut data).unwrap();
        assert_eq!(data, [0; 8], "what was cut off does not come back");
        storage.sync().unwrap();
    }

    #[test]
    fn storage_in_memory_behaves_like_a_file() {
        behaves(&MemoryStorage::new());
        behaves(&tempfile::tempfile().unwrap());
        let sparse = MemoryStorage::new();
        sparse.set_length(1 << 60).unwrap();
        sparse.zero(0, 1 << 60).unwrap();
        assert_eq!(sparse.allocated(), 0);
        let copy = MemoryStorage::with_content(b"same").copy();
        let mut data = [0; 4];
        copy.read_at(0, &mut data).unwrap();
        assert_eq!(&data, b"same");
    }
}
