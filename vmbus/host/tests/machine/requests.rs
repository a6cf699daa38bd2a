//! Requests: waiting for the answer to a packet, at every level, with every way in which it can end.

use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use proptest::prelude::*;
use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    AllocateError, Answer, Channel, ChannelBuilder, ChannelError, EnabledChannel, ExternalData,
    Level, PageNumber, Request, RequestError, SendFailure, SharedPages, State, Timeout,
};
use vmbus::protocol::MessageType;
use vmbus::ring::{Outgoing, PacketBuffer};
use vmbus_host::bus::{Device, Fault, Profile, Rule};
use vmbus_host::channel::HostChannel;
use vmbus_host::provider::{Manual, Provider};

use crate::support::{INSTANCE, INTERFACE, Journal, Shelf, Vm, is_active, number, received};

/// A host that answers every request with these bytes.
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

/// Counts how often it is woken.
#[derive(Default)]
struct Wakes(AtomicU32);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A request that a test polls by hand.
struct Polled {
    request: Request,
    wakes: Arc<Wakes>,
}

impl Polled {
    fn new(request: Request) -> Self {
        Self {
            request,
            wakes: Arc::default(),
        }
    }

    fn poll(&mut self) -> Poll<Result<Answer, RequestError>> {
        let waker = Waker::from(self.wakes.clone());
        let mut context = Context::from_waker(&waker);
        Future::poll(Pin::new(&mut self.request), &mut context)
    }

    fn wakes(&self) -> u32 {
        self.wakes.0.load(Ordering::SeqCst)
    }

    #[track_caller]
    fn assert_pending(&mut self) {
        assert!(matches!(self.poll(), Poll::Pending));
    }

