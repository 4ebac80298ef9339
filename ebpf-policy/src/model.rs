//! What policy is made from: pods, namespaces and NetworkPolicies, as plain values.
//!
//! Independent of any Kubernetes client: whoever reads manifests or watches an API server converts into these types, having
//! applied the API server's defaults (protocol TCP, `policyTypes`, the `kubernetes.io/metadata.name` label of a namespace).
//! What it could not convert becomes a fail-closed value (`invalid`), never a missing one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Labels of a pod or namespace; `""` is a value like any other.
pub type Labels = BTreeMap<String, String>;

/// Everything in the cluster that policy depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterView {
    /// Every pod of the cluster, this node's included. They are many, and one view shares most of them with the next.
    #[serde(with = "shared")]
    pub pods: Vec<Arc<Pod>>,
    /// Labels by namespace name. A namespace that is not listed matches no namespace selector, not even the empty one.
    pub namespaces: BTreeMap<String, Labels>,
    /// Every NetworkPolicy, valid or not.
    pub policies: Vec<NetworkPolicy>,
    /// Addresses from which kube-proxy sends packets on to others: policy looks at those others.
    pub services: BTreeSet<ServiceAddress>,
}

/// Shared values, written as if they were not (serde's own feature for it would be every crate's).
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(list: &[Arc<T>], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(list.iter().map(|one| &**one))
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<Arc<T>>, D::Error> {
        Ok(Vec::<T>::deserialize(from)?.into_iter().map(Arc::new).collect())
    }
}

/// An address at which a Service is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceAddress {
    /// A cluster IP, an external or load balancer's IP, or a node's address.
    pub ip: IpAddr,
    /// The one port of it that is the Service's, as a NodePort is; `None` for all of them.
    pub port: Option<(Protocol, u16)>,
}

/// A pod's name in its namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodRef {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod as policy sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// `metadata.uid`, where there is one: for what is told of the pod.
    #[serde(default)]
    pub uid: Option<String>,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `spec.nodeName`, once scheduled.
    pub node: Option<String>,
    /// Every entry of `status.podIPs`. A pod without an address matches nothing.
    pub ips: Vec<IpAddr>,
    /// Declared container ports that have a name (ordinary containers and native sidecars).
    pub ports: Vec<NamedPort>,
    /// `spec.hostNetwork`: such a pod is node traffic, neither selected by a policy nor by a peer.
    pub host_network: bool,
    /// Phase Succeeded or Failed: its addresses may already be another pod's, so they count no more.
    pub finished: bool,
    /// `metadata.deletionTimestamp` is set; the pod stays policed until it is gone.
    pub terminating: bool,
}

impl Pod {
    /// The pod's name, for look-ups and messages.
    pub fn reference(&self) -> PodRef {
        PodRef { namespace: self.namespace.clone(), name: self.name.clone() }
    }

    /// Whether policy applies to the pod and selectors may name it: it has a network of its own and still runs.
    pub fn is_policed(&self) -> bool {
        !self.host_network && !self.finished
    }
}

/// A named container port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedPort {
    /// Name within the pod.
    pub name: String,
    /// Its protocol: a name matches only together with the protocol.
    pub protocol: Protocol,
    /// Its number in this pod; other pods may give the same name another number.
    pub number: u16,
}

/// A transport protocol a policy's port can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp,
    /// User Datagram Protocol.
    Udp,
    /// Stream Control Transmission Protocol.
    Sctp,
}

impl Protocol {
    /// The number in an IP header (IANA protocol numbers).
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// A `networking.k8s.io/v1` NetworkPolicy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPolicy {
    /// Namespace whose pods it can select.
    pub namespace: String,
    /// Name of the policy.
    pub name: String,
    /// Which pods of the namespace it isolates; empty selects all of them.
    pub pod_selector: LabelSelector,
    /// Ingress rules, or `None` if Ingress is not among its (defaulted) policyTypes. `Some(vec![])` denies everything.
    pub ingress: Option<Vec<Rule>>,
    /// Egress rules, in the same way.
    pub egress: Option<Vec<Rule>>,
    /// Why the policy cannot be understood, if so: it then isolates what it selects and allows nothing. Whoever sets this gives
    /// a selector and directions at least as wide as the author may have meant.
    pub invalid: Option<String>,
}

/// One ingress or egress rule: allows traffic that matches any of its peers and any of its ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// `from` or `to`; empty means anyone, in or outside the cluster.
    pub peers: Vec<Peer>,
    /// Empty means every port of every protocol.
    pub ports: Vec<Port>,
    /// Why the rule cannot be understood, if so: it then allows nothing.
    pub invalid: Option<String>,
}

/// The other end of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Peer {
    /// Pods, by labels. With both selectors both must match.
    Pods {
        /// Namespaces to look in; `None` is the policy's own namespace only.
        namespace_selector: Option<LabelSelector>,
        /// Pods within them; `None` is all of them.
        pod_selector: Option<LabelSelector>,
    },
    /// Addresses, pods' included.
    IpBlock {
        /// The block; host bits do not count.
        cidr: IpNet,
        /// Parts of it that this peer does not match; another peer may.
        except: Vec<IpNet>,
    },
}

/// A port of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The protocol; Kubernetes' default is TCP.
    pub protocol: Protocol,
    /// The numbers it stands for.
    pub number: PortNumber,
}

/// Which port numbers a rule's port matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PortNumber {
    /// Every port of the protocol.
    All,
    /// `port` to `endPort`, both inclusive; a single port is a range of one.
    Range(u16, u16),
    /// A named port of the destination pod. An unknown name matches nothing.
    Named(String),
}

/// A label selector; empty matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LabelSelector {
    /// `matchLabels`: each key must be present with that value.
    pub match_labels: Labels,
    /// `matchExpressions`: all must hold.
    pub match_expressions: Vec<Requirement>,
}

/// One entry of `matchExpressions`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Requirement {
    /// Label key.
    pub key: String,
    /// How the key is compared.
    pub operator: Operator,
    /// Values for `In` and `NotIn`.
    pub values: Vec<String>,
}

/// Operator of a [`Requirement`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Operator {
    /// The key is present and its value is listed.
    In,
    /// The key is absent, or its value is not listed.
    NotIn,
    /// The key is present.
    Exists,
    /// The key is absent.
    DoesNotExist,
}

/// A pod's interface on this node, as the CNI plugin made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalEndpoint {
    /// Index of the host-side veth in the agent's network namespace.
    pub ifindex: u32,
    /// Its name.
    pub ifname: String,
    /// The pod behind it. An endpoint whose pod is unknown, here or in the [`ClusterView`], is closed.
    pub pod: Option<PodRef>,
    /// Addresses given to the pod: the authority for this node, before `status.podIPs` says so.
    pub ips: Vec<IpAddr>,
}

/// Which sources may come out of the tunnel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranges {
    /// Everything that remote nodes own: pod CIDRs, pods' further addresses, node addresses.
    pub remote: Vec<IpNet>,
    /// Everything that is ours; never a legal source in the tunnel. The longest prefix decides.
    pub own: Vec<IpNet>,
}

/// Direction of a connection, seen from the pod that a policy selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A policy's rule, as shown to people.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RuleName {
    /// The policy's namespace.
    pub namespace: String,
    /// The policy's name.
    pub policy: String,
    /// Direction of the rule.
    pub direction: Direction,
    /// Index in `ingress` or `egress`, from 0.
    pub index: usize,
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} {}[{}]", self.namespace, self.policy, self.direction, self.index)
    }
}
