//! Sense data: what a unit tells of a command that failed, and of what has happened to it (SPC-3 4.5).

/// Bytes of sense data in fixed format.
pub const LENGTH: usize = 18;

/// The sense key: what kind of trouble it is (SPC-3 table 27).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct SenseKey(pub u8);

impl SenseKey {
    /// Nothing to tell.
    pub const NO_SENSE: Self = Self(0x0);
    /// The unit cannot be used now.
    pub const NOT_READY: Self = Self(0x2);
    /// The medium is damaged.
    pub const MEDIUM_ERROR: Self = Self(0x3);
    /// The device is damaged.
    pub const HARDWARE_ERROR: Self = Self(0x4);
    /// The command makes no sense.
    pub const ILLEGAL_REQUEST: Self = Self(0x5);
    /// Something has happened to the unit.
    pub const UNIT_ATTENTION: Self = Self(0x6);
    /// A write to what cannot be written.
    pub const DATA_PROTECT: Self = Self(0x7);
    /// The unit gave the command up.
    pub const ABORTED_COMMAND: Self = Self(0xB);
    /// The data on the medium are others.
    pub const MISCOMPARE: Self = Self(0xE);
}

/// The additional sense code and its qualifier: what the trouble is (SPC-3 annex D).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Additional(pub u8, pub u8);

impl Additional {
    /// Nothing more to tell.
    pub const NONE: Self = Self(0x00, 0x00);
    /// The unit is becoming ready.
    pub const BECOMING_READY: Self = Self(0x04, 0x01);
    /// A sector could not be written.
    pub const WRITE_ERROR: Self = Self(0x0C, 0x00);
    /// A sector could not be read.
    pub const UNRECOVERED_READ_ERROR: Self = Self(0x11, 0x00);
    /// The parameter list has an impossible length.
    pub const PARAMETER_LIST_LENGTH: Self = Self(0x1A, 0x00);
    /// VERIFY found other data.
    pub const MISCOMPARE: Self = Self(0x1D, 0x00);
    /// There is no such command here.
    pub const INVALID_OPERATION_CODE: Self = Self(0x20, 0x00);
    /// Beyond the last block.
    pub const LBA_OUT_OF_RANGE: Self = Self(0x21, 0x00);
    /// A field of the CDB makes no sense.
    pub const INVALID_FIELD_IN_CDB: Self = Self(0x24, 0x00);
    /// A field of the parameter list makes no sense.
    pub const INVALID_FIELD_IN_PARAMETERS: Self = Self(0x26, 0x00);
    /// The disk is read-only.
    pub const WRITE_PROTECTED: Self = Self(0x27, 0x00);
    /// What the disk lies on is full.
    pub const SPACE_ALLOCATION_FAILED: Self = Self(0x27, 0x07);
    /// There is another medium than before.
    pub const MEDIUM_MAY_HAVE_CHANGED: Self = Self(0x28, 0x00);
    /// The unit is new, or was reset.
    pub const POWER_ON_OR_RESET: Self = Self(0x29, 0x00);
    /// The disk has another size than before.
    pub const CAPACITY_CHANGED: Self = Self(0x2A, 0x09);
    /// Mode pages cannot be saved.
    pub const SAVING_NOT_SUPPORTED: Self = Self(0x39, 0x00);
    /// There is no medium in the closed drive.
    pub const NO_MEDIUM: Self = Self(0x3A, 0x01);
    /// There is no medium: the drive is open.
    pub const NO_MEDIUM_OPEN: Self = Self(0x3A, 0x02);
    /// Other units have come or gone.
    pub const REPORTED_LUNS_CHANGED: Self = Self(0x3F, 0x0E);
    /// The device failed inside.
    pub const INTERNAL_FAILURE: Self = Self(0x44, 0x00);
    /// The initiator has forbidden to take the medium out.
    pub const REMOVAL_PREVENTED: Self = Self(0x53, 0x02);
}

/// What a unit has to tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sense {
    /// What kind of trouble it is.
    pub key: SenseKey,
    /// What the trouble is.
    pub additional: Additional,
    /// The block that it is about.
    pub block: Option<u64>,
    /// The field that is wrong.
    pub field: Option<Field>,
}

/// A byte that makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Field {
    /// Of the CDB.
    Cdb(u16),
    /// Of the parameter list.
    Parameters(u16),
}

impl Sense {
    /// Nothing to tell.
    pub const NONE: Self = Self::new(SenseKey::NO_SENSE, Additional::NONE);

    /// Sense data without details.
    pub const fn new(key: SenseKey, additional: Additional) -> Self {
        Self {
            key,
            additional,
            block: None,
            field: None,
        }
    }

    /// The command makes no sense.
    pub const fn illegal(additional: Additional) -> Self {
        Self::new(SenseKey::ILLEGAL_REQUEST, additional)
    }

    /// A unit attention condition.
    pub const fn attention(additional: Additional) -> Self {
        Self::new(SenseKey::UNIT_ATTENTION, additional)
    }

    /// This byte of the CDB makes no sense.
    pub const fn invalid_cdb(byte: u16) -> Self {
        Self {
            field: Some(Field::Cdb(byte)),
            ..Self::illegal(Additional::INVALID_FIELD_IN_CDB)
        }
    }

    /// This byte of the parameter list makes no sense.
    pub const fn invalid_parameters(byte: u16) -> Self {
        Self {
            field: Some(Field::Parameters(byte)),
            ..Self::illegal(Additional::INVALID_FIELD_IN_PARAMETERS)
        }
    }

    /// The same, about this block.
    #[must_use]
    pub const fn at_block(self, block: u64) -> Self {
        Self {
            block: Some(block),
            ..self
        }
    }

    /// Sense data in fixed format (SPC-3 4.5.3). A block number that does not fit its 32 bits is left out.
    pub fn to_bytes(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[0] = 0x70;
        bytes[2] = self.key.0;
        if let Some(block) = self.block.and_then(|block| u32::try_from(block).ok()) {
            bytes[0] |= 0x80;
            bytes[3..7].copy_from_slice(&block.to_be_bytes());
        }
        bytes[7] = (LENGTH - 8) as u8;
        bytes[12] = self.additional.0;
        bytes[13] = self.additional.1;
        if let Some(field) = self.field {
            let (flags, byte) = match field {
                Field::Cdb(byte) => (0xC0, byte),
                Field::Parameters(byte) => (0x80, byte),
            };
            bytes[15] = flags;
            bytes[16..18].copy_from_slice(&byte.to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format_tells_key_code_block_and_field() {
        let medium = Sense::new(SenseKey::MEDIUM_ERROR, Additional::WRITE_ERROR);
        let bytes = medium.at_block(0x0102_0304).to_bytes();
        let expected = [0xF0, 0, 3, 1, 2, 3, 4, 10, 0, 0, 0, 0, 0x0C, 0, 0, 0, 0, 0];
        assert_eq!(bytes, expected);
        let bytes = Sense::invalid_cdb(2).to_bytes();
        let expected = [
            0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xC0, 0, 2,
        ];
        assert_eq!(bytes, expected);
        let bytes = Sense::invalid_parameters(0x104).to_bytes();
        assert_eq!(bytes[12..], [0x26, 0, 0, 0x80, 1, 4]);
    }

    #[test]
    fn a_block_beyond_32_bits_is_not_told() {
        let medium = Sense::new(SenseKey::MEDIUM_ERROR, Additional::WRITE_ERROR);
        let bytes = medium.at_block(1 << 32).to_bytes();
        assert_eq!(bytes[..7], [0x70, 0, 3, 0, 0, 0, 0]);
    }
}
