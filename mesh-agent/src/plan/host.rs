//! Links, addresses, neighbours, sysctls and source NAT of this host.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use mesh_api::defaults;

use super::{Own, devices, host_prefix, name_of};
use crate::desired::{Desired, Link, Masquerade};
use crate::snapshot::Snapshot;

/// The mesh devices and the pods' host-side interfaces, with what belongs on them.
///
/// While keys rotate the tunnel addresses are on both devices: a host answers for its addresses on whichever device
/// they are asked, and so one can be taken off while packets to it arrive by the other.
pub(super) fn links(snapshot: &Snapshot, own: &Own, desired: &mut Desired) {
    let link = Link { mtu: snapshot.cluster.mesh.mtu, up: true };
    for device in devices(snapshot) {
        desired.links.insert(device.to_owned(), link.clone());
    }
    let addresses: BTreeSet<IpNet> = own.tunnel_addresses.iter().copied().map(host_prefix).collect();
    for slot in &snapshot.local.rotation.slots {
        desired.addresses.insert(name_of(slot.epoch).to_owned(), addresses.clone());
    }
    for (interface, endpoint) in present(snapshot) {
        desired.links.insert(interface.clone(), link.clone());
        for ip in &endpoint.ips {
            desired.neighbours.insert((interface.clone(), *ip), endpoint.pod_mac);
        }
    }
}

/// The endpoints whose link is there.
fn present(snapshot: &Snapshot) -> impl Iterator<Item = (&String, &crate::snapshot::Endpoint)> {
    snapshot.endpoints.iter().filter(|(_, endpoint)| endpoint.ifindex != 0)
}

/// Forwarding, and reverse-path checks that know of the tunnel.
pub(super) fn sysctls(snapshot: &Snapshot, desired: &mut Desired) {
    let mut set = |path: String, value: &str| desired.sysctls.insert(path, value.to_owned());
    set("net/ipv4/ip_forward".to_owned(), "1");
    if snapshot.cluster.mesh.pools.iter().any(|pool| pool.addr().is_ipv6()) {
        set("net/ipv6/conf/all/forwarding".to_owned(), "1");
    }
    // The kernel takes the larger of `all` and the interface's own value, so 2 (loose: some route leads back)
    // holds even where `all` is 1 (strict). Who may send from where is checked by policy, exactly.
    let pods = present(snapshot).map(|(interface, _)| interface.as_str());
    for interface in pods.chain(devices(snapshot)) {
        set(format!("net/ipv4/conf/{interface}/rp_filter"), "2");
    }
}

/// Source NAT for what leaves the cluster.
pub(super) fn masquerade(snapshot: &Snapshot) -> Option<Masquerade> {
    let mesh = &snapshot.cluster.mesh;
    // Another plugin does its own.
    if !mesh.masquerade || mesh.pools.is_empty() || mesh.external {
        return None;
    }
    let nodes = snapshot.cluster.nodes.values().flat_map(|node| &node.internal_ips).copied().map(host_prefix);
    let exceptions = mesh.pools.iter().chain(&mesh.masquerade_exceptions).copied().chain(nodes);
    Some(Masquerade {
        sources: mesh.pools.iter().copied().collect(),
        exceptions: without_contained(exceptions.collect()),
        internal_links: defaults::DEVICES
            .into_iter()
            .map(str::to_owned)
            .chain([format!("{}*", defaults::VETH_PREFIX)])
            .collect(),
    })
}

/// Prefixes without those inside another: nftables' interval sets refuse overlaps.
fn without_contained(prefixes: BTreeSet<IpNet>) -> BTreeSet<IpNet> {
    let mut widest_first: Vec<IpNet> = prefixes.into_iter().collect();
    widest_first.sort_by_key(|prefix| (prefix.network(), prefix.prefix_len()));
    let mut kept: BTreeMap<std::net::IpAddr, IpNet> = BTreeMap::new();
    for prefix in widest_first {
        let before = kept.range(..=prefix.network()).next_back();
        if !before.is_some_and(|(_, wider)| wider.contains(&prefix)) {
            kept.insert(prefix.network(), prefix);
        }
    }
    kept.into_values().collect()
}
