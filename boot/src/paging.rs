//! Page tables for the kernel, built in one run of memory that need not be in use yet.
//!
//! Source: AMD64 Architecture Programmer's Manual, volume 2, section 5.3 (long-mode page translation).

use core::fmt;
use x86_64::structures::paging::{PageTable, PageTableFlags};
use x86_64::{PhysAddr, VirtAddr};

use crate::image::{PAGE_SIZE, Rights};

/// How the processor may cache what is behind a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Caching {
    /// As the firmware's MTRRs say, but not at all where they do not ask for write combining (page
    /// attribute entry 2, UC-, as it is after reset). A device must not depend on how carefully the
    /// firmware fills its MTRRs, and a framebuffer that they declare write combining stays so.
    Device,
    /// Write back, as far as the MTRRs allow it.
    Memory,
}

/// A run of virtual addresses and the physical ones behind it. All three numbers are page aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First virtual address.
    pub virt: u64,
    /// First physical address.
    pub phys: u64,
    /// Length in bytes.
    pub len: u64,
    /// What the pages allow.
    pub rights: Rights,
    /// How they are cached.
    pub caching: Caching,
}

/// The levels of a page table. The value is the number of address bits below one entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Page = 12,
    Directory = 21,
    Pointer = 30,
    Root = 39,
}

impl Level {
    /// Bytes behind one entry.
    const fn size(self) -> u64 {
        1 << self as u32
    }

    fn below(self) -> Self {
        match self {
            Self::Root => Self::Pointer,
            Self::Pointer => Self::Directory,
            Self::Directory | Self::Page => Self::Page,
        }
    }

    fn index(self, virt: u64) -> usize {
        (virt >> self as u32) as usize % ENTRIES
    }
}

const ENTRIES: usize = 512;

/// Four-level page tables under construction.
pub struct PageTables<'a> {
    tables: &'a mut [PageTable],
    physical: u64,
    used: usize,
    giant_pages: bool,
}

impl<'a> PageTables<'a> {
    /// Takes empty tables that lie one after the other from `physical` on. The first becomes the
    /// root. `giant_pages`: whether the processor knows pages of 1 GiB.
    pub fn new(tables: &'a mut [PageTable], physical: PhysAddr, giant_pages: bool) -> Self {
        Self {
            tables,
            physical: physical.as_u64(),
            used: 1,
            giant_pages,
        }
    }

    /// Physical address of the root, for CR3.
    pub fn root(&self) -> PhysAddr {
        PhysAddr::new(self.physical)
    }

    /// Enters a mapping, with the largest pages that fit.
    ///
    /// # Errors
    ///
    /// [`MapError`]; the tables are of no use then.
    pub fn map(&mut self, mapping: Mapping) -> Result<(), MapError> {
        mapping.check()?;
        let mut offset = 0;
        while offset < mapping.len {
            let (virt, phys) = (mapping.virt + offset, mapping.phys + offset);
            let level = self.largest(virt | phys, mapping.len - offset);
            let flags = flags(mapping.rights, mapping.caching, level);
            self.enter(virt, phys, level, flags)?;
            offset += level.size();
        }
        Ok(())
    }

    /// The largest page for an address that is a multiple of its size (`aligned` is the virtual and the
    /// physical address in one) and that does not reach beyond `len`.
    fn largest(&self, aligned: u64, len: u64) -> Level {
        let fits = |level: Level| aligned.is_multiple_of(level.size()) && level.size() <= len;
        if self.giant_pages && fits(Level::Pointer) {
            Level::Pointer
        } else if fits(Level::Directory) {
            Level::Directory
        } else {
            Level::Page
        }
    }

    fn enter(
        &mut self,
        virt: u64,
        phys: u64,
        target: Level,
        flags: PageTableFlags,
    ) -> Result<(), MapError> {
        let mut table = 0;
        let mut level = Level::Root;
        while level > target {
            table = self.descend(table, level.index(virt))?;
            level = level.below();
        }
        let entry = &mut self.tables[table][level.index(virt)];
        if !entry.is_unused() {
            return Err(MapError::Occupied(virt));
        }
        entry.set_addr(PhysAddr::new(phys), flags);
        Ok(())
    }

