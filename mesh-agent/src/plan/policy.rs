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
        },
        endpoints: snapshot.endpoints.clone(),
        tunnels: devices(snapshot).into_iter().map(str::to_owned).collect(),
        remote_ranges: peers.all_prefixes(),
        own_ranges: own_addresses.map(host_prefix).chain(own.pod_cidrs.iter().copied()).collect(),
    }
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
