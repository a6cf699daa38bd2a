//! Disks: Linux partitions them, makes and checks file systems, moves data over several queues,
//! discards, and sees disks come and go.

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::{
    Session, Test,
    config::{CONTROLLER, DISC, DYNAMIC, FIXED, LARGE, MEMORY, RAW, SOURCE, VHDX},
    files::{COPY_BYTES, COPY_STEP, ON_DISC},
    session::LONG,
};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "referee/storage/inquiry",
        run: inquiry,
    },
    Test {
        name: "referee/storage/256-mib-over-4-queues",
        run: queues,
    },
    Test {
        name: "referee/storage/flushed-is-on-the-host",
        run: durable,
    },
    Test {
        name: "referee/storage/file-system-on-raw",
        run: |session| file_system(session, RAW),
    },
    Test {
        name: "referee/storage/file-system-on-fixed-vhdx",
        run: |session| file_system(session, FIXED),
    },
    Test {
        name: "referee/storage/file-system-on-dynamic-vhdx",
        run: |session| file_system(session, DYNAMIC),
    },
    Test {
        name: "referee/storage/file-system-on-4096-byte-sectors",
        run: |session| file_system(session, LARGE),
    },
    Test {
        name: "referee/storage/discard",
        run: discard,
    },
    Test {
        name: "referee/storage/read-only",
        run: read_only,
    },
    Test {
        name: "referee/storage/dvd",
        run: dvd,
    },
    Test {
        name: "referee/storage/hot-add-and-remove",
        run: hot_add,
    },
];

/// After the tests above. Linux's drivers complain when disks with a cache go; so, after their log
/// is read.
pub(super) const SOUND: Test = Test {
    name: "referee/storage/vhdx-is-sound-afterwards",
    run: sound,
};

/// What the disks say of themselves, as sg3-utils reads it.
fn inquiry(session: &mut Session) -> Result<String> {
    let disk = session.disk(CONTROLLER, RAW)?;
    let said = session.sh(&format!("sg_inq /dev/{disk}"))?;
    for words in ["Msft", "Virtual Disk", "Peripheral device type: disk"] {
        ensure!(
            said.contains(words),
            "sg_inq does not say {words:?}:\n{said}"
        );
    }
    let luns = session.sh(&format!("sg_luns -d /dev/{disk} | grep -c 'Peripheral'"))?;
    let known = session.sh("ls -d /sys/bus/scsi/devices/*:0:0:* | wc -l")?;
    ensure!(
        luns == known,
        "REPORT LUNS has {luns} entries, Linux found {known}"
    );
    let pages = ["sv", "sn", "di", "bl", "bdc", "lbpv"];
    session.sh(&format!(
        "for page in {}; do \
         sg_vpd -p $page /dev/{disk} >/dev/null || {{ echo VPD page $page; exit 1; }}; done; \
         sg_turs /dev/{disk}",
        pages.join(" ")
    ))?;
    let mut identities = Vec::new();
    for lun in [RAW, FIXED, DYNAMIC, MEMORY] {
        let disk = session.disk(CONTROLLER, lun)?;
        let said = session.sh(&format!(
            "cat /sys/block/{disk}/device/wwid; blockdev --getss /dev/{disk}; \
             blockdev --getsize64 /dev/{disk}; \
             sg_readcap -l /dev/{disk} | sed -n 's/.*Number of logical blocks=\\([0-9]*\\).*/\\1/p'"
        ))?;
        let said: Vec<_> = said.lines().map(str::trim).collect();
        let [identity, sector, size, blocks] = said[..] else {
            bail!("Linux says of {disk}: {said:?}");
        };
        identities.push(identity.to_owned());
        ensure!(
            blocks.parse::<u64>()? * sector.parse::<u64>()? == size.parse::<u64>()?,
            "{disk}: {blocks} blocks of {sector} bytes, {size} bytes"
        );
    }
    let count = identities.len();
    identities.sort();
    identities.dedup();
    ensure!(identities.len() == count, "disks share an identity");
    Ok(format!(
        "INQUIRY with {} VPD pages, REPORT LUNS with {luns} disks, capacities, {count} identities",
        pages.len()
    ))
}

