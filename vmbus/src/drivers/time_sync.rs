//! Time synchronization: the host's samples steer a [`WallClock`] (spec ic.md 7).

use alloc::sync::Arc;

use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::ic::{Component, ComponentStatus, Integration, Reply, Service, Status, Version, wire};
use super::standing::Standing;
use super::wall_clock::{ClockStatus, Refusal, Sample, WallClock};
use crate::kmcl::{Client, ConfigError, interface};

/// The version from which a sample says at which reference time it was taken.
const V4_0: Version = Version::new(4, 0);

const COMPONENT: Component = Component {
    name: "time sync",
    interface: interface::TIME_SYNC,
    kind: 4,
    versions: &[Version::new(1, 0), Version::new(3, 0), V4_0],
    // Both forms are shorter; hosts may pad them.
    longest_body: 64,
};

wire! {
    /// The body before version 4.0, without its padding.
    SampleV1, 25 {
        /// UTC in units of 100 ns since 1601.
        host_time: U64,
        /// Not used.
        guest_time: U64,
        /// How long host and guest took for an earlier request and its answer, in units of 100 ns.
        round_trip: U64,
        /// [`SYNC`], [`SAMPLE`], or 0 for a probe.
        flags: u8,
    }

    /// The body from version 4.0 on, without its padding.
    SampleV4, 19 {
        /// UTC in units of 100 ns since 1601.
        host_time: U64,
        /// Reference time at which that was the time.
        reference_time: U64,
        /// [`SYNC`], [`SAMPLE`], or 0 for a probe.
        flags: u8,
        /// Leap indicator, as NTP has it.
        leap: u8,
        /// Distance to a good clock, as NTP has it.
        stratum: u8,
    }
}

/// Flag: set the clock.
const SYNC: u8 = 1;
/// Flag: this is the time, for your information.
const SAMPLE: u8 = 2;

/// The longest round trip that is believed, 1 s.
const LONGEST_ROUND_TRIP: u64 = 10_000_000;

/// The time synchronization driver.
#[derive(Debug)]
pub struct TimeSync {
    integration: Integration,
    clock: Arc<WallClock>,
}

/// How time synchronization stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimeSyncStatus {
    /// The protocol.
    pub component: ComponentStatus,
    /// The clock.
    pub clock: ClockStatus,
}

struct Steering(Arc<WallClock>);

impl TimeSync {
    /// Enables the driver, which steers `clock`. Called at PASSIVE.
    pub fn new(client: &Client, clock: Arc<WallClock>) -> Result<Self, ConfigError> {
        let integration = Integration::new(client, Arc::new(Steering(clock.clone())))?;
        Ok(Self { integration, clock })
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<WallClock> {
        &self.clock
    }

    /// How it stands. At PASSIVE.
    pub fn status(&self) -> TimeSyncStatus {
        TimeSyncStatus {
            component: self.integration.status(),
            clock: self.clock.status(),
        }
    }

    /// The channel.
    pub fn channel(&self) -> &Standing {
        self.integration.channel()
    }
}

/// What a request says, if it says anything about the time; `now` is when it came, in reference time.
fn parse(now: u64, version: Version, body: &[u8]) -> Result<Option<Sample>, Status> {
    let (flags, sample) = if version >= V4_0 {
        let (wire, _) = SampleV4::read_from_prefix(body).map_err(|_| Status::INVALID_ARGUMENT)?;
        let sample = Sample {
            host_time: wire.host_time.get(),
            reference_time: wire.reference_time.get(),
            sync: wire.flags & SYNC != 0,
        };
        (wire.flags, sample)
    } else {
        let (wire, _) = SampleV1::read_from_prefix(body).map_err(|_| Status::INVALID_ARGUMENT)?;
        // The host took the time before it sent it: as far as is known, half a round trip ago.
        let under_way = match wire.round_trip.get() {
            round_trip @ ..=LONGEST_ROUND_TRIP => round_trip / 2,
            _ => 0,
        };
        let sample = Sample {
            host_time: wire.host_time.get().saturating_add(under_way),
            reference_time: now,
            sync: wire.flags & SYNC != 0,
        };
        (wire.flags, sample)
    };
    Ok((flags & (SYNC | SAMPLE) != 0).then_some(sample))
}

impl Service for Steering {
    fn component(&self) -> &'static Component {
        &COMPONENT
    }

    fn request(&self, now: u64, version: Version, body: &mut [u8]) -> Reply {
        let sample = match parse(now, version, body) {
            Ok(Some(sample)) => sample,
            Ok(None) => return Reply::Now(Status::OK),
            Err(status) => return Reply::Now(status),
        };
        Reply::Now(match self.0.sample(now, sample) {
            Ok(adjustment) => {
                log::debug!("time sync: {adjustment:?}");
                Status::OK
            }
            // The host has done nothing wrong.
            Err(Refusal::Old) => Status::OK,
            Err(refusal) => {
                log::warn!("time sync: refused a sample: {refusal:?}");
                Status::INVALID_ARGUMENT
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn v4(flags: u8) -> Vec<u8> {
        let mut body: Vec<u8> = [7u64, 5]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        body.extend_from_slice(&[flags, 0, 1, 0, 0, 0, 0, 0]);
        body
    }

    fn v1(round_trip: u64, flags: u8) -> Vec<u8> {
        let words = [7u64, 99, round_trip];
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        body.extend_from_slice(&[flags, 0, 0, 0]);
        body
    }

    fn sample(host_time: u64, reference_time: u64, sync: bool) -> Sample {
        Sample {
            host_time,
            reference_time,
            sync,
        }
    }

    #[test]
    fn version_4_names_the_reference_time_of_the_sample() {
        assert_eq!(parse(9, V4_0, &v4(1)), Ok(Some(sample(7, 5, true))));
        assert_eq!(parse(9, V4_0, &v4(2)), Ok(Some(sample(7, 5, false))));
        // Linux knows 22 bytes of it, OpenVMM sends 24.
        assert_eq!(parse(9, V4_0, &v4(1)[..22]), Ok(Some(sample(7, 5, true))));
    }

    #[test]
    fn before_version_4_the_reference_time_is_that_of_reception() {
        for version in [Version::new(1, 0), Version::new(3, 0)] {
            assert_eq!(parse(9, version, &v1(0, 1)), Ok(Some(sample(7, 9, true))));
            assert_eq!(
                parse(9, version, &v1(0, 2)[..25]),
                Ok(Some(sample(7, 9, false)))
            );
        }
    }

    #[test]
    fn before_version_4_half_a_round_trip_has_passed_since() {
        let version = Version::new(3, 0);
        assert_eq!(parse(9, version, &v1(40, 1)), Ok(Some(sample(27, 9, true))));
        // One that no machine takes counts for nothing.
        assert_eq!(
            parse(9, version, &v1(u64::MAX, 1)),
            Ok(Some(sample(7, 9, true)))
        );
    }

    #[test]
    fn a_probe_says_nothing_about_time() {
        assert_eq!(parse(9, V4_0, &v4(0)), Ok(None));
        assert_eq!(parse(9, Version::new(1, 0), &v1(0, 0)), Ok(None));
    }

    #[test]
    fn a_short_sample_is_an_invalid_argument() {
        assert_eq!(parse(9, V4_0, &v4(1)[..18]), Err(Status::INVALID_ARGUMENT));
        assert_eq!(
            parse(9, Version::new(3, 0), &v1(0, 1)[..24]),
            Err(Status::INVALID_ARGUMENT)
        );
    }
}
