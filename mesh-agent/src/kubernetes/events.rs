//! Events on objects that something is wrong with: refused announcements, bad policies, addresses that clash.
//!
//! Every agent sees nearly all of it, and one tells it: whose name and the object's have the least hash of all nodes'.
//! No leader, no lease; if that one is down the issue still stands in every agent's status.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use k8s_openapi::api::events::v1::Event;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use mesh_api::status::Issue;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use super::condition::micro_stamp;
use super::write::{Failure, answered};
use crate::snapshot::Snapshot;
use crate::status::{Board, Observed};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// What passes by itself within this is no event.
const LASTS: Duration = Duration::from_secs(5);
/// Events told at once, and after that one in so long: a cluster full of bad objects is no reason for a flood.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(6);
/// Longest note (events.k8s.io/v1 allows 1 kB).
const LONGEST: usize = 1000;
/// Cluster-scoped objects' events are in this namespace.
const OF_CLUSTER: &str = "default";
const CONTROLLER: &str = "margay.io/mesh-agent";
/// What the API server would not take from us is told where we are asked.
const NOT_TOLD: [&str; 2] = ["NotAnnounced", "StatusNotTold"];

/// An object as an issue names it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Regarding<'a> {
    api_version: &'static str,
    kind: &'a str,
    namespace: &'a str,
    name: &'a str,
}

impl<'a> Regarding<'a> {
    /// `Kind/name` or `Kind/namespace/name` of a kind that an API server has; `None` for anything else.
    fn of(object: &'a str) -> Option<Self> {
        let parts: Vec<&str> = object.split('/').collect();
        let of = |api_version, kind, namespace, name| Some(Self { api_version, kind, namespace, name });
        match parts.as_slice() {
            ["Node", name] => of("v1", "Node", "", name),
            ["Namespace", name] => of("v1", "Namespace", "", name),
            [kind @ ("IPPool" | "IPReservation" | "IPBlock"), name] => {
                of("margay.io/v1alpha1", kind, "", name)
            }
            ["MeshConfiguration", name] => of("margay.io/v1alpha1", "MeshConfiguration", "", name),
            ["Pod", namespace, name] => of("v1", "Pod", namespace, name),
            ["NetworkPolicy", namespace, name] => {
                of("networking.k8s.io/v1", "NetworkPolicy", namespace, name)
            }
            _ => None,
        }
    }

    fn uid(&self, snapshot: &Snapshot) -> Option<String> {
        let cluster = &snapshot.cluster;
        match self.kind {
            "Node" => cluster.nodes.get(self.name)?.uid.clone(),
            "Pod" => {
                let mut pods = cluster.pods.iter();
                let same = |name: &crate::snapshot::ObjectRef| {
                    name.namespace == self.namespace && name.name == self.name
                };
                pods.find(|(name, _)| same(name))?.1.uid.clone()
            }
            _ => None,
        }
    }

    /// Namespaces of objects are their events'.
    fn events_in(&self) -> &'a str {
        if self.namespace.is_empty() { OF_CLUSTER } else { self.namespace }
    }
}

/// Whether this node is the one to tell it. Its own object's troubles every node tells itself.
fn is_ours(snapshot: &Snapshot, regarding: &Regarding<'_>, object: &str) -> bool {
    let own = snapshot.local.node_name.as_str();
    if regarding.kind == "Node" && regarding.name == own {
        return true;
    }
    let weight = |name: &str| Sha256::digest(format!("{name}\n{object}"));
    // Who announces nothing runs no agent.
    let speaks = |name: &&String| {
        let node = snapshot.cluster.nodes.get(*name);
        node.is_some_and(|node| {
            keyservice::announcement::ANNOTATIONS.iter().any(|key| node.annotations.contains_key(*key))
        })
    };
    // A node whose own announcement is at fault may be the one that does not run.
    let others = snapshot
        .cluster
        .nodes
        .keys()
        .filter(speaks)
        .filter(|name| regarding.kind != "Node" || name.as_str() != regarding.name);
    let least = others.map(|name| (weight(name), name.as_str())).min();
    least.is_none_or(|(_, name)| name == own)
}

