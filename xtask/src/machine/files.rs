//! The user's files in the nested machine: the file system that answers its requests.
//!
//! It holds the files that were shared, in one directory, and nothing else of the user's
//! computer. Every read, write and flush is one of the file itself; nothing is cached, so
//! what the monitor calls durable is durable on the user's disk.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use agent::{
    messages::{Cut, Whole},
    protocol::Target,
    streams::End,
};
use anyhow::{Context, Result, anyhow};
use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::{
    fs::{FallocateFlags, fallocate},
    net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair},
};

use super::link::Link;

/// Where the directory is in the nested machine.
const DIRECTORY: &str = "/user";

/// Most bytes of one read or write. With its header it must fit the buffer of a local socket
/// as Linux makes it (208 KiB).
const LARGEST: u32 = 128 << 10;

/// How many requests are carried out at the same time.
const THREADS: usize = 4;

/// What the kernel is told is true for no longer than this.
const VALID: Duration = Duration::ZERO;

/// What the nested machine may do with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read it, with others.
    Read,
    /// Read and change it, alone.
    Write,
    /// Write it anew, from nothing.
    Create,
}

/// The shared files.
pub struct Files {
    entries: Entries,
}

/// A place is not used again: the kernel may remember what was there.
type Entries = Arc<Mutex<Vec<Option<Arc<Entry>>>>>;

#[derive(Debug)]
struct Entry {
    name: String,
    file: File,
    writable: bool,
}

impl Files {
    /// Mounts the directory in the nested machine.
    pub fn mount(link: &Link) -> Result<Self> {
        let entries = Entries::default();
        let (near, far) = pair().context("cannot make a pair of sockets")?;
        link.open(Target::Files(DIRECTORY.into()), end(near)?)?;
        let directory = Directory(entries.clone());
        // It first waits for the kernel's greeting. It ends with the link.
        thread::spawn(move || {
            let mut config = Config::default();
            config.n_threads = Some(THREADS);
            // The nested machine's users are not ours.
            let acl = SessionACL::All;
            config.acl = acl;
            Session::from_fd(directory, far, acl, config).and_then(Session::run)
        });
        Ok(Self { entries })
    }

    /// Adds a file; gives its path in the nested machine. The file stays locked until this
    /// is dropped, as the monitor itself would lock it.
    pub fn share(&self, path: &Path, access: Access) -> Result<String> {
        let file = open(path, access)?;
        let own = path.file_name().unwrap_or_default().to_string_lossy();
        let mut entries = lock(&self.entries);
        // The ending of a disk's name may matter.
        let name = format!("{}-{own}", entries.len());
        entries.push(Some(Arc::new(Entry {
            name: name.clone(),
            file,
            writable: access != Access::Read,
        })));
        Ok(format!("{DIRECTORY}/{name}"))
    }

    /// Takes a file out by its path in the nested machine, and unlocks it.
    pub fn forget(&self, path: &str) {
        let name = path
            .strip_prefix(DIRECTORY)
            .and_then(|rest| rest.strip_prefix('/'));
        for place in lock(&self.entries).iter_mut() {
            if place
                .as_ref()
                .is_some_and(|entry| Some(&*entry.name) == name)
            {
                *place = None;
            }
        }
    }
}

/// Opens and locks a file of the user's.
fn open(path: &Path, access: Access) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(access != Access::Read)
        .create(access == Access::Create)
        .truncate(access == Access::Create)
        .open(path)
        .map_err(|error| anyhow!("cannot open {}: {error}", path.display()))?;
    let what = match access {
        Access::Create => "file",
        Access::Read | Access::Write => "disk",
    };
    let locked = match access {
        Access::Read => file.try_lock_shared(),
        Access::Write | Access::Create => file.try_lock(),
    };
    match locked {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(anyhow!(
            "{what} {} is in use by another process",
            path.display()
        )),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(anyhow!("cannot lock {}: {error}", path.display()))
        }
    }
}

/// Two sockets that keep messages apart, as the kernel's device does.
fn pair() -> io::Result<(File, OwnedFd)> {
    let (near, far) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok((near.into(), far))
}

