//! KVM's binary statistics (Linux, Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// How the file begins.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    flags: U32,
    name_size: U32,
    count: U32,
    id_offset: U32,
    descriptors: U32,
    data: U32,
}

/// One statistic, followed by its name.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptor {
    flags: U32,
    exponent: U16,
    values: U16,
    offset: U32,
    bucket_size: U32,
}

const _: () = assert!(size_of::<Header>() == 24 && size_of::<Descriptor>() == 16);

/// Statistics by name.
pub type Statistics = BTreeMap<String, u64>;

/// Reads all statistics that are one count each: no times, no states, no histograms.
pub fn read(file: &File) -> io::Result<Statistics> {
    let mut header = Header::new_zeroed();
    file.read_exact_at(header.as_mut_bytes(), 0)?;
    let step = size_of::<Descriptor>() as u64 + u64::from(header.name_size.get());
    let mut statistics = Statistics::new();
    for index in 0..u64::from(header.count.get()) {
        let at = u64::from(header.descriptors.get()) + index * step;
        let mut descriptor = Descriptor::new_zeroed();
        file.read_exact_at(descriptor.as_mut_bytes(), at)?;
        if descriptor.values.get() != 1 || !is_count(descriptor.flags.get()) {
            continue;
        }
        let mut name = vec![0; header.name_size.get() as usize];
        file.read_exact_at(&mut name, at + size_of::<Descriptor>() as u64)?;
        let mut value = [0; 8];
        let offset = u64::from(header.data.get()) + u64::from(descriptor.offset.get());
        file.read_exact_at(&mut value, offset)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).into_owned();
        statistics.insert(name, u64::from_ne_bytes(value));
    }
    Ok(statistics)
}

/// Whether a statistic counts events from the start on: bits 0 to 3 are its type, cumulative is 0, bits 4 to 7 its unit,
/// none is 0. Others are times, sizes, states.
const fn is_count(flags: u32) -> bool {
    flags & 0xFF == 0
}

/// Adds up the statistics of several VPs.
pub fn sum(all: impl Iterator<Item = Statistics>) -> Statistics {
    let mut sum = Statistics::new();
    for (name, value) in all.flatten() {
        *sum.entry(name).or_default() += value;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_states_are_no_counts() {
        // Type and unit: cumulative and none; then an instant value, a peak, bytes, seconds, a truth value.
        let flags = [0x00, 0x01, 0x02, 0x10, 0x20, 0x41];
        assert_eq!(
            flags.map(is_count),
            [true, false, false, false, false, false]
        );
        // The base, from bit 8 on, changes nothing.
        assert!(is_count(0x100));
    }
}
