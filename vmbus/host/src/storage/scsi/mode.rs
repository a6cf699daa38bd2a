//! Mode pages: what MODE SENSE tells and what MODE SELECT may change (SPC-3 6.7 to 6.10, 7.4; SBC-3 6.5; MMC-5 7).

use alloc::vec::Vec;

use super::cdb::{Form, ModeSense};
use super::inquiry::Kind;
use super::sense::{Additional, Sense};
use crate::disk::Geometry;

/// Page: caching.
const CACHING: u8 = 0x08;
/// Page: control.
const CONTROL: u8 = 0x0A;
/// Page: read error recovery of a drive.
const RECOVERY: u8 = 0x01;
/// Page: what a drive can do.
const CAPABILITIES: u8 = 0x2A;
/// Every page.
const ALL: u8 = 0x3F;

/// WCE in the caching page: what was written may wait in a cache.
const WRITE_CACHE: u8 = 0x04;

impl ModeSense {
    /// Whether a disk's answer tells of its cache.
    pub(super) const fn is_of_cache(&self) -> bool {
        matches!(self.page, CACHING | ALL)
    }
}

/// What there is to tell of a unit.
#[derive(Clone, Copy, Debug)]
pub struct Modes {
    /// What it is.
    pub kind: Kind,
    /// Its size, if there is a medium.
    pub geometry: Option<Geometry>,
    /// Whether it can only be read.
    pub read_only: bool,
    /// Whether what was written may wait in a cache, now.
    pub write_cache: bool,
    /// Whether it may at all.
    pub has_write_cache: bool,
    /// Whether the medium is locked into the drive.
    pub locked: bool,
}

impl Modes {
    /// What MODE SENSE is answered with.
    ///
    /// # Errors
    ///
    /// The sense data of what was asked for and is not there.
    pub fn sense(&self, ask: &ModeSense) -> Result<Vec<u8>, Sense> {
        if ask.control == 3 {
            return Err(Sense::illegal(Additional::SAVING_NOT_SUPPORTED));
        }
        if !matches!(ask.subpage, 0 | 0xFF) {
            return Err(Sense::invalid_cdb(3));
        }
        let mut pages = Vec::new();
        for page in self.pages() {
            if matches!(ask.page, ALL) || ask.page == *page {
                pages.extend_from_slice(&self.page(*page, ask.control));
            }
        }
        if pages.is_empty() {
            return Err(Sense::invalid_cdb(2));
        }
        let descriptor = if ask.no_descriptor {
            Vec::new()
        } else {
            self.descriptor(ask.long_descriptor)
        };
        Ok(self.with_header(ask, &descriptor, &pages))
    }

    fn with_header(&self, ask: &ModeSense, descriptor: &[u8], pages: &[u8]) -> Vec<u8> {
        let specific = match self.kind {
            // WP, and that DPO and FUA count.
            Kind::Disk => (u8::from(self.read_only) << 7) | 0x10,
            Kind::Dvd => 0,
        };
        let body = descriptor.len() + pages.len();
        let mut data = Vec::with_capacity(8 + body);
        match ask.form {
            Form::Short => {
                data.extend_from_slice(&[(body + 3) as u8, 0, specific, descriptor.len() as u8]);
            }
            Form::Long => {
                data.extend_from_slice(&((body + 6) as u16).to_be_bytes());
                data.extend_from_slice(&[0, specific, u8::from(descriptor.len() > 8), 0]);
                data.extend_from_slice(&(descriptor.len() as u16).to_be_bytes());
            }
        }
        data.extend_from_slice(descriptor);
        data.extend_from_slice(pages);
        data
    }

    /// The block descriptor; none without a medium, and none of a drive.
    fn descriptor(&self, long: bool) -> Vec<u8> {
        let Some(geometry) = self.geometry.filter(|_| self.kind == Kind::Disk) else {
            return Vec::new();
        };
        let mut data = Vec::with_capacity(16);
        if long {
            data.extend_from_slice(&geometry.sectors.to_be_bytes());
            data.extend_from_slice(&[0; 4]);
        } else {
            let sectors = u32::try_from(geometry.sectors).unwrap_or(u32::MAX);
            data.extend_from_slice(&sectors.to_be_bytes());
        }
        // A block has fewer bytes than 24 bits can say: the first byte of a short descriptor's length is reserved.
        data.extend_from_slice(&geometry.logical.to_be_bytes());
        data
    }

