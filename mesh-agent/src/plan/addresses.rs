//! Which pod has which address, and which addresses lie outside their node's prefixes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::status::Issue;

use super::members::Members;
use super::{in_any, is_reachable, issue, tunnel_address};
use crate::snapshot::{ObjectRef, Pod, Snapshot};

/// The outcome.
#[derive(Default)]
pub(super) struct Addresses {
    /// Peers' pod addresses that none of the peer's prefixes holds, by peer.
    pub(super) exceptions: BTreeMap<String, BTreeSet<IpAddr>>,
    /// This node's pods' addresses, as their objects say.
    pub(super) own: BTreeSet<IpAddr>,
    /// Addresses a Pod object names that are not its own.
    pub(super) lost: BTreeSet<(ObjectRef, IpAddr)>,
}

/// Who has an address, in the order in which claims to it are heard.
enum Holder<'a> {
    Node(&'a str),
    Tunnel(&'a str),
    Pod(&'a ObjectRef),
}

impl std::fmt::Display for Holder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Tunnel(name) => write!(f, "node {name}'s end of the tunnel"),
            Self::Pod(pod) => write!(f, "pod {pod}"),
        }
    }
}

impl Addresses {
    /// Gives every address to one holder: nodes before pods, pods with an interface here before others,
    /// running before terminating, at home in their node's prefix before guests, then by name.
    pub(super) fn assign(snapshot: &Snapshot, members: &Members, issues: &mut Vec<Issue>) -> Self {
        let own_name = snapshot.local.node_name.as_str();
        let mut held = nodes(snapshot, members);
        for endpoint in snapshot.endpoints.values() {
            for ip in &endpoint.ips {
                held.entry(*ip).or_insert(Holder::Pod(&endpoint.pod));
            }
        }
        let mut out = Self::default();
        for (pod_ref, pod, ip) in claims(snapshot, members) {
            let object = || format!("Pod/{pod_ref}");
            match held.get(&ip) {
                None => {}
                Some(Holder::Pod(holder)) if *holder == pod_ref => {}
                Some(holder) => {
                    let message = format!("{ip} belongs to {holder}");
                    issues.push(issue(object(), "status.podIPs", "DuplicateAddress", message));
                    out.lost.insert((pod_ref.clone(), ip));
                    continue;
                }
            }
            held.insert(ip, Holder::Pod(pod_ref));
            let mesh = &snapshot.cluster.mesh;
            // Where another network plugin is in charge its ranges need not be known.
            let anywhere = mesh.external && mesh.pools.is_empty() && is_reachable(ip);
            if !anywhere && !in_any(&mesh.pools, ip) {
                let message = format!("{ip} is outside every pool, so no other node reaches it");
                issues.push(issue(object(), "status.podIPs", "AddressOutsidePools", message));
                continue;
            }
            let node = pod.node.as_deref().unwrap_or_default();
            if node == own_name {
                out.own.insert(ip);
                continue;
            }
            let Some(peer) = members.peers.get(node) else { continue };
            if !in_any(&peer.pod_cidrs, ip) {
                out.exceptions.entry(peer.name.clone()).or_default().insert(ip);
            }
        }
        // What a node took of another's block, ahead of the pod's object that will say so.
        for block in snapshot.cluster.ipam.counting().filter(|_| snapshot.cluster.ipam.in_use) {
            for (ip, name) in block.guests.iter().filter(|(_, name)| members.peers.contains_key(*name)) {
                let of_another = |(peer, ips): (&String, &BTreeSet<IpAddr>)| peer != name && ips.contains(ip);
                if !out.exceptions.iter().any(of_another) {
                    out.exceptions.entry(name.clone()).or_default().insert(*ip);
                }
            }
        }
        out
    }
}

/// The addresses that are never a pod's.
fn nodes<'a>(snapshot: &'a Snapshot, members: &'a Members) -> HashMap<IpAddr, Holder<'a>> {
    let own_name = snapshot.local.node_name.as_str();
    let mut held = HashMap::new();
    for (name, node) in &snapshot.cluster.nodes {
        for ip in node.internal_ips.iter().chain(&node.external_ips) {
            held.entry(*ip).or_insert(Holder::Node(name));
        }
    }
    if snapshot.cluster.ipam.in_use {
        let blocks = snapshot.cluster.ipam.counting().flat_map(|block| &block.tunnels);
        let own = members.own.tunnel_addresses.iter().map(|ip| (ip, own_name));
        for (ip, name) in blocks.map(|(ip, name)| (ip, name.as_str())).chain(own) {
            held.entry(*ip).or_insert(Holder::Tunnel(name));
        }
        return held;
    }
    let prefixes = |name: &'a str, prefixes: &'a [IpNet]| prefixes.iter().map(move |prefix| (name, prefix));
    let peers = members.peers.values().flat_map(|peer| prefixes(&peer.name, &peer.pod_cidrs));
    for (name, prefix) in prefixes(own_name, &members.own.pod_cidrs).chain(peers) {
        if let Some(first) = tunnel_address(prefix) {
            held.entry(first).or_insert(Holder::Tunnel(name));
        }
    }
    held
}

/// Every pod's every address, in the order in which they are heard.
fn claims<'a>(snapshot: &'a Snapshot, members: &'a Members) -> Vec<(&'a ObjectRef, &'a Pod, IpAddr)> {
    let own_name = snapshot.local.node_name.as_str();
    let at_home = |pod: &Pod, ip: IpAddr| {
        let node = pod.node.as_deref().unwrap_or_default();
        let own = (node == own_name).then_some(&members.own.pod_cidrs);
        let home = own.or_else(|| members.peers.get(node).map(|peer| &peer.pod_cidrs));
        home.is_some_and(|home| in_any(home, ip))
    };
    let networked = snapshot.cluster.pods.iter().filter(|(_, pod)| {
        // A pod that was not scheduled, or is done, has no address, whatever its status still says.
        !pod.host_network && !pod.finished && pod.node.is_some()
    });
    let mut ranked = Vec::new();
    for (name, pod) in networked {
        let mut ips = pod.ips.clone();
        ips.sort();
        ranked.extend(ips.into_iter().map(|ip| ((pod.terminating, !at_home(pod, ip)), name, &**pod, ip)));
    }
    // Of one rank they stay in the order of their names and addresses, in which they come.
    ranked.sort_by_key(|(rank, ..)| *rank);
    ranked.into_iter().map(|(_, name, pod, ip)| (name, pod, ip)).collect()
}
