//! The peers of the mesh devices and what each owns.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use keyservice::rotation::{Phase, Slot, device_of};
use keyservice::{Admitted, KeyClaim, PublicKey};
use mesh_api::status::Issue;

use super::addresses::Addresses;
use super::members::Members;
use super::{endpoint, host_prefix, issue, port_of};
use crate::desired::{WireguardDevice, WireguardPeer};
use crate::snapshot::Snapshot;

/// The peers, and which of their prefixes are for pods and which are the nodes' own, each with the device that leads
/// there.
#[derive(Default)]
pub(super) struct Peers {
    /// By epoch: while keys rotate a node is a peer on two devices.
    by_epoch: BTreeMap<u64, BTreeMap<PublicKey, WireguardPeer>>,
    /// Prefixes and single addresses of remote pods.
    pub(super) pod_prefixes: BTreeMap<IpNet, usize>,
    /// Remote nodes' own addresses.
    pub(super) node_addresses: BTreeMap<IpAddr, usize>,
}

impl Peers {
    /// Gives each admitted node its allowed IPs, the same on every device it is met on: prefixes, then its own
    /// addresses, then its pods' other ones.
    pub(super) fn build(
        snapshot: &Snapshot,
        members: &Members,
        addresses: &Addresses,
        issues: &mut Vec<Issue>,
    ) -> Self {
        let mut out = Self::default();
        let mut owners = ours(snapshot, members);
        let meetings = Meetings::of(snapshot, members);
        for (name, admitted) in &members.peers {
            let node = snapshot.cluster.nodes.get(name).map(|node| &**node);
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
            let mut prefixes = BTreeSet::new();
            for prefix in admitted.pod_cidrs.iter().copied().chain(exceptions.map(|ip| host_prefix(*ip))) {
                if take(prefix) {
                    prefixes.insert(prefix);
                }
            }
            let internal = node.map(|node| node.internal_ips.as_slice()).unwrap_or_default();
            let mut own_addresses = BTreeSet::new();
            for ip in internal.iter().filter(|ip| admitted.addresses.contains(ip)) {
                if take(host_prefix(*ip)) {
                    own_addresses.insert(*ip);
                }
            }
            let Some(way) = meetings.way(snapshot, name, admitted) else {
                issues.extend(no_meeting(snapshot, admitted));
                continue;
            };
            out.pod_prefixes.extend(prefixes.into_iter().map(|prefix| (prefix, device_of(way))));
            out.node_addresses.extend(own_addresses.into_iter().map(|ip| (ip, device_of(way))));
            for (epoch, claim) in meetings.of_node(name) {
                let endpoint = endpoint::choose(snapshot, admitted, claim, node, issues);
                let learned = endpoint::learned(snapshot, &claim.public_key);
                let peer = WireguardPeer {
                    name: name.clone(),
                    endpoint,
                    learned: endpoint.is_some() && endpoint == learned,
                    reach: snapshot.local.reach.get(&claim.public_key).cloned().unwrap_or_default(),
                    allowed_ips: allowed_ips.clone(),
                    persistent_keepalive: snapshot.cluster.mesh.persistent_keepalive,
                    connect: wants_session(snapshot, epoch, name),
                };
                out.by_epoch.entry(epoch).or_default().insert(claim.public_key, peer);
            }
        }
        out
    }

    /// The device of a key.
    pub(super) fn device(&self, snapshot: &Snapshot, slot: &Slot) -> WireguardDevice {
        WireguardDevice {
            public_key: slot.public_key,
            listen_port: port_of(snapshot.cluster.mesh.listen_port, slot.epoch),
            fwmark: 0,
            preshared: slot.preshared,
            peers: self.by_epoch.get(&slot.epoch).cloned().unwrap_or_default(),
        }
    }

    /// Everything remote nodes own.
    pub(super) fn all_prefixes(&self) -> BTreeSet<IpNet> {
        let peers = self.by_epoch.values().flat_map(BTreeMap::values);
        peers.flat_map(|peer| peer.allowed_ips.iter().copied()).collect()
    }
}