    const fn pages(&self) -> &'static [u8] {
        match self.kind {
            Kind::Disk => &[CACHING, CONTROL],
            Kind::Dvd => &[RECOVERY, CAPABILITIES],
        }
    }

    /// A page with these values: 0 current, 1 changeable, 2 default.
    fn page(&self, page: u8, control: u8) -> Vec<u8> {
        let length = match page {
            CACHING | CAPABILITIES => 20,
            CONTROL | RECOVERY => 12,
            _ => 2,
        };
        let mut data = alloc::vec![0; length];
        data[0] = page;
        data[1] = (length - 2) as u8;
        let cache = match control {
            0 => self.write_cache,
            _ => self.has_write_cache,
        };
        if page == CACHING && cache {
            data[2] = WRITE_CACHE;
        }
        if control == 1 {
            return data;
        }
        match page {
            // Commands may be done in any order; the busy time-out has no limit.
            CONTROL => {
                data[3] = 0x10;
                data[8..10].fill(0xFF);
            }
            CAPABILITIES => {
                // Reads DVD-ROM, CD-R and CD-RW; several sessions; ejects, and has a tray that locks.
                data[2] = 0x0B;
                data[4] = 0x40;
                data[6] = 0x29 | if self.locked { 2 } else { 0 };
                // Speed now and at most, in units of 1000 bytes per second: 16 times that of a DVD.
                data[8..10].copy_from_slice(&SPEED.to_be_bytes());
                data[14..16].copy_from_slice(&SPEED.to_be_bytes());
            }
            _ => {}
        }
        data
    }

    /// Whether MODE SELECT turns the write cache on or off. `None` when it changes nothing.
    ///
    /// # Errors
    ///
    /// The sense data of a list that is broken, or wants to change what cannot be changed.
    pub fn select(&self, form: Form, list: &[u8]) -> Result<Option<bool>, Sense> {
        let too_short = Sense::illegal(Additional::PARAMETER_LIST_LENGTH);
        let (header, descriptor) = match (form, list) {
            (_, []) => return Ok(None),
            (Form::Short, [_, _, _, length, ..]) => (4, usize::from(*length)),
            (Form::Long, [_, _, _, _, _, _, high, low, ..]) => {
                (8, usize::from(u16::from_be_bytes([*high, *low])))
            }
            _ => return Err(too_short),
        };
        self.check_descriptor(form, list, header, descriptor)?;
        let mut at = header + descriptor;
        let mut cache = None;
        while let Some([first, length, rest @ ..]) = list.get(at..).filter(|rest| !rest.is_empty())
        {
            let body = rest.get(..usize::from(*length)).ok_or(too_short)?;
            if let Some(change) = self.select_page(*first & 0x3F, *first, body, at)? {
                cache = Some(change);
            }
            at += 2 + body.len();
        }
        if at != list.len() {
            return Err(too_short);
        }
        Ok(cache.filter(|cache| *cache != self.write_cache))
    }

    /// A block descriptor must be the unit's own.
    fn check_descriptor(
        &self,
        form: Form,
        list: &[u8],
        header: usize,
        length: usize,
    ) -> Result<(), Sense> {
        let field = Sense::invalid_parameters(header as u16);
        let long = form == Form::Long && list.get(4).is_some_and(|flags| flags & 1 != 0);
        match (length, long) {
            (0, _) => return Ok(()),
            (8, false) | (16, true) => {}
            _ => return Err(field),
        }
        let given = list.get(header..header + length);
        let given = given.ok_or(Sense::illegal(Additional::PARAMETER_LIST_LENGTH))?;
        let own = self.descriptor(long);
        // The number of blocks may be 0: as many as there are.
        let blocks = length - if long { 8 } else { 4 };
        let (count, size) = given.split_at(blocks);
        let same = own.ends_with(size.get(size.len().saturating_sub(3)..).unwrap_or(size))
            && (own.starts_with(count) || count.iter().all(|byte| *byte == 0));
        if same { Ok(()) } else { Err(field) }
    }

    fn select_page(
        &self,
        page: u8,
        first: u8,
        body: &[u8],
        at: usize,
    ) -> Result<Option<bool>, Sense> {
        let wrong =
            |byte: usize| Sense::invalid_parameters(u16::try_from(byte).unwrap_or(u16::MAX));
        // A subpage, or a page that is not there.
        if first & 0x40 != 0 || !self.pages().contains(&page) {
            return Err(wrong(at));
        }
        let current = self.page(page, 0);
        let changeable = self.page(page, 1);
        if current.len() != body.len() + 2 {
            return Err(wrong(at + 1));
        }
        let values = current.iter().zip(&changeable).skip(2).zip(body);
        for (index, ((current, changeable), wanted)) in values.enumerate() {
            if (current ^ wanted) & !changeable != 0 {
                return Err(wrong(at + 2 + index));
            }
        }
        let flags = body.first().filter(|_| page == CACHING);
        Ok(flags.map(|flags| flags & WRITE_CACHE != 0))
    }
}

