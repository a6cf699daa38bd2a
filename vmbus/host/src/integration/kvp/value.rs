//! Keys and values as they are on the wire (spec ic.md 8.1 and 8.2).

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::integration::RequestError;

/// Bytes of a key's place, its end included.
const KEY: usize = 512;

/// Bytes of a value's place, its end included.
const VALUE: usize = 2048;

/// Units of UTF-16 in the longest key.
pub const LONGEST_KEY: usize = KEY / 2 - 1;

/// Units of UTF-16 in the longest text.
pub const LONGEST_TEXT: usize = VALUE / 2 - 1;

/// Where keys and values live (spec ic.md 8.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Pool {
    /// Written by the host.
    External,
    /// Written by the guest's programs.
    Guest,
    /// What the guest says of itself: its name, its system, its addresses.
    Auto,
    /// What the host says of itself.
    AutoExternal,
    /// What the guest keeps for itself.
    AutoInternal,
}

impl Pool {
    /// Every pool.
    pub const ALL: [Self; 5] = [
        Self::External,
        Self::Guest,
        Self::Auto,
        Self::AutoExternal,
        Self::AutoInternal,
    ];

    /// Its number.
    pub const fn number(self) -> u8 {
        match self {
            Self::External => 0,
            Self::Guest => 1,
            Self::Auto => 2,
            Self::AutoExternal => 3,
            Self::AutoInternal => 4,
        }
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::External => "external",
            Self::Guest => "guest",
            Self::Auto => "auto",
            Self::AutoExternal => "auto-external",
            Self::AutoInternal => "auto-internal",
        })
    }
}

/// What belongs to a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// Text.
    Text(String),
    /// Text with names of variables in it.
    Expandable(String),
    /// A number.
    U32(u32),
    /// A number.
    U64(u64),
    /// A type that this host does not know, and its bytes.
    Other {
        /// The type.
        kind: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) | Self::Expandable(text) => f.write_str(text),
            Self::U32(number) => number.fmt(f),
            Self::U64(number) => number.fmt(f),
            Self::Other { kind, bytes } => write!(f, "{} bytes of type {kind}", bytes.len()),
        }
    }
}

/// Types of values.
const TEXT: u32 = 1;
const EXPANDABLE: u32 = 2;
const NUMBER_32: u32 = 4;
const NUMBER_64: u32 = 11;
/// What Linux takes for it.
const NUMBER_64_OF_LINUX: u32 = 8;

/// A key and its value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// What belongs to it.
    pub value: Value,
}

/// Value message.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct EntryBody {
    kind: U32,
    key_size: U32,
    value_size: U32,
    key: [u8; KEY],
    value: [u8; VALUE],
}

const _: () = assert!(size_of::<EntryBody>() == 2572);

/// Key of a delete message.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct KeyBody {
    key_size: U32,
    key: [u8; KEY],
}

const _: () = assert!(size_of::<KeyBody>() == 516);

impl KeyBody {
    pub(super) fn new(key: &str) -> Result<Self, RequestError> {
        let mut body = Self::new_zeroed();
        body.key_size = U32::new(put_key(&mut body.key, key)?);
        Ok(body)
    }
}

impl EntryBody {
    /// A key without a value: what is asked for.
    pub(super) fn key(key: &str) -> Result<Self, RequestError> {
        let mut body = Self::new_zeroed();
        body.key_size = U32::new(put_key(&mut body.key, key)?);
        Ok(body)
    }

    pub(super) fn entry(key: &str, value: &Value) -> Result<Self, RequestError> {
        let mut body = Self::key(key)?;
        let place = &mut body.value;
        let (kind, size) = match value {
            Value::Text(text) => (TEXT, put_text(place, text, "the value")?),
            Value::Expandable(text) => (EXPANDABLE, put_text(place, text, "the value")?),
            Value::U32(number) => (NUMBER_32, put(place, &number.to_le_bytes())?),
            Value::U64(number) => (NUMBER_64, put(place, &number.to_le_bytes())?),
            Value::Other { kind, bytes } => (*kind, put(place, bytes)?),
        };
        body.kind = U32::new(kind);
        body.value_size = U32::new(size);
        Ok(body)
    }

    /// What a guest has made of it.
    pub(super) fn read(&self) -> Result<Entry, RequestError> {
        let key = taken(&self.key, self.key_size, "a key longer than its place")?;
        Ok(Entry {
            key: text(key)?,
            value: self.read_value()?,
        })
    }

    /// The value alone.
    pub(super) fn read_value(&self) -> Result<Value, RequestError> {
        let short = RequestError::Malformed("a number shorter than its type");
        let bytes = taken(
            &self.value,
            self.value_size,
            "a value longer than its place",
        )?;
        Ok(match self.kind.get() {
            TEXT => Value::Text(text(bytes)?),
            EXPANDABLE => Value::Expandable(text(bytes)?),
            NUMBER_32 => {
                let number = bytes.first_chunk().ok_or(short)?;
                Value::U32(u32::from_le_bytes(*number))
            }
            NUMBER_64 | NUMBER_64_OF_LINUX => {
                let number = bytes.first_chunk().ok_or(short)?;
                Value::U64(u64::from_le_bytes(*number))
            }
            kind => Value::Other {
                kind,
                bytes: bytes.into(),
            },
        })
    }
}