fn end(near: File) -> io::Result<End> {
    let whole = near.try_clone()?;
    let abort = move || {
        // It fails for a session that has ended, which is what is wanted.
        let _ = shutdown(&whole, Shutdown::Both);
    };
    Ok(End {
        reader: Box::new(Whole::new(near.try_clone()?)),
        writer: Box::new(Cut::new(near)),
        finish: Box::new(|| ()),
        abort: Box::new(abort),
    })
}

/// The directory as the kernel asks for it.
struct Directory(Entries);

impl Directory {
    /// Inode 1 is the directory, 2 the first file.
    fn entry(&self, inode: INodeNo) -> Result<Arc<Entry>, Errno> {
        inode
            .0
            .checked_sub(2)
            .and_then(|index| {
                let entries = lock(&self.0);
                entries.get(usize::try_from(index).ok()?)?.clone()
            })
            .ok_or(Errno::ENOENT)
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        if inode == INodeNo::ROOT {
            return Ok(attributes(inode, FileType::Directory, 0o555, 0));
        }
        let entry = self.entry(inode)?;
        let mode = if entry.writable { 0o666 } else { 0o444 };
        Ok(attributes(
            inode,
            FileType::RegularFile,
            mode,
            entry.size()?,
        ))
    }
}

impl Entry {
    /// Also of a block device, whose metadata does not tell.
    fn size(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        if metadata.is_file() {
            Ok(metadata.len())
        } else {
            (&self.file).seek(SeekFrom::End(0))
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl Filesystem for Directory {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Both are within what there can be.
        let _ = config.set_max_write(LARGEST);
        let _ = config.set_max_readahead(LARGEST);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let index = (parent == INodeNo::ROOT)
            .then(|| {
                let is_it = |place: &Option<Arc<Entry>>| {
                    place.as_ref().is_some_and(|entry| *name == *entry.name)
                };
                lock(&self.0).iter().position(is_it)
            })
            .flatten();
        let found = index.ok_or(Errno::ENOENT);
        match found.and_then(|index| self.attributes(INodeNo(index as u64 + 2))) {
            Ok(attributes) => reply.entry(&VALID, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Ok(attributes) => reply.attr(&VALID, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _accessed: Option<TimeOrNow>,
        _modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        _: Option<FileHandle>,
        _created: Option<SystemTime>,
        _flags_changed: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let resized = match size {
            Some(size) => self
                .entry(inode)
                .and_then(|entry| Ok(entry.file.set_len(size)?)),
            // Owner, mode and times stay the user's.
            None => Ok(()),
        };
        match resized.and_then(|()| self.attributes(inode)) {
            Ok(attributes) => reply.attr(&VALID, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.entry(inode) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size.min(LARGEST) as usize];
        let read = self
            .entry(inode)
            .and_then(|entry| Ok(entry.read(offset, &mut buffer)?));
        match read {
            Ok(length) => reply.data(buffer.get(..length).unwrap_or_default()),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self
            .entry(inode)
            .and_then(|entry| Ok(entry.file.write_all_at(data, offset)?));
        match written {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(LARGEST)),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok(); // On closing; nothing is held back.
    }

    fn fsync(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        only_data: bool,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.entry(inode), |entry| match only_data {
            true => entry.file.sync_data(),
            false => entry.file.sync_all(),
        });
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        answer(reply, self.entry(inode), |entry| {
            Ok(fallocate(&entry.file, mode, offset, length)?)
        });
    }
}

fn answer(
    reply: ReplyEmpty,
    entry: Result<Arc<Entry>, Errno>,
    act: impl FnOnce(&Entry) -> io::Result<()>,
) {
    match entry.and_then(|entry| Ok(act(&entry)?)) {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn attributes(inode: INodeNo, kind: FileType, mode: u16, size: u64) -> FileAttr {
    let never = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: inode,
        size,
        blocks: size.div_ceil(512),
        atime: never,
        mtime: never,
        ctime: never,
        crtime: never,
        kind,
        perm: mode,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
