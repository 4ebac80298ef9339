//! Who is in the mesh, this node included.

use std::collections::BTreeMap;

use keyservice::admission::reason::{KEY_CHANGED, UNSIGNED};
use keyservice::admission::{Rules, admit};
use keyservice::announcement::ANNOTATION_SIGNATURE;
use keyservice::{Admitted, Announcement, Authority, Claim, Incumbents, KeyClaim, Refusal};
use mesh_api::status::Issue;

use super::{Own, issue, tunnel_address};
use crate::snapshot::{Node, Snapshot};

/// The outcome of admission.
pub(super) struct Members {
    /// This node.
    pub(super) own: Own,
    /// The others, by name.
    pub(super) peers: BTreeMap<String, Admitted>,
    /// Whom to remember.
    pub(super) incumbents: Incumbents,
}

impl Members {
    /// Weighs what the nodes announce against what their objects say.
    pub(super) fn admit(
        snapshot: &Snapshot,
        announced: Option<&Announcement>,
        issues: &mut Vec<Issue>,
    ) -> Self {
        let local = &snapshot.local;
        let cluster = &snapshot.cluster;
        // Whose prefixes are not the nodes' own to say: another plugin's, or of blocks.
        let foreign = cluster.mesh.external || cluster.ipam.in_use;
        let own_keys: Vec<_> = local.keys().collect();
        let is_ours = |key: &KeyClaim| {
            own_keys.contains(&key.public_key) || local.former_keys.contains(&key.public_key)
        };
        let mut claims = Vec::new();
        let mut silent = BTreeMap::new();
        let first_use = cluster.mesh.first_use;
        let mut claim = |mut announcement: Announcement, authority: Authority| {
            // Before anything is taken from it.
            let signer = first_use.then(|| announcement.signer(authority.uid.as_deref())).flatten();
            if foreign {
                announcement.pod_cidrs.clear();
            }
            claims.push(Claim { announcement, authority, signer });
        };
        for (name, node) in &cluster.nodes {
            let authority = authority(node, foreign);
            match Announcement::from_annotations(name, &node.annotations) {
                // What we have just said of ourselves is newer than what came back.
                Ok(Some(said)) if *name == local.node_name && said.keys.iter().all(is_ours) => {}
                Ok(Some(announcement)) => match before_change(snapshot, name, node, &announcement) {
                    Some((before, why)) => {
                        issues.push(why);
                        claim(before, authority);
                    }
                    None => claim(announcement, authority),
                },
                Ok(None) => drop(silent.insert(name.clone(), authority)),
                Err(error) => {
                    let object = format!("Node/{name}");
                    issues.push(issue(object, error.annotation, "InvalidAnnouncement", error.problem));
                    match Announcement::from_annotations(name, &node.announced_before) {
                        Ok(Some(before)) if *name != local.node_name => claim(before, authority),
                        _ => drop(silent.insert(name.clone(), authority)),
                    }
                }
            }
        }
        let own_node = cluster.nodes.get(&local.node_name).map(|node| &**node);
        if let Some(announcement) = announced {
            silent.remove(&local.node_name);
            let authority = own_node.map(|node| authority(node, foreign)).unwrap_or_default();
            claims.push(Claim { announcement: announcement.clone(), authority, signer: None });
        }
        let rules = Rules {
            own_name: &local.node_name,
            own_keys: &own_keys,
            pools: &cluster.mesh.pools,
            silent,
            first_use: first_use.then_some(&local.trusted),
            synced: snapshot.synced,
        };
        let admission = admit(&claims, &local.incumbents, &rules);
        issues.extend(admission.refused.iter().chain(&admission.notices).map(of_refusal));
        let mut own = own(admission.own.as_ref(), own_node);
        let blocks = |name: &str| cluster.ipam.routed_to(name).collect::<Vec<_>>();
        if cluster.ipam.in_use && admission.own.is_some() {
            own.pod_cidrs = blocks(&local.node_name);
            own.tunnel_addresses.clone_from(&local.tunnel_addresses);
        }
        about_own(snapshot, own_node, &own, issues);
        let mut peers: BTreeMap<String, Admitted> =
            admission.admitted.into_iter().map(|admitted| (admitted.name.clone(), admitted)).collect();
        if cluster.ipam.in_use {
            peers.values_mut().for_each(|peer| peer.pod_cidrs = blocks(&peer.name));
        }
        Self { own, peers, incumbents: admission.incumbents }
    }
}

