//! The custom resources as they are written: `IPPool`, `IPReservation`, `IPBlock`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::selector::LabelSelector;

/// API group of all of them.
pub const GROUP: &str = "margay.io";
/// Version of all of them.
pub const VERSION: &str = "v1alpha1";

/// A range of pod addresses, cut into blocks that nodes take as they need them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.blockSize) == has(oldSelf.blockSize) && (!has(self.blockSize) || self.blockSize == oldSelf.blockSize)",
    "message": "a pool's blockSize cannot change"}]))]
pub struct IpPoolSpec {
    /// The prefix, IPv4 or IPv6. It never changes; make another pool instead.
    #[schemars(extend("format" = "cidr", "x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "a pool's cidr cannot change"}]))]
    pub cidr: String,
    /// Prefix length of a block: 20-32 for IPv4 (26 unless said), 116-128 for IPv6 (122 unless said). It
    /// never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 20, max = 128))]
    pub block_size: Option<u8>,
    /// The nodes that take blocks of it; all unless said.
    #[serde(default)]
    pub node_selector: LabelSelector,
    /// The namespaces whose pods get addresses of it; all unless said.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
    /// Nothing more is given out of it. What is given out stays.
    #[serde(default)]
    pub disabled: bool,
    /// Whether a node that finds no block left may take single addresses of other nodes' blocks.
    #[serde(default = "yes")]
    pub allow_borrowing: bool,
}

fn yes() -> bool {
    true
}

/// Addresses that no pod gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IpReservationSpec {
    /// Prefixes, IPv4 and IPv6; a single address is a /32 or /128.
    #[serde(rename = "reservedCIDRs")]
    pub reserved_cidrs: Vec<String>,
}

/// Some addresses of a pool, and which node has which. Written by the agents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IpBlockSpec {
    /// The prefix; the object's name follows from it.
    pub cidr: String,
    /// The node whose block it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<String>,
    /// Raised by a node that comes back, so that a decision taken in its absence finds the object changed.
    #[serde(default)]
    #[schemars(range(max = 4_294_967_295_u32))]
    pub renewals: u32,
    /// Which node has which address, by the address's place in the block, from 0. What is not here is free.
    #[serde(default)]
    pub allocations: BTreeMap<String, Allocation>,
}

/// An address that a node has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Allocation {
    /// The node.
    pub node: String,
    /// Which of the machines that ever bore the name: it changes when a node is built anew.
    pub instance: String,
    /// What the node gave it to. None: it is kept ready for the next pod. Written after the fact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<Handle>,
}

/// What an address was given to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Handle {
    /// A pod's interface, or the node's own end of the tunnel.
    pub kind: HandleKind,
    /// The pod's namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// The pod's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The pod's uid, where the runtime said it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// CNI_CONTAINERID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container_id: String,
    /// CNI_IFNAME.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ifname: String,
    /// Seconds since 1970 by the node's clock.
    #[serde(default)]
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub allocated_at: u64,
}

/// What kind of thing has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum HandleKind {
    /// A pod's interface.
    Pod,
    /// The node's own end of the tunnel.
    Tunnel,
}

impl Handle {
    /// The node's own end of the tunnel.
    pub fn tunnel() -> Self {
        Self {
            kind: HandleKind::Tunnel,
            namespace: String::new(),
            name: String::new(),
            uid: String::new(),
            container_id: String::new(),
            ifname: String::new(),
            allocated_at: 0,
        }
    }
}

impl std::fmt::Display for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            HandleKind::Tunnel => f.write_str("tunnel"),
            HandleKind::Pod => write!(f, "pod {}/{}", self.namespace, self.name),
        }
    }
}
