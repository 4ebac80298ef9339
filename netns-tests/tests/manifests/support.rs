//! A cluster on a host of its own, and who asks it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use netns_tests::cluster::Cluster;
use netns_tests::host::Host;
use netns_tests::http::{self, Answer};
use netns_tests::wait;
use netns_tests::wire::Wire;
use netns_tests::wire::impair::{Conditions, Links};
use serde_json::{Value, json};

use crate::common::bins;

pub const NAMESPACE: &str = "margay-system";
pub const AGENT: &str = "system:serviceaccount:margay-system:mesh-agent";
pub const NODE_EXTRA: &str = "authentication.kubernetes.io/node-name";
const ADDRESS: &str = "192.0.2.100";
/// Until a change of policies or roles counts, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The directory `manifests` of the project.
pub fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").canonicalize().unwrap()
}

/// What `kubectl kustomize` makes of a directory below `manifests`.
pub fn kustomize(below: &str) -> String {
    let kubectl = bins().kubernetes("kubectl").unwrap();
    let output = std::process::Command::new(kubectl).arg("kustomize").arg(manifests().join(below)).output();
    netns_tests::host::checked("kubectl kustomize", output.unwrap()).unwrap()
}

/// Runs a test with an empty cluster.
pub fn with_cluster(test: impl FnOnce(&Cluster<'_>)) {
    let bins = bins();
    let mut wire = Wire::start(&bins, Links::new(Conditions::default())).unwrap();
    let host = Host::start("apiserver", &bins).unwrap();
    wire.plug("apiserver", &host, "eth0").unwrap();
    let address = ADDRESS.parse().unwrap();
    host.netns().ip(&Wire::addressing("eth0", &[address], &[], true)).unwrap();
    let cluster = Cluster::start(&host, &[address]).unwrap();
    test(&cluster);
    drop(host);
    drop(wire);
}

/// Somebody with an identity, asking over a `kubectl proxy` of theirs.
pub struct Caller {
    pub name: String,
    socket: PathBuf,
}

impl Caller {
    /// Whoever this kubeconfig's user is.
    fn start(cluster: &Cluster<'_>, name: &str, kubeconfig: &str) -> Self {
        let host = cluster.host();
        let (config, socket) = (format!("/etc/{name}.conf"), format!("/run/{name}.sock"));
        host.write_secret(&config, kubeconfig.as_bytes()).unwrap();
        let kubectl = host.bins().kubernetes("kubectl").unwrap();
        let [config, to] = [format!("--kubeconfig={config}"), format!("--unix-socket={socket}")];
        host.start_unit(name, &[&kubectl.to_string_lossy(), "proxy", &config, &to]).unwrap();
        let socket = host.path(&socket);
        wait::until(format!("the proxy of {name}"), PATIENCE, || Ok(Some(UnixStream::connect(&socket)?)))
            .with_context(|| host.log(name))
            .unwrap();
        Self { name: name.into(), socket }
    }

    /// A service account, by a token bound to a pod of its namespace or to nothing.
    pub fn account(cluster: &Cluster<'_>, name: &str, account: (&str, &str), pod: Option<&str>) -> Self {
        let token = cluster.token(account.0, account.1, pod).unwrap();
        Self::start(cluster, name, &cluster.kubeconfig(&token, ADDRESS.parse().unwrap()).unwrap())
    }

    /// An account that says it is somebody else.
    pub fn account_as(cluster: &Cluster<'_>, name: &str, pod: &str, user: &str, extra: Option<&str>) -> Self {
        let token = cluster.token(NAMESPACE, "mesh-agent", Some(pod)).unwrap();
        let config = cluster.kubeconfig(&token, ADDRESS.parse().unwrap()).unwrap();
        Self::start(cluster, name, &impersonating(&config, user, &[], extra))
    }

    /// The administrator, who says that it is somebody else.
    pub fn administrator_as(
        cluster: &Cluster<'_>,
        name: &str,
        user: &str,
        groups: &[&str],
        extra: Option<&str>,
    ) -> Self {
        let path = cluster.host().path(netns_tests::cluster::ADMIN_CONFIG);
        let config = std::fs::read_to_string(path).unwrap();
        Self::start(cluster, name, &impersonating(&config, user, groups, extra))
    }

    /// A request with a JSON body.
    pub fn ask(&self, method: &str, path: &str, kind: &str, body: &Value) -> Answer {
        let body = body.to_string();
        let body = (!kind.is_empty()).then_some((kind, body.as_bytes()));
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        http::exchange(&mut stream, method, path, body).unwrap()
    }

    /// Server-side apply, as the agent does it.
    pub fn apply(&self, path: &str, manager: &str, object: &Value) -> Answer {
        let path = format!("{path}?fieldManager={manager}&force=true");
        self.ask("PATCH", &path, "application/apply-patch+yaml", object)
    }

    /// A merge patch.
    pub fn merge(&self, path: &str, patch: &Value) -> Answer {
        self.ask("PATCH", path, "application/merge-patch+json", patch)
    }
}

/// A kubeconfig with its user impersonating another.
fn impersonating(kubeconfig: &str, user: &str, groups: &[&str], extra: Option<&str>) -> String {
    let mut config: Value = serde_saphyr::from_str(kubeconfig).unwrap();
    let fields = &mut config["users"][0]["user"];
    fields["as"] = json!(user);
    fields["as-groups"] = json!(groups);
    if let Some(extra) = extra {
        fields["as-user-extra"] = json!({ NODE_EXTRA: [extra] });
    }
    config.to_string()
}

/// Fails unless the answer is good.
#[track_caller]
pub fn allowed(what: &str, answer: Answer) {
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!((200..300).contains(&answer.status), "{what}: {} {text}", answer.status);
}

/// Fails unless the answer is a refusal that says `word`.
#[track_caller]
pub fn refused(what: &str, word: &str, answer: Answer) {
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert_eq!(answer.status, 403, "{what}: {text}");
    assert!(text.contains(word), "{what}: {word:?} is not in {text}");
}

/// The objects in a stream of YAML documents.
pub fn documents(text: &str) -> Vec<Value> {
    text.split("\n---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
}

/// The agent's ServiceAccount, nodes, and a pod of the agent on each as kubelets would run it; all that the base has but
/// the DaemonSets' controller.
pub fn install(cluster: &Cluster<'_>, nodes: &[&str]) {
    cluster.apply(&kustomize("overlays/kubeadm")).unwrap();
    let condition = "--for=condition=Established";
    cluster.kubectl(&["wait", condition, "crd", "--all", "--timeout=60s"]).unwrap();
    for name in nodes {
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": name,
                "labels": {"zone": "z1"},
                "annotations": {"example.com/theirs": "x", "margay.io/endpoint-override": "192.0.2.9"},
                "finalizers": ["example.com/hold"],
                "ownerReferences": [{"apiVersion": "v1", "kind": "Namespace", "name": "default", "uid": "u"}],
            },
            "spec": {"podCIDRs": ["10.244.1.0/24"], "taints": [{"key": "t", "effect": "NoSchedule"}]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
                "capacity": {"cpu": "4"},
                "conditions": [
                    {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
                     "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                    {"type": "DiskPressure", "status": "False", "reason": "x", "message": "",
                     "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                ],
            },
        });
        cluster.client().apply(&node).unwrap();
        pod(cluster, &format!("mesh-agent-{name}"), Some(name));
    }
}

/// A pod of the agent.
pub fn pod(cluster: &Cluster<'_>, name: &str, node: Option<&str>) {
    let mut spec =
        json!({"serviceAccountName": "mesh-agent", "containers": [{"name": "c", "image": "margay:test"}]});
    if let Some(node) = node {
        spec["nodeName"] = json!(node);
    }
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": NAMESPACE, "name": name}, "spec": spec,
    });
    cluster.client().apply(&pod).unwrap();
}
