//! A driver as C would be one: the table, and callbacks that write down what they see.

use std::ffi::c_void;
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

use vmbus::ids::ChannelId;
use vmbus::kmcl::abi::*;
use vmbus_host::bus::Profile;

use crate::support::{INTERFACE, Vm};

/// What a callback saw.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    Opened,
    Started,
    PostStarted,
    Suspend,
    Closed,
    PnpFailure(NTSTATUS),
    /// A packet's bytes and flags.
    Packet(Vec<u8>, u32),
    Complete(u32),
    /// A packet to send has ended.
    Sent(VMBPACKET, NTSTATUS, Vec<u8>),
}

/// What to do with a packet in process-packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Then {
    Complete,
    /// With these bytes.
    Answer(u64),
    Keep,
    /// The first time; later deliveries are completed.
    Defer,
    Fail,
}

/// What the callbacks of one driver share: the channel's pointer leads here.
pub struct Book {
    pub calls: Mutex<Vec<Call>>,
    pub kept: Mutex<Vec<VMBPACKETCOMPLETION>>,
    pub then: Mutex<Then>,
    pub opened: Mutex<NTSTATUS>,
    /// Counts calls of the registration before this one, which nobody should see.
    pub strays: AtomicU32,
    table: KMCL_CLIENT_INTERFACE_V5,
}

/// A driver on a machine, with one channel object.
pub struct Caller {
    pub vm: Vm,
    pub device: Device,
    pub table: KMCL_CLIENT_INTERFACE_V5,
    pub book: Rc<Book>,
    pub channel: VMBCHANNEL,
}

/// The table of version 5.
pub fn table(device: &Device) -> KMCL_CLIENT_INTERFACE_V5 {
    let size = size_of::<KMCL_CLIENT_INTERFACE_V5>() as u16;
    match query_interface(device, &KMCL_CLIENT_INTERFACE_TYPE, size, 5) {
        Ok(Table::V5(table)) => table,
        other => panic!("{other:?}"),
    }
}

fn book_at(context: PVOID) -> &'static Book {
    unsafe { &*context.cast::<Book>() }
}

fn bytes(buffer: PVOID, length: u32) -> Vec<u8> {
    if buffer.is_null() {
        assert_eq!(length, 0);
        return Vec::new();
    }
    unsafe { std::slice::from_raw_parts(buffer.cast(), length as usize) }.to_vec()
}

impl Book {
    pub fn note(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }

    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    pub fn kept(&self) -> MutexGuard<'_, Vec<VMBPACKETCOMPLETION>> {
        self.kept.lock().unwrap()
    }

    /// Only the packets and ends of batches.
    pub fn take_packets(&self) -> Vec<Call> {
        let mut calls = self.take();
        calls.retain(|call| matches!(call, Call::Packet(..) | Call::Complete(_)));
        calls
    }

    pub fn context(&self) -> PVOID {
        ptr::from_ref(self).cast_mut().cast()
    }

    fn packet(&self, packet: VMBPACKETCOMPLETION, buffer: PVOID, length: u32, flags: u32) {
        let bytes = bytes(buffer, length);
        self.note(Call::Packet(bytes, flags));
        let then = *self.then.lock().unwrap();
        let complete = |data: &[u8]| unsafe {
            (self.table.VmbChannelPacketComplete)(
                packet,
                data.as_ptr().cast_mut().cast(),
                data.len() as u32,
            );
        };
        match then {
            Then::Complete => complete(&[]),
            Then::Answer(number) => complete(&number.to_le_bytes()),
            Then::Keep => self.kept().push(packet),
            Then::Defer => {
                *self.then.lock().unwrap() = Then::Complete;
                unsafe { (self.table.VmbChannelPacketDeferToPassive)(packet) };
            }
            Then::Fail => unsafe { (self.table.VmbChannelPacketFail)(packet) },
        }
    }
}

pub unsafe extern "win64" fn process_packet_ex(
    _: VMBCHANNEL,
    context: PVOID,
    packet: VMBPACKETCOMPLETION,
    buffer: PVOID,
    length: u32,
    flags: u32,
) {
    book_at(context).packet(packet, buffer, length, flags);
}

pub unsafe extern "win64" fn processing_complete_ex(_: VMBCHANNEL, context: PVOID, count: u32) {
    book_at(context).note(Call::Complete(count));
}

