//! What has been heard of each kind, so far.

use std::collections::BTreeMap;

use mesh_api::status::Issue;

use super::follow::Heard;
use crate::source::decode::{Decoded, Kind, ObjectKey};

/// Who is at fault in our issues.
const SERVER: &str = "API server";

/// The objects, by kind.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    kinds: BTreeMap<Kind, Objects>,
}

#[derive(Debug, Default)]
struct Objects {
    by_key: BTreeMap<ObjectKey, Decoded>,
    /// Has been listed once.
    listed: bool,
    silent: Option<(&'static str, String)>,
}

impl Shelf {
    /// One that waits for these kinds.
    pub(super) fn new(kinds: &[Kind]) -> Self {
        Self { kinds: kinds.iter().map(|kind| (*kind, Objects::default())).collect() }
    }

    /// Takes what was heard of a kind. True if it changes anything to be told.
    pub(super) fn take(&mut self, kind: Kind, heard: Heard) -> bool {
        let objects = self.kinds.entry(kind).or_default();
        match heard {
            Heard::All(all) => {
                let mut old = std::mem::take(&mut objects.by_key);
                for decoded in all {
                    let before = old.remove(&decoded.key);
                    objects.by_key.insert(decoded.key.clone(), accepted(decoded, before.as_ref()));
                }
                objects.listed = true;
                objects.silent = None;
                true
            }
            Heard::Is(decoded) => {
                let before = objects.by_key.remove(&decoded.key);
                let now = accepted(*decoded, before.as_ref());
                let changed = before.as_ref() != Some(&now);
                objects.by_key.insert(now.key.clone(), now);
                changed
            }
            Heard::Gone(decoded) => objects.by_key.remove(&decoded.key).is_some(),
            Heard::Follows => objects.silent.take().is_some(),
            Heard::Silent(reason, message) => {
                let now = Some((reason, message));
                let changed = objects.silent != now;
                objects.silent = now;
                changed
            }
        }
    }

    /// Every kind has been listed.
    pub(super) fn is_whole(&self) -> bool {
        self.kinds.values().all(|objects| objects.listed)
    }

    /// All objects, kind by kind.
    pub(super) fn objects(&self) -> impl Iterator<Item = &Decoded> {
        self.kinds.values().flat_map(|objects| objects.by_key.values())
    }

