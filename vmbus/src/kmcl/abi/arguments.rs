//! Arguments as C hands them over, made safe to work with: the caller's promise is taken once, here.

use core::ffi::c_void;
use core::slice;

use super::callbacks::{
    PFN_VMB_CHANNEL_PNP_FAILURE, PFN_VMB_CHANNEL_PROCESS_PACKET, PFN_VMB_CHANNEL_PROCESS_PACKET_EX,
    PFN_VMB_CHANNEL_PROCESSING_COMPLETE, PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX,
    PFN_VMB_CHANNEL_RESTORE_PACKET, PFN_VMB_CHANNEL_RESTORE_PACKET_EX, PFN_VMB_CHANNEL_SAVE_PACKET,
    PFN_VMB_CHANNEL_SAVE_PACKET_EX, PFN_VMB_PACKET_COMPLETION_ROUTINE,
    PFN_VMB_PACKET_COMPLETION_ROUTINE_EX,
};
use super::types::{GUID, PDEVICE_OBJECT, PVOID, VMBCHANNEL, VMBPACKET, VMBPACKETCOMPLETION};

/// What an argument of C becomes.
pub(super) trait Argument {
    /// Its safe form.
    type Safe;

    /// The safe form.
    ///
    /// # Safety
    ///
    /// A pointer is null or valid for what its parameter is for, as long as the safe form is used.
    unsafe fn into_safe(self) -> Self::Safe;
}

/// Arguments that are what they are.
macro_rules! plain {
    ($($ty:ty),+ $(,)?) => {$(
        impl Argument for $ty {
            type Safe = Self;

            unsafe fn into_safe(self) -> Self {
                self
            }
        }
    )+};
}

plain!(
    u8,
    u16,
    u32,
    u64,
    GUID,
    VMBCHANNEL,
    VMBPACKET,
    VMBPACKETCOMPLETION,
    PDEVICE_OBJECT,
    PFN_VMB_CHANNEL_PNP_FAILURE,
    PFN_VMB_CHANNEL_PROCESS_PACKET,
    PFN_VMB_CHANNEL_PROCESS_PACKET_EX,
    PFN_VMB_CHANNEL_PROCESSING_COMPLETE,
    PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX,
    PFN_VMB_CHANNEL_RESTORE_PACKET,
    PFN_VMB_CHANNEL_RESTORE_PACKET_EX,
    PFN_VMB_CHANNEL_SAVE_PACKET,
    PFN_VMB_CHANNEL_SAVE_PACKET_EX,
    PFN_VMB_PACKET_COMPLETION_ROUTINE,
    PFN_VMB_PACKET_COMPLETION_ROUTINE_EX,
);

/// Memory of the caller that a function writes to, and perhaps reads.
#[derive(Debug)]
pub(super) struct Out<T>(*mut T);

/// Memory of the caller that a function reads.
#[derive(Debug)]
pub(super) struct In<T>(*const T);

/// Untyped memory of the caller.
pub(super) type Memory = Out<c_void>;

impl<T> Argument for *mut T {
    type Safe = Out<T>;

    unsafe fn into_safe(self) -> Out<T> {
        Out(self)
    }
}

impl<T> Argument for *const T {
    type Safe = In<T>;

    unsafe fn into_safe(self) -> In<T> {
        In(self)
    }
}

impl<T> Out<T> {
    pub(super) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The address itself.
    pub(super) fn raw(&self) -> *mut T {
        self.0
    }

    /// Writes the value, if there is a place for it.
    pub(super) fn write(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: valid for a value of this type, by the caller's promise; it need not be aligned.
            unsafe { self.0.write_unaligned(value) };
        }
    }
}

impl<T> Out<T> {
    /// The same memory as another type, which must be one that the parameter may be, too.
    pub(super) fn cast<U>(&self) -> Out<U> {
        Out(self.0.cast())
    }
}

impl<T: Copy> Out<T> {
    /// The value, if there is one.
    pub(super) fn read(&self) -> Option<T> {
        In(self.0.cast_const()).read()
    }

    /// `count` values, copied to where `each` takes them.
    pub(super) fn for_each(&self, count: usize, mut each: impl FnMut(T)) {
        for index in 0..count {
            // SAFETY: the caller promised `count` values.
            let place = unsafe { self.0.add(index) };
            if let Some(value) = Out(place).read() {
                each(value);
            }
        }
    }

    /// Writes the values one behind the other.
    pub(super) fn write_all(&self, values: impl Iterator<Item = T>) {
        for (index, value) in values.enumerate() {
            // SAFETY: the caller promised room for all of them.
            let place = unsafe { self.0.add(index) };
            Out(place).write(value);
        }
    }
}

impl<T: Copy> In<T> {
    /// The value, if there is one.
    pub(super) fn read(&self) -> Option<T> {
        if self.0.is_null() {
            return None;
        }
        // SAFETY: valid for a value of this type, by the caller's promise; it need not be aligned.
        Some(unsafe { self.0.read_unaligned() })
    }
}

impl<T> In<T> {
    /// The same memory as another type, which must be one that the parameter may be, too.
    pub(super) fn cast<U>(&self) -> In<U> {
        In(self.0.cast())
    }

    /// The value behind the first `index` ones.
    pub(super) fn offset(&self, index: usize) -> In<T> {
        In(self.0.wrapping_add(index))
    }
}

impl Memory {
    /// The bytes; nothing for null with a length.
    pub(super) fn bytes(&self, length: u32) -> Option<&[u8]> {
        if length == 0 {
            return Some(&[]);
        }
        if self.0.is_null() {
            return None;
        }
        // SAFETY: the caller promised this many bytes, which nobody writes to during the call.
        Some(unsafe { slice::from_raw_parts(self.0.cast(), length as usize) })
    }

    /// The bytes, to be written.
    pub(super) fn bytes_mut(&mut self, length: u32) -> Option<&mut [u8]> {
        if length == 0 {
            return Some(&mut []);
        }
        if self.0.is_null() {
            return None;
        }
        // SAFETY: the caller promised this many bytes, which nobody else uses during the call.
        let bytes = unsafe { slice::from_raw_parts_mut(self.0.cast::<u8>(), length as usize) };
        Some(bytes)
    }

    /// Memory of the library, as C gets it.
    pub(super) fn into_c(self) -> PVOID {
        self.0
    }
}
