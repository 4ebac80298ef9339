//! `GET /v1/ipam` → [`Usage`]; `GET /v1/ipam/check` → [`Check`]; on the control socket only,
//! `POST /v1/ipam/release?ip=…` → [`Released`], or an error with a [`ReleaseRefused`].

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::status::Issue;

/// How much of what is in use.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// The pools, by name.
    pub pools: Vec<PoolUsage>,
    /// The blocks, in the order of their addresses.
    pub blocks: Vec<BlockUsage>,
    /// Pools, reservations and blocks that are wrong.
    pub issues: Vec<Issue>,
}

/// One pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolUsage {
    /// The IPPool's name; empty for the blocks that are in no pool (any more).
    pub name: String,
    /// Its range.
    pub cidr: Option<IpNet>,
    /// Nothing more is given out of it.
    pub disabled: bool,
    /// Its addresses; absent for more than a `u64` counts.
    pub size: Option<u64>,
    /// Its blocks.
    pub blocks: u64,
    /// Addresses in the sum of its blocks.
    pub counts: Counts,
}

/// What the addresses of a block or pool are used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Given to pods.
    pub pods: u64,
    /// Nodes' own ends of the tunnel.
    pub tunnels: u64,
    /// Kept ready by a node.
    pub ready: u64,
    /// Of pods', tunnels' and ready ones: of another node than the block's.
    pub borrowed: u64,
    /// Of the blocks' addresses: nobody's.
    pub free: u64,
    /// Of the free ones: never given, by a reservation or as an edge of the pool.
    pub reserved: u64,
}

/// One block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BlockUsage {
    /// The IPBlock's prefix.
    pub cidr: IpNet,
    /// The IPPool it is in.
    pub pool: Option<String>,
    /// The node it belongs to.
    pub node: Option<String>,
    /// What its addresses are used for.
    pub counts: Counts,
}

/// What does not fit together.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Blocks looked at.
    pub blocks: u64,
    /// Addresses given to pods and tunnels, by the blocks.
    pub allocated: u64,
    /// Addresses kept ready.
    pub ready: u64,
    /// Pods with an address of a pool.
    pub pods: u64,
    /// What is wrong, by address.
    pub findings: Vec<Finding>,
}

/// One address that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The address.
    pub ip: IpAddr,
    /// What is wrong with it.
    pub kind: FindingKind,
    /// A sentence for people.
    pub message: String,
}

/// What can be wrong with an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FindingKind {
    /// Nobody uses it, and it is not free. It will be freed once this has lasted.
    Leaked,
    /// Two pods have it, or a pod and another pod's handle, or two blocks.
    Twice,
    /// It is given out and in no pool.
    OutsidePools,
    /// It is given out although it is reserved now.
    Reserved,
    /// A pod has it, and no block says so.
    NotInBlock,
}

/// An address that is free now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Released {
    /// The address.
    pub ip: IpAddr,
    /// Its block, if there is one.
    pub block: Option<IpNet>,
    /// The node that had it; absent if it was free before.
    pub node: Option<String>,
    /// What it had been given to.
    pub handle: Option<String>,
}

/// An address that is not freed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseRefused {
    /// The address.
    pub ip: IpAddr,
    /// Why.
    pub reason: String,
}
