//! Which addresses are this node's to give, as it was last confirmed; kept on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// This node, and which of the machines that ever bore its name it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The Node's name.
    pub node: String,
    /// Made once for a state directory, at random: a node that lost its state is another instance.
    pub instance: String,
}

/// What is this node's. An address is in it only after a write that put it into a block was answered, or a
/// read has shown it there; it is taken out of it before a write takes it out of the block.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Holdings {
    /// `/proc/sys/kernel/random/boot_id` when it was written.
    pub boot: String,
    /// The Node's uid when it was last confirmed.
    pub node_uid: String,
    /// When that was, by the clock that counts from boot (CLOCK_BOOTTIME).
    pub confirmed: Option<Duration>,
    /// The addresses, each with its block.
    pub addresses: BTreeMap<IpAddr, IpNet>,
    /// Those that are the node's own ends of the tunnel.
    pub tunnels: BTreeSet<IpAddr>,
}

impl Holdings {
    /// Reads the file's bytes. Whatever is wrong with it, nothing is lost: what was this node's is in the
    /// blocks, and the first round finds it there.
    pub fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The file's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// Whether addresses of this block are here.
    pub(crate) fn has_of(&self, cidr: &IpNet) -> bool {
        self.addresses.values().any(|block| block == cidr)
    }
}

/// Where the holdings are kept.
pub trait Ledger {
    /// On return they are on disk, whole; after an error it is what it was.
    fn save(&mut self, holdings: &Holdings) -> io::Result<()>;
}
