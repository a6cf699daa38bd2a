//! What each command comes to, at a disk and at a drive (SPC-3, SBC-3, MMC-5).

use alloc::vec::Vec;

use super::cdb::{Blocks, Command, Form, ModeSense};
use super::disc;
use super::inquiry::{self, Kind, MAX_UNMAP_DESCRIPTORS};
use super::mode::Modes;
use super::sense::{Additional, Sense, SenseKey};
use super::transfer::{Outcome, Transfer};
use super::unit::{Attention, LogicalUnit, State};
use super::work::{Compare, Extent, Operation};
use crate::storage::vstor::Direction;

/// What a command comes to, while the unit is locked.
pub(super) enum Do {
    /// Give the guest these bytes, or as many as it asked for.
    Answer(Vec<u8>, u32),
    End(Outcome),
    Work(Operation),
}

impl Do {
    /// Work, if there is anything to work on.
    pub(super) fn work_on(extent: Extent, operation: Operation) -> Self {
        if extent.length == 0 {
            Self::End(Outcome::DONE)
        } else {
            Self::Work(operation)
        }
    }
}

impl From<Sense> for Do {
    fn from(sense: Sense) -> Self {
        Self::End(sense.into())
    }
}

impl LogicalUnit {
    /// What only a disk does.
    pub(super) fn on_disk(
        &self,
        state: &mut State,
        command: &Command,
        transfer: &Transfer,
    ) -> Result<Do, Sense> {
        match *command {
            Command::Write { blocks, fua } => {
                self.check_writable(state)?;
                let through = fua || !state.write_cache;
                let extent = self.extent(state, blocks)?;
                self.check_room(extent, transfer, Direction::OUT)?;
                Ok(Do::work_on(extent, Operation::Write { extent, through }))
            }
            Command::Unmap { anchor, length } => self.unmap(state, anchor, length, transfer),
            Command::ModeSelect {
                form,
                page_format,
                save,
                length,
            } => {
                if !page_format || save {
                    return Err(Sense::invalid_cdb(1));
                }
                self.mode_select(state, form, length, transfer)
            }
            // A virtual disk does not spin: it stops when what was written is safe.
            Command::StartStop {
                power,
                load_eject,
                start,
            } => {
                if load_eject {
                    return Err(Sense::invalid_cdb(4));
                }
                let stops = power == 0 && !start;
                Ok(if stops && !state.ready()?.read_only() {
                    Do::Work(Operation::Flush)
                } else {
                    Do::End(Outcome::DONE)
                })
            }
            _ => self.on_both(state, command, transfer),
        }
    }

    /// What only a drive does.
    pub(super) fn on_dvd(
        &self,
        state: &mut State,
        command: &Command,
        transfer: &Transfer,
    ) -> Result<Do, Sense> {
        let drive = disc::Drive {
            medium: state.medium.as_deref(),
            tray_open: state.tray_open,
        };
        match *command {
            Command::StartStop {
                power,
                load_eject,
                start,
            } => {
                if power == 0 && load_eject {
                    self.move_tray(state, !start)?;
                }
                Ok(Do::End(Outcome::DONE))
            }
            Command::PreventAllow { prevent } => {
                state.locked = prevent & 1 != 0;
                Ok(Do::End(Outcome::DONE))
            }
            Command::ReadToc {
                time,
                format,
                track,
                allocation,
            } => {
                let geometry = state.ready()?.geometry();
                let answer = disc::toc(geometry.sectors, time, format, track)?;
                Ok(Do::Answer(answer, allocation.into()))
            }
            Command::ReadDiscInformation { kind, allocation } => {
                state.ready()?;
                let answer = disc::information(kind)?;
                Ok(Do::Answer(answer, allocation.into()))
            }
            Command::ReadTrackInformation {
                open,
                by,
                number,
                allocation,
            } => {
                let sectors = state.ready()?.geometry().sectors;
                let answer = disc::track_information(sectors, open, by, number)?;
                Ok(Do::Answer(answer, allocation.into()))
            }
            Command::GetConfiguration {
                which,
                from,
                allocation,
            } => Ok(Do::Answer(
                drive.configuration(which, from)?,
                allocation.into(),
            )),
            Command::GetEventStatus {
                polled,
                classes,
                allocation,
            } => {
                // Nobody waits for events here: the guest has to ask.
                if !polled {
                    return Err(Sense::invalid_cdb(1));
                }
                let (answer, told) = drive.event_status(classes, state.event);
                if told && allocation > 4 {
                    state.event = None;
                }
                Ok(Do::Answer(answer, allocation.into()))
            }
            Command::MechanismStatus { allocation } => {
                Ok(Do::Answer(drive.mechanism_status(), allocation.into()))
            }
            _ => self.on_both(state, command, transfer),
        }
    }

