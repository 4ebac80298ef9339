//! Routes and rules. Table 4207 says where pods are; 4208, which only packets from pods see, where nodes are.

use std::collections::BTreeSet;

use ipnet::IpNet;
use mesh_api::defaults;

use super::addresses::Addresses;
use super::members::Members;
use super::peers::Peers;
use super::{host_prefix, in_any};
use crate::desired::{Route, RouteTarget, Rule};
use crate::snapshot::Snapshot;

/// Of every route that leads somewhere. Given, because the kernel's own choice differs between families.
const METRIC: u32 = 100;
/// Of the fall-back, behind everything else.
const METRIC_LAST: u32 = u32::MAX;

/// All routes of ours.
pub(super) fn routes(
    snapshot: &Snapshot,
    members: &Members,
    peers: &Peers,
    addresses: &Addresses,
) -> BTreeSet<Route> {
    let mesh = &snapshot.cluster.mesh;
    let mut out = BTreeSet::new();
    let unreachable =
        |table, dst| Route { table, dst, target: RouteTarget::Unreachable, metric: METRIC_LAST };
    if !mesh.strict_encryption {
        // At least what is ours: an address that no pod has must not travel to the next router and back.
        out.extend(members.own.pod_cidrs.iter().map(|prefix| unreachable(defaults::TABLE, *prefix)));
    } else {
        out.extend(mesh.pools.iter().map(|pool| unreachable(defaults::TABLE, *pool)));
        let nodes = snapshot.cluster.nodes.iter().filter(|(name, _)| **name != snapshot.local.node_name);
        let elsewhere = nodes.flat_map(|(_, node)| &node.internal_ips).filter(|ip| {
            !peers.node_addresses.contains_key(ip)
                && !members.own.addresses.contains(ip)
                && !snapshot.local.addresses.contains(ip)
                && !in_any(&mesh.pools, **ip)
        });
        out.extend(elsewhere.map(|ip| unreachable(defaults::TABLE_FROM_PODS, host_prefix(*ip))));
    }
    if mesh.external {
        out.extend(elsewhere_ours(snapshot, addresses).into_iter().map(|dst| Route {
            table: defaults::TABLE,
            dst,
            target: RouteTarget::Throw,
            metric: METRIC,
        }));
    }
    for endpoint in snapshot.endpoints.iter().filter(|(_, endpoint)| endpoint.ifindex != 0) {
        let (interface, endpoint) = endpoint;
        let target = RouteTarget::Device { name: interface.clone(), src: None };
        out.extend(endpoint.ips.iter().map(|ip| Route {
            table: defaults::TABLE,
            dst: host_prefix(*ip),
            target: target.clone(),
            metric: METRIC,
        }));
    }
    let through_tunnel = |table, dst: IpNet, device: usize, src| Route {
        table,
        dst,
        target: RouteTarget::Device { name: defaults::DEVICES[device].to_owned(), src },
        metric: METRIC,
    };
    for (prefix, device) in &peers.pod_prefixes {
        let src = members.own.source_for(prefix.addr(), &snapshot.local.addresses);
        out.insert(through_tunnel(defaults::TABLE, *prefix, *device, src));
    }
    for (ip, device) in &peers.node_addresses {
        out.insert(through_tunnel(defaults::TABLE_FROM_PODS, host_prefix(*ip), *device, None));
    }
    out
}

/// What the network plugin of this node has routes for: its pods' addresses, and the prefix it gives them from, so that
/// a pod whose object does not say its address yet can be answered.
fn elsewhere_ours(snapshot: &Snapshot, addresses: &Addresses) -> BTreeSet<IpNet> {
    let mesh = &snapshot.cluster.mesh;
    let node = snapshot.cluster.nodes.get(&snapshot.local.node_name);
    let prefixes = node.map(|node| node.pod_cidrs.as_slice()).unwrap_or_default();
    let inside = |prefix: &&IpNet| mesh.pools.iter().any(|pool| pool.contains(*prefix));
    let prefixes = prefixes.iter().filter(inside).copied();
    prefixes.chain(addresses.own.iter().copied().map(host_prefix)).collect()
}

/// The rules that lead to our tables.
pub(super) fn rules(pools: &[IpNet]) -> BTreeSet<Rule> {
    let pods = [false, true].map(|ipv6| Rule {
        priority: defaults::RULE_PRIORITY,
        ipv6,
        from: None,
        table: defaults::TABLE,
    });
    let nodes = pools.iter().map(|pool| Rule {
        priority: defaults::RULE_PRIORITY + 1,
        ipv6: pool.addr().is_ipv6(),
        from: Some(*pool),
        table: defaults::TABLE_FROM_PODS,
    });
    pods.into_iter().chain(nodes).collect()
}
