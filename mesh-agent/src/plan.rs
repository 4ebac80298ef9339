//! From a snapshot to what the node should look like. Pure and total: whatever the snapshot holds, the
//! result is a plan, and what could not be planned is an issue.

mod addresses;
mod announcement;
mod endpoint;
mod host;
mod members;
mod peers;
mod policy;
mod routes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use keyservice::rotation::device_of;
use keyservice::{Announcement, Incumbents, KeyClaim};
use mesh_api::defaults::DEVICES;
use mesh_api::status::Issue;

use crate::desired::{Datapath, Desired};
use crate::snapshot::Snapshot;
use addresses::Addresses;
use members::Members;
use peers::Peers;

/// The annotation by which an operator says where a node is reached: `address:port`, or an address alone
/// with the announced port.
pub const ANNOTATION_ENDPOINT_OVERRIDE: &str = "margay.io/endpoint-override";

/// What [`plan`] makes of a snapshot.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Planned {
    /// What the node should look like.
    pub desired: Desired,
    /// What is wrong, the sources' issues included.
    pub issues: Vec<Issue>,
    /// Whom to remember as admitted.
    pub incumbents: Incumbents,
    /// What to announce; `None` while there is no key to be told of, or nothing valid to say.
    pub announcement: Option<Announcement>,
    /// The keys of the admitted peers, by name.
    pub claims: BTreeMap<String, Vec<KeyClaim>>,
    /// This node's own part of the mesh.
    pub own: Own,
}

/// This node's own part of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Own {
    /// Prefixes its pods get their addresses from.
    pub pod_cidrs: Vec<IpNet>,
    /// Its InternalIPs.
    pub addresses: Vec<IpAddr>,
    /// Its addresses on the mesh device, one for each of `pod_cidrs`; no pod may have them.
    pub tunnel_addresses: Vec<IpAddr>,
}

impl Own {
    /// The own address of `ip`'s family for locally made packets: the InternalIP, if the host has it, else
    /// the tunnel address.
    fn source_for(&self, ip: IpAddr, host: &[IpAddr]) -> Option<IpAddr> {
        let internal = self
            .addresses
            .iter()
            .find(|own| own.is_ipv4() == ip.is_ipv4() && (host.is_empty() || host.contains(own)));
        let tunnel = || self.tunnel_addresses.iter().find(|own| own.is_ipv4() == ip.is_ipv4());
        internal.or_else(tunnel).copied()
    }
}

/// Plans.
pub fn plan(snapshot: &Snapshot) -> Planned {
    let mut issues = snapshot.cluster.issues.clone();
    let said = announcement::own(snapshot, &mut issues);
    let members = Members::admit(snapshot, said.claimed.as_ref(), &mut issues);
    let addresses = Addresses::assign(snapshot, &members, &mut issues);
    let peers = Peers::build(snapshot, &members, &addresses, &mut issues);
    let mesh = &snapshot.cluster.mesh;
    let mut desired = Desired {
        generation: snapshot.generation,
        // Without our key every peer looks superfluous.
        prune: snapshot.synced && !snapshot.local.rotation.slots.is_empty(),
        pod_cidrs: members.own.pod_cidrs.clone(),
        datapath: snapshot.local.datapath,
        ..Desired::default()
    };
    host::links(snapshot, &members.own, &mut desired);
    host::sysctls(snapshot, &mut desired);
    desired.masquerade = host::masquerade(snapshot);
    desired.routes = routes::routes(snapshot, &members, &peers, &addresses);
    desired.rules = routes::rules(&mesh.pools);
    for slot in &snapshot.local.rotation.slots {
        desired.wireguard.insert(name_of(slot.epoch).to_owned(), peers.device(snapshot, slot));
    }
    desired.policy = Arc::new(policy::policy(snapshot, &members.own, &peers, &addresses));
    Planned {
        desired,
        issues,
        incumbents: members.incumbents,
        announcement: said.announced,
        claims: members.peers.into_iter().map(|(name, peer)| (name, peer.keys)).collect(),
        own: members.own,
    }
}

/// The device of an epoch's key.
fn name_of(epoch: u64) -> &'static str {
    DEVICES[device_of(epoch)]
}

/// The devices to be ready: those with a key, and what there is besides or can be made, so that the next key finds its
/// device with policy in place.
fn devices(snapshot: &Snapshot) -> BTreeSet<&'static str> {
    let local = &snapshot.local;
    let with_key = local.rotation.slots.iter().map(|slot| name_of(slot.epoch));
    let made = |name: &&str| local.datapath == Datapath::Kernel || local.devices.contains(*name);
    with_key.chain(DEVICES.into_iter().filter(made)).collect()
}

/// UDP port of the device of an epoch's key, where `first` is that of the first device.
fn port_of(first: u16, epoch: u64) -> u16 {
    first.saturating_add(u16::from(device_of(epoch) > 0))
}

/// An endpoint of the key that listens on `from`, for the one that listens on `to`: who forwards ports forwards both.
fn shifted(endpoint: SocketAddr, from: u16, to: u16) -> Option<SocketAddr> {
    let port = i32::from(endpoint.port()) + i32::from(to) - i32::from(from);
    let port = u16::try_from(port).ok().filter(|port| *port > 0 && endpoint.port() > 0)?;
    Some(SocketAddr::new(endpoint.ip(), port))
}

/// A node's own address in one of its prefixes: the first after the network's. A prefix of one or two
/// addresses leaves them to pods.
pub fn tunnel_address(prefix: &IpNet) -> Option<IpAddr> {
    if prefix.prefix_len() + 2 > prefix.max_prefix_len() {
        return None;
    }
    Some(match prefix.network() {
        IpAddr::V4(network) => IpAddr::V4((u32::from(network) + 1).into()),
        IpAddr::V6(network) => IpAddr::V6((u128::from(network) + 1).into()),
    })
}

/// An issue of the plan's own.
fn issue(object: impl Into<String>, field: &str, reason: &str, message: impl Into<String>) -> Issue {
    Issue { object: object.into(), field: field.into(), reason: reason.into(), message: message.into() }
}

/// The prefix of one address.
fn host_prefix(ip: IpAddr) -> IpNet {
    IpNet::from(ip)
}

/// Whether a packet can be sent to `ip` from another host.
fn is_reachable(ip: IpAddr) -> bool {
    let special = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
    let zoned = match ip {
        IpAddr::V4(v4) => v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !special && !zoned
}

fn in_any(prefixes: &[IpNet], ip: IpAddr) -> bool {
    prefixes.iter().any(|prefix| prefix.contains(&ip))
}
