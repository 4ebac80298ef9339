//! From objects one by one to the [`Cluster`]: duplicates, the nodes' own announcements, implied namespaces
//! and the part of the MeshConfiguration that is this node's.

mod ipam;

use std::collections::BTreeMap;
use std::sync::Arc;

use ebpf_policy::model::NetworkPolicy;
use mesh_api::status::Issue;

use super::decode::namespace::implied_labels;
use super::decode::{Decoded, Kind, Object, ObjectKey};
use super::directory::file::FileObjects;
use crate::snapshot::{Cluster, Labels, Node};

/// Most issues told; a directory of garbage must not fill the memory with complaints.
const MAX_ISSUES: usize = 1000;

/// The place of what an API server says.
const SERVER: &str = "API server";

/// One file's objects.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Where they stand, for messages; entries come in the order of it.
    pub place: &'a str,
    /// The objects.
    pub objects: &'a FileObjects,
}

impl<'a> From<(&'a str, &'a FileObjects)> for Entry<'a> {
    fn from((place, objects): (&'a str, &'a FileObjects)) -> Self {
        Self { place, objects }
    }
}

impl Entry<'_> {
    /// The name of the node whose announcement this file is for, if it is one.
    pub(crate) fn announces(&self) -> Option<&str> {
        let name = self.place.strip_prefix("nodes/")?.strip_suffix(".margay.yaml")?;
        (!name.contains('/')).then_some(name)
    }
}

/// Puts the cluster together as node `own_name` sees it; with the number of objects.
pub fn assemble(entries: &[Entry<'_>], own_name: &str) -> (Cluster, usize) {
    let mut out = Assembly::default();
    for entry in entries {
        out.file_problems(entry);
        let announces = entry.announces();
        for decoded in &entry.objects.objects {
            out.problems(decoded, entry.place);
            match announces {
                Some(name) => out.announcement(decoded, entry.place, name),
                None => out.object(decoded, entry.place),
            }
        }
    }
    out.finish(own_name)
}

/// The same from an API server, which has every object once.
pub fn of_server<'a>(objects: impl Iterator<Item = &'a Decoded>, own_name: &str) -> (Cluster, usize) {
    let mut out = Assembly::default();
    for decoded in objects {
        out.problems(decoded, SERVER);
        out.object(decoded, SERVER);
    }
    out.finish(own_name)
}

#[derive(Default)]
struct Assembly<'a> {
    objects: BTreeMap<&'a ObjectKey, (&'a Object, &'a str)>,
    /// What nodes say of themselves, and said before.
    announcements: BTreeMap<&'a str, (Labels, Labels)>,
    issues: Vec<Issue>,
    /// A Node or Pod cannot be read.
    incomplete: bool,
    count: usize,
}

impl<'a> Assembly<'a> {
    fn issue(&mut self, object: String, field: &str, reason: &str, message: String) {
        self.issues.push(Issue { object, field: field.into(), reason: reason.into(), message });
    }

    fn file_problems(&mut self, entry: &Entry<'_>) {
        for problem in &entry.objects.problems {
            let stays = if problem.incomplete { "; objects read before stay in force" } else { "" };
            let line = if problem.line > 0 { format!("line {}: ", problem.line) } else { String::new() };
            let message = format!("{line}{}{stays}", problem.message);
            self.issue(format!("file {}", entry.place), "", problem.reason, message);
        }
    }

    fn problems(&mut self, decoded: &Decoded, place: &str) {
        let object = decoded.key.to_string();
        self.issues.extend(decoded.problems.0.iter().map(|problem| problem.issue(&object, place)));
        if decoded.problems.is_refused() {
            let (reason, message) = match (&decoded.object, decoded.key.kind) {
                (_, Kind::NetworkPolicy) => return,
                (Some(_), _) => ("Refused", "refused; the version read before stays in force"),
                (None, _) => ("Refused", "refused; the object does not count"),
            };
            self.issue(object, "", reason, format!("{place}: {message}"));
        }
    }

    fn object(&mut self, decoded: &'a Decoded, place: &'a str) {
        let Some(object) = &decoded.object else {
            self.incomplete |= matches!(decoded.key.kind, Kind::Node | Kind::Pod);
            return;
        };
        if let Some((_, first)) = self.objects.get(&decoded.key) {
            let message = format!("{place}: {first} has this object too, and counts");
            return self.issue(decoded.key.to_string(), "", "DuplicateObject", message);
        }
        self.count += 1;
        self.objects.insert(&decoded.key, (object, place));
    }