    #[track_caller]
    fn assert_answer(&mut self, bytes: &[u8]) {
        match self.poll() {
            Poll::Ready(Ok(answer)) => assert_eq!(&*answer, bytes),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn assert_error(&mut self, expected: RequestError) {
        match self.poll() {
            Poll::Ready(Err(error)) => assert_eq!(error, expected),
            other => panic!("{other:?}"),
        }
    }
}

struct Open {
    vm: Vm,
    id: ChannelId,
    channel: EnabledChannel,
}

fn builder() -> ChannelBuilder {
    Journal::default()
        .builder(|_, packet| packet.complete(&[]))
        .ring_pages(1, 1)
        .maximum_packet_size(1900)
        .maximum_packet_count(8)
        .maximum_external_data(8192, 2)
}

/// An open channel whose host the test plays.
fn open() -> Open {
    open_with(builder())
}

fn open_with(builder: ChannelBuilder) -> Open {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(&builder);
    assert!(is_active(&channel));
    Open { vm, id, channel }
}

/// A guest on a host that answers by itself.
fn answering(answer: &'static [u8], builder: &ChannelBuilder) -> (Vm, ChannelId, EnabledChannel) {
    let vm = Vm::new(Profile::openvmm());
    let device = Device::new(INTERFACE, INSTANCE);
    let id = vm.machine.add(device, Answering(answer)).unwrap();
    vm.connect();
    let channel = vm.enable(builder);
    assert!(is_active(&channel));
    (vm, id, channel)
}

impl Open {
    fn channel(&self) -> &Channel {
        self.channel.channel()
    }

    fn request(&self, data: &[u8], timeout: Timeout) -> Polled {
        Polled::new(self.channel().request(data, ExternalData::new(), timeout))
    }

    /// A large request that lends one page.
    fn lend(&self, page: &SharedPages, timeout: Timeout) -> Polled {
        let mut external = ExternalData::new();
        external.push(page.clone(), 0..4096).unwrap();
        Polled::new(self.channel().request(&large(9), external, timeout))
    }

    /// Transaction ids of the requests that have come to the host.
    fn transactions(&self) -> Vec<u64> {
        self.vm
            .host(self.id, received)
            .into_iter()
            .filter_map(|(id, _)| id)
            .collect()
    }

    /// First words of the packets that have come to the host.
    fn numbers(&self) -> Vec<u64> {
        self.vm
            .host(self.id, received)
            .into_iter()
            .map(|(_, payload)| number(&payload))
            .collect()
    }

    fn answer(&self, id: u64, bytes: &[u8]) {
        self.vm.host(self.id, |host| {
            host.send(&Outgoing::completion(id, bytes)).unwrap();
        });
    }

    /// Fills the outgoing ring, so that every packet has to wait.
    fn fill(&self) {
        for n in 0..2u64 {
            let mut data = [0; 1900];
            data[..8].copy_from_slice(&n.to_le_bytes());
            self.channel().send_message(&data).unwrap();
        }
        let before = self.channel().counters().ring_full_waits;
        assert_eq!(before, 0);
    }
}

/// A packet of 1900 bytes that begins with `n`.
fn large(n: u64) -> [u8; 1900] {
    let mut data = [0; 1900];
    data[..8].copy_from_slice(&n.to_le_bytes());
    data
}

fn page() -> SharedPages {
    SharedPages::from_heap(PageNumber(0x99), 1).unwrap()
}

#[test]
fn a_request_is_sent_at_once_and_ends_with_the_answer() {
    let open = open();
    let mut request = open.request(b"question", Timeout::Never);
    let ids = open.transactions();
    assert_eq!(ids.len(), 1, "before anybody polls");
    request.assert_pending();
    assert_eq!(request.wakes(), 0);
    open.answer(ids[0], b"answer!!");
    assert_eq!(request.wakes(), 1);
    request.assert_answer(b"answer!!");
    open.vm.assert_well_behaved();
}

#[test]
fn the_completion_wakes_the_waiter_at_dispatch() {
    let open = open();
    let mut request = open.request(b"question", Timeout::Never);
    request.assert_pending();
    let ids = open.transactions();
    let work = open.vm.machine.work_requests();
    open.answer(ids[0], &[]);
    assert_eq!(request.wakes(), 1, "in the interrupt handler");
    assert_eq!(open.vm.machine.work_requests(), work);
}

#[test]
fn only_the_last_waker_is_woken() {
    let open = open();
    let mut request = open.request(b"question", Timeout::Never);
    request.assert_pending();
    let first = std::mem::take(&mut request.wakes);
    request.assert_pending();
    let id = open.transactions()[0];
    open.answer(id, &[]);
    assert_eq!(first.0.load(Ordering::SeqCst), 0);
    assert_eq!(request.wakes(), 1);
}

#[test]
fn requests_end_in_the_order_of_their_answers() {
    let open = open();
    let mut requests: Vec<_> = (0..4u64)
        .map(|n| open.request(&n.to_le_bytes(), Timeout::Never))
        .collect();
    let ids = open.transactions();
    for n in [2, 0, 3, 1] {
        open.answer(ids[n], &[n as u8; 8]);
        for (index, request) in requests.iter_mut().enumerate() {
            if index == n {
                request.assert_answer(&[n as u8; 8]);
            }
        }
    }
    assert_eq!(open.channel().counters().unknown_completions, 0);
}

#[test]
fn a_request_without_room_waits_in_order() {
    let open = open();
    open.fill();
    let mut first = open.request(&large(2), Timeout::Never);
    let mut second = open.request(&3u64.to_le_bytes(), Timeout::Never);
    open.vm.machine.settle();
    first.assert_pending();
    second.assert_pending();
    assert_eq!(open.numbers(), [0, 1]);
    let ids = open.transactions();
    assert_eq!(ids.len(), 2, "and goes when there is room");
    open.answer(ids[1], b"second!!");
    open.answer(ids[0], b"first!!!");
    first.assert_answer(b"first!!!");
    second.assert_answer(b"second!!");
}

#[test]
fn a_request_before_the_channel_is_open_waits_for_that() {
    let vm = Vm::new(Profile::openvmm());
    let device = Device::new(INTERFACE, INSTANCE);
    vm.machine.add(device, Answering(b"answer!!")).unwrap();
    let channel = vm.enable(&builder());
    let mut request = Polled::new(channel.channel().request(
        b"question",
        ExternalData::new(),
        Timeout::Never,
    ));
    request.assert_pending();
    vm.connect();
    assert_eq!(request.wakes(), 1);
    request.assert_answer(b"answer!!");
}

#[test]
fn an_answer_may_be_longer_than_the_packets_that_the_channel_sends() {
    let open = open_with(builder().maximum_packet_size(64));
    let mut request = open.request(b"question", Timeout::Never);
    let ids = open.transactions();
    open.answer(ids[0], &[7; 3000]);
    request.assert_answer(&[7; 3000]);
    let mut request = open.request(b"question", Timeout::Never);
    let ids = open.transactions();
    open.answer(ids[0], b"short!!!");
    request.assert_answer(b"short!!!");
}

#[test]
fn delivery_waits_until_the_message_has_entered_the_ring() {
    let open = open();
    let mut now = Polled::new(open.channel().deliver(&large(0), Timeout::Never));
    now.assert_answer(&[]);
    open.channel().send_message(&large(1)).unwrap();
    let mut later = Polled::new(open.channel().deliver(&large(2), Timeout::Never));
    open.vm.machine.settle();
    later.assert_pending();
    assert_eq!(open.numbers(), [0, 1]);
    assert_eq!(later.wakes(), 1);
    later.assert_answer(&[]);
    assert_eq!(open.numbers(), [2]);
}

// Time.

#[test]
fn a_request_whose_time_is_over_in_the_queue_is_not_sent_any_more() {
    let open = open();
    open.fill();
    let page = page();
    let mut request = open.lend(&page, Timeout::After(500));
    let mut behind = open.request(&large(7), Timeout::Never);
    open.vm.machine.settle();
    request.assert_pending();
    assert_eq!(page.handle_count(), 2);
    open.vm.machine.advance(500);
    assert_eq!(request.wakes(), 1);
    assert_eq!(page.handle_count(), 1, "nobody has seen it");
    request.assert_error(RequestError::Cancelled);
    assert_eq!(open.numbers(), [0, 1]);
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [7], "and what waited behind it goes");
    behind.assert_pending();
    let counters = open.channel().counters();
    assert_eq!(
        (counters.cancelled_requests, counters.late_completions),
        (1, 0)
    );
}

#[test]
fn what_waits_behind_a_cancelled_packet_goes_if_it_needs_less_room() {
    let open = open();
    open.fill();
    let request = open.request(&large(2), Timeout::Never);
    // 4080 bytes can be used, and twice 1928 are.
    open.channel().send_message(&[9; 100]).unwrap();
    open.vm.machine.settle();
    assert_eq!(open.channel().counters().packets_sent, 2);
    drop(request);
    open.vm.machine.settle();
    assert_eq!(open.channel().counters().packets_sent, 3);
    assert_eq!(open.vm.host(open.id, received).len(), 3);
}

#[test]
fn a_request_whose_time_is_over_in_flight_lends_its_memory_until_the_late_completion() {
    let open = open_with(builder().maximum_packet_count(1));
    let page = page();
    let mut request = open.lend(&page, Timeout::After(500));
    let ids = open.transactions();
    open.vm.machine.advance(500);
    assert_eq!(request.wakes(), 0, "nobody has polled");
    request.assert_error(RequestError::Cancelled);
    drop(request);
    assert_eq!(page.handle_count(), 2, "the host may still write to it");
    assert_eq!(
        open.channel().allocate_packet().unwrap_err(),
        AllocateError::TooMany { maximum: 1 },
        "and the packet's place is not used for another"
    );
    let counters = open.channel().counters();
    assert_eq!(
        (counters.cancelled_requests, counters.late_completions),
        (1, 0)
    );

    open.answer(ids[0], b"at last!");
    assert_eq!(page.handle_count(), 1);
    let counters = open.channel().counters();
    assert_eq!(counters.late_completions, 1);
    assert_eq!(counters.unknown_completions, 0);

    // The place is free again, and the same answer finds nobody.
    let mut next = open.request(b"question", Timeout::Never);
    open.answer(ids[0], b"again!!!");
    next.assert_pending();
    assert_eq!(open.channel().counters().unknown_completions, 1);
    let ids = open.transactions();
    open.answer(ids[0], b"fresh!!!");
    next.assert_answer(b"fresh!!!");
}

#[test]
fn a_request_whose_time_is_over_in_flight_lends_its_memory_until_the_host_has_let_go() {
    let open = open();
    let page = page();
    let mut request = open.lend(&page, Timeout::After(500));
    request.assert_pending();
    open.transactions();
    open.vm.machine.advance(500);
    assert_eq!(request.wakes(), 1);
    request.assert_error(RequestError::Cancelled);
    let torndown = MessageType::GPADL_TORNDOWN;
    open.vm.machine.server(|server| {
        server.inject(Rule::once(torndown, Fault::Delay(10_000_000)));
    });
    open.channel.disable();
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Closing);
    assert_eq!(page.handle_count(), 2);
    open.vm.machine.advance(20_000_000);
    assert_eq!(open.channel().state(), State::Disabled);
    assert_eq!(page.handle_count(), 1);
    let counters = open.channel().counters();
    assert_eq!(
        (counters.cancelled_requests, counters.late_completions),
        (1, 0)
    );
}

