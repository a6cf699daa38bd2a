//! What the rows of the table do: calls of the driver, and events from the host.

use std::sync::atomic::Ordering;

use vmbus::kmcl::{
    ConfigError, ExternalData, GpadlError, LatencyError, RequestError, SendFailure, State,
    StateError, Timeout,
};
use vmbus::protocol::Status;

use super::rig::{Did, Rig, Said, wait};

/// Every setter: they are methods of the builder that a disabled channel gives back.
pub fn configure(rig: &Rig) -> Did {
    let disabled = rig.take_disabled().unwrap();
    let builder = disabled
        .into_builder()
        .friendly_name("again")
        .maximum_packet_size(512)
        .maximum_packet_count(8)
        .maximum_external_data(4096, 1)
        .client_context_size(16)
        .inline_packet_context_size(16)
        .ring_pages(2, 2);
    rig.put(builder.build(rig.vm.vmbus.client()).unwrap());
    Did::Now(Said::Done)
}

pub fn enable(rig: &Rig) -> Did {
    Did::Now(match rig.enable().unwrap() {
        Ok(()) => {
            assert_eq!(rig.channel().state(), State::Enabled, "it waits for nobody");
            Said::Done
        }
        Err(ConfigError::PrimaryNotOpen) => Said::PrimaryNotOpen,
        Err(error) => panic!("{error}"),
    })
}

pub fn enable_after_primary_closed(rig: &Rig) -> Did {
    rig.disable_primary();
    rig.vm.machine.settle();
    enable(rig)
}

pub fn another_offer(rig: &Rig) -> Did {
    rig.offer_another();
    Did::Now(Said::Done)
}

pub fn offer(rig: &Rig) -> Did {
    rig.offer();
    Did::Now(Said::Done)
}

pub fn host_refuses_to_open(rig: &Rig) -> Did {
    rig.vm.machine.set_open_status(Status::UNSUCCESSFUL);
    Did::Now(Said::Done)
}

pub fn refuse(rig: &Rig) -> Did {
    rig.refuse.store(true, Ordering::SeqCst);
    Did::Now(Said::Done)
}

pub fn nothing(_: &Rig) -> Did {
    Did::Now(Said::Done)
}

fn state_error(error: StateError) -> Said {
    match error {
        StateError::InCallback => Said::InCallback,
        StateError::NotNow(_) => Said::NotNow,
    }
}

pub fn start(rig: &Rig) -> Did {
    Did::Now(match rig.channel().start() {
        Ok(()) => Said::Done,
        Err(error) => state_error(error),
    })
}

pub fn pause(rig: &Rig) -> Did {
    match rig.channel().pause() {
        Ok(paused) => wait(async {
            paused.await;
            Said::Done
        }),
        Err(error) => Did::Now(state_error(error)),
    }
}

pub fn disable(rig: &Rig) -> Did {
    let owner = rig.enabled();
    owner.disable();
    wait(async move {
        match owner.disabled().await {
            Ok(()) => Said::Done,
            Err(error) => state_error(error),
        }
    })
}

pub fn cleanup(rig: &Rig) -> Did {
    rig.drop_owner();
    Did::Now(Said::Done)
}

pub fn rescind(rig: &Rig) -> Did {
    rig.offer();
    let device = rig.device.lock().unwrap().take();
    assert!(rig.vm.machine.rescind(device.unwrap()));
    Did::Now(Said::Done)
}

pub fn primary_closes(rig: &Rig) -> Did {
    rig.disable_primary();
    Did::Now(Said::Done)
}

pub fn primary_pauses(rig: &Rig) -> Did {
    drop(rig.primary().pause().unwrap());
    Did::Now(Said::Done)
}

pub fn primary_resumes(rig: &Rig) -> Did {
    rig.primary().start().unwrap();
    Did::Now(Said::Done)
}

pub fn allocate(rig: &Rig) -> Did {
    let channel = rig.channel();
    drop(channel.allocate_packet().unwrap());
    assert!(channel.packet_memory() >= 1024, "the maximum packet size");
    Did::Now(Said::Done)
}

