//! The host's end of a channel: what it sends, reads, answers and forgets, and what it must find there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Weak;

use vmbus::ids::{ChannelId, GpadlHandle, PAGE_SIZE, PageNumber};
use vmbus::kmcl::interface;
use vmbus::protocol::Status;
use vmbus::ring::{Kind, Outgoing, PacketBuffer, PushError, TransferPageList, TransferPageRange};
use vmbus_host::bus::Device;
use vmbus_host::channel::HostChannel;
use vmbus_host::provider::Provider;

use crate::decisions::Dice;
use crate::world::{Messages, World};

/// The interface type of every simulated device.
pub const INTERFACE: vmbus::protocol::Guid = interface::NETWORK;

/// The longest data of a packet, in bytes.
pub const LONGEST: usize = 1024;

/// What the host knows of a channel, from its opening on.
#[derive(Default)]
pub struct HostEnd {
    /// The offer, while there is one that the host has not taken back.
    pub id: Option<ChannelId>,
    /// Offers so far.
    offers: u64,
    /// Openings so far: says which one a packet belongs to.
    pub epoch: u64,
    pub open: bool,
    ring: Option<GpadlHandle>,
    /// The host has kept to the rules of the ring since the channel was opened.
    pub lawful: bool,
    /// It has broken them at some time.
    pub spoilt: bool,
    /// The guest has signalled, and the host has not found the ring empty since.
    awake: bool,
    /// A packet that found no room.
    stuck: Option<Sent>,
    /// The guest has signalled since: the host tries again.
    room: bool,
    /// Numbers of packets sent.
    pub sent: u64,
    /// Completions that the host waits for: packet numbers by transaction id.
    asked: BTreeMap<u64, u64>,
    /// Completed packets of the host: each once.
    completed: BTreeSet<u64>,
    /// Transactions of the guest that the host may answer.
    to_answer: Vec<Request>,
    /// The guest's packets that have been answered.
    pub answered: BTreeSet<u64>,
    /// The guest's packets that the host has, whose memory it may use.
    pub holds: BTreeSet<u64>,
    /// Transaction ids that have been answered.
    used: Vec<u64>,
}

/// A packet that the host sends.
#[derive(Clone, Copy)]
struct Sent {
    number: u64,
    words: usize,
    /// The transaction id, if a completion is wanted.
    asks: Option<u64>,
    transfer_pages: bool,
}

/// A transaction of the guest.
struct Request {
    transaction: u64,
    number: u64,
    pages: Vec<PageNumber>,
}

