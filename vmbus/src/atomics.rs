//! The atomics of everything whose memory ordering is model-checked. The models compile the same sources with loom's
//! in this place (vmbus/models).

pub(crate) use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

pub(crate) use spin::Mutex;
