//! The hypercalls that KVM leaves to us: HvPostMessage and HvSignalEvent (spec tlfs.md 3 and 4).

use vmbus::ids::{ConnectionId, PAGE_SIZE, PageNumber};
use vmbus_host::bus::HvStatus;
use vmbus_host::memory::GuestMemory;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Owner;

const POST_MESSAGE: u16 = 0x5C;
const SIGNAL_EVENT: u16 = 0x5D;

const INVALID_CODE: HvStatus = HvStatus(0x02);
const INVALID_INPUT: HvStatus = HvStatus::INVALID_HYPERCALL_INPUT;
const INVALID_ALIGNMENT: HvStatus = HvStatus(0x04);
const INVALID_PARAMETER: HvStatus = HvStatus(0x05);

/// What the guest passes to HvPostMessage.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PostMessage {
    connection: U32,
    reserved: U32,
    kind: U32,
    size: U32,
    payload: [u8; 240],
}

const _: () = assert!(size_of::<PostMessage>() == 256);

/// What the guest passes to HvSignalEvent.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SignalEvent {
    connection: U32,
    flag: U16,
    reserved: U16,
}

const _: () = assert!(size_of::<SignalEvent>() == 8);

/// Types of messages that guests may post have this bit clear.
const HYPERVISOR_MESSAGE: u32 = 1 << 31;

/// A hypercall's control word.
#[derive(Clone, Copy, Debug)]
pub struct Control(pub u64);

impl Control {
    /// The call code.
    pub fn code(self) -> u16 {
        self.0 as u16
    }

    fn is_fast(self) -> bool {
        self.0 & 1 << 16 != 0
    }

    /// Whether anything is set that a simple call without variable header has not.
    fn has_more(self) -> bool {
        self.0 >> 17 != 0
    }
}

/// Handles a hypercall; gives its status.
pub fn handle(
    control: Control,
    parameters: [u64; 2],
    memory: &GuestMemory,
    owner: &dyn Owner,
) -> HvStatus {
    let [input, _] = parameters;
    let result = match control.code() {
        POST_MESSAGE | SIGNAL_EVENT if control.has_more() => Err(INVALID_INPUT),
        // Its input does not fit into registers.
        POST_MESSAGE if control.is_fast() => Err(INVALID_INPUT),
        POST_MESSAGE => read(memory, input).and_then(|call| post(&call, owner)),
        SIGNAL_EVENT if control.is_fast() => SignalEvent::read_from_bytes(input.as_bytes())
            .map_err(|_| INVALID_INPUT)
            .and_then(|call| signal(&call, owner)),
        SIGNAL_EVENT => read(memory, input).and_then(|call| signal(&call, owner)),
        _ => Err(INVALID_CODE),
    };
    result.unwrap_or_else(|status| status)
}

fn post(call: &PostMessage, owner: &dyn Owner) -> Result<HvStatus, HvStatus> {
    let kind = call.kind.get();
    if call.reserved.get() != 0 || kind == 0 || kind & HYPERVISOR_MESSAGE != 0 {
        return Err(INVALID_PARAMETER);
    }
    let size = call.size.get() as usize;
    let payload = call.payload.get(..size).ok_or(INVALID_PARAMETER)?;
    Ok(owner.post_message(ConnectionId(call.connection.get()), payload))
}

fn signal(call: &SignalEvent, owner: &dyn Owner) -> Result<HvStatus, HvStatus> {
    if call.reserved.get() != 0 {
        return Err(INVALID_PARAMETER);
    }
    Ok(owner.signal_event(ConnectionId(call.connection.get()), call.flag.get()))
}

