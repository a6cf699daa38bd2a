//! Devices as C has them, what drivers ask them for, and drivers written in C.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt;
use core::ptr;

use spin::Mutex;

use super::arguments::{In, Out};
use super::callbacks::{PVMB_DRIVER_ATTEND, PVMB_DRIVER_START, PVMB_DRIVER_STOP};
use super::handles::{BUSY, Handle, Kind, Published, Slots};
use super::table::{
    KMCL_CLIENT_INTERFACE_V1, KMCL_CLIENT_INTERFACE_V2, KMCL_CLIENT_INTERFACE_V3,
    KMCL_CLIENT_INTERFACE_V4, KMCL_CLIENT_INTERFACE_V5, KMCL_SERVER_INTERFACE_V5,
};
use super::types::{
    GUID, INTERFACE, KMCL_CLIENT_INTERFACE_TYPE, NTSTATUS, PDEVICE_OBJECT, PVOID,
    STATUS_INSUFFICIENT_RESOURCES, STATUS_INVALID_PARAMETER, STATUS_INVALID_PARAMETER_1,
    STATUS_INVALID_PARAMETER_2, STATUS_INVALID_PARAMETER_3, STATUS_INVALID_PARAMETER_4,
    STATUS_NOT_SUPPORTED, STATUS_SUCCESS, VMB_DRIVER,
};
use crate::kmcl::Client;

/// The slot has a device.
const LIVE: u8 = 2;

static DEVICES: Slots<Place> = Slots::new();

#[derive(Default)]
struct Place {
    client: Published<Client>,
}

/// A VMBus as drivers in C are given it. Dropping it ends the handle; channels that were allocated on it stay.
#[derive(Debug)]
pub struct Device(PDEVICE_OBJECT);

impl Device {
    /// A handle for this client. `None`: there are too many.
    pub fn new(client: &Client) -> Option<Self> {
        let (owner, generation, slot) = DEVICES.claim(1 << 14)?;
        slot.value.client.replace(Some(client.clone()));
        slot.advance(generation, BUSY, LIVE);
        let handle = Handle {
            kind: Kind::Device,
            owner,
            index: 0,
            generation,
        };
        Some(Self(PDEVICE_OBJECT(handle.encode())))
    }

    /// What C is handed.
    pub fn handle(&self) -> PDEVICE_OBJECT {
        self.0
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let Some(handle) = Handle::decode(self.0.0, Kind::Device) else {
            return;
        };
        if let Some(slot) = DEVICES.get(handle.owner)
            && slot.advance(handle.generation, LIVE, BUSY)
        {
            let client = slot.value.client.replace(None);
            DEVICES.release(handle.owner, slot, handle.generation);
            drop(client);
        }
    }
}

/// The client behind a handle, if it is one.
pub(super) fn find(device: PDEVICE_OBJECT) -> Option<Client> {
    let handle = Handle::decode(device.0, Kind::Device)?;
    let slot = DEVICES.get(handle.owner)?;
    slot.state(handle.generation)?;
    slot.value.client.get()
}

/// A client table of one of its versions.
#[derive(Clone, Copy, Debug)]
pub enum Table {
    /// Version 1.
    V1(KMCL_CLIENT_INTERFACE_V1),
    /// Version 2.
    V2(KMCL_CLIENT_INTERFACE_V2),
    /// Version 3.
    V3(KMCL_CLIENT_INTERFACE_V3),
    /// Version 4.
    V4(KMCL_CLIENT_INTERFACE_V4),
    /// Version 5.
    V5(KMCL_CLIENT_INTERFACE_V5),
}

/// Hands out the client table, as a query-interface request does: `interface` says which, `size` is that of the caller's structure.
///
/// # Errors
///
/// STATUS_NOT_SUPPORTED: another interface, the server's included, or a version that there is not.
/// STATUS_INVALID_PARAMETER_4: the size is not that of this version's table.
pub fn query_interface(
    device: &Device,
    interface: &GUID,
    size: u16,
    version: u16,
) -> Result<Table, NTSTATUS> {
    query(device.handle(), interface, size, version)
}

fn query(
    device: PDEVICE_OBJECT,
    interface: &GUID,
    size: u16,
    version: u16,
) -> Result<Table, NTSTATUS> {
    if *interface != KMCL_CLIENT_INTERFACE_TYPE {
        return Err(STATUS_NOT_SUPPORTED);
    }
    let header = header(device, size, version);
    let (need, table) = match version {
        1 => (
            size_of::<KMCL_CLIENT_INTERFACE_V1>(),
            Table::V1(KMCL_CLIENT_INTERFACE_V1::new(header)),
        ),
        2 => (
            size_of::<KMCL_CLIENT_INTERFACE_V2>(),
            Table::V2(KMCL_CLIENT_INTERFACE_V2::new(header)),
        ),
        3 => (
            size_of::<KMCL_CLIENT_INTERFACE_V3>(),
            Table::V3(KMCL_CLIENT_INTERFACE_V3::new(header)),
        ),
        4 => (
            size_of::<KMCL_CLIENT_INTERFACE_V4>(),
            Table::V4(KMCL_CLIENT_INTERFACE_V4::new(header)),
        ),
        5 => (
            size_of::<KMCL_CLIENT_INTERFACE_V5>(),
            Table::V5(KMCL_CLIENT_INTERFACE_V5::new(header)),
        ),
        _ => return Err(STATUS_NOT_SUPPORTED),
    };
    if usize::from(size) != need {
        return Err(STATUS_INVALID_PARAMETER_4);
    }
    Ok(table)
}

