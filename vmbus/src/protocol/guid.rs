//! GUIDs in wire order.

use core::fmt;
use core::str::FromStr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID as it stands in messages: the first three groups little endian, the rest as printed
/// (spec vmbus.md, first line).
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Guid(pub [u8; 16]);

/// The text is not of the form `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParseGuidError;

impl fmt::Display for ParseGuidError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a GUID is written as 8-4-4-4-12 hexadecimal digits")
    }
}

impl core::error::Error for ParseGuidError {}

impl Guid {
    /// All bits zero.
    pub const ZERO: Self = Self([0; 16]);

    /// Where each pair of digits of the usual form lies in the text, in wire order.
    const DIGITS: [usize; 16] = [6, 4, 2, 0, 11, 9, 16, 14, 19, 21, 24, 26, 28, 30, 32, 34];

    /// Reads the usual form, `8-4-4-4-12` hexadecimal digits of either case, without braces.
    pub const fn parse(text: &str) -> Result<Self, ParseGuidError> {
        let text = text.as_bytes();
        if text.len() != 36
            || text[8] != b'-'
            || text[13] != b'-'
            || text[18] != b'-'
            || text[23] != b'-'
        {
            return Err(ParseGuidError);
        }
        let mut bytes = [0; 16];
        let mut i = 0;
        while i < 16 {
            let at = Self::DIGITS[i];
            match (hex(text[at]), hex(text[at + 1])) {
                (Some(high), Some(low)) => bytes[i] = high << 4 | low,
                _ => return Err(ParseGuidError),
            }
            i += 1;
        }
        Ok(Self(bytes))
    }

    /// A GUID known when the program is written.
    ///
    /// # Panics
    ///
    /// When the text is not a GUID; in a `const` that is a compile error.
    pub const fn literal(text: &'static str) -> Self {
        match Self::parse(text) {
            Ok(guid) => guid,
            Err(_) => panic!("not a GUID"),
        }
    }
}

const fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

impl FromStr for Guid {
    type Err = ParseGuidError;

    fn from_str(text: &str) -> Result<Self, ParseGuidError> {
        Self::parse(text)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, node @ ..] = self.0;
        let a = u32::from_le_bytes([a0, a1, a2, a3]);
        let b = u16::from_le_bytes([b0, b1]);
        let c = u16::from_le_bytes([c0, c1]);
        write!(f, "{a:08x}-{b:04x}-{c:04x}-{d0:02x}{d1:02x}-")?;
        node.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn wire_order_is_that_of_a_windows_guid() {
        let guid = Guid::literal("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
        let wire = [
            0xd9, 0x63, 0x61, 0xba, 0xa1, 0x04, 0x29, 0x4d, 0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1,
            0xdc, 0x7f,
        ];
        assert_eq!(guid.0, wire);
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "ba6163d9",
            "{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}",
            "ba6163d9x04a1-4d29-b605-72e2ffb1dc7f",
            "ga6163d9-04a1-4d29-b605-72e2ffb1dc7f",
            "ba6163d9-04a1-4d29-b605-72e2ffb1dc7",
            "ba6163d9-04a1-4d29-b605-72e2ffb1dc\u{e9}",
        ] {
            assert_eq!(text.parse::<Guid>(), Err(ParseGuidError), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_and_bytes_agree(bytes: [u8; 16]) {
            let guid = Guid(bytes);
            prop_assert_eq!(guid.to_string().parse(), Ok(guid));
            prop_assert_eq!(guid.to_string().to_uppercase().parse(), Ok(guid));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            let _ = text.parse::<Guid>();
        }
    }
}
