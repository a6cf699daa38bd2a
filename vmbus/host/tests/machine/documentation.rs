//! docs/kmcl.md: it has every function, callback and constant of the C interface, each marked, and the tests that it
//! names exist. Its example is a driver that works.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmbus::kmcl::State;
use vmbus_host::bus::{Device, Profile};
use vmbus_host::channel::HostChannel;
use vmbus_host::provider::Provider;

use crate::support::{INSTANCE, Vm};

#[path = "../../../../docs/thermometer.rs"]
mod thermometer;

const DOCUMENT: &str = include_str!("../../../../docs/kmcl.md");
const EXAMPLE: &str = include_str!("../../../../docs/thermometer.rs");

/// Every row of a table whose first cell is a name in code type: its cells.
fn rows() -> Vec<Vec<&'static str>> {
    DOCUMENT
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// The one row of this name.
fn row(name: &str) -> Vec<&'static str> {
    let quoted = format!("`{name}`");
    let mut rows = rows();
    rows.retain(|cells| cells[0] == quoted);
    assert_eq!(rows.len(), 1, "rows of {name}");
    rows.remove(0)
}

/// What is in code type in a text.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The tests that a text names, as `FILE.rs::NAME`.
fn tests(text: &str) -> impl Iterator<Item = (&str, &str)> {
    code(text).filter_map(|name| {
        let (file, test) = name.split_once(".rs::")?;
        Some((file, test))
    })
}

/// Where a file is that the document names without its first folders.
fn source(file: &str) -> PathBuf {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = format!("{file}.rs");
    let near = host.join("tests").join(&file);
    if near.exists() {
        near
    } else {
        host.join("../..").join(file)
    }
}

/// Whether a source has this test: a function with the attribute, or a row of the state table.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let function = format!("fn {name}(");
    let row = format!("{name} (calls::");
    lines.iter().enumerate().any(|(at, line)| {
        let above = &lines[at.saturating_sub(6)..at];
        let above: Vec<_> = above
            .iter()
            .rev()
            .take_while(|line| **line != "}")
            .collect();
        line.starts_with(&row)
            || (line.starts_with(&function) && above.iter().any(|line| **line == "#[test]"))
    })
}

#[test]
fn every_test_that_is_named_exists() {
    let named: BTreeSet<_> = tests(DOCUMENT).collect();
    assert!(!named.is_empty());
    let missing: Vec<_> = named
        .into_iter()
        .filter(|(file, test)| {
            let source = fs::read_to_string(source(file)).unwrap_or_default();
            !has_test(&source, test)
        })
        .collect();
    assert_eq!(missing, [], "no such tests");
}

/// Status and tests of a row: whether it works, which the row must say in so many words.
fn works(name: &str, cells: &[&str]) -> bool {
    let [.., status, shown] = cells else {
        panic!("{name} has no cells");
    };
    assert!(tests(shown).next().is_some(), "no test shows {name}");
    if status.starts_with("works") {
        return true;
    }
    let reason = status.strip_prefix("not applicable: ");
    assert!(
        reason.is_some_and(|reason| !reason.is_empty()),
        "{name} is not marked: {status:?}"
    );
    false
}

#[cfg(target_arch = "x86_64")]
mod c_interface {
    use vmbus::kmcl::abi::{self, Interface};

    use super::{row, rows, works};

    #[test]
    fn every_function_is_marked_and_stands_where_the_table_has_it() {
        for function in abi::FUNCTIONS {
            let cells = row(function.name);
            let place = match function.interface {
                Interface::Client { version, slot } => format!("V{version}, {slot}"),
                Interface::Server { version, slot } => format!("server V{version}, {slot}"),
                Interface::Linked => "linked".into(),
                Interface::Extension => "extension".into(),
            };
            assert_eq!(cells[1], place, "{}", function.name);
            assert_ne!(cells[2], "", "the Rust name of {}", function.name);
            assert_eq!(
                works(function.name, &cells),
                function.applies_to_guest,
                "{}",
                function.name
            );
        }
        for initialiser in [
            "VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT",
            "VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT_V5",
        ] {
            assert!(works(initialiser, &row(initialiser)));
        }
    }

    #[test]
    fn every_callback_is_marked() {
        let callbacks = || {
            abi::CALLBACKS
                .iter()
                .filter(|it| it.name.starts_with("EVT_VMB_"))
        };
        assert_eq!(callbacks().count(), 21);
        for callback in callbacks() {
            let server = callback.name.contains("SAVE_") || callback.name.contains("RESTORE_");
            let works = works(callback.name, &row(callback.name));
            assert_eq!(works, !server, "{}", callback.name);
        }
    }

    #[test]
    fn every_constant_is_marked_and_has_its_value() {
        for constant in abi::CONSTANTS {
            let cells = row(constant.name);
            let value = cells[1];
            let parsed = match value.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => value.parse(),
            };
            assert_eq!(parsed, Ok(constant.value), "{}", constant.name);
            if constant.ty != "NTSTATUS" && !constant.name.contains("_VERSION") {
                works(constant.name, &cells);
            }
        }
    }

    /// What is in no list of the interface is not in the document either.
    #[test]
    fn nothing_is_described_that_is_not_there() {
        for cells in rows() {
            let name = cells[0].trim_matches('`');
            let known = abi::FUNCTIONS.iter().any(|it| it.name == name)
                || abi::CALLBACKS.iter().any(|it| it.name == name)
                || abi::CONSTANTS.iter().any(|it| it.name == name)
                || name.starts_with("VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT");
            assert!(known, "{name}");
        }
    }
}

/// A host that agrees to every version.
struct Agreeable;

impl Provider for Agreeable {
    fn serve(&mut self, _now: u64, channel: &mut HostChannel) {
        for packet in channel.receive_all().unwrap() {
            assert_eq!(packet.payload, b"version1");
            let request = packet.transaction.unwrap();
            channel.complete(request, b"accepted").unwrap();
        }
    }
}

#[test]
fn the_example_is_the_driver_in_the_document() {
    let block = DOCUMENT
        .split("```rust\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next());
    assert_eq!(block, Some(EXAMPLE));
}

#[test]
fn the_example_works() {
    let vm = Vm::new(Profile::openvmm());
    let device = Device::new(thermometer::INTERFACE, INSTANCE);
    let id = vm.machine.add(device, Agreeable).unwrap();
    vm.connect();
    let driver = Arc::new(thermometer::Thermometer::default());
    let channel = driver.enable(vm.vmbus.client()).unwrap();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Active);
    vm.send_all(id, [21, 22]);
    assert_eq!(driver.last(), Some(22));
    vm.machine.rescind(id);
    vm.machine.settle();
    assert_eq!(driver.last(), None);
    vm.assert_well_behaved();
}