/// Kilobytes per second of a DVD drive of speed 16.
const SPEED: u16 = 22_160;

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Modes = Modes {
        kind: Kind::Disk,
        geometry: Some(Geometry::of_bytes(1 << 20)),
        read_only: false,
        write_cache: true,
        has_write_cache: true,
        locked: false,
    };

    fn ask(form: Form, page: u8, control: u8) -> ModeSense {
        ModeSense {
            form,
            no_descriptor: false,
            long_descriptor: false,
            control,
            page,
            subpage: 0,
            allocation: 255,
        }
    }

    #[test]
    fn both_forms_have_header_descriptor_and_page() {
        let short = DISK.sense(&ask(Form::Short, CACHING, 0)).unwrap();
        assert_eq!(short[..4], [31, 0, 0x10, 8]);
        assert_eq!(short[4..12], [0, 0, 8, 0, 0, 0, 2, 0]);
        assert_eq!(short[12..15], [CACHING, 18, WRITE_CACHE]);
        assert_eq!(short.len(), 32);
        let long = DISK.sense(&ask(Form::Long, CACHING, 0)).unwrap();
        assert_eq!(long[..8], [0, 34, 0, 0x10, 0, 0, 0, 8]);
        assert_eq!(long[8..], short[4..]);
    }

    #[test]
    fn a_long_descriptor_has_the_whole_size() {
        let mut ask = ask(Form::Long, CONTROL, 0);
        ask.long_descriptor = true;
        let data = DISK.sense(&ask).unwrap();
        assert_eq!(data[..8], [0, 34, 0, 0x10, 1, 0, 0, 16]);
        assert_eq!(
            data[8..24],
            [0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2, 0]
        );
    }

    #[test]
    fn a_read_only_disk_is_write_protected_and_has_no_cache_to_turn_on() {
        let disk = Modes {
            read_only: true,
            write_cache: false,
            has_write_cache: false,
            ..DISK
        };
        let data = disk.sense(&ask(Form::Short, CACHING, 0)).unwrap();
        assert_eq!((data[2], data[14]), (0x90, 0));
        let mut list = alloc::vec![0; 4];
        list.extend_from_slice(&DISK.page(CACHING, 0));
        let error = disk.select(Form::Short, &list).unwrap_err();
        assert_eq!(error, Sense::invalid_parameters(6));
    }

    #[test]
    fn what_is_not_there_is_refused_with_its_byte() {
        let refused = |ask: &ModeSense| DISK.sense(ask).unwrap_err();
        assert_eq!(refused(&ask(Form::Short, 0x1C, 0)), Sense::invalid_cdb(2));
        let saved = Sense::illegal(Additional::SAVING_NOT_SUPPORTED);
        assert_eq!(refused(&ask(Form::Short, CACHING, 3)), saved);
        let mut subpage = ask(Form::Short, CACHING, 0);
        subpage.subpage = 1;
        assert_eq!(refused(&subpage), Sense::invalid_cdb(3));
    }

    #[test]
    fn only_the_write_cache_can_be_changed() {
        let list = |change: fn(&mut Vec<u8>)| {
            let mut list = alloc::vec![0; 4];
            list.extend_from_slice(&DISK.page(CACHING, 0));
            change(&mut list);
            DISK.select(Form::Short, &list)
        };
        assert_eq!(list(|_| {}), Ok(None));
        assert_eq!(list(|list| list[6] = 0), Ok(Some(false)));
        assert_eq!(list(|list| list[6] |= 1), Err(Sense::invalid_parameters(6)));
        assert_eq!(
            list(|list| list[20] = 1),
            Err(Sense::invalid_parameters(20))
        );
        let length = Sense::illegal(Additional::PARAMETER_LIST_LENGTH);
        assert_eq!(list(|list| list.truncate(20)), Err(length));
        assert_eq!(list(|list| list.push(8)), Err(length));
        assert_eq!(list(|list| list[5] = 2), Err(Sense::invalid_parameters(5)));
        assert_eq!(list(|list| list[4] = 7), Err(Sense::invalid_parameters(4)));
    }

    #[test]
    fn what_was_sensed_can_be_selected_again() {
        for form in [Form::Short, Form::Long] {
            for long in [false, true] {
                for page in [CACHING, CONTROL, ALL] {
                    let mut ask = ask(form, page, 0);
                    ask.long_descriptor = long && form == Form::Long;
                    let list = DISK.sense(&ask).unwrap();
                    assert_eq!(DISK.select(form, &list), Ok(None));
                }
            }
        }
        let mut list = DISK.sense(&ask(Form::Short, CACHING, 0)).unwrap();
        list[9] ^= 1;
        let error = DISK.select(Form::Short, &list).unwrap_err();
        assert_eq!(error, Sense::invalid_parameters(4));
    }
}
