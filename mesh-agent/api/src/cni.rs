//! One CNI call as mesh-cni forwards it to mesh-agent: a JSON line each way on `cni.sock`, the pod's
//! network namespace as a file descriptor beside the request (SCM_RIGHTS).

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What the container runtime wants (CNI 1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Command {
    /// Give the pod its network.
    Add,
    /// Take it away; succeeds when there is none.
    Del,
    /// Is it still as ADD left it?
    Check,
    /// Take away everything not in `valid_attachments`.
    Gc,
    /// Would an ADD work now?
    Status,
}

/// The request line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// CNI_CONTAINERID.
    #[serde(default)]
    pub container_id: String,
    /// CNI_IFNAME.
    #[serde(default)]
    pub ifname: String,
    /// CNI_NETNS as given; the descriptor counts.
    #[serde(default)]
    pub netns: String,
    /// The configuration's `name`.
    pub network: String,
    /// K8S_POD_NAMESPACE from CNI_ARGS.
    #[serde(default)]
    pub pod_namespace: String,
    /// K8S_POD_NAME from CNI_ARGS.
    #[serde(default)]
    pub pod_name: String,
    /// K8S_POD_UID from CNI_ARGS.
    #[serde(default)]
    pub pod_uid: String,
    /// Exact addresses asked for (`runtimeConfig.ips`, `args.cni.ips` or IP= in CNI_ARGS); empty for any.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// GC: (container id, ifname) pairs that are still wanted.
    #[serde(default)]
    pub valid_attachments: Vec<(String, String)>,
}

/// The reply line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "outcome")]
pub enum Reply {
    /// Done; `result` is set for ADD.
    Done {
        /// What the pod got.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        result: Option<Attachment>,
    },
    /// Not done.
    Failed {
        /// CNI error code (specification section 5): 1-99 are the specification's, 100+ ours.
        code: u32,
        /// One sentence.
        message: String,
        /// More, for people.
        #[serde(default)]
        details: String,
    },
}

/// What ADD gave a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Name of the host's end.
    pub host_interface: String,
    /// MAC of the host's end.
    pub host_mac: String,
    /// MAC of the pod's end.
    pub pod_mac: String,
    /// The pod's addresses, /32 and /128.
    pub addresses: Vec<IpNet>,
    /// Default gateway per family, link-local.
    pub gateways: Vec<IpAddr>,
    /// Device MTU.
    pub mtu: u32,
}
