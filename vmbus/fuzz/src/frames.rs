//! Ethernet frames of many sorts, sound and unsound, for what cards do with frames.

/// The sorts of [`frame`].
pub(crate) const SORTS: u8 = 10;

/// The Ethernet types of IPv4, IPv6, 802.1Q and local experiments.
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xDD];
const VLAN: [u8; 2] = [0x81, 0x00];
const EXPERIMENT: [u8; 2] = [0x88, 0xB5];

/// Protocol numbers of IP.
const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A frame of this sort between these addresses, with so many bytes of data. Its checksums are zero, its lengths right as far
/// as their fields reach; `spice` is the first byte of its data and chooses the size of options.
pub(crate) fn frame(sort: u8, [to, from]: [[u8; 6]; 2], data: usize, spice: u8) -> Vec<u8> {
    let mut bytes = [to, from].concat();
    let body: Vec<u8> = (0..data).map(|at| spice.wrapping_add(at as u8)).collect();
    match sort % SORTS {
        0 => bytes.extend([&EXPERIMENT[..], &body].concat()),
        1 => bytes.extend([&IPV4[..], &v4(TCP, &[], 0, &tcp(&[], &body))].concat()),
        2 => bytes.extend([&IPV4[..], &v4(UDP, &[], 0, &udp(&body))].concat()),
        3 => bytes.extend([&IPV6[..], &v6(TCP, &tcp(&[], &body))].concat()),
        4 => bytes.extend([&IPV6[..], &v6(UDP, &udp(&body))].concat()),
        5 => {
            let tag = [spice, !spice];
            let inner = v4(TCP, &[], 0, &tcp(&[], &body));
            bytes.extend([&VLAN[..], &tag, &IPV4, &inner].concat());
        }
        6 => {
            // Headers in front of TCP, each as long as it says.
            let mut inner = tcp(&[], &body);
            for number in 0..=spice % 4 {
                let next = if number == 0 { TCP } else { HOP_BY_HOP };
                let units = if spice >= 0x80 { spice } else { spice % 3 };
                let mut header = vec![0; 8 * (usize::from(units) + 1)];
                header[..2].copy_from_slice(&[next, units]);
                inner = [header, inner].concat();
            }
            bytes.extend([&IPV6[..], &v6(HOP_BY_HOP, &inner)].concat());
        }
        7 => {
            let options = vec![1; 4 * usize::from(spice % 11)];
            let inner = tcp(&options, &body);
            bytes.extend([&IPV4[..], &v4(TCP, &options, 0, &inner)].concat());
        }
        8 => {
            // A fragment that is neither first nor last.
            let inner = v4(UDP, &[], 0x2005, &udp(&body));
            bytes.extend([&IPV4[..], &inner].concat());
        }
        _ => bytes = body,
    }
    bytes
}

fn low(length: usize) -> [u8; 2] {
    (length as u16).to_be_bytes()
}

fn v4(protocol: u8, options: &[u8], fragment: u16, body: &[u8]) -> Vec<u8> {
    let header = 20 + options.len();
    let mut bytes = vec![0; 20];
    bytes[0] = 0x40 | (header / 4) as u8;
    // Without room in the field: a large send.
    let length = header + body.len();
    bytes[2..4].copy_from_slice(&low(if length > 0xFFFF { 0 } else { length }));
    bytes[4..6].copy_from_slice(&[0xFF, 0xFE]);
    bytes[6..8].copy_from_slice(&fragment.to_be_bytes());
    (bytes[8], bytes[9]) = (64, protocol);
    bytes[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    [&bytes, options, body].concat()
}

fn v6(protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 40];
    bytes[0] = 0x60;
    let length = body.len();
    bytes[4..6].copy_from_slice(&low(if length > 0xFFFF { 0 } else { length }));
    (bytes[6], bytes[7]) = (protocol, 64);
    (bytes[8], bytes[23], bytes[24], bytes[39]) = (0xFD, 1, 0xFD, 2);
    [&bytes, body].concat()
}

fn tcp(options: &[u8], body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 20];
    bytes[..8].copy_from_slice(&[0x1F, 0x90, 0, 80, 0xFF, 0xFF, 0xFF, 0x00]);
    bytes[12] = ((5 + options.len() / 4) << 4) as u8;
    // CWR, ACK, PSH, FIN: some are the first's alone, some the last's.
    bytes[13] = 0x99;
    [&bytes, options, body].concat()
}

fn udp(body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x1F, 0x90, 0, 53];
    bytes.extend(low(8 + body.len()));
    bytes.extend([0, 0]);
    [&bytes, body].concat()
}
