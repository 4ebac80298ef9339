//! The cluster-wide wish: the custom resource `MeshConfiguration`, of which there is one, named `default`.

use std::collections::BTreeMap;

use ebpf_policy::model;
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rotation::RotationSpec;
use crate::snapshot::{Labels, MeshSpec};
use crate::source::decode::problem::Problems;
use crate::source::decode::{cidr, selector};

/// The one object's name.
pub const NAME: &str = "default";

/// Smallest MTU: what IPv6 asks of a link (RFC 8200 section 5).
pub const MIN_MTU: u32 = 1280;
/// Largest MTU: the largest IP packet less the tunnel's own headers.
pub const MAX_MTU: u32 = 65_455;

/// How the mesh of the whole cluster is to be.
#[derive(CustomResource, Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "margay.io",
    version = "v1alpha1",
    kind = "MeshConfiguration",
    plural = "meshconfigurations",
    shortname = "meshconfig",
    derive = "PartialEq",
    doc = "How the mesh of the whole cluster is to be. There is one, named `default`.",
    printcolumn(name = "Pools", type_ = "string", json_path = ".spec.pools[*].cidr")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshConfigurationSpec {
    /// How pods' packets travel between nodes.
    #[serde(default)]
    pub mode: Mode,
    /// Who gives pods their interfaces and addresses.
    #[serde(default)]
    pub pod_network: PodNetwork,
    /// The cluster's pod ranges. A node's pod CIDRs and every pod's address lie in one of them.
    #[serde(default)]
    pub pools: Vec<Pool>,
    /// Whether packets with a pod's address may ever leave a node unencrypted. True: what no peer owns in
    /// the pools, and nodes that are no peers, cannot be reached by pods. False: they are reached in clear
    /// text by the node's ordinary routes.
    #[serde(default = "yes")]
    pub strict_encryption: bool,
    /// MTU of the mesh device and of pods, in bytes.
    #[serde(default = "mtu")]
    #[schemars(range(min = 1280, max = 65455))]
    pub mtu: u32,
    /// Why it is believed that an announcement is from the node it is of.
    #[serde(default)]
    pub announcement_trust: AnnouncementTrust,
    /// UDP port that nodes listen on for their peers. The next one is the second device's, which keys change to.
    #[serde(default = "listen_port")]
    #[schemars(range(min = 1, max = 65534))]
    pub listen_port: u16,
    /// Seconds between keepalives to every peer, which keep a NAT's mapping alive; 0 for none.
    #[serde(default)]
    pub persistent_keepalive: u16,
    /// Source NAT for what pods send out of the cluster.
    #[serde(default)]
    pub masquerade: MasqueradeSpec,
    /// Every node goes at least to this epoch, and with each epoch to a new key. `meshctl keys rotate --all` raises it.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_u64))]
    pub rotation_epoch: u64,
    /// When keys change, the same on every node.
    #[serde(default)]
    pub rotation: RotationSpec,
    /// What differs on some nodes. Of several that select a node the later wins, field by field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
}

/// How pods' packets travel between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
pub enum Mode {
    /// In WireGuard tunnels between all nodes.
    #[serde(rename = "wireguard")]
    #[default]
    WireGuard,
}

/// Who gives pods their interfaces and addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PodNetwork {
    /// We do.
    #[default]
    Margay,
    /// Another network plugin, whose interfaces, routes and source NAT stay as they are: what is between pods of
    /// different nodes is encrypted on its way. Which addresses a node's pods have is what the pods' objects say.
    External,
}

/// Why it is believed that an announcement is from the node it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AnnouncementTrust {
    /// Who writes it sees to it: the API server by the admission policies that are shipped, or whoever carries the
    /// manifests.
    #[default]
    Admission,
    /// For API servers without admission policies: each node signs its own, and the key that signed the first one seen of a Node
    /// (of its UID) is the one believed from then on. Another waits for `meshctl nodes trust NAME` on each node.
    FirstUse,
}

/// A range of pod addresses.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    /// The prefix, IPv4 or IPv6.
    #[schemars(extend("format" = "cidr"))]
    pub cidr: String,
}

/// Source NAT for what pods send out of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MasqueradeSpec {
    /// Whether there is any.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Destinations that see the pod's own address. Pools and nodes always do.
    #[serde(default, rename = "exceptCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub except_cidrs: Vec<String>,
}

impl Default for MasqueradeSpec {
    fn default() -> Self {
        Self { enabled: true, except_cidrs: Vec::new() }
    }
}

/// Values for the nodes a selector names. Pools and strictness are the cluster's and cannot differ.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Override {
    /// Which nodes, by their labels.
    pub node_selector: LabelSelector,
    /// In place of `spec.mtu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1280, max = 65455))]
    pub mtu: Option<u32>,
    /// In place of `spec.listenPort`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65534))]
    pub listen_port: Option<u16>,
    /// In place of `spec.persistentKeepalive`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_keepalive: Option<u16>,
    /// In place of the whole of `spec.masquerade`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<MasqueradeSpec>,
}

fn yes() -> bool {
    true
}

fn mtu() -> u32 {
    mesh_api::defaults::MTU
}