    /// Returns the number of the table behind an entry, a new one if there is none yet.
    fn descend(&mut self, table: usize, index: usize) -> Result<usize, MapError> {
        let entry = &self.tables[table][index];
        if entry.is_unused() {
            let next = self.used;
            if next >= self.tables.len() {
                return Err(MapError::NoTables);
            }
            self.used += 1;
            // The last entry decides what is allowed; those on the way to it allow everything.
            let address = PhysAddr::new(self.physical + next as u64 * PAGE_SIZE);
            let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
            self.tables[table][index].set_addr(address, flags);
            Ok(next)
        } else if entry.flags().contains(PageTableFlags::HUGE_PAGE) {
            Err(MapError::Occupied(entry.addr().as_u64()))
        } else {
            Ok(((entry.addr().as_u64() - self.physical) / PAGE_SIZE) as usize)
        }
    }
}

impl Mapping {
    fn check(&self) -> Result<(), MapError> {
        let aligned = (self.virt | self.phys | self.len).is_multiple_of(PAGE_SIZE);
        let Some(last) = self.len.checked_sub(1) else {
            return Ok(());
        };
        let end = self.virt.checked_add(last);
        // Both ends canonical and in the same half: so is all between.
        let canonical = end.is_some_and(|end| {
            let half = |address: u64| address >> 63;
            let canonical = |address: u64| VirtAddr::try_new(address).is_ok();
            half(self.virt) == half(end) && canonical(self.virt) && canonical(end)
        });
        let physical = self
            .phys
            .checked_add(last)
            .is_some_and(|end| PhysAddr::try_new(end).is_ok());
        if aligned && canonical && physical {
            Ok(())
        } else {
            Err(MapError::Address(self.virt))
        }
    }

    /// The number of tables that it needs at most, without the root.
    fn tables(&self, giant_pages: bool) -> u64 {
        if self.len == 0 {
            return 0;
        }
        // The entries that a mapping touches at a level. Each has a table behind it, unless it is
        // a large page; then only the two ends can be ragged.
        let touched = |level: Level| {
            (self.virt + (self.len - 1)) / level.size() - self.virt / level.size() + 1
        };
        let apart = self.virt ^ self.phys;
        let ragged = |level: Level, large: bool| {
            if large && apart.is_multiple_of(level.size()) {
                touched(level).min(2)
            } else {
                touched(level)
            }
        };
        touched(Level::Root) + ragged(Level::Pointer, giant_pages) + ragged(Level::Directory, true)
    }
}

/// The number of tables that mappings need at most, with the root.
pub fn tables_needed(mappings: impl Iterator<Item = Mapping>, giant_pages: bool) -> u64 {
    1 + mappings
        .map(|mapping| mapping.tables(giant_pages))
        .sum::<u64>()
}

fn flags(rights: Rights, caching: Caching, level: Level) -> PageTableFlags {
    let mut flags = PageTableFlags::PRESENT;
    flags |= match rights {
        Rights::Read => PageTableFlags::NO_EXECUTE,
        Rights::Write => PageTableFlags::NO_EXECUTE | PageTableFlags::WRITABLE,
        Rights::Execute => PageTableFlags::empty(),
    };
    flags.set(PageTableFlags::NO_CACHE, caching == Caching::Device);
    flags.set(PageTableFlags::HUGE_PAGE, level > Level::Page);
    flags
}

/// Why a mapping cannot be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// This virtual address (or the page around this physical one) is mapped already.
    Occupied(u64),
    /// From this virtual address on, the mapping is not page aligned or leaves the address space.
    Address(u64),
    /// There are too few tables.
    NoTables,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Occupied(address) => write!(f, "two things want to be mapped at {address:#x}"),
            Self::Address(address) => write!(f, "nothing can be mapped at {address:#x}"),
            Self::NoTables => f.write_str("too few page tables were set aside"),
        }
    }
}

#[cfg(test)]
mod tests;