#[test]
fn dropping_a_request_gives_it_up() {
    let open = open();
    let page = page();
    let in_flight = open.lend(&page, Timeout::Never);
    let ids = open.transactions();
    drop(in_flight);
    assert_eq!(page.handle_count(), 2);
    open.answer(ids[0], &[]);
    assert_eq!(page.handle_count(), 1);
    open.fill();
    let waiting = open.lend(&page, Timeout::Never);
    drop(waiting);
    assert_eq!(page.handle_count(), 1);
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [0, 1]);
    assert_eq!(open.transactions(), [] as [u64; 0]);
    let counters = open.channel().counters();
    assert_eq!(
        (counters.cancelled_requests, counters.late_completions),
        (2, 1)
    );
}

#[test]
fn an_answer_that_nobody_looks_at_gives_everything_back() {
    let open = open_with(builder().maximum_packet_count(1));
    let page = page();
    let mut request = open.lend(&page, Timeout::Never);
    request.assert_pending();
    let id = open.transactions()[0];
    open.answer(id, &[]);
    assert_eq!(page.handle_count(), 2, "the answer gives it back");
    drop(request);
    assert_eq!(page.handle_count(), 1);
    open.channel().allocate_packet().unwrap();
    assert_eq!(open.channel().counters().cancelled_requests, 0);
}

