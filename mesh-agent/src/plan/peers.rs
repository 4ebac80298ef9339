//! The peers of the mesh device and what each owns.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use keyservice::PublicKey;
use mesh_api::status::Issue;

use super::addresses::Addresses;
use super::members::Members;
use super::{endpoint, host_prefix, issue};
use crate::desired::{WireguardDevice, WireguardPeer};
use crate::snapshot::Snapshot;

/// The peers, and which of their prefixes are for pods and which are the nodes' own.
#[derive(Default)]
pub(super) struct Peers {
    by_key: BTreeMap<PublicKey, WireguardPeer>,
    /// Prefixes and single addresses of remote pods.
    pub(super) pod_prefixes: BTreeSet<IpNet>,
    /// Remote nodes' own addresses.
    pub(super) node_addresses: BTreeSet<IpAddr>,
}

impl Peers {
    /// Gives each admitted node its allowed IPs: prefixes, then its own addresses, then its pods' other ones.
    pub(super) fn build(
        snapshot: &Snapshot,
        members: &Members,
        addresses: &Addresses,
        issues: &mut Vec<Issue>,
    ) -> Self {
        let mut out = Self::default();
        let mut owners = ours(snapshot, members);
        for (name, admitted) in &members.peers {
            let Some(key) = admitted.keys.first() else { continue };
            let node = snapshot.cluster.nodes.get(name);
            let mut allowed_ips = BTreeSet::new();
            let mut take = |prefix: IpNet| {
                let owner = owners.entry(prefix).or_insert(name);
                if *owner != name {
                    let message = format!("{prefix} belongs to node {owner}");
                    issues.push(issue(format!("Node/{name}"), "", "OverlappingPrefix", message));
                    return false;
                }
                allowed_ips.insert(prefix);
                true
            };
            let exceptions = addresses.exceptions.get(name).into_iter().flatten();
            for prefix in admitted.pod_cidrs.iter().copied().chain(exceptions.map(|ip| host_prefix(*ip))) {
                if take(prefix) {
                    out.pod_prefixes.insert(prefix);
                }
            }
            let internal = node.map(|node| node.internal_ips.as_slice()).unwrap_or_default();
            for ip in internal.iter().filter(|ip| admitted.addresses.contains(ip)) {
                if take(host_prefix(*ip)) {
                    out.node_addresses.insert(*ip);
                }
            }
            let endpoint = endpoint::choose(snapshot, admitted, node, issues);
            let learned = endpoint::learned(snapshot, &key.public_key);
            let peer = WireguardPeer {
                name: name.clone(),
                endpoint,
                learned: endpoint.is_some() && endpoint == learned,
                reach: snapshot.local.reach.get(&key.public_key).cloned().unwrap_or_default(),
                allowed_ips,
                persistent_keepalive: snapshot.cluster.mesh.persistent_keepalive,
            };
            out.by_key.insert(key.public_key, peer);
        }
        out
    }

    /// The mesh device; `None` while this node has no key.
    pub(super) fn device(&self, snapshot: &Snapshot) -> Option<WireguardDevice> {
        Some(WireguardDevice {
            public_key: snapshot.local.public_key?,
            listen_port: snapshot.cluster.mesh.listen_port,
            fwmark: 0,
            peers: self.by_key.clone(),
        })
    }

    /// Everything remote nodes own.
    pub(super) fn all_prefixes(&self) -> BTreeSet<IpNet> {
        self.by_key.values().flat_map(|peer| peer.allowed_ips.iter().copied()).collect()
    }
}

/// What no peer may have.
fn ours<'a>(snapshot: &'a Snapshot, members: &'a Members) -> BTreeMap<IpNet, &'a String> {
    let own = &members.own;
    let pods = snapshot.endpoints.values().flat_map(|endpoint| &endpoint.ips);
    let addresses = own.addresses.iter().chain(&own.tunnel_addresses).chain(pods).copied().map(host_prefix);
    let prefixes = own.pod_cidrs.iter().copied();
    addresses.chain(prefixes).map(|prefix| (prefix, &snapshot.local.node_name)).collect()
}
