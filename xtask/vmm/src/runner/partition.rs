//! The host's thread above a partition on KVM.

use std::ops::Range;

use vmbus::ids::{ConnectionId, PageNumber, VpIndex};
use vmbus_host::bus::{HvStatus, Message};
use vmbus_host::memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::{Crash, End, Exits, Runner, Vm};
use crate::Error;
use crate::partition::{self, Owner, Partition};

impl Vm for Partition {
    fn reference_time(&self) -> u64 {
        self.reference_time()
    }

    fn set_event_flag(&self, vp: VpIndex, sint: u8, flag: u16) -> bool {
        self.set_event_flag(vp, sint, flag)
    }

    fn deliver_message(&self, message: &Message) -> bool {
        self.deliver_message(message)
    }

    fn route_signal(&self, connection: ConnectionId, event: Option<&EventFd>) -> Result<(), Error> {
        self.route_signal(connection, event)
    }

    fn memory(&self) -> GuestMemory {
        self.memory()
    }

    fn resume(&self) {
        self.resume();
    }

    fn pause(&self) {
        self.pause();
    }

    fn hot_add_range(&self) -> Range<PageNumber> {
        self.hot_add_range()
    }

    fn hot_add_memory(&self, first: PageNumber, count: usize) -> Result<(), Error> {
        self.hot_add_memory(first, count)
    }

    fn discard(&self, first: PageNumber, count: u64) {
        self.discard(first, count);
    }

    fn console_input(&self, bytes: &[u8]) -> usize {
        self.console_input(bytes)
    }

    fn exits(&self) -> Exits {
        let here = self.exits();
        let here = here.iter().map(|(kind, count)| (kind.to_string(), count));
        Exits {
            here: here.collect(),
            kernel: self.kernel_statistics(),
        }
    }
}

impl Owner for Runner {
    fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> HvStatus {
        self.post_message(connection, payload)
    }

    fn signal_event(&self, connection: ConnectionId, flag: u16) -> HvStatus {
        self.signal_event(connection, flag)
    }

    fn message_delivered(&self, vp: VpIndex) {
        self.message_delivered(vp);
    }

    fn console_drained(&self) {
        self.console_drained();
    }

    fn crashed(&self, crash: partition::Crash) {
        let partition::Crash {
            parameters,
            message,
        } = crash;
        self.crashed(Crash {
            parameters,
            message,
        });
    }

    fn ended(&self, end: partition::End) {
        self.ended(match end {
            partition::End::PowerOff => End::PowerOff,
            partition::End::Hibernated => End::Hibernated,
            partition::End::Reset => End::Reset,
            partition::End::TripleFault => End::TripleFault,
            partition::End::DebugExit(value) => End::DebugExit(value),
            partition::End::Failed(why) => End::Failed(why),
        });
    }
}
