//! Where to reach a peer first. The datapath follows it from there when it roams.

use std::net::{IpAddr, SocketAddr};

use keyservice::{Admitted, KeyClaim, PublicKey};
use mesh_api::status::Issue;

use super::{ANNOTATION_ENDPOINT_OVERRIDE, in_any, is_reachable, issue, port_of, shifted};
use crate::snapshot::{Node, Snapshot};

/// Where to reach `key` of the peer. Of the operator's word, what the peer announces (only addresses its Node
/// object has, if that has any), the Node object's InternalIPs, and where it was last heard from, the first that can
/// be and did not fail lately. The operator's word is not doubted.
pub(super) fn choose(
    snapshot: &Snapshot,
    peer: &Admitted,
    key: &KeyClaim,
    node: Option<&Node>,
    issues: &mut Vec<Issue>,
) -> Option<SocketAddr> {
    if let Some(text) = node.and_then(|node| node.annotations.get(ANNOTATION_ENDPOINT_OVERRIDE)) {
        match parse(text, key) {
            Some(endpoint) if can_be(snapshot, endpoint) => return Some(endpoint),
            _ => {
                let field = format!("metadata.annotations[{ANNOTATION_ENDPOINT_OVERRIDE}]");
                let message = format!("{text:?} is no address and port that can be reached; ignored");
                let found = issue(format!("Node/{}", peer.name), &field, "InvalidEndpoint", message);
                // Once, not for each of its keys.
                if !issues.contains(&found) {
                    issues.push(found);
                }
            }
        }
    }
    // The announced ports are the newest key's.
    let newest = peer.keys.first().map_or(key.port, |newest| newest.port);
    let (internal, external) =
        node.map(|node| (node.internal_ips.as_slice(), node.external_ips.as_slice())).unwrap_or_default();
    let named = |ip: IpAddr| internal.contains(&ip) || external.contains(&ip);
    let announced = peer
        .endpoints
        .iter()
        .filter_map(|endpoint| shifted(*endpoint, newest, key.port))
        .filter(|endpoint| (internal.is_empty() && external.is_empty()) || named(endpoint.ip()));
    let of_node = internal.iter().chain(external).map(|ip| SocketAddr::new(*ip, key.port));
    let learned = learned(snapshot, &key.public_key);
    let candidates = announced.chain(of_node).chain(learned).filter(|to| can_be(snapshot, *to));
    let reach = snapshot.local.reach.get(&key.public_key).cloned().unwrap_or_default();
    reach.choose(&candidates.collect::<Vec<_>>())
}

/// Where the datapath last heard the peer with this key.
pub(super) fn learned(snapshot: &Snapshot, key: &PublicKey) -> Option<SocketAddr> {
    snapshot.local.learned_endpoints.get(key).copied()
}

/// A port given with the address is the first device's.
fn parse(text: &str, key: &KeyClaim) -> Option<SocketAddr> {
    let whole = text.parse().ok().and_then(|endpoint| shifted(endpoint, 0, port_of(0, key.epoch)));
    whole.or_else(|| text.parse().ok().map(|ip| SocketAddr::new(ip, key.port)))
}

/// Not our own, not inside the tunnel, and of a family this host has addresses of.
fn can_be(snapshot: &Snapshot, endpoint: SocketAddr) -> bool {
    let ip = endpoint.ip();
    let host = &snapshot.local.addresses;
    let own = snapshot.cluster.nodes.get(&snapshot.local.node_name);
    let own = own.is_some_and(|node| node.internal_ips.contains(&ip)) || host.contains(&ip);
    endpoint.port() != 0
        && is_reachable(ip)
        && !own
        && !in_any(&snapshot.cluster.mesh.pools, ip)
        && (host.is_empty() || host.iter().any(|have| have.is_ipv4() == ip.is_ipv4()))
}
