//! WireGuard's device model and its cross-platform UAPI (<https://www.wireguard.com/xplatform/>).
//!
//! `device` is what a device is and the operations on it, `codec` reads and writes the UAPI's text,
//! `client` talks to a socket. The server side is mesh-datapath's.

pub mod client;
pub mod codec;
pub mod device;
pub mod stats;

pub use client::{Client, ClientError};
pub use codec::CodecError;
pub use device::{Device, Op, Peer, PeerUpdate};
pub use stats::{Offload, PeerStats, Stats};