/// The issues that this node is to tell.
fn ours(seen: &Observed) -> Vec<Issue> {
    if !seen.snapshot.synced {
        return Vec::new();
    }
    let all = seen.all_issues().into_iter();
    all.filter(|issue| {
        !NOT_TOLD.contains(&issue.reason.as_str())
            && Regarding::of(&issue.object)
                .is_some_and(|regarding| is_ours(&seen.snapshot, &regarding, &issue.object))
    })
    .collect()
}

/// The same issue has the same name, so that its event is told once and then counted.
fn name_of(issue: &Issue) -> String {
    let digest =
        Sha256::digest(format!("{}\n{}\n{}\n{}", issue.object, issue.field, issue.reason, issue.message));
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("margay-{}.{hex}", issue.reason.to_lowercase())
}

fn event(snapshot: &Snapshot, issue: &Issue, now: SystemTime) -> Option<(String, String, Value)> {
    let regarding = Regarding::of(&issue.object)?;
    let (namespace, name) = (regarding.events_in().to_owned(), name_of(issue));
    let at = if issue.field.is_empty() { String::new() } else { format!("{}: ", issue.field) };
    let note: String = format!("{at}{}", issue.message).chars().take(LONGEST).collect();
    let mut reference = json!({
        "apiVersion": regarding.api_version, "kind": regarding.kind, "name": regarding.name,
    });
    if !regarding.namespace.is_empty() {
        reference["namespace"] = json!(regarding.namespace);
    }
    if let Some(uid) = regarding.uid(snapshot) {
        reference["uid"] = json!(uid);
    }
    let instance: String = format!("mesh-agent-{}", snapshot.local.node_name).chars().take(128).collect();
    let event = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": {"namespace": namespace, "name": name},
        "eventTime": micro_stamp(now), "type": "Warning", "reason": issue.reason, "action": "Refused",
        "note": note, "regarding": reference,
        "reportingController": CONTROLLER, "reportingInstance": instance,
    });
    Some((namespace, name, event))
}

/// Tells what appears, for ever.
pub async fn tell(client: Client, board: Board) {
    let mut timer = interval(LOOK);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen_since: BTreeMap<String, Instant> = BTreeMap::new();
    // Which were told, and how often they have come.
    let mut told: BTreeMap<String, u32> = BTreeMap::new();
    let mut open: BTreeSet<String> = BTreeSet::new();
    let (mut tokens, mut refilled) = (BURST, Instant::now());
    loop {
        timer.tick().await;
        let now = Instant::now();
        let refill = now.duration_since(refilled).as_millis() / REFILL.as_millis();
        if refill > 0 {
            tokens = BURST.min(tokens.saturating_add(u32::try_from(refill).unwrap_or(BURST)));
            refilled = now;
        }
        let (snapshot, issues) = board.look(|seen| (seen.snapshot.clone(), ours(seen)));
        let present: BTreeMap<String, Issue> =
            issues.into_iter().map(|issue| (name_of(&issue), issue)).collect();
        seen_since.retain(|name, _| present.contains_key(name));
        open.retain(|name| present.contains_key(name));
        for (name, issue) in &present {
            let since = *seen_since.entry(name.clone()).or_insert(now);
            if open.contains(name) || now.duration_since(since) < LASTS || tokens == 0 {
                continue;
            }
            tokens -= 1;
            let count = told.get(name).copied().unwrap_or(0) + 1;
            match one(&client, &snapshot, issue, count).await {
                Ok(()) => {
                    open.insert(name.clone());
                    told.insert(name.clone(), count);
                }
                Err(Failure { reason, message }) => {
                    warn!(object = issue.object, "cannot tell an event: {reason}: {message}");
                    // Tried again when it may work, not at every look.
                    seen_since.insert(name.clone(), now + REFILL * 10);
                }
            }
        }
        // What has not been there for a thousand other issues begins anew.
        if told.len() > 1000 {
            told.retain(|name, _| open.contains(name));
        }
    }
}

