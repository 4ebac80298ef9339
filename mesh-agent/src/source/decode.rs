//! From Kubernetes objects to the snapshot's slim types, with the API server's defaulting and validation, so
//! that every source of objects means the same.

pub mod cidr;
mod culprit;
pub mod ipam;
pub mod mesh;
pub mod meta;
pub mod namespace;
pub mod network_policy;
pub mod node;
pub mod pod;
pub mod problem;
pub mod selector;
pub mod service;
#[cfg(test)]
mod tests;
mod unknown;

use std::fmt;
use std::sync::Arc;

use ebpf_policy::model;
use ipnet::IpNet;
use k8s_openapi::api::{core, networking};
use mesh_ipam::catalogue;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::mesh::{MeshConfiguration, MeshConfigurationSpec};
use crate::names;
use crate::snapshot::ipam::{BlockView, WantedPools};
use crate::snapshot::{Labels, Node, ObjectRef, Pod, Service};
use problem::Problems;

/// The kinds of objects the agent reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// margay.io/v1alpha1.
    MeshConfiguration,
    /// v1.
    Node,
    /// v1.
    Namespace,
    /// v1.
    Pod,
    /// v1.
    Service,
    /// networking.k8s.io/v1.
    NetworkPolicy,
    /// margay.io/v1alpha1, of an API server only.
    IpPool,
    /// margay.io/v1alpha1, of an API server only.
    IpReservation,
    /// margay.io/v1alpha1, of an API server only.
    IpBlock,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::MeshConfiguration,
        Self::Node,
        Self::Namespace,
        Self::Pod,
        Self::Service,
        Self::NetworkPolicy,
        Self::IpPool,
        Self::IpReservation,
        Self::IpBlock,
    ];

    /// As written in `kind:`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MeshConfiguration => "MeshConfiguration",
            Self::Node => "Node",
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::IpPool => "IPPool",
            Self::IpReservation => "IPReservation",
            Self::IpBlock => "IPBlock",
        }
    }

    /// As written in `apiVersion:`.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::MeshConfiguration | Self::IpPool | Self::IpReservation | Self::IpBlock => {
                "margay.io/v1alpha1"
            }
            Self::Node | Self::Namespace | Self::Pod | Self::Service => "v1",
            Self::NetworkPolicy => "networking.k8s.io/v1",
        }
    }

    /// As written in the API's paths.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::MeshConfiguration => "meshconfigurations",
            Self::Node => "nodes",
            Self::Namespace => "namespaces",
            Self::Pod => "pods",
            Self::Service => "services",
            Self::NetworkPolicy => "networkpolicies",
            Self::IpPool => "ippools",
            Self::IpReservation => "ipreservations",
            Self::IpBlock => "ipblocks",
        }
    }

    /// What an API server need not have: where it has no such kind there are no such objects. A directory of manifests
    /// has none, for nobody in it decides between two nodes.
    pub const fn is_optional(self) -> bool {
        matches!(self, Self::IpPool | Self::IpReservation | Self::IpBlock)
    }

    const fn namespaced(self) -> bool {
        matches!(self, Self::Pod | Self::Service | Self::NetworkPolicy)
    }

    /// The kind a manifest says it is. Of other kinds and groups we know nothing; another version of one of
    /// ours is an error, since nobody else will read it.
    pub fn of(api_version: &str, kind: &str) -> Result<Option<Self>, String> {
        let group = |version: &'static str| version.rsplit_once('/').map_or("", |(group, _)| group);
        let given = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        let ours = Self::ALL.into_iter().find(|known| {
            let old = *known == Self::NetworkPolicy && given == "extensions";
            known.name() == kind && (group(known.api_version()) == given || old)
        });
        match ours {
            Some(known) if known.is_optional() => {
                Err(format!("{kind} is read from an API server only: here addresses are of spec.podCIDRs"))
            }
            Some(known) if known.api_version() == api_version => Ok(Some(known)),
            Some(known) => Err(format!("{kind} is read as {}, not as {api_version:?}", known.api_version())),
            None if given == "margay.io" => Err(format!("{api_version} has no kind {kind}")),
            None => Ok(None),
        }
    }
}

/// Names an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ObjectKey {
    /// For namespaced kinds.
    pub fn reference(&self) -> ObjectRef {
        ObjectRef { namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{}/{}", self.kind.name(), self.name),
            namespace => write!(f, "{}/{namespace}/{}", self.kind.name(), self.name),
        }
    }
}

/// An object in the form the snapshot keeps.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// `spec` of a MeshConfiguration.
    Mesh(Box<MeshConfigurationSpec>),
    /// A Node.
    Node(Arc<Node>),
    /// A Namespace's labels.
    Namespace(Labels),
    /// A Pod.
    Pod(Arc<Pod>, Option<Box<WantedPools>>),
    /// A Service.
    Service(Service),
    /// A NetworkPolicy, perhaps failing closed.
    Policy(Box<model::NetworkPolicy>),
    /// An IPPool, not yet judged.
    Pool(catalogue::Object),
    /// An IPReservation, not yet judged.
    Reservation(catalogue::Object),
    /// An IPBlock.
    Block(Box<(IpNet, BlockView)>),
}