fn send(rig: &Rig, transaction: bool) -> Did {
    match rig.send(transaction) {
        Ok(()) => Did::Then(rig.whereabouts(), Rig::whereabouts),
        Err(SendFailure::NotOpen) => Did::Now(Said::Rejected),
        Err(error) => panic!("{error}"),
    }
}

pub fn send_message(rig: &Rig) -> Did {
    send(rig, false)
}

pub fn send_transaction(rig: &Rig) -> Did {
    send(rig, true)
}

fn request_error(error: RequestError) -> Said {
    match error {
        RequestError::NotQueued => Said::NotQueued,
        RequestError::Cancelled => Said::Cancelled,
        RequestError::Removed(_) => Said::Removed,
        RequestError::WouldDeadlock => Said::WouldDeadlock,
        error => panic!("{error}"),
    }
}

/// For as long as it takes.
pub fn request(rig: &Rig) -> Did {
    let channel = rig.channel();
    wait(async move {
        match channel
            .request(b"question", ExternalData::new(), Timeout::Never)
            .await
        {
            Ok(_) => Said::Answered,
            Err(error) => request_error(error),
        }
    })
}

/// Blocks, for 100 µs at most. The host does not answer so soon.
pub fn synchronous_request(rig: &Rig) -> Did {
    let none = ExternalData::new();
    let sent = rig.channel().send_synchronous_request(
        b"question",
        none,
        Timeout::After(1000),
        &mut [0; 8],
    );
    Did::Now(sent.map_or_else(request_error, |_| Said::Answered))
}

pub fn try_send(rig: &Rig) -> Did {
    let sent = rig.channel().try_send(b"message!");
    Did::Now(sent.map_or_else(request_error, |()| Said::Done))
}

pub fn create_gpadl(rig: &Rig) -> Did {
    let channel = rig.channel();
    Did::Now(match channel.allocate_gpadl(1) {
        Ok(created) => {
            let gpadl = channel.client().block_on(created).unwrap().unwrap();
            let count = rig.vm.machine.server(|server| server.gpadl_count());
            assert_eq!(count, 2, "the host knows it when the call is over");
            *rig.gpadl.lock().unwrap() = Some(gpadl);
            Said::Done
        }
        Err(GpadlError::NotNow(_)) => Said::NotNow,
        Err(error) => panic!("{error}"),
    })
}

pub fn delete_gpadl(rig: &Rig) -> Did {
    let gpadl = rig.gpadl.lock().unwrap().take();
    let deleted = gpadl.unwrap().delete();
    rig.channel().client().block_on(deleted).unwrap();
    let count = rig.vm.machine.server(|server| server.gpadl_count());
    assert_eq!(count, 1, "the host has let go when the call is over");
    Did::Now(Said::Done)
}

pub fn set_interrupt_latency(rig: &Rig) -> Did {
    Did::Now(match rig.channel().set_interrupt_latency(50) {
        Ok(_) => Said::Done,
        Err(LatencyError::NotOpen(_)) => Said::NotNow,
        Err(error) => panic!("{error}"),
    })
}

pub fn mmio_space(rig: &Rig) -> Did {
    Did::Now(match rig.channel().mmio_space() {
        Some(space) => {
            assert_eq!(space.length, 8 << 20);
            Said::Done
        }
        None => Said::Nothing,
    })
}

pub fn adjust(rig: &Rig) -> Did {
    let channel = rig.channel();
    channel.set_incoming_processing_at_passive(true);
    channel.set_incoming_processing_at_passive(false);
    channel.set_transaction_quota(8);
    channel.set_allowable_dpc_cpu_usage(50);
    Did::Now(Said::Done)
}

pub fn data_packet(rig: &Rig) -> Did {
    rig.host_sends();
    Did::Now(Said::Done)
}

pub fn completion_packet(rig: &Rig) -> Did {
    rig.host_answers();
    Did::Then(rig.request_ended(), Rig::request_ended)
}

pub fn complete_packet(rig: &Rig) -> Did {
    assert_eq!(rig.shelf.lock().unwrap().len(), 1);
    rig.complete_packets();
    Did::Now(Said::Done)
}
