//! The condition `MargayMeshReady` of this node's Node object: whether its part of the mesh is in place. Written when
//! that changes, and not otherwise: what moves all the time is in metrics.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client};
use mesh_api::status::Issue;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::write::{Failure, Pace, answered};
use super::{STATUS_MANAGER, own_node};
use crate::status::{Board, Observed};

/// The condition's type.
pub const TYPE: &str = "MargayMeshReady";
/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A state that lasts for less is not told.
const STEADY: Duration = Duration::from_secs(3);
/// Sentences longer than this are cut.
const LONGEST: usize = 300;

/// What is said of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Its part of the mesh is in place.
    pub ready: bool,
    /// A CamelCase word for programs.
    pub reason: &'static str,
    /// A sentence for people; the same as long as nothing changes.
    pub message: String,
}

/// What the board says of this node. Other nodes' troubles are not its own.
pub fn condition(seen: &Observed) -> Condition {
    let not = |reason, message: String| {
        let message = message.chars().take(LONGEST).collect();
        Condition { ready: false, reason, message }
    };
    if let Some(source) = seen.snapshot.sources.iter().find(|source| !source.synced) {
        return not("NotSynced", format!("source {} has not been read yet", source.name));
    }
    if seen.snapshot.local.rotation.slots.is_empty() {
        return not("NoKey", "this node has no key".to_owned());
    }
    let up = |name: &String| {
        seen.devices.get(name).is_some_and(|device| device.up == Some(true) && device.device.is_some())
    };
    if seen.desired.wireguard.is_empty() {
        return not("NotAdmitted", "this node's own announcement is not valid".to_owned());
    }
    if let Some(name) = seen.desired.wireguard.keys().find(|name| !up(name)) {
        return not("DeviceDown", format!("device {name} is not up"));
    }
    if let Some(row) = seen.reconcilers.iter().find(|row| row.error.is_some()) {
        let error = row.error.as_deref().unwrap_or_default();
        return not("ReconcileFailed", format!("{}: {error}", row.name));
    }
    if let Some(row) = seen.reconcilers.iter().find(|row| row.generation == 0) {
        return not("Starting", format!("{} has not run yet", row.name));
    }
    let message = "keys, routes and policy are in place".to_owned();
    Condition { ready: true, reason: "MeshReady", message }
}

/// Keeps the condition true, for ever.
pub async fn tell(client: Client, board: Board) {
    let nodes: Api<Node> = Api::all(client);
    let mut timer = interval(LOOK);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told: Option<(String, Condition)> = None;
    let mut transition: Option<(bool, SystemTime)> = None;
    let mut steady: Option<(Condition, Instant)> = None;
    let (mut pace, mut not_before) = (Pace::default(), Instant::now());
    loop {
        timer.tick().await;
        let now = Instant::now();
        let looked = board.look(|seen| {
            let own = own_node(&seen.snapshot).map(|(name, uid)| (name.to_owned(), uid.to_owned()));
            own.map(|own| (own, condition(seen)))
        });
        let Some(((name, uid), condition)) = looked else { continue };
        let since = match &steady {
            Some((same, since)) if *same == condition => *since,
            _ => now,
        };
        steady = Some((condition.clone(), since));
        let present = (uid, condition);
        if told.as_ref() == Some(&present) || now.duration_since(since) < STEADY || now < not_before {
            continue;
        }
        let (uid, condition) = &present;
        #[allow(clippy::disallowed_methods)] // The edge: what goes into the object is the wall clock's.
        let wall = SystemTime::now();
        let changed = match transition {
            Some((ready, at)) if ready == condition.ready => at,
            // An agent that starts anew goes on with what stands there, if that is the same.
            None => former(&nodes, &name, condition.ready).await.unwrap_or(wall),
            _ => wall,
        };
        let patch = patch(&name, uid, condition, changed, wall);
        let params = PatchParams::apply(STATUS_MANAGER).force();
        let outcome = answered(nodes.patch_status(&name, &params, &Patch::Apply(patch))).await;
        let issue = outcome.as_ref().err().map(|Failure { reason, message }| Issue {
            object: format!("Node/{name}"),
            field: format!("status.conditions[{TYPE}]"),
            reason: "StatusNotTold".to_owned(),
            message: format!("{reason}: {message}"),
        });
        board.set_issues("condition", issue.into_iter().collect());
        match outcome {
            Ok(_) => {
                transition = Some((condition.ready, changed));
                told = Some(present);
                pace.reset();
            }
            Err(_) => not_before = Instant::now() + pace.slower(&mut rand::rng()),
        }
    }
}

