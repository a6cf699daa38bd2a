//! IP information of one of the guest's adapters, as text and in binary form (spec ic.md 8.4).

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::value::{put_text, text};
use crate::integration::RequestError;

/// What the guest's system knows of an adapter, or is to set.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct IpInformation {
    /// Which adapter: the instance GUID of the network device in braces. When asking, Linux wants its MAC address
    /// instead, in capitals with colons.
    pub adapter: String,
    /// Whether addresses come from DHCP.
    pub dhcp: bool,
    /// Addresses, each with the length of its network's prefix.
    pub addresses: Vec<Network>,
    /// Default gateways.
    pub gateways: Vec<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// What the guest wrote and is none of these.
    pub unknown: Vec<String>,
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Network {
    /// The address.
    pub address: IpAddr,
    /// Bits of the prefix: at most 32, or 128.
    prefix: u8,
}

impl Network {
    /// `None` when the prefix is longer than the address.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let longest = Self::bits(address);
        (prefix <= longest).then_some(Self { address, prefix })
    }

    /// Bits of the prefix.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    const fn bits(address: IpAddr) -> u8 {
        match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        }
    }

    /// As the protocol's text form has it: a mask for IPv4, a number for IPv6.
    fn subnet(self) -> String {
        match self.address {
            IpAddr::V4(_) => self.mask().to_string(),
            IpAddr::V6(_) => self.prefix.to_string(),
        }
    }

    fn mask(self) -> Ipv4Addr {
        let ones = u32::MAX.checked_shl(32 - u32::from(self.prefix.min(32)));
        Ipv4Addr::from(ones.unwrap_or(0))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The text is no address with a prefix.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseNetworkError(String);

impl fmt::Display for ParseNetworkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "'{}' is no address with a prefix, as 10.0.0.2/24",
            self.0
        )
    }
}

impl core::error::Error for ParseNetworkError {}

impl FromStr for Network {
    type Err = ParseNetworkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            Self::new(address.parse().ok()?, prefix.parse().ok()?)
        };
        parse().ok_or_else(|| ParseNetworkError(text.into()))
    }
}

/// Bytes of an adapter's name, its end included.
const ADAPTER: usize = 256;

/// Address family: none, IPv4, IPv6, both.
const BOTH: u8 = 3;

impl IpInformation {
    /// What is sent to ask for an adapter.
    pub(super) fn of(adapter: &str) -> Self {
        Self {
            adapter: adapter.into(),
            ..Self::default()
        }
    }

    fn family(&self) -> u8 {
        let networks = self.addresses.iter().map(|network| network.address);
        let all = networks
            .chain(self.gateways.iter().copied())
            .chain(self.dns.iter().copied());
        let family = all.fold(0, |family, address| {
            family | if address.is_ipv4() { 1 } else { 2 }
        });
        if family == 0 { BOTH } else { family }
    }
}

/// Text form, from the start of the message.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct TextForm {
    pub(super) operation: u8,
    pub(super) pool: u8,
    adapter: [u8; ADAPTER],
    family: u8,
    dhcp: u8,
    addresses: [u8; 2048],
    subnets: [u8; 2048],
    gateways: [u8; 1024],
    dns: [u8; 2048],
}

const _: () = assert!(size_of::<TextForm>() == 7428);

impl TextForm {
    pub(super) fn new(operation: u8, pool: u8, info: &IpInformation) -> Result<Self, RequestError> {
        let mut form = Self {
            operation,
            pool,
            family: info.family(),
            dhcp: u8::from(info.dhcp),
            ..Self::new_zeroed()
        };
        put_text(&mut form.adapter, &info.adapter, "the adapter's name")?;
        let addresses = info.addresses.iter().map(|network| network.address);
        let subnets = info.addresses.iter().map(|network| network.subnet());
        put_text(
            &mut form.addresses,
            &join(addresses),
            "the list of addresses",
        )?;
        put_text(&mut form.subnets, &join(subnets), "the list of masks")?;
        put_text(
            &mut form.gateways,
            &join(&info.gateways),
            "the list of gateways",
        )?;
        put_text(&mut form.dns, &join(&info.dns), "the list of name servers")?;
        Ok(form)
    }