/// The announcement that goes on counting where one that is signed by somebody else came in its place, with why. After a
/// restart there is none, and the admission refuses the new one.
fn before_change(
    snapshot: &Snapshot,
    name: &str,
    node: &Node,
    now: &Announcement,
) -> Option<(Announcement, Issue)> {
    let (local, uid) = (&snapshot.local, node.uid.as_deref());
    if !snapshot.cluster.mesh.first_use || name == local.node_name {
        return None;
    }
    let known = local.incumbents.0.get(name).filter(|known| known.uid == node.uid)?;
    let (pinned, signer) = (known.announcement_key?, now.signer(uid));
    if signer == Some(pinned) || signer.is_some() && signer == local.trusted.get(name).copied() {
        return None;
    }
    let before = Announcement::from_annotations(name, &node.announced_before).ok()??;
    if before.signer(uid) != Some(pinned) {
        return None;
    }
    let (reason, message) = match signer {
        Some(signer) => (
            KEY_CHANGED,
            format!(
                "is signed with key {signer}, not with {pinned} as before: if that is right, meshctl nodes trust {name}"
            ),
        ),
        None => (UNSIGNED, "is not signed for this Node any more".to_owned()),
    };
    let message = format!("the announcement {message}; the one before stays in force");
    Some((before, issue(format!("Node/{name}"), ANNOTATION_SIGNATURE, reason, message)))
}

/// Where prefixes are `foreign` a node's own say nothing: its pods do, or its blocks.
fn authority(node: &Node, foreign: bool) -> Authority {
    Authority {
        uid: node.uid.clone(),
        pod_cidrs: if foreign { Vec::new() } else { node.pod_cidrs.clone() },
        addresses: node.internal_ips.iter().chain(&node.external_ips).copied().collect(),
    }
}

fn of_refusal(refusal: &Refusal) -> Issue {
    issue(format!("Node/{}", refusal.name), "", refusal.reason, refusal.message.clone())
}

fn own(admitted: Option<&Admitted>, node: Option<&Node>) -> Own {
    let Some(admitted) = admitted else { return Own::default() };
    let internal = node.map(|node| node.internal_ips.as_slice()).unwrap_or_default();
    Own {
        pod_cidrs: admitted.pod_cidrs.clone(),
        addresses: internal.iter().filter(|ip| admitted.addresses.contains(ip)).copied().collect(),
        tunnel_addresses: admitted.pod_cidrs.iter().filter_map(tunnel_address).collect(),
    }
}

fn about_own(snapshot: &Snapshot, node: Option<&Node>, own: &Own, issues: &mut Vec<Issue>) {
    let object = format!("Node/{}", snapshot.local.node_name);
    let mesh = &snapshot.cluster.mesh;
    if mesh.pools.is_empty() && !mesh.external {
        let message = "no pools are configured, so no prefix belongs to the mesh";
        issues.push(issue("MeshConfiguration/default", "spec.pools", "NoPools", message));
    }
    if node.is_none() {
        let message = "no Node object has this node's name";
        issues.push(issue(object.clone(), "metadata.name", "NodeMissing", message));
    }
    if snapshot.local.rotation.slots.is_empty() {
        issues.push(issue(object.clone(), "", "NoKey", "this node has no key, so it has no tunnels"));
    }
    if own.pod_cidrs.is_empty() && !mesh.external && !snapshot.cluster.ipam.in_use {
        let message = "this node has no pod prefix, so its pods get no addresses of their own accord";
        issues.push(issue(object, "spec.podCIDRs", "NoPrefix", message));
    }
}
