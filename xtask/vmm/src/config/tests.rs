//! Configurations, good ones and every mistake.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A folder with a kernel, two disks and a socket's worth of room.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["kernel", "initrd", "a.img", "b.img", "passt.socket"] {
        fs::write(folder.path().join(name), "x").unwrap();
    }
    folder
}

fn path(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

/// Reads a configuration with a kernel and these fields.
fn read(folder: &TempDir, fields: Value) -> Result<Config, String> {
    let mut whole = json!({ "kernel": path(folder, "kernel") });
    let (Value::Object(all), Value::Object(fields)) = (&mut whole, fields) else {
        unreachable!("both are objects");
    };
    all.extend(fields);
    let file = folder.path().join("vm.json");
    fs::write(&file, whole.to_string()).unwrap();
    Config::read(&file).map_err(|error| error.to_string())
}

fn devices(folder: &TempDir, devices: Value) -> Result<Config, String> {
    read(folder, json!({ "devices": devices }))
}

/// Where `.` stands for the folder.
fn assert_refused(folder: &TempDir, fields: Value, sentence: &str) {
    let error = read(folder, fields).expect_err(sentence);
    let here = folder.path().display().to_string();
    assert_eq!(error.replace(&here, "."), sentence);
}

#[test]
fn a_kernel_is_enough() {
    let folder = folder();
    let config = read(&folder, json!({})).unwrap();
    assert_eq!(config, Config::new(folder.path().join("kernel")));
    assert_eq!((config.memory_mib, config.cpus), (256, 1));
    assert_eq!(config.on_reboot, OnReboot::Exit);
    assert_eq!(config.vmbus.profile, Profile::TestMachine);
    assert_eq!(config.vmbus.newest(), None);
}

#[test]
fn everything_can_be_said_and_comes_back_the_same() {
    let folder = folder();
    let config = read(
        &folder,
        json!({
            "initrd": path(&folder, "initrd"),
            "cmdline": "console=ttyS0 quiet",
            "memory-mib": 512,
            "cpus": 4,
            "on-reboot": "reset",
            "entry": "linux",
            "vmbus": { "newest-version": "5.3", "profile": "openvmm" },
            "devices": [
                { "kind": "scsi", "name": "disk0", "queues": 4, "luns": [
                    { "lun": 0, "file": path(&folder, "a.img"), "read-only": true },
                    { "lun": 1, "memory-mib": 64 },
                ] },
                { "kind": "net", "name": "net0", "mac": "00:15:5d:01:02:03", "mtu": 9000, "queues": 2,
                  "backend": { "passt": path(&folder, "passt.socket") }, "pcap": path(&folder, "net0.pcap") },
                { "kind": "net", "name": "net1", "backend": { "tap": "tap0" } },
                { "kind": "net", "name": "net2", "backend": "none" },
                { "kind": "net", "name": "net3", "backend": "loop" },
                { "kind": "net", "name": "net4", "backend": { "wire": "w" } },
                { "kind": "net", "name": "net5", "backend": { "wire": "w" } },
                { "kind": "heartbeat" },
                { "kind": "shutdown", "name": "off" },
                { "kind": "time-sync" },
                { "kind": "kvp" },
                { "kind": "balloon", "hot-add-mib": 256 },
                { "kind": "vsock", "path": path(&folder, "vsock") },
            ],
        }),
    )
    .unwrap();
    assert_eq!(config.vmbus.newest(), Some(Version::V5_3));
    let names: Vec<_> = config.devices.iter().map(Device::name).collect();
    assert_eq!(
        names,
        [
            "disk0",
            "net0",
            "net1",
            "net2",
            "net3",
            "net4",
            "net5",
            "heartbeat",
            "off",
            "time-sync",
            "kvp",
            "balloon",
            "vsock"
        ]
    );
    assert_eq!(config.device("off").map(Device::kind), Some(Kind::Shutdown));
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
}

#[test]
fn an_adapter_without_an_address_gets_the_same_one_each_time() {
    let address = MacAddress::of_name("net0");
    assert_eq!(address, MacAddress::of_name("net0"));
    assert_ne!(address, MacAddress::of_name("net1"));
    assert!(address.is_unicast());
    assert_eq!(address.0[0] & 2, 2, "locally administered");
}

#[test]
fn a_file_that_is_no_configuration_is_told() {
    let folder = folder();
    let absent = Config::read(Path::new("/nowhere/vm.json")).unwrap_err();
    assert!(
        absent
            .to_string()
            .starts_with("the configuration /nowhere/vm.json cannot be read: "),
        "{absent}"
    );
    for (fields, says) in [
        (json!({ "memory": 256 }), "unknown field `memory`"),
        (json!({ "cpus": -1 }), "invalid value"),
        (json!({ "on-reboot": "maybe" }), "unknown variant `maybe`"),
        (
            json!({ "vmbus": { "newest-version": "7.0" } }),
            "`7.0` is no version of VMBus: one of 2.4, 3.0",
        ),
        (
            json!({ "vmbus": { "version": "6.0" } }),
            "unknown field `version`",
        ),
        (
            json!({ "devices": [{ "kind": "floppy" }] }),
            "unknown variant `floppy`",
        ),
        (
            json!({ "devices": [{ "kind": "kvp", "size": 1 }] }),
            "unknown field `size`",
        ),
        (
            json!({ "devices": [{ "kind": "net" }] }),
            "missing field `name`",
        ),
        (
            json!({ "devices": [{ "kind": "net", "name": "n", "mac": "00:15" }] }),
            "`00:15` is no MAC address",
        ),
        (
            json!({ "devices": [{ "kind": "net", "name": "n", "backend": { "slirp": "x" } }] }),
            "unknown variant `slirp`",
        ),
        (
            json!({ "devices": [{ "kind": "scsi", "name": "s", "luns": [{ "file": "a" }] }] }),
            "missing field `lun`",
        ),
    ] {
        let error = read(&folder, fields).expect_err(says);
        assert!(error.contains(says), "{error}");
        assert!(error.starts_with("the configuration "), "{error}");
    }
}

#[test]
fn each_mistake_is_one_sentence_that_names_the_thing() {
    let folder = folder();
    for (fields, sentence) in [
        (
            json!({ "memory-mib": 15 }),
            "a VM has 16 to 131072 MiB of memory, not 15",
        ),
        (
            json!({ "memory-mib": 131_073 }),
            "a VM has 16 to 131072 MiB of memory, not 131073",
        ),
        (
            json!({ "cpus": 0 }),
            "a VM has 1 to 64 virtual processors, not 0",
        ),
        (
            json!({ "cpus": 65 }),
            "a VM has 1 to 64 virtual processors, not 65",
        ),
        (
            json!({ "kernel": path(&folder, "vmlinuz") }),
            "the kernel ./vmlinuz does not exist",
        ),
        (
            json!({ "kernel": path(&folder, "") }),
            "the kernel ./ is not a file",
        ),
        (
            json!({ "initrd": path(&folder, "initramfs") }),
            "the initrd ./initramfs does not exist",
        ),
    ] {
        assert_refused(&folder, fields, sentence);
    }
}

#[test]
fn each_mistake_of_a_device_is_one_sentence_that_names_it() {
    let folder = folder();
    let a = path(&folder, "a.img");
    let same = folder.path().join(".").join("a.img");
    let long = format!("{}/{}", folder.path().display(), "x".repeat(120));
    let scsi = |luns: Value| json!([{ "kind": "scsi", "name": "disk0", "luns": luns }]);
    let net = |fields: Value| {
        let mut net = json!({ "kind": "net", "name": "net0" });
        net.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        json!([net])
    };
    let cases = [
        (
            json!([{ "kind": "kvp", "name": "x" }, { "kind": "heartbeat", "name": "x" }]),
            "two devices are named `x`: each needs a name of its own".to_owned(),
        ),
        (
            json!([{ "kind": "kvp", "name": "a b" }]),
            "`a b` is no name for a device: 1 to 32 letters, digits, `-`, `_` or `.`".into(),
        ),
        (
            json!([{ "kind": "kvp", "name": "x" }, { "kind": "kvp", "name": "y" }]),
            "the VM has more than one kvp device: it can have one".into(),
        ),
        (
            json!([{ "kind": "scsi", "name": "disk0", "queues": 0 }]),
            "`disk0` has 1 to 64 queues, not 0".into(),
        ),
        (
            scsi(json!([{ "lun": 64, "memory-mib": 1 }])),
            "`disk0` has LUNs 0 to 63, not 64".into(),
        ),
        (
            scsi(json!([{ "lun": 1, "memory-mib": 1 }, { "lun": 1, "memory-mib": 2 }])),
            "`disk0` has LUN 1 twice".into(),
        ),
        (
            scsi(json!([{ "lun": 2 }])),
            "LUN 2 of `disk0` needs either a `file` or `memory-mib`".into(),
        ),
        (
            scsi(json!([{ "lun": 2, "file": a, "memory-mib": 3 }])),
            "LUN 2 of `disk0` needs either a `file` or `memory-mib`".into(),
        ),
        (
            scsi(json!([{ "lun": 2, "memory-mib": 0 }])),
            "LUN 2 of `disk0` is a disk of 0 MiB".into(),
        ),
        (
            scsi(json!([{ "lun": 0, "file": path(&folder, "c.img") }])),
            "the disk ./c.img does not exist".into(),
        ),
        (
            scsi(json!([{ "lun": 0, "file": a }, { "lun": 1, "file": same, "read-only": true }])),
            "the disk ././a.img is used twice, and not read-only: two disks cannot write to one file"
                .into(),
        ),
        (
            net(json!({ "mtu": 500 })),
            "`net0` has an MTU of 576 to 9202, not 500".into(),
        ),
        (
            net(json!({ "queues": 65 })),
            "`net0` has 1 to 64 queues, not 65".into(),
        ),
        (
            net(json!({ "mac": "01:00:5e:00:00:01" })),
            "`net0` cannot have the address 01:00:5e:00:00:01: it is that of a group, or of nobody"
                .into(),
        ),
        (
            json!([
                { "kind": "net", "name": "p", "mac": "02:00:00:00:00:01" },
                { "kind": "net", "name": "q", "mac": "02:00:00:00:00:01" },
            ]),
            "`p` and `q` have the same address 02:00:00:00:00:01".into(),
        ),
        (
            net(json!({ "backend": { "passt": path(&folder, "absent") } })),
            "the passt socket of `net0` ./absent does not exist".into(),
        ),
        (
            net(json!({ "backend": { "tap": "a-name-of-17-bytes" } })),
            "`a-name-of-17-bytes` is no name for a network interface: 1 to 15 characters, no `/` and no blank"
                .into(),
        ),
        (
            net(json!({ "backend": { "wire": "w" } })),
            "the wire `w` has the ends net0: a wire joins two adapters".into(),
        ),
        (
            net(json!({ "pcap": path(&folder, "no/net0.pcap") })),
            "there is no folder ./no for the pcap file ./no/net0.pcap".into(),
        ),
        (
            json!([
                { "kind": "net", "name": "p", "pcap": path(&folder, "pcap") },
                { "kind": "net", "name": "q", "pcap": path(&folder, "pcap") },
            ]),
            "./pcap is used twice: by `p` and by `q`".into(),
        ),
        (
            json!([{ "kind": "vsock", "path": long }]),
            format!("the path ./{} is too long for a socket: at most 96 bytes here", "x".repeat(120)),
        ),
        (
            json!([{ "kind": "vsock", "path": path(&folder, "no/vsock") }]),
            "there is no folder ./no for the vsock socket ./no/vsock".into(),
        ),
    ];
    for (list, sentence) in cases {
        assert_refused(&folder, json!({ "devices": list }), &sentence);
    }
}

#[test]
fn one_file_can_be_read_by_two_disks() {
    let folder = folder();
    let a = path(&folder, "a.img");
    let list = json!([
        { "kind": "scsi", "name": "p", "luns": [{ "lun": 0, "file": a, "read-only": true }] },
        { "kind": "scsi", "name": "q", "luns": [{ "lun": 0, "file": a, "read-only": true }] },
    ]);
    devices(&folder, list).unwrap();
}
