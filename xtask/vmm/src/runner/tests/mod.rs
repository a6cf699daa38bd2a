//! The host's side of a VM against a guest in the same process, asked through the control stream.

mod guest;

use serde_json::{Value, json};

use crate::config::Config;
use crate::control::Command;
use guest::{Rig, SECOND};

/// A machine with these devices.
fn rig(devices: Value) -> Rig {
    let fields = json!({ "kernel": "kernel", "memory-mib": 64, "devices": devices });
    Rig::new(&serde_json::from_value::<Config>(fields).unwrap())
}

fn all() -> Value {
    json!([
        { "kind": "balloon" },
        { "kind": "heartbeat" },
        { "kind": "shutdown" },
        { "kind": "time-sync" },
        { "kind": "scsi", "name": "disk0", "luns": [{ "lun": 0, "memory-mib": 1 }] },
        { "kind": "net", "name": "net0", "backend": "loop" },
    ])
}

/// The events of these names, with what they say.
fn events(rig: &Rig, names: &[&str]) -> Vec<(String, Value)> {
    let events = rig.runner.events().take().into_iter();
    events
        .map(|timed| serde_json::to_value(timed.event).unwrap())
        .map(|event| {
            let name = event["event"].as_str().unwrap().to_owned();
            (name, event["data"].clone())
        })
        .filter(|(name, _)| names.contains(&name.as_str()))
        .collect()
}

fn event(name: &str, data: Value) -> (String, Value) {
    (name.to_owned(), data)
}

#[test]
fn every_command_has_an_answer_on_every_machine() {
    for devices in [json!([]), all()] {
        let rig = rig(devices);
        rig.connect();
        for &name in Command::NAMES {
            // Those that need arguments refuse to go without.
            if let Ok(command) = Command::parse(name, serde_json::Map::new()) {
                let (answer, _) = rig.ask(command);
                rig.advance(100 * SECOND);
                assert!(answer.is_there(), "{name}");
            }
        }
    }
}

#[test]
fn the_guest_connects_with_the_newest_version_that_it_may_have() {
    for version in [
        "2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3", "6.0",
    ] {
        let fields = json!({
            "kernel": "kernel",
            "vmbus": { "newest-version": version },
            "devices": [{ "kind": "heartbeat" }],
        });
        let rig = Rig::new(&serde_json::from_value::<Config>(fields).unwrap());
        rig.connect();
        assert_eq!(
            events(&rig, &["VMBUS_CONNECTED"]),
            [event("VMBUS_CONNECTED", json!({ "version": version }))]
        );
        let status = rig.returns("query-status", json!({}));
        assert_eq!(status["vmbus"]["version"], version);
        assert_eq!(status["complaints"], json!([]));
    }
}

#[test]
fn channels_are_told_by_the_names_of_their_devices() {
    let rig = rig(all());
    let _balloon = rig.balloon();
    rig.connect();
    assert_eq!(
        events(&rig, &["CHANNEL_OPENED"]),
        [event(
            "CHANNEL_OPENED",
            json!({ "device": "balloon", "index": 0, "channel": 1 })
        )]
    );
    let devices = rig.returns("query-devices", json!({}));
    let names = devices.as_array().unwrap().iter();
    let names: Vec<_> = names.map(|device| device["name"].clone()).collect();
    assert_eq!(
        json!(names),
        json!([
            "balloon",
            "heartbeat",
            "shutdown",
            "time-sync",
            "disk0",
            "net0"
        ])
    );
    assert!(
        devices
            .as_array()
            .unwrap()
            .iter()
            .all(|device| device["offered"] == true)
    );
    assert_eq!(devices[0]["channels"][0]["index"], 0);
    assert_eq!(devices[1]["channels"], json!([]));
    let counters = rig.returns("query-counters", json!({ "device": "balloon" }));
    assert!(
        counters[0]["counters"]["channel-0-interrupts"]
            .as_u64()
            .unwrap()
            > 0
    );
}

#[test]
fn the_balloon_takes_memory_and_gives_it_back() {
    let rig = rig(json!([{ "kind": "balloon" }]));
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, 60 * SECOND);
    rig.returns("balloon", json!({ "target-mib": 40 }));
    rig.serve_balloon(&balloon, 10 * SECOND);
    let state = rig.returns("query-balloon", json!({}));
    assert_eq!(
        (&state["actual-mib"], &state["target-mib"]),
        (&json!(40), &json!(40))
    );
    assert_eq!(state["removed-pages"], 24 * 256);
    assert_eq!(rig.vm.discarded(), 24 * 256, "the system has them");
    let told = events(&rig, &["BALLOON"]);
    assert_eq!(told.last().unwrap().1["actual-mib"], 40);
    rig.returns("balloon", json!({ "target-mib": 64 }));
    rig.serve_balloon(&balloon, 10 * SECOND);
    assert_eq!(rig.returns("query-balloon", json!({}))["actual-mib"], 64);
    assert_eq!(
        rig.returns("query-status", json!({}))["complaints"],
        json!([])
    );
}

