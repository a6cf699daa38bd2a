//! The guest's crash MSRs (spec tlfs.md 9).
//!
//! They are here and not in KVM, because KVM's do not take a message.

use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus_host::memory::GuestMemory;

/// P0 to P4 and CTL.
pub const MSRS: std::ops::RangeInclusive<u32> = 0x4000_0100..=0x4000_0105;

/// CRASH_CTL.
const CONTROL: u32 = 0x4000_0105;
const NOTIFY: u64 = 1 << 63;
const MESSAGE: u64 = 1 << 62;

/// What the guest said when it crashed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Crash {
    /// P0 to P4. With a message P3 and P4 are its address and length.
    pub parameters: [u64; 5],
    /// The message, if there is one that can be read.
    pub message: Option<String>,
}

/// The registers.
#[derive(Debug, Default)]
pub struct Registers {
    parameters: [u64; 5],
}

impl Registers {
    /// The guest reads; `None`: there is no such register.
    pub fn read(&self, msr: u32) -> Option<u64> {
        match msr {
            CONTROL => Some(NOTIFY | MESSAGE),
            _ => {
                let index = msr.checked_sub(*MSRS.start())?;
                self.parameters.get(index as usize).copied()
            }
        }
    }

    /// The guest writes; `None`: there is no such register. Gives the crash that it reports, if it does.
    pub fn write(&mut self, msr: u32, value: u64, memory: &GuestMemory) -> Option<Option<Crash>> {
        if msr == CONTROL {
            return Some((value & NOTIFY != 0).then(|| {
                Crash {
                    parameters: self.parameters,
                    message: (value & MESSAGE != 0)
                        .then(|| self.message(memory))
                        .flatten(),
                }
            }));
        }
        let index = msr.checked_sub(*MSRS.start())?;
        *self.parameters.get_mut(index as usize)? = value;
        Some(None)
    }

    fn message(&self, memory: &GuestMemory) -> Option<String> {
        let [_, _, _, address, length] = self.parameters;
        let (page, offset) = (address / PAGE_SIZE as u64, address as usize % PAGE_SIZE);
        let length = usize::try_from(length).ok()?;
        if offset + length.min(PAGE_SIZE + 1) > PAGE_SIZE {
            return None;
        }
        let (pages, index) = memory.find(PageNumber(page))?;
        let mut text = vec![0; length];
        pages.read(index * PAGE_SIZE + offset, &mut text).ok()?;
        let text = text.strip_suffix(&[0]).unwrap_or(&text);
        Some(String::from_utf8_lossy(text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use vmbus::shared::SharedPages;

    use super::*;

    fn report(address: u64, length: u64, control: u64) -> Option<Crash> {
        let memory = GuestMemory::default();
        let pages = SharedPages::from_heap(PageNumber(0x10), 1).unwrap();
        pages.write(0xFF0, b"it is \xFF all over").unwrap();
        memory.add(&pages);
        let mut registers = Registers::default();
        for (msr, value) in (*MSRS.start()..).zip([1, 2, 3, address, length]) {
            assert_eq!(registers.write(msr, value, &memory), Some(None));
            assert_eq!(registers.read(msr), Some(value));
        }
        registers.write(CONTROL, control, &memory).unwrap()
    }

    #[test]
    fn a_crash_comes_with_its_parameters_and_its_text() {
        let crash = report(0x1_0FF0, 16, NOTIFY | MESSAGE).unwrap();
        assert_eq!(crash.parameters, [1, 2, 3, 0x1_0FF0, 16]);
        assert_eq!(crash.message.unwrap(), "it is \u{FFFD} all over");
        assert_eq!(report(0x1_0FF0, 16, NOTIFY).unwrap().message, None);
        assert_eq!(report(0x1_0FF0, 16, MESSAGE), None, "not without notice");
    }

    #[test]
    fn a_text_that_is_not_in_one_page_of_memory_is_left_out() {
        for (address, length) in [
            (0x1_0FF1, 16),
            (0x2_0000, 4),
            (0x1_0000, u64::MAX),
            (u64::MAX, 1),
        ] {
            let crash = report(address, length, NOTIFY | MESSAGE).unwrap();
            assert_eq!(crash.message, None);
        }
    }

    #[test]
    fn control_tells_that_messages_are_taken() {
        assert_eq!(Registers::default().read(CONTROL), Some(3 << 62));
        assert_eq!(Registers::default().read(CONTROL + 1), None);
        assert_eq!(Registers::default().read(MSRS.start() - 1), None);
    }
}