/// Who is met in which epoch, by which key.
struct Meetings<'a>(BTreeMap<&'a str, BTreeMap<u64, &'a KeyClaim>>);

impl<'a> Meetings<'a> {
    fn of(snapshot: &'a Snapshot, members: &'a Members) -> Self {
        let rotation = &snapshot.local.rotation;
        let announced: BTreeMap<PublicKey, &str> = members
            .peers
            .values()
            .flat_map(|peer| peer.keys.iter().map(|key| (key.public_key, peer.name.as_str())))
            .collect();
        let own: BTreeSet<PublicKey> = snapshot.local.keys().collect();
        let mut met: BTreeMap<&str, BTreeMap<u64, &KeyClaim>> = BTreeMap::new();
        for slot in &rotation.slots {
            let mut taken = BTreeSet::new();
            for (name, admitted) in &members.peers {
                let Some(claim) = rotation.claim(slot.epoch, name, &admitted.keys) else { continue };
                let key = claim.public_key;
                // What a node announced once and no more is not its own for ever.
                let foreign = announced.get(&key).is_some_and(|owner| *owner != name.as_str());
                if !foreign && !own.contains(&key) && taken.insert(key) {
                    met.entry(name).or_default().insert(slot.epoch, claim);
                }
            }
        }
        Self(met)
    }

    fn of_node(&self, name: &str) -> impl Iterator<Item = (u64, &'a KeyClaim)> {
        self.0.get(name).into_iter().flatten().map(|(epoch, claim)| (*epoch, *claim))
    }

    /// The epoch through which a node is sent to; one in which it is met, or none.
    fn way(&self, snapshot: &Snapshot, name: &str, admitted: &Admitted) -> Option<u64> {
        let rotation = &snapshot.local.rotation;
        let met = self.0.get(name)?;
        let is_met = |epoch: &u64| met.contains_key(epoch);
        let way = rotation.way(name, &admitted.keys).filter(is_met);
        way.or_else(|| rotation.slots.iter().map(|slot| slot.epoch).find(is_met))
    }
}

/// While peers are moved to a new key: a handshake has to show that it works before anything is sent there.
fn wants_session(snapshot: &Snapshot, epoch: u64, name: &str) -> bool {
    let rotation = &snapshot.local.rotation;
    rotation.phase() == Phase::Moving
        && rotation.newest().is_some_and(|newest| newest.epoch == epoch)
        && !rotation.moved.contains(name)
}

/// A node that has gone through more epochs than this one, or fewer: they meet again when the one behind has followed.
fn no_meeting(snapshot: &Snapshot, admitted: &Admitted) -> Option<Issue> {
    let list = |epochs: Vec<u64>| epochs.iter().map(u64::to_string).collect::<Vec<_>>().join(" and ");
    let ours = list(snapshot.local.rotation.slots.iter().map(|slot| slot.epoch).collect());
    let theirs = list(admitted.keys.iter().map(|key| key.epoch).collect());
    let message =
        format!("its keys are of epoch {theirs} and this node's of {ours}, so it cannot be reached");
    let told = !ours.is_empty() && !theirs.is_empty();
    told.then(|| issue(format!("Node/{}", admitted.name), "", "NoCommonEpoch", message))
}

/// What no peer may have.
fn ours<'a>(snapshot: &'a Snapshot, members: &'a Members) -> BTreeMap<IpNet, &'a String> {
    let own = &members.own;
    let pods = snapshot.endpoints.values().flat_map(|endpoint| &endpoint.ips);
    let addresses = own.addresses.iter().chain(&own.tunnel_addresses).chain(pods).copied().map(host_prefix);
    let prefixes = own.pod_cidrs.iter().copied();
    addresses.chain(prefixes).map(|prefix| (prefix, &snapshot.local.node_name)).collect()
}