/// Each VP has a partition, and writes copies of the source there past the page cache, each from
/// another place on, so that no two blocks of the disk are the same. Then each reads its own back.
fn queues(session: &mut Session) -> Result<String> {
    /// Copies on each partition.
    const COPIES: usize = 4;
    let source = session.disk(CONTROLLER, SOURCE)?;
    let target = session.disk(CONTROLLER, MEMORY)?;
    let cpus: usize = session.sh("nproc")?.parse()?;
    let queues = session.sh(&format!("ls /sys/block/{target}/mq | wc -l"))?;
    ensure!(
        queues == cpus.to_string(),
        "Linux has {queues} hardware queues on {cpus} VPs"
    );
    let blocks = COPY_BYTES >> 19;
    let mib = (COPY_BYTES * COPIES) >> 20;
    // From the host once: what counts here is the way to the target.
    session.sh(&format!(
        "dd if=/dev/{source} of=/tmp/source bs=512k status=none && \
         for cpu in $(seq {cpus}); do echo ,{mib}M; done | sfdisk -q -X gpt /dev/{target}"
    ))?;
    session.until(&format!("[ -b /dev/{target}{cpus} ]"))?;
    let before = channel_events(session)?;
    session.guest().run_ok(
        &format!(
            "for cpu in $(seq 0 {last}); do
                 taskset -c $cpu sh -ec 'for copy in $(seq 0 {copies}); do
                     dd if=/tmp/source iflag=skip_bytes skip=$((({COPIES} * '$cpu' + copy) * {COPY_STEP})) \
                         of=/dev/{target}'$((cpu + 1))' oflag=direct seek=$((copy * {blocks})) \
                         bs=512k count={blocks} status=none
                 done' || touch /tmp/failed &
             done
             wait
             rm /tmp/source
             [ ! -e /tmp/failed ]",
            last = cpus - 1,
            copies = COPIES - 1,
        ),
        LONG,
    )?;
    let written = channel_events(session)?;
    let sums = session.guest().run_ok(
        &format!(
            "echo 3 >/proc/sys/vm/drop_caches
             for cpu in $(seq 0 {last}); do
                 taskset -c $cpu xxhsum -q -H1 /dev/{target}$((cpu + 1)) >/tmp/sum.$cpu &
             done
             wait
             cat /tmp/sum.*",
            last = cpus - 1
        ),
        LONG,
    )?;
    let read = channel_events(session)?;
    for (what, events) in [
        ("written to", [&before, &written]),
        ("read from", [&written, &read]),
    ] {
        let [then, now] = events;
        let used = now
            .iter()
            .zip(then)
            .filter(|(now, then)| now > then)
            .count();
        ensure!(
            used == cpus,
            "{used} of {cpus} channels were {what}: {then:?}, then {now:?}"
        );
    }
    let sums: Vec<_> = sums
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let expected: Vec<_> = (0..cpus)
        .map(|cpu| session.files().copies_sum(COPIES * cpu..COPIES * (cpu + 1)))
        .collect();
    ensure!(
        sums == expected,
        "read back {sums:?}, expected {expected:?}"
    );
    session.sh(&format!("sfdisk -q --delete /dev/{target}"))?;
    Ok(format!(
        "{} MiB written and read back by {cpus} VPs over {cpus} channels, with the right checksums",
        mib * cpus
    ))
}

/// What was flushed is in the file on the host.
fn durable(session: &mut Session) -> Result<String> {
    const MIB: usize = 4;
    let source = session.disk(CONTROLLER, SOURCE)?;
    let target = session.disk(CONTROLLER, RAW)?;
    session.sh(&format!(
        "dd if=/dev/{source} of=/dev/{target} bs=1M count={MIB} conv=fsync status=none"
    ))?;
    session.files().begins_with_source("raw.img", MIB << 20)?;
    Ok(format!(
        "{MIB} MiB are in the host's file when fsync returns"
    ))
}

