//! A SCSI controller: its units, which come and go at any time, and what there is to tell the guest of them.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use super::activity::{Activity, Running};
use super::counters::{Counts, Packets};
use super::scsi::{Attention, Command, Kind, LogicalUnit, Medium, Pieces, Stop};
use super::vstor::{Address, Notice, Properties, ProtocolVersion};
use crate::disk::Disk;
use crate::provider::Link;
use crate::sync::Mutex;

/// The highest number that a unit can have, as on Hyper-V (spec storvsc.md 6).
pub const MAX_LUN: u8 = 63;

/// What a controller allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Sub-channels besides the primary channel.
    pub sub_channels: u16,
    /// The most bytes of one command's data.
    pub max_transfer: u32,
    /// Commands under way at one time on each channel; what comes beyond waits in the ring.
    pub depth: usize,
}

impl Default for Limits {
    /// One channel, 256 KiB as with OpenVMM (spec storvsc.md 2.3), 128 commands.
    fn default() -> Self {
        Self {
            sub_channels: 0,
            max_transfer: 256 << 10,
            depth: 128,
        }
    }
}

/// A unit to be.
#[derive(Clone)]
pub enum Lun {
    /// A disk.
    Disk(Arc<dyn Disk>),
    /// A drive for DVDs.
    Dvd {
        /// What names the drive and no other.
        identity: [u8; 16],
        /// What is in it.
        medium: Option<Arc<dyn Disk>>,
    },
}

/// Why a unit cannot be added, removed or changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LunError {
    /// The number is higher than [`MAX_LUN`].
    TooHigh(u8),
    /// There is a unit with this number.
    InUse(u8),
    /// There is no unit with this number.
    None(u8),
    /// The unit is no drive: its medium stays in it.
    NoDrive(u8),
    /// The guest has locked the medium into the drive.
    Locked(u8),
}

impl fmt::Display for LunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooHigh(lun) => write!(f, "LUN {lun} is above {MAX_LUN}, the highest"),
            Self::InUse(lun) => write!(f, "LUN {lun} is in use"),
            Self::None(lun) => write!(f, "there is no LUN {lun}"),
            Self::NoDrive(lun) => write!(f, "LUN {lun} is not a DVD drive"),
            Self::Locked(lun) => write!(f, "the guest has locked the medium of LUN {lun}"),
        }
    }
}

impl core::error::Error for LunError {}

/// A SCSI controller. It may be changed on any thread.
pub struct Controller {
    limits: Limits,
    units: Mutex<BTreeMap<u8, Arc<LogicalUnit>>>,
    notices: Mutex<Notices>,
    /// The primary channel.
    link: Mutex<Option<Link>>,
    generations: Mutex<Generations>,
    /// The controller is about to be taken away: for the guest it has no units.
    leaving: Mutex<Option<Leaving>>,
    pieces: Arc<Pieces>,
    pub(super) counters: Packets,
}

/// What the guest has yet to be told.
#[derive(Default)]
struct Notices {
    units: bool,
    media: BTreeSet<u8>,
    /// A guest uses the controller.
    in_use: bool,
}

/// What a guest still has to do before it has let go of its units.
struct Leaving {
    /// It has not looked which units there are.
    has_to_look: bool,
    /// Units whose cache it has not flushed.
    unflushed: BTreeSet<u8>,
}

/// Commands of the guest that uses the controller now, and of those before it.
#[derive(Default)]
struct Generations {
    now: Arc<Activity>,
    before: Vec<Arc<Activity>>,
}

