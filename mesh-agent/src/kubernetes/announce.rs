//! Announcing this node in the annotations of its Node object: by server-side apply of all of them and no others, so
//! that what somebody else changes of ours is repaired and what is not ours is never touched.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use keyservice::Announcement;
use keyservice::announcement::ANNOTATIONS;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use mesh_api::status::Issue;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::write::{Failure, Pace, answered};
use super::{MANAGER, own_node};
use crate::snapshot::{Labels, Snapshot};
use crate::status::Board;
use crate::store::Store;

/// Within this a watch shows what was written. Until then what it shows is older than that.
const SHOWN: Duration = Duration::from_secs(10);

/// What is to be written: to which Node, and what it is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wish {
    name: String,
    uid: String,
    annotations: BTreeMap<String, String>,
}

/// The write that the Node object needs; `None` while it says what it should, or is not there. Pure.
fn missing(snapshot: &Snapshot, announcement: &Announcement) -> Option<(Wish, Labels)> {
    let (name, uid) = own_node(snapshot)?;
    let annotations: BTreeMap<String, String> = announcement.to_annotations().into_iter().collect();
    let said = said(snapshot, name);
    (said != annotations).then(|| (Wish { name: name.to_owned(), uid: uid.to_owned(), annotations }, said))
}

/// What a node's object says of ours.
fn said(snapshot: &Snapshot, name: &str) -> Labels {
    let all = snapshot.cluster.nodes.get(name).map(|node| &node.annotations);
    let ours = all.into_iter().flatten().filter(|(key, _)| ANNOTATIONS.contains(&key.as_str()));
    ours.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Keeps the Node object saying the newest announcement, for ever. Makes no request while it does.
pub async fn announce(
    client: Client,
    store: Store,
    mut announcements: watch::Receiver<Option<Announcement>>,
    board: Board,
) {
    let nodes: Api<Node> = Api::all(client);
    let mut snapshots = store.watch();
    let mut pace = Pace::default();
    let mut not_before = Instant::now();
    // What was written last, what the object said before, and until when that may still be shown.
    let mut written: Option<(Wish, Labels, Instant)> = None;
    let mut last = None;
    loop {
        let announcement = announcements.borrow_and_update().clone();
        let snapshot = snapshots.borrow_and_update().clone();
        let now = Instant::now();
        let wanted = announcement.as_ref().and_then(|announcement| missing(&snapshot, announcement));
        let mut again = None;
        match wanted {
            None => {
                if now >= not_before {
                    pace.reset();
                }
                tell(&board, &snapshot, None, &mut last);
            }
            Some((wish, before)) => {
                let on_its_way = written
                    .as_ref()
                    .filter(|(write, old, until)| *write == wish && *old == before && now < *until)
                    .map(|(.., until)| *until);
                match on_its_way {
                    Some(until) => again = Some(until),
                    None if now < not_before => again = Some(not_before),
                    None => {
                        let outcome = apply(&nodes, &wish).await;
                        let name = &wish.name;
                        if outcome.is_ok() {
                            info!(node = name, "announced");
                        }
                        tell(&board, &snapshot, outcome.as_ref().err(), &mut last);
                        let done = Instant::now();
                        // Somebody who puts another value there each time is not raced.
                        not_before = done + pace.slower(&mut rand::rng());
                        again = Some(not_before);
                        written = outcome.is_ok().then_some((wish, before, done + SHOWN));
                    }
                }
            }
        }
        let timer = sleep_until(again.unwrap_or(now));
        tokio::select! {
            changed = announcements.changed() => if changed.is_err() { return },
            changed = snapshots.changed() => if changed.is_err() { return },
            () = timer, if again.is_some() => {}
        }
    }
}

async fn apply(nodes: &Api<Node>, wish: &Wish) -> Result<(), Failure> {
    let patch = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": wish.name, "uid": wish.uid, "annotations": wish.annotations},
    });
    let params = PatchParams::apply(MANAGER).force();
    answered(nodes.patch_metadata(&wish.name, &params, &Patch::Apply(patch))).await.map(drop)
}

fn tell(board: &Board, snapshot: &Snapshot, failure: Option<&Failure>, last: &mut Option<Failure>) {
    let issue = failure.map(|Failure { reason, message }| Issue {
        object: format!("Node/{}", snapshot.local.node_name),
        field: "metadata.annotations".to_owned(),
        reason: "NotAnnounced".to_owned(),
        message: format!("{reason}: {message}"),
    });
    board.set_issues("announcement", issue.into_iter().collect());
    if let Some(failure) = failure.filter(|failure| last.as_ref() != Some(*failure)) {
        warn!("cannot announce: {}: {}", failure.reason, failure.message);
    }
    *last = failure.cloned();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use keyservice::{KeyClaim, PublicKey};

    use super::*;
    use crate::snapshot::{Cluster, Local, Node as SlimNode};

    fn announcement() -> Announcement {
        Announcement {
            name: "a".to_owned(),
            keys: vec![KeyClaim { public_key: PublicKey::from_bytes([7; 32]), port: 51820, epoch: 0 }],
            endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
            capabilities: BTreeSet::new(),
            pod_cidrs: Vec::new(),
            signature: None,
        }
    }

    fn snapshot(annotations: Labels, uid: Option<&str>) -> Snapshot {
        let node = SlimNode { uid: uid.map(str::to_owned), annotations, ..SlimNode::default() };
        let cluster = Cluster { nodes: [("a".to_owned(), node.into())].into(), ..Cluster::default() };
        let local = Local { node_name: "a".to_owned(), ..Local::default() };
        Snapshot { cluster: Arc::new(cluster), local, ..Snapshot::default() }
    }

    #[test]
    fn nothing_is_written_while_the_node_says_it_already_whatever_operators_say_there() {
        let mut said: Labels = announcement().to_annotations().into_iter().collect();
        said.insert("margay.io/endpoint-override".to_owned(), "198.51.100.1:1".to_owned());
        assert_eq!(missing(&snapshot(said, Some("u")), &announcement()), None);
    }

    #[test]
    fn a_changed_or_removed_annotation_is_written_with_all_of_ours_and_no_others() {
        let full: Labels = announcement().to_annotations().into_iter().collect();
        for key in full.keys() {
            let mut edited = full.clone();
            edited.insert(key.clone(), "x".to_owned());
            edited.insert("margay.io/endpoint-override".to_owned(), "198.51.100.1:1".to_owned());
            let mut removed = full.clone();
            removed.remove(key);
            for said in [edited, removed] {
                let (wish, _) = missing(&snapshot(said, Some("u")), &announcement()).unwrap();
                assert_eq!((wish.uid.as_str(), &wish.annotations), ("u", &full));
            }
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_not_made() {
        assert_eq!(missing(&Snapshot::default(), &announcement()), None);
        assert_eq!(missing(&snapshot(Labels::new(), None), &announcement()), None);
    }
}
