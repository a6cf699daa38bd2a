//! A raw disk of 512-byte sectors with one GPT partition, the EFI system
//! partition. Same content, same bytes: identifiers come from the content.

use std::io::Cursor;

use anyhow::{Result, ensure};
use gpt::{GptConfig, disk::LogicalBlockSize, mbr::ProtectiveMBR, partition_types};
use sha2::{Digest, Sha256};
use uuid::{Builder, Uuid};

use super::fat;

const SECTOR: usize = 512;

/// Partitions begin and disks end at whole MiB, as virtual disk formats want.
const ALIGNMENT: usize = 1 << 20;

/// Builds the disk for an EFI application and, if given, its command line.
pub fn build(efi: &[u8], cmdline: Option<&str>) -> Result<Vec<u8>> {
    let mut hash = Sha256::new();
    hash.update(efi);
    hash.update(cmdline.unwrap_or_default());
    let content: [u8; 32] = hash.finalize().into();
    let volume = fat::build(efi, cmdline, volume_id(&content))?;
    ensure!(
        volume.len() % ALIGNMENT == 0,
        "the file system does not end at a whole MiB"
    );
    // One MiB before it holds the table, one behind it the table's copy.
    let size = volume.len() + 2 * ALIGNMENT;
    let mut device = Cursor::new(vec![0; size]);
    let sectors = u32::try_from(size / SECTOR - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut device)?;
    let mut table = GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(device, Some(guid(&content, "disk")))?;
    let id = table.add_partition(
        "EFI system partition",
        volume.len() as u64,
        partition_types::EFI,
        0,
        Some((ALIGNMENT / SECTOR) as u64),
    )?;
    let mut partitions = table.take_partitions();
    if let Some(partition) = partitions.get_mut(&id) {
        partition.part_guid = guid(&content, "partition");
    }
    table.update_partitions(partitions)?;
    let mut disk = table.write()?.into_inner();
    if let Some(place) = disk.get_mut(ALIGNMENT..ALIGNMENT + volume.len()) {
        place.copy_from_slice(&volume);
    }
    Ok(disk)
}

/// An identifier for one part of the disk.
fn guid(content: &[u8; 32], part: &str) -> Uuid {
    let mut bytes = [0; 16];
    let digest = Sha256::new().chain_update(content).chain_update(part);
    bytes.copy_from_slice(&digest.finalize()[..16]);
    // Version 8: made by a rule of one's own (RFC 9562).
    Builder::from_custom_bytes(bytes).into_uuid()
}

fn volume_id(content: &[u8; 32]) -> u32 {
    u32::from_le_bytes([content[0], content[1], content[2], content[3]])
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use fatfs::{FileSystem, FsOptions};

    use super::*;

    fn read(disk: &[u8], path: &str) -> Option<Vec<u8>> {
        let table = GptConfig::new()
            .open_from_device(Cursor::new(disk.to_vec()))
            .unwrap();
        assert_eq!(
            table.primary_header().unwrap().disk_guid,
            table.backup_header().unwrap().disk_guid
        );
        let (_, partition) = table.partitions().iter().next().unwrap();
        assert_eq!(partition.part_type_guid, partition_types::EFI);
        let start = partition.first_lba as usize * SECTOR;
        let end = (partition.last_lba as usize + 1) * SECTOR;
        let volume = Cursor::new(disk[start..end].to_vec());
        let fs = FileSystem::new(volume, FsOptions::new()).unwrap();
        let mut bytes = Vec::new();
        fs.root_dir()
            .open_file(path)
            .ok()?
            .read_to_end(&mut bytes)
            .unwrap();
        Some(bytes)
    }

    #[test]
    fn the_loader_and_its_command_line_are_found_again() {
        let efi: Vec<u8> = (0..700_000_u32).map(|n| n as u8).collect();
        let disk = build(&efi, Some("log=debug mark=0x4e9")).unwrap();
        assert_eq!(disk.len() % ALIGNMENT, 0);
        assert_eq!(disk[510..512], [0x55, 0xaa]);
        assert_eq!(read(&disk, "EFI/BOOT/BOOTX64.EFI").unwrap(), efi);
        assert_eq!(
            read(&disk, "EFI/BOOT/CMDLINE.TXT").unwrap(),
            b"log=debug mark=0x4e9"
        );
        assert_eq!(
            read(&build(&efi, None).unwrap(), "EFI/BOOT/CMDLINE.TXT"),
            None
        );
    }

    #[test]
    fn same_content_same_bytes() {
        let first = build(b"one", None).unwrap();
        assert_eq!(first, build(b"one", None).unwrap());
        let other = build(b"two", None).unwrap();
        let identifier = |disk: &[u8]| disk[SECTOR + 56..SECTOR + 72].to_vec();
        assert_ne!(identifier(&first), identifier(&other));
    }

    #[test]
    fn a_large_loader_gets_a_large_disk() {
        let efi = vec![0xa5; 20 << 20];
        let disk = build(&efi, None).unwrap();
        assert!(disk.len() > efi.len());
        assert_eq!(read(&disk, "EFI/BOOT/BOOTX64.EFI").unwrap(), efi);
    }
}
