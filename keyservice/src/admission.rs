//! Whom to believe: a pure function from claims, authorities and memory to peers and refusals.
//!
//! The incumbent stays, the newcomer in conflict is refused with a reason, and only a tie at a cold start
//! without an authority fails both closed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::announcement::{Announcement, KeyClaim};
use crate::key::PublicKey;

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
}

/// A node this one has admitted before; survives restarts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Incumbent {
    /// The Node's UID when it was admitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Its keys.
    pub keys: Vec<PublicKey>,
    /// Its prefixes.
    pub pod_cidrs: Vec<IpNet>,
}

/// Everyone this node has admitted, by Node name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incumbents(pub BTreeMap<String, Incumbent>);

/// The constants of one admission.
#[derive(Debug, Clone)]
pub struct Rules<'a> {
    /// This node's name.
    pub own_name: &'a str,
    /// This node's keys.
    pub own_keys: &'a [PublicKey],
    /// The cluster's pod ranges; a prefix outside all of them is foreign.
    pub pools: &'a [IpNet],
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
    pub endpoints: Vec<std::net::SocketAddr>,
    /// Its addresses from the authority.
    pub addresses: Vec<IpAddr>,
}

/// A claim refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The Node whose claim it was.
    pub name: String,
    /// A CamelCase word for programs: DuplicateKey, OverlappingPrefix, ForeignPrefix, NameTaken,
    /// LowOrderKey, NoPrefix …
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// What [`admit`] decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Admission {
    /// The peers, by name order. Never this node itself.
    pub admitted: Vec<Admitted>,
    /// The refused, by name order.
    pub refused: Vec<Refusal>,
    /// What to remember for next time.
    pub incumbents: Incumbents,
}

/// Decides. Total: every claim ends in `admitted`, in `refused`, or is this node's own.
pub fn admit(claims: &[Claim], incumbents: &Incumbents, rules: &Rules<'_>) -> Admission {
    let _ = (claims, rules);
    Admission { incumbents: incumbents.clone(), ..Admission::default() }
}
