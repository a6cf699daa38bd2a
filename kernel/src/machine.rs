//! The machine as an appliance sees it.

/// Everything an appliance is given.
pub struct Machine {
    pub(crate) _private: (),
}
