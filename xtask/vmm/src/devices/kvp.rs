//! Key-value pairs, in the terms of the control stream.

use std::net::IpAddr;

use vmbus_host::integration::Kvp;
use vmbus_host::integration::kvp::{self, Entry, Network, Pool, Value};

use super::Counters;
use super::integration::Integration;
use crate::control::{self, Failure, IpInformation, IpSettings, KvpItem, KvpItems, KvpValue};

pub(super) fn build() -> Integration<Kvp> {
    Integration::new(Kvp::new(), |_| Counters::new())
}

pub(super) fn pool(pool: control::Pool) -> Pool {
    match pool {
        control::Pool::External => Pool::External,
        control::Pool::Guest => Pool::Guest,
        control::Pool::Auto => Pool::Auto,
        control::Pool::AutoExternal => Pool::AutoExternal,
        control::Pool::AutoInternal => Pool::AutoInternal,
    }
}

/// A value for the guest.
pub(super) fn value(value: &KvpValue) -> Value {
    match value {
        KvpValue::Text(text) => Value::Text(text.clone()),
        KvpValue::Number(number) => match u32::try_from(*number) {
            Ok(number) => Value::U32(number),
            Err(_) => Value::U64(*number),
        },
    }
}

/// A value of the guest's. One of a type that nobody knows is shown as its bytes.
pub(super) fn shown(value: Value) -> KvpValue {
    match value {
        Value::Text(text) | Value::Expandable(text) => KvpValue::Text(text),
        Value::U32(number) => KvpValue::Number(u64::from(number)),
        Value::U64(number) => KvpValue::Number(number),
        Value::Other { kind, bytes } => KvpValue::Text(format!("type {kind}: {bytes:02x?}")),
    }
}

pub(super) fn items(entries: Vec<Entry>) -> KvpItems {
    let items = entries.into_iter();
    KvpItems {
        items: items
            .map(|Entry { key, value }| KvpItem {
                key,
                value: shown(value),
            })
            .collect(),
    }
}

/// The addresses that a network adapter is to have.
///
/// # Errors
/// When one is no address.
pub(super) fn settings(
    adapter: String,
    settings: &IpSettings,
) -> Result<kvp::IpInformation, Failure> {
    let parse = |text: &String| text.parse::<Network>().map_err(Failure::generic);
    Ok(kvp::IpInformation {
        adapter,
        dhcp: settings.dhcp,
        addresses: settings
            .addresses
            .iter()
            .map(parse)
            .collect::<Result<_, _>>()?,
        gateways: settings.gateways.clone(),
        dns: settings.dns.clone(),
        unknown: Vec::new(),
    })
}

/// The addresses that a network adapter has.
pub(super) fn information(info: kvp::IpInformation) -> IpInformation {
    let texts = |addresses: &[IpAddr]| addresses.iter().map(IpAddr::to_string).collect();
    IpInformation {
        dhcp: info.dhcp,
        addresses: info.addresses.iter().map(Network::to_string).collect(),
        gateways: texts(&info.gateways),
        dns: texts(&info.dns),
        unknown: info.unknown,
    }
}
