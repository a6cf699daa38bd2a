//! GPADLs as C has them: handles, kept with their memory until they are deleted (spec kmcl.md 1.10).

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::arguments::{Memory, Out};
use super::memory::{self, Piece};
use super::object::ChannelObject;
use super::types::{
    MDL, NTSTATUS, PFN_NUMBER, PVOID, STATUS_CANCELLED, STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_DEVICE_STATE, STATUS_INVALID_PARAMETER_1, STATUS_INVALID_PARAMETER_2,
    STATUS_INVALID_PARAMETER_3, STATUS_INVALID_PARAMETER_4, STATUS_INVALID_PARAMETER_5,
    STATUS_INVALID_PARAMETER_6, STATUS_SUCCESS, STATUS_UNSUCCESSFUL, VMBCHANNEL,
    VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY, VMBUS_CHANNEL_GPADL_FLAGS,
};
use crate::kmcl::{Gpadl, GpadlAccess, GpadlError, GpadlSource};

/// The GPADLs of a channel.
#[derive(Default)]
pub(super) struct Lent(Vec<Owned>);

struct Owned {
    gpadl: Gpadl,
    /// Whether the library allocated the memory.
    allocated: bool,
}

impl Lent {
    fn find(&self, handle: u32) -> Option<&Owned> {
        self.0.iter().find(|owned| owned.gpadl.handle().0 == handle)
    }

    fn take(&mut self, handle: u32) -> Option<Owned> {
        let at = self
            .0
            .iter()
            .position(|owned| owned.gpadl.handle().0 == handle)?;
        Some(self.0.swap_remove(at))
    }

    /// Lets go of all that are left.
    pub(super) fn clear(&mut self) -> impl Sized + use<> {
        core::mem::take(&mut self.0)
    }
}

/// What of a GPADL's arguments is wrong, and how to say so.
struct Request {
    channel: VMBCHANNEL,
    flags: u32,
    allocated: bool,
}

impl Request {
    /// Lends memory and waits for the host's word.
    fn create(
        self,
        handle: &Out<u32>,
        handle_is_bad: NTSTATUS,
        source: impl FnOnce(&ChannelObject) -> Result<GpadlSource, NTSTATUS>,
    ) -> NTSTATUS {
        let create = || -> Result<(), NTSTATUS> {
            let object = ChannelObject::find(self.channel).ok_or(STATUS_INVALID_PARAMETER_1)?;
            let channel = object.open_channel().ok_or(STATUS_INVALID_PARAMETER_1)?;
            if self.flags & !VMBUS_CHANNEL_GPADL_FLAGS != 0 {
                return Err(STATUS_INVALID_PARAMETER_2);
            }
            if handle.is_null() {
                return Err(handle_is_bad);
            }
            if !object.is_passive() {
                return Err(STATUS_INVALID_DEVICE_STATE);
            }
            let access = match self.flags & VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY {
                0 => GpadlAccess::ReadWrite,
                _ => GpadlAccess::ReadOnly,
            };
            let source = source(&object)?;
            let creating = channel.create_gpadl(source, access).map_err(status_of)?;
            let gpadl = object
                .client
                .block_on(creating)
                .map_err(|_| STATUS_INVALID_DEVICE_STATE)?
                .map_err(status_of)?;
            handle.write(gpadl.handle().0);
            object.lent.lock().0.push(Owned {
                gpadl,
                allocated: self.allocated,
            });
            Ok(())
        };
        create().err().unwrap_or(STATUS_SUCCESS)
    }
}

fn status_of(error: GpadlError) -> NTSTATUS {
    match error {
        GpadlError::NotNow(_) => STATUS_INVALID_PARAMETER_1,
        GpadlError::Length => STATUS_INVALID_PARAMETER_4,
        GpadlError::NotAligned => STATUS_INVALID_PARAMETER_3,
        GpadlError::NoMemory(_) => STATUS_INSUFFICIENT_RESOURCES,
        GpadlError::Host(crate::bus::GpadlError::Rescinded) => STATUS_CANCELLED,
        GpadlError::Bus(_) | GpadlError::Host(_) => STATUS_UNSUCCESSFUL,
    }
}

