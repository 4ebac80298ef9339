//! The custom resource `MeshNodeStatus`, of which each node writes its own: how its part of the mesh is, in short.
#![allow(clippy::duplicated_attributes)] // Several columns have the same type.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Nothing is wished of a node here: the object is there for its status.
#[derive(CustomResource, Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "margay.io",
    version = "v1alpha1",
    kind = "MeshNodeStatus",
    plural = "meshnodestatuses",
    shortname = "meshnode",
    status = "MeshNodeStatusStatus",
    derive = "PartialEq",
    doc = "How a node's part of the mesh is. Written by its agent; named as its Node.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.ready"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = 1),
    printcolumn(name = "Peers", type_ = "integer", json_path = ".status.peers"),
    printcolumn(name = "Unhealthy", type_ = "integer", json_path = ".status.unhealthyCount"),
    printcolumn(name = "Pods", type_ = "integer", json_path = ".status.endpoints"),
    printcolumn(name = "Issues", type_ = "integer", json_path = ".status.issueCount"),
    printcolumn(name = "Datapath", type_ = "string", json_path = ".status.datapath"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct MeshNodeStatusSpec {}

/// What a node says of itself. Ages and bytes, which move all the time, are in metrics and `meshctl`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MeshNodeStatusStatus {
    /// `True` or `False`, as the Node's condition MargayMeshReady.
    #[serde(default)]
    pub ready: String,
    /// Why, in a word.
    #[serde(default)]
    pub reason: String,
    /// Version of the agent.
    #[serde(default)]
    pub version: String,
    /// Who carries packets: `kernel` or `userspace`.
    #[serde(default)]
    pub datapath: String,
    /// The newest key's epoch.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_u64))]
    pub epoch: u64,
    /// Peers in the devices.
    #[serde(default)]
    pub peers: u32,
    /// Peers that do not answer.
    #[serde(default)]
    pub unhealthy_count: u32,
    /// The first of them by name, at most 20.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unhealthy: Vec<UnhealthyPeer>,
    /// Pods with an interface on the node.
    #[serde(default)]
    pub endpoints: u32,
    /// The agent's generation of sources whose policy is live in the kernel.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_u64))]
    pub policy_generation: u64,
    /// Policies that are live, and of them those that fail closed because they cannot be read.
    #[serde(default)]
    pub policies: u32,
    /// See `policies`.
    #[serde(default)]
    pub policies_failing_closed: u32,
    /// Things that are wrong.
    #[serde(default)]
    pub issue_count: u32,
    /// The first of them, at most 20.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub issues: Vec<IssueSummary>,
}

/// A peer that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnhealthyPeer {
    /// The Node's name.
    pub name: String,
    /// `down`, or `silent` while it is tried afresh.
    pub state: String,
    /// Since when, RFC 3339.
    pub last_transition_time: String,
}

/// Something wrong.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IssueSummary {
    /// On which object.
    pub object: String,
    /// In which field, where there is one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// A word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}