    /// What is not heard, and why; a server that is not reached for any kind is told once.
    pub(super) fn issues(&self) -> Vec<Issue> {
        let silent = |(kind, objects): (&Kind, &Objects)| {
            let (reason, message) = objects.silent.clone()?;
            let stays = if objects.listed { "; what was heard before stays in force" } else { "" };
            let field = if reason == "Unreachable" { "" } else { kind.plural() };
            Some(Issue {
                object: SERVER.to_owned(),
                field: field.to_owned(),
                reason: reason.to_owned(),
                message: format!("{message}{stays}"),
            })
        };
        let mut issues: Vec<Issue> = self.kinds.iter().filter_map(silent).collect();
        let mut seen = false;
        issues.retain(|issue| issue.reason != "Unreachable" || !std::mem::replace(&mut seen, true));
        issues
    }
}

/// Of an object that is refused, the version accepted before stays; and so does an announcement.
fn accepted(mut now: Decoded, before: Option<&Decoded>) -> Decoded {
    if let Some(before) = before {
        now.go_on_from(before);
    }
    now
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;
    use crate::source::decode::{Object, decode_served};

    fn node(name: &str, address: &str) -> Decoded {
        let addresses = json!([{"type": "InternalIP", "address": address}]);
        let value = json!({"metadata": {"name": name}, "status": {"addresses": addresses}});
        decode_served(Kind::Node, &value)
    }

    fn names(shelf: &Shelf) -> Vec<&str> {
        shelf.objects().map(|decoded| decoded.key.name.as_str()).collect()
    }

    #[test]
    fn it_is_whole_when_every_kind_was_listed() {
        let mut shelf = Shelf::new(&[Kind::Node, Kind::Pod]);
        shelf.take(Kind::Node, Heard::All(vec![node("a", "192.0.2.1")]));
        assert!(!shelf.is_whole());
        shelf.take(Kind::Pod, Heard::All(Vec::new()));
        assert!(shelf.is_whole());
    }

    #[test]
    fn a_new_list_takes_away_what_it_does_not_have() {
        let mut shelf = Shelf::new(&[Kind::Node]);
        shelf.take(Kind::Node, Heard::All(vec![node("a", "192.0.2.1"), node("b", "192.0.2.2")]));
        assert!(shelf.take(Kind::Node, Heard::Is(Box::new(node("c", "192.0.2.3")))));
        assert!(!shelf.take(Kind::Node, Heard::Is(Box::new(node("c", "192.0.2.3")))), "nothing new");
        assert!(shelf.take(Kind::Node, Heard::Gone(Box::new(node("a", "192.0.2.1")))));
        assert_eq!(names(&shelf), ["b", "c"]);
        shelf.take(Kind::Node, Heard::All(vec![node("c", "192.0.2.3")]));
        assert_eq!(names(&shelf), ["c"]);
    }

    #[test]
    fn of_a_refused_object_the_version_before_stays() {
        let mut shelf = Shelf::new(&[Kind::Node]);
        shelf.take(Kind::Node, Heard::All(vec![node("a", "192.0.2.1")]));
        let good = shelf.objects().next().unwrap().object.clone();
        for heard in [Heard::Is(Box::new(node("a", "here"))), Heard::All(vec![node("a", "here")])] {
            shelf.take(Kind::Node, heard);
            let now = shelf.objects().next().unwrap();
            assert!(now.problems.is_refused());
            assert_eq!(now.object, good);
        }
    }

    #[test]
    fn an_illegible_announcement_leaves_the_one_before_in_force_until_the_node_is_another() {
        let node = |uid: &str, keys: Value| {
            let annotations = json!({
                "margay.io/announcement-version": "1", "margay.io/keys": keys.to_string(),
                "margay.io/endpoints": "", "margay.io/capabilities": "", "margay.io/pod-cidrs": "",
            });
            let value = json!({"metadata": {"name": "a", "uid": uid, "annotations": annotations}});
            decode_served(Kind::Node, &value)
        };
        let before = |shelf: &Shelf| match &shelf.objects().next().unwrap().object {
            Some(Object::Node(node)) => node.announced_before.get("margay.io/keys").cloned(),
            other => panic!("{other:?}"),
        };
        let key = keyservice::PublicKey::from_bytes([7; 32]).to_string();
        let good = json!([{"publicKey": key, "port": 51820, "epoch": 0}]);
        let mut shelf = Shelf::new(&[Kind::Node]);
        shelf.take(Kind::Node, Heard::All(vec![node("u", good.clone())]));
        assert_eq!(before(&shelf), None);
        for bad in [json!("x"), json!([]), json!(7)] {
            shelf.take(Kind::Node, Heard::Is(Box::new(node("u", bad))));
            assert_eq!(before(&shelf), Some(good.to_string()));
        }
        shelf.take(Kind::Node, Heard::Is(Box::new(node("v", json!("x")))));
        assert_eq!(before(&shelf), None, "rebuilt");
        shelf.take(Kind::Node, Heard::Is(Box::new(node("v", good))));
        assert_eq!(before(&shelf), None);
    }

    #[test]
    fn silence_keeps_everything_and_is_told_until_it_ends() {
        let mut shelf = Shelf::new(&[Kind::Node, Kind::Pod]);
        shelf.take(Kind::Node, Heard::All(vec![node("a", "192.0.2.1")]));
        for kind in [Kind::Node, Kind::Pod] {
            assert!(shelf.take(kind, Heard::Silent("Unreachable", "connection refused".to_owned())));
        }
        assert_eq!(names(&shelf), ["a"]);
        assert_eq!(shelf.issues().len(), 1, "{:?}", shelf.issues());
        shelf.take(Kind::Pod, Heard::Silent("Forbidden", "no".to_owned()));
        assert_eq!(shelf.issues().len(), 2);
        assert!(shelf.take(Kind::Node, Heard::Follows));
        assert!(!shelf.take(Kind::Node, Heard::Follows));
        assert_eq!(shelf.issues()[0].field, "pods");
    }
}