#[test]
fn a_request_to_end_reaches_the_guest_and_its_answer_the_user() {
    let rig = rig(json!([{ "kind": "shutdown" }]));
    let refused = rig.fails("shutdown", json!({}));
    assert_eq!(refused, "shutdown: the guest has not opened this component");
    let driver = rig.shutdown();
    rig.connect();
    for accept in [true, false] {
        rig.returns("shutdown", json!({ "kind": "reboot", "force": true }));
        rig.settle();
        let request = driver.take_request().expect("the guest was asked");
        let answer = if accept {
            request.accept()
        } else {
            request.refuse()
        };
        answer.unwrap();
        rig.settle();
        let told = events(&rig, &["SHUTDOWN_ANSWERED"]);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].1["accepted"], accept);
    }
}

#[test]
fn a_device_goes_and_comes_back() {
    let rig = rig(json!([{ "kind": "balloon" }]));
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, SECOND);
    events(&rig, &[]);
    rig.returns("rescind", json!({ "device": "balloon" }));
    rig.serve_balloon(&balloon, SECOND);
    assert_eq!(events(&rig, &["CHANNEL_CLOSED"]).len(), 1);
    assert_eq!(rig.returns("query-devices", json!({}))[0]["offered"], false);
    assert_eq!(
        rig.fails("rescind", json!({ "device": "balloon" })),
        "`balloon` is not offered"
    );
    assert!(
        balloon.channel().attend(|_| false),
        "the driver is ready for the next"
    );
    rig.returns("offer", json!({ "device": "balloon" }));
    rig.serve_balloon(&balloon, SECOND);
    assert_eq!(events(&rig, &["CHANNEL_OPENED"]).len(), 1);
    assert_eq!(
        rig.fails("offer", json!({ "device": "balloon" })),
        "`balloon` is offered already"
    );
    assert_eq!(
        rig.fails("offer", json!({ "device": "floppy" })),
        "there is no device `floppy`"
    );
}

/// Carries commands for the balloon out before anybody can act on them.
fn at_once(rig: &Rig, commands: &[&str]) -> Vec<Result<Value, String>> {
    let ask = |name: &&str| {
        let Value::Object(arguments) = json!({ "device": "balloon" }) else {
            unreachable!("it is an object")
        };
        let (answer, ()) = rig.ask(Command::parse(name, arguments).unwrap());
        answer.take().map_err(|failure| failure.desc)
    };
    commands.iter().map(ask).collect()
}

#[test]
fn a_device_that_is_still_going_is_offered_again_when_it_has_gone() {
    let rig = rig(json!([{ "kind": "balloon" }]));
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, SECOND);
    events(&rig, &[]);
    let done = Ok(json!({}));
    assert_eq!(
        at_once(&rig, &["rescind", "offer", "offer"]),
        [
            done.clone(),
            done.clone(),
            Err("`balloon` is offered already".into())
        ]
    );
    assert_eq!(events(&rig, &["DEVICE_GONE"]), []);
    rig.serve_balloon(&balloon, SECOND);
    balloon.channel().attend(|_| false);
    rig.serve_balloon(&balloon, SECOND);
    let told = events(&rig, &["CHANNEL_CLOSED", "DEVICE_GONE", "CHANNEL_OPENED"]);
    let told: Vec<_> = told.into_iter().map(|(name, _)| name).collect();
    assert_eq!(told, ["CHANNEL_CLOSED", "DEVICE_GONE", "CHANNEL_OPENED"]);
    assert_eq!(
        at_once(&rig, &["rescind", "offer", "rescind", "rescind"]),
        [
            done.clone(),
            done.clone(),
            done,
            Err("`balloon` is not offered".into())
        ]
    );
    rig.serve_balloon(&balloon, SECOND);
    assert_eq!(
        events(&rig, &["DEVICE_GONE"]),
        [event("DEVICE_GONE", json!({ "device": "balloon" }))]
    );
    assert_eq!(rig.returns("query-devices", json!({}))[0]["offered"], false);
}