#[test]
fn the_answer_gives_back_what_was_lent() {
    let open = open();
    let page = page();
    let mut request = open.lend(&page, Timeout::Never);
    let id = open.transactions()[0];
    open.answer(id, &[]);
    let Poll::Ready(Ok(mut answer)) = request.poll() else {
        panic!("there is an answer");
    };
    let external = answer.take_external_data();
    assert_eq!(external.len(), 4096);
    drop(answer);
    assert_eq!(page.handle_count(), 2, "now the driver has it");
}

#[test]
fn deadlines_are_told_and_forgotten() {
    let open = open();
    assert_eq!(open.vm.vmbus.deadline(), None);
    let now = open.vm.vmbus.client().now();
    let late = open.request(b"question", Timeout::After(900));
    let mut soon = open.request(b"question", Timeout::At(now + 300));
    let mut never = open.request(b"question", Timeout::Never);
    assert_eq!(open.vm.vmbus.deadline(), Some(now + 300));
    open.vm.machine.advance(400);
    soon.assert_error(RequestError::Cancelled);
    assert_eq!(open.vm.vmbus.deadline(), Some(now + 900));
    drop(late);
    open.vm.machine.advance(600);
    assert_eq!(open.vm.vmbus.deadline(), None);
    never.assert_pending();
}

#[test]
fn an_answer_in_time_counts_although_it_is_looked_at_later() {
    let open = open();
    let mut request = open.request(b"question", Timeout::After(500));
    let id = open.transactions()[0];
    open.answer(id, b"in time!");
    open.vm.machine.advance(5000);
    request.assert_answer(b"in time!");
    assert_eq!(open.channel().counters().cancelled_requests, 0);
}

#[test]
fn a_time_of_zero_does_not_wait_for_room_and_not_for_the_answer() {
    let open = open();
    let mut sent = open.request(b"question", Timeout::After(0));
    sent.assert_error(RequestError::Cancelled);
    let ids = open.transactions();
    open.answer(ids[0], &[]);
    assert_eq!(open.channel().counters().late_completions, 1);
    open.fill();
    let mut full = open.request(&large(2), Timeout::After(0));
    full.assert_error(RequestError::NotQueued);
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [0, 1]);
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [] as [u64; 0]);
}

// The end of the channel.

