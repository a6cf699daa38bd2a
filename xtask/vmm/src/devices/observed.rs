//! A provider that is looked at whenever it has served: what its device tells the control stream, it sees here.

use vmbus::protocol::Status;
use vmbus_host::channel::HostChannel;
use vmbus_host::provider::{Link, Provider};

/// A provider, and who looks.
pub(super) struct Observed {
    provider: Box<dyn Provider>,
    look: Option<Box<dyn FnMut() + Send>>,
}

impl Observed {
    /// Nobody looks.
    pub(super) fn new(provider: Box<dyn Provider>) -> Self {
        Self {
            provider,
            look: None,
        }
    }

    /// `look` is called when the provider has done something. It must not block.
    pub(super) fn by(
        provider: impl Provider + 'static,
        look: impl FnMut() + Send + 'static,
    ) -> Self {
        Self {
            provider: Box::new(provider),
            look: Some(Box::new(look)),
        }
    }

    fn look(&mut self) {
        if let Some(look) = &mut self.look {
            look();
        }
    }
}

impl Provider for Observed {
    fn attached(&mut self, link: Link) {
        self.provider.attached(link);
    }

    fn opened(&mut self, channel: &mut HostChannel) -> Status {
        self.provider.opened(channel)
    }

    fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        self.provider.serve(now, channel);
        self.look();
    }

    fn leave(&mut self, now: u64, channel: &mut HostChannel) -> bool {
        let left = self.provider.leave(now, channel);
        self.look();
        left
    }

    fn closed(&mut self) {
        self.provider.closed();
        self.look();
    }

    fn deadline(&self) -> Option<u64> {
        self.provider.deadline()
    }
}
