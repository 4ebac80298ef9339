//! How the agent reaches an API server.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

/// Where the cluster's objects are read, and where this node announces itself, in place of a manifest directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubernetesConfig {
    /// File that says where the API server is and who this node is; in a pod, its service account unless given.
    /// Files that it names are named from the root; a token is read again when its file changes.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
}
