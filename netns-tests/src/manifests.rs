//! The Kubernetes objects a lab writes, as an API server and the kubelets would hold them.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::spec::{Lab, Namespace, Node, Pod};

/// File name of an object in the manifest directory, from its kind, namespace and name.
pub fn file_name(object: &Value) -> String {
    let text =
        |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_string();
    let parts = [text("/kind").to_lowercase(), text("/metadata/namespace"), text("/metadata/name")];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    // Underscores are in no Kubernetes name, so two objects never share a file.
    let safe = |c: char| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '~' };
    format!("{}.json", parts.join("_").chars().map(safe).collect::<String>())
}

/// The MeshConfiguration.
pub fn mesh(lab: &Lab) -> Value {
    let mut spec: serde_json::Map<String, Value> =
        lab.mesh.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    spec.insert("pools".into(), lab.pools());
    json!({
        "apiVersion": "margay.io/v1alpha1", "kind": "MeshConfiguration",
        "metadata": {"name": "default"}, "spec": spec,
    })
}

/// A Node.
pub fn node(node: &Node) -> Value {
    let mut labels = node.labels.clone();
    labels.entry("kubernetes.io/hostname".into()).or_insert_with(|| node.name.clone());
    let addresses: Vec<Value> =
        node.ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name, "labels": labels},
        "spec": {"podCIDR": node.pod_cidrs.first(), "podCIDRs": node.pod_cidrs},
        "status": {"addresses": addresses},
    })
}

/// A Namespace, with the label that every API server sets.
pub fn namespace(namespace: &Namespace) -> Value {
    let mut labels = namespace.labels.clone();
    labels.insert("kubernetes.io/metadata.name".into(), namespace.name.clone());
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace.name, "labels": labels}})
}

/// State of a pod as its kubelet reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodStatus {
    /// Addresses; none before the network is there.
    pub ips: Vec<IpAddr>,
    /// Phase; `Pending` without addresses and `Running` with, unless said otherwise.
    pub phase: Option<String>,
    /// `metadata.deletionTimestamp`.
    pub deletion_timestamp: Option<String>,
}

/// A Pod.
pub fn pod(pod: &Pod, status: &PodStatus) -> Value {
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .filter(|port| port.declared)
        .map(|port| {
            let mut value = json!({"containerPort": port.port, "protocol": port.protocol});
            if !port.name.is_empty() {
                value["name"] = json!(port.name);
            }
            value
        })
        .collect();
    let phase = status
        .phase
        .clone()
        .unwrap_or_else(|| if status.ips.is_empty() { "Pending" } else { "Running" }.into());
    let ips: Vec<Value> = status.ips.iter().map(|ip| json!({"ip": ip})).collect();
    let mut object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": pod.namespace, "name": pod.name, "labels": pod.labels},
        "spec": {
            "nodeName": pod.node, "hostNetwork": pod.host_network,
            "containers": [{"name": "main", "image": "lab", "ports": ports}],
        },
        "status": {"phase": phase, "podIPs": ips},
    });
    if let Some(first) = status.ips.first() {
        object["status"]["podIP"] = json!(first);
    }
    if let Some(time) = &status.deletion_timestamp {
        object["metadata"]["deletionTimestamp"] = json!(time);
    }
    object
}

/// A NetworkPolicy from its spec.
pub fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name}, "spec": spec,
    })
}
