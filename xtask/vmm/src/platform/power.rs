//! Power management registers: sleep, reset and the PM timer (spec boot.md A6; ACPI 6.5, section 4.8).
//!
//! There are no fixed events and no general-purpose events, so nothing here raises the SCI.

/// PM1a status and enable, 16 bits each.
pub const PM1A_EVENT: u16 = 0x400;
/// PM1a control, 16 bits.
pub const PM1A_CONTROL: u16 = 0x404;
/// The PM timer, 32 bits.
pub const PM_TIMER: u16 = 0x408;
/// GPE0 status and enable, 16 bits each.
pub const GPE0: u16 = 0x40C;
/// Writing [`RESET_VALUE`] here resets the machine.
pub const RESET: u16 = 0x433;
/// See [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5, soft off.
pub const S5: u8 = 0;
/// Sleep type of S4, hibernation.
pub const S4: u8 = 1;

/// First and last port of these registers.
pub const PORTS: std::ops::RangeInclusive<u16> = PM1A_EVENT..=RESET;

const SCI_ENABLED: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Ticks of the PM timer in a second.
const TIMER_HZ: u128 = 3_579_545;

/// What the guest wants of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// S5.
    PowerOff,
    /// S4: the guest has saved itself.
    Hibernate,
    /// The reset register.
    Reset,
}

/// The registers.
#[derive(Debug)]
pub struct Power {
    hibernation: bool,
    event_enable: u16,
    general_enable: u16,
    sleep_type: u16,
}

impl Power {
    /// The registers of a machine that can hibernate or not.
    pub fn new(hibernation: bool) -> Self {
        Self {
            hibernation,
            event_enable: 0,
            general_enable: 0,
            sleep_type: 0,
        }
    }

    /// The guest reads `data.len()` bytes at `port`; `now` is the reference time in units of 100 ns.
    pub fn read(&self, port: u16, now: u64, data: &mut [u8]) {
        for (port, byte) in (port..).zip(data) {
            let register = port & !1;
            let value = match port {
                0x400..0x408 | 0x40C..0x410 => self.register(register).to_le_bytes(),
                0x408..0x40C => {
                    let ticks = u128::from(now) * TIMER_HZ / 10_000_000;
                    let bytes = (ticks as u32).to_le_bytes();
                    let low = usize::from(register - PM_TIMER);
                    [bytes[low], bytes[low + 1]]
                }
                _ => [0xFF; 2],
            };
            *byte = value[usize::from(port & 1)];
        }
    }

    fn register(&self, register: u16) -> u16 {
        match register {
            0x402 => self.event_enable,
            PM1A_CONTROL => SCI_ENABLED | self.sleep_type << SLEEP_TYPE_SHIFT,
            0x40E => self.general_enable,
            _ => 0,
        }
    }

    /// The guest writes `data` at `port`.
    pub fn write(&mut self, port: u16, data: &[u8]) -> Option<Request> {
        let value = match *data {
            [low] if port == PM1A_CONTROL + 1 => u16::from_le_bytes([0, low]),
            [low] => low.into(),
            [low, high, ..] => u16::from_le_bytes([low, high]),
            [] => return None,
        };
        match port {
            0x402 => self.event_enable = value,
            0x40E => self.general_enable = value,
            0x404 | 0x405 => {
                self.sleep_type = value >> SLEEP_TYPE_SHIFT & 7;
                if value & SLEEP_ENABLE != 0 {
                    return match u8::try_from(self.sleep_type) {
                        Ok(S5) => Some(Request::PowerOff),
                        Ok(S4) if self.hibernation => Some(Request::Hibernate),
                        _ => None,
                    };
                }
            }
            RESET if value.to_le_bytes()[0] == RESET_VALUE => return Some(Request::Reset),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_types_power_off_and_hibernate_where_that_is_enabled() {
        let off = 0x2000_u16.to_le_bytes();
        let save = 0x2400_u16.to_le_bytes();
        let mut power = Power::new(true);
        assert_eq!(power.write(PM1A_CONTROL, &off), Some(Request::PowerOff));
        assert_eq!(power.write(PM1A_CONTROL, &save), Some(Request::Hibernate));
        assert_eq!(Power::new(false).write(PM1A_CONTROL, &save), None);
        assert_eq!(
            power.write(PM1A_CONTROL + 1, &off[1..]),
            Some(Request::PowerOff)
        );
    }

    #[test]
    fn a_sleep_type_without_the_enable_bit_does_nothing_and_reads_back() {
        let mut power = Power::new(true);
        assert_eq!(power.write(PM1A_CONTROL, &0x0400_u16.to_le_bytes()), None);
        let mut value = [0; 2];
        power.read(PM1A_CONTROL, 0, &mut value);
        assert_eq!(u16::from_le_bytes(value), 0x0401);
    }

    #[test]
    fn only_the_reset_value_resets() {
        let mut power = Power::new(false);
        assert_eq!(power.write(RESET, &[0]), None);
        assert_eq!(power.write(RESET, &[1]), Some(Request::Reset));
    }

    #[test]
    fn the_timer_runs_at_its_rate_and_wraps() {
        let power = Power::new(false);
        let at = |now| {
            let mut value = [0; 4];
            power.read(PM_TIMER, now, &mut value);
            u32::from_le_bytes(value)
        };
        assert_eq!(at(0), 0);
        assert_eq!(at(10_000_000), 3_579_545);
        let wrapped = (3_579_545_u64 * 2000 % (1 << 32)) as u32;
        assert_eq!(at(2000 * 10_000_000), wrapped);
    }

    #[test]
    fn what_is_not_there_reads_as_all_ones() {
        let mut value = [0; 2];
        Power::new(true).read(0x420, 0, &mut value);
        assert_eq!(value, [0xFF; 2]);
    }
}
