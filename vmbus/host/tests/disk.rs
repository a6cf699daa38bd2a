//! Disks in files: what each format is, what stands against opening one, and disks that fail on request.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use vmbus_host::disk::{
    Disk, DiskError, Effect, Failure, Fault, FaultyDisk, Format, Gate, Geometry, MemoryDisk,
    Operations, Options, When, open,
};

const READ_ONLY: Options = Options {
    read_only: true,
    sector: 512,
    format: None,
};

/// A directory with a file of this name and length.
fn file(name: &str, length: u64) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    File::create(&path).unwrap().set_len(length).unwrap();
    (directory, path)
}

fn vhdx(name: &str, fixed: bool) -> (TempDir, PathBuf) {
    let (directory, path) = file(name, 0);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let storage: Arc<dyn vhdx::Storage> = Arc::new(file);
    let settings = vhdx::Settings {
        fixed,
        ..vhdx::Settings::new(16 << 20)
    };
    vhdx::create(&storage, &settings).unwrap();
    (directory, path)
}

/// What opening says, without the file's name.
fn refused(path: &Path, options: Options) -> String {
    let error = open(path, options).map(drop).unwrap_err().to_string();
    let name = format!("disk {} ", path.display());
    assert!(error.starts_with(&name), "{error}");
    error[name.len()..].to_owned()
}

#[test]
fn a_raw_disk_is_the_bytes_of_its_file() {
    let (_directory, path) = file("raw.img", 1 << 20);
    let disk = open(&path, Options::default()).unwrap();
    let geometry = Geometry {
        sectors: 2048,
        logical: 512,
        physical: 4096,
    };
    assert_eq!(disk.geometry(), geometry);
    assert!(!disk.read_only() && disk.write_cache());
    disk.write(512, &[7; 1024]).unwrap();
    disk.flush().unwrap();
    let content = fs::read(&path).unwrap();
    assert_eq!(
        content[..2048],
        [[0; 512], [7; 512], [7; 512], [0; 512]].concat()
    );
    assert_eq!(disk.write(1 << 20, &[0; 512]), Err(DiskError::OutOfRange));
    assert_eq!(content.len(), 1 << 20);
    let name = disk.identity();
    drop(disk);
    let options = Options {
        sector: 4096,
        ..READ_ONLY
    };
    let disk = open(&path, options).unwrap();
    assert_eq!(
        (disk.geometry().sectors, disk.geometry().logical),
        (256, 4096)
    );
    assert_eq!(disk.identity(), name, "the same at every opening");
    assert_eq!(disk.write(0, &[0; 4096]), Err(DiskError::ReadOnly));
    assert_eq!(disk.unmap(0, 4096), Err(DiskError::ReadOnly));
    assert!(!disk.can_unmap() && !disk.write_cache());
    let (_directory, other) = file("raw.img", 512);
    assert_ne!(open(&other, READ_ONLY).unwrap().identity(), name);
}

#[test]
fn unmapping_a_raw_disk_gives_its_room_back() {
    let (_directory, path) = file("raw.img", 4 << 20);
    let disk = open(&path, Options::default()).unwrap();
    disk.write(0, &vec![1; 4 << 20]).unwrap();
    disk.flush().unwrap();
    let before = fs::metadata(&path).unwrap().blocks();
    assert!(
        disk.can_unmap(),
        "the file system of temporary files makes holes"
    );
    disk.unmap(1 << 20, 2 << 20).unwrap();
    disk.flush().unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() < before);
    assert_eq!(fs::metadata(&path).unwrap().len(), 4 << 20);
    let mut data = vec![9; 4 << 20];
    disk.read(0, &mut data).unwrap();
    let zeros = 1 << 20..3 << 20;
    assert!(
        (0..)
            .zip(data)
            .all(|(at, byte)| byte == u8::from(!zeros.contains(&at)))
    );
}

