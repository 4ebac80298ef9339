//! Everything the sources know at one moment. The only input of [`crate::plan`].

pub mod ipam;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use keyservice::rotation::{Settings, State};
use keyservice::{AnnouncementKey, Incumbents, PublicKey};
use mesh_api::status::{Issue, SourceStatus};

/// A Pod object, in the policy engine's own model.
pub use ebpf_policy::model::Pod;

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl std::fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// All sources at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Snapshot {
    /// Grows with every change; starts at 1.
    pub generation: u64,
    /// Every source has been read in full once. Nothing is pruned before.
    pub synced: bool,
    /// What the cluster's objects say (file source now, the API server later).
    pub cluster: Arc<Cluster>,
    /// Pods that have an interface on this node, by host-side interface name.
    pub endpoints: BTreeMap<String, Endpoint>,
    /// What this node knows of itself.
    pub local: Local,
    /// For status.
    pub sources: Vec<SourceStatus>,
}

/// The cluster's objects in the slim form the plan needs.
// `Eq`, so that one is known to equal itself without a look at all of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cluster {
    /// The cluster-wide wish, as it applies to this node (overrides by selector already merged).
    pub mesh: crate::snapshot::MeshSpec,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Arc<Node>>,
    /// Namespaces' labels by name (with `kubernetes.io/metadata.name`).
    pub namespaces: BTreeMap<String, Labels>,
    /// Pods, shared with the plan's policy.
    pub pods: BTreeMap<ObjectRef, Arc<Pod>>,
    /// Services.
    pub services: BTreeMap<ObjectRef, Service>,
    /// NetworkPolicies, in the policy engine's own model; a broken one is there too, failing closed.
    pub policies: BTreeMap<ObjectRef, ebpf_policy::model::NetworkPolicy>,
    /// Pod addresses from IPPools.
    pub ipam: ipam::Ipam,
    /// What could not be read or was refused, by object and field.
    pub issues: Vec<Issue>,
}

/// A Node object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// `metadata.uid`, where there is one.
    pub uid: Option<String>,
    /// Labels.
    pub labels: Labels,
    /// The `margay.io/` annotations.
    pub annotations: Labels,
    /// While the announcement in `annotations` is illegible: that of the same Node's annotations before, which was not.
    pub announced_before: Labels,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// `status.addresses`, types InternalIP then ExternalIP.
    pub internal_ips: Vec<IpAddr>,
    /// `status.addresses` of type ExternalIP.
    pub external_ips: Vec<IpAddr>,
}

/// A Service object, as far as it changes packets' destinations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// Cluster, external and load balancer IPs.
    pub addresses: BTreeSet<IpAddr>,
    /// Ports of every node that are the Service's.
    pub node_ports: BTreeSet<(ebpf_policy::model::Protocol, u16)>,
}

/// A pod's interface on this node, as CNI ADD made it (from the IPAM journal after a restart).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod, as the runtime named it.
    pub pod: ObjectRef,
    /// CNI container id.
    pub container_id: String,
    /// Interface name in the pod.
    pub ifname: String,
    /// Host-side interface index; 0 when the link is gone.
    pub ifindex: u32,
    /// The pod end's MAC.
    pub pod_mac: [u8; 6],
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

/// What this node knows of itself without asking the cluster.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Local {
    /// This node's name.
    pub node_name: String,
    /// Who carries its packets.
    pub datapath: crate::desired::Datapath,
    /// This node's keys by their public halves, and how far their rotation is.
    pub rotation: State,
    /// Keys that were this node's since the agent began: what it said of itself with them is out of date.
    pub former_keys: BTreeSet<PublicKey>,
    /// The WireGuard devices there are, by name.
    pub devices: BTreeSet<String>,
    /// Whom it has admitted before.
    pub incumbents: Incumbents,
    /// Keys of announcements that somebody here said are right, by node.
    pub trusted: BTreeMap<String, AnnouncementKey>,
    /// Where peers were last heard from, learned by the datapath: a hint, by key.
    pub learned_endpoints: BTreeMap<PublicKey, SocketAddr>,
    /// How reaching the peers went, of those that were silent once.
    pub reach: BTreeMap<PublicKey, Reach>,
    /// Configured prefixes to announce; used only where the Node object names none.
    pub pod_cidrs: Vec<IpNet>,
    /// Configured endpoint candidates to announce, best first; empty for the node's own addresses.
    pub endpoints: Vec<SocketAddr>,
    /// With IPPools: its own ends of the tunnel.
    pub tunnel_addresses: Vec<IpAddr>,
    /// Addresses configured on this host outside the mesh (no loopback, no link-local, none of ours).
    pub addresses: Vec<IpAddr>,
}

impl Local {
    /// This node's keys, newest epoch first.
    pub fn keys(&self) -> impl Iterator<Item = PublicKey> {
        self.rotation.slots.iter().map(|slot| slot.public_key)
    }
}

/// How reaching a peer went (see [`crate::heal`]).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reach {
    /// Endpoints at which it did not answer, the last one last.
    pub failed: Vec<SocketAddr>,
    /// Grows when it is to be tried afresh.
    pub attempt: u64,
}

impl Reach {
    /// The first of the candidates that did not fail, else the one that did longest ago.
    pub fn choose(&self, candidates: &[SocketAddr]) -> Option<SocketAddr> {
        let failed = |to: &SocketAddr| self.failed.iter().position(|failed| failed == to);
        let fresh = candidates.iter().find(|to| failed(to).is_none());
        fresh.or_else(|| candidates.iter().min_by_key(|to| failed(to))).copied()
    }
}

/// The `spec` of MeshConfiguration `default` after defaulting; see `config/mesh.rs` for the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshSpec {
    /// The cluster's pod ranges.
    pub pools: Vec<IpNet>,
    /// Another network plugin gives pods their interfaces and addresses.
    pub external: bool,
    /// MTU of the mesh device and of pods, bytes.
    pub mtu: u32,
    /// Nothing with a pod's address leaves unencrypted: what no peer owns in the pools, and nodes that are
    /// no peers, are unreachable for pods instead of reached in clear text.
    pub strict_encryption: bool,
    /// UDP port of this node's first WireGuard device; the second's is the next.
    pub listen_port: u16,
    /// Seconds between keepalives to every peer; 0 for off.
    pub persistent_keepalive: u16,
    /// Masquerade what pods send out of the cluster.
    pub masquerade: bool,
    /// Destinations never masqueraded, besides the pools and the nodes.
    pub masquerade_exceptions: Vec<IpNet>,
    /// Announcements are believed by who signed them first, for the API server lets nodes write each other's.
    pub first_use: bool,
    /// When keys change.
    pub rotation: Settings,
    /// After how long what a node had that is gone may be given to others.
    pub reclaim_after: Duration,
}

impl Default for MeshSpec {
    fn default() -> Self {
        Self {
            pools: Vec::new(),
            external: false,
            mtu: mesh_api::defaults::MTU,
            strict_encryption: true,
            listen_port: mesh_api::defaults::PORT,
            persistent_keepalive: 0,
            masquerade: true,
            masquerade_exceptions: Vec::new(),
            first_use: false,
            rotation: crate::config::rotation::RotationSpec::default().settings(0),
            reclaim_after: crate::config::ipam::IpamSpec::default().reclaim_after(),
        }
    }
}