#[test]
fn requests_end_with_the_channel_and_their_memory_when_the_host_has_let_go() {
    for reason in [
        ChannelError::Disabled,
        ChannelError::Rescinded,
        ChannelError::Unloaded,
    ] {
        let open = open();
        let page = page();
        let mut in_flight = open.lend(&page, Timeout::Never);
        in_flight.assert_pending();
        open.transactions();
        open.fill();
        let mut waiting = open.request(&large(2), Timeout::Never);
        waiting.assert_pending();
        for message in [MessageType::GPADL_TORNDOWN, MessageType::UNLOAD_COMPLETE] {
            open.vm.machine.server(|server| {
                server.inject(Rule::once(message, Fault::Delay(10_000_000)));
            });
        }
        match reason {
            ChannelError::Disabled => open.channel.disable(),
            ChannelError::Rescinded => assert!(open.vm.machine.rescind(open.id)),
            _ => open.vm.vmbus.begin_unload(),
        }
        open.vm.machine.settle();
        assert_eq!(open.channel().state(), State::Closing, "{reason}");
        for request in [&mut in_flight, &mut waiting] {
            assert_eq!(request.wakes(), 1, "{reason}");
            request.assert_error(RequestError::Removed(reason));
        }
        assert_eq!(page.handle_count(), 2, "{reason}");
        open.vm.machine.advance(20_000_000);
        assert_eq!(open.channel().state(), State::Disabled, "{reason}");
        assert_eq!(page.handle_count(), 1, "{reason}");
        open.vm.assert_well_behaved();
    }
}

#[test]
fn memory_lent_to_a_host_that_never_lets_go_stays_with_the_library() {
    let open = open();
    let (timed_out, waiting) = (page(), page());
    let mut first = open.lend(&timed_out, Timeout::After(500));
    let second = open.lend(&waiting, Timeout::Never);
    open.transactions();
    open.vm.machine.advance(500);
    first.assert_error(RequestError::Cancelled);
    open.vm.machine.server(|server| {
        server.inject(Rule::always(MessageType::UNLOAD_COMPLETE, Fault::Drop));
    });
    open.vm.vmbus.begin_unload();
    open.vm.machine.advance(600_000_000);
    assert_eq!(open.channel().state(), State::Disabled);
    drop((first, second));
    assert_eq!(timed_out.handle_count(), 2);
    assert_eq!(waiting.handle_count(), 2);
}

#[test]
fn a_request_on_an_ended_channel_is_refused() {
    let open = open();
    open.channel.disable();
    open.vm.machine.settle();
    let mut request = open.request(b"question", Timeout::Never);
    request.assert_error(RequestError::Removed(ChannelError::Disabled));
    assert_eq!(
        open.channel().try_send(b"question"),
        Err(RequestError::Removed(ChannelError::Disabled))
    );
}

#[test]
fn requests_that_cannot_be_sent_say_why() {
    let open = open_with(builder().maximum_packet_count(1));
    open.request(&[0; 1901], Timeout::Never)
        .assert_error(RequestError::Send(SendFailure::TooLong {
            length: 1901,
            maximum: 1900,
        }));
    let mut external = ExternalData::new();
    for _ in 0..3 {
        external.push(page(), 0..8).unwrap();
    }
    let request = open.channel().request(b"", external, Timeout::Never);
    Polled::new(request).assert_error(RequestError::Send(SendFailure::TooMuchExternalData {
        bytes: 24,
        ranges: 3,
        maximum_bytes: 8192,
        maximum_ranges: 2,
    }));
    let _one = open.request(b"question", Timeout::Never);
    open.request(b"question", Timeout::Never)
        .assert_error(RequestError::Allocate(AllocateError::TooMany {
            maximum: 1,
        }));
}

#[test]
fn a_driver_that_waits_while_it_holds_a_packet_does_not_hold_up_the_end_of_the_channel() {
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let open = open_with(builder().process_packet_callbacks(
        move |_, packet| holder.lock().unwrap().push(packet.hold()),
        |_, _| {},
    ));
    open.vm.send(open.id, b"12345678");
    let held = shelf.lock().unwrap().pop().unwrap();
    open.channel.disable();
    // The channel closes when the packet is completed, and that is not before this has returned.
    let result = open.channel().send_synchronous_request(
        b"question",
        ExternalData::new(),
        Timeout::Never,
        &mut [],
    );
    assert_eq!(result, Err(RequestError::Removed(ChannelError::Disabled)));
    assert_eq!(open.channel().state(), State::Suspending);
    held.complete(&[]);
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Disabled);
}

#[test]
fn a_request_on_a_paused_channel_waits_for_the_resume() {
    let open = open();
    let _paused = open.channel().pause().unwrap();
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Paused);
    let mut request = open.request(b"question", Timeout::Never);
    let mut in_time = open.request(b"question", Timeout::After(500));
    request.assert_pending();
    assert_eq!(
        open.channel().try_send(b"question"),
        Err(RequestError::NotQueued)
    );
    open.vm.machine.advance(500);
    in_time.assert_error(RequestError::Cancelled);
    assert_eq!(open.transactions(), [] as [u64; 0]);
    open.channel().start().unwrap();
    open.vm.machine.settle();
    let ids = open.transactions();
    open.answer(ids[0], b"answer!!");
    request.assert_answer(b"answer!!");
    assert_eq!(ids.len(), 1);
}

