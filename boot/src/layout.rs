//! Which virtual address gets what, as the kernel's configuration asks for it.

use bootloader_api::BootloaderConfig;
use bootloader_api::config::Mapping as Wish;
use core::fmt;
use core::ops::Range;

use crate::image::{Kernel, PAGE_SIZE, Rights};
use crate::paging::{Caching, Mapping};
use crate::ranges::overlap;

/// Where dynamic addresses begin if the kernel does not say: at the upper half, so that the lower
/// one, and with it the null page, stays empty.
const DYNAMIC_START: u64 = 0xFFFF_8000_0000_0000;

/// Where they end if the kernel does not say: below its own image.
const DYNAMIC_END: u64 = handover::KERNEL_BASE;

/// The addresses between the halves of the address space, which no page can have.
const HOLE: Range<u64> = 1 << 47..0xFFFF_8000_0000_0000;

/// Physical memory is mapped at a multiple of 1 GiB, so that pages of every size fit.
const LARGEST_PAGE: u64 = 1 << 30;

/// The virtual addresses of what the loader makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Virtual address of physical address 0.
    pub physical_memory: u64,
    /// The stack. The page below it stays unmapped.
    pub stack: Range<u64>,
}

impl Layout {
    /// Finds a place for everything.
    ///
    /// `taken` is mapped at addresses of its own: the kernel's image, and the code that switches to it.
    /// `physical_len` is the first physical address that needs no mapping.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if the configuration asks for what this loader does not offer, or for addresses
    /// that cannot be had.
    pub fn plan(
        config: &BootloaderConfig,
        taken: [Range<u64>; 2],
        physical_len: u64,
    ) -> Result<Self, LayoutError> {
        let mappings = &config.mappings;
        let refused = [
            (
                mappings.physical_memory.is_none(),
                "no mapping of physical memory, where its boot information lies",
            ),
            (
                mappings.kernel_base != Wish::Dynamic,
                "a base address of its own",
            ),
            (
                mappings.boot_info != Wish::Dynamic,
                "a fixed address for its boot information",
            ),
            (
                mappings.framebuffer != Wish::Dynamic,
                "a fixed address for the framebuffer",
            ),
            (
                mappings.page_table_recursive.is_some(),
                "recursive page tables",
            ),
            (mappings.aslr, "random addresses"),
        ];
        if let Some((_, what)) = refused.iter().find(|(asked, _)| *asked) {
            return Err(LayoutError::NotOffered(what));
        }

        let [image, switch] = taken;
        // The null page stays unmapped whatever happens.
        let mut space = Space {
            dynamic: mappings.dynamic_range_start.unwrap_or(DYNAMIC_START)
                ..mappings.dynamic_range_end.unwrap_or(DYNAMIC_END),
            taken: [0..PAGE_SIZE, HOLE, image, switch, 0..0],
        };
        let physical_memory = space.place(
            mappings.physical_memory.unwrap_or_default(),
            physical_len,
            LARGEST_PAGE,
            "physical memory",
        )?;
        let physical_end = physical_memory.end;
        let physical_start = physical_memory.start;
        let [.., last] = &mut space.taken;
        *last = physical_start..physical_end;

        let stack_len = config
            .kernel_stack_size
            .checked_next_multiple_of(PAGE_SIZE)
            .filter(|&len| len != 0)
            .ok_or(LayoutError::StackSize(config.kernel_stack_size))?;
        let with_guard = stack_len
            .checked_add(PAGE_SIZE)
            .ok_or(LayoutError::StackSize(config.kernel_stack_size))?;
        let stack = space.place(mappings.kernel_stack, with_guard, PAGE_SIZE, "its stack")?;
        Ok(Self {
            physical_memory: physical_start,
            stack: stack.start + PAGE_SIZE..stack.end,
        })
    }
}

/// Physical addresses of what the kernel finds in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The kernel's image: [`Kernel::span`] in one run.
    pub image: u64,
    /// The stack.
    pub stack: u64,
    /// The code that switches to the kernel, which must be at the same address before and after.
    pub code: Range<u64>,
}

