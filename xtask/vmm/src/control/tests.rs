//! Lines of the control stream.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

fn failure(line: &str) -> Failure {
    let response = Request::parse(line.as_bytes()).expect_err(line);
    response.result.expect_err("a line that is refused fails")
}

/// Every command with all its arguments.
fn samples() -> Vec<(&'static str, Value)> {
    vec![
        ("qmp_capabilities", json!({})),
        ("cont", json!({})),
        ("stop", json!({})),
        ("quit", json!({})),
        ("query-status", json!({})),
        ("query-devices", json!({})),
        ("query-counters", json!({ "device": "disk0" })),
        ("query-exits", json!({})),
        ("shutdown", json!({ "kind": "hibernate", "force": true })),
        ("heartbeat", json!({})),
        ("time-sync", json!({})),
        ("time-step", json!({ "milliseconds": -1500 })),
        (
            "kvp-set",
            json!({ "pool": "external", "key": "k", "value": "text" }),
        ),
        ("kvp-get", json!({ "pool": "guest", "key": "k" })),
        ("kvp-list", json!({ "pool": "auto" })),
        ("kvp-delete", json!({ "pool": "external", "key": "k" })),
        ("kvp-ip-get", json!({ "nic": "net0" })),
        (
            "kvp-ip-set",
            json!({ "nic": "net0", "dhcp": false, "addresses": ["192.0.2.5/24"],
                    "gateways": ["192.0.2.1"], "dns": ["2001:db8::1"] }),
        ),
        (
            "disk-add",
            json!({ "controller": "disk0", "lun": 3, "file": "/a b.vhdx", "read-only": true }),
        ),
        (
            "disk-eject",
            json!({ "controller": "disk0", "lun": 3, "force": false }),
        ),
        ("link", json!({ "nic": "net0", "up": false })),
        ("mtu", json!({ "nic": "net0", "mtu": 9000 })),
        ("balloon", json!({ "target-mib": 128 })),
        ("query-balloon", json!({})),
        ("hot-add", json!({ "mib": 128 })),
        ("rescind", json!({ "device": "net0" })),
        ("offer", json!({ "device": "net0" })),
        (
            "fault",
            json!({ "device": "disk0", "kind": "delay", "direction": "to-host", "milliseconds": 5,
                    "packets": 2 }),
        ),
        ("faults-clear", json!({ "device": "disk0" })),
    ]
}

#[test]
fn each_command_is_read_and_written_the_same() {
    let samples = samples();
    let names: Vec<_> = samples.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, Command::NAMES, "a sample of each");
    for (name, arguments) in samples {
        let line = json!({ "execute": name, "arguments": arguments, "id": [name, 1] });
        let request = Request::parse(line.to_string().as_bytes()).expect(name);
        assert_eq!(request.command.name(), name);
        assert_eq!(request.id, Some(json!([name, 1])));
        assert_eq!(request.command.arguments().unwrap(), arguments);
        let written = request.to_line().unwrap();
        assert!(written.ends_with('\n') && written.matches('\n').count() == 1);
        assert_eq!(Request::parse(written.trim_end().as_bytes()), Ok(request));
    }
}

#[test]
fn each_fault_is_read_and_written_the_same() {
    for fault in [
        json!({ "kind": "drop", "direction": "to-host", "packets": 1 }),
        json!({ "kind": "delay", "skip": 3, "milliseconds": 5 }),
        json!({ "kind": "truncate", "bytes": 8 }),
        json!({ "kind": "extend", "bytes": 8 }),
        json!({ "kind": "transaction-id", "bits": 1 }),
        json!({ "kind": "spoil", "at": 3, "bits": 128 }),
        json!({ "kind": "corrupt-ring", "direction": "to-host" }),
        json!({ "kind": "stall" }),
        json!({ "kind": "rescind", "skip": 100 }),
        json!({ "kind": "message", "what": "wrong-id", "messages": 2 }),
        json!({ "kind": "slow-disk", "lun": 0, "operation": "any", "milliseconds": 50 }),
        json!({ "kind": "failing-disk", "lun": 1, "operation": "write", "error": "not-ready", "offset": 0, "length": 512 }),
        json!({ "kind": "torn-writes", "lun": 1, "requests": 1 }),
        json!({ "kind": "lossy-network", "loss": 10, "duplication": 5, "reordering": 5, "corruption": 1, "milliseconds": 0 }),
    ] {
        let mut arguments = fault.as_object().unwrap().clone();
        arguments.insert("device".into(), "d".into());
        let command = Command::parse("fault", arguments.clone()).unwrap();
        assert_eq!(command.arguments().unwrap(), Value::Object(arguments));
        let Command::Fault(on) = command else {
            panic!("a fault")
        };
        assert_eq!(fault["kind"], on.fault.name());
    }
}