fn put_key(place: &mut [u8; KEY], key: &str) -> Result<u32, RequestError> {
    if key.is_empty() {
        return Err(RequestError::Invalid("the key is empty".into()));
    }
    put_text(place, key, "the key")
}

/// Writes text and its end; gives the bytes of both.
pub(super) fn put_text(
    place: &mut [u8],
    text: &str,
    what: &'static str,
) -> Result<u32, RequestError> {
    if text.contains('\0') {
        return Err(RequestError::Invalid(alloc::format!(
            "{what} has a zero in it"
        )));
    }
    let limit = place.len() / 2 - 1;
    let mut units = 0;
    for unit in text.encode_utf16() {
        if units == limit {
            return Err(RequestError::TooLong { what, limit });
        }
        if let Some(place) = place.get_mut(2 * units..2 * units + 2) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
        units += 1;
    }
    Ok(2 * (units as u32 + 1))
}

fn put(place: &mut [u8; VALUE], bytes: &[u8]) -> Result<u32, RequestError> {
    let too_long = RequestError::TooLong {
        what: "the value",
        limit: VALUE,
    };
    let place = place.get_mut(..bytes.len()).ok_or(too_long)?;
    place.copy_from_slice(bytes);
    Ok(bytes.len() as u32)
}

fn taken<'p>(place: &'p [u8], size: U32, what: &'static str) -> Result<&'p [u8], RequestError> {
    let bytes = place.get(..size.get() as usize);
    bytes.ok_or(RequestError::Malformed(what))
}

/// Text that ends at the first zero, or with its bytes. What is no UTF-16 is replaced.
pub(super) fn text(bytes: &[u8]) -> Result<String, RequestError> {
    let (units, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(RequestError::Malformed("text that ends in half a unit"));
    }
    let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
    let units = units.take_while(|unit| *unit != 0);
    let text = char::decode_utf16(units);
    Ok(text
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect())
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    fn back(value: Value) -> Value {
        EntryBody::entry("key", &value)
            .unwrap()
            .read_value()
            .unwrap()
    }

    #[test]
    fn values_of_every_type_come_back() {
        for value in [
            Value::Text("grüße 🦀".to_string()),
            Value::Text(String::new()),
            Value::Expandable("%PATH%".to_string()),
            Value::U32(u32::MAX),
            Value::U64(u64::MAX),
            Value::Other {
                kind: 3,
                bytes: alloc::vec![1, 2, 3],
            },
        ] {
            assert_eq!(back(value.clone()), value);
        }
    }

    #[test]
    fn sizes_count_the_end_of_text() {
        let body = EntryBody::entry("ab", &Value::Text("xyz".to_string())).unwrap();
        assert_eq!((body.key_size.get(), body.value_size.get()), (6, 8));
        assert_eq!(body.key[..6], [b'a', 0, b'b', 0, 0, 0]);
        let body = EntryBody::entry("ab", &Value::U64(1)).unwrap();
        assert_eq!((body.kind.get(), body.value_size.get()), (NUMBER_64, 8));
    }

    #[test]
    fn the_longest_key_and_text_fit_and_one_unit_more_does_not() {
        let key = |units| EntryBody::key(&"k".repeat(units)).map(|_| ());
        assert_eq!(key(LONGEST_KEY), Ok(()));
        let limit = LONGEST_KEY;
        let what = "the key";
        assert_eq!(key(limit + 1), Err(RequestError::TooLong { what, limit }));
        // A crab is two units.
        let crabs = |units| Value::Text("🦀".repeat(units / 2));
        assert!(EntryBody::entry("k", &crabs(LONGEST_TEXT - 1)).is_ok());
        assert!(EntryBody::entry("k", &crabs(LONGEST_TEXT + 1)).is_err());
        assert!(EntryBody::key("").is_err());
        assert!(EntryBody::key("a\0b").is_err());
    }

    #[test]
    fn sizes_beyond_their_place_and_short_numbers_are_malformed() {
        let mut body = EntryBody::entry("k", &Value::U32(1)).unwrap();
        body.value_size = U32::new(2049);
        assert!(matches!(body.read(), Err(RequestError::Malformed(_))));
        body.value_size = U32::new(3);
        assert!(matches!(body.read(), Err(RequestError::Malformed(_))));
        body.value_size = U32::new(4);
        body.key_size = U32::new(u32::MAX);
        assert!(matches!(body.read(), Err(RequestError::Malformed(_))));
        assert!(body.read_value().is_ok());
    }

    #[test]
    fn the_number_that_linux_calls_8_is_a_number() {
        let mut body = EntryBody::entry("k", &Value::U64(5)).unwrap();
        body.kind = U32::new(NUMBER_64_OF_LINUX);
        assert_eq!(body.read_value(), Ok(Value::U64(5)));
    }

    #[test]
    fn half_a_pair_is_replaced() {
        assert_eq!(text(&[0x00, 0xD8, b'a', 0]).unwrap(), "\u{FFFD}a");
        assert!(text(b"a").is_err());
    }
}
