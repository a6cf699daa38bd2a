//! Command descriptor blocks: any bytes become a [`Command`], or are refused with sense data (SPC-3, SBC-3, MMC-5).

use super::sense::Sense;
use crate::storage::vstor::MAX_CDB;

/// Blocks that a command is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blocks {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u32,
}

/// A mode command's form: that of 6 bytes or that of 10.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// MODE SENSE(6), MODE SELECT(6).
    Short,
    /// MODE SENSE(10), MODE SELECT(10).
    Long,
}

/// MODE SENSE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ModeSense {
    /// The form of CDB and answer.
    pub form: Form,
    /// DBD: no block descriptor.
    pub no_descriptor: bool,
    /// LLBAA: a block descriptor with a long address.
    pub long_descriptor: bool,
    /// PC: which values (0 current, 1 changeable, 2 default, 3 saved).
    pub control: u8,
    /// The page.
    pub page: u8,
    /// Its subpage.
    pub subpage: u8,
    /// Bytes of the answer at most.
    pub allocation: u16,
}

/// A command (the bytes of its CDB).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // The fields have the names that they have in the standard.
pub enum Command {
    /// Whether the unit can be used.
    TestUnitReady,
    /// What the unit has to tell.
    RequestSense { descriptor: bool, allocation: u8 },
    /// What the unit is.
    Inquiry {
        vital: bool,
        page: u8,
        allocation: u16,
    },
    /// Changes mode pages.
    ModeSelect {
        form: Form,
        page_format: bool,
        save: bool,
        length: u16,
    },
    /// Asks for mode pages.
    ModeSense(ModeSense),
    /// Starts, stops, loads or ejects.
    StartStop {
        power: u8,
        load_eject: bool,
        start: bool,
    },
    /// Forbids to take the medium out.
    PreventAllow { prevent: u8 },
    /// The last block, in 32 bits.
    ReadCapacity { block: u32, partial: bool },
    /// The last block, in 64 bits.
    ReadCapacityLong {
        block: u64,
        partial: bool,
        allocation: u32,
    },
    /// From the medium.
    Read { blocks: Blocks, fua: bool },
    /// To the medium.
    Write { blocks: Blocks, fua: bool },
    /// Whether the medium can be read, or holds this.
    Verify { blocks: Blocks, compare: u8 },
    /// Makes what was written durable; a count of 0 means up to the end.
    SynchronizeCache { blocks: Blocks },
    /// Gives blocks back.
    Unmap { anchor: bool, length: u16 },
    /// Which units there are.
    ReportLuns { select: u8, allocation: u32 },
    /// The tracks of a disc.
    ReadToc {
        time: bool,
        format: u8,
        track: u8,
        allocation: u16,
    },
    /// What a drive can do.
    GetConfiguration {
        which: u8,
        from: u16,
        allocation: u16,
    },
    /// What has happened to a drive.
    GetEventStatus {
        polled: bool,
        classes: u8,
        allocation: u16,
    },
    /// What a disc is.
    ReadDiscInformation { kind: u8, allocation: u16 },
    /// What a track is: the one with this block (`by` 0), this number (1) or of this session (2).
    ReadTrackInformation {
        open: bool,
        by: u8,
        number: u32,
        allocation: u16,
    },
    /// What the mechanism of a drive is doing.
    MechanismStatus { allocation: u16 },
    /// No command that is known here: its operation code.
    Unknown(u8),
}

/// Why a CDB is no command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It has not the length that its operation code asks for.
    Length,
    /// The unit answers with this.
    Sense(Sense),
}

/// Reads a CDB.
///
/// # Errors
///
/// See [`Refusal`].
pub fn decode(bytes: &[u8]) -> Result<Command, Refusal> {
    let code = *bytes.first().ok_or(Refusal::Length)?;
    let Some(length) = length(code) else {
        return Ok(Command::Unknown(code));
    };
    if bytes.len() < length {
        return Err(Refusal::Length);
    }
    let mut cdb = [0; MAX_CDB];
    cdb.iter_mut()
        .zip(bytes.iter().take(length))
        .for_each(|(to, from)| *to = *from);
    let command = Cdb(cdb).command();
    let known = !matches!(command, Ok(Command::Unknown(_)));
    // NACA, the auto contingent allegiance that nobody has.
    let control = length - 1;
    if known && cdb.get(control).is_some_and(|control| control & 4 != 0) {
        return Err(Refusal::Sense(Sense::invalid_cdb(control as u16)));
    }
    command.map_err(Refusal::Sense)
}