impl Controller {
    /// A controller without units.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            units: Mutex::default(),
            notices: Mutex::default(),
            link: Mutex::default(),
            generations: Mutex::default(),
            leaving: Mutex::default(),
            pieces: Arc::default(),
            counters: Packets::default(),
        })
    }

    /// What it allows.
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Adds a unit. A guest that uses the controller is told.
    ///
    /// # Errors
    ///
    /// [`LunError::TooHigh`] and [`LunError::InUse`].
    pub fn add_lun(&self, lun: u8, what: Lun) -> Result<(), LunError> {
        if lun > MAX_LUN {
            return Err(LunError::TooHigh(lun));
        }
        let (most, pieces) = (self.limits.max_transfer, Arc::clone(&self.pieces));
        let unit = match what {
            Lun::Disk(disk) => LogicalUnit::disk(disk, most, pieces),
            Lun::Dvd { identity, medium } => LogicalUnit::dvd(identity, medium, most, pieces),
        };
        let mut units = self.units.lock();
        if units.contains_key(&lun) {
            return Err(LunError::InUse(lun));
        }
        if self.notices.lock().in_use {
            unit.attend(Attention::Reset);
        }
        units.insert(lun, Arc::new(unit));
        drop(units);
        self.tell(|notices| notices.units = true);
        Ok(())
    }

    /// Takes a unit away. A guest that uses the controller is told; commands under way stop where they can, and what this
    /// returns says when they have ended.
    ///
    /// # Errors
    ///
    /// [`LunError::None`].
    pub fn remove_lun(&self, lun: u8) -> Result<Arc<Activity>, LunError> {
        let unit = self.units.lock().remove(&lun);
        let activity = unit.ok_or(LunError::None(lun))?.stop(Stop::Removed);
        self.tell(|notices| notices.units = true);
        Ok(activity)
    }

    /// Puts another medium into a drive, or with `None` takes out what is in it; returns the one before. With `force`
    /// also against the guest's will.
    ///
    /// # Errors
    ///
    /// [`LunError::None`], [`LunError::NoDrive`] and [`LunError::Locked`].
    pub fn change_medium(
        &self,
        lun: u8,
        medium: Option<Arc<dyn Disk>>,
        force: bool,
    ) -> Result<Option<Arc<dyn Disk>>, LunError> {
        let unit = self.unit(lun).ok_or(LunError::None(lun))?;
        if unit.kind() != Kind::Dvd {
            return Err(LunError::NoDrive(lun));
        }
        if unit.is_locked() && !force {
            return Err(LunError::Locked(lun));
        }
        let before = unit.change_medium(medium);
        self.tell(|notices| {
            notices.media.insert(lun);
        });
        Ok(before)
    }

    /// The units, each with what is in it.
    pub fn luns(&self) -> Vec<(u8, Kind, Medium)> {
        let units = self.units.lock();
        let describe = |(lun, unit): (&u8, &Arc<LogicalUnit>)| (*lun, unit.kind(), unit.medium());
        units.iter().map(describe).collect()
    }

    /// What it and its units have done.
    pub fn counts(&self) -> Counts {
        let units = self.units.lock();
        Counts {
            packets: self.counters.read(),
            in_flight: self.generations.lock().now.running() as u64,
            units: units
                .iter()
                .map(|(lun, unit)| (*lun, unit.counts()))
                .collect(),
        }
    }

    pub(super) fn properties(&self) -> Properties {
        Properties {
            sub_channels: self.limits.sub_channels,
            max_transfer: self.limits.max_transfer,
        }
    }

    /// The unit at this address.
    pub(super) fn find(&self, address: Address) -> Option<Arc<LogicalUnit>> {
        if (address.path, address.target) != (0, 0) || self.is_leaving() {
            return None;
        }
        self.unit(address.lun)
    }

    fn is_leaving(&self) -> bool {
        self.leaving.lock().is_some()
    }

    fn unit(&self, lun: u8) -> Option<Arc<LogicalUnit>> {
        self.units.lock().get(&lun).cloned()
    }

    /// The numbers of the units behind a path and target.
    pub(super) fn report(&self, path: u8, target: u8) -> Vec<u8> {
        if (path, target) != (0, 0) || self.is_leaving() {
            return Vec::new();
        }
        let units = self.units.lock();
        // Who reads the list need not be told that there is another (SAM-3 5.9.7).
        let told = |unit: &Arc<LogicalUnit>| unit.forget(Attention::ReportedLunsChanged);
        units.values().for_each(told);
        units.keys().copied().collect()
    }

    /// Stops what one unit is doing, or what all are doing. What this returns says when it has ended.
    pub(super) fn reset(&self, address: Option<Address>) -> Vec<Arc<Activity>> {
        let units: Vec<_> = match address {
            Some(address) => self.find(address).into_iter().collect(),
            None => self.units.lock().values().cloned().collect(),
        };
        units.iter().map(|unit| unit.stop(Stop::Reset)).collect()
    }

    pub(super) fn attach(&self, link: Link) {
        *self.link.lock() = Some(link);
    }

    fn tell(&self, what: impl FnOnce(&mut Notices)) {
        let mut notices = self.notices.lock();
        if !notices.in_use {
            return;
        }
        what(&mut notices);
        drop(notices);
        let link = self.link.lock().clone();
        if let Some(link) = link {
            link.wake();
        }
    }

    /// A guest begins with commands. It looks for units itself.
    pub(super) fn begin_session(&self) {
        let units = self.units.lock();
        units.values().for_each(|unit| unit.begin_session());
        *self.notices.lock() = Notices {
            in_use: true,
            ..Notices::default()
        };
    }

    /// The controller is about to be taken away. What is under way stops where it can, and the guest, which speaks this
    /// version, is told that there are no units any more.
    pub(super) fn leave(&self, version: ProtocolVersion) {
        if self.is_leaving() {
            return;
        }
        let units = self.units.lock();
        let known = units.iter().filter(|(_, unit)| unit.has_known_cache());
        let unflushed = known.map(|(lun, _)| *lun).collect();
        drop(units);
        *self.leaving.lock() = Some(Leaving {
            has_to_look: version.has_enumerate_bus(),
            unflushed,
        });
        self.reset(None);
        self.tell(|notices| notices.units = true);
    }

    /// The guest sends this to a unit that is not there any more.
    pub(super) fn note(&self, address: Address, command: &Command) {
        let mut leaving = self.leaving.lock();
        let Some(leaving) = leaving.as_mut() else {
            return;
        };
        match command {
            Command::ReportLuns { .. } | Command::Inquiry { .. } => leaving.has_to_look = false,
            Command::SynchronizeCache { .. } if (address.path, address.target) == (0, 0) => {
                leaving.unflushed.remove(&address.lun);
            }
            _ => {}
        }
    }

    /// Whether the guest has done all that one does which lets go of its units: it has looked which there are, and flushed
    /// the caches that it knew of.
    pub(super) fn is_let_go(&self) -> bool {
        let leaving = self.leaving.lock();
        let done = |leaving: &Leaving| !leaving.has_to_look && leaving.unflushed.is_empty();
        leaving.as_ref().is_some_and(done)
    }

    /// The guest has gone: nothing that it began is of use any more.
    pub(super) fn end_session(&self) {
        *self.notices.lock() = Notices::default();
        *self.leaving.lock() = None;
        self.reset(None);
        let mut generations = self.generations.lock();
        let last = core::mem::take(&mut generations.now);
        generations.before.push(last);
        generations
            .before
            .retain(|activity| !activity.is_over(None));
    }

    /// Whether nothing is under way that a guest before this one began. If something is, `link` is woken when it has
    /// ended.
    pub(super) fn is_quiet(&self, link: &Link) -> bool {
        let mut generations = self.generations.lock();
        generations
            .before
            .retain(|activity| !activity.is_over(Some(link)));
        generations.before.is_empty()
    }

    /// A command of the guest has begun.
    pub(super) fn begin(&self) -> Running {
        self.generations.lock().now.begin()
    }

    /// The next thing to tell a guest of this version. A guest that cannot be told of units is told by every unit.
    pub(super) fn next_notice(&self, version: ProtocolVersion) -> Option<Notice> {
        let mut notices = self.notices.lock();
        if core::mem::take(&mut notices.units) {
            if version.has_enumerate_bus() {
                return Some(Notice::EnumerateBus);
            }
            // Units before notices, as everywhere.
            drop(notices);
            let units = self.units.lock();
            let attend = |unit: &Arc<LogicalUnit>| unit.attend(Attention::ReportedLunsChanged);
            units.values().for_each(attend);
            drop(units);
            notices = self.notices.lock();
        }
        if !version.has_events() {
            notices.media.clear();
        }
        let lun = notices.media.pop_first()?;
        Some(Notice::MediaChanged(Address {
            path: 0,
            target: 0,
            lun,
        }))
    }

    /// A notice found no room: it will be told later.
    pub(super) fn put_back(&self, notice: Notice) {
        let mut notices = self.notices.lock();
        match notice {
            Notice::EnumerateBus => notices.units = true,
            Notice::MediaChanged(address) => {
                notices.media.insert(address.lun);
            }
        }
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("limits", &self.limits)
            .field("luns", &self.luns())
            .finish_non_exhaustive()
    }
}
