//! Identifiers of the objects that a guest queries and sets (spec netvsc.md 7.4; NDIS's documentation of the OIDs).

macro_rules! oids {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)+) => {
        $($(#[$doc])* pub const $name: u32 = $value;)+

        /// All that can be queried or set, in order.
        pub const ALL: &[u32] = &[$($name),+];
    };
}

oids! {
    /// This list.
    SUPPORTED_LIST = 0x0001_0101;
    /// Ready.
    HARDWARE_STATUS = 0x0001_0102;
    /// 802.3.
    MEDIA_SUPPORTED = 0x0001_0103;
    /// 802.3.
    MEDIA_IN_USE = 0x0001_0104;
    /// Bytes of a frame that a client may look at.
    MAXIMUM_LOOKAHEAD = 0x0001_0105;
    /// The MTU.
    MAXIMUM_FRAME_SIZE = 0x0001_0106;
    /// In units of 100 bit/s.
    LINK_SPEED = 0x0001_0107;
    /// Bytes of buffers for frames to send.
    TRANSMIT_BUFFER_SPACE = 0x0001_0108;
    /// Bytes of buffers for received frames.
    RECEIVE_BUFFER_SPACE = 0x0001_0109;
    /// Bytes that a frame to send takes at least.
    TRANSMIT_BLOCK_SIZE = 0x0001_010A;
    /// Bytes that a received frame takes at least.
    RECEIVE_BLOCK_SIZE = 0x0001_010B;
    /// Who made it.
    VENDOR_ID = 0x0001_010C;
    /// What it is.
    VENDOR_DESCRIPTION = 0x0001_010D;
    /// Which frames the guest wants.
    CURRENT_PACKET_FILTER = 0x0001_010E;
    /// Bytes of a frame that a client looks at.
    CURRENT_LOOKAHEAD = 0x0001_010F;
    /// The version of NDIS.
    DRIVER_VERSION = 0x0001_0110;
    /// Bytes of the longest frame.
    MAXIMUM_TOTAL_SIZE = 0x0001_0111;
    /// Special features.
    MAC_OPTIONS = 0x0001_0113;
    /// Whether the cable is in.
    MEDIA_CONNECT_STATUS = 0x0001_0114;
    /// Frames in one message.
    MAXIMUM_SEND_PACKETS = 0x0001_0115;
    /// The version of the host's driver.
    VENDOR_DRIVER_VERSION = 0x0001_0116;
    /// Whether interrupts are held back: they are not.
    INTERRUPT_MODERATION = 0x0001_0209;
    /// What receive side scaling can do.
    RECEIVE_SCALE_CAPABILITIES = 0x0001_0203;
    /// How to scale; set only.
    RECEIVE_SCALE_PARAMETERS = 0x0001_0204;
    /// The state of the link.
    LINK_STATE = 0x0001_0207;
    /// Sets something by name.
    RNDIS_CONFIG_PARAMETER = 0x0001_021B;
    /// Frames sent.
    XMIT_OK = 0x0002_0101;
    /// Frames received.
    RCV_OK = 0x0002_0102;
    /// Frames not sent.
    XMIT_ERROR = 0x0002_0103;
    /// Frames received with errors.
    RCV_ERROR = 0x0002_0104;
    /// Frames that there was no room for.
    RCV_NO_BUFFER = 0x0002_0105;
    /// The card's name.
    FRIENDLY_NAME = 0x0002_0216;
    /// The address that the card was made with.
    PERMANENT_ADDRESS = 0x0101_0101;
    /// The address that it has.
    CURRENT_ADDRESS = 0x0101_0102;
    /// Groups that the guest is in.
    MULTICAST_LIST = 0x0101_0103;
    /// How many there may be.
    MAXIMUM_LIST_SIZE = 0x0101_0104;
    /// Encapsulation for large sends of the first sort; set only.
    TCP_OFFLOAD_ENCAPSULATION = 0x0101_010A;
    /// Frames received with broken alignment.
    RCV_ERROR_ALIGNMENT = 0x0102_0101;
    /// Frames sent after one collision.
    XMIT_ONE_COLLISION = 0x0102_0102;
    /// Frames sent after several.
    XMIT_MORE_COLLISIONS = 0x0102_0103;
    /// What is left to the card now.
    TCP_OFFLOAD_CURRENT_CONFIG = 0xFC01_020B;
    /// Sets what is left to the card.
    TCP_OFFLOAD_PARAMETERS = 0xFC01_020C;
    /// What can be left to it.
    TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xFC01_020D;
}