impl Layout {
    /// All that the kernel finds mapped. `physical` is what there is of physical memory.
    pub fn mappings(
        &self,
        kernel: &Kernel<'_>,
        placement: &Placement,
        physical: impl Iterator<Item = (Range<u64>, Caching)>,
    ) -> impl Iterator<Item = Mapping> {
        let map = |virt: Range<u64>, phys, rights, caching| Mapping {
            virt: virt.start,
            phys,
            len: virt.end - virt.start,
            rights,
            caching,
        };
        let image = kernel.segments().map(move |segment| {
            let pages = segment.pages();
            let phys = placement.image + (pages.start - kernel.span().start);
            map(pages, phys, segment.rights, Caching::Memory)
        });
        let stack = map(
            self.stack.clone(),
            placement.stack,
            Rights::Write,
            Caching::Memory,
        );
        let code = map(
            placement.code.clone(),
            placement.code.start,
            Rights::Execute,
            Caching::Memory,
        );
        let physical = physical.map(move |(range, caching)| {
            let virt = self.physical_memory + range.start..self.physical_memory + range.end;
            map(virt, range.start, Rights::Write, caching)
        });
        image.chain([stack, code]).chain(physical)
    }
}

/// The address space while it fills.
struct Space {
    dynamic: Range<u64>,
    taken: [Range<u64>; 5],
}

impl Space {
    fn place(
        &self,
        wish: Wish,
        len: u64,
        align: u64,
        what: &'static str,
    ) -> Result<Range<u64>, LayoutError> {
        match wish {
            Wish::FixedAddress(start) => start
                .is_multiple_of(PAGE_SIZE)
                .then(|| self.free(start, len).ok())
                .flatten(),
            Wish::Dynamic => self.find(len, align),
        }
        .ok_or(LayoutError::NoPlace(what))
    }

    /// The lowest free range in the dynamic part of the address space.
    fn find(&self, len: u64, align: u64) -> Option<Range<u64>> {
        let mut start = self.dynamic.start;
        loop {
            start = start.checked_next_multiple_of(align)?;
            match self.free(start, len) {
                Ok(range) => return (range.end <= self.dynamic.end).then_some(range),
                Err(next) => start = next?,
            }
        }
    }

    /// The range, if nothing is in its way; else the address at which to try again, if there is one.
    fn free(&self, start: u64, len: u64) -> Result<Range<u64>, Option<u64>> {
        let range = start..start.checked_add(len).ok_or(None)?;
        match self.taken.iter().find(|taken| overlap(taken, &range)) {
            Some(taken) => Err(Some(taken.end)),
            None => Ok(range),
        }
    }
}