#[test]
fn the_content_tells_the_format() {
    for fixed in [false, true] {
        let (_directory, path) = vhdx("disk.bin", fixed);
        let disk = open(&path, Options::default()).unwrap();
        assert_eq!(disk.geometry().bytes(), 16 << 20);
        assert_eq!(disk.can_unmap(), !fixed);
        assert_eq!(disk.unmap_granularity(), 2 << 20);
        disk.write(3 << 20, &[5; 512]).unwrap();
        let identity = disk.identity();
        drop(disk);
        let disk = open(&path, READ_ONLY).unwrap();
        let mut data = [0; 512];
        disk.read(3 << 20, &mut data).unwrap();
        assert_eq!(data, [5; 512], "dropping closes");
        assert_eq!(disk.identity(), identity);
        assert_eq!(disk.write(0, &data), Err(DiskError::ReadOnly));
        assert_eq!(disk.read(16 << 20, &mut data), Err(DiskError::OutOfRange));
        drop(disk);
        let raw = Options {
            format: Some(Format::Raw),
            ..READ_ONLY
        };
        let bytes = open(&path, raw).unwrap();
        bytes.read(0, &mut data).unwrap();
        assert_eq!(&data[..8], b"vhdxfile");
    }
    let (_directory, path) = file("dvd.img", 40 * 2048);
    let image = File::options().write(true).open(&path).unwrap();
    image.write_all_at(b"\x01CD001\x01", 16 * 2048).unwrap();
    let disk = open(&path, Options::default()).unwrap();
    let geometry = Geometry {
        sectors: 40,
        logical: 2048,
        physical: 2048,
    };
    assert_eq!(disk.geometry(), geometry);
    assert!(disk.read_only() && !disk.can_unmap());
    assert_eq!(disk.write(0, &[0; 2048]), Err(DiskError::ReadOnly));
    let mut sector = [0; 2048];
    disk.read(16 * 2048, &mut sector).unwrap();
    assert_eq!(&sector[1..6], b"CD001");
    open(&path, Options::default()).expect("an image may be in two drives");
}

#[test]
fn a_guest_cannot_make_another_format_of_its_raw_disk() {
    let (_directory, path) = file("disk.img", 1 << 20);
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(b"vhdxfile");
    let disk = open(&path, Options::default()).unwrap();
    assert_eq!(disk.write(0, &sector), Err(DiskError::ReadOnly));
    let both = [sector, [1; 512]].concat();
    assert_eq!(disk.write(0, &both), Err(DiskError::ReadOnly));
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    // Anywhere else it is data.
    disk.write(512, &sector).unwrap();
    drop(disk);
    // Who says that it is raw need not look at its content.
    let raw = Options {
        format: Some(Format::Raw),
        ..Options::default()
    };
    let disk = open(&path, raw).unwrap();
    disk.write(0, &sector).unwrap();
    let mut read = [0; 512];
    disk.read(0, &mut read).unwrap();
    assert_eq!(read, sector);
}

#[test]
fn what_stands_against_a_disk_is_one_sentence() {
    let (directory, path) = file("disk.raw", 1000);
    let refused = |path: &Path| refused(path, Options::default());
    assert_eq!(refused(&directory.path().join("none")), "does not exist");
    assert_eq!(refused(&path.join("below")), "does not exist");
    assert_eq!(refused(directory.path()), "is a directory");
    assert_eq!(
        refused(&path),
        "has 1000 bytes, which is not a multiple of its sectors of 512 bytes"
    );
    let named = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        File::create(&path).unwrap().write_all(content).unwrap();
        path
    };
    assert_eq!(refused(&named("empty", b"")), "is empty");
    assert_eq!(refused(&named("empty.vhdx", b"")), "is empty");
    let not = "is called .vhdx and is no VHDX file";
    assert_eq!(refused(&named("text.vhdx", &[b'x'; 512])), not);
    assert_eq!(refused(&named("TEXT.VHDX", b"x")), not);
    let damaged = "is damaged in its headers: neither of the two is valid";
    assert_eq!(refused(&named("signed.img", b"vhdxfile")), damaged);
    let socket = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(refused(&socket), "is neither a file nor a block device");
    let wanted = Options {
        format: Some(Format::Vhdx),
        ..READ_ONLY
    };
    let error = open(&path, wanted).map(drop).unwrap_err();
    assert!(error.to_string().ends_with("is no VHDX file"), "{error}");
}