async fn one(client: &Client, snapshot: &Snapshot, issue: &Issue, count: u32) -> Result<(), Failure> {
    #[allow(clippy::disallowed_methods)] // The edge: what goes into the object is the wall clock's.
    let now = SystemTime::now();
    let Some((namespace, name, event)) = event(snapshot, issue, now) else { return Ok(()) };
    let events: Api<Event> = Api::namespaced(client.clone(), &namespace);
    let parsed = serde_json::from_value(event)
        .map_err(|error| Failure { reason: "Unparsable", message: error.to_string() })?;
    let params =
        PostParams { field_manager: Some(super::STATUS_MANAGER.to_owned()), ..PostParams::default() };
    match answered(events.create(&params, &parsed)).await {
        Err(Failure { reason: "Conflict", .. }) => {}
        other => return other.map(drop),
    }
    let series = json!({"series": {"count": count.max(2), "lastObservedTime": micro_stamp(now)}});
    let params =
        PatchParams { field_manager: Some(super::STATUS_MANAGER.to_owned()), ..PatchParams::default() };
    answered(events.patch(&name, &params, &Patch::Merge(series))).await.map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::snapshot::{Cluster, Local, Node};

    fn snapshot(own: &str, names: &[&str]) -> Snapshot {
        let node = Node {
            uid: Some("u".to_owned()),
            annotations: [("margay.io/keys".to_owned(), String::new())].into(),
            ..Node::default()
        };
        let nodes = names.iter().map(|name| ((*name).to_owned(), Arc::new(node.clone()))).collect();
        Snapshot {
            synced: true,
            cluster: Arc::new(Cluster { nodes, ..Cluster::default() }),
            local: Local { node_name: own.to_owned(), ..Local::default() },
            ..Snapshot::default()
        }
    }

    fn issue(object: &str) -> Issue {
        Issue {
            object: object.to_owned(),
            field: "spec.x".to_owned(),
            reason: "InvalidField".to_owned(),
            message: "is bad".to_owned(),
        }
    }

    #[test]
    fn of_many_nodes_one_tells_and_never_the_one_at_fault() {
        let names = ["a", "b", "c", "d", "e"];
        for object in
            (0..50).map(|n| format!("NetworkPolicy/x/p{n}")).chain((0..50).map(|n| format!("Node/n{n}")))
        {
            let regarding = Regarding::of(&object).unwrap();
            let tellers =
                names.iter().filter(|own| is_ours(&snapshot(own, &names), &regarding, &object)).count();
            assert_eq!(tellers, 1, "{object}");
        }
        // Of its own object each tells, and one of the others.
        let regarding = Regarding::of("Node/a").unwrap();
        let tellers: Vec<_> =
            names.iter().filter(|own| is_ours(&snapshot(own, &names), &regarding, "Node/a")).collect();
        assert!(tellers.len() == 2 && tellers.contains(&&"a"), "{tellers:?}");
    }

    #[test]
    fn only_objects_of_the_api_server_have_events() {
        for object in ["file x/y", "device margay0", "API server", "reconciler policy", "Node/a/b", "Pod/a"] {
            assert_eq!(Regarding::of(object), None, "{object}");
        }
    }

    #[test]
    fn an_event_is_one_that_the_api_takes() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let (namespace, name, event) = event(&snapshot("a", &["a", "b"]), &issue("Node/b"), now).unwrap();
        assert_eq!((namespace.as_str(), event["regarding"]["uid"].as_str()), ("default", Some("u")));
        assert!(name.starts_with("margay-invalidfield."), "{name}");
        assert_eq!(event["note"], "spec.x: is bad");
        assert_eq!(event["eventTime"], "2023-11-14T22:13:20.000000Z");
        serde_json::from_value::<Event>(event).unwrap();
    }
}