    /// What a guest has made of it.
    pub(super) fn read(&self) -> Result<IpInformation, RequestError> {
        let mut unknown = Vec::new();
        let (addresses, subnets) = (text(&self.addresses)?, text(&self.subnets)?);
        let mut subnets = items(&subnets);
        let mut networks = Vec::new();
        for item in items(&addresses) {
            let subnet = subnets.next();
            let network = address(item).and_then(|address| {
                let prefix = match subnet {
                    Some(subnet) => prefix(subnet)?,
                    None => Network::bits(address),
                };
                Network::new(address, prefix)
            });
            match (network, subnet) {
                (Some(network), _) => networks.push(network),
                (None, Some(subnet)) => unknown.push(alloc::format!("{item} {subnet}")),
                (None, None) => unknown.push(item.into()),
            }
        }
        unknown.extend(subnets.map(String::from));
        let mut list = |bytes: &[u8]| -> Result<Vec<IpAddr>, RequestError> {
            let mut known = Vec::new();
            for item in items(&text(bytes)?) {
                match address(item) {
                    Some(address) => known.push(address),
                    None => unknown.push(item.into()),
                }
            }
            Ok(known)
        };
        let (gateways, dns) = (list(&self.gateways)?, list(&self.dns)?);
        Ok(IpInformation {
            adapter: text(&self.adapter)?,
            dhcp: self.dhcp != 0,
            addresses: networks,
            gateways,
            dns,
            unknown,
        })
    }
}

/// Items with semicolons between them.
fn join(items: impl IntoIterator<Item = impl ToString>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(";")
}

fn items(list: &str) -> impl Iterator<Item = &str> {
    list.split(';')
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

/// An address; what follows a percent sign is the guest's own name of its adapter.
fn address(item: &str) -> Option<IpAddr> {
    let (address, _) = item.split_once('%').unwrap_or((item, ""));
    address.parse().ok()
}

/// A mask, or the length of a prefix with or without a slash.
fn prefix(subnet: &str) -> Option<u8> {
    if let Ok(mask) = subnet.parse::<Ipv4Addr>() {
        let mask = u32::from(mask);
        return (mask.leading_ones() + mask.trailing_zeros() == 32)
            .then_some(mask.leading_ones() as u8);
    }
    subnet.strip_prefix('/').unwrap_or(subnet).parse().ok()
}

/// Most addresses and name servers of a kind.
const ADDRESSES: usize = 64;

/// Most gateways of a kind.
const GATEWAYS: usize = 5;

/// Where an address came from: another way, as DHCP, or set by hand.
const OTHER: u16 = 1;
const STATIC: u16 = 2;

/// Binary form, from the start of the message; version 5.0.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct BinaryForm {
    pub(super) operation: u8,
    pub(super) pool: u8,
    padding: U16,
    /// IPv4 then IPv6: of addresses, of gateways, of name servers.
    counts: [U32; 6],
    adapter: [u8; ADAPTER],
    family: u8,
    dhcp: u8,
    more_padding: U16,
    v4_addresses: [[u8; 4]; ADDRESSES],
    v6_addresses: [[u8; 16]; ADDRESSES],
    v4_subnets: [[u8; 4]; ADDRESSES],
    v6_prefixes: [U32; ADDRESSES],
    v4_gateways: [[u8; 4]; GATEWAYS],
    v6_gateways: [[u8; 16]; GATEWAYS],
    v4_dns: [[u8; 4]; ADDRESSES],
    v6_dns: [[u8; 16]; ADDRESSES],
    origins: [U16; 2 * ADDRESSES],
}

const _: () = assert!(size_of::<BinaryForm>() == 3716);
const _: () = assert!(core::mem::offset_of!(BinaryForm, v4_gateways) == 2080);
const _: () = assert!(core::mem::offset_of!(BinaryForm, origins) == 3460);

impl BinaryForm {
    /// Bytes of the message: as many as the text form has.
    pub(super) const MESSAGE: usize = size_of::<TextForm>();