/// What became of one manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// Which object it is.
    pub key: ObjectKey,
    /// The object; `None` when it was refused. A NetworkPolicy never is: it fails closed instead.
    pub object: Option<Object>,
    /// What is wrong with it.
    pub problems: Problems,
}

impl Decoded {
    /// What still counts of the same object `before`: all of it where this one is refused, and of a Node what it
    /// announced.
    pub fn go_on_from(&mut self, before: &Self) {
        match (&mut self.object, &before.object) {
            (Some(Object::Node(now)), Some(Object::Node(before))) => {
                node::remember(&self.key.name, now, before);
            }
            (now @ None, before) => now.clone_from(before),
            _ => {}
        }
    }
}

/// Decodes one object of a known kind, as somebody wrote it.
pub fn decode(kind: Kind, value: &Value) -> Decoded {
    decode_from(kind, value, true)
}

/// Decodes one object as an API server has it. A field that is not known is then no slip of somebody's pen but a newer
/// server's; only where it may narrow what an object means it still counts.
pub fn decode_served(kind: Kind, value: &Value) -> Decoded {
    decode_from(kind, value, kind == Kind::NetworkPolicy)
}

fn decode_from(kind: Kind, value: &Value, told: bool) -> Decoded {
    let mut found = Problems::default();
    let problems = &mut found;
    let key = key(kind, value, problems);
    let object = match kind {
        Kind::MeshConfiguration => typed(value, told, problems)
            .and_then(|object: MeshConfiguration| mesh::decode(object, problems))
            .map(|spec| Object::Mesh(Box::new(spec))),
        Kind::Node => typed(value, told, problems)
            .map(|node: core::v1::Node| Object::Node(Arc::new(node::decode(&node, problems)))),
        Kind::Namespace => typed(value, told, problems)
            .map(|object: core::v1::Namespace| Object::Namespace(namespace::decode(&object, problems))),
        Kind::Pod => {
            let pod: Option<core::v1::Pod> = typed(value, told, problems);
            pod.map(|pod| {
                let pools = pod::pools(&pod.metadata);
                Object::Pod(Arc::new(pod::decode(&key, &pod, problems)), pools)
            })
        }
        Kind::Service => typed(value, told, problems)
            .map(|service: core::v1::Service| Object::Service(service::decode(&service, problems))),
        Kind::IpPool => Some(Object::Pool(ipam::catalogued(&key.name, value))),
        Kind::IpReservation => Some(Object::Reservation(ipam::catalogued(&key.name, value))),
        Kind::IpBlock => ipam::block(&key.name, value, problems).map(|block| Object::Block(Box::new(block))),
        Kind::NetworkPolicy => {
            let typed = typed::<networking::v1::NetworkPolicy>(value, told, problems);
            // Dropping a field would widen a rule (`- form: […]` for `from` admits everyone), and `kubectl apply`
            // refuses it too.
            problems.refuse_unknown("spec.");
            let before = problems.first_refusal().map(|p| format!("{}: {}", p.field, p.message));
            Some(Object::Policy(Box::new(match (typed, before) {
                (Some(policy), None) => network_policy::decode(&policy, &key.reference(), problems),
                (_, why) => network_policy::salvage(value, &key.reference(), &why.unwrap_or_default()),
            })))
        }
    };
    let keep = kind == Kind::NetworkPolicy || !found.is_refused();
    Decoded { key, object: object.filter(|_| keep), problems: found }
}

/// The object's name, read before anything else so that every later problem can name it.
fn key(kind: Kind, value: &Value, problems: &mut Problems) -> ObjectKey {
    let text = |field: &str| value.pointer(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = text("/metadata/name");
    let mut namespace = text("/metadata/namespace");
    if kind.namespaced() {
        if namespace.is_empty() {
            namespace = "default".into();
        }
        if !names::is_dns_label(&namespace) {
            problems.invalid("metadata.namespace", format!("{namespace:?} is not a DNS-1123 label"));
        }
    } else if !namespace.is_empty() {
        problems.invalid("metadata.namespace", format!("a {} has no namespace", kind.name()));
        namespace.clear();
    }
    if kind == Kind::Pod && !names::is_dns_subdomain(&name) {
        problems.invalid("metadata.name", format!("{name:?} is not a DNS-1123 subdomain"));
    }
    ObjectKey { kind, namespace, name }
}

/// Reads the typed object; a field of the wrong type refuses it, a field it does not know is `told` by a warning.
fn typed<T: DeserializeOwned + Serialize>(value: &Value, told: bool, problems: &mut Problems) -> Option<T> {
    match T::deserialize(value) {
        Ok(object) => {
            if told && let Ok(known) = serde_json::to_value(&object) {
                unknown::compare(value, &known, "", problems);
            }
            Some(object)
        }
        Err(error) => {
            let field = culprit::find(value, &|value| T::deserialize(value).is_ok());
            problems.invalid(field, error.to_string());
            None
        }
    }
}