/// When the condition that stands there began, if it says the same. A list of one: an agent may list nodes anyway.
async fn former(nodes: &Api<Node>, name: &str, ready: bool) -> Option<SystemTime> {
    let own = ListParams::default().fields(&format!("metadata.name={name}"));
    let node = answered(nodes.list(&own)).await.ok()?.items.pop()?;
    let ours = node.status?.conditions?.into_iter().find(|condition| condition.type_ == TYPE)?;
    let at = ours.last_transition_time.filter(|_| ours.status == word(ready))?;
    Some(at.0.into())
}

fn word(ready: bool) -> &'static str {
    if ready { "True" } else { "False" }
}

fn patch(name: &str, uid: &str, condition: &Condition, changed: SystemTime, now: SystemTime) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "uid": uid},
        "status": {"conditions": [{
            "type": TYPE,
            "status": word(condition.ready),
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": stamp(changed),
            "lastHeartbeatTime": stamp(now),
        }]},
    })
}

/// RFC 3339, whole seconds, UTC.
pub(super) fn stamp(at: SystemTime) -> String {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let stamp = k8s_openapi::jiff::Timestamp::from_second(seconds.try_into().unwrap_or(i64::MAX));
    stamp.unwrap_or_default().to_string()
}

/// RFC 3339 with six digits of the second, UTC: a MicroTime.
pub(super) fn micro_stamp(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:06}Z", stamp(at).trim_end_matches('Z'), since.subsec_micros())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use keyservice::PublicKey;
    use keyservice::rotation::{Slot, State};
    use mesh_api::status::SourceStatus;
    use mesh_uapi::Device;

    use super::*;
    use crate::desired::{Desired, WireguardDevice};
    use crate::reconcile::{ReconcileError, Report};
    use crate::snapshot::{Local, Snapshot};
    use crate::status::DeviceSeen;

    fn reason(board: &Board) -> &'static str {
        condition(&board.observed()).reason
    }

    #[test]
    fn it_names_the_first_thing_that_is_not_in_place() {
        let board = Board::new(&["policy", "routes"]);
        let key = PublicKey::from_bytes([7; 32]);
        let plan = |synced, with_key: bool| {
            let slot = Slot { epoch: 0, public_key: key, announced: true, preshared: false };
            let rotation =
                State { slots: with_key.then_some(slot).into_iter().collect(), ..State::default() };
            let source = SourceStatus { name: "kubernetes".into(), synced, objects: 0 };
            let snapshot = Snapshot {
                sources: vec![source],
                local: Local { rotation, ..Local::default() },
                ..Snapshot::default()
            };
            let device = WireguardDevice {
                public_key: key,
                listen_port: 51820,
                fwmark: 0,
                preshared: false,
                peers: [].into(),
            };
            let wireguard = with_key.then(|| ("margay0".to_owned(), device)).into_iter().collect();
            board.planned(
                Arc::new(snapshot),
                Arc::new(Desired { wireguard, ..Desired::default() }),
                Vec::new(),
            );
        };
        plan(false, true);
        assert_eq!(reason(&board), "NotSynced");
        plan(true, false);
        assert_eq!(reason(&board), "NoKey");
        plan(true, true);
        assert_eq!(reason(&board), "DeviceDown");
        let device = DeviceSeen { up: Some(true), device: Some(Device::default()), ..DeviceSeen::default() };
        board.set_devices([("margay0".to_owned(), device)].into(), [].into(), [].into());
        assert_eq!(reason(&board), "Starting");
        board.passed("policy", 1, &Ok(Report::default()));
        board.passed("routes", 1, &Err(ReconcileError::new("route 10.0.0.0/8", "EPERM")));
        let told = condition(&board.observed());
        assert_eq!(told.reason, "ReconcileFailed");
        assert!(told.message.contains("routes: ") && told.message.contains("EPERM"), "{told:?}");
        board.passed("routes", 2, &Ok(Report::default()));
        assert_eq!((reason(&board), condition(&board.observed()).ready), ("MeshReady", true));
    }

    #[test]
    fn times_are_rfc_3339() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(stamp(at), "2023-11-14T22:13:20Z");
    }
}