    pub(super) fn new(operation: u8, pool: u8, info: &IpInformation) -> Result<Self, RequestError> {
        let mut form = Self {
            operation,
            pool,
            family: info.family(),
            dhcp: u8::from(info.dhcp),
            ..Self::new_zeroed()
        };
        put_text(&mut form.adapter, &info.adapter, "the adapter's name")?;
        let mut counts = [0; 6];
        let [v4, v6, v4_gateways, v6_gateways, v4_dns, v6_dns] = &mut counts;
        for network in &info.addresses {
            let what = "the list of addresses";
            match network.address {
                IpAddr::V4(address) => {
                    let at = *v4;
                    add(&mut form.v4_addresses, v4, address.octets(), what)?;
                    if let Some(place) = form.v4_subnets.get_mut(at) {
                        *place = network.mask().octets();
                    }
                }
                IpAddr::V6(address) => {
                    let at = *v6;
                    add(&mut form.v6_addresses, v6, address.octets(), what)?;
                    if let Some(place) = form.v6_prefixes.get_mut(at) {
                        *place = U32::new(network.prefix.into());
                    }
                }
            }
        }
        for gateway in &info.gateways {
            let what = "the list of gateways";
            match gateway {
                IpAddr::V4(it) => add(&mut form.v4_gateways, v4_gateways, it.octets(), what)?,
                IpAddr::V6(it) => add(&mut form.v6_gateways, v6_gateways, it.octets(), what)?,
            }
        }
        for server in &info.dns {
            let what = "the list of name servers";
            match server {
                IpAddr::V4(it) => add(&mut form.v4_dns, v4_dns, it.octets(), what)?,
                IpAddr::V6(it) => add(&mut form.v6_dns, v6_dns, it.octets(), what)?,
            }
        }
        let origin = if info.dhcp { OTHER } else { STATIC };
        for place in form.origins.iter_mut().take(info.addresses.len()) {
            *place = U16::new(origin);
        }
        form.counts = counts.map(|count| U32::new(count as u32));
        Ok(form)
    }

    /// What a guest has made of it.
    pub(super) fn read(&self) -> Result<IpInformation, RequestError> {
        let [v4, v6, v4_gateways, v6_gateways, v4_dns, v6_dns] =
            self.counts.map(|count| count.get() as usize);
        let mut unknown = Vec::new();
        let mut addresses = Vec::new();
        let masks = self.v4_subnets.iter();
        for (address, mask) in some(&self.v4_addresses, v4)?.iter().zip(masks) {
            let (address, mask) = (Ipv4Addr::from(*address), Ipv4Addr::from(*mask));
            let prefix = prefix(&mask.to_string());
            match prefix.and_then(|prefix| Network::new(address.into(), prefix)) {
                Some(network) => addresses.push(network),
                None => unknown.push(alloc::format!("{address} {mask}")),
            }
        }
        let prefixes = self.v6_prefixes.iter();
        for (address, prefix) in some(&self.v6_addresses, v6)?.iter().zip(prefixes) {
            let (address, prefix) = (Ipv6Addr::from(*address), prefix.get());
            let network = u8::try_from(prefix).ok();
            match network.and_then(|prefix| Network::new(address.into(), prefix)) {
                Some(network) => addresses.push(network),
                None => unknown.push(alloc::format!("{address} {prefix}")),
            }
        }
        let mut gateways = list(&self.v4_gateways, v4_gateways)?;
        gateways.extend(list(&self.v6_gateways, v6_gateways)?);
        let mut dns = list(&self.v4_dns, v4_dns)?;
        dns.extend(list(&self.v6_dns, v6_dns)?);
        Ok(IpInformation {
            adapter: text(&self.adapter)?,
            dhcp: self.dhcp != 0,
            addresses,
            gateways,
            dns,
            unknown,
        })
    }
}

fn add<const N: usize>(
    places: &mut [[u8; N]],
    count: &mut usize,
    octets: [u8; N],
    what: &'static str,
) -> Result<(), RequestError> {
    let limit = places.len();
    let place = places.get_mut(*count);
    *place.ok_or(RequestError::TooLong { what, limit })? = octets;
    *count += 1;
    Ok(())
}

fn some<T>(places: &[T], count: usize) -> Result<&[T], RequestError> {
    let some = places.get(..count);
    some.ok_or(RequestError::Malformed(
        "more addresses than it has room for",
    ))
}

