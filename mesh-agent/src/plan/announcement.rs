//! What this node says of itself.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use keyservice::{Announcement, KeyClaim};
use mesh_api::status::Issue;

use super::{in_any, is_reachable, issue};
use crate::snapshot::Snapshot;

/// Pods' packets travel in WireGuard.
const CAPABILITY: &str = "wireguard";
/// Endpoint candidates made of a host's own addresses.
const MAX_OWN_ENDPOINTS: usize = 8;

/// The announcement of this node; `None` while it has no key, or nothing valid to say.
pub(super) fn own(snapshot: &Snapshot, issues: &mut Vec<Issue>) -> Option<Announcement> {
    let local = &snapshot.local;
    let port = snapshot.cluster.mesh.listen_port;
    let announcement = Announcement {
        name: local.node_name.clone(),
        keys: vec![KeyClaim { public_key: local.public_key?, port, epoch: local.key_epoch }],
        endpoints: endpoints(snapshot, port),
        capabilities: BTreeSet::from([CAPABILITY.to_owned()]),
        pod_cidrs: local.pod_cidrs.clone(),
    };
    match announcement.validate() {
        Ok(()) => Some(announcement),
        Err(error) => {
            let object = format!("Node/{}", local.node_name);
            issues.push(issue(object, error.annotation, "InvalidAnnouncement", error.problem));
            None
        }
    }
}

/// The configured candidates, else the Node's InternalIPs, else the host's addresses.
fn endpoints(snapshot: &Snapshot, port: u16) -> Vec<SocketAddr> {
    let local = &snapshot.local;
    if !local.endpoints.is_empty() {
        return local.endpoints.clone();
    }
    let node = snapshot.cluster.nodes.get(&local.node_name);
    let internal = node.map(|node| node.internal_ips.as_slice()).unwrap_or_default();
    let candidates = if internal.is_empty() { local.addresses.as_slice() } else { internal };
    let mut seen = BTreeSet::new();
    candidates
        .iter()
        .filter(|ip| is_reachable(**ip) && !in_any(&snapshot.cluster.mesh.pools, **ip) && seen.insert(**ip))
        .take(MAX_OWN_ENDPOINTS)
        .map(|ip| SocketAddr::new(*ip, port))
        .collect()
}
