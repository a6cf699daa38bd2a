//! A logical unit: what it is, what has happened to it, and how a command begins.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::cdb::Command;
use super::disc;
use super::execute::Do;
use super::inquiry::Kind;
use super::sense::{Additional, Sense, SenseKey};
use super::transfer::{Outcome, Stop, Transfer};
use super::work::{DiskHandle, Pieces, Work};
use crate::disk::Disk;
use crate::storage::activity::Activity;
use crate::storage::counters;
use crate::sync::Mutex;

/// Something that has happened to a unit, which the guest is told with its next command (SPC-3 5.6.5, SAM-3 5.9.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attention {
    /// The unit is new, or was reset: the guest looks at everything anew, so this stands for the others.
    Reset,
    /// There is another medium than before.
    MediumChanged,
    /// The disk has another size than before.
    CapacityChanged,
    /// Other units have come or gone.
    ReportedLunsChanged,
}

impl Attention {
    /// In the order in which they are told.
    const ALL: [Self; 4] = [
        Self::Reset,
        Self::MediumChanged,
        Self::CapacityChanged,
        Self::ReportedLunsChanged,
    ];

    pub(super) const fn sense(self) -> Sense {
        Sense::attention(match self {
            Self::Reset => Additional::POWER_ON_OR_RESET,
            Self::MediumChanged => Additional::MEDIUM_MAY_HAVE_CHANGED,
            Self::CapacityChanged => Additional::CAPACITY_CHANGED,
            Self::ReportedLunsChanged => Additional::REPORTED_LUNS_CHANGED,
        })
    }
}

/// What is in a drive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Medium {
    /// The tray is open.
    Open,
    /// The tray is closed and empty.
    None,
    /// The tray is closed, and there is a medium.
    Present,
}

/// What a command comes to.
#[derive(Debug)]
pub enum Step {
    /// It is done.
    Done(Outcome),
    /// It has to be worked on.
    Work(Work),
}

impl From<Outcome> for Step {
    fn from(outcome: Outcome) -> Self {
        Self::Done(outcome)
    }
}

impl From<Sense> for Step {
    fn from(sense: Sense) -> Self {
        Self::Done(sense.into())
    }
}

/// A logical unit.
pub struct LogicalUnit {
    pub(super) kind: Kind,
    pub(super) identity: [u8; 16],
    /// The most bytes of one command's data.
    pub(super) max_transfer: u32,
    pieces: Arc<Pieces>,
    counters: Arc<counters::Unit>,
    state: Mutex<State>,
}

/// What changes.
pub(super) struct State {
    /// The disk, or the disc in the drive.
    pub(super) medium: Option<Arc<dyn Disk>>,
    pub(super) tray_open: bool,
    /// The guest has forbidden to take the medium out.
    pub(super) locked: bool,
    /// A medium event that GET EVENT STATUS NOTIFICATION has to tell.
    pub(super) event: Option<disc::Event>,
    /// Whether writes may wait in a cache.
    pub(super) write_cache: bool,
    /// The guest has been told that they may.
    pub(super) cache_told: bool,
    attentions: Vec<Attention>,
    /// Sense data that could not be told with its command.
    pub(super) sense: Option<Sense>,
    /// The size that the guest knows.
    sectors: u64,
    /// It was taken away, but somebody still has it.
    removed: bool,
    activity: Arc<Activity>,
}

impl State {
    /// The medium, if it can be used.
    ///
    /// # Errors
    ///
    /// The sense data if not.
    pub(super) fn ready(&self) -> Result<&Arc<dyn Disk>, Sense> {
        let not = |code| Sense::new(SenseKey::NOT_READY, code);
        if self.tray_open {
            return Err(not(Additional::NO_MEDIUM_OPEN));
        }
        self.medium.as_ref().ok_or(not(Additional::NO_MEDIUM))
    }

    fn sectors(&self) -> u64 {
        self.ready().map_or(0, |disk| disk.geometry().sectors)
    }

    pub(super) fn add(&mut self, attention: Attention) {
        if attention == Attention::Reset {
            self.attentions.clear();
        }
        let told = [attention, Attention::Reset];
        if !self.attentions.iter().any(|known| told.contains(known)) {
            self.attentions.push(attention);
        }
    }

    pub(super) fn take_attention(&mut self) -> Option<Attention> {
        let first = Attention::ALL
            .iter()
            .find(|attention| self.attentions.contains(attention))?;
        self.attentions.retain(|attention| attention != first);
        Some(*first)
    }
}

impl LogicalUnit {
    /// A disk.
    pub fn disk(disk: Arc<dyn Disk>, max_transfer: u32, pieces: Arc<Pieces>) -> Self {
        let identity = disk.identity();
        Self::new(Kind::Disk, identity, Some(disk), max_transfer, pieces)
    }

    /// A drive for DVDs, named by `identity`.
    pub fn dvd(
        identity: [u8; 16],
        medium: Option<Arc<dyn Disk>>,
        max_transfer: u32,
        pieces: Arc<Pieces>,
    ) -> Self {
        Self::new(Kind::Dvd, identity, medium, max_transfer, pieces)
    }

    fn new(
        kind: Kind,
        identity: [u8; 16],
        medium: Option<Arc<dyn Disk>>,
        max_transfer: u32,
        pieces: Arc<Pieces>,
    ) -> Self {
        let unit = Self {
            kind,
            identity,
            max_transfer,
            pieces,
            counters: Arc::default(),
            state: Mutex::new(State {
                medium,
                tray_open: false,
                locked: false,
                event: None,
                write_cache: false,
                cache_told: false,
                attentions: Vec::new(),
                sense: None,
                sectors: 0,
                removed: false,
                activity: Arc::default(),
            }),
        };
        unit.begin_session();
        unit
    }

