//! The device interfaces that hosts are known to offer, by GUID (spec vmbus.md 10).

use super::Guid;

/// Declares the interfaces and the table of their names.
macro_rules! interfaces {
    ($($constant:ident = $guid:literal, $name:literal;)+) => {
        $(#[doc = concat!("The interface of: ", $name, ".")]
        pub const $constant: Guid = Guid::literal($guid);)+

        /// Every known interface with the name that people know it by.
        pub const KNOWN: &[(Guid, &str)] = &[$(($constant, $name)),+];
    };
}

interfaces! {
    SCSI_CONTROLLER = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f", "SCSI controller";
    IDE_ACCELERATOR = "32412632-86cb-44a2-9b5c-50d1417354f5", "IDE accelerator";
    FIBRE_CHANNEL = "2f9bcc4a-0069-4af3-b76b-6fd0be528cda", "Fibre Channel";
    NETWORK = "f8615163-df3e-46c5-913f-f2d2f965ed0e", "network adapter";
    NETWORK_DIRECT = "8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501", "NetworkDirect";
    VPCI = "44c4f61d-4444-4400-9d52-802e27ede19f", "PCI pass-through";
    VIDEO = "da0a7802-e377-4aac-8e77-0558eb1073f8", "video";
    KEYBOARD = "f912ad6d-2b17-48ea-bd65-f927a61c7684", "keyboard";
    MOUSE = "cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a", "mouse";
    DYNAMIC_MEMORY = "525074dc-8985-46e2-8057-a307dc18a502", "dynamic memory";
    SHUTDOWN = "0e0b6031-5213-4934-818b-38d90ced39db", "shutdown";
    TIME_SYNC = "9527e630-d0ae-497b-adce-e80ab0175caf", "time synchronization";
    HEARTBEAT = "57164f39-9115-4e78-ab55-382f3bd5422d", "heartbeat";
    KEY_VALUE_PAIRS = "a9a0f4e7-5a45-4d96-b827-8a841e8c03e6", "key-value pairs";
    BACKUP = "35fa2e29-ea23-4236-96ae-3a6ebacba440", "backup (VSS)";
    FILE_COPY = "34d14be3-dee4-41c8-9ae7-6b174977c192", "guest file copy";
    REMOTE_DESKTOP = "276aacf4-ac15-426c-98dd-7521ad3f01fe", "remote desktop";
    REMOTE_DESKTOP_CONTROL = "f8e65716-3cb3-4a06-9a60-1889c5cccab5", "remote desktop control";
    ACTIVATION = "3375baf4-9e15-4b30-b765-67acb10d607b", "inherited activation";
    FILE_SYSTEM = "c376c1c3-d276-48d2-90a9-c04748072c60", "boot file system";
    UART = "8b60ccf6-709f-4c11-90b5-229c959a9e6a", "VMBus UART";
}

/// The name of an interface, if it is one of [`KNOWN`].
pub fn name(interface: &Guid) -> Option<&'static str> {
    KNOWN
        .iter()
        .find(|(guid, _)| guid == interface)
        .map(|&(_, name)| name)
}