pub(super) fn create_from_buffer(
    channel: VMBCHANNEL,
    flags: u32,
    buffer: Memory,
    bytes: u32,
    handle: Out<u32>,
) -> NTSTATUS {
    let request = Request {
        channel,
        flags,
        allocated: false,
    };
    request.create(&handle, STATUS_INVALID_PARAMETER_5, |_| {
        memory::find_bytes(&buffer, 0).ok_or(STATUS_INVALID_PARAMETER_3)?;
        let piece = memory::find_bytes(&buffer, bytes as usize)
            .filter(|(_, range)| !range.is_empty())
            .ok_or(STATUS_INVALID_PARAMETER_4)?;
        Ok(GpadlSource::Pieces(alloc::vec![piece]))
    })
}

pub(super) fn create_from_mdl(
    channel: VMBCHANNEL,
    flags: u32,
    mdl: Out<MDL>,
    offset: u32,
    bytes: u32,
    handle: Out<u32>,
) -> NTSTATUS {
    let request = Request {
        channel,
        flags,
        allocated: false,
    };
    request.create(&handle, STATUS_INVALID_PARAMETER_6, |_| {
        let piece = Piece {
            offset,
            length: bytes,
            forced: false,
        };
        memory::pieces_of_mdl(&mdl, &piece)
    })
}

pub(super) fn create_from_pfn_list(
    channel: VMBCHANNEL,
    flags: u32,
    pages: Out<PFN_NUMBER>,
    count: u32,
    handle: Out<u32>,
) -> NTSTATUS {
    let request = Request {
        channel,
        flags,
        allocated: false,
    };
    request.create(&handle, STATUS_INVALID_PARAMETER_5, |_| {
        if pages.is_null() {
            return Err(STATUS_INVALID_PARAMETER_3);
        }
        if count == 0 {
            return Err(STATUS_INVALID_PARAMETER_4);
        }
        Ok(GpadlSource::PageNumbers {
            pages: memory::read_numbers(&pages, count)?,
            // The driver keeps them.
            owner: Arc::new(()),
        })
    })
}

pub(super) fn create(channel: VMBCHANNEL, flags: u32, count: u32, handle: Out<u32>) -> NTSTATUS {
    let request = Request {
        channel,
        flags,
        allocated: true,
    };
    request.create(&handle, STATUS_INVALID_PARAMETER_4, |object| {
        if count == 0 {
            return Err(STATUS_INVALID_PARAMETER_3);
        }
        let hypervisor = &object.client.inner().hypervisor;
        match hypervisor.share_pages(count as usize) {
            Ok(pages) => Ok(GpadlSource::Pages(pages)),
            Err(_) => Err(STATUS_INSUFFICIENT_RESOURCES),
        }
    })
}

pub(super) fn get_system_address(
    channel: VMBCHANNEL,
    _flags: u32,
    handle: u32,
    address: Out<PVOID>,
) -> NTSTATUS {
    let Some(object) = ChannelObject::find(channel) else {
        return STATUS_INVALID_PARAMETER_1;
    };
    if !object.is_passive() {
        return STATUS_INVALID_DEVICE_STATE;
    }
    let lent = object.lent.lock();
    let start = lent
        .find(handle)
        .filter(|owned| owned.allocated)
        .and_then(|owned| owned.gpadl.memory())
        .map(memory::start_of);
    let Some(start) = start else {
        return STATUS_INVALID_PARAMETER_3;
    };
    if address.is_null() {
        return STATUS_INVALID_PARAMETER_4;
    }
    address.write(start);
    STATUS_SUCCESS
}

pub(super) fn delete(channel: VMBCHANNEL, handle: u32) {
    let found = ChannelObject::find(channel).filter(|object| object.is_passive());
    let owned = found
        .as_ref()
        .and_then(|object| object.lent.lock().take(handle));
    let (Some(object), Some(owned)) = (found, owned) else {
        log::error!("driver bug: GPADL {handle:#x} of {channel:?} is deleted, which cannot be");
        return;
    };
    if let Err(error) = object.client.block_on(owned.gpadl.delete()) {
        log::error!("driver bug: deleting GPADL {handle:#x}: {error}; it goes in the background");
    }
}
