//! A disk that fails as it is told, and an executor that works when it is told.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use vmbus_host::disk::{Disk, DiskError, Geometry, MemoryDisk};
use vmbus_host::work::{Executor, Job};

/// Does jobs when the test says so.
#[derive(Clone, Default)]
pub struct Held(Arc<Mutex<VecDeque<Job>>>);

impl Executor for Held {
    fn run(&self, job: Job) {
        self.0.lock().unwrap().push_back(job);
    }
}

impl Held {
    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Does one job; which, counted from the oldest.
    pub fn run_one(&self, which: usize) {
        let job = self.0.lock().unwrap().remove(which).unwrap();
        job();
    }

    pub fn run_all(&self) {
        while self.len() != 0 {
            self.run_one(0);
        }
    }

    /// Forgets a job.
    pub fn drop_one(&self) {
        let job = self.0.lock().unwrap().pop_front();
        drop(job.unwrap());
    }
}

/// A disk in memory that fails as it is told, and counts flushes.
pub struct TestDisk {
    pub inner: MemoryDisk,
    pub state: Mutex<TestState>,
}

#[derive(Default)]
pub struct TestState {
    /// What the next requests fail with.
    pub error: Option<DiskError>,
    pub flushes: u64,
    /// The size that it tells, if another.
    pub sectors: Option<u64>,
    pub can_not_unmap: bool,
    pub read_only: bool,
}

impl TestDisk {
    pub fn new(geometry: Geometry) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryDisk::new(geometry).with_identity(*b"the test's disk!"),
            state: Mutex::default(),
        })
    }

    /// 4 MiB in sectors of 512 bytes.
    pub fn small() -> Arc<Self> {
        Self::new(Geometry::of_bytes(4 << 20))
    }

    pub fn with(self: Arc<Self>, change: impl FnOnce(&mut TestState)) -> Arc<Self> {
        change(&mut self.state.lock().unwrap());
        self
    }

    pub fn flushes(&self) -> u64 {
        self.state.lock().unwrap().flushes
    }

    fn fail(&self) -> Result<(), DiskError> {
        match self.state.lock().unwrap().error.clone() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl Disk for TestDisk {
    fn geometry(&self) -> Geometry {
        let mut geometry = self.inner.geometry();
        let sectors = self.state.lock().unwrap().sectors;
        geometry.sectors = sectors.unwrap_or(geometry.sectors);
        geometry
    }

    fn read_only(&self) -> bool {
        self.state.lock().unwrap().read_only
    }

    fn identity(&self) -> [u8; 16] {
        self.inner.identity()
    }

    fn write_cache(&self) -> bool {
        !self.read_only()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.fail()?;
        self.inner.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.fail()?;
        self.inner.write(offset, data)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.fail()?;
        self.state.lock().unwrap().flushes += 1;
        self.inner.flush()
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.fail()?;
        self.inner.unmap(offset, length)
    }

    fn can_unmap(&self) -> bool {
        !self.state.lock().unwrap().can_not_unmap
    }

    fn unmap_granularity(&self) -> u64 {
        4096
    }
}