    /// A node may say of itself what its annotations can say, and nothing of others.
    fn announcement(&mut self, decoded: &'a Decoded, place: &str, name: &'a str) {
        let Some(object) = &decoded.object else { return };
        let key = decoded.key.to_string();
        let Object::Node(node) = object else {
            let message = format!("{place}: only Node {name} may stand in this file; ignored");
            return self.issue(key, "", "NotAnAnnouncement", message);
        };
        if decoded.key.name != name || self.announcements.contains_key(name) {
            let message = format!("{place}: only one Node, named {name}, may stand in this file; ignored");
            return self.issue(key, "metadata.name", "NotAnAnnouncement", message);
        }
        let (announced, foreign): (Labels, Labels) =
            node.annotations.clone().into_iter().partition(|(annotation, _)| {
                keyservice::announcement::ANNOTATIONS.contains(&annotation.as_str())
            });
        let Node { labels, pod_cidrs, internal_ips, external_ips, .. } = &**node;
        let ignored = [
            ("metadata.labels", !labels.is_empty()),
            ("metadata.annotations", !foreign.is_empty()),
            ("spec.podCIDRs", !pod_cidrs.is_empty()),
            ("status.addresses", !(internal_ips.is_empty() && external_ips.is_empty())),
        ];
        for (field, _) in ignored.into_iter().filter(|(_, present)| *present) {
            let message = format!("{place}: a node cannot say this of itself; ignored");
            self.issue(key.clone(), field, "NotAnAnnouncement", message);
        }
        self.count += 1;
        self.announcements.insert(name, (announced, node.announced_before.clone()));
    }

    fn finish(mut self, own_name: &str) -> (Cluster, usize) {
        let mut cluster = Cluster::default();
        let mut mesh = None;
        let mut ipam = ipam::Parts { incomplete: self.incomplete, ..ipam::Parts::default() };
        for (key, (object, _)) in std::mem::take(&mut self.objects) {
            match object {
                Object::Mesh(spec) => mesh = Some(spec),
                Object::Node(node) => {
                    cluster.nodes.insert(key.name.clone(), Arc::clone(node));
                }
                Object::Namespace(labels) => {
                    cluster.namespaces.insert(key.name.clone(), labels.clone());
                }
                Object::Pod(pod, pools) => {
                    ipam.wanted.extend(pools.as_deref().map(|pools| (key.reference(), pools.clone())));
                    cluster.pods.insert(key.reference(), Arc::clone(pod));
                }
                Object::Service(service) => {
                    cluster.services.insert(key.reference(), service.clone());
                }
                Object::Pool(pool) => ipam.pools.push(pool.clone()),
                Object::Reservation(reservation) => ipam.reservations.push(reservation.clone()),
                Object::Block(block) => ipam.blocks.push((**block).clone()),
                Object::Policy(policy) => {
                    cluster.policies.insert(key.reference(), NetworkPolicy::clone(policy));
                }
            }
        }
        for (name, (announced, before)) in self.announcements {
            let node = Arc::make_mut(cluster.nodes.entry(name.to_owned()).or_default());
            // Every announcement carries all of them, so what a copied Node object still has is older.
            node.annotations.retain(|key, _| !keyservice::announcement::ANNOTATIONS.contains(&key.as_str()));
            node.annotations.extend(announced);
            node.announced_before = before;
        }
        for key in cluster.pods.keys() {
            let implied = || implied_labels(&key.namespace);
            cluster.namespaces.entry(key.namespace.clone()).or_insert_with(implied);
        }
        if let Some(spec) = mesh {
            let nobody = Labels::new();
            let labels = cluster.nodes.get(own_name).map_or(&nobody, |node| &node.labels);
            cluster.mesh = spec.for_node(labels);
        }
        self.issues.extend(ipam.finish(&mut cluster));
        if self.issues.len() > MAX_ISSUES {
            let more = self.issues.len() - MAX_ISSUES;
            self.issues.truncate(MAX_ISSUES);
            self.issues.push(Issue {
                object: "file .".into(),
                field: String::new(),
                reason: "TooManyIssues".into(),
                message: format!("{more} more issues are not shown"),
            });
        }
        cluster.issues = self.issues;
        (cluster, self.count)
    }
}
