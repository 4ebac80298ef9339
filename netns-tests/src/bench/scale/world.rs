//! A large cluster: its objects, written by many hands at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cluster::Client;

/// Requests under way at the same time.
const HANDS: usize = 16;
/// Namespaces that the pods are in.
pub const NAMESPACES: usize = 20;

/// Does something with each, many at a time.
pub fn each<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..HANDS {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = work(item) {
                        next.store(items.len(), Ordering::Relaxed);
                        failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Makes an object below this path, and then its status.
pub fn create(client: &Client, path: &str, object: &Value) -> Result<()> {
    let mut object = object.clone();
    let status = object.as_object_mut().and_then(|fields| fields.remove("status"));
    client.ask("POST", path, Some(("application/json", &object)))?;
    let Some(status) = status else { return Ok(()) };
    let name = object["metadata"]["name"].as_str().context("an object without a name")?;
    let patch = json!({ "status": status });
    client
        .ask("PATCH", &format!("{path}/{name}/status"), Some(("application/merge-patch+json", &patch)))
        .map(drop)
}

/// Name of a namespace.
pub fn namespace(n: usize) -> String {
    format!("team-{n:02}")
}

/// A namespace's policies: its pods are reached by those of its own that face the users, and by all front ends.
pub fn policies(n: usize) -> Vec<Value> {
    let policy = |name: &str, spec: Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": namespace(n)}, "spec": spec,
        })
    };
    vec![
        policy(
            "web",
            json!({"podSelector": {}, "ingress": [{
                "from": [
                    {"podSelector": {"matchLabels": {"tier": "web"}}},
                    {"namespaceSelector": {}, "podSelector": {"matchLabels": {"tier": "front"}}},
                ],
                "ports": [{"port": 8080}],
            }]}),
        ),
        policy(
            "names",
            json!({"podSelector": {"matchLabels": {"tier": "web"}}, "policyTypes": ["Egress"], "egress": [
                {"ports": [{"port": 53, "protocol": "UDP"}]},
                {"to": [{"podSelector": {}}]},
                {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]},
            ]}),
        ),
    ]
}

/// The k-th pod of a node: as large as ordinary pods are.
pub fn pod(node: &Value, k: usize, total: usize) -> Value {
    let tier = ["front", "web", "web", "store"].get(total % 4).copied().unwrap_or_default();
    let cidrs: Vec<&str> =
        node["spec"]["podCIDRs"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let ips: Vec<Value> = cidrs
        .iter()
        .filter_map(|cidr| cidr.parse::<ipnet::IpNet>().ok())
        .filter_map(|net| net.hosts().nth(k + 9))
        .map(|ip| json!({ "ip": ip }))
        .collect();
    let environment: Vec<Value> = (0..12)
        .map(|n| json!({"name": format!("SETTING_{n}"), "value": "some value of ordinary length"}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("app-{total:05}-5d8f9c7b64-x2x4z"), "namespace": namespace(total % NAMESPACES),
            "labels": {"app": format!("app-{}", total % 400), "tier": tier, "pod-template-hash": "5d8f9c7b64"},
            "annotations": {"example.com/checksum": "0f343b0931126a20f133d67c2b018a3b"},
        },
        "spec": {
            "nodeName": node["metadata"]["name"],
            "containers": [{
                "name": "main", "image": "registry.example.com/team/app:1.2.3", "env": environment,
                "ports": [{"name": "web", "containerPort": 8080}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
            }],
        },
        "status": {
            "phase": "Running", "podIP": ips.first().map(|ip| ip["ip"].clone()), "podIPs": ips,
            "conditions": [
                {"type": "Ready", "status": "True"}, {"type": "ContainersReady", "status": "True"},
                {"type": "PodScheduled", "status": "True"},
            ],
        },
    })
}
