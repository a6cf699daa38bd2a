//! The command line: words of the form `key=value`, separated by blanks.
//!
//! | word | meaning |
//! |---|---|
//! | `log=LEVEL` | `off`, `error`, `warn`, `info` (default), `debug`, `trace` |
//! | `on-panic=ACTION` | `poweroff` (default), `reboot`, `halt` after a panic was reported |
//! | `require=LIST` | what must be there before `main` runs, in place of what the appliance asks for: `none` or names separated by commas, as in `require=balloon` |
//! | `vmbus.version=V` | offer the host only this VMBus version, as in `4.0` |
//! | `debug-exit=PORT` | an isa-debug-exit device ends the VM with a failing status |
//! | `mark=PORT` | write a byte to this I/O port at each boot milestone |
//!
//! Unknown keys belong to the appliance. A known key with a bad value is reported and its
//! default kept.

use core::fmt;
use core::str::FromStr;

/// The command line this machine was started with.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommandLine<'a> {
    text: &'a str,
}

/// A value that a known key cannot have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadValue<'a> {
    /// The key.
    pub key: &'a str,
    /// The value that was given.
    pub value: &'a str,
    /// What it should have been.
    pub expected: &'static str,
}

impl fmt::Display for BadValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            key,
            value,
            expected,
        } = self;
        write!(
            f,
            "command line: {key}={value} is ignored, expected {expected}"
        )
    }
}

impl core::error::Error for BadValue<'_> {}

impl<'a> CommandLine<'a> {
    /// A command line of this text.
    pub const fn new(text: &'a str) -> Self {
        Self { text }
    }

    /// A command line of these bytes, up to the first that is not UTF-8.
    pub fn from_bytes(bytes: &'a [u8]) -> Self {
        let valid = match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        };
        Self::new(valid)
    }

    /// The whole text.
    pub const fn as_str(&self) -> &'a str {
        self.text
    }

    /// The value of `key`; the last one counts. A word without `=` has the empty value.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.text.split_ascii_whitespace().rev().find_map(|word| {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            (name == key).then_some(value)
        })
    }

    /// The value of `key`, parsed.
    pub fn parse<T: FromStr>(
        &self,
        key: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, BadValue<'a>> {
        self.parse_with(key, expected, |value| value.parse().ok())
    }

    /// The value of `key` as an I/O port, decimal or with `0x`.
    pub fn port(&self, key: &'static str) -> Result<Option<u16>, BadValue<'a>> {
        self.parse_with(key, "an I/O port such as 0xf4", |value| {
            match value.strip_prefix("0x") {
                Some(digits) => u16::from_str_radix(digits, 16).ok(),
                None => value.parse().ok(),
            }
        })
    }

    fn parse_with<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, BadValue<'a>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        parse(value).map(Some).ok_or(BadValue {
            key,
            value,
            expected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_a_key_counts() {
        let line = CommandLine::new("  log=info quiet log=debug ");
        assert_eq!(line.get("log"), Some("debug"));
        assert_eq!(line.get("quiet"), Some(""));
        assert_eq!(line.get("lo"), None);
    }

    #[test]
    fn ports_are_decimal_or_hexadecimal() {
        let line = CommandLine::new("a=0xf4 b=244 c=0x10000 d=");
        assert_eq!(line.port("a"), Ok(Some(0xf4)));
        assert_eq!(line.port("b"), Ok(Some(244)));
        assert!(line.port("c").is_err());
        let error = line.port("d").unwrap_err();
        assert_eq!(
            std::format!("{error}"),
            "command line: d= is ignored, expected an I/O port such as 0xf4"
        );
        assert_eq!(line.port("e"), Ok(None));
    }

    #[test]
    fn bytes_that_are_not_text_end_it() {
        assert_eq!(
            CommandLine::from_bytes(b"log=info \xff more").as_str(),
            "log=info "
        );
    }
}
