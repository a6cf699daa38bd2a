//! Whom a socket connects to: a service, or a port (spec hvsock.md 1).

use core::fmt;
use core::str::FromStr;

use vmbus::protocol::Guid;

/// A service by its GUID; ports are the services of one family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service(pub Guid);

/// The services that are ports: the first four bytes are the port's number.
const PORTS: Guid = Guid::literal("00000000-facb-11e6-bd58-64006a7986d3");

impl Service {
    /// The service that is a port.
    pub const fn port(port: u32) -> Self {
        let mut guid = PORTS;
        let [a, b, c, d] = port.to_le_bytes();
        guid.0[0] = a;
        guid.0[1] = b;
        guid.0[2] = c;
        guid.0[3] = d;
        Self(guid)
    }

    /// The port's number, if the service is one.
    pub fn port_number(self) -> Option<u32> {
        let (number, rest) = self.0.0.split_first_chunk::<4>()?;
        let (_, family) = PORTS.0.split_first_chunk::<4>()?;
        (rest == family).then(|| u32::from_le_bytes(*number))
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port_number() {
            Some(port) => port.fmt(f),
            None => self.0.fmt(f),
        }
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service({self})")
    }
}

/// The text is neither a port nor a GUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParseServiceError;

impl fmt::Display for ParseServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a service is a port's number or a GUID")
    }
}

impl core::error::Error for ParseServiceError {}

impl FromStr for Service {
    type Err = ParseServiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `u32` would take a sign.
        if text.bytes().all(|byte| byte.is_ascii_digit())
            && let Ok(port) = text.parse()
        {
            return Ok(Self::port(port));
        }
        Guid::parse(text).map(Self).map_err(|_| ParseServiceError)
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn a_port_is_the_first_field_of_the_template() {
        let service = Service::port(0x1234);
        assert_eq!(
            service.0.to_string(),
            "00001234-facb-11e6-bd58-64006a7986d3"
        );
        assert_eq!(service.port_number(), Some(0x1234));
        assert_eq!(service.to_string(), "4660");
        assert_eq!(Service(Guid([7; 16])).port_number(), None);
    }

    #[test]
    fn ports_and_guids_are_read_and_nothing_else() {
        assert_eq!("5000".parse(), Ok(Service::port(5000)));
        assert_eq!("4294967295".parse(), Ok(Service::port(u32::MAX)));
        let guid = "11111111-2222-3333-4444-555555555555";
        assert_eq!(guid.parse(), Ok(Service(Guid::literal(guid))));
        assert_eq!(guid.parse::<Service>().unwrap().to_string(), guid);
        for text in ["", "-1", "+1", "4294967296", "http", " 1", "{}"] {
            assert_eq!(text.parse::<Service>(), Err(ParseServiceError), "{text}");
        }
    }
}
