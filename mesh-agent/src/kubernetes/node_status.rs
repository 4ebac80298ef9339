//! This node's MeshNodeStatus: a short word on how its part of the mesh is, for who asks the API server. Written when
//! it changes, and not often.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use mesh_api::status::{Issue, PeerState};
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::condition::{condition, stamp};
use super::write::{Failure, Pace, answered};
use super::{STATUS_MANAGER, own_node};
use crate::config::node_status::{IssueSummary, MeshNodeStatus, MeshNodeStatusStatus, UnhealthyPeer};
use crate::desired::Datapath;
use crate::status::{Board, Observed};

/// Peers and issues listed; the counts are of all.
pub const LISTED: usize = 20;
/// Sentences longer than this are cut.
const LONGEST: usize = 300;
/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// Between two writes, at random: nobody reads this for what happened within the last half minute.
const APART: std::ops::Range<u64> = 25_000..40_000;

/// Who does not answer, and since when.
type Unhealthy = BTreeMap<String, (&'static str, SystemTime)>;

/// The peers that do not answer now, each with the time of its last change of state.
fn unhealthy(seen: &Observed, before: &Unhealthy, now: SystemTime) -> Unhealthy {
    let mut states: BTreeMap<&str, &'static str> = BTreeMap::new();
    for (device, wanted) in &seen.desired.wireguard {
        for (key, peer) in &wanted.peers {
            let id = (device.clone(), *key);
            let silent = seen.health.get(&id).is_some_and(|health| health.silent.is_some());
            let state = match seen.peers.get(&id) {
                _ if silent => "silent",
                Some(PeerState::Down) => "down",
                _ => continue,
            };
            states.insert(&peer.name, state);
        }
    }
    let since = |name: &str, state: &str| match before.get(name) {
        Some((was, at)) if *was == state => *at,
        _ => now,
    };
    states.into_iter().map(|(name, state)| (name.to_owned(), (state, since(name, state)))).collect()
}

/// What is told of this node. Pure.
fn told(seen: &Observed, unhealthy: &Unhealthy) -> MeshNodeStatusStatus {
    let condition = condition(seen);
    let local = &seen.snapshot.local;
    let peers: BTreeSet<&str> = seen
        .desired
        .wireguard
        .values()
        .flat_map(|device| device.peers.values().map(|peer| peer.name.as_str()))
        .collect();
    let issues = seen.all_issues();
    let listed = unhealthy.iter().take(LISTED).map(|(name, (state, since))| UnhealthyPeer {
        name: name.clone(),
        state: (*state).to_owned(),
        last_transition_time: stamp(*since),
    });
    let cut = |text: &str| text.chars().take(LONGEST).collect::<String>();
    let summary = |issue: &Issue| IssueSummary {
        object: cut(&issue.object),
        field: cut(&issue.field),
        reason: issue.reason.clone(),
        message: cut(&issue.message),
    };
    MeshNodeStatusStatus {
        ready: if condition.ready { "True" } else { "False" }.to_owned(),
        reason: condition.reason.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        datapath: match local.datapath {
            Datapath::Kernel => "kernel",
            Datapath::Userspace => "userspace",
        }
        .to_owned(),
        epoch: local.rotation.newest().map_or(0, |slot| slot.epoch),
        peers: count(peers.len()),
        unhealthy_count: count(unhealthy.len()),
        unhealthy: listed.collect(),
        endpoints: count(seen.snapshot.endpoints.len()),
        policy_generation: seen.generation().policy,
        policies: count(seen.policies.len()),
        policies_failing_closed: count(seen.policies.iter().filter(|policy| policy.issue.is_some()).count()),
        issue_count: count(issues.len()),
        issues: issues.iter().take(LISTED).map(summary).collect(),
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Keeps the object true, for ever.
pub async fn tell(client: Client, board: Board) {
    let statuses: Api<MeshNodeStatus> = Api::all(client);
    let mut timer = interval(LOOK);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known = Unhealthy::new();
    let mut written: Option<(String, MeshNodeStatusStatus)> = None;
    let (mut pace, mut not_before) = (Pace::default(), Instant::now());
    loop {
        timer.tick().await;
        #[allow(clippy::disallowed_methods)] // The edge: what goes into the object is the wall clock's.
        let wall = SystemTime::now();
        let looked = board.look(|seen| {
            let (name, uid) = own_node(&seen.snapshot)?;
            // What is not known yet is no news.
            if !seen.snapshot.synced {
                return None;
            }
            let now = unhealthy(seen, &known, wall);
            let status = told(seen, &now);
            Some((name.to_owned(), uid.to_owned(), now, status))
        });
        let Some((name, uid, now, status)) = looked else { continue };
        known = now;
        // The generation alone is no reason to write: it moves with every change of every object.
        let same = written.as_ref().is_some_and(|(of, old)| {
            let old = MeshNodeStatusStatus { policy_generation: status.policy_generation, ..old.clone() };
            *of == uid && old == status
        });
        if same || Instant::now() < not_before {
            continue;
        }
        let outcome = write(&statuses, &name, &uid, &status).await;
        let issue = outcome.as_ref().err().map(|Failure { reason, message }| Issue {
            object: format!("MeshNodeStatus/{name}"),
            field: "status".to_owned(),
            reason: "StatusNotTold".to_owned(),
            message: format!("{reason}: {message}"),
        });
        board.set_issues("node status", issue.into_iter().collect());
        let wait = match outcome {
            Ok(()) => {
                pace.reset();
                written = Some((uid, status));
                Duration::from_millis(rand::rng().random_range(APART))
            }
            Err(_) => pace.slower(&mut rand::rng()),
        };
        not_before = Instant::now() + wait;
    }
}

/// The object goes with the Node, so it is the Node's.
async fn write(
    statuses: &Api<MeshNodeStatus>,
    name: &str,
    uid: &str,
    status: &MeshNodeStatusStatus,
) -> Result<(), Failure> {
    let params = PatchParams::apply(STATUS_MANAGER).force();
    let object = |part: Value| {
        let mut object = json!({
            "apiVersion": "margay.io/v1alpha1", "kind": "MeshNodeStatus",
            "metadata": {"name": name},
        });
        if let (Some(object), Value::Object(part)) = (object.as_object_mut(), part) {
            object.extend(part);
        }
        object
    };
    let patch = object(json!({"status": status}));
    match answered(statuses.patch_status(name, &params, &Patch::Apply(&patch))).await {
        Err(Failure { reason: "NotFound", .. }) => {}
        other => return other.map(drop),
    }
    let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}]);
    let mut whole = object(json!({"spec": {}}));
    whole["metadata"]["ownerReferences"] = owner;
    answered(statuses.patch(name, &params, &Patch::Apply(&whole))).await?;
    answered(statuses.patch_status(name, &params, &Patch::Apply(&patch))).await.map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use keyservice::PublicKey;

    use super::*;
    use crate::desired::{Desired, WireguardDevice, WireguardPeer};
    use crate::snapshot::Snapshot;

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32])
    }

    fn seen(down: &[u8]) -> Observed {
        let peer = |n: u8| {
            let peer = WireguardPeer {
                name: format!("n{n:02}"),
                endpoint: None,
                allowed_ips: BTreeSet::new(),
                persistent_keepalive: 0,
                learned: false,
                reach: Default::default(),
                connect: false,
            };
            (key(n), peer)
        };
        let device = WireguardDevice {
            public_key: key(200),
            listen_port: 51820,
            fwmark: 0,
            preshared: false,
            peers: (0..50).map(peer).collect(),
        };
        let desired = Desired { wireguard: [("margay0".to_owned(), device)].into(), ..Desired::default() };
        Observed {
            snapshot: Arc::new(Snapshot::default()),
            desired: Arc::new(desired),
            peers: down.iter().map(|n| (("margay0".to_owned(), key(*n)), PeerState::Down)).collect(),
            ..Observed::default()
        }
    }

    #[test]
    fn at_most_twenty_peers_are_listed_and_all_are_counted() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let down: Vec<u8> = (0..30).collect();
        let seen = seen(&down);
        let status = told(&seen, &unhealthy(&seen, &Unhealthy::new(), now));
        assert_eq!((status.peers, status.unhealthy_count, status.unhealthy.len()), (50, 30, LISTED));
        assert_eq!(status.unhealthy[0].last_transition_time, "2023-11-14T22:13:20Z");
    }

    #[test]
    fn a_peers_time_is_that_of_its_last_change() {
        let at = |s| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        let first = unhealthy(&seen(&[1, 2]), &Unhealthy::new(), at(100));
        let second = unhealthy(&seen(&[2, 3]), &first, at(200));
        assert_eq!(
            second,
            [("n02".to_owned(), ("down", at(100))), ("n03".to_owned(), ("down", at(200)))].into()
        );
        let third = unhealthy(&seen(&[1]), &second, at(300));
        assert_eq!(third["n01"].1, at(300), "it was well in between");
    }
}
