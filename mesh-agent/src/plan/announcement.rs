//! What this node says of itself.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use keyservice::rotation::Slot;
use keyservice::{Announcement, KeyClaim};
use mesh_api::status::Issue;

use super::{in_any, is_reachable, issue, port_of, shifted};
use crate::snapshot::Snapshot;

/// Pods' packets travel in WireGuard.
const CAPABILITY: &str = "wireguard";
/// Endpoint candidates made of a host's own addresses.
const MAX_OWN_ENDPOINTS: usize = 8;

/// What this node is.
#[derive(Default)]
pub(super) struct Said {
    /// With all of its keys, for its own judgement of who is in the mesh.
    pub(super) claimed: Option<Announcement>,
    /// With the keys that the others are told of; `None` while there is no such key, or nothing valid to say.
    pub(super) announced: Option<Announcement>,
}

/// Of this node.
pub(super) fn own(snapshot: &Snapshot, issues: &mut Vec<Issue>) -> Said {
    let slots = &snapshot.local.rotation.slots;
    let announced: Vec<&Slot> = slots.iter().filter(|slot| slot.announced).collect();
    let claimed = valid(snapshot, &slots.iter().collect::<Vec<_>>(), issues);
    let announced = claimed.as_ref().and_then(|_| valid(snapshot, &announced, issues));
    Said { claimed, announced }
}

/// With these keys, newest epoch first.
fn valid(snapshot: &Snapshot, slots: &[&Slot], issues: &mut Vec<Issue>) -> Option<Announcement> {
    let local = &snapshot.local;
    let port = snapshot.cluster.mesh.listen_port;
    let newest = slots.first()?.epoch;
    let claim = |slot: &&Slot| KeyClaim {
        public_key: slot.public_key,
        port: port_of(port, slot.epoch),
        epoch: slot.epoch,
    };
    let announcement = Announcement {
        name: local.node_name.clone(),
        keys: slots.iter().map(claim).collect(),
        endpoints: endpoints(snapshot, newest),
        capabilities: BTreeSet::from([CAPABILITY.to_owned()]),
        pod_cidrs: if snapshot.cluster.mesh.external { Vec::new() } else { local.pod_cidrs.clone() },
        signature: None,
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

/// The configured candidates, else the Node's InternalIPs, else the host's addresses; with the port of the device
/// that this epoch's key is in.
fn endpoints(snapshot: &Snapshot, epoch: u64) -> Vec<SocketAddr> {
    let local = &snapshot.local;
    let port = snapshot.cluster.mesh.listen_port;
    if !local.endpoints.is_empty() {
        let of_device = local.endpoints.iter().filter_map(|at| shifted(*at, 0, port_of(0, epoch)));
        return of_device.collect();
    }
    let node = snapshot.cluster.nodes.get(&local.node_name);
    let internal = node.map(|node| node.internal_ips.as_slice()).unwrap_or_default();
    let candidates = if internal.is_empty() { local.addresses.as_slice() } else { internal };
    let mut seen = BTreeSet::new();
    candidates
        .iter()
        .filter(|ip| is_reachable(**ip) && !in_any(&snapshot.cluster.mesh.pools, **ip) && seen.insert(**ip))
        .take(MAX_OWN_ENDPOINTS)
        .map(|ip| SocketAddr::new(*ip, port_of(port, epoch)))
        .collect()
}