#[test]
fn a_device_that_has_gone_unnoticed_comes_back_and_stays() {
    let mut rig = rig(json!([{ "kind": "balloon" }]));
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, SECOND);
    events(&rig, &[]);
    assert!(at_once(&rig, &["rescind"])[0].is_ok());
    // The host is done with it, and nobody has looked.
    let now = rig.runner.vm().unwrap().reference_time();
    rig.runner.with_host(|host| host.run(now));
    assert!(at_once(&rig, &["offer"])[0].is_ok());
    rig.serve_balloon(&balloon, SECOND);
    balloon.channel().attend(|_| false);
    rig.serve_balloon(&balloon, SECOND);
    let told = events(&rig, &["DEVICE_GONE", "CHANNEL_OPENED"]);
    let told: Vec<_> = told.into_iter().map(|(name, _)| name).collect();
    assert_eq!(told, ["DEVICE_GONE", "CHANNEL_OPENED"]);
    drop(balloon);
    rig.start_anew();
    rig.connect();
    assert_eq!(rig.returns("query-devices", json!({}))[0]["offered"], true);
}

#[test]
fn a_device_that_is_to_come_back_is_there_when_the_guest_starts_anew() {
    let mut rig = rig(json!([{ "kind": "balloon" }]));
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, SECOND);
    assert!(
        at_once(&rig, &["rescind", "offer"])
            .iter()
            .all(Result::is_ok)
    );
    drop(balloon);
    rig.start_anew();
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, SECOND);
    assert_eq!(rig.returns("query-devices", json!({}))[0]["offered"], true);
    assert_eq!(
        at_once(&rig, &["offer"]),
        [Err("`balloon` is offered already".into())]
    );
}

#[test]
fn a_guest_that_starts_anew_finds_the_devices_as_they_were() {
    let mut rig = rig(json!([{ "kind": "balloon" }, { "kind": "heartbeat" }]));
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, SECOND);
    rig.returns("rescind", json!({ "device": "heartbeat" }));
    events(&rig, &[]);
    drop(balloon);
    rig.start_anew();
    assert_eq!(events(&rig, &["CHANNEL_CLOSED"]).len(), 1, "by the reset");
    let balloon = rig.balloon();
    rig.connect();
    rig.serve_balloon(&balloon, SECOND);
    let told = events(&rig, &["VMBUS_CONNECTED", "CHANNEL_OPENED"]);
    assert_eq!(told.len(), 2);
    let devices = rig.returns("query-devices", json!({}));
    assert_eq!(
        (&devices[0]["offered"], &devices[1]["offered"]),
        (&json!(true), &json!(false))
    );
}

#[test]
fn messages_wait_until_the_guest_has_room() {
    let rig = rig(all());
    rig.vm.refuse_messages(true);
    rig.vm.guest().connect();
    rig.settle();
    // Nothing is due while the guest does not read, or the thread would never sleep.
    assert_ne!(rig.runner.turn(), crate::runner::Sleep::Not);
    rig.vm.refuse_messages(false);
    rig.runner.message_delivered(vmbus::ids::VpIndex(0));
    rig.settle();
    assert_eq!(events(&rig, &["VMBUS_CONNECTED"]).len(), 1);
}

#[test]
fn a_fault_strikes_and_is_cleared() {
    let rig = rig(all());
    let balloon = rig.balloon();
    rig.connect();
    let stall = json!({ "device": "balloon", "kind": "drop", "packets": 1 });
    rig.returns("fault", stall);
    rig.serve_balloon(&balloon, 60 * SECOND);
    let cleared = rig.returns("faults-clear", json!({}));
    assert_eq!(cleared["hits"], 0, "the host had nothing to say yet");
    for (fault, sentence) in [
        (
            json!({ "device": "balloon", "kind": "torn-writes", "lun": 0 }),
            "`balloon` is a balloon device: it cannot have the fault `torn-writes`",
        ),
        (
            json!({ "device": "disk0", "kind": "torn-writes", "lun": 7 }),
            "there is no disk at LUN 7",
        ),
        (
            json!({ "device": "disk0", "kind": "torn-writes", "lun": 0, "skip": 1 }),
            "the fault `torn-writes` is none of packets: it has no direction and no number of them",
        ),
        (
            json!({ "device": "disk0", "kind": "truncate", "bytes": 1, "direction": "to-host" }),
            "the fault `truncate` can only happen to packets to the guest",
        ),
        (
            json!({ "device": "none", "kind": "stall" }),
            "there is no device `none`",
        ),
    ] {
        assert_eq!(rig.fails("fault", fault), sentence);
    }
    for fault in [
        json!({ "device": "disk0", "kind": "torn-writes", "lun": 0 }),
        json!({ "device": "disk0", "kind": "slow-disk", "lun": 0, "milliseconds": 1 }),
        json!({ "device": "disk0", "kind": "failing-disk", "lun": 0, "offset": 512 }),
        json!({ "device": "net0", "kind": "lossy-network", "loss": 100 }),
        json!({ "device": "heartbeat", "kind": "message", "what": "wrong-id" }),
    ] {
        rig.returns("fault", fault);
    }
    rig.returns("faults-clear", json!({}));
}

