//! The text protocol by which a program of the host asks for a connection to the guest (spec hvsock.md 8):
//! `CONNECT <port or GUID>` and a line feed; `OK <port or GUID>` and a line feed come back once the guest has accepted.

use alloc::vec::Vec;

use super::Service;

/// Bytes of the longest request line: a GUID's, with room to spare.
pub(super) const LONGEST: usize = 64;

/// What the bytes that have come so far are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Greeting {
    /// The line is not whole.
    Incomplete,
    /// A request, and what came behind it: the first bytes for the guest.
    Connect(Service, Vec<u8>),
    /// No request that anybody understands.
    Bad,
}

pub(super) fn parse(bytes: &[u8]) -> Greeting {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return if bytes.len() > LONGEST {
            Greeting::Bad
        } else {
            Greeting::Incomplete
        };
    };
    let (line, rest) = bytes.split_at_checked(end).unwrap_or_default();
    let line = core::str::from_utf8(line).unwrap_or_default();
    let line = line.strip_suffix('\r').unwrap_or(line);
    let service = line.strip_prefix("CONNECT ").map(|it| it.trim().parse());
    match (service, rest.get(1..)) {
        (Some(Ok(service)), Some(rest)) if end <= LONGEST => {
            Greeting::Connect(service, rest.into())
        }
        _ => Greeting::Bad,
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use vmbus::protocol::Guid;

    use super::*;

    #[test]
    fn ports_and_guids_are_connected_to() {
        let port = Greeting::Connect(Service::port(5000), Vec::new());
        assert_eq!(parse(b"CONNECT 5000\n"), port);
        assert_eq!(parse(b"CONNECT 5000\r\n"), port);
        let guid = Guid::literal("11111111-2222-3333-4444-555555555555");
        let text = format!("CONNECT {guid}\n");
        assert_eq!(
            parse(text.as_bytes()),
            Greeting::Connect(Service(guid), Vec::new())
        );
    }

    #[test]
    fn a_request_may_come_in_pieces_and_with_data_behind_it() {
        let whole = b"CONNECT 7\nhello\n";
        for length in 0..10 {
            assert_eq!(parse(&whole[..length]), Greeting::Incomplete);
        }
        let data = b"hello\n".to_vec();
        assert_eq!(parse(whole), Greeting::Connect(Service::port(7), data));
    }

    #[test]
    fn anything_else_is_bad() {
        for bytes in [
            &b"\n"[..],
            b"HELLO\n",
            b"CONNECT\n",
            b"CONNECT x\n",
            b"connect 1\n",
            b"CONNECT 4294967296\n",
            b"\xFF\xFF\n",
        ] {
            assert_eq!(parse(bytes), Greeting::Bad);
        }
        assert_eq!(parse(&[b'C'; LONGEST]), Greeting::Incomplete);
        assert_eq!(parse(&[b'C'; LONGEST + 1]), Greeting::Bad);
    }
}
