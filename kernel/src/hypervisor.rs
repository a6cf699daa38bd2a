//! The hypervisor as an appliance can see it: what it offers, and the time.

pub use crate::hyperv::clock::{PER_SECOND, Source, now};
pub use crate::hyperv::features::{
    Capability, Features, Isolation, Limits, Privileges, Recommendations, Services, Vendor, Version,
};
pub use crate::hyperv::synic::Statistics;