#[test]
fn what_this_user_may_not_do_is_said() {
    // Files of the kernel's that nobody may write to or read, the superuser included.
    let counter = Path::new("/sys/kernel/uevent_seqnum");
    let raw = Options {
        format: Some(Format::Raw),
        ..Options::default()
    };
    assert_eq!(refused(counter, raw), "may not be written to by this user");
    let probe = Path::new("/sys/bus/platform/drivers_probe");
    assert_eq!(refused(probe, READ_ONLY), "may not be read by this user");
}

#[test]
fn who_writes_is_alone() {
    for (_directory, path) in [file("disk.raw", 512), vhdx("disk.vhdx", false)] {
        let writing = open(&path, Options::default()).unwrap();
        let busy = "is in use by another process";
        assert_eq!(refused(&path, Options::default()), busy);
        assert_eq!(refused(&path, READ_ONLY), busy);
        drop(writing);
        let reading = open(&path, READ_ONLY).unwrap();
        let also = open(&path, READ_ONLY).unwrap();
        assert_eq!(refused(&path, Options::default()), busy);
        drop((reading, also));
        open(&path, Options::default()).unwrap();
    }
}

/// A disk of 64 sectors, each with its number in all bytes, and its faulty self.
fn faulty(seed: u64) -> (Arc<MemoryDisk>, FaultyDisk) {
    let disk = Arc::new(MemoryDisk::new(Geometry::of_bytes(64 * 512)));
    for sector in 0..64 {
        disk.write(sector * 512, &[sector as u8; 512]).unwrap();
    }
    (disk.clone(), FaultyDisk::new(disk, seed))
}

fn always(operations: Operations, effect: Effect) -> Fault {
    Fault {
        operations,
        range: None,
        when: When::Always,
        effect,
    }
}

#[test]
fn a_disk_without_faults_is_the_disk_itself() {
    let (disk, faulty) = faulty(1);
    let mut data = [0; 1024];
    faulty.read(512, &mut data).unwrap();
    assert_eq!(data[511..513], [1, 2]);
    faulty.write(0, &[9; 512]).unwrap();
    faulty.unmap(1024, 512).unwrap();
    faulty.flush().unwrap();
    disk.read(0, &mut data).unwrap();
    assert_eq!(data[511..513], [9, 1]);
    assert_eq!(faulty.geometry(), disk.geometry());
    assert_eq!(faulty.struck(), 0);
}

#[test]
fn bad_sectors_fail_where_they_are() {
    let (_, disk) = faulty(1);
    disk.add(Fault {
        range: Some(10 * 512..12 * 512),
        ..always(Operations::READS, Effect::Fail(Failure::Medium))
    });
    let mut data = [0; 16 * 512];
    assert_eq!(disk.read(0, &mut data), Err(DiskError::Medium(10 * 512)));
    assert_eq!(
        disk.read(11 * 512, &mut data),
        Err(DiskError::Medium(11 * 512))
    );
    disk.read(0, &mut data[..10 * 512]).unwrap();
    disk.read(12 * 512, &mut data).unwrap();
    disk.write(10 * 512, &data).unwrap();
    disk.flush().unwrap();
    disk.clear();
    disk.read(0, &mut data).unwrap();
    assert_eq!(disk.struck(), 2);
}