fn header(device: PDEVICE_OBJECT, size: u16, version: u16) -> INTERFACE {
    INTERFACE {
        Size: size,
        Version: version,
        Context: ptr::without_provenance_mut(device.0),
        InterfaceReference: Some(reference),
        InterfaceDereference: Some(reference),
    }
}

/// The functions are part of the kernel: there is nothing to count.
unsafe extern "win64" fn reference(_context: PVOID) {}

/// The server table of version 5 as it would be: a query never gives it, and its functions for servers refuse.
pub fn server_table(device: &Device) -> KMCL_SERVER_INTERFACE_V5 {
    // A few hundred bytes.
    let size = size_of::<KMCL_SERVER_INTERFACE_V5>() as u16;
    KMCL_SERVER_INTERFACE_V5::new(header(device.handle(), size, 5))
}

pub(super) fn query_interface_c(
    device: PDEVICE_OBJECT,
    interface: In<GUID>,
    into: Out<INTERFACE>,
    size: u16,
    version: u16,
) -> NTSTATUS {
    if find(device).is_none() {
        return STATUS_INVALID_PARAMETER_1;
    }
    let Some(interface) = interface.read() else {
        return STATUS_INVALID_PARAMETER_2;
    };
    if into.is_null() {
        return STATUS_INVALID_PARAMETER_3;
    }
    match query(device, &interface, size, version) {
        Ok(Table::V1(table)) => into.cast().write(table),
        Ok(Table::V2(table)) => into.cast().write(table),
        Ok(Table::V3(table)) => into.cast().write(table),
        Ok(Table::V4(table)) => into.cast().write(table),
        Ok(Table::V5(table)) => into.cast().write(table),
        Err(status) => return status,
    }
    STATUS_SUCCESS
}

pub(super) fn log(device: PDEVICE_OBJECT, text: In<u8>) {
    if find(device).is_none() {
        return;
    }
    let bytes: Vec<u8> = (0..200)
        .map_while(|index| text.offset(index).read())
        .take_while(|&byte| byte != 0)
        .collect();
    log::info!(
        "{}",
        bytes
            .utf8_chunks()
            .map(|chunk| chunk.valid())
            .collect::<alloc::string::String>()
    );
}

/// A driver written in C, as its object file exports it. Only C makes one:
/// `unsafe extern "C" { safe static NAME: Driver; }`.
#[repr(transparent)]
#[derive(Debug)]
pub struct Driver(VMB_DRIVER);

// SAFETY: the name is a constant text and the functions are code; nobody writes to a driver's description.
unsafe impl Sync for Driver {}

/// A driver in C that runs. Dropping it stops the driver.
pub struct RunningDriver {
    device: Device,
    stop: PVMB_DRIVER_STOP,
    /// Held while the driver attends to its channels.
    attend: Mutex<PVMB_DRIVER_ATTEND>,
    /// The driver's own memory.
    extension: Box<[UnsafeCell<u128>]>,
}

// SAFETY: the memory is the driver's, which synchronises its callbacks itself; nothing here looks at it.
unsafe impl Send for RunningDriver {}
// SAFETY: as above.
unsafe impl Sync for RunningDriver {}

impl RunningDriver {
    /// Starts a driver. At PASSIVE.
    ///
    /// # Errors
    ///
    /// What its start function returned; STATUS_INSUFFICIENT_RESOURCES without memory for it, STATUS_INVALID_PARAMETER
    /// when it has no start or stop function.
    pub fn start(client: &Client, Driver(driver): &'static Driver) -> Result<Self, NTSTATUS> {
        let (Some(start), Some(_)): (PVMB_DRIVER_START, PVMB_DRIVER_STOP) =
            (driver.Start, driver.Stop)
        else {
            return Err(STATUS_INVALID_PARAMETER);
        };
        let units = usize::try_from(driver.ExtensionSize)
            .map_err(|_| STATUS_INSUFFICIENT_RESOURCES)?
            .div_ceil(size_of::<u128>());
        let mut extension = Vec::new();
        extension
            .try_reserve_exact(units)
            .map_err(|_| STATUS_INSUFFICIENT_RESOURCES)?;
        extension.resize_with(units, || UnsafeCell::new(0));
        let device = Device::new(client).ok_or(STATUS_INSUFFICIENT_RESOURCES)?;
        let mut this = Self {
            device,
            stop: None,
            attend: Mutex::new(driver.Attend),
            extension: extension.into_boxed_slice(),
        };
        // SAFETY: the driver's own function; device and memory last until its stop function has returned.
        let status = unsafe { start(this.device.handle(), this.memory()) };
        if !status.is_success() {
            return Err(status);
        }
        this.stop = driver.Stop;
        Ok(this)
    }

    /// Has the driver enable again what has ended, if it wants to. At PASSIVE, after each piece of the bus's work.
    pub fn attend(&self) {
        if let Some(attend) = self.attend.try_lock()
            && let Some(attend) = *attend
        {
            // SAFETY: the driver's own function, with what its start function was given.
            unsafe { attend(self.device.handle(), self.memory()) };
        }
    }

    fn memory(&self) -> PVOID {
        self.extension.as_ptr().cast_mut().cast()
    }
}

impl Drop for RunningDriver {
    fn drop(&mut self) {
        if let Some(stop) = self.stop {
            // SAFETY: the driver's own function, with what its start function was given.
            unsafe { stop(self.device.handle(), self.memory()) };
        }
    }
}

impl fmt::Debug for RunningDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningDriver")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}