#[test]
fn disks_come_and_go() {
    let rig = rig(all());
    let disk = json!({ "controller": "disk0", "lun": 5, "memory-mib": 2 });
    rig.returns("disk-add", disk.clone());
    assert_eq!(rig.fails("disk-add", disk), "LUN 5 is in use");
    rig.returns("disk-eject", json!({ "controller": "disk0", "lun": 5 }));
    assert_eq!(
        rig.fails("disk-eject", json!({ "controller": "disk0", "lun": 5 })),
        "there is no LUN 5"
    );
    assert_eq!(
        rig.fails("disk-eject", json!({ "controller": "net0", "lun": 5 })),
        "`net0` is no SCSI controller"
    );
    assert_eq!(
        rig.fails(
            "disk-add",
            json!({ "controller": "disk0", "lun": 6, "file": "/nowhere.img" })
        ),
        "disk /nowhere.img does not exist"
    );
    assert_eq!(
        rig.fails("disk-add", json!({ "controller": "disk0", "lun": 6 })),
        "a disk needs either a `file` or `memory-mib`"
    );
}

#[test]
fn cables_and_packet_sizes_are_the_adapters() {
    let rig = rig(all());
    rig.returns("link", json!({ "nic": "net0", "up": false }));
    rig.returns("mtu", json!({ "nic": "net0", "mtu": 9000 }));
    let counters = rig.returns("query-counters", json!({ "device": "net0" }));
    assert_eq!(counters[0]["counters"]["link-up"], 0);
    assert_eq!(counters[0]["counters"]["mtu"], 9000);
    assert_eq!(
        rig.fails("mtu", json!({ "nic": "net0", "mtu": 10 })),
        "network net0: the MTU must be from 576 to 9202 bytes, not 10"
    );
    assert_eq!(
        rig.fails("link", json!({ "nic": "disk0", "up": true })),
        "`disk0` is no network adapter"
    );
}

#[test]
fn sockets_are_made_before_the_vm_starts_and_again_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let devices = json!([{ "kind": "vsock", "path": path }]);
    let mut rig = rig(devices.clone());
    assert!(path.exists());
    let fields = json!({ "kernel": "kernel", "devices": devices });
    let config: Config = serde_json::from_value(fields).unwrap();
    let events = crate::runner::Events::new().unwrap();
    let taken = crate::devices::Devices::new(&config, &events)
        .err()
        .unwrap();
    let sentence = format!("the socket {} is in use by another program", path.display());
    assert_eq!(taken.desc, sentence);
    rig.connect();
    rig.start_anew();
    assert!(path.exists());
    assert_eq!(
        rig.fails("rescind", json!({ "device": "vsock" })),
        "`vsock` is no device that is offered: its connections are"
    );
    rig.runner.finish();
    assert!(!path.exists());
}

#[test]
fn the_thread_ends_when_the_vm_has() {
    use crate::runner::{Crash, End};
    let rig = rig(all());
    let runner = rig.runner.clone();
    let thread = std::thread::spawn(move || runner.serve());
    rig.runner.crashed(Crash {
        parameters: [1, 2, 3, 4, 5],
        message: Some("it broke".into()),
    });
    assert_eq!(thread.join().unwrap().unwrap(), End::Crashed);
    // What comes later changes nothing.
    rig.runner.ended(End::Reset);
    assert_eq!(rig.runner.serve().unwrap(), End::Crashed);
    assert_eq!(
        events(&rig, &["GUEST_PANICKED"]),
        [event(
            "GUEST_PANICKED",
            json!({ "parameters": [1, 2, 3, 4, 5], "message": "it broke" })
        )]
    );
    assert_eq!(
        rig.returns("query-status", json!({}))["status"],
        "guest-panicked"
    );
}