/// The length that goes with an operation code (SPC-3 4.3.4).
const fn length(code: u8) -> Option<usize> {
    match code >> 5 {
        0 => Some(6),
        1 | 2 => Some(10),
        4 => Some(16),
        5 => Some(12),
        _ => None,
    }
}

/// A CDB of the right length, filled up with zeros.
struct Cdb([u8; MAX_CDB]);

/// Big-endian numbers in a CDB.
macro_rules! number {
    ($cdb:expr, $type:ty, $($at:literal),+) => {
        <$type>::from_be_bytes([$($cdb.0[$at]),+])
    };
}

impl Cdb {
    fn command(&self) -> Result<Command, Sense> {
        let bytes = &self.0;
        let bit = |at: usize, bit: u8| bytes.get(at).is_some_and(|byte| byte & (1 << bit) != 0);
        let word = number!(self, u16, 7, 8);
        Ok(match bytes[0] {
            0x00 => Command::TestUnitReady,
            0x03 => Command::RequestSense {
                descriptor: bit(1, 0),
                allocation: bytes[4],
            },
            0x08 | 0x28 | 0xA8 | 0x88 => {
                let (blocks, fua) = self.transfer()?;
                Command::Read { blocks, fua }
            }
            0x0A | 0x2A | 0xAA | 0x8A => {
                let (blocks, fua) = self.transfer()?;
                Command::Write { blocks, fua }
            }
            0x12 => Command::Inquiry {
                vital: bit(1, 0),
                page: bytes[2],
                allocation: number!(self, u16, 3, 4),
            },
            0x15 => self.mode_select(Form::Short, bytes[4].into()),
            0x55 => self.mode_select(Form::Long, word),
            0x1A => self.mode_sense(Form::Short, bytes[4].into()),
            0x5A => self.mode_sense(Form::Long, word),
            0x1B => Command::StartStop {
                power: bytes[4] >> 4,
                load_eject: bit(4, 1),
                start: bit(4, 0),
            },
            0x1E => Command::PreventAllow {
                prevent: bytes[4] & 3,
            },
            0x25 => Command::ReadCapacity {
                block: number!(self, u32, 2, 3, 4, 5),
                partial: bit(8, 0),
            },
            // SERVICE ACTION IN(16): one of its actions.
            0x9E if bytes[1] & 0x1F == 0x10 => Command::ReadCapacityLong {
                block: number!(self, u64, 2, 3, 4, 5, 6, 7, 8, 9),
                partial: bit(14, 0),
                allocation: number!(self, u32, 10, 11, 12, 13),
            },
            0x9E => return Err(Sense::invalid_cdb(1)),
            0x2F | 0xAF | 0x8F => Command::Verify {
                blocks: self.blocks_after_protection()?,
                compare: (bytes[1] >> 1) & 3,
            },
            0x35 => Command::SynchronizeCache {
                blocks: Blocks {
                    first: number!(self, u32, 2, 3, 4, 5).into(),
                    count: word.into(),
                },
            },
            0x91 => Command::SynchronizeCache {
                blocks: self.blocks(),
            },
            0x42 => Command::Unmap {
                anchor: bit(1, 0),
                length: word,
            },
            0x43 => Command::ReadToc {
                time: bit(1, 1),
                // Old drives have the format in the last byte.
                format: match bytes[2] & 0xF {
                    0 => bytes[9] >> 6,
                    format => format,
                },
                track: bytes[6],
                allocation: word,
            },
            0x46 => Command::GetConfiguration {
                which: bytes[1] & 3,
                from: number!(self, u16, 2, 3),
                allocation: word,
            },
            0x4A => Command::GetEventStatus {
                polled: bit(1, 0),
                classes: bytes[4],
                allocation: word,
            },
            0x51 => Command::ReadDiscInformation {
                kind: bytes[1] & 7,
                allocation: word,
            },
            0x52 => Command::ReadTrackInformation {
                open: bit(1, 2),
                by: bytes[1] & 3,
                number: number!(self, u32, 2, 3, 4, 5),
                allocation: word,
            },
            0xA0 => Command::ReportLuns {
                select: bytes[2],
                allocation: number!(self, u32, 6, 7, 8, 9),
            },
            0xBD => Command::MechanismStatus {
                allocation: number!(self, u16, 8, 9),
            },
            code => Command::Unknown(code),
        })
    }