/// Reads a call's input from the guest's memory, once.
fn read<T: FromBytes + IntoBytes>(memory: &GuestMemory, address: u64) -> Result<T, HvStatus> {
    let offset = address as usize % PAGE_SIZE;
    if !address.is_multiple_of(8) || offset + size_of::<T>() > PAGE_SIZE {
        return Err(INVALID_ALIGNMENT);
    }
    let page = PageNumber(address / PAGE_SIZE as u64);
    let (pages, index) = memory.find(page).ok_or(INVALID_PARAMETER)?;
    let mut value = T::new_zeroed();
    pages
        .read(index * PAGE_SIZE + offset, value.as_mut_bytes())
        .map_err(|_| INVALID_PARAMETER)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vmbus::ids::VpIndex;
    use vmbus::shared::SharedPages;

    use super::super::{Crash, End};
    use super::*;

    /// Notes what it is told and takes every connection but number 9.
    #[derive(Default)]
    struct Notes(Mutex<Vec<(u32, Vec<u8>)>>);

    impl Owner for Notes {
        fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> HvStatus {
            self.0
                .lock()
                .unwrap()
                .push((connection.0, payload.to_vec()));
            match connection.0 {
                9 => HvStatus::INVALID_CONNECTION_ID,
                _ => HvStatus::SUCCESS,
            }
        }
        fn signal_event(&self, connection: ConnectionId, flag: u16) -> HvStatus {
            self.post_message(connection, &flag.to_le_bytes())
        }
        fn message_delivered(&self, _: VpIndex) {}
        fn console_drained(&self) {}
        fn crashed(&self, _: Crash) {}
        fn ended(&self, _: End) {}
    }

    /// Makes a call with this input at the start of page 0x10, or at another address.
    fn call(control: u64, input: &[u8], address: u64) -> (HvStatus, Vec<(u32, Vec<u8>)>) {
        let memory = GuestMemory::default();
        let pages = SharedPages::from_heap(PageNumber(0x10), 1).unwrap();
        memory.add(&pages);
        pages.write(0, input).unwrap();
        let notes = Notes::default();
        let status = handle(Control(control), [address, 0], &memory, &notes);
        (status, notes.0.into_inner().unwrap())
    }

    fn message(connection: u32, reserved: u32, kind: u32, size: u32) -> Vec<u8> {
        let words = [connection, reserved, kind, size, 0x6463_6261, 0];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn a_posted_message_reaches_its_connection() {
        let (status, told) = call(0x5C, &message(4, 0, 1, 3), 0x1_0000);
        assert_eq!(
            (status, told),
            (HvStatus::SUCCESS, vec![(4, b"abc".to_vec())])
        );
        let (status, _) = call(0x5C, &message(9, 0, 1, 0), 0x1_0000);
        assert_eq!(status, HvStatus::INVALID_CONNECTION_ID);
    }

    #[test]
    fn input_that_makes_no_sense_is_refused_with_the_status_for_it() {
        let good = message(1, 0, 1, 8);
        let refused = |control, input: &[u8], address| {
            let (status, told) = call(control, input, address);
            assert!(told.is_empty());
            status.0
        };
        assert_eq!(refused(0x5C, &message(1, 0, 1, 241), 0x1_0000), 0x05);
        assert_eq!(refused(0x5C, &message(1, 0, 0, 8), 0x1_0000), 0x05);
        assert_eq!(refused(0x5C, &message(1, 0, 1 << 31, 8), 0x1_0000), 0x05);
        assert_eq!(refused(0x5C, &message(1, 1, 1, 8), 0x1_0000), 0x05);
        assert_eq!(refused(0x5C, &good, 0x1_0004), 0x04);
        assert_eq!(refused(0x5C, &good, 0x1_0F08), 0x04);
        assert_eq!(refused(0x5C, &good, 0x9_0000), 0x05);
        assert_eq!(refused(0x5C, &good, u64::MAX - 0xFFF), 0x05);
        assert_eq!(refused(0x1_005C, &good, 0x1_0000), 0x03, "fast");
        assert_eq!(refused(1 << 32 | 0x5C, &good, 0x1_0000), 0x03, "repeated");
        assert_eq!(refused(1 << 17 | 0x5D, &good, 0x1_0000), 0x03, "header");
        assert_eq!(refused(0x50, &good, 0x1_0000), 0x02);
    }

    #[test]
    fn events_are_signalled_in_both_forms() {
        let input = 0x0007_0000_2003_u64;
        let expected = (HvStatus::SUCCESS, vec![(0x2003, vec![7, 0])]);
        assert_eq!(call(0x1_005D, &[], input), expected);
        assert_eq!(call(0x5D, &input.to_le_bytes(), 0x1_0000), expected);
        assert_eq!(call(0x1_005D, &[], 1 << 48).0.0, 0x05);
    }
}
