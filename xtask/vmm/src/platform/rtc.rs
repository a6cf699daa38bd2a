//! The CMOS clock at ports 0x70 and 0x71: time of day in UTC, read by guests at boot. No alarm, no interrupt
//! (MC146818 data sheet; spec boot.md A6).

/// The index and data ports.
pub const PORTS: std::ops::RangeInclusive<u16> = 0x70..=0x71;

/// Where the century is; the FADT says so, too.
pub const CENTURY: u8 = 0x32;

/// Divider and rate as after power-up; no update is ever in progress.
const STATUS_A: u8 = 0x26;
/// 24 hours, BCD.
const STATUS_B: u8 = 0x02;
/// The battery is good.
const STATUS_D: u8 = 0x80;

/// The clock's registers. What the guest writes to them is ignored: the time is the host's.
#[derive(Debug, Default)]
pub struct Rtc {
    index: u8,
}

impl Rtc {
    /// The guest writes the index; writes of data are ignored.
    pub fn write(&mut self, port: u16, value: u8) {
        if port == *PORTS.start() {
            self.index = value & 0x7F;
        }
    }

    /// The guest reads; `now` is the time of day in seconds since 1970.
    pub fn read(&self, port: u16, now: u64) -> u8 {
        if port == *PORTS.start() {
            return 0xFF;
        }
        let time = Date::of(now);
        match self.index {
            0x00 => bcd(time.second),
            0x02 => bcd(time.minute),
            0x04 => bcd(time.hour),
            0x06 => time.week_day,
            0x07 => bcd(time.day),
            0x08 => bcd(time.month),
            0x09 => bcd((time.year % 100) as u8),
            CENTURY => bcd((time.year / 100 % 100) as u8),
            0x0A => STATUS_A,
            0x0B => STATUS_B,
            0x0D => STATUS_D,
            _ => 0,
        }
    }
}

/// Two decimal digits.
fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// A moment in UTC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Date {
    year: u64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    week_day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Date {
    /// From seconds since 1970. Years of 365.2425 days that begin in March make leap days the last of their year.
    fn of(seconds: u64) -> Self {
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Days since the first of March of the year 0.
        let since = days + 719_468;
        let (era, day_of_era) = (since / 146_097, since % 146_097);
        let leaps = day_of_era / 1460 + day_of_era / 146_096;
        let year_of_era = (day_of_era + day_of_era / 36_524 - leaps) / 365;
        let first = 365 * year_of_era + year_of_era / 4 - year_of_era / 100;
        let day_of_year = day_of_era - first;
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            week_day: ((days + 4) % 7 + 1) as u8,
            hour: (second / 3600) as u8,
            minute: (second / 60 % 60) as u8,
            second: (second % 60) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date(seconds: u64) -> (u64, u8, u8, u8) {
        let date = Date::of(seconds);
        (date.year, date.month, date.day, date.week_day)
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), (1970, 1, 1, 5));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3));
        assert_eq!(date(951_868_800), (2000, 3, 1, 4));
        assert_eq!(date(1_704_067_199), (2023, 12, 31, 1));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2));
    }

    #[test]
    fn the_guest_reads_decimal_digits_of_the_whole_year() {
        let mut rtc = Rtc::default();
        let mut read = |index| {
            rtc.write(0x70, index);
            rtc.read(0x71, 1_704_067_199)
        };
        assert_eq!([0, 2, 4].map(&mut read), [0x59, 0x59, 0x23]);
        assert_eq!([7, 8, 9, CENTURY].map(&mut read), [0x31, 0x12, 0x23, 0x20]);
        assert_eq!(read(0x0B) & 0b110, 0b010, "24 hours, not binary");
        assert_eq!(read(0x0A) & 0x80, 0, "no update in progress");
    }
}
