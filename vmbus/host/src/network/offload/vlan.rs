//! 802.1Q tags, in frames and out of band.

use alloc::vec::Vec;

use super::VLAN;
use crate::network::rndis::VlanTag;

/// The EtherType of a tag.
const TAG: [u8; 2] = 0x8100u16.to_be_bytes();

/// Where a tag stands: behind both addresses.
const PLACE: usize = 12;

/// Puts a tag into a frame. One too short to have addresses stays as it is.
pub fn insert_tag(frame: &mut Vec<u8>, tag: VlanTag) {
    if frame.len() < PLACE {
        return;
    }
    let [t, p] = TAG;
    let [high, low] = tag.tci().to_be_bytes();
    frame.splice(PLACE..PLACE, [t, p, high, low]);
}

/// Takes the outermost tag out of a frame, if it has one.
pub fn strip_tag(frame: &mut Vec<u8>) -> Option<VlanTag> {
    let [t, p, high, low] = *frame.get(PLACE..)?.first_chunk::<VLAN>()?;
    if [t, p] != TAG {
        return None;
    }
    frame.drain(PLACE..PLACE + VLAN);
    Some(VlanTag::from_tci(u16::from_be_bytes([high, low])))
}