#[test]
fn a_channel_in_raw_mode_has_no_requests() {
    let (vm, _) = Vm::with_device();
    let builder = ChannelBuilder::new(INTERFACE).queue_management_suppressed(|_| {});
    let channel = vm.enable(&builder);
    assert!(is_active(&channel));
    let raw = RequestError::Allocate(AllocateError::Raw);
    assert_eq!(channel.channel().try_send(b"question"), Err(raw));
    let request = channel
        .channel()
        .request(b"question", ExternalData::new(), Timeout::Never);
    Polled::new(request).assert_error(raw);
}

// The blocking form.

#[test]
fn the_blocking_form_copies_the_answer() {
    let (vm, _, channel) = answering(b"the whole answer", &builder());
    let mut answer = [0; 24];
    let length = channel.channel().send_synchronous_request(
        b"question",
        ExternalData::new(),
        Timeout::Never,
        &mut answer,
    );
    assert_eq!(length, Ok(16));
    assert_eq!(&answer[..16], b"the whole answer");
    vm.assert_well_behaved();
}

#[test]
fn an_answer_longer_than_the_buffer_is_an_error_with_its_length() {
    let (_vm, _, channel) = answering(b"the whole answer", &builder());
    let mut answer = [0; 8];
    let result = channel.channel().send_synchronous_request(
        b"question",
        ExternalData::new(),
        Timeout::Never,
        &mut answer,
    );
    assert_eq!(result, Err(RequestError::AnswerTooLong { length: 16 }));
    assert_eq!(answer, [0; 8]);
}

#[test]
fn the_blocking_form_ends_with_its_time() {
    let open = open();
    let before = open.vm.vmbus.client().now();
    let result = open.channel().send_synchronous_request(
        b"question",
        ExternalData::new(),
        Timeout::After(1000),
        &mut [],
    );
    assert_eq!(result, Err(RequestError::Cancelled));
    assert_eq!(open.vm.vmbus.client().now(), before + 1000);
}

#[test]
fn the_blocking_form_ends_with_the_channel() {
    let open = open();
    assert!(open.vm.machine.rescind(open.id));
    let result = open.channel().send_synchronous_request(
        b"question",
        ExternalData::new(),
        Timeout::Never,
        &mut [],
    );
    assert_eq!(result, Err(RequestError::Removed(ChannelError::Rescinded)));
}

type Results = Arc<Mutex<Vec<Result<usize, RequestError>>>>;

/// Notes what the blocking form says, in a callback.
fn ask(results: &Results) -> impl Fn(&Channel) + Send + Sync + use<> {
    let results = results.clone();
    move |channel| {
        let result = channel.send_synchronous_request(
            b"question",
            ExternalData::new(),
            Timeout::Never,
            &mut [0; 64],
        );
        results.lock().unwrap().push(result);
    }
}

#[test]
fn a_synchronous_request_in_started_is_an_error_and_in_post_started_the_norm() {
    let results = Results::default();
    let [opened, started, post_started] = std::array::from_fn(|_| ask(&results));
    let builder = builder()
        .opened(move |channel| {
            opened(channel);
            Ok(())
        })
        .started(started)
        .post_started(post_started);
    let (vm, ..) = answering(b"answer!!", &builder);
    assert_eq!(
        *results.lock().unwrap(),
        [
            Err(RequestError::WouldDeadlock),
            Err(RequestError::WouldDeadlock),
            Ok(8)
        ]
    );
    vm.assert_well_behaved();
}

#[test]
fn a_future_that_is_blocked_on_in_started_is_refused_too() {
    let results = Arc::new(Mutex::new(Vec::new()));
    let notes = results.clone();
    let builder = builder().started(move |channel| {
        let request = channel.request(b"question", ExternalData::new(), Timeout::Never);
        let result = channel.client().block_on(request);
        notes.lock().unwrap().push(result.unwrap().map(drop));
    });
    let (_vm, ..) = answering(b"answer!!", &builder);
    assert_eq!(*results.lock().unwrap(), [Err(RequestError::WouldDeadlock)]);
}

