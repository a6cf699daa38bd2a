//! What a drive for DVDs tells of itself and of its disc (MMC-5).

use alloc::vec::Vec;

use super::sense::Sense;
use crate::disk::Disk;

/// Profile of a CD-ROM.
const CD_ROM: u16 = 0x0008;
/// Profile of a DVD-ROM.
const DVD_ROM: u16 = 0x0010;

/// Sectors that a CD has at most: 80 minutes of 60 seconds of 75 sectors.
const CD_SECTORS: u64 = 80 * 60 * 75;

/// Something that has happened to a medium (MMC-5 table 304).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// It can be used now.
    New,
    /// It is gone.
    Removed,
}

/// A drive at one moment.
pub struct Drive<'a> {
    pub medium: Option<&'a dyn Disk>,
    pub tray_open: bool,
}

/// A feature: its code, version and whether it is persistent, whether it is current, and its data (MMC-5 5.3).
struct Feature {
    code: u16,
    version: u8,
    current: bool,
    data: Vec<u8>,
}

impl Drive<'_> {
    /// The profile that is in force; 0 without a medium.
    fn profile(&self) -> u16 {
        match self.medium.filter(|_| !self.tray_open) {
            None => 0,
            Some(disc) if disc.geometry().sectors <= CD_SECTORS => CD_ROM,
            Some(_) => DVD_ROM,
        }
    }

    /// GET CONFIGURATION (MMC-5 6.6): all features (0), the current ones (1) or one (2), beginning with `from`.
    pub fn configuration(&self, which: u8, from: u16) -> Result<Vec<u8>, Sense> {
        if which > 2 {
            return Err(Sense::invalid_cdb(1));
        }
        let mut features = Vec::new();
        for feature in self.features() {
            let wanted = match which {
                0 => feature.code >= from,
                1 => feature.code >= from && feature.current,
                _ => feature.code == from,
            };
            if wanted {
                features.extend_from_slice(&feature.code.to_be_bytes());
                // Those of every drive are there always.
                let persistent = matches!(feature.code, 0..=3 | 0x100 | 0x105);
                let flags =
                    feature.version << 2 | u8::from(persistent) << 1 | u8::from(feature.current);
                features.push(flags);
                features.push(feature.data.len() as u8);
                features.extend_from_slice(&feature.data);
            }
        }
        let length = u32::try_from(features.len() + 4).unwrap_or(u32::MAX);
        let mut answer = length.to_be_bytes().to_vec();
        answer.extend_from_slice(&[0, 0]);
        answer.extend_from_slice(&self.profile().to_be_bytes());
        answer.extend_from_slice(&features);
        Ok(answer)
    }

    fn features(&self) -> [Feature; 9] {
        let profile = self.profile();
        let feature = |code, version, current, data: &[u8]| Feature {
            code,
            version,
            current,
            data: data.to_vec(),
        };
        let there = profile != 0;
        let profiles = [DVD_ROM, CD_ROM].map(|one| {
            let [high, low] = one.to_be_bytes();
            [high, low, u8::from(one == profile), 0]
        });
        // A tray that ejects and loads, and locks.
        let removable = 0x20 | 0x10 | 0x08 | 0x01;
        [
            feature(0x0000, 0, true, profiles.as_flattened()),
            // Core: SCSI, and that INQUIRY tells all.
            feature(0x0001, 2, true, &[0, 0, 0, 1, 1, 0, 0, 0]),
            // Morphing: events are asked for.
            feature(0x0002, 1, true, &[0, 0, 0, 0]),
            feature(0x0003, 0, true, &[removable, 0, 0, 0]),
            // Random readable: blocks of 2048 bytes, one at a time.
            feature(0x0010, 0, there, &[0, 0, 8, 0, 0, 1, 0, 0]),
            feature(0x001E, 2, profile == CD_ROM, &[0, 0, 0, 0]),
            feature(0x001F, 0, profile == DVD_ROM, &[]),
            // Power management, and time-outs.
            feature(0x0100, 0, true, &[]),
            feature(0x0105, 0, true, &[]),
        ]
    }

    /// GET EVENT STATUS NOTIFICATION (MMC-5 6.7): of the asked classes only that of media is there. Also returns whether
    /// `event` was told.
    pub fn event_status(&self, classes: u8, event: Option<Event>) -> (Vec<u8>, bool) {
        const MEDIA: u8 = 4;
        let supported = 1 << MEDIA;
        if classes & supported == 0 {
            // No class that was asked for is there.
            return (alloc::vec![0, 2, 0x80, supported], false);
        }
        let code = match event {
            None => 0,
            Some(Event::New) => 2,
            Some(Event::Removed) => 3,
        };
        let present = self.medium.is_some() && !self.tray_open;
        let status = u8::from(self.tray_open) | u8::from(present) << 1;
        (
            alloc::vec![0, 6, MEDIA, supported, code, status, 0, 0],
            true,
        )
    }

    /// MECHANISM STATUS (MMC-5 6.11): no changer; the tray is open or closed.
    pub fn mechanism_status(&self) -> Vec<u8> {
        alloc::vec![0, if self.tray_open { 0x10 } else { 0 }, 0, 0, 0, 0, 0, 0]
    }
}

