//! The options of `run` that have a form of their own, read from their words.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    str::FromStr,
};

/// A disk: `FILE`, or `FILE,ro` to be read only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The file: raw, VHDX or ISO, as its content says.
    pub file: PathBuf,
    /// Whether the guest can only read it.
    pub read_only: bool,
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A name with a comma in it is one, unless the word behind it is an option.
        let (file, read_only) = match text.strip_suffix(",ro") {
            Some(file) => (file, true),
            None => (text, false),
        };
        if file.is_empty() {
            return Err("a disk is FILE, or FILE,ro to be read only".into());
        }
        Ok(Self {
            file: file.into(),
            read_only,
        })
    }
}

/// What the network adapter is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Net {
    /// The user's own network, by passt.
    User,
    /// A TAP interface.
    Tap(String),
    /// There is no adapter.
    None,
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("tap", name)) if !name.is_empty() => Ok(Self::Tap(name.into())),
            None if text == "user" => Ok(Self::User),
            None if text == "none" => Ok(Self::None),
            _ => Err("a network is `user`, `tap:NAME` or `none`".into()),
        }
    }
}

/// A port of this computer that leads to one of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Address of this computer that it is opened at.
    pub address: IpAddr,
    /// Port of this computer.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
    /// Whether it is a port of UDP and not of TCP.
    pub udp: bool,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "a forwarded port is HOST:GUEST, with ADDRESS: before it or /udp behind it, as 8080:80";
        let (ports, udp) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), false),
            Some((ports, "udp")) => (ports, true),
            Some(_) => return Err(form().into()),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(form)?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (address.parse().map_err(|_| form())?, host)
            }
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
        };
        let port = |text: &str| {
            text.parse::<u16>()
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(form)
        };
        Ok(Self {
            address,
            host: port(host)?,
            guest: port(guest)?,
            udp,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_file_and_perhaps_read_only() {
        let disk = |text: &str| text.parse::<Disk>().unwrap();
        assert_eq!(disk("a.vhdx").file, PathBuf::from("a.vhdx"));
        assert!(!disk("a.vhdx").read_only);
        assert!(disk("a.vhdx,ro").read_only);
        assert_eq!(disk("a,b.img,ro").file, PathBuf::from("a,b.img"));
        assert_eq!(disk("a,rough").file, PathBuf::from("a,rough"));
        assert!(",ro".parse::<Disk>().is_err());
        assert!("".parse::<Disk>().is_err());
    }

    #[test]
    fn networks_have_three_forms() {
        assert_eq!("user".parse(), Ok(Net::User));
        assert_eq!("none".parse(), Ok(Net::None));
        assert_eq!("tap:tap0".parse(), Ok(Net::Tap("tap0".into())));
        for wrong in ["", "tap", "tap:", "bridge", "user:x"] {
            assert!(wrong.parse::<Net>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_are_of_this_computer_alone_unless_an_address_is_given() {
        let forward = |text: &str| text.parse::<Forward>().unwrap();
        let plain = forward("8080:80");
        assert_eq!((plain.host, plain.guest, plain.udp), (8080, 80, false));
        assert!(plain.address.is_loopback());
        assert!(forward("5353:53/udp").udp);
        assert!(!forward("5353:53/tcp").udp);
        assert_eq!(forward("0.0.0.0:1:2").address.to_string(), "0.0.0.0");
        assert_eq!(forward("[::1]:1:2").address.to_string(), "::1");
        for wrong in [
            "",
            "80",
            "80:",
            ":80",
            "0:80",
            "80:0",
            "x:80",
            "80:65536",
            "80:80/sctp",
            "x:80:80",
        ] {
            assert!(wrong.parse::<Forward>().is_err(), "{wrong}");
        }
    }
}