#[test]
fn a_request_from_started_that_nobody_waits_for_there_is_sent_when_packets_flow() {
    let kept = Arc::new(Mutex::new(None));
    let keep = kept.clone();
    let builder = builder().started(move |channel| {
        let request = channel.request(b"question", ExternalData::new(), Timeout::Never);
        *keep.lock().unwrap() = Some(request);
    });
    let (_vm, ..) = answering(b"answer!!", &builder);
    let request = kept.lock().unwrap().take().unwrap();
    Polled::new(request).assert_answer(b"answer!!");
}

#[test]
fn a_synchronous_request_in_process_packet_is_an_error() {
    for passive in [false, true] {
        let results = Results::default();
        let asking = ask(&results);
        let mut builder = builder().process_packet_callbacks(
            move |channel, packet| {
                asking(channel);
                packet.complete(&[]);
            },
            |_, _| {},
        );
        if passive {
            builder = builder.incoming_processing_at_passive();
        }
        let open = open_with(builder);
        open.vm.send(open.id, b"12345678");
        open.vm.machine.settle();
        let expected = if passive {
            RequestError::WouldDeadlock
        } else {
            RequestError::WouldBlock
        };
        assert_eq!(*results.lock().unwrap(), [Err(expected)]);
    }
}

#[test]
fn process_packet_at_passive_may_wait_for_another_channel() {
    let (vm, _, other) = answering(b"answer!!", &builder());
    let interface = vmbus::protocol::Guid::literal("11111111-2222-3333-4444-666666666666");
    let device = Device::new(interface, INSTANCE);
    let id = vm.machine.add(device, Manual).unwrap();
    vm.machine.settle();
    let results = Results::default();
    let asking = ask(&results);
    let target = other.channel().clone();
    let builder = ChannelBuilder::new(interface)
        .process_packet_callbacks(
            move |_, packet| {
                assert_eq!(packet.level(), Level::Passive);
                asking(&target);
                packet.complete(&[]);
            },
            |_, _| {},
        )
        .incoming_processing_at_passive();
    let channel = vm.enable(&builder);
    assert!(is_active(&channel));
    vm.send(id, b"12345678");
    vm.machine.settle();
    assert_eq!(*results.lock().unwrap(), [Ok(8)]);
}

#[test]
fn a_synchronous_request_while_the_channel_stops_says_so() {
    let results = Results::default();
    let [suspend, closed] = std::array::from_fn(|_| ask(&results));
    let open = open_with(builder().suspend(suspend).closed(closed));
    open.channel.disable();
    open.vm.machine.settle();
    assert_eq!(
        *results.lock().unwrap(),
        [Err(RequestError::Removed(ChannelError::Disabled)); 2]
    );
}

// Now or not at all.

#[test]
fn try_send_sends_now_or_not_at_all() {
    let open = open();
    assert_eq!(open.channel().try_send(&large(0)), Ok(()));
    let at_dispatch = open
        .vm
        .machine
        .at_dispatch(|| open.channel().try_send(&large(1)));
    assert_eq!(at_dispatch, Ok(()));
    assert_eq!(
        open.channel().try_send(&large(2)),
        Err(RequestError::NotQueued)
    );
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [0, 1]);
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [] as [u64; 0], "it was not lined up");
    assert_eq!(open.channel().counters().ring_full_waits, 0);
}

#[test]
fn try_send_needs_no_packet() {
    let open = open_with(builder().maximum_packet_count(1));
    let _all = open.channel().allocate_packet().unwrap();
    assert_eq!(open.channel().try_send(&7u64.to_le_bytes()), Ok(()));
    assert_eq!(open.numbers(), [7]);
}

#[test]
fn try_send_never_overtakes_what_waits() {
    let open = open();
    open.fill();
    open.channel().send_message(&large(2)).unwrap();
    assert_eq!(
        open.channel().try_send(&3u64.to_le_bytes()),
        Err(RequestError::NotQueued),
        "although it would fit"
    );
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [0, 1]);
    assert_eq!(open.channel().try_send(&3u64.to_le_bytes()), Ok(()));
    assert_eq!(open.numbers(), [2, 3]);
}

