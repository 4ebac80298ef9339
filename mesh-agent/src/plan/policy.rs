//! The policy engine's input.

use std::collections::BTreeSet;
use std::net::IpAddr;

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
            pods: cluster.pods.iter().map(|(name, pod)| of_pod(name, pod, &addresses.lost)).collect(),
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

fn of_pod(name: &ObjectRef, pod: &Pod, lost: &BTreeSet<(ObjectRef, IpAddr)>) -> model::Pod {
    let holds = |ip: &IpAddr| lost.is_empty() || !lost.contains(&(name.clone(), *ip));
    model::Pod {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        labels: pod.labels.clone(),
        node: Some(pod.node.clone()).filter(|node| !node.is_empty()),
        ips: pod.ips.iter().filter(|ip| holds(ip)).copied().collect(),
        ports: pod.ports.iter().filter_map(named_port).collect(),
        host_network: pod.host_network,
        finished: pod.finished,
        terminating: pod.terminating,
    }
}

fn named_port((name, number, protocol): &(String, u16, String)) -> Option<model::NamedPort> {
    let protocol = match protocol.as_str() {
        "TCP" => model::Protocol::Tcp,
        "UDP" => model::Protocol::Udp,
        "SCTP" => model::Protocol::Sctp,
        _ => return None,
    };
    (!name.is_empty()).then(|| model::NamedPort { name: name.clone(), protocol, number: *number })
}