/// Without a context, the book is where the channel's pointer leads.
fn book_of(channel: VMBCHANNEL) -> &'static Book {
    book_at(unsafe { VmbChannelGetPointer(channel) })
}

pub unsafe extern "win64" fn process_packet(
    channel: VMBCHANNEL,
    packet: VMBPACKETCOMPLETION,
    buffer: PVOID,
    length: u32,
    flags: u32,
) {
    book_of(channel).packet(packet, buffer, length, flags);
}

pub unsafe extern "win64" fn processing_complete(channel: VMBCHANNEL, count: u32) {
    book_of(channel).note(Call::Complete(count));
}

/// A registration that another one replaces.
pub unsafe extern "win64" fn stray_packet(
    channel: VMBCHANNEL,
    packet: VMBPACKETCOMPLETION,
    _: PVOID,
    _: u32,
    _: u32,
) {
    let book = book_of(channel);
    book.strays.fetch_add(1, Ordering::SeqCst);
    unsafe { (book.table.VmbChannelPacketComplete)(packet, ptr::null_mut(), 0) };
}

pub unsafe extern "win64" fn sent(packet: VMBPACKET, status: NTSTATUS, buffer: PVOID, length: u32) {
    let channel = unsafe { VmbPacketGetChannel(packet) };
    book_of(channel).note(Call::Sent(packet, status, bytes(buffer, length)));
}

pub unsafe extern "win64" fn sent_ex(
    packet: VMBPACKET,
    context: PVOID,
    status: NTSTATUS,
    buffer: PVOID,
    length: u32,
) {
    book_at(context).note(Call::Sent(packet, status, bytes(buffer, length)));
}

unsafe extern "win64" fn opened_ex(_: VMBCHANNEL, context: PVOID) -> NTSTATUS {
    book_at(context).note(Call::Opened);
    *book_at(context).opened.lock().unwrap()
}

unsafe extern "win64" fn closed_ex(_: VMBCHANNEL, context: PVOID) {
    book_at(context).note(Call::Closed);
}

unsafe extern "win64" fn suspend_ex(_: VMBCHANNEL, context: PVOID) {
    book_at(context).note(Call::Suspend);
}

unsafe extern "win64" fn started_ex(_: VMBCHANNEL, context: PVOID) {
    book_at(context).note(Call::Started);
}

unsafe extern "win64" fn post_started_ex(_: VMBCHANNEL, context: PVOID) {
    book_at(context).note(Call::PostStarted);
}

unsafe extern "win64" fn opened(channel: VMBCHANNEL) -> NTSTATUS {
    book_of(channel).note(Call::Opened);
    *book_of(channel).opened.lock().unwrap()
}

unsafe extern "win64" fn closed(channel: VMBCHANNEL) {
    book_of(channel).note(Call::Closed);
}

unsafe extern "win64" fn suspend(channel: VMBCHANNEL) {
    book_of(channel).note(Call::Suspend);
}

unsafe extern "win64" fn started(channel: VMBCHANNEL) {
    book_of(channel).note(Call::Started);
}

unsafe extern "win64" fn post_started(channel: VMBCHANNEL) {
    book_of(channel).note(Call::PostStarted);
}

pub unsafe extern "win64" fn pnp_failure(channel: VMBCHANNEL, status: NTSTATUS) {
    book_of(channel).note(Call::PnpFailure(status));
}

/// State-change callbacks that write everything down, with a context.
pub fn state_change_v5(book: &Book) -> VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5 {
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5 {
        Version: 5,
        Size: size_of::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5>() as u32,
        CallbackContext: book.context(),
        EvtChannelOpened: Some(opened_ex),
        EvtChannelClosed: Some(closed_ex),
        EvtChannelSuspend: Some(suspend_ex),
        EvtChannelStarted: Some(started_ex),
        EvtChannelPostStarted: Some(post_started_ex),
    }
}

/// The same without a context.
pub fn state_change_v1() -> VMB_CHANNEL_STATE_CHANGE_CALLBACKS {
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS {
        Version: 1,
        Size: size_of::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS>() as u32,
        EvtChannelOpened: Some(opened),
        EvtChannelClosed: Some(closed),
        EvtChannelSuspend: Some(suspend),
        EvtChannelStarted: Some(started),
        EvtChannelPostStarted: Some(post_started),
    }
}