    /// What both do.
    fn on_both(
        &self,
        state: &mut State,
        command: &Command,
        transfer: &Transfer,
    ) -> Result<Do, Sense> {
        match *command {
            Command::TestUnitReady => state.ready().map(|_| Do::End(Outcome::DONE)),
            Command::RequestSense {
                descriptor,
                allocation,
            } => {
                if descriptor {
                    return Err(Sense::invalid_cdb(1));
                }
                let kept = state.sense.take();
                let attention = || state.take_attention().map(Attention::sense);
                let sense = kept.or_else(attention).unwrap_or(Sense::NONE);
                Ok(Do::Answer(sense.to_bytes().to_vec(), allocation.into()))
            }
            Command::Inquiry {
                vital,
                page,
                allocation,
            } => self.inquiry(state, vital, page, allocation),
            Command::ModeSense(ask) => self.mode_sense(state, &ask),
            Command::PreventAllow { .. } => Ok(Do::End(Outcome::DONE)),
            Command::ReadCapacity { block, partial } => {
                if block != 0 && !partial {
                    return Err(Sense::invalid_cdb(2));
                }
                let geometry = state.ready()?.geometry();
                let last = geometry.sectors.saturating_sub(1);
                let mut answer = u32::try_from(last)
                    .unwrap_or(u32::MAX)
                    .to_be_bytes()
                    .to_vec();
                answer.extend_from_slice(&geometry.logical.to_be_bytes());
                Ok(Do::Answer(answer, u32::MAX))
            }
            Command::ReadCapacityLong {
                block,
                partial,
                allocation,
            } => {
                if block != 0 && !partial {
                    return Err(Sense::invalid_cdb(2));
                }
                Ok(Do::Answer(self.long_capacity(state)?, allocation))
            }
            Command::Read { blocks, fua } => {
                let extent = self.extent(state, blocks)?;
                self.check_room(extent, transfer, Direction::IN)?;
                let read = Operation::Read {
                    extent,
                    through: fua,
                };
                Ok(Do::work_on(extent, read))
            }
            Command::Verify { blocks, compare } => self.verify(state, blocks, compare, transfer),
            Command::SynchronizeCache { blocks } => {
                self.extent_unbounded(state, blocks)?;
                Ok(if state.ready()?.read_only() {
                    Do::End(Outcome::DONE)
                } else {
                    Do::Work(Operation::Flush)
                })
            }
            _ => Err(Sense::illegal(Additional::INVALID_OPERATION_CODE)),
        }
    }

    fn inquiry(&self, state: &State, vital: bool, page: u8, allocation: u16) -> Result<Do, Sense> {
        let answer = match (vital, page) {
            (false, 0) => inquiry::standard(Some(self.kind)).to_vec(),
            (false, _) => return Err(Sense::invalid_cdb(2)),
            (true, page) => {
                let disk = state.medium.as_deref();
                let disk = disk.filter(|_| self.kind == Kind::Disk);
                let page = inquiry::vital(page, self.kind, &self.identity, disk, self.max_transfer);
                page.ok_or(Sense::invalid_cdb(2))?
            }
        };
        Ok(Do::Answer(answer, allocation.into()))
    }

    /// READ CAPACITY(16) (SBC-3 5.16).
    fn long_capacity(&self, state: &State) -> Result<Vec<u8>, Sense> {
        let disk = state.ready()?;
        let geometry = disk.geometry();
        let mut answer = geometry.sectors.saturating_sub(1).to_be_bytes().to_vec();
        answer.extend_from_slice(&geometry.logical.to_be_bytes());
        answer.resize(32, 0);
        let per_physical = geometry.physical.checked_div(geometry.logical);
        let exponent = per_physical.and_then(u32::checked_ilog2).unwrap_or(0);
        answer[13] = exponent.min(15) as u8;
        // LBPME: blocks that are not there until they are written.
        answer[14] = if disk.can_unmap() { 0x80 } else { 0 };
        Ok(answer)
    }

    fn modes(&self, state: &State) -> Modes {
        let disk = state.ready().ok();
        let is_disk = self.kind == Kind::Disk;
        Modes {
            kind: self.kind,
            geometry: disk.map(|disk| disk.geometry()),
            read_only: disk.is_none_or(|disk| disk.read_only()),
            write_cache: state.write_cache,
            has_write_cache: is_disk && disk.is_some_and(|disk| disk.write_cache()),
            locked: state.locked,
        }
    }

    fn mode_sense(&self, state: &mut State, ask: &ModeSense) -> Result<Do, Sense> {
        let answer = self.modes(state).sense(ask)?;
        state.cache_told |= self.kind == Kind::Disk && ask.is_of_cache();
        Ok(Do::Answer(answer, ask.allocation.into()))
    }

    fn mode_select(
        &self,
        state: &mut State,
        form: Form,
        length: u16,
        transfer: &Transfer,
    ) -> Result<Do, Sense> {
        let list = match transfer.take(length) {
            Ok(list) => list,
            Err(outcome) => return Ok(Do::End(outcome)),
        };
        let Some(cache) = self.modes(state).select(form, &list)? else {
            return Ok(Do::End(Outcome::Good(length.into())));
        };
        state.write_cache = cache;
        // What waits in the cache is not to wait any longer.
        Ok(if cache {
            Do::End(Outcome::Good(length.into()))
        } else {
            Do::Work(Operation::Flush)
        })
    }

