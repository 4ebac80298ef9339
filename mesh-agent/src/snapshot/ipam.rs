//! Pod addresses from IPPools: what the API server says of them, in the slim form that plan and allocator need.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_ipam::block::Block;
use mesh_ipam::catalogue::Catalogue;
use mesh_ipam::object::HandleKind;

use super::ObjectRef;

/// The IPPools that a pod asks for by annotation, IPv4's and IPv6's, by name or prefix; the first with an address left counts.
pub type WantedPools = [Vec<String>; 2];

/// Pools, reservations and blocks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ipam {
    /// There is an IPPool, valid or not: nobody gives addresses of nodes' own prefixes any more.
    pub in_use: bool,
    /// The pools and reservations that are valid.
    pub catalogue: Catalogue,
    /// A Node or Pod cannot be read, so nobody can tell who is gone.
    pub incomplete: bool,
    /// Pods that ask for pools of their choice.
    pub wanted: BTreeMap<ObjectRef, WantedPools>,
    /// The blocks, by prefix.
    pub blocks: BTreeMap<IpNet, BlockView>,
}

/// An IPBlock without what changes with every pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockView {
    /// The node whose block it is.
    pub affinity: Option<String>,
    /// Addresses of it that another node has, by that node.
    pub guests: BTreeMap<IpAddr, String>,
    /// Addresses that are a node's own end of the tunnel.
    pub tunnels: BTreeMap<IpAddr, String>,
    /// Every node that has an address of it.
    pub holders: BTreeSet<String>,
    /// It is a block as a pool would have it, or what a pool that is gone left in a range of the mesh. Any other leads no
    /// packet anywhere: an agent may make blocks, and must not thereby get what is not a pool's.
    pub counts: bool,
}

impl From<&Block> for BlockView {
    fn from(block: &Block) -> Self {
        let mut out = Self { affinity: block.affinity.clone(), ..Self::default() };
        for (ip, entry) in &block.allocations {
            out.holders.insert(entry.node.clone());
            if block.affinity.as_ref() != Some(&entry.node) {
                out.guests.insert(*ip, entry.node.clone());
            }
            if entry.handle.as_ref().is_some_and(|handle| handle.kind == HandleKind::Tunnel) {
                out.tunnels.insert(*ip, entry.node.clone());
            }
        }
        out
    }
}

impl Ipam {
    /// The blocks that are this node's.
    pub fn blocks_of<'a>(&'a self, node: &'a str) -> impl Iterator<Item = IpNet> + 'a {
        self.blocks
            .iter()
            .filter(move |(_, block)| block.affinity.as_deref() == Some(node))
            .map(|(cidr, _)| *cidr)
    }

    /// Those of them that are routed to it as a whole.
    pub fn routed_to<'a>(&'a self, node: &'a str) -> impl Iterator<Item = IpNet> + 'a {
        self.blocks_of(node).filter(|cidr| self.blocks.get(cidr).is_some_and(|block| block.counts))
    }

    /// The blocks that count.
    pub fn counting(&self) -> impl Iterator<Item = &BlockView> {
        self.blocks.values().filter(|block| block.counts)
    }
}
