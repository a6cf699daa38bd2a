//! The firmware's framebuffer (UEFI specification 2.10, section 12.9), in the kernel's terms.

use bootloader_api::info as kernel;
use uefi::proto::console::gop::{PixelBitmask, PixelFormat};

/// Width and height, in pixels.
pub type Resolution = (usize, usize);

/// Picks the mode for a kernel that wants at least `wanted` pixels: the smallest that has them.
/// `None` means that the current mode stays, because it is good enough or nothing is better.
pub fn choose(
    wanted: Resolution,
    current: Resolution,
    modes: impl Iterator<Item = Resolution>,
) -> Option<usize> {
    let enough = |(width, height): Resolution| width >= wanted.0 && height >= wanted.1;
    if enough(current) {
        return None;
    }
    modes
        .enumerate()
        .filter(|&(_, mode)| enough(mode))
        .min_by_key(|&(_, (width, height))| width.saturating_mul(height))
        .map(|(index, _)| index)
}

/// The pixel format and the number of bytes of one pixel. `None` if there is no memory behind the
/// mode, or not in a form that the kernel could be told.
pub fn pixel_format(
    format: PixelFormat,
    bits: Option<PixelBitmask>,
) -> Option<(kernel::PixelFormat, usize)> {
    match format {
        PixelFormat::Rgb => Some((kernel::PixelFormat::Rgb, 4)),
        PixelFormat::Bgr => Some((kernel::PixelFormat::Bgr, 4)),
        PixelFormat::Bitmask => {
            let bits = bits?;
            let all = bits.red | bits.green | bits.blue | bits.reserved;
            // A mask of 32 zeros has no position; 32 does not fit into a pixel.
            let position = |mask: u32| (mask != 0).then_some(mask.trailing_zeros() as u8);
            let format = kernel::PixelFormat::Unknown {
                red_position: position(bits.red)?,
                green_position: position(bits.green)?,
                blue_position: position(bits.blue)?,
            };
            Some((
                format,
                (u32::BITS - all.leading_zeros()).div_ceil(8) as usize,
            ))
        }
        PixelFormat::BltOnly => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_sufficient_mode_is_chosen() {
        let modes = [(640, 480), (1920, 1080), (1024, 768), (800, 600)];
        let choose = |wanted, current| choose(wanted, current, modes.into_iter());
        assert_eq!(choose((700, 500), (640, 480)), Some(3));
        assert_eq!(choose((0, 700), (640, 480)), Some(2));
        assert_eq!(choose((0, 0), (640, 480)), None);
        assert_eq!(choose((700, 500), (1920, 1080)), None);
        assert_eq!(choose((4000, 500), (640, 480)), None);
    }

    #[test]
    fn masks_become_positions_and_bytes() {
        let bits = |red, green, blue, reserved| PixelBitmask {
            red,
            green,
            blue,
            reserved,
        };
        let format = pixel_format(PixelFormat::Bitmask, Some(bits(0xF800, 0x07E0, 0x1F, 0)));
        let expected = kernel::PixelFormat::Unknown {
            red_position: 11,
            green_position: 5,
            blue_position: 0,
        };
        assert_eq!(format, Some((expected, 2)));
        let format = pixel_format(
            PixelFormat::Bitmask,
            Some(bits(0xFF, 0xFF00, 0xFF_0000, 0xFF00_0000)),
        );
        assert_eq!(format.map(|(_, bytes)| bytes), Some(4));
        assert_eq!(
            pixel_format(PixelFormat::Bitmask, Some(bits(0, 1, 2, 4))),
            None
        );
        assert_eq!(pixel_format(PixelFormat::BltOnly, None), None);
        assert_eq!(
            pixel_format(PixelFormat::Bgr, None),
            Some((kernel::PixelFormat::Bgr, 4))
        );
    }
}
