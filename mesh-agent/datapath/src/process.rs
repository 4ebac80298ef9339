//! What the process does around the device: daemonising, supervision, privileges and sandbox, readiness, signals.

pub mod daemon;
pub mod kept;
pub mod linger;
pub mod notify;
pub mod privileges;
pub mod probe;
pub mod sandbox;
pub mod signals;
pub(crate) mod sockopt;
pub mod standby;
pub mod supervisor;
