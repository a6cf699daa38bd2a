//! The FAT file system of the EFI system partition.

use std::io::{Cursor, Write};

use anyhow::Result;
use fatfs::{
    Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider,
    format_volume,
};

/// Where firmware looks on a removable medium, which a fresh disk is to it.
const LOADER: &str = "BOOTX64.EFI";

/// Where the loader looks for the guest's command line.
const CMDLINE: &str = "CMDLINE.TXT";

/// A FAT16 volume begins at 4085 clusters; this many MiB hold them.
const LEAST_MIB: usize = 4;

/// Builds the volume; a whole number of MiB.
pub fn build(efi: &[u8], cmdline: Option<&str>, volume_id: u32) -> Result<Vec<u8>> {
    // Room for the tables and directories: FAT16's are below 300 KiB.
    let size = (efi.len() + (512 << 10)).next_multiple_of(1 << 20);
    let size = size.max(LEAST_MIB << 20);
    let mut volume = Cursor::new(vec![0; size]);
    let format = FormatVolumeOptions::new()
        .fat_type(FatType::Fat16)
        .volume_id(volume_id)
        .volume_label(*b"ENLIT      ");
    format_volume(&mut volume, format)?;
    {
        let options = FsOptions::new().time_provider(&NoTime);
        let fs = FileSystem::new(&mut volume, options)?;
        let boot = fs.root_dir().create_dir("EFI")?.create_dir("BOOT")?;
        boot.create_file(LOADER)?.write_all(efi)?;
        if let Some(words) = cmdline {
            boot.create_file(CMDLINE)?.write_all(words.as_bytes())?;
        }
    }
    Ok(volume.into_inner())
}

/// The first moment that FAT knows, for every file: the same content is the
/// same image, whenever it was made.
#[derive(Debug)]
struct NoTime;

impl TimeProvider for NoTime {
    fn get_current_date(&self) -> Date {
        Date {
            year: 1980,
            month: 1,
            day: 1,
        }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime {
            date: self.get_current_date(),
            time: Time {
                hour: 0,
                min: 0,
                sec: 0,
                millis: 0,
            },
        }
    }
}
