//! Whom to believe: a pure function from claims, authorities and memory to peers and refusals.
//!
//! The incumbent stays, the newcomer in conflict is refused with a reason, and only a tie at a cold start
//! fails both closed. In full:
//!
//! * A Node's **authority** (spec and status, which an announcement cannot write) beats any announcement:
//!   announced prefixes count only where the authority names none, and a prefix backed by an authority
//!   wins even against an incumbent that merely announced it.
//! * Among equals the **incumbent** wins: first who held the very key, prefix or address before, then whoever
//!   is known at all. What a Node holds stays its own while its claim is missing, illegible or refused.
//! * A tie goes to nobody, neither to those in it nor to anyone of lower standing.
//! * A **newcomer** is admitted whole or not at all. An incumbent whose changed claim is contested
//!   loses only the contested part (a notice), and is refused when nothing of it is left.
//! * A Node whose UID changed was rebuilt: the authority says it is another one, so it is a newcomer.
//! * A node with no prefix is admitted: its addresses are still reached through the tunnel.
//! * A contested or unusable **address** or endpoint never costs a node its admission; it is left out with a
//!   notice.

mod contest;
mod incumbents;
mod judge;
mod party;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::announcement::{Announcement, AnnouncementKey, KeyClaim};
use crate::key::PublicKey;

pub use incumbents::{IncumbentsError, IncumbentsProblem};

/// The words in [`Refusal::reason`].
pub mod reason {
    /// The name is this node's but the keys are not, or one name came with several claims.
    pub const NAME_TAKEN: &str = "NameTaken";
    /// No key, more than two, or twice the same.
    pub const INVALID_KEYS: &str = "InvalidKeys";
    /// A key with which every tunnel has the same, known secret (RFC 7748 section 6.1).
    pub const LOW_ORDER_KEY: &str = "LowOrderKey";
    /// Another node has the key.
    pub const DUPLICATE_KEY: &str = "DuplicateKey";
    /// A prefix outside the cluster's pools.
    pub const FOREIGN_PREFIX: &str = "ForeignPrefix";
    /// Another node has the prefix, or a part of it.
    pub const OVERLAPPING_PREFIX: &str = "OverlappingPrefix";
    /// Another node has the address. Only a notice.
    pub const DUPLICATE_ADDRESS: &str = "DuplicateAddress";
    /// An address or endpoint inside the pools, where only pods are. Only a notice.
    pub const ADDRESS_IN_POOL: &str = "AddressInPool";
    /// An address that is not that of one host. Only a notice.
    pub const INVALID_ADDRESS: &str = "InvalidAddress";
    /// Not signed, or not for this Node, where announcements are trusted on first use.
    pub const UNSIGNED: &str = "UnsignedAnnouncement";
    /// Signed with another key than the first one seen of this Node.
    pub const KEY_CHANGED: &str = "AnnouncementKeyChanged";
}

/// What the Node object (spec and status, which an announcement cannot write) says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Authority {
    /// `metadata.uid`, where the source has one.
    pub uid: Option<String>,
    /// `spec.podCIDRs`, at most one per family.
    pub pod_cidrs: Vec<IpNet>,
    /// `status.addresses` of types InternalIP and ExternalIP.
    pub addresses: Vec<IpAddr>,
}

/// One node's claim beside what its authority says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// What the node says of itself.
    pub announcement: Announcement,
    /// What its Node object says.
    pub authority: Authority,
    /// Who signed the announcement for that object ([`Announcement::signer`]), if somebody has to.
    pub signer: Option<AnnouncementKey>,
}

/// A node this one has admitted before; survives restarts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Incumbent {
    /// The Node's UID when it was admitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Its keys.
    pub keys: Vec<PublicKey>,
    /// Its prefixes.
    pub pod_cidrs: Vec<IpNet>,
    /// Its addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The key that signed the first announcement of the Node with this UID, or the one trusted since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announcement_key: Option<AnnouncementKey>,
}

/// Everyone this node has admitted, by Node name; this node itself is among them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incumbents(pub BTreeMap<String, Incumbent>);

/// The constants of one admission.
#[derive(Debug, Clone, Default)]
pub struct Rules<'a> {
    /// This node's name.
    pub own_name: &'a str,
    /// This node's keys.
    pub own_keys: &'a [PublicKey],
    /// The cluster's pod ranges; a prefix outside all of them is foreign.
    pub pools: &'a [IpNet],
    /// Node objects without a legible announcement. They are never admitted, but what they hold, by
    /// memory or authority, stays theirs.
    pub silent: BTreeMap<String, Authority>,
    /// Announcements are believed by the key that signs them: the first one seen of a Node, or one of these, by name. `None`
    /// where the API server sees to it that nobody speaks for another.
    pub first_use: Option<&'a BTreeMap<String, AnnouncementKey>>,
    /// Whether every source has been read once. Until then an incumbent without a Node object may
    /// still appear and keeps what it holds; after it, the Node is gone and is forgotten.
    pub synced: bool,
}

/// A node believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// The Node's name.
    pub name: String,
    /// Its keys, newest epoch first.
    pub keys: Vec<KeyClaim>,
    /// The prefixes it owns; disjoint from every other admitted node's.
    pub pod_cidrs: Vec<IpNet>,
    /// Endpoint candidates, best first.
    pub endpoints: Vec<SocketAddr>,
    /// Its addresses from the authority; no other admitted node has them.
    pub addresses: Vec<IpAddr>,
}

/// A claim, or a part of one, refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    /// The Node whose claim it was.
    pub name: String,
    /// A CamelCase word for programs, one of those in [`reason`].
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// What [`admit`] decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Admission {
    /// The peers, by name order. Never this node itself.
    pub admitted: Vec<Admitted>,
    /// This node by the same rules, once its own Node object is known: without prefixes when they were
    /// refused it, which `refused` then says under its own name.
    pub own: Option<Admitted>,
    /// The refused, by name order.
    pub refused: Vec<Refusal>,
    /// Parts refused of nodes that were admitted all the same, by name order.
    pub notices: Vec<Refusal>,
    /// What to remember for next time.
    pub incumbents: Incumbents,
}

/// Decides. Total: every claim ends in `admitted`, in `refused`, or is this node's own.
///
/// The order of `claims` does not matter, and deciding again with the `incumbents` of the result gives the
/// same result, but that a refusal for several losses may name another of them.
pub fn admit(claims: &[Claim], incumbents: &Incumbents, rules: &Rules<'_>) -> Admission {
    judge::judge(claims, incumbents, rules)
}