#[test]
fn what_is_left_out_has_a_usual_value() {
    let parse = |line: &str| Request::parse(line.as_bytes()).unwrap().command;
    assert_eq!(
        parse(r#"{"execute":"cont"}"#),
        Command::Continue(NoArguments {})
    );
    assert_eq!(
        parse(r#"{"execute":"shutdown"}"#),
        Command::Shutdown(Shutdown {
            kind: ShutdownKind::PowerOff,
            force: false
        })
    );
    assert_eq!(
        parse(r#"{"execute":"faults-clear","arguments":{}}"#),
        Command::FaultsClear(SomeDevice { device: None })
    );
}

#[test]
fn a_wrong_line_is_answered_with_one_sentence() {
    for (line, class, sentence) in [
        (
            r#"{"execute":"reboot"}"#,
            Class::CommandNotFound,
            "there is no command `reboot`",
        ),
        (
            "cont",
            Class::GenericError,
            "this line is no JSON: expected value at line 1 column 1",
        ),
        (
            "{}",
            Class::GenericError,
            "this is no command: missing field `execute`",
        ),
        (
            r#"{"execute":"cont","argument":{}}"#,
            Class::GenericError,
            "this is no command: unknown field `argument`, expected one of `execute`, `arguments`, `id`",
        ),
        (
            r#"{"execute":"balloon"}"#,
            Class::GenericError,
            "`balloon`: missing field `target-mib`",
        ),
        (
            r#"{"execute":"balloon","arguments":{"target-mib":-1}}"#,
            Class::GenericError,
            "`balloon`: invalid value: integer `-1`, expected u32",
        ),
        (
            r#"{"execute":"cont","arguments":{"now":true}}"#,
            Class::GenericError,
            "`cont`: unknown field `now`, there are no fields",
        ),
        (
            r#"{"execute":"fault","arguments":{"device":"d","kind":"fire"}}"#,
            Class::GenericError,
            "`fault`: unknown variant `fire`, expected one of `drop`, `delay`, `truncate`, `extend`, \
             `transaction-id`, `spoil`, `corrupt-ring`, `stall`, `rescind`, `message`, `slow-disk`, \
             `failing-disk`, `torn-writes`, `lossy-network`",
        ),
        (
            r#"{"execute":"fault","arguments":{"device":"d","kind":"stall","bytes":1}}"#,
            Class::GenericError,
            "`fault`: unknown field `bytes`, there are no fields",
        ),
    ] {
        let expected = Failure {
            class,
            desc: sentence.into(),
        };
        assert_eq!(failure(line), expected, "{line}");
    }
}

#[test]
fn an_error_has_the_id_of_its_request() {
    let response = Request::parse(br#"{"execute":"x","id":7}"#).unwrap_err();
    assert_eq!(
        response.to_json(),
        json!({ "id": 7,
                "error": { "class": "CommandNotFound", "desc": "there is no command `x`" } })
    );
}

#[test]
fn events_have_the_shape_of_qemus() {
    let event = TimedEvent {
        event: Event::Shutdown {
            guest: true,
            reason: Reason::GuestShutdown,
        },
        timestamp: Timestamp {
            seconds: 5,
            microseconds: 7,
        },
    };
    let json = serde_json::to_value(&event).unwrap();
    assert_eq!(
        json,
        json!({ "event": "SHUTDOWN", "data": { "guest": true, "reason": "guest-shutdown" },
                "timestamp": { "seconds": 5, "microseconds": 7 } })
    );
    assert_eq!(serde_json::from_value::<TimedEvent>(json).unwrap(), event);
    let panicked = Event::GuestPanicked {
        parameters: [1, 2, 3, 4, 5],
        message: Some("it broke".into()),
    };
    assert_eq!(
        serde_json::to_value(panicked).unwrap(),
        json!({ "event": "GUEST_PANICKED",
                "data": { "parameters": [1, 2, 3, 4, 5], "message": "it broke" } })
    );
    assert_eq!(
        serde_json::to_value(Event::Stop {}).unwrap(),
        json!({ "event": "STOP", "data": {} })
    );
}

/// Values of any shape, with the words of commands among them.
fn any_value() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        Just("execute".to_owned()),
        Just("arguments".to_owned()),
        Just("device".to_owned()),
        Just("kind".to_owned()),
        proptest::sample::select(Command::NAMES).prop_map(str::to_owned),
        "[a-z-]{0,8}",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((word.clone(), inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// A refusal is one line with one sentence.
fn assert_answerable(line: &[u8]) {
    if let Err(response) = Request::parse(line) {
        let failure = response.result.expect_err("a line that is refused fails");
        assert!(!failure.desc.is_empty() && !failure.desc.contains('\n'));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_command_or_refused_with_a_sentence(line: Vec<u8>) {
        assert_answerable(&line);
    }

    #[test]
    fn any_json_is_a_command_or_refused_with_a_sentence(value in any_value()) {
        assert_answerable(value.to_string().as_bytes());
    }

    #[test]
    fn any_arguments_are_taken_or_refused_with_a_sentence(
        name in proptest::sample::select(Command::NAMES),
        arguments in any_value(),
        id in any_value(),
    ) {
        let line = json!({ "execute": name, "arguments": arguments, "id": id }).to_string();
        match Request::parse(line.as_bytes()) {
            Ok(request) => prop_assert_eq!(request.command.name(), name),
            Err(response) => prop_assert_eq!(response.id, Some(id)),
        }
        assert_answerable(line.as_bytes());
    }
}
