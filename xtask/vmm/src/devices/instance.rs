//! Instance GUIDs of devices that a VM can have several of: from their names, so that they are the same in each run.

use uuid::Uuid;
use vmbus::protocol::Guid;

use crate::config::Kind;

/// The name space of these GUIDs (RFC 9562, 5.5).
const NAMES: Uuid = Uuid::from_u128(0x4f3a_1c5e_9d27_4b60_8e55_1f6b_0a7c_d2e9);

/// The instance of the device of this name.
pub(super) fn of(kind: Kind, name: &str) -> Guid {
    let text = format!("{}/{name}", kind.name());
    Guid(Uuid::new_v5(&NAMES, text.as_bytes()).to_bytes_le())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_that_of_its_kind_and_name_in_each_run() {
        let disk = of(Kind::Scsi, "disk0");
        assert_eq!(disk.to_string(), "9374b64c-4403-5bd0-b656-b0a1536545c8");
        assert_ne!(disk, of(Kind::Scsi, "disk1"));
        assert_ne!(disk, of(Kind::Net, "disk0"));
    }
}
