use vmbus::ids::{ChannelId, ConnectionId, GpadlHandle, PageNumber, VpIndex};
use vmbus::ring::{Outgoing, PacketBuffer, Reader, Ring, Writer};
use vmbus::shared::SharedPages;

use super::{DynamicMemory, OUTPUT};
use crate::bus::Opening;
use crate::channel::HostChannel;

/// Asks for version 3.0, which no host has.
const REQUEST: [u8; 16] = [1, 0, 16, 0, 7, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0];

#[test]
fn a_guest_that_asks_and_never_listens_is_asked_to_wait_and_gets_every_answer_later() {
    let memory = SharedPages::from_heap(PageNumber(0x100), 4).unwrap();
    let opening = Opening {
        channel: ChannelId(1),
        ring: GpadlHandle(1),
        pages: memory.pages().collect(),
        downstream_page: 2,
        target_vp: VpIndex(0),
        event_flag: 1,
        connection: ConnectionId(0x1_0001),
        user_data: [0; 120],
    };
    let (out, back) = Ring::split(&memory, 2).unwrap();
    let (mut writer, mut reader) = (Writer::new(out).unwrap(), Reader::new(back));
    let mut channel = HostChannel::new(opening, memory).unwrap();
    let mut provider = DynamicMemory::new(1 << 20);
    provider.opened();
    let request = Outgoing::in_band([&REQUEST, &[]]);
    let mut asked = 0;
    // Until both rings are full, and a while longer.
    for _ in 0..1000 {
        while writer.push(&request).is_ok() {
            asked += 1;
        }
        let _ = writer.publish().unwrap();
        provider.serve(1, &mut channel);
        assert!(provider.output.len() <= OUTPUT);
    }
    let mut packet = PacketBuffer::default();
    let mut answered = 0;
    for _ in 0..1000 {
        while reader.read(&mut packet).unwrap() {
            assert_eq!(
                packet.payload(),
                [2, 0, 16, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
            );
            answered += 1;
        }
        let _ = reader.publish().unwrap();
        provider.serve(1, &mut channel);
    }
    assert_eq!(answered, asked);
    assert!(asked > 2 * OUTPUT);
}