fn list<const N: usize>(places: &[[u8; N]], count: usize) -> Result<Vec<IpAddr>, RequestError>
where
    IpAddr: From<[u8; N]>,
{
    let some = some(places, count)?;
    Ok(some.iter().map(|octets| IpAddr::from(*octets)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> IpInformation {
        IpInformation {
            adapter: "{f8615163-0000-1000-2000-00155d010203}".into(),
            dhcp: false,
            addresses: ["10.0.0.2/24", "192.168.7.1/32", "fe80::1/64", "::1/128"]
                .map(|network| network.parse().unwrap())
                .into(),
            gateways: ["10.0.0.1", "fe80::2"].map(|it| it.parse().unwrap()).into(),
            dns: ["1.1.1.1", "2606:4700::1111"]
                .map(|it| it.parse().unwrap())
                .into(),
            unknown: Vec::new(),
        }
    }

    #[test]
    fn both_forms_come_back() {
        let text = TextForm::new(5, 1, &example()).unwrap();
        assert_eq!(text.read().unwrap(), example());
        assert_eq!(text.family, 3);
        let binary = BinaryForm::new(5, 1, &example()).unwrap();
        assert_eq!(binary.read().unwrap(), example());
        assert_eq!(binary.counts.map(U32::get), [2, 2, 1, 1, 1, 1]);
        assert_eq!(binary.v4_subnets[0], [255, 255, 255, 0]);
        assert_eq!(binary.origins[3].get(), STATIC);
        assert_eq!(binary.origins[4].get(), 0);
    }

    #[test]
    fn the_text_form_is_lists_with_semicolons() {
        let form = TextForm::new(5, 1, &example()).unwrap();
        assert_eq!(
            text(&form.addresses).unwrap(),
            "10.0.0.2;192.168.7.1;fe80::1;::1"
        );
        assert_eq!(
            text(&form.subnets).unwrap(),
            "255.255.255.0;255.255.255.255;64;128"
        );
    }

    #[test]
    fn what_linux_writes_is_understood() {
        let mut form = TextForm::new(4, 1, &IpInformation::of("00:15:5D:00:00:01")).unwrap();
        put_text(&mut form.addresses, "10.0.0.2;fe80::215%eth0;", "").unwrap();
        put_text(&mut form.subnets, "255.255.255.0;/64;", "").unwrap();
        put_text(&mut form.gateways, "10.0.0.1;;what?", "").unwrap();
        let read = form.read().unwrap();
        assert_eq!(read.addresses[0].to_string(), "10.0.0.2/24");
        assert_eq!(read.addresses[1].to_string(), "fe80::215/64");
        assert_eq!(read.gateways.len(), 1);
        assert_eq!(read.unknown, ["what?"]);
    }

    #[test]
    fn masks_with_holes_and_long_prefixes_are_not_taken_for_networks() {
        let mut form = TextForm::new(4, 1, &IpInformation::default()).unwrap();
        put_text(&mut form.addresses, "10.0.0.2;10.0.0.3;10.0.0.4", "").unwrap();
        put_text(&mut form.subnets, "255.0.255.0;33", "").unwrap();
        let read = form.read().unwrap();
        assert_eq!(read.unknown, ["10.0.0.2 255.0.255.0", "10.0.0.3 33"]);
        assert_eq!(read.addresses[0].to_string(), "10.0.0.4/32");
        assert!("10.0.0.2/33".parse::<Network>().is_err());
        assert!("10.0.0.2".parse::<Network>().is_err());
    }

    #[test]
    fn counts_beyond_their_places_are_malformed() {
        for at in 0..6 {
            let mut form = BinaryForm::new(4, 1, &example()).unwrap();
            form.counts[at] = U32::new(65);
            assert!(matches!(form.read(), Err(RequestError::Malformed(_))));
        }
    }

    #[test]
    fn more_than_there_is_room_for_is_refused_before_it_is_sent() {
        let mut many = example();
        many.gateways = alloc::vec![IpAddr::V4(Ipv4Addr::LOCALHOST); GATEWAYS + 1];
        assert!(BinaryForm::new(5, 1, &many).is_err());
        assert!(TextForm::new(5, 1, &many).is_ok());
        many.gateways = alloc::vec![IpAddr::V4(Ipv4Addr::LOCALHOST); 60];
        assert!(TextForm::new(5, 1, &many).is_err());
    }
}