impl Caller {
    /// A driver with a channel object that nothing is set on, on this machine.
    pub fn on(vm: Vm) -> Self {
        let device = Device::new(vm.vmbus.client()).unwrap();
        let table = table(&device);
        let mut channel = VMBCHANNEL::NULL;
        let status = unsafe { (table.VmbChannelAllocate)(device.handle(), 0, &mut channel) };
        assert_eq!(status, STATUS_SUCCESS);
        let book = Rc::new(Book {
            calls: Mutex::default(),
            kept: Mutex::default(),
            then: Mutex::new(Then::Complete),
            opened: Mutex::new(STATUS_SUCCESS),
            strays: AtomicU32::new(0),
            table,
        });
        unsafe { (table.VmbChannelSetPointer)(channel, book.context()) };
        Self {
            vm,
            device,
            table,
            book,
            channel,
        }
    }

    /// On a machine without devices.
    pub fn alone() -> Self {
        let vm = Vm::new(Profile::openvmm());
        vm.connect();
        Self::on(vm)
    }

    /// On a machine with the test's device, whose channel is to be for it, with all callbacks.
    pub fn with_device() -> (Self, ChannelId) {
        let (vm, id) = Vm::with_device();
        let caller = Self::on(vm);
        caller.target(INTERFACE);
        caller.register();
        (caller, id)
    }

    /// The same, enabled and open.
    pub fn active() -> (Self, ChannelId) {
        let (caller, id) = Self::with_device();
        caller.enable();
        assert_eq!(
            caller.book.take(),
            [Call::Opened, Call::Started, Call::PostStarted]
        );
        (caller, id)
    }

    pub fn target(&self, interface: vmbus::protocol::Guid) {
        let interface = GUID::new(interface);
        let status = unsafe {
            (self.table.VmbClientChannelInitSetTargetPnp)(
                self.channel,
                &interface,
                ptr::null(),
                Some(pnp_failure),
            )
        };
        assert_eq!(status, STATUS_SUCCESS);
    }

    /// Registers all callbacks, in their forms with a context.
    pub fn register(&self) {
        let callbacks = state_change_v5(&self.book);
        let status = unsafe {
            (self.table.VmbChannelInitSetStateChangeCallbacks)(
                self.channel,
                ptr::from_ref(&callbacks).cast(),
            )
        };
        assert_eq!(status, STATUS_SUCCESS);
        let status = unsafe {
            (self.table.VmbChannelInitSetProcessPacketCallbacksEx)(
                self.channel,
                self.book.context(),
                Some(process_packet_ex),
                Some(processing_complete_ex),
            )
        };
        assert_eq!(status, STATUS_SUCCESS);
    }

    pub fn enable(&self) {
        assert_eq!(self.try_enable(), STATUS_SUCCESS);
        self.vm.machine.settle();
    }

    pub fn try_enable(&self) -> NTSTATUS {
        unsafe { (self.table.VmbChannelEnable)(self.channel) }
    }

    pub fn disable(&self) {
        unsafe { (self.table.VmbChannelDisable)(self.channel) };
    }

    pub fn allocate_packet(&self) -> VMBPACKET {
        unsafe { (self.table.VmbPacketAllocate)(self.channel) }
    }

    /// A packet whose end is written down.
    pub fn packet(&self) -> VMBPACKET {
        let packet = self.allocate_packet();
        assert!(!packet.is_null());
        unsafe {
            (self.table.VmbPacketSetCompletionRoutineEx)(
                packet,
                self.book.context(),
                Some(sent_ex),
            );
        }
        packet
    }

    pub fn send(&self, packet: VMBPACKET, data: &[u8], flags: u32) -> NTSTATUS {
        unsafe {
            (self.table.VmbPacketSend)(
                packet,
                data.as_ptr().cast_mut().cast(),
                data.len() as u32,
                ptr::null_mut(),
                flags,
            )
        }
    }

    pub fn complete(&self, packet: VMBPACKETCOMPLETION, data: &[u8]) {
        unsafe {
            (self.table.VmbChannelPacketComplete)(
                packet,
                data.as_ptr().cast_mut().cast::<c_void>(),
                data.len() as u32,
            );
        }
    }
}
