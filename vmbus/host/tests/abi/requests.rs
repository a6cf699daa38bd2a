//! Synchronous requests by the table, to a host that answers.

use std::ptr;
use std::sync::Mutex;

use vmbus::kmcl::abi::*;
use vmbus::ring::{Outgoing, PacketBuffer};
use vmbus_host::bus::{Device as Offer, Profile};
use vmbus_host::channel::HostChannel;
use vmbus_host::provider::Provider;

use crate::caller::Caller;
use crate::support::{INSTANCE, INTERFACE, Vm};

const WAIT: u32 = VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION;

/// Answers every request with these bytes.
struct Answering(&'static [u8]);

impl Provider for Answering {
    fn serve(&mut self, _now: u64, channel: &mut HostChannel) {
        let mut packet = PacketBuffer::default();
        while channel.receive(&mut packet).unwrap() {
            if packet.completion_requested() {
                let answer = Outgoing::completion(packet.transaction_id(), self.0);
                channel.push(&answer).unwrap();
            }
        }
        channel.release().unwrap();
        channel.publish().unwrap();
    }
}

/// A driver of a device that answers with 16 bytes.
fn driver() -> Caller {
    let vm = Vm::new(Profile::openvmm());
    let device = Offer::new(INTERFACE, INSTANCE);
    vm.machine
        .add(device, Answering(b"sixteen bytes ok"))
        .unwrap();
    vm.connect();
    let caller = Caller::on(vm);
    caller.target(INTERFACE);
    caller.register();
    caller
}

/// A request with room for `answer`; the status, and how many bytes were written.
fn request(channel: VMBCHANNEL, flags: u32, answer: &mut [u8]) -> (NTSTATUS, u32) {
    let data = *b"request!";
    let mut size = answer.len() as u32;
    let place: PVOID = match answer.len() {
        0 => ptr::null_mut(),
        _ => answer.as_mut_ptr().cast(),
    };
    let status = unsafe {
        VmbChannelSendSynchronousRequest(
            channel,
            data.as_ptr().cast_mut().cast(),
            8,
            ptr::null_mut(),
            flags,
            place,
            &mut size,
            ptr::null(),
        )
    };
    (status, size)
}

#[test]
fn the_answer_is_copied_and_its_length_told() {
    let caller = driver();
    caller.enable();
    let mut answer = [0; 32];
    let (status, size) = request(caller.channel, WAIT, &mut answer);
    assert_eq!((status, size), (STATUS_SUCCESS, 16));
    assert_eq!(&answer[..16], b"sixteen bytes ok");
    assert_eq!(answer[16..], [0; 16]);
}

#[test]
fn an_answer_longer_than_its_place_is_a_buffer_overflow_unless_no_place_is_given() {
    let caller = driver();
    caller.enable();
    let mut answer = [0; 8];
    assert_eq!(
        request(caller.channel, WAIT, &mut answer).0,
        STATUS_BUFFER_OVERFLOW
    );
    assert_eq!(answer, [0; 8]);
    assert_eq!(request(caller.channel, WAIT, &mut []).0, STATUS_SUCCESS);
}

#[test]
fn without_wait_it_is_over_when_the_message_has_entered_the_ring() {
    let caller = driver();
    caller.enable();
    assert_eq!(request(caller.channel, 0, &mut []), (STATUS_SUCCESS, 0));
}

#[test]
fn a_channel_that_is_not_enabled_is_device_removed() {
    let caller = driver();
    assert_eq!(
        request(caller.channel, WAIT, &mut [0; 16]).0,
        STATUS_DEVICE_REMOVED
    );
    caller.enable();
    caller.disable();
    assert_eq!(
        request(caller.channel, WAIT, &mut [0; 16]).0,
        STATUS_DEVICE_REMOVED
    );
}

/// What a request in each of the state-change callbacks ended with.
static ENDS: Mutex<Vec<(usize, &str, NTSTATUS)>> = Mutex::new(Vec::new());

fn note(channel: VMBCHANNEL, place: &'static str) {
    let (status, _) = request(channel, WAIT, &mut [0; 16]);
    ENDS.lock().unwrap().push((channel.0, place, status));
}

unsafe extern "win64" fn in_opened(channel: VMBCHANNEL) -> NTSTATUS {
    note(channel, "opened");
    STATUS_SUCCESS
}

unsafe extern "win64" fn in_started(channel: VMBCHANNEL) {
    note(channel, "started");
}

unsafe extern "win64" fn in_post_started(channel: VMBCHANNEL) {
    note(channel, "post-started");
}

/// Section 6.3 of the sheet: where it would hang on Windows, it is refused here.
#[test]
fn in_opened_and_started_it_is_refused_and_in_post_started_it_works() {
    let caller = driver();
    let callbacks = VMB_CHANNEL_STATE_CHANGE_CALLBACKS {
        Version: 1,
        Size: size_of::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS>() as u32,
        EvtChannelOpened: Some(in_opened),
        EvtChannelClosed: None,
        EvtChannelSuspend: None,
        EvtChannelStarted: Some(in_started),
        EvtChannelPostStarted: Some(in_post_started),
    };
    let set = unsafe { VmbChannelInitSetStateChangeCallbacks(caller.channel, &callbacks) };
    assert_eq!(set, STATUS_SUCCESS);
    caller.enable();
    let ends: Vec<_> = ENDS
        .lock()
        .unwrap()
        .iter()
        .filter(|(channel, ..)| *channel == caller.channel.0)
        .map(|&(_, place, status)| (place, status))
        .collect();
    assert_eq!(
        ends,
        [
            ("opened", STATUS_INVALID_DEVICE_STATE),
            ("started", STATUS_INVALID_DEVICE_STATE),
            ("post-started", STATUS_SUCCESS),
        ]
    );
}
