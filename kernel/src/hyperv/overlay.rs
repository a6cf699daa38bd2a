//! Pages that the guest and the hypervisor share: the only memory that this directory touches
//! outside Rust's own.
//!
//! Shared memory is reached only through atomics, so that a change by the hypervisor at any moment
//! is an ordinary concurrent store.

#![allow(unsafe_code)]

use core::ops::Deref;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering};

use x86_64::{PhysAddr, VirtAddr};

use super::msr::{Guarded, Msr, OverlayAddress};

/// Bytes in a page of guest physical address space.
pub const PAGE_SIZE: usize = 4096;

/// One page of RAM that will be shared with the hypervisor for good.
///
/// The memory layer makes these; they are consumed by whatever shares them.
#[derive(Debug)]
pub struct Page {
    memory: NonNull<u8>,
    physical: PhysAddr,
}

// SAFETY: the page is plain memory that only its owner reaches.
unsafe impl Send for Page {}

impl Page {
    /// Takes the page that is mapped at `virtual_address`.
    ///
    /// # Safety
    /// `virtual_address` must be mapped readable and writable, as ordinary cached memory, to
    /// `physical_address`, for as long as the kernel runs. The 4096 bytes must belong to the
    /// caller, and nothing else may use them ever after.
    ///
    /// # Panics
    /// When an address is not that of a page.
    pub unsafe fn new(virtual_address: VirtAddr, physical_address: PhysAddr) -> Self {
        assert!(
            virtual_address.is_aligned(PAGE_SIZE as u64),
            "unaligned virtual page address"
        );
        assert!(
            physical_address.is_aligned(PAGE_SIZE as u64),
            "unaligned physical page address"
        );
        match NonNull::new(virtual_address.as_mut_ptr()) {
            Some(memory) => Self {
                memory,
                physical: physical_address,
            },
            None => panic!("the null page cannot be shared"),
        }
    }

    /// Zeroes the page and turns it into its shared form, without telling the hypervisor where
    /// it is.
    pub(super) fn share<T: Layout>(self) -> Shared<T> {
        const { assert!(size_of::<T>() == PAGE_SIZE && align_of::<T>() <= PAGE_SIZE) };
        // SAFETY: `new`'s caller gave 4096 bytes that are ours alone.
        unsafe { ptr::write_bytes(self.memory.as_ptr(), 0, PAGE_SIZE) };
        // SAFETY: aligned and large enough by the assertion above, initialised and valid for every
        // bit pattern by `Layout`, mapped for good by `new`.
        let contents = unsafe { self.memory.cast::<T>().as_ref() };
        Shared {
            contents,
            physical: self.physical,
        }
    }

    /// Zeroes the page and has `register` put it where it is (spec tlfs.md 5.5: not every host
    /// zeroes it).
    pub(super) fn enable<T: Layout>(self, register: Msr<OverlayAddress, Guarded>) -> Overlay<T> {
        let shared = self.share::<T>();
        let value = register.read().enable_at(shared.address());
        // SAFETY: the page is ours for good, and is only reached through `T`'s atomics from now on.
        unsafe { register.write_guarded(value) };
        Overlay { register, shared }
    }
}

/// What a shared page may be read as.
///
/// # Safety
/// Every byte of the type is part of an atomic: no padding, any bit pattern valid, and changed
/// only through interior mutability.
pub(super) unsafe trait Layout: Sync + 'static {}

// SAFETY: slots of atomics, sizes asserted there.
unsafe impl Layout for super::message::MessagePage {}
// SAFETY: atomics only.
unsafe impl Layout for super::event::EventPage {}
// SAFETY: atomics only, sizes asserted there.
unsafe impl Layout for super::clock::TscPage {}
// SAFETY: atomics only.
unsafe impl Layout for [AtomicU8; PAGE_SIZE] {}
// SAFETY: atomics only.
unsafe impl Layout for [AtomicU64; PAGE_SIZE / 8] {}

/// A page in its shared form.
#[derive(Debug)]
pub(super) struct Shared<T: 'static> {
    contents: &'static T,
    physical: PhysAddr,
}

impl<T> Shared<T> {
    /// The guest physical address.
    pub(super) fn address(&self) -> u64 {
        self.physical.as_u64()
    }

    /// The contents, for as long as the kernel runs.
    pub(super) fn contents(&self) -> &'static T {
        self.contents
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.contents
    }
}

/// A shared page that a register has put in place.
pub(super) struct Overlay<T: 'static> {
    register: Msr<OverlayAddress, Guarded>,
    shared: Shared<T>,
}

impl<T> Overlay<T> {
    /// Takes the page away from the hypervisor. The contents become what they were in RAM before;
    /// they stay readable.
    pub(super) fn disable(&self) {
        let value = self.register.read().disable();
        // SAFETY: the value names no page.
        unsafe { self.register.write_guarded(value) };
    }

    /// The contents, for as long as the kernel runs.
    pub(super) fn contents(&self) -> &'static T {
        self.shared.contents()
    }
}

impl<T> Deref for Overlay<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.shared
    }
}

/// The page that holds the hypervisor's code for making hypercalls.
#[derive(Debug)]
pub struct CodePage {
    entry: VirtAddr,
    physical: PhysAddr,
}

impl CodePage {
    /// Takes the page that is mapped at `virtual_address`.
    ///
    /// # Safety
    /// `virtual_address` must be mapped readable and executable to `physical_address` for as long
    /// as the kernel runs. Nothing else may use the 4096 bytes ever after; the hypervisor replaces
    /// them, so they may lie in the kernel's own code section.
    ///
    /// # Panics
    /// When an address is not that of a page.
    pub unsafe fn new(virtual_address: VirtAddr, physical_address: PhysAddr) -> Self {
        assert!(
            virtual_address.is_aligned(PAGE_SIZE as u64),
            "unaligned virtual page address"
        );
        assert!(
            physical_address.is_aligned(PAGE_SIZE as u64),
            "unaligned physical page address"
        );
        Self {
            entry: virtual_address,
            physical: physical_address,
        }
    }

    /// Where the code begins.
    pub(super) fn entry(&self) -> u64 {
        self.entry.as_u64()
    }

    /// The guest physical address.
    pub(super) fn address(&self) -> u64 {
        self.physical.as_u64()
    }
}

/// A place for one page that any code may look for at any time, without a lock.
pub(super) struct Published<T: 'static>(AtomicPtr<T>);

impl<T: Layout> Published<T> {
    /// Nothing yet.
    pub(super) const fn empty() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// Shows `contents` to everyone.
    pub(super) fn publish(&self, contents: &'static T) {
        self.0
            .store(ptr::from_ref(contents).cast_mut(), Ordering::Release);
    }

    /// What has been published.
    pub(super) fn get(&self) -> Option<&'static T> {
        // SAFETY: either null or made from a `&'static T` by `publish`.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }
}
