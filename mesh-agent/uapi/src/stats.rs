//! What mesh-datapath counts beyond the UAPI's bytes.

use std::collections::BTreeMap;

use keyservice::PublicKey;

/// A reply to `get=stats`. Names are the datapath's (`mesh_datapath::counters`), so that a newer datapath
/// can count more without an older reader breaking.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// Version of the datapath that answered.
    pub version: String,
    /// The tunnel's MTU in bytes, as the datapath last saw it.
    pub mtu: u32,
    /// Packets dropped, by reason, for the whole device.
    pub drops: BTreeMap<String, u64>,
    /// Packets dropped, by reason, where the peer is known. Peers without a drop are left out.
    pub peers: BTreeMap<PublicKey, BTreeMap<String, u64>>,
}