/// How often Linux has signalled each channel of the controller.
fn channel_events(session: &mut Session) -> Result<Vec<u64>> {
    let directory = session.directory(CONTROLLER)?;
    session
        .sh(&format!("cat {directory}/channels/*/events"))?
        .lines()
        .map(|line| Ok(line.trim().parse()?))
        .collect()
}

/// Partition, make, fill, check, and find the same again.
fn file_system(session: &mut Session, lun: u8) -> Result<String> {
    let disk = session.disk(CONTROLLER, lun)?;
    let logical = session.sh(&format!("cat /sys/block/{disk}/queue/logical_block_size"))?;
    session.sh(&format!(
        "dd if=/dev/zero of=/dev/{disk} bs=1M count=4 oflag=direct status=none && \
         echo 'label: gpt\n,,L' | sfdisk -q /dev/{disk}"
    ))?;
    session.until(&format!("[ -b /dev/{disk}1 ]"))?;
    session.sh(&format!(
        "mkdir -p /mnt/{disk} && mkfs.ext4 -q -F /dev/{disk}1 && mount /dev/{disk}1 /mnt/{disk} && \
         cp /lib/x86_64-linux-gnu/libc* /bin/busybox /mnt/{disk} && cd /mnt/{disk} && \
         xxhsum -q -H1 lib* busybox >/tmp/sums && cd / && umount /mnt/{disk} && \
         echo 3 >/proc/sys/vm/drop_caches && e2fsck -fn /dev/{disk}1 && \
         mount /dev/{disk}1 /mnt/{disk} && cd /mnt/{disk} && xxhsum -q -c /tmp/sums && \
         cd / && umount /mnt/{disk}"
    ))?;
    let files = session.sh("wc -l </tmp/sums")?;
    Ok(format!(
        "{logical}-byte sectors: GPT, ext4, {files} files the same after a remount, e2fsck finds nothing"
    ))
}

/// Only a disk that says so (LBPRZ of VPD page B2) reads zeros where it was discarded.
fn discard(session: &mut Session) -> Result<String> {
    /// Where in the MiB that is written the discarded part begins, and how long it is.
    const AT: u32 = 256 << 10;
    const LENGTH: u32 = 128 << 10;
    let mut zeros = 0;
    for lun in [RAW, DYNAMIC, MEMORY] {
        let disk = session.disk(CONTROLLER, lun)?;
        let most = session.sh(&format!("cat /sys/block/{disk}/queue/discard_max_bytes"))?;
        ensure!(most != "0", "Linux sees no UNMAP on {disk}");
        session.sh(&format!(
            "dd if=/dev/urandom of=/tmp/before bs=1M count=1 status=none && \
             dd if=/tmp/before of=/dev/{disk} bs=1M seek=8 oflag=direct status=none && \
             blkdiscard -o $(({AT} + (8 << 20))) -l {LENGTH} /dev/{disk} && \
             dd if=/dev/{disk} of=/tmp/after bs=1M skip=8 count=1 iflag=direct status=none && \
             cmp -n {AT} /tmp/before /tmp/after && \
             cmp /tmp/before /tmp/after $(({AT} + {LENGTH})) $(({AT} + {LENGTH}))"
        ))?;
        let says = session.sh(&format!("sg_vpd -p lbpv /dev/{disk}"))?;
        if says.contains("(LBPRZ): 1") {
            session.sh(&format!("cmp -n {LENGTH} /dev/zero /tmp/after 0 {AT}"))?;
            zeros += 1;
        }
    }
    let disk = session.disk(CONTROLLER, MEMORY)?;
    let trimmed = session.sh(&format!(
        "mkdir -p /mnt/trim && mkfs.ext4 -q -F -E nodiscard /dev/{disk} 64M && \
         mount /dev/{disk} /mnt/trim && fstrim -v /mnt/trim && umount /mnt/trim"
    ))?;
    session.sh(&format!("e2fsck -fn /dev/{disk}"))?;
    Ok(format!(
        "blkdiscard on raw, dynamic VHDX and memory leaves what is beside it, {zeros} promise zeros; {trimmed}"
    ))
}

