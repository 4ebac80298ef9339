//! What the process does around the device: daemonising, privileges, readiness, signals.

pub mod daemon;
pub mod notify;
pub mod privileges;
pub mod signals;
pub(crate) mod sockopt;