/// READ TOC/PMA/ATIP (MMC-5 6.25) of a disc with one track of data: formats 0, the tracks, and 1, the session.
pub fn toc(sectors: u64, time: bool, format: u8, track: u8) -> Result<Vec<u8>, Sense> {
    const LEAD_OUT: u8 = 0xAA;
    let descriptor = |track: u8, block: u64| {
        let [first, second, third, fourth] = address(block, time);
        // Q sub-channel with position; data, uninterrupted.
        [0, 0x14, track, 0, first, second, third, fourth]
    };
    let mut answer = alloc::vec![0, 0, 1, 1];
    match format {
        0 => {
            match track {
                0 | 1 => answer.extend_from_slice(&descriptor(1, 0)),
                LEAD_OUT => {}
                _ => return Err(Sense::invalid_cdb(6)),
            }
            answer.extend_from_slice(&descriptor(LEAD_OUT, sectors));
        }
        1 => answer.extend_from_slice(&descriptor(1, 0)),
        _ => return Err(Sense::invalid_cdb(2)),
    }
    let length = (answer.len() - 2) as u16;
    answer[..2].copy_from_slice(&length.to_be_bytes());
    Ok(answer)
}

/// A block as a number, or as a time: nothing, minute, second and frame, from two seconds before the first block.
fn address(block: u64, time: bool) -> [u8; 4] {
    if !time {
        return u32::try_from(block).unwrap_or(u32::MAX).to_be_bytes();
    }
    let frames = block.saturating_add(150);
    let minute = u8::try_from(frames / (60 * 75)).unwrap_or(u8::MAX);
    let (second, frame) = (frames / 75 % 60, frames % 75);
    [0, minute, second as u8, frame as u8]
}

/// READ DISC INFORMATION (MMC-5 6.21): a complete disc of one session and one track.
pub fn information(kind: u8) -> Result<Vec<u8>, Sense> {
    if kind != 0 {
        return Err(Sense::invalid_cdb(1));
    }
    let mut answer = alloc::vec![0; 34];
    answer[1] = 32;
    // The last session and the disc are complete.
    answer[2] = 0x0E;
    // First track; one session; first and last track of the last session.
    answer[3..7].fill(1);
    // No lead-in or lead-out that one could write.
    answer[16..24].fill(0xFF);
    Ok(answer)
}