fn read_only(session: &mut Session) -> Result<String> {
    let disk = session.disk(CONTROLLER, SOURCE)?;
    let flag = session.sh(&format!("cat /sys/block/{disk}/ro"))?;
    ensure!(flag == "1", "Linux does not see that {disk} is read-only");
    session.fails(&format!(
        "dd if=/dev/zero of=/dev/{disk} bs=4k count=1 oflag=direct"
    ))?;
    // The disk itself refuses, too, when Linux is talked into trying.
    session.fails(&format!(
        "blockdev --setrw /dev/{disk} && dd if=/dev/zero of=/dev/{disk} bs=4k count=1 oflag=direct"
    ))?;
    session.sh(&format!("blockdev --setro /dev/{disk}"))?;
    let sum = session.sh(&format!(
        "dd if=/dev/{disk} bs=1M count=1 iflag=direct status=none | xxhsum -H1"
    ))?;
    ensure!(
        sum.starts_with(&session.files().start_sum()),
        "its first MiB was changed"
    );
    Ok("seen by Linux, and writes are refused by the disk itself".into())
}

fn dvd(session: &mut Session) -> Result<String> {
    let disc = session.disk(CONTROLLER, DISC)?;
    ensure!(disc.starts_with("sr"), "Linux made {disc} of the DVD");
    let text = session.sh(&format!(
        "mkdir -p /mnt/dvd && mount -t iso9660 -o ro /dev/{disc} /mnt/dvd && cat /mnt/dvd/* && \
         umount /mnt/dvd"
    ))?;
    ensure!(text == ON_DISC, "the file on the disc says {text:?}");
    let sector = session.sh(&format!("cat /sys/block/{disc}/queue/logical_block_size"))?;
    ensure!(sector == "2048", "it has sectors of {sector} bytes");
    session.fails(&format!("dd if=/dev/zero of=/dev/{disc} bs=2k count=1"))?;
    Ok(format!("{disc} mounts as ISO 9660, its file is whole"))
}

fn hot_add(session: &mut Session) -> Result<String> {
    const LUN: u8 = 9;
    let disks = "ls -d /sys/bus/scsi/devices/*:0:0:* | wc -l";
    let before = session.sh(disks)?;
    for round in 1..=2 {
        session.ctl(
            "disk-add",
            json!({ "controller": CONTROLLER, "lun": LUN, "memory-mib": 8 * round }),
        )?;
        let disk = session.disk(CONTROLLER, LUN)?;
        let size = session.sh(&format!("blockdev --getsize64 /dev/{disk}"))?;
        ensure!(
            size == ((round * 8) << 20).to_string(),
            "the added disk has {size} bytes"
        );
        session.sh(&format!(
            "mkdir -p /mnt/hot && mkfs.ext4 -q -F /dev/{disk} && mount /dev/{disk} /mnt/hot && \
             cp /bin/busybox /mnt/hot && cmp /bin/busybox /mnt/hot/busybox && umount /mnt/hot"
        ))?;
        session.ctl(
            "disk-eject",
            json!({ "controller": CONTROLLER, "lun": LUN }),
        )?;
        session.until(&format!("[ ! -e /sys/block/{disk} ]"))?;
        session.until(&format!("[ $({disks}) = {before} ]"))?;
    }
    Ok("a disk comes, is used, goes, and another comes in its place".into())
}

/// The files that Linux has partitioned and written to, once they are taken from it.
fn sound(session: &mut Session) -> Result<String> {
    for (lun, name) in VHDX {
        let disk = session.disk(CONTROLLER, lun)?;
        let sector = session
            .sh(&format!("blockdev --getss /dev/{disk}"))?
            .parse()?;
        let eject = json!({ "controller": CONTROLLER, "lun": lun });
        session.ctl("disk-eject", eject)?;
        session.until(&format!("[ ! -e /sys/block/{disk} ]"))?;
        session.files().is_sound(name, sector)?;
    }
    Ok(
        "`disk check` finds nothing in fixed, dynamic and 4096-byte ones, nor does `qemu-img check` in the first two"
            .into(),
    )
}
