//! A lab with an API server: where its objects go, and how its nodes know the cluster.

use anyhow::{Context, Result};
use mesh_api::defaults::CONFIG;
use serde_json::{Value, json};

use super::{Lab, PATIENCE};
use crate::cluster::Cluster;
use crate::spec::API_SERVER;
use crate::wait;

/// The definitions of our kinds, as the project ships them.
const DEFINITIONS: [&str; 5] = [
    include_str!("../../../manifests/crds/margay.io_meshconfigurations.yaml"),
    include_str!("../../../manifests/crds/margay.io_meshnodestatuses.yaml"),
    include_str!("../../../manifests/components/ipam/margay.io_ipblocks.yaml"),
    include_str!("../../../manifests/components/ipam/margay.io_ippools.yaml"),
    include_str!("../../../manifests/components/ipam/margay.io_ipreservations.yaml"),
];
/// Who the agents are and what they may do, as the project ships it.
const RIGHTS: [&str; 8] = [
    include_str!("../../../manifests/base/namespace.yaml"),
    include_str!("../../../manifests/base/service-accounts.yaml"),
    include_str!("../../../manifests/base/rbac.yaml"),
    include_str!("../../../manifests/base/admission/announcements.yaml"),
    include_str!("../../../manifests/base/admission/own-node.yaml"),
    include_str!("../../../manifests/base/admission/own-objects.yaml"),
    include_str!("../../../manifests/base/admission/own-blocks.yaml"),
    include_str!("../../../manifests/components/ipam/rbac.yaml"),
];

/// Namespace and service account of the agents.
const SYSTEM: &str = "margay-system";
const ACCOUNT: &str = "mesh-agent";
/// Where a node's agent finds what it needs to reach the API server.
const KUBECONFIG: &str = "/etc/margay/kubeconfig";

impl Lab {
    /// The API server of the lab.
    pub fn cluster(&self) -> Result<Cluster<'_>> {
        let server = self.spec.api_server.as_ref().context("the lab has no apiServer")?;
        Ok(Cluster::of(self.host(API_SERVER)?, &server.ips))
    }

    /// Starts the API server, with the kinds and accounts that the mesh needs.
    pub(super) fn start_cluster(&self) -> Result<()> {
        let server = self.spec.api_server.as_ref().context("the lab has no apiServer")?;
        let cluster = Cluster::start(self.host(API_SERVER)?, &server.ips)?;
        cluster.apply(&DEFINITIONS.join("\n---\n")).context("custom resource definitions")?;
        let established = ["wait", "--for=condition=Established", "crd", "--all", "--timeout=20s"];
        cluster.kubectl(&established)?;
        cluster.apply(&RIGHTS.join("\n---\n")).context("rights of the agents").map(drop)
    }

    /// The lab file's directory of manifests, a kustomization or not, goes to the API server.
    pub(super) fn apply_manifests(&self) -> Result<()> {
        let (Some(directory), true) = (&self.spec.manifests, self.spec.api_server.is_some()) else {
            return Ok(());
        };
        let whole = directory.canonicalize().with_context(|| directory.display().to_string())?;
        let path = whole.to_str().context("path of the manifests")?;
        let from: &[&str] =
            if whole.join("kustomization.yaml").is_file() { &["-k", path] } else { &["-R", "-f", path] };
        self.cluster()?.kubectl(&[&["apply", "--server-side", "--force-conflicts"], from].concat()).map(drop)
    }

    /// Gives a node the files of one whose agent is a pod of the cluster: the token is bound to that pod, which is on the
    /// node and nowhere else.
    pub(super) fn join_cluster(&self, node: &str) -> Result<()> {
        let (cluster, host) = (self.cluster()?, self.host(node)?);
        let name = format!("{ACCOUNT}-{node}");
        let ips: Vec<Value> = self.ips(node)?.iter().map(|ip| json!({ "ip": ip })).collect();
        cluster.client().apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": SYSTEM, "name": name, "labels": {"app.kubernetes.io/name": ACCOUNT}},
            "spec": {
                "nodeName": node, "hostNetwork": true, "serviceAccountName": ACCOUNT,
                "containers": [{"name": ACCOUNT, "image": "lab"}],
            },
            "status": {"phase": "Running", "podIP": ips.first().map(|ip| &ip["ip"]), "podIPs": ips},
        }))?;
        // The API server's own cache may be a moment behind.
        let token = wait::until(format!("a token for {node}"), PATIENCE, || {
            cluster.token(SYSTEM, ACCOUNT, Some(&name)).map(Some)
        })?;
        cluster.kubeconfig_for(&token, host, KUBECONFIG)?;
        let config = format!("nodeName: {node}\nkubernetes:\n  kubeconfig: {KUBECONFIG}\n");
        host.write(CONFIG, config.as_bytes())
    }

    /// An object as the API server takes it: the time of a pod's deletion is set by deleting it.
    pub(super) fn apply(&self, object: &Value) -> Result<()> {
        let client = self.cluster()?.client();
        let mut object = object.clone();
        let deleted =
            object["metadata"].as_object_mut().and_then(|metadata| metadata.remove("deletionTimestamp"));
        client.apply(&object)?;
        if deleted.is_some_and(|time| !time.is_null()) {
            let grace = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 3600});
            client.ask("DELETE", &client.path(&object, None)?, Some(("application/json", &grace)))?;
        }
        Ok(())
    }
}
