//! The I/O APIC: 24 inputs that become messages to local APICs (82093AA data sheet; spec boot.md A6).
//!
//! It is here and not in KVM, because KVM's comes with a PIC, which a Generation 2 VM has not. All that is connected
//! to it is edge-triggered; an input that the guest has set to level is sent once for each edge.

use super::layout::IO_APIC;

/// Inputs.
pub const INPUTS: u8 = 24;

/// Bytes of its registers.
const WINDOW: u64 = 0x20;

const SELECT: u64 = 0x00;
const DATA: u64 = 0x10;

/// As many inputs, and the version with which they came.
const VERSION: u32 = (INPUTS as u32 - 1) << 16 | 0x11;

const MASKED: u64 = 1 << 16;
/// Bits that the guest cannot write: delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// An interrupt message, as a device on PCI would write it (Intel SDM, volume 3, Message Signalled Interrupts).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// Where to.
    pub address: u32,
    /// What.
    pub data: u32,
}

/// The registers.
#[derive(Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    redirection: [u64; INPUTS as usize],
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            id: 0,
            select: 0,
            redirection: [MASKED; INPUTS as usize],
        }
    }
}

impl IoApic {
    /// Whether an address is one of its registers.
    pub fn claims(address: u64) -> bool {
        (IO_APIC..IO_APIC + WINDOW).contains(&address)
    }

    /// The guest reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let value = match address.wrapping_sub(IO_APIC) {
            SELECT => self.select.into(),
            DATA => self.register(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// The guest writes.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match address.wrapping_sub(IO_APIC) {
            SELECT => self.select = value.to_le_bytes()[0],
            DATA => self.set_register(value),
            _ => {}
        }
    }

    /// A device raises an input. Gives the message that becomes of it, unless the input is masked or does not exist.
    pub fn raise(&self, input: u8) -> Option<Message> {
        let entry = *self.redirection.get(usize::from(input))?;
        (entry & MASKED == 0).then(|| {
            let destination = (entry >> 56) as u32;
            let logical = (entry >> 11 & 1) as u32;
            Message {
                address: 0xFEE0_0000 | destination << 12 | logical << 2,
                data: (entry & 0x7FF) as u32,
            }
        })
    }

    fn register(&self) -> u32 {
        match (self.select, self.entry()) {
            (0 | 2, _) => self.id << 24,
            (1, _) => VERSION,
            (_, Some((index, shift))) => (self.redirection[index] >> shift) as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32) {
        match (self.select, self.entry()) {
            (0, _) => self.id = value >> 24 & 0xF,
            (_, Some((index, shift))) => {
                let entry = &mut self.redirection[index];
                let kept = *entry & (READ_ONLY | !(0xFFFF_FFFF << shift));
                *entry = kept | (u64::from(value) << shift & !READ_ONLY);
            }
            _ => {}
        }
    }

    /// The selected redirection entry, and which half of it.
    fn entry(&self) -> Option<(usize, u32)> {
        let number = self.select.checked_sub(0x10)?;
        let index = usize::from(number / 2);
        (index < self.redirection.len()).then_some((index, u32::from(number % 2) * 32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(apic: &mut IoApic, register: u8, value: u32) {
        apic.write(IO_APIC + SELECT, &u32::from(register).to_le_bytes());
        apic.write(IO_APIC + DATA, &value.to_le_bytes());
    }

    fn get(apic: &mut IoApic, register: u8) -> u32 {
        apic.write(IO_APIC + SELECT, &[register]);
        let mut value = [0; 4];
        apic.read(IO_APIC + DATA, &mut value);
        u32::from_le_bytes(value)
    }

    #[test]
    fn inputs_are_masked_until_the_guest_unmasks_them() {
        let mut apic = IoApic::default();
        assert_eq!(apic.raise(4), None);
        set(&mut apic, 0x19, 3 << 24);
        set(&mut apic, 0x18, 0x34);
        let sent = apic.raise(4);
        let expected = Message {
            address: 0xFEE0_3000,
            data: 0x34,
        };
        assert_eq!(sent, Some(expected));
        set(&mut apic, 0x18, 0x1_0034);
        assert_eq!(apic.raise(4), None);
        assert_eq!(apic.raise(24), None);
    }

    #[test]
    fn logical_destinations_stay_logical() {
        let mut apic = IoApic::default();
        set(&mut apic, 0x11, 1 << 24);
        set(&mut apic, 0x10, 0x0931);
        let sent = apic.raise(0).unwrap();
        assert_eq!((sent.address, sent.data), (0xFEE0_1004, 0x0131));
    }

    #[test]
    fn registers_read_back_what_can_be_written() {
        let mut apic = IoApic::default();
        assert_eq!(get(&mut apic, 1), 0x0017_0011);
        set(&mut apic, 0x10 + 46, 0xFFFF_FFFF);
        assert_eq!(get(&mut apic, 0x10 + 46), !0x5000);
        assert_eq!(get(&mut apic, 0x10 + 47), 0, "the other half is untouched");
        assert_eq!(get(&mut apic, 0x10 + 48), 0, "there is no input 24");
        set(&mut apic, 0xFF, 1);
        assert_eq!(get(&mut apic, 0xFF), 0);
    }

    #[test]
    fn accesses_of_any_width_and_place_do_no_harm() {
        let mut apic = IoApic::default();
        let mut wide = [0xAA; 8];
        for address in IO_APIC..IO_APIC + WINDOW {
            apic.write(address, &wide[..3]);
            apic.read(address, &mut wide);
        }
        assert!(!IoApic::claims(IO_APIC + WINDOW));
    }
}
