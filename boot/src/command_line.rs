//! The kernel's command line, from whoever has one: the image's load options, or a file.

use core::fmt;
use handover::COMMAND_LINE_MAX;

/// A command line: one line of text without control characters.
pub type CommandLine = heapless::String<COMMAND_LINE_MAX>;

/// Reads the load options of an EFI image: what QEMU's `-append`, a boot entry or the EFI shell
/// gave it, in UTF-16. `None` if there is nothing in them for the kernel.
///
/// The shell passes the whole line that was typed, so a first word that ends in `.efi` is the
/// application's own name and is left out.
///
/// # Errors
///
/// [`CommandLineError`] if the options are no text (a boot entry may hold any bytes) or too long.
pub fn from_load_options(options: &[u8]) -> Result<Option<CommandLine>, CommandLineError> {
    let (units, rest) = options.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(CommandLineError::NotText);
    }
    let units = units.iter().map(|&unit| u16::from_le_bytes(unit));
    let text = char::decode_utf16(units.take_while(|&unit| unit != 0))
        .map(|unit| unit.map_err(|_| CommandLineError::NotText));
    // The application's own name must not take room, so it goes before the length is looked at.
    let own_name = text
        .clone()
        .skip_while(is_space)
        .take_while(|char| !is_space(char));
    let mut last = ['\0'; 4];
    let mut name_len = 0;
    for char in own_name {
        last.rotate_left(1);
        last[3] = char?.to_ascii_lowercase();
        name_len += 1;
    }
    let text = text.skip_while(is_space);
    let skipped = if last == ['.', 'e', 'f', 'i'] {
        name_len
    } else {
        0
    };
    let line = line(text.skip(skipped))?;
    Ok((!line.is_empty()).then_some(line))
}

/// Reads the contents of a command line file: UTF-8, with or without a byte order mark. Several
/// lines count as one, with spaces between.
///
/// # Errors
///
/// [`CommandLineError`] if it is no text or too long.
pub fn from_file(contents: &[u8]) -> Result<CommandLine, CommandLineError> {
    let text = str::from_utf8(contents).map_err(|_| CommandLineError::NotText)?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
    line(text.chars().map(Ok))
}

fn is_space(char: &Result<char, CommandLineError>) -> bool {
    matches!(char, Ok(' ' | '\t' | '\r' | '\n'))
}

/// Makes one line of text: white space becomes a space, none at the ends.
fn line(
    text: impl Iterator<Item = Result<char, CommandLineError>>,
) -> Result<CommandLine, CommandLineError> {
    let mut line = CommandLine::new();
    let mut spaces = 0;
    for char in text {
        if is_space(&char) {
            spaces += 1;
            continue;
        }
        let char = char?;
        if char.is_control() {
            return Err(CommandLineError::NotText);
        }
        if !line.is_empty() {
            for _ in 0..spaces {
                line.push(' ').map_err(|_| CommandLineError::TooLong)?;
            }
        }
        spaces = 0;
        line.push(char).map_err(|_| CommandLineError::TooLong)?;
    }
    Ok(line)
}

/// Why there is no command line to be had from some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandLineError {
    /// They are not text in the encoding that belongs there.
    NotText,
    /// It would be longer than [`COMMAND_LINE_MAX`] bytes.
    TooLong,
}

impl fmt::Display for CommandLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotText => f.write_str("not text"),
            Self::TooLong => write!(f, "longer than {COMMAND_LINE_MAX} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::String;
    use std::vec::Vec;

    fn utf16(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    fn options(text: &str) -> Option<String> {
        from_load_options(&utf16(text))
            .unwrap()
            .map(|line| line.as_str().into())
    }

    #[test]
    fn load_options_are_text_up_to_a_zero() {
        assert_eq!(
            options("log=debug a=\u{E9}\u{1F980}"),
            Some("log=debug a=\u{E9}\u{1F980}".into())
        );
        assert_eq!(options("log=debug\0rest"), Some("log=debug".into()));
        assert_eq!(options("  a  b \r\n"), Some("a  b".into()));
        assert_eq!(options(""), None);
        assert_eq!(options(" \0"), None);
    }

    #[test]
    fn the_applications_own_name_is_left_out() {
        assert_eq!(options("BOOTX64.EFI log=debug"), Some("log=debug".into()));
        assert_eq!(
            options(r" FS0:\EFI\BOOT\BootX64.efi a b"),
            Some("a b".into())
        );
        assert_eq!(options("BOOTX64.EFI"), None);
        assert_eq!(options("a b.efi"), Some("a b.efi".into()));
        assert_eq!(options("file=b.efix c"), Some("file=b.efix c".into()));
    }

    #[test]
    fn load_options_that_are_no_text_are_refused() {
        let refused = |bytes: &[u8]| from_load_options(bytes) == Err(CommandLineError::NotText);
        assert!(refused(b"a"));
        assert!(refused(&[0x00, 0xD8, b'a', 0]));
        assert!(refused(&[b'a', 0, 1, 0]));
    }

    #[test]
    fn the_length_counts_in_bytes() {
        let fits: String = core::iter::repeat_n('\u{E9}', COMMAND_LINE_MAX / 2).collect();
        assert_eq!(options(&fits), Some(fits.clone()));
        let named = std::format!("boot.efi {fits}\r\n");
        assert_eq!(options(&named), Some(fits.clone()));
        let too_long = utf16(&(fits + "x"));
        assert_eq!(from_load_options(&too_long), Err(CommandLineError::TooLong));
        assert_eq!(
            from_file(&[b'x'; COMMAND_LINE_MAX + 1]),
            Err(CommandLineError::TooLong)
        );
    }

    #[test]
    fn a_file_may_have_a_mark_and_several_lines() {
        assert_eq!(from_file(b"\xEF\xBB\xBFa\r\nb\n").unwrap(), "a  b");
        assert_eq!(from_file(b"").unwrap(), "");
        assert_eq!(from_file(b"a\xFF"), Err(CommandLineError::NotText));
        assert_eq!(from_file(b"a\0"), Err(CommandLineError::NotText));
    }

    proptest! {
        #[test]
        fn what_comes_out_is_one_line(bytes in prop::collection::vec(any::<u8>(), 0..64), text: String) {
            for line in [
                from_load_options(&bytes).ok().flatten(),
                from_load_options(&utf16(&text)).ok().flatten(),
                from_file(&bytes).ok(),
                from_file(text.as_bytes()).ok(),
            ].into_iter().flatten() {
                prop_assert!(!line.chars().any(char::is_control));
                prop_assert!(!line.starts_with(' ') && !line.ends_with(' '));
            }
        }
    }
}
