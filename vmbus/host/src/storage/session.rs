//! The order of the protocol: what a packet comes to, and when commands may come (spec storvsc.md 3).
//!
//! It does no I/O: it takes requests and makes verdicts.

use super::vstor::{
    Address, MAX_PACKET, NtStatus, Operation, Properties, ProtocolVersion, Reply, Request, Srb,
};

/// How far guest and host have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Begin,
    Version,
    Properties(ProtocolVersion),
    End(ProtocolVersion),
    Ready(ProtocolVersion),
}

/// What a packet comes to.
#[derive(Clone, Copy, Debug)]
pub enum Verdict {
    /// Answer with this.
    Reply(Reply),
    /// It came at the wrong time or asks for what there is not: answer with this.
    Refuse(Reply),
    /// Offer so many sub-channels and answer with this.
    SubChannels(u16, Reply),
    /// A new guest begins with commands: answer with this.
    Begin(Reply),
    /// Have the command done.
    Execute(Srb, ProtocolVersion),
    /// Give up what this unit is doing, or what all of them are doing; when it has ended, answer with this.
    Reset(Option<Address>, Reply),
}

/// A conversation with one guest, over all channels of one controller.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    state: State,
    properties: Properties,
    /// Sub-channels have been made.
    has_sub_channels: bool,
}

impl Session {
    /// A conversation that has not begun.
    pub const fn new(properties: Properties) -> Self {
        Self {
            state: State::Begin,
            properties,
            has_sub_channels: false,
        }
    }

    /// The version that was agreed upon.
    pub const fn version(&self) -> Option<ProtocolVersion> {
        match self.state {
            State::Begin | State::Version => None,
            State::Properties(version) | State::End(version) | State::Ready(version) => {
                Some(version)
            }
        }
    }

    /// The version, once commands may come.
    pub const fn ready(&self) -> Option<ProtocolVersion> {
        match self.state {
            State::Ready(version) => Some(version),
            _ => None,
        }
    }

    /// Bytes of the answer to a packet of `length` bytes: those of the version, and before there is one as many as
    /// the guest has sent.
    pub fn reply_size(&self, length: usize) -> usize {
        match self.version() {
            Some(version) => version.packet_size(),
            None if length >= MAX_PACKET => MAX_PACKET,
            None => ProtocolVersion::V2_0.packet_size(),
        }
    }

    /// Takes what came in a packet of `length` bytes on the primary channel.
    pub fn on_primary(&mut self, request: &Request, length: usize) -> Verdict {
        let size = self.reply_size(length);
        let success = Reply::status(size, NtStatus::SUCCESS);
        match (*request, self.state) {
            (Request::BeginInitialization, State::Begin) => {
                self.state = State::Version;
                Verdict::Reply(success)
            }
            (Request::QueryProtocolVersion(version), State::Version) => {
                if ProtocolVersion::ALL.contains(&version) {
                    self.state = State::Properties(version);
                    Verdict::Reply(Reply::version(size, NtStatus::SUCCESS, version))
                } else {
                    Verdict::Reply(Reply::version(size, NtStatus::REVISION_MISMATCH, version))
                }
            }
            (Request::QueryProperties, State::Properties(version)) => {
                self.state = State::End(version);
                let mut properties = self.properties;
                if !version.has_sub_channels() {
                    properties.sub_channels = 0;
                }
                Verdict::Reply(Reply::properties(size, &properties))
            }
            (Request::EndInitialization, State::End(version)) => {
                self.state = State::Ready(version);
                Verdict::Begin(success)
            }
            (Request::CreateSubChannels(count), State::End(version) | State::Ready(version)) => {
                self.sub_channels(count, version, size)
            }
            _ => self.on_sub_channel(request, length),
        }
    }

    /// Takes what came in a packet of `length` bytes on a sub-channel, where there are only commands and resets.
    pub fn on_sub_channel(&self, request: &Request, length: usize) -> Verdict {
        let size = self.reply_size(length);
        let refuse = |status| Verdict::Refuse(Reply::status(size, status));
        let success = Reply::status(size, NtStatus::SUCCESS);
        match (*request, self.ready()) {
            (Request::ExecuteSrb(srb), Some(version)) => Verdict::Execute(srb, version),
            (Request::ResetLun(address), Some(_)) => Verdict::Reset(Some(address), success),
            (Request::ResetBus, Some(_)) => Verdict::Reset(None, success),
            (Request::Other(operation), _) if !is_of_guest(operation) => {
                refuse(NtStatus::INVALID_DEVICE_REQUEST)
            }
            _ => refuse(NtStatus::INVALID_DEVICE_STATE),
        }
    }

    fn sub_channels(&mut self, count: u16, version: ProtocolVersion, size: usize) -> Verdict {
        let refuse = |status| Verdict::Refuse(Reply::status(size, status));
        if !version.has_sub_channels() {
            return refuse(NtStatus::INVALID_DEVICE_REQUEST);
        }
        if self.has_sub_channels {
            return refuse(NtStatus::INVALID_DEVICE_STATE);
        }
        if count > self.properties.sub_channels {
            return refuse(NtStatus::INVALID_PARAMETER);
        }
        self.has_sub_channels = count != 0;
        Verdict::SubChannels(count, Reply::status(size, NtStatus::SUCCESS))
    }
}

/// Whether a guest of a SCSI controller may send this at some time.
fn is_of_guest(operation: Operation) -> bool {
    (Operation::EXECUTE_SRB..=Operation::QUERY_PROPERTIES).contains(&operation)
        || operation == Operation::CREATE_SUB_CHANNELS
}