    /// The blocks of a read or write, and whether past the cache.
    fn transfer(&self) -> Result<(Blocks, bool), Sense> {
        if self.0[0] < 0x20 {
            let first = number!(self, u32, 1, 2, 3, 4) >> 8;
            let count = match self.0[4] {
                0 => 256,
                count => count.into(),
            };
            let first = u64::from(first & 0x1F_FFFF);
            return Ok((Blocks { first, count }, false));
        }
        Ok((self.blocks_after_protection()?, self.0[1] & 8 != 0))
    }

    /// The same of a command that could ask for protection information, which nobody has.
    fn blocks_after_protection(&self) -> Result<Blocks, Sense> {
        if self.0[1] >> 5 != 0 {
            return Err(Sense::invalid_cdb(1));
        }
        Ok(self.blocks())
    }

    /// Where commands of 10, 12 and 16 bytes have their blocks.
    fn blocks(&self) -> Blocks {
        let short = number!(self, u32, 2, 3, 4, 5).into();
        match self.0[0] >> 5 {
            4 => Blocks {
                first: number!(self, u64, 2, 3, 4, 5, 6, 7, 8, 9),
                count: number!(self, u32, 10, 11, 12, 13),
            },
            5 => Blocks {
                first: short,
                count: number!(self, u32, 6, 7, 8, 9),
            },
            _ => Blocks {
                first: short,
                count: number!(self, u16, 7, 8).into(),
            },
        }
    }

    fn mode_select(&self, form: Form, length: u16) -> Command {
        Command::ModeSelect {
            form,
            page_format: self.0[1] & 0x10 != 0,
            save: self.0[1] & 1 != 0,
            length,
        }
    }

    fn mode_sense(&self, form: Form, allocation: u16) -> Command {
        Command::ModeSense(ModeSense {
            form,
            no_descriptor: self.0[1] & 8 != 0,
            long_descriptor: form == Form::Long && self.0[1] & 0x10 != 0,
            control: self.0[2] >> 6,
            page: self.0[2] & 0x3F,
            subpage: self.0[3],
            allocation,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(first: u64, count: u32) -> Blocks {
        Blocks { first, count }
    }

    #[test]
    fn every_length_of_read_has_its_blocks_at_its_place() {
        let read = |blocks, fua| Ok(Command::Read { blocks, fua });
        assert_eq!(
            decode(&[0x08, 0xE1, 2, 3, 4, 0]),
            read(blocks(0x1_0203, 4), false)
        );
        assert_eq!(decode(&[0x08, 0, 0, 0, 0, 0]), read(blocks(0, 256), false));
        assert_eq!(
            decode(&[0x28, 8, 1, 2, 3, 4, 0, 5, 6, 0]),
            read(blocks(0x0102_0304, 0x506), true)
        );
        assert_eq!(
            decode(&[0xA8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]),
            read(blocks(0x0102_0304, 0x0506_0708), false)
        );
        assert_eq!(
            decode(&[0x88, 0x18, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0]),
            read(blocks(0x0102_0304_0506_0708, 0x090A_0B0C), true)
        );
    }

    #[test]
    fn a_cdb_shorter_than_its_operation_code_asks_for_is_no_command() {
        assert_eq!(decode(&[]), Err(Refusal::Length));
        for (code, needed) in [(0x00, 6), (0x28, 10), (0x5A, 10), (0xA8, 12), (0x88, 16)] {
            let mut cdb = [0; MAX_CDB];
            cdb[0] = code;
            assert_eq!(
                decode(&cdb[..needed - 1]),
                Err(Refusal::Length),
                "{code:#x}"
            );
            assert!(decode(&cdb[..needed]).is_ok(), "{code:#x}");
            assert!(decode(&cdb).is_ok(), "{code:#x}");
        }
    }

    #[test]
    fn protection_and_contingent_allegiance_are_refused_with_their_byte() {
        let refused = |byte| Err(Refusal::Sense(Sense::invalid_cdb(byte)));
        assert_eq!(decode(&[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0]), refused(1));
        assert_eq!(decode(&[0x2F, 0x40, 0, 0, 0, 0, 0, 0, 1, 0]), refused(1));
        assert_eq!(decode(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 4]), refused(9));
        assert_eq!(decode(&[0x00, 0, 0, 0, 0, 4]), refused(5));
    }

    #[test]
    fn what_nobody_knows_keeps_its_operation_code() {
        assert_eq!(decode(&[0x01, 0, 0, 0, 0, 4]), Ok(Command::Unknown(0x01)));
        assert_eq!(decode(&[0xC1]), Ok(Command::Unknown(0xC1)));
        assert_eq!(decode(&[0x7F, 1]), Ok(Command::Unknown(0x7F)));
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_decoded(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = decode(&bytes);
        }
    }
}