/// Why the kernel's wishes cannot be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// The kernel's configuration asks for something that this loader does not offer.
    NotOffered(&'static str),
    /// There is no room for this, or not at the address that the kernel asks for.
    NoPlace(&'static str),
    /// A stack of this many bytes cannot be.
    StackSize(u64),
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOffered(what) => {
                write!(
                    f,
                    "the kernel's configuration asks for {what}, which this loader does not offer"
                )
            }
            Self::NoPlace(what) => {
                write!(f, "the kernel's configuration leaves no place for {what}")
            }
            Self::StackSize(size) => {
                write!(
                    f,
                    "the kernel's configuration asks for a stack of {size} bytes"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IMAGE: Range<u64> = 0xFFFF_FFFF_8020_0000..0xFFFF_FFFF_8030_0000;
    const SWITCH: Range<u64> = 0x3E00_0000..0x3E00_1000;
    const GIB: u64 = 1 << 30;

    fn config() -> BootloaderConfig {
        let mut config = BootloaderConfig::new_default();
        config.kernel_stack_size = 0x1_0001;
        config.mappings.physical_memory = Some(Wish::Dynamic);
        config
    }

    fn plan(config: &BootloaderConfig, physical_len: u64) -> Result<Layout, LayoutError> {
        Layout::plan(config, [IMAGE, SWITCH], physical_len)
    }

    #[test]
    fn a_kernel_without_special_wishes_gets_the_upper_half() {
        let layout = plan(&config(), 5 * GIB + 0x1000).unwrap();
        let end = DYNAMIC_START + 5 * GIB + 0x1000;
        assert_eq!(layout.physical_memory, DYNAMIC_START);
        // A page below it is free for the guard.
        assert_eq!(layout.stack, end + 0x1000..end + 0x12000);
    }

    #[test]
    fn fixed_addresses_are_kept() {
        let mut config = config();
        config.mappings.physical_memory = Some(Wish::FixedAddress(0xFFFF_9000_0000_0000));
        config.mappings.kernel_stack = Wish::FixedAddress(0xFFFF_A000_0000_0000);
        let layout = plan(&config, 4 * GIB).unwrap();
        assert_eq!(layout.physical_memory, 0xFFFF_9000_0000_0000);
        assert_eq!(layout.stack, 0xFFFF_A000_0000_1000..0xFFFF_A000_0001_2000);
    }

    #[test]
    fn fixed_addresses_that_are_taken_are_refused() {
        for address in [
            0,
            0x800,
            0x3D00_0000,
            0x7FFF_C000_0000,
            IMAGE.start - 0x1000,
            0xFFFF_FFFF_F000_0000,
        ] {
            let mut config = config();
            config.mappings.physical_memory = Some(Wish::FixedAddress(address));
            let refused = plan(&config, 4 * GIB);
            assert_eq!(
                refused,
                Err(LayoutError::NoPlace("physical memory")),
                "{address:#x}"
            );
        }
        let mut config = config();
        config.mappings.physical_memory = Some(Wish::FixedAddress(0xFFFF_9000_0000_0000));
        config.mappings.kernel_stack = Wish::FixedAddress(0xFFFF_9000_0000_2000);
        assert_eq!(
            plan(&config, 4 * GIB),
            Err(LayoutError::NoPlace("its stack"))
        );
    }

    #[test]
    fn the_null_page_and_the_hole_are_stepped_over() {
        let mut config = config();
        config.mappings.dynamic_range_start = Some(0);
        let layout = plan(&config, 4 * GIB).unwrap();
        assert_eq!(layout.physical_memory, GIB);
        config.mappings.dynamic_range_start = Some(0x7FFF_C000_0000);
        let layout = plan(&config, 4 * GIB).unwrap();
        assert_eq!(layout.physical_memory, DYNAMIC_START);
        config.mappings.dynamic_range_end = Some(0x7FFF_FFFF_F000);
        assert_eq!(
            plan(&config, 4 * GIB),
            Err(LayoutError::NoPlace("physical memory"))
        );
    }

    #[test]
    fn a_wish_that_is_not_offered_is_refused() {
        let mut no_map = config();
        no_map.mappings.physical_memory = None;
        let mut recursive = config();
        recursive.mappings.page_table_recursive = Some(Wish::Dynamic);
        let mut random = config();
        random.mappings.aslr = true;
        let mut based = config();
        based.mappings.kernel_base = Wish::FixedAddress(GIB);
        for config in [no_map, recursive, random, based] {
            assert!(matches!(
                plan(&config, 4 * GIB),
                Err(LayoutError::NotOffered(_))
            ));
        }
        for size in [0, u64::MAX, u64::MAX - 4095] {
            let mut config = config();
            config.kernel_stack_size = size;
            assert!(plan(&config, 4 * GIB).is_err());
        }
    }

    proptest! {
        #[test]
        fn nothing_overlaps(
            start: u64, end: u64, stack in 1_u64..1 << 40, physical_len in 1_u64..1 << 47, fixed in prop::option::of(any::<u64>()),
        ) {
            let mut config = config();
            config.kernel_stack_size = stack;
            config.mappings.dynamic_range_start = Some(start);
            config.mappings.dynamic_range_end = Some(end);
            if let Some(fixed) = fixed {
                config.mappings.kernel_stack = Wish::FixedAddress(fixed & !(PAGE_SIZE - 1));
            }
            if let Ok(layout) = plan(&config, physical_len) {
                let physical = layout.physical_memory..layout.physical_memory + physical_len;
                let guarded = layout.stack.start - PAGE_SIZE..layout.stack.end;
                prop_assert!(layout.stack.end - layout.stack.start >= stack);
                prop_assert!(!overlap(&physical, &guarded));
                for range in [physical, guarded] {
                    for taken in [0..PAGE_SIZE, HOLE, IMAGE, SWITCH] {
                        prop_assert!(!overlap(&range, &taken), "{range:x?} {taken:x?}");
                    }
                }
            }
        }
    }
}
