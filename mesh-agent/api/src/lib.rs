//! What mesh-agent says over its sockets, for every program that asks: serde types only.

pub mod cni;
pub mod defaults;
pub mod ipam;
pub mod status;