#[test]
fn each_kind_of_failure_is_told_as_it_is() {
    for (failure, error) in [
        (Failure::NotReady, DiskError::NotReady),
        (Failure::NoSpace, DiskError::NoSpace),
        (Failure::Medium, DiskError::Medium(0)),
    ] {
        let (under, disk) = faulty(1);
        disk.add(always(Operations::ALL, Effect::Fail(failure)));
        assert_eq!(disk.read(0, &mut [0; 512]), Err(error.clone()));
        assert_eq!(disk.write(0, &[9; 512]), Err(error.clone()));
        assert_eq!(disk.flush(), Err(error.clone()));
        assert_eq!(disk.unmap(0, 512), Err(error));
        let mut data = [1; 512];
        under.read(0, &mut data).unwrap();
        assert_eq!(data, [0; 512], "what fails is not done");
    }
}

#[test]
fn faults_strike_when_they_are_to() {
    let fails = |seed, when| {
        let (_, disk) = faulty(seed);
        disk.add(Fault {
            when,
            ..always(Operations::FLUSHES, Effect::Fail(Failure::NotReady))
        });
        (1..=1000)
            .filter(|_| disk.flush().is_err())
            .collect::<Vec<u32>>()
    };
    assert_eq!(fails(1, When::Every(300)), [300, 600, 900]);
    assert_eq!(fails(1, When::Every(0)), [0; 0]);
    assert_eq!(fails(1, When::Next(3)), [1, 2, 3]);
    let chance = fails(1, When::PerMille(100));
    assert!((50..200).contains(&chance.len()), "{}", chance.len());
    assert_eq!(
        fails(1, When::PerMille(100)),
        chance,
        "the same seed, the same faults"
    );
    assert_ne!(fails(2, When::PerMille(100)), chance);
    assert_eq!(fails(1, When::PerMille(0)), [0; 0]);
    assert_eq!(fails(1, When::PerMille(1000)).len(), 1000);
}

#[test]
fn a_torn_write_leaves_its_first_sectors() {
    let mut lengths = [0; 9];
    for seed in 0..64 {
        let (under, disk) = faulty(seed);
        disk.add(always(Operations::WRITES, Effect::Tear));
        let result = disk.write(0, &[0xFF; 8 * 512]);
        let Err(DiskError::Medium(at)) = result else {
            panic!("{result:?}");
        };
        let mut data = [0; 9 * 512];
        under.read(0, &mut data).unwrap();
        let written = at as usize / 512;
        for (sector, bytes) in data.chunks(512).enumerate() {
            let value = if sector < written { 0xFF } else { sector as u8 };
            assert_eq!(bytes, [value; 512], "sector {sector} of {written}");
        }
        lengths[written] += 1;
    }
    assert_eq!(lengths[8], 0, "never the whole write");
    assert!(lengths[..8].iter().all(|count| *count > 0), "{lengths:?}");
}

#[test]
fn slow_requests_wait_and_others_go_on() {
    let disk = Arc::new(MemoryDisk::new(Geometry::of_bytes(64 * 512)));
    let gate = Gate::shut();
    let disk = FaultyDisk::with_pause(disk, 1, gate.clone());
    let slow = Effect::Delay(Duration::from_secs(1));
    disk.add(always(Operations::WRITES, slow));
    thread::scope(|scope| {
        for sector in 0..3 {
            let disk = &disk;
            scope.spawn(move || disk.write(sector * 512, &[1; 512]).unwrap());
        }
        gate.wait_for(3);
        let mut data = [9; 3 * 512];
        disk.read(0, &mut data).unwrap();
        assert_eq!(data, [0; 3 * 512], "nothing is written yet");
        gate.open();
    });
    let mut data = [0; 3 * 512];
    disk.read(0, &mut data).unwrap();
    assert_eq!(data, [1; 3 * 512]);
    assert_eq!(disk.struck(), 3);
}

#[test]
fn a_delay_is_waited_for() {
    let (_, disk) = faulty(1);
    let time = Duration::from_millis(20);
    disk.add(always(Operations::READS, Effect::Delay(time)));
    let start = std::time::Instant::now();
    disk.read(0, &mut [0; 512]).unwrap();
    assert!(start.elapsed() >= time);
}
