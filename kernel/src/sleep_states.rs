//! The value that powers the machine off: `\_S5` in the DSDT (ACPI 6.5, sections 7.4.2 and 20.2).
//!
//! Only this one package is needed, so it is found by its name in the byte code instead of by
//! an interpreter.

/// The sleep type for PM1a of the `\_S5` package in a DSDT's byte code.
///
/// `None` when there is no such package, or one whose first element is no small constant.
pub fn s5_sleep_type(aml: &[u8]) -> Option<u8> {
    const PACKAGE_OP: u8 = 0x12;
    let mut rest = aml;
    while let Some(at) = rest
        .windows(5)
        .position(|w| w[..4] == *b"_S5_" && w[4] == PACKAGE_OP)
    {
        rest = &rest[at + 5..];
        // The package's length: the top two bits of its first byte say how many more follow.
        let more = usize::from(*rest.first()? >> 6);
        let Some([count, elements @ ..]) = rest.get(1 + more..) else {
            return None;
        };
        if *count == 0 {
            continue;
        }
        match elements {
            // ZeroOp, OneOp, BytePrefix.
            [0x00, ..] => return Some(0),
            [0x01, ..] => return Some(1),
            [0x0A, value, ..] => return Some(value & 7),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_that_compilers_write() {
        let qemu = b"\x08_S5_\x12\x06\x04\x00\x00\x00\x00";
        assert_eq!(s5_sleep_type(qemu), Some(0));
        let with_prefix = b"....\x08\\_S5_\x12\x0A\x04\x0A\x05\x0A\x05\x00\x00";
        assert_eq!(s5_sleep_type(with_prefix), Some(5));
        let long_length = b"\x08_S5_\x12\x47\x00\x04\x01\x00\x00\x00";
        assert_eq!(s5_sleep_type(long_length), Some(1));
    }

    #[test]
    fn a_reference_to_the_name_is_passed_over() {
        let aml = b"_S5_ used here \x08_S5_\x12\x04\x02\x0A\x07\x00";
        assert_eq!(s5_sleep_type(aml), Some(7));
    }

    #[test]
    fn what_is_cut_off_gives_nothing() {
        let aml = b"\x08_S5_\x12\x06\x04\x0A\x05";
        for len in 0..aml.len() {
            assert_eq!(s5_sleep_type(&aml[..len]), None, "{len} bytes");
        }
        assert_eq!(s5_sleep_type(b""), None);
    }
}