    fn unmap(
        &self,
        state: &State,
        anchor: bool,
        length: u16,
        transfer: &Transfer,
    ) -> Result<Do, Sense> {
        let disk = state.ready()?;
        if !disk.can_unmap() {
            return Err(Sense::illegal(Additional::INVALID_OPERATION_CODE));
        }
        if anchor {
            return Err(Sense::invalid_cdb(1));
        }
        self.check_writable(state)?;
        if length == 0 {
            return Ok(Do::End(Outcome::DONE));
        }
        let list = match transfer.take(length) {
            Ok(list) => list,
            Err(outcome) => return Ok(Do::End(outcome)),
        };
        let extents = self.unmap_descriptors(state, &list)?;
        let through = !state.write_cache;
        Ok(Do::Work(Operation::Unmap { extents, through }))
    }

    /// The parameter list of UNMAP (SBC-3 5.28).
    fn unmap_descriptors(&self, state: &State, list: &[u8]) -> Result<Vec<Extent>, Sense> {
        let [_, _, high, low, _, _, _, _, descriptors @ ..] = list else {
            return Err(Sense::illegal(Additional::PARAMETER_LIST_LENGTH));
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let descriptors = descriptors
            .get(..length)
            .ok_or(Sense::illegal(Additional::PARAMETER_LIST_LENGTH))?;
        // A descriptor that is cut off is ignored.
        let (descriptors, _) = descriptors.as_chunks::<16>();
        if descriptors.len() > MAX_UNMAP_DESCRIPTORS as usize {
            return Err(Sense::invalid_parameters(2));
        }
        let extent = |descriptor: &[u8; 16]| {
            let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *descriptor;
            let blocks = Blocks {
                first: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
                count: u32::from_be_bytes([i, j, k, l]),
            };
            self.extent_unbounded(state, blocks)
        };
        descriptors.iter().map(extent).collect()
    }

    fn verify(
        &self,
        state: &State,
        blocks: Blocks,
        compare: u8,
        transfer: &Transfer,
    ) -> Result<Do, Sense> {
        let extent = self.extent(state, blocks)?;
        let block = u64::from(state.ready()?.geometry().logical);
        let compare = match compare {
            0 => None,
            1 => Some(Compare::All),
            3 => Some(Compare::OneBlock),
            _ => return Err(Sense::invalid_cdb(1)),
        };
        match compare {
            None => {}
            Some(Compare::All) => self.check_room(extent, transfer, Direction::OUT)?,
            Some(Compare::OneBlock) => {
                let length = block.min(extent.length);
                self.check_room(Extent { length, ..extent }, transfer, Direction::OUT)?;
            }
        }
        Ok(Do::work_on(extent, Operation::Verify { extent, compare }))
    }

    fn move_tray(&self, state: &mut State, open: bool) -> Result<(), Sense> {
        if open == state.tray_open {
            return Ok(());
        }
        if open && state.locked {
            return Err(Sense::illegal(Additional::REMOVAL_PREVENTED));
        }
        state.tray_open = open;
        if state.medium.is_some() {
            if open {
                state.event = Some(disc::Event::Removed);
            } else {
                state.event = Some(disc::Event::New);
                state.add(Attention::MediumChanged);
            }
        }
        self.settle(state);
        Ok(())
    }

    fn check_writable(&self, state: &State) -> Result<(), Sense> {
        if state.ready()?.read_only() {
            return Err(Sense::new(
                SenseKey::DATA_PROTECT,
                Additional::WRITE_PROTECTED,
            ));
        }
        Ok(())
    }

    /// The bytes of these blocks, which must be there.
    fn extent_unbounded(&self, state: &State, blocks: Blocks) -> Result<Extent, Sense> {
        let geometry = state.ready()?.geometry();
        let out_of_range = Sense::illegal(Additional::LBA_OUT_OF_RANGE);
        let end = blocks.first.checked_add(blocks.count.into());
        if end.is_none_or(|end| end > geometry.sectors) {
            return Err(out_of_range);
        }
        let logical = u64::from(geometry.logical);
        let offset = blocks.first.checked_mul(logical).ok_or(out_of_range)?;
        Ok(Extent {
            offset,
            length: u64::from(blocks.count) * logical,
        })
    }

    /// The same, no more than one command may move.
    fn extent(&self, state: &State, blocks: Blocks) -> Result<Extent, Sense> {
        let extent = self.extent_unbounded(state, blocks)?;
        if extent.length > self.max_transfer.into() {
            return Err(Sense::illegal(Additional::INVALID_FIELD_IN_CDB));
        }
        Ok(extent)
    }

    /// The guest must have room for all that it asks for, or bring all that it wants to be written.
    fn check_room(
        &self,
        extent: Extent,
        transfer: &Transfer,
        direction: Direction,
    ) -> Result<(), Sense> {
        if extent.length > transfer.room(direction).into() {
            return Err(Sense::illegal(Additional::INVALID_FIELD_IN_CDB));
        }
        Ok(())
    }
}