/// The data of a packet: its number, where it belongs, and bytes that follow from both.
pub fn data(tag: u64, number: u64, words: usize) -> Vec<u8> {
    let filler = |at: u64| number.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(7) ^ tag ^ at;
    [number, tag]
        .into_iter()
        .chain((2..words as u64).map(filler))
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Word `at` of a packet's data; zero when it is shorter.
pub fn word(bytes: &[u8], at: usize) -> u64 {
    bytes
        .chunks_exact(8)
        .nth(at)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// What the machine tells of one offer.
struct Front {
    world: Weak<World>,
    device: usize,
    offer: u64,
}

impl Provider for Front {
    fn opened(&mut self, channel: &mut HostChannel) -> Status {
        let Some(world) = self.world.upgrade() else {
            return Status::UNSUCCESSFUL;
        };
        let (refuse, epoch) = world.with(|state| {
            let host = &mut state.devices[self.device].host;
            let quiet = world.is_quiet();
            if !quiet && state.dice.one_in(15) {
                state.excuses.refused = true;
                return (true, host.epoch);
            }
            *host = HostEnd {
                id: host.id,
                offers: host.offers,
                epoch: host.epoch + 1,
                open: true,
                ring: Some(channel.opening.ring),
                lawful: true,
                spoilt: host.spoilt,
                answered: std::mem::take(&mut host.answered),
                ..HostEnd::default()
            };
            state.devices[self.device].driver.host_opened();
            (false, state.devices[self.device].host.epoch)
        });
        world.note(Some(self.device), "the host opens:", (!refuse).into());
        if refuse {
            return Status::UNSUCCESSFUL;
        }
        debug_assert!(epoch > 0);
        Status::SUCCESS
    }

    fn serve(&mut self, _now: u64, _channel: &mut HostChannel) {
        if let Some(world) = self.world.upgrade() {
            world.device(self.device, |device| {
                if device.host.offers == self.offer {
                    device.host.awake = true;
                    device.host.room = true;
                }
            });
        }
    }

    fn closed(&mut self) {
        if let Some(world) = self.world.upgrade() {
            world.device(self.device, |device| {
                if device.host.offers == self.offer {
                    device.host.open = false;
                    device.host.holds.clear();
                }
            });
            world.note(Some(self.device), "the host closes", self.offer);
        }
    }
}

#[derive(Clone, Copy)]
enum Act {
    Send,
    Read,
    Answer,
    Twice,
    Wrong,
    Retry,
    Mask,
}

impl World {
    /// Offers the device, if it is not.
    pub fn offer(&self, device: usize) -> bool {
        let (offered, instance, offer) = self.device(device, |device| {
            (
                device.host.id.is_some(),
                device.instance,
                device.host.offers + 1,
            )
        });
        if offered {
            return false;
        }
        let front = Front {
            world: self.me(),
            device,
            offer,
        };
        let id = self.machine.add(Device::new(INTERFACE, instance), front);
        self.note(Some(device), "the host offers", offer);
        self.device(device, |device| {
            device.host.offers = offer;
            device.host.id = id;
            // Whatever the old offer's channel still holds is nobody's any more.
            device.host.open = false;
            device.host.holds.clear();
        });
        id.is_some()
    }

    /// The host takes the device away.
    pub fn rescind(&self, device: usize) -> bool {
        let Some(id) = self.device(device, |device| device.host.id.take()) else {
            return false;
        };
        self.note(Some(device), "the host rescinds", id.0.into());
        self.with(|state| {
            state.excuses.rescinded = true;
            let device = &mut state.devices[device];
            device.host.open = false;
            device.host.holds.clear();
            device.driver.excuses.rescinded = true;
        });
        self.machine.rescind(id)
    }

    /// The host's end, if the channel is open and the host's to use.
    fn host_end(&self, device: usize) -> Option<ChannelId> {
        self.device(device, |device| device.host.id.filter(|_| device.host.open))
    }

    /// The host does something with an open channel.
    pub fn host_acts(&self, device: usize) -> bool {
        if self.host_is_dead() {
            return false;
        }
        let Some(id) = self.host_end(device) else {
            return false;
        };
        let one_way = self.device(device, |device| device.driver.is_one_way());
        let act = self.dice(|dice| {
            dice.pick(&[
                (if one_way { 1 } else { 30 }, Act::Send),
                (30, Act::Read),
                (20, Act::Answer),
                (3, Act::Twice),
                (2, Act::Wrong),
                (10, Act::Retry),
                (4, Act::Mask),
            ])
        });
        match act {
            Act::Send => {
                let count = self.dice(|dice| dice.between(1, 8));
                let sent = (0..count).take_while(|_| self.host_sends(device, id));
                sent.count() > 0
            }
            Act::Read => {
                let (odd, most) = self.dice(|dice| (dice.one_in(8), dice.between(1, 12)));
                let awake = self.device(device, |device| device.host.awake);
                (odd || awake) && self.host_reads(device, id, most as usize)
            }
            Act::Answer => self.host_answers(device, id, false),
            Act::Twice => self.host_answers(device, id, true),
            Act::Wrong => self.host_answers_nothing(device, id),
            Act::Retry => {
                let room = self.device(device, |device| device.host.room);
                room && self.host_retries(device, id)
            }
            Act::Mask => {
                // A host that is at work wants no signals.
                let awake = self.device(device, |device| device.host.awake);
                awake
                    && self
                        .machine
                        .channel(id, |host| host.mask().is_ok())
                        .unwrap_or(false)
            }
        }
    }

    /// The host does all that it can do at rest: it is awake only if the guest signalled. Returns whether there
    /// was anything to do.
    pub fn host_serves(&self, device: usize) -> bool {
        let Some(id) = self.host_end(device) else {
            return false;
        };
        let mut busy = false;
        if self.device(device, |device| device.host.room) {
            busy |= self.host_retries(device, id);
        }
        if self.device(device, |device| device.host.awake) {
            busy |= self.host_reads(device, id, usize::MAX);
        }
        while self.host_answers(device, id, false) {
            busy = true;
        }
        busy
    }

    /// Sends a new packet.
    fn host_sends(&self, device: usize, id: ChannelId) -> bool {
        let sent = self.with(|state| {
            let host = &mut state.devices[device].host;
            if host.stuck.is_some() {
                return None;
            }
            let dice = &mut state.dice;
            let number = host.sent;
            host.sent += 1;
            let asks = dice.one_in(2).then(|| {
                // Any id that is not in use, small ones mostly: the guest gives it back as it is.
                let mut id = if dice.one_in(2) {
                    number
                } else {
                    dice.number()
                };
                while host.asked.contains_key(&id) {
                    id = id.wrapping_add(1);
                }
                host.asked.insert(id, number);
                id
            });
            Some(Sent {
                number,
                words: length(dice),
                asks,
                transfer_pages: dice.one_in(6),
            })
        });
        let Some(sent) = sent else { return false };
        self.note(Some(device), "the host sends", sent.number);
        self.host_writes(device, id, sent);
        true
    }

    fn host_retries(&self, device: usize, id: ChannelId) -> bool {
        let sent = self.device(device, |device| {
            device.host.room = false;
            device.host.stuck.take()
        });
        let Some(sent) = sent else { return false };
        self.note(Some(device), "the host sends again", sent.number);
        self.host_writes(device, id, sent)
    }

    /// Writes a packet, or remembers it until there is room. Returns whether it was written.
    fn host_writes(&self, device: usize, id: ChannelId, sent: Sent) -> bool {
        let epoch = self.device(device, |device| device.host.epoch);
        let bytes = data(epoch, sent.number, sent.words);
        let list = TransferPageList::new(
            7,
            &[TransferPageRange {
                length: 100,
                offset: sent.number as u32,
            }],
        );
        let mut packet = if sent.transfer_pages {
            Outgoing::transfer_pages(&list, [&bytes, &[]])
        } else {
            Outgoing::in_band([&bytes, &[]])
        };
        if let Some(id) = sent.asks {
            packet = packet.with_completion(id);
        }
        let written = self.machine.channel(id, |host| {
            loop {
                match host.send(&packet) {
                    Ok(()) => return true,
                    Err(PushError::Full { need }) => match host.wait_for_room(need) {
                        Ok(true) => {}
                        Ok(false) | Err(_) => return false,
                    },
                    Err(_) => return false,
                }
            }
        });
        if written != Some(true) {
            self.device(device, |device| device.host.stuck = Some(sent));
        }
        written == Some(true)
    }

    /// Reads up to `most` packets. Finding none, the host goes to sleep until the guest signals.
    fn host_reads(&self, device: usize, id: ChannelId, most: usize) -> bool {
        let mut packet = PacketBuffer::default();
        let mut count = 0;
        while count < most {
            let received = self.machine.channel(id, |host| host.receive(&mut packet));
            match received {
                Some(Ok(true)) => {
                    count += 1;
                    self.host_received(device, &packet);
                }
                Some(Ok(false)) => {
                    let more = self.machine.channel(id, |host| {
                        host.release()?;
                        host.unmask()
                    });
                    if let Some(Ok(false)) = more {
                        self.device(device, |device| device.host.awake = false);
                        break;
                    }
                    if !matches!(more, Some(Ok(true))) {
                        break;
                    }
                }
                broken => {
                    let lawful = self.device(device, |device| device.host.lawful);
                    assert!(
                        !lawful || broken.is_none(),
                        "the guest broke its ring: {broken:?}"
                    );
                    // A host that has spoilt the ring for itself looks no further.
                    self.device(device, |device| device.host.awake = false);
                    break;
                }
            }
        }
        let _ = self.machine.channel(id, HostChannel::release);
        if count > 0 {
            self.note(Some(device), "the host has read", count as u64);
        }
        count > 0
    }

    fn host_received(&self, device: usize, packet: &PacketBuffer) {
        let payload = packet.payload();
        let transaction = packet.transaction_id();
        let lawful = self.device(device, |device| device.host.lawful);
        if packet.kind() == Kind::COMPLETION {
            let number = self.device(device, |device| device.host.asked.remove(&transaction));
            if !lawful {
                return;
            }
            let number = number.unwrap_or_else(|| {
                let known = self.device(device, |device| device.host.completed.clone());
                panic!(
                    "a completion that the host does not wait for: {transaction:#x}, after those of packets {known:?}"
                )
            });
            let (fresh, data) = self.device(device, |device| {
                (
                    device.host.completed.insert(number),
                    device.driver.completion(number),
                )
            });
            assert!(fresh, "packet {number} of the host completes twice");
            let Some(data) = data else {
                panic!("packet {number} of the host completes, and the driver has it still");
            };
            assert_eq!(payload, data, "the completion of packet {number}");
            return;
        }
        let number = word(payload, 0);
        if lawful {
            assert_eq!(
                payload,
                data(device as u64, number, payload.len() / 8),
                "the guest's packet {number} comes as it was sent"
            );
            self.check_order(device, number);
        }
        let pages: Vec<PageNumber> = packet
            .gpa_ranges()
            .into_iter()
            .flatten()
            .flat_map(|range| range.pages().collect::<Vec<_>>())
            .collect();
        if packet.completion_requested() {
            let messages = self.plan.messages;
            self.device(device, |device| {
                let host = &mut device.host;
                let known = host
                    .to_answer
                    .iter()
                    .any(|request| request.transaction == transaction);
                assert!(
                    !known || !lawful || messages == Messages::Forged,
                    "transaction id {transaction:#x} is in use twice"
                );
                host.holds.insert(number);
                host.to_answer.push(Request {
                    transaction,
                    number,
                    pages,
                });
            });
        }
    }

    /// Answers a transaction, any of them, perhaps twice.
    fn host_answers(&self, device: usize, id: ChannelId, twice: bool) -> bool {
        let chosen = self.with(|state| {
            let waiting = &mut state.devices[device].host.to_answer;
            if waiting.is_empty() {
                return None;
            }
            let at = state.dice.below(waiting.len());
            let words = state.dice.between(2, 20) as usize;
            Some((waiting.swap_remove(at), words))
        });
        let Some((request, words)) = chosen else {
            return false;
        };
        let number = request.number;
        self.touch(device, &request);
        let bytes = data(0xA, number, words);
        // The guest may see it as soon as it is written.
        self.device(device, |device| {
            device.host.answered.insert(number);
            device.host.holds.remove(&number);
        });
        let answer = Outgoing::completion(request.transaction, &bytes);
        let written = self.machine.channel(id, |host| {
            let first = host.push(&answer).is_ok();
            let second = first && twice && host.push(&answer).is_ok();
            let _ = host.publish();
            (first, second)
        });
        let Some((true, second)) = written else {
            // Nobody has seen it.
            self.device(device, |device| {
                device.host.answered.remove(&number);
                device.host.holds.insert(number);
                device.host.to_answer.push(request);
            });
            return false;
        };
        let what = if second {
            "the host answers twice"
        } else {
            "the host answers"
        };
        self.note(Some(device), what, number);
        self.device(device, |device| {
            device.host.used.push(request.transaction);
        });
        true
    }

    /// A completion of what is not in flight: an id that was never given, or that was answered before.
    fn host_answers_nothing(&self, device: usize, id: ChannelId) -> bool {
        let transaction = self.with(|state| {
            let used = &state.devices[device].host.used;
            match state.dice.below(3) {
                0 if !used.is_empty() => used[state.dice.below(used.len())],
                1 => 0,
                _ => state.dice.number() | 1 << 63,
            }
        });
        self.note(Some(device), "the host answers nothing", transaction);
        let answer = Outgoing::completion(transaction, b"nothing.");
        self.machine
            .channel(id, |host| host.send(&answer).is_ok())
            .unwrap_or(false)
    }

    /// The host uses the memory that a packet lent.
    fn touch(&self, device: usize, request: &Request) {
        for page in &request.pages {
            let Some((pages, at)) = self.machine.memory().find(*page) else {
                let lawful = self.device(device, |device| device.host.lawful);
                assert!(
                    !lawful || self.plan.messages == Messages::Forged,
                    "packet {}'s memory was given back while the host had it",
                    request.number
                );
                return;
            };
            let written = pages.write(at * PAGE_SIZE, &request.number.to_le_bytes());
            assert!(written.is_ok(), "the page lies in its run");
        }
    }

    /// The host writes where and what it may not.
    pub fn garbage(&self, device: usize) -> bool {
        let Some(id) = self.host_end(device) else {
            return false;
        };
        self.note(Some(device), "the host writes garbage", 0);
        self.device(device, |device| {
            device.host.lawful = false;
            device.host.spoilt = true;
        });
        let dice = self.dice(|dice| Dice::new(dice.number()));
        let _ = self.machine.channel(id, |host| scribble(host, dice));
        true
    }

    /// Whether the host may still touch the memory of a packet that ended without an answer.
    pub fn host_holds(&self, device: usize, number: u64) -> bool {
        let (holds, ring) = self.device(device, |device| {
            (device.host.holds.contains(&number), device.host.ring)
        });
        holds && ring.is_some_and(|ring| self.machine.server(|server| server.gpadl(ring).is_some()))
    }

    /// What the host finds when everything has come to rest on a channel where it kept to the rules.
    pub fn check_host_at_rest(&self, device: usize) {
        self.device(device, |device| {
            let host = &device.host;
            assert!(
                host.stuck.is_none(),
                "the host waits for room of which nobody tells it"
            );
            assert!(
                host.asked.is_empty(),
                "completions are missing: {:?}",
                host.asked
            );
            assert_eq!(
                host.sent,
                device.driver.received(),
                "packets are not delivered"
            );
        });
    }
}

/// The length of a packet's data, in words; mostly short.
pub fn length(dice: &mut Dice) -> usize {
    match dice.below(4) {
        0 => dice.between(2, LONGEST as u64 / 8) as usize,
        _ => dice.between(2, 12) as usize,
    }
}

fn scribble(host: &mut HostChannel, mut dice: Dice) {
    let incoming = host.opening.downstream_page as usize * PAGE_SIZE;
    let (at, bytes) = match dice.below(4) {
        // A field of a control page.
        0 => {
            let page = if dice.one_in(2) { incoming } else { 0 };
            let field = [0, 4, 8, 12, 64][dice.below(5)];
            let value = match dice.below(3) {
                0 => dice.number() as u32,
                1 => dice.below(1024) as u32 * 8,
                _ => u32::MAX,
            };
            (page + field, value.to_le_bytes().to_vec())
        }
        // A completion of whatever.
        1 => {
            let id = match dice.below(2) {
                0 => dice.number(),
                _ => (dice.below(4) as u64) << 32 | dice.below(16) as u64,
            };
            let _ = host.send(&Outgoing::completion(id, &id.to_le_bytes()));
            return;
        }
        _ => {
            let pages = host.memory().page_count();
            let at = dice.below(pages * PAGE_SIZE - 64);
            let length = dice.between(1, 64) as usize;
            (at, (0..length).map(|_| dice.below(256) as u8).collect())
        }
    };
    let written = host.memory().write(at, &bytes);
    debug_assert!(written.is_ok());
}