#[test]
fn try_send_answers_in_every_state() {
    let answers = Arc::new(Mutex::new(Vec::new()));
    let noting = || {
        let answers = answers.clone();
        move |channel: &Channel| {
            let answer = channel.try_send(&1u64.to_le_bytes());
            answers.lock().unwrap().push((channel.state(), answer));
        }
    };
    let [opened, started, post_started, suspend, closed] = std::array::from_fn(|_| noting());
    let builder = builder()
        .opened(move |channel| {
            opened(channel);
            Ok(())
        })
        .started(started)
        .post_started(post_started)
        .suspend(suspend)
        .closed(closed);
    let (vm, id) = Vm::with_device();
    let note = noting();
    let channel = builder.enable(vm.vmbus.client()).unwrap();
    note(channel.channel());
    vm.machine.settle();
    note(channel.channel());
    assert_eq!(vm.host(id, received).len(), 2);
    channel.disable();
    vm.machine.settle();
    note(channel.channel());
    let removed = Err(RequestError::Removed(ChannelError::Disabled));
    assert_eq!(
        *answers.lock().unwrap(),
        [
            (State::Enabled, Err(RequestError::NotQueued)),
            (State::Opening, Err(RequestError::NotQueued)),
            (State::Opening, Err(RequestError::NotQueued)),
            (State::Active, Ok(())),
            (State::Active, Ok(())),
            (State::Suspending, removed),
            (State::Closing, removed),
            (State::Disabled, removed),
        ]
    );
}

// Any sequence.

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A request of so many bytes that lends the page, with so much time.
    Request(usize, Option<u64>),
    TrySend,
    Drop(usize),
    Poll,
    HostReads,
    /// The host answers one of the requests that it has ever seen, perhaps not for the first time.
    HostAnswers(usize),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (8usize..1900, proptest::option::of(0u64..2000))
            .prop_map(|(length, time)| Step::Request(length, time)),
        1 => Just(Step::TrySend),
        1 => (0usize..8).prop_map(Step::Drop),
        2 => Just(Step::Poll),
        3 => Just(Step::HostReads),
        4 => (0usize..64).prop_map(Step::HostAnswers),
        2 => (1u64..1500).prop_map(Step::Pass),
    ]
}

proptest! {
    #[test]
    fn requests_end_once_with_their_own_answer_and_nothing_is_lost(
        steps in proptest::collection::vec(step(), 1..120),
        reason in 0..3,
    ) {
        let open = open();
        let page = page();
        let mut requests: Vec<(u64, Polled)> = Vec::new();
        let mut seen: Vec<(u64, u64)> = Vec::new();
        let mut next = 0;
        let poll = |requests: &mut Vec<(u64, Polled)>| {
            requests.retain_mut(|(n, request)| match request.poll() {
                Poll::Pending => true,
                Poll::Ready(Ok(answer)) => {
                    assert_eq!(number(&answer), *n);
                    false
                }
                Poll::Ready(Err(_)) => false,
            });
        };
        for step in steps {
            match step {
                Step::Request(length, time) => {
                    let mut external = ExternalData::new();
                    external.push(page.clone(), 0..4096).unwrap();
                    let mut data = vec![0; length];
                    data[..8].copy_from_slice(&u64::to_le_bytes(next));
                    let timeout = time.map_or(Timeout::Never, Timeout::After);
                    let request = open.channel().request(&data, external, timeout);
                    requests.push((next, Polled::new(request)));
                    next += 1;
                }
                Step::TrySend => {
                    let _ = open.channel().try_send(&[0xEE; 8]);
                }
                Step::Drop(index) => {
                    if index < requests.len() {
                        requests.remove(index);
                    }
                }
                Step::Poll => poll(&mut requests),
                Step::HostReads => {
                    let packets = open.vm.host(open.id, received);
                    let asked = packets.iter().filter_map(|(id, data)| Some(((*id)?, number(data))));
                    seen.extend(asked);
                }
                Step::HostAnswers(index) => {
                    if let Some((id, n)) = seen.get(index) {
                        open.answer(*id, &n.to_le_bytes());
                    }
                }
                Step::Pass(time) => open.vm.machine.advance(time),
            }
        }
        match reason {
            0 => open.channel.disable(),
            1 => prop_assert!(open.vm.machine.rescind(open.id)),
            _ => open.vm.vmbus.begin_unload(),
        }
        open.vm.machine.settle();
        prop_assert_eq!(open.channel().state(), State::Disabled);
        poll(&mut requests);
        prop_assert_eq!(requests.len(), 0, "all have ended");
        prop_assert_eq!(page.handle_count(), 1, "and given their memory back");
        let all: Result<Vec<_>, _> = (0..8).map(|_| open.channel().allocate_packet()).collect();
        prop_assert!(all.is_ok(), "and their packets");
        open.vm.assert_well_behaved();
    }
}
