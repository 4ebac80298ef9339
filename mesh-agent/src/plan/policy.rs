//! The policy engine's input.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ebpf_policy::model;

use super::addresses::Addresses;
use super::peers::Peers;
use super::{Own, devices, host_prefix};
use crate::desired::Policy;
use crate::snapshot::{ObjectRef, Pod, Snapshot};

/// Pods, namespaces and policies of the cluster, and where they are enforced.
pub(super) fn policy(snapshot: &Snapshot, own: &Own, peers: &Peers, addresses: &Addresses) -> Policy {
    let cluster = &snapshot.cluster;
    let local = snapshot.endpoints.values().flat_map(|endpoint| &endpoint.ips);
    let of_others = addresses.own.iter().filter(|_| cluster.mesh.external);
    let own_addresses =
        own.addresses.iter().chain(&own.tunnel_addresses).chain(local).chain(of_others).copied();
    Policy {
        view: model::ClusterView {
            pods: pods(snapshot, addresses),
            namespaces: cluster.namespaces.clone(),
            policies: cluster.policies.values().cloned().collect(),
            services: services(snapshot, own, addresses),
        },
        endpoints: snapshot.endpoints.clone(),
        tunnels: devices(snapshot).into_iter().map(str::to_owned).collect(),
        remote_ranges: peers.all_prefixes(),
        own_ranges: own_addresses.map(host_prefix).chain(own.pod_cidrs.iter().copied()).collect(),
    }
}

/// Where Services are reached on this node: at their own addresses, and at their ports of the node's.
fn services(snapshot: &Snapshot, own: &Own, addresses: &Addresses) -> BTreeSet<model::ServiceAddress> {
    let of_node: BTreeSet<IpAddr> = own.addresses.iter().chain(&own.tunnel_addresses).copied().collect();
    let of_node: Vec<_> = of_node.difference(&addresses.own).collect();
    let each = snapshot.cluster.services.values();
    let whole = each.clone().flat_map(|service| &service.addresses);
    let whole = whole.map(|ip| model::ServiceAddress { ip: *ip, port: None });
    let ports = each.flat_map(|service| &service.node_ports);
    let ports =
        ports.flat_map(|port| of_node.iter().map(|ip| model::ServiceAddress { ip: **ip, port: Some(*port) }));
    whole.chain(ports).collect()
}

/// The pods, each without the addresses that it lost.
fn pods(snapshot: &Snapshot, addresses: &Addresses) -> Vec<Arc<Pod>> {
    let losers: BTreeSet<&ObjectRef> = addresses.lost.iter().map(|(name, _)| name).collect();
    let pod = |(name, pod): (&ObjectRef, &Arc<Pod>)| {
        if !losers.contains(name) {
            return Arc::clone(pod);
        }
        let mut pod = Pod::clone(pod);
        pod.ips.retain(|ip| !addresses.lost.contains(&(name.clone(), *ip)));
        Arc::new(pod)
    };
    snapshot.cluster.pods.iter().map(pod).collect()
}