/// READ TRACK INFORMATION (MMC-5 6.27): the one track, of a disc that nobody can write to. No track is open. `by` says what
/// `number` is: a block, a track or a session.
pub fn track_information(sectors: u64, open: bool, by: u8, number: u32) -> Result<Vec<u8>, Sense> {
    if open {
        return Err(Sense::invalid_cdb(1));
    }
    let there = match by {
        0 => u64::from(number) < sectors,
        1 | 2 => number == 1,
        _ => return Err(Sense::invalid_cdb(1)),
    };
    if !there {
        return Err(Sense::invalid_cdb(2));
    }
    let mut answer = alloc::vec![0; 36];
    answer[1] = 34;
    // Track and session.
    answer[2..4].fill(1);
    // A track of data, uninterrupted, in mode 1; neither blank nor reserved, and nothing can be written next.
    (answer[5], answer[6]) = (4, 1);
    let sectors = u32::try_from(sectors).unwrap_or(u32::MAX);
    answer[24..28].copy_from_slice(&sectors.to_be_bytes());
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Geometry, MemoryDisk};

    fn disc(sectors: u64) -> MemoryDisk {
        MemoryDisk::new(Geometry {
            sectors,
            logical: 2048,
            physical: 2048,
        })
    }

    fn drive(medium: Option<&dyn Disk>) -> Drive<'_> {
        Drive {
            medium,
            tray_open: false,
        }
    }

    #[test]
    fn the_profile_follows_the_disc() {
        let (cd, dvd) = (disc(CD_SECTORS), disc(CD_SECTORS + 1));
        let profile = |medium| drive(medium).configuration(2, 0).unwrap()[6..8].to_vec();
        assert_eq!(profile(None), [0, 0]);
        assert_eq!(profile(Some(&cd)), [0, 8]);
        assert_eq!(profile(Some(&dvd)), [0, 0x10]);
    }

    #[test]
    fn features_can_be_asked_for_one_by_one_or_from_one_on() {
        let dvd = disc(1 << 20);
        let drive = drive(Some(&dvd));
        let codes = |which, from| {
            let answer = drive.configuration(which, from).unwrap();
            let length = u32::from_be_bytes(*answer.first_chunk().unwrap());
            assert_eq!(length as usize + 4, answer.len());
            let mut rest = &answer[8..];
            let mut codes = Vec::new();
            while let [high, low, _, length, tail @ ..] = rest {
                codes.push(u16::from_be_bytes([*high, *low]));
                rest = &tail[usize::from(*length)..];
            }
            codes
        };
        assert_eq!(codes(0, 0), [0, 1, 2, 3, 0x10, 0x1E, 0x1F, 0x100, 0x105]);
        assert_eq!(codes(0, 0x11), [0x1E, 0x1F, 0x100, 0x105]);
        assert_eq!(codes(1, 0x11), [0x1F, 0x100, 0x105], "no CD is in");
        assert_eq!(codes(2, 0x10), [0x10]);
        assert_eq!(codes(2, 0x11), [] as [u16; 0]);
        assert_eq!(drive.configuration(3, 0), Err(Sense::invalid_cdb(1)));
    }

    #[test]
    fn the_table_of_contents_has_one_track_and_the_lead_out() {
        let toc_of = |time, format, track| toc(0x0102_0304, time, format, track);
        assert_eq!(
            toc_of(false, 0, 0).unwrap(),
            [
                0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xAA, 0, 1, 2, 3, 4
            ]
        );
        assert_eq!(
            toc_of(false, 0, 0xAA).unwrap(),
            [0, 10, 1, 1, 0, 0x14, 0xAA, 0, 1, 2, 3, 4]
        );
        assert_eq!(
            toc(1, true, 0, 0).unwrap()[8..],
            [0, 0, 2, 0, 0, 0x14, 0xAA, 0, 0, 0, 2, 1]
        );
        assert_eq!(toc_of(false, 1, 0).unwrap().len(), 12);
        assert_eq!(toc_of(false, 2, 0), Err(Sense::invalid_cdb(2)));
        assert_eq!(toc_of(false, 0, 2), Err(Sense::invalid_cdb(6)));
    }

    #[test]
    fn the_track_is_found_by_block_by_number_and_by_session() {
        for (by, number) in [(0, 0), (0, 0x0102_0303), (1, 1), (2, 1)] {
            let answer = track_information(0x0102_0304, false, by, number).unwrap();
            assert_eq!(answer.len(), 36);
            assert_eq!(answer[..8], [0, 34, 1, 1, 0, 4, 1, 0], "{by} {number}");
            assert_eq!(answer[8..12], [0; 4], "where it begins");
            assert_eq!(answer[24..28], [1, 2, 3, 4], "its size");
        }
        let refused = |open, by, number| track_information(100, open, by, number);
        for (by, number) in [(0, 100), (1, 0), (1, 2), (1, 0xFF), (2, 0)] {
            assert_eq!(refused(false, by, number), Err(Sense::invalid_cdb(2)));
        }
        assert_eq!(refused(false, 3, 1), Err(Sense::invalid_cdb(1)));
        assert_eq!(
            refused(true, 1, 1),
            Err(Sense::invalid_cdb(1)),
            "none is open"
        );
    }

    #[test]
    fn an_event_is_told_to_those_who_ask_for_media() {
        let mut drive = drive(None);
        drive.tray_open = true;
        let (answer, told) = drive.event_status(0x10, Some(Event::Removed));
        assert_eq!(
            (answer, told),
            (alloc::vec![0, 6, 4, 0x10, 3, 1, 0, 0], true)
        );
        let (answer, told) = drive.event_status(0x02, Some(Event::Removed));
        assert_eq!((answer, told), (alloc::vec![0, 2, 0x80, 0x10], false));
    }
}