fn listen_port() -> u16 {
    mesh_api::defaults::PORT
}

impl MeshConfigurationSpec {
    /// What is wrong with the values: (field below `spec`, message).
    pub fn check(&self) -> Vec<(String, String)> {
        let mut errors = Vec::new();
        let mut pools: Vec<IpNet> = Vec::new();
        for (index, pool) in self.pools.iter().enumerate() {
            let field = format!("pools[{index}].cidr");
            match prefix(&pool.cidr) {
                Err(message) => errors.push((field, message)),
                Ok(net) => {
                    let ip = net.addr();
                    if net.prefix_len() == 0 || ip.is_loopback() || ip.is_multicast() {
                        errors.push((field.clone(), format!("{net} cannot be a range of pods")));
                    }
                    if let Some(other) =
                        pools.iter().find(|other| other.contains(&net) || net.contains(*other))
                    {
                        errors.push((field, format!("{net} overlaps {other}")));
                    }
                    pools.push(net);
                }
            }
        }
        if self.pod_network == PodNetwork::External && self.strict_encryption && self.pools.is_empty() {
            let message = "true needs pools where podNetwork is external: without them nobody can tell which \
                           addresses are pods', and one not known yet would be reached in clear text";
            errors.push(("strictEncryption".to_owned(), message.to_owned()));
        }
        check_mtu(self.mtu, "mtu", &mut errors);
        check_port(self.listen_port, "listenPort", &mut errors);
        check_masquerade(&self.masquerade, "masquerade", &mut errors);
        self.rotation.check(self.rotation_epoch, &mut errors);
        for (index, entry) in self.overrides.iter().enumerate() {
            let field = format!("overrides[{index}]");
            let mut problems = Problems::default();
            selector::decode(&entry.node_selector, &format!("{field}.nodeSelector"), &mut problems);
            errors.extend(problems.0.into_iter().map(|problem| (problem.field, problem.message)));
            if let Some(mtu) = entry.mtu {
                check_mtu(mtu, &format!("{field}.mtu"), &mut errors);
            }
            if let Some(port) = entry.listen_port {
                check_port(port, &format!("{field}.listenPort"), &mut errors);
            }
            if let Some(masquerade) = &entry.masquerade {
                check_masquerade(masquerade, &format!("{field}.masquerade"), &mut errors);
            }
        }
        errors
    }

    /// The values for a node with these labels. What [`Self::check`] finds fault with is left out.
    pub fn for_node(&self, labels: &Labels) -> MeshSpec {
        let mut out = MeshSpec {
            pools: self.pools.iter().filter_map(|pool| prefix(&pool.cidr).ok()).collect(),
            external: self.pod_network == PodNetwork::External,
            first_use: self.announcement_trust == AnnouncementTrust::FirstUse,
            mtu: self.mtu,
            strict_encryption: self.strict_encryption,
            listen_port: self.listen_port,
            persistent_keepalive: self.persistent_keepalive,
            rotation: self.rotation.settings(self.rotation_epoch),
            ..MeshSpec::default()
        };
        let mut masquerade = &self.masquerade;
        for entry in self.overrides.iter().filter(|entry| entry.selects(labels)) {
            out.mtu = entry.mtu.unwrap_or(out.mtu);
            out.listen_port = entry.listen_port.unwrap_or(out.listen_port);
            out.persistent_keepalive = entry.persistent_keepalive.unwrap_or(out.persistent_keepalive);
            masquerade = entry.masquerade.as_ref().unwrap_or(masquerade);
        }
        out.masquerade = masquerade.enabled;
        out.masquerade_exceptions =
            masquerade.except_cidrs.iter().filter_map(|text| prefix(text).ok()).collect();
        out
    }
}

impl Override {
    fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        let selector: Option<model::LabelSelector> =
            selector::decode(&self.node_selector, "nodeSelector", &mut Problems::default());
        selector.is_some_and(|selector| selector.matches(labels))
    }
}

/// A prefix without host bits: in a configuration they are a slip of the pen.
fn prefix(text: &str) -> Result<IpNet, String> {
    match cidr::prefix(text)? {
        (net, true) => Err(format!("{text} has host bits, meant is {net}")),
        (net, false) => Ok(net),
    }
}

fn check_mtu(mtu: u32, field: &str, errors: &mut Vec<(String, String)>) {
    if !(MIN_MTU..=MAX_MTU).contains(&mtu) {
        errors.push((field.to_owned(), format!("{mtu} is not in {MIN_MTU}-{MAX_MTU}")));
    }
}

fn check_port(port: u16, field: &str, errors: &mut Vec<(String, String)>) {
    // The last one has no next for the second device.
    if port == 0 || port == u16::MAX {
        errors.push((field.to_owned(), format!("{port} is not in 1-65534")));
    }
}

fn check_masquerade(masquerade: &MasqueradeSpec, field: &str, errors: &mut Vec<(String, String)>) {
    for (index, text) in masquerade.except_cidrs.iter().enumerate() {
        if let Err(message) = prefix(text) {
            errors.push((format!("{field}.exceptCIDRs[{index}]"), message));
        }
    }
}
