//! What INQUIRY and REPORT LUNS tell (SPC-3 6.4, 6.21, 7.6; SBC-3 6.6).

use alloc::vec::Vec;

use crate::disk::Disk;

/// Who made the unit: what Hyper-V's units say.
const VENDOR: &[u8; 8] = b"Msft    ";

/// Its revision.
const REVISION: &[u8; 4] = b"1.0 ";

/// Microsoft's number as a maker of hardware (IEEE OUI).
const OUI: [u8; 3] = [0x00, 0x22, 0x48];

/// Peripheral qualifier and type of a unit that is not there.
const ABSENT: u8 = 0x7F;

/// What a unit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A disk.
    Disk,
    /// A drive for DVDs.
    Dvd,
}

impl Kind {
    /// Peripheral device type (SPC-3 table 83).
    const fn device_type(self) -> u8 {
        match self {
            Self::Disk => 0x00,
            Self::Dvd => 0x05,
        }
    }
}

/// Standard INQUIRY data; for a unit that is not there without `kind`.
pub fn standard(kind: Option<Kind>) -> [u8; 36] {
    let mut data = [0; 36];
    data[0] = kind.map_or(ABSENT, Kind::device_type);
    // Removable.
    data[1] = if kind == Some(Kind::Dvd) { 0x80 } else { 0 };
    // SPC-3, in the format of today; 31 bytes follow; commands may be queued.
    data[2] = 5;
    data[3] = 2;
    data[4] = 31;
    data[7] = 2;
    data[8..16].copy_from_slice(VENDOR);
    let product: &[u8; 16] = match kind {
        Some(Kind::Dvd) => b"Virtual DVD-ROM ",
        _ => b"Virtual Disk    ",
    };
    data[16..32].copy_from_slice(product);
    data[32..36].copy_from_slice(REVISION);
    data
}

/// The most block descriptors in the parameter list of UNMAP.
pub const MAX_UNMAP_DESCRIPTORS: u32 = 256;

/// A page of vital product data. `None` when there is no such page. `identity` names the unit; `disk` is that of
/// a disk; `max_transfer` is in bytes.
pub fn vital(
    page: u8,
    kind: Kind,
    identity: &[u8; 16],
    disk: Option<&dyn Disk>,
    max_transfer: u32,
) -> Option<Vec<u8>> {
    let body = match (page, disk) {
        (0x00, None) => alloc::vec![0x00, 0x80, 0x83],
        (0x00, Some(_)) => alloc::vec![0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2],
        (0x80, _) => serial_number(identity),
        (0x83, _) => designators(identity),
        (0xB0, Some(disk)) => block_limits(disk, max_transfer),
        (0xB1, Some(_)) => characteristics(),
        (0xB2, Some(disk)) => provisioning(disk),
        _ => return None,
    };
    let length = u16::try_from(body.len()).ok()?.to_be_bytes();
    let mut data = alloc::vec![kind.device_type(), page, length[0], length[1]];
    data.extend_from_slice(&body);
    Some(data)
}

/// The identity in hexadecimal digits.
fn serial_number(identity: &[u8; 16]) -> Vec<u8> {
    let digit = |value: u8| char::from_digit(value.into(), 16).map_or(b'0', |digit| digit as u8);
    identity
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 0xF)])
        .collect()
}

/// Two names: one that a world-wide registry gives a part of, and one that has the whole identity.
fn designators(identity: &[u8; 16]) -> Vec<u8> {
    // NAA 6: the number of the maker and 100 bits, into which the identity is folded.
    let mut name = [0; 16];
    name[4..].copy_from_slice(&identity[4..]);
    for (to, from) in name[4..8].iter_mut().zip(&identity[..4]) {
        *to ^= from;
    }
    name[0] = 0x60 | OUI[0] >> 4;
    name[1] = OUI[0] << 4 | OUI[1] >> 4;
    name[2] = OUI[1] << 4 | OUI[2] >> 4;
    name[3] = OUI[2] << 4 | (identity[0] & 0xF);
    let mut data = alloc::vec![0x01, 0x03, 0x00, 16];
    data.extend_from_slice(&name);
    // T10 vendor identification, in binary.
    data.extend_from_slice(&[0x01, 0x01, 0x00, 24]);
    data.extend_from_slice(VENDOR);
    data.extend_from_slice(identity);
    data
}

/// Block limits.
fn block_limits(disk: &dyn Disk, max_transfer: u32) -> Vec<u8> {
    let geometry = disk.geometry();
    let logical = geometry.logical.max(1);
    let mut data = alloc::vec![0; 0x3C];
    let granularity = (geometry.physical / logical).max(1);
    data[2..4].copy_from_slice(&u16::try_from(granularity).unwrap_or(1).to_be_bytes());
    data[4..8].copy_from_slice(&(max_transfer / logical).to_be_bytes());
    if disk.can_unmap() {
        let granularity = disk.unmap_granularity() / u64::from(logical);
        let granularity = u32::try_from(granularity).unwrap_or(u32::MAX).max(1);
        data[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        data[20..24].copy_from_slice(&MAX_UNMAP_DESCRIPTORS.to_be_bytes());
        data[24..28].copy_from_slice(&granularity.to_be_bytes());
        // The alignment, which is 0, counts.
        data[28] = 0x80;
    }
    data
}

/// Block device characteristics: nothing rotates.
fn characteristics() -> Vec<u8> {
    let mut data = alloc::vec![0; 0x3C];
    data[1] = 1;
    data
}

/// Logical block provisioning: UNMAP, and that blocks come as they are written.
fn provisioning(disk: &dyn Disk) -> Vec<u8> {
    if disk.can_unmap() {
        alloc::vec![0, 0x80, 0x02, 0]
    } else {
        alloc::vec![0; 4]
    }
}

/// What REPORT LUNS tells of these units.
pub fn report(luns: impl ExactSizeIterator<Item = u8>) -> Vec<u8> {
    let length = (luns.len() as u32).saturating_mul(8);
    let mut data = Vec::with_capacity(8 + luns.len() * 8);
    data.extend_from_slice(&length.to_be_bytes());
    data.extend_from_slice(&[0; 4]);
    for lun in luns {
        data.extend_from_slice(&[0, lun, 0, 0, 0, 0, 0, 0]);
    }
    data
}