    /// What kind of unit it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What it has done.
    pub fn counts(&self) -> counters::UnitCounts {
        self.counters.read()
    }

    pub(in crate::storage) fn counters(&self) -> &counters::Unit {
        &self.counters
    }

    /// A new guest begins, which knows nothing of what was before.
    pub fn begin_session(&self) {
        let mut state = self.state.lock();
        state.locked = false;
        state.event = None;
        state.attentions.clear();
        state.sense = None;
        state.cache_told = false;
        self.settle(&mut state);
    }

    /// Whether the guest knows of a cache, and so flushes it when the unit goes.
    pub fn has_known_cache(&self) -> bool {
        let state = self.state.lock();
        state.write_cache && state.cache_told
    }

    /// The guest learns the size anew, and the cache is what the disk says.
    pub(super) fn settle(&self, state: &mut State) {
        state.sectors = state.sectors();
        let cache = state.medium.as_ref().is_some_and(|disk| disk.write_cache());
        state.write_cache = cache && self.kind == Kind::Disk;
    }

    /// Something has happened: the guest is told with its next command.
    pub fn attend(&self, attention: Attention) {
        self.state.lock().add(attention);
    }

    /// The guest has been told in another way.
    pub fn forget(&self, attention: Attention) {
        let attentions = &mut self.state.lock().attentions;
        attentions.retain(|known| *known != attention);
    }

    /// Stops what is under way. What this returns says when it has ended.
    pub fn stop(&self, why: Stop) -> Arc<Activity> {
        let mut state = self.state.lock();
        let old = core::mem::take(&mut state.activity);
        old.stop(why);
        match why {
            Stop::Reset => {
                state.locked = false;
                state.sense = None;
                self.settle(&mut state);
                state.add(Attention::Reset);
            }
            Stop::Removed => state.removed = true,
        }
        old
    }

    /// What is in the drive. A disk is always there.
    pub fn medium(&self) -> Medium {
        let state = self.state.lock();
        match (state.tray_open, &state.medium) {
            (true, _) => Medium::Open,
            (false, None) => Medium::None,
            (false, Some(_)) => Medium::Present,
        }
    }

    /// Whether the guest has forbidden to take the medium out.
    pub fn is_locked(&self) -> bool {
        self.state.lock().locked
    }

    /// Puts a medium into the drive, or takes it out, whatever the guest has forbidden; returns the one before.
    pub fn change_medium(&self, medium: Option<Arc<dyn Disk>>) -> Option<Arc<dyn Disk>> {
        let mut state = self.state.lock();
        state.tray_open = false;
        if medium.is_some() {
            state.event = Some(disc::Event::New);
            state.add(Attention::MediumChanged);
        } else {
            state.event = Some(disc::Event::Removed);
        }
        let before = core::mem::replace(&mut state.medium, medium);
        self.settle(&mut state);
        before
    }

    /// The guest could not be given this with its command: REQUEST SENSE will.
    pub fn keep_sense(&self, sense: Sense) {
        self.state.lock().sense = Some(sense);
    }

    /// Begins a command. `Work` counts itself when it ends, everything else is counted here.
    pub fn start(&self, command: &Command, transfer: Transfer) -> Step {
        let step = self.begin(command, transfer);
        if let Step::Done(outcome) = &step {
            self.counters.ended(outcome);
        }
        step
    }

    fn begin(&self, command: &Command, transfer: Transfer) -> Step {
        match command {
            Command::Read { .. } => self.counters.reads.one(),
            Command::Write { .. } => self.counters.writes.one(),
            Command::Unmap { .. } => self.counters.unmaps.one(),
            _ => self.counters.others.one(),
        }
        let mut state = self.state.lock();
        if state.removed {
            return Outcome::Stopped(Stop::Removed).into();
        }
        let sectors = state.sectors();
        if sectors != state.sectors {
            state.sectors = sectors;
            if self.kind == Kind::Disk {
                state.add(Attention::CapacityChanged);
            }
        }
        if !passes_attention(command) {
            if let Some(attention) = state.take_attention() {
                return attention.sense().into();
            }
            // What another command left behind is only of interest until the next one.
            state.sense = None;
        }
        let step = match self.kind {
            Kind::Disk => self.on_disk(&mut state, command, &transfer),
            Kind::Dvd => self.on_dvd(&mut state, command, &transfer),
        };
        match step.unwrap_or_else(Do::from) {
            Do::Answer(bytes, allocation) => transfer.deliver(&bytes, allocation).into(),
            Do::End(outcome) => outcome.into(),
            Do::Work(operation) => {
                let disk = match state.ready() {
                    Ok(disk) => DiskHandle(Arc::clone(disk)),
                    Err(sense) => return sense.into(),
                };
                Step::Work(Work {
                    disk,
                    operation,
                    transfer,
                    pieces: Arc::clone(&self.pieces),
                    counters: Arc::clone(&self.counters),
                    running: state.activity.begin(),
                })
            }
        }
    }
}

impl core::fmt::Debug for LogicalUnit {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "LogicalUnit({:?})", self.kind)
    }
}

/// Commands that are done although there is something to tell (SPC-3 5.6.5; MMC-5 4.1.6.1).
const fn passes_attention(command: &Command) -> bool {
    matches!(
        command,
        Command::Inquiry { .. }
            | Command::RequestSense { .. }
            | Command::ReportLuns { .. }
            | Command::GetConfiguration { .. }
            | Command::GetEventStatus { .. }
    )
}
