#![allow(clippy::unwrap_used)]

mod external;
mod laws;
mod pools;
mod rotation;
mod table;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use keyservice::rotation::{Slot, State};
use keyservice::{Announcement, KeyClaim, PublicKey};
use mesh_api::defaults;

use super::{Planned, plan};
use crate::desired::{Route, RouteTarget, WireguardPeer};
use crate::snapshot::{Cluster, Endpoint, Local, Node, ObjectRef, Pod, Snapshot};

/// A public key that is on no list of bad ones.
fn key(seed: u8) -> PublicKey {
    keyservice::PrivateKey::from_bytes(&[seed; 32]).public()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod_name(name: &str) -> ObjectRef {
    ObjectRef { namespace: "default".into(), name: name.into() }
}

/// A node that announces key `seed`.
fn node(name: &str, seed: u8, prefixes: &[&str], internal: &[&str]) -> Node {
    let announcement = Announcement {
        name: name.into(),
        keys: vec![KeyClaim { public_key: key(seed), port: defaults::PORT, epoch: 0 }],
        endpoints: Vec::new(),
        capabilities: Default::default(),
        pod_cidrs: Vec::new(),
        signature: None,
    };
    Node {
        annotations: announcement.to_annotations(),
        pod_cidrs: prefixes.iter().copied().map(net).collect(),
        internal_ips: internal.iter().copied().map(ip).collect(),
        ..Node::default()
    }
}

fn pod(node: &str, ips: &[&str]) -> Pod {
    let node = Some(node.to_owned()).filter(|node| !node.is_empty());
    Pod { node, ips: ips.iter().copied().map(ip).collect(), ..Pod::default() }
}

/// Puts a pod of this name into the cluster.
fn add_pod(cluster: &mut Cluster, name: &str, pod: Pod) {
    let key = pod_name(name);
    let pod = Pod { namespace: key.namespace.clone(), name: key.name.clone(), ..pod };
    cluster.pods.insert(key, pod.into());
}

/// A node of the cluster, to be changed.
fn node_mut<'a>(cluster: &'a mut Cluster, name: &str) -> &'a mut Node {
    Arc::make_mut(cluster.nodes.get_mut(name).unwrap())
}

/// A key of this node.
fn slot(epoch: u64, seed: u8) -> Slot {
    Slot { epoch, public_key: key(seed), announced: true, preshared: false }
}

/// Key 1 in epoch 0, and nothing under way.
fn one_key() -> State {
    State { slots: vec![slot(0, 1)], ..State::default() }
}

/// Node `a` of three, with its key and everything read.
fn three_nodes() -> (Cluster, Snapshot) {
    let mut cluster = Cluster::default();
    cluster.mesh.pools = vec![net("10.244.0.0/16"), net("fd00:10::/32")];
    for (index, name) in (1u8..).zip(["a", "b", "c"]) {
        let v4 = format!("10.244.{index}.0/24");
        let v6 = format!("fd00:10:{index}::/64");
        let address = format!("192.0.2.{index}");
        cluster.nodes.insert(name.into(), node(name, index, &[&v4, &v6], &[&address]).into());
    }
    let local = Local { node_name: "a".into(), rotation: one_key(), ..Local::default() };
    (cluster, Snapshot { generation: 7, synced: true, local, ..Snapshot::default() })
}

fn plan_of(cluster: Cluster, snapshot: Snapshot) -> Planned {
    plan(&Snapshot { cluster: Arc::new(cluster), ..snapshot })
}

fn peers(planned: &Planned) -> BTreeMap<String, WireguardPeer> {
    let device = &planned.desired.wireguard[defaults::DEVICE];
    device.peers.values().map(|peer| (peer.name.clone(), peer.clone())).collect()
}

fn allowed(planned: &Planned, name: &str) -> Vec<String> {
    peers(planned)[name].allowed_ips.iter().map(IpNet::to_string).collect()
}

fn reasons(planned: &Planned) -> Vec<(String, String)> {
    planned.issues.iter().map(|issue| (issue.object.clone(), issue.reason.clone())).collect()
}

/// Naive longest match, the smaller metric first, as the kernel does.
fn lookup(planned: &Planned, table: u32, ip: IpAddr) -> Option<&Route> {
    let matching = planned.desired.routes.iter().filter(|r| r.table == table && r.dst.contains(&ip));
    matching.max_by_key(|r| (r.dst.prefix_len(), std::cmp::Reverse(r.metric)))
}

fn leads_to(planned: &Planned, table: u32, ip: IpAddr) -> Option<String> {
    lookup(planned, table, ip).map(|route| match &route.target {
        RouteTarget::Device { name, .. } => name.clone(),
        RouteTarget::Throw => "throw".into(),
        RouteTarget::Unreachable => "unreachable".into(),
    })
}

/// An interface of pod `name`.
fn endpoint(name: &str, ips: &[&str]) -> Endpoint {
    Endpoint {
        pod: pod_name(name),
        container_id: name.into(),
        ifname: "eth0".into(),
        ifindex: 9,
        pod_mac: [2, 0, 0, 0, 0, 1],
        ips: ips.iter().copied().map(ip).collect(),
    }
}

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
