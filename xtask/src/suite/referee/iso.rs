//! A small ISO 9660 image: a volume with one file in its root directory (ECMA-119).

/// Bytes of a sector.
const SECTOR: usize = 2048;

/// Sectors before the descriptors, of no meaning to the format (ECMA-119 6.2.1).
const SYSTEM_AREA: usize = 16;

/// The root directory's sector, behind volume descriptor, terminator and both path tables.
const ROOT: u32 = 20;

/// The file's first sector.
const FILE: u32 = ROOT + 1;

/// An image with this file. The name is in capitals, with a dot.
pub fn image(volume: &str, name: &str, content: &[u8]) -> Vec<u8> {
    let sectors = FILE as usize + content.len().div_ceil(SECTOR);
    let mut image = vec![0; SYSTEM_AREA * SECTOR];
    let mut add = |sector: Vec<u8>| {
        image.extend(sector);
        image.resize(image.len().next_multiple_of(SECTOR), 0);
    };
    add(primary_descriptor(volume, sectors));
    add([&[255], &b"CD001"[..], &[1]].concat());
    add(path_table(u32::to_le_bytes, u16::to_le_bytes));
    add(path_table(u32::to_be_bytes, u16::to_be_bytes));
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    add([
        directory_record(&[0], ROOT, SECTOR as u32, true),
        directory_record(&[1], ROOT, SECTOR as u32, true),
        directory_record(format!("{name};1").as_bytes(), FILE, length, false),
    ]
    .concat());
    add(content.to_vec());
    image
}

/// ECMA-119 8.4.
fn primary_descriptor(volume: &str, sectors: usize) -> Vec<u8> {
    let mut bytes = vec![b' '; 883];
    let mut put = |at: usize, what: &[u8]| {
        if let Some(place) = bytes.get_mut(at..at + what.len()) {
            place.copy_from_slice(what);
        }
    };
    put(0, &[1]);
    put(1, b"CD001");
    put(6, &[1, 0]);
    put(40, volume.as_bytes());
    put(72, &[0; 8]);
    put(80, &both_u32(u32::try_from(sectors).unwrap_or(u32::MAX)));
    put(88, &[0; 32]);
    put(120, &both_u16(1));
    put(124, &both_u16(1));
    put(128, &both_u16(SECTOR as u16));
    put(132, &both_u32(PATH_TABLE));
    put(140, &18_u32.to_le_bytes());
    put(144, &[0; 4]);
    put(148, &19_u32.to_be_bytes());
    put(152, &[0; 4]);
    put(156, &directory_record(&[0], ROOT, SECTOR as u32, true));
    put(813, &[0; 17 * 4]);
    put(881, &[1, 0]);
    bytes
}

/// Bytes of a path table with the root only.
const PATH_TABLE: u32 = 10;

/// ECMA-119 9.4.
fn path_table(long: fn(u32) -> [u8; 4], short: fn(u16) -> [u8; 2]) -> Vec<u8> {
    [&[1, 0][..], &long(ROOT), &short(1), &[0, 0]].concat()
}

/// ECMA-119 9.1.
fn directory_record(name: &[u8], sector: u32, length: u32, is_directory: bool) -> Vec<u8> {
    let size = (33 + name.len()).next_multiple_of(2);
    let mut record = vec![u8::try_from(size).unwrap_or(u8::MAX), 0];
    record.extend(both_u32(sector));
    record.extend(both_u32(length));
    // 2000-01-01, no zone.
    record.extend([100, 1, 1, 0, 0, 0, 0]);
    record.extend([u8::from(is_directory) * 2, 0, 0]);
    record.extend(both_u16(1));
    record.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    record.extend(name);
    record.resize(size, 0);
    record
}

/// ECMA-119 7.3.3.
fn both_u32(value: u32) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

/// ECMA-119 7.2.3.
fn both_u16(value: u16) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}
