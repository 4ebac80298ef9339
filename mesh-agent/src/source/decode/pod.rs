//! Pod: the fields that matter to a network. Others (images, volumes …) are not looked at.

use ebpf_policy::model::{NamedPort, Protocol};
use k8s_openapi::api::core::v1::{self, Container};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::problem::Problems;
use super::{ObjectKey, cidr, meta};
use crate::names;
use crate::snapshot::Pod;
use crate::snapshot::ipam::WantedPools;

/// The annotations that name IPPools, for IPv4 and IPv6.
pub const POOLS: [&str; 2] = ["margay.io/ipv4pools", "margay.io/ipv6pools"];

/// Converts the Pod of this name.
pub fn decode(key: &ObjectKey, pod: &v1::Pod, problems: &mut Problems) -> Pod {
    meta::check(&pod.metadata, problems);
    let mut out = Pod {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        uid: meta::uid(&pod.metadata),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        ..Pod::default()
    };
    if let Some(spec) = &pod.spec {
        out.node = spec.node_name.clone().filter(|node| !node.is_empty());
        if let Some(node) = out.node.as_ref().filter(|node| !names::is_dns_subdomain(node)) {
            problems.invalid("spec.nodeName", format!("{node:?} is not a DNS-1123 subdomain"));
        }
        out.host_network = spec.host_network.unwrap_or_default();
        for (index, container) in spec.containers.iter().enumerate() {
            ports(container, &format!("spec.containers[{index}]"), &mut out, problems);
        }
        for (index, container) in spec.init_containers.iter().flatten().enumerate() {
            // Only an init container that keeps running (a native sidecar) listens beside the others.
            if container.restart_policy.as_deref() == Some("Always") {
                ports(container, &format!("spec.initContainers[{index}]"), &mut out, problems);
            }
        }
    }
    status(pod, &mut out, problems);
    out
}

/// The pools a pod asks for: a list in JSON, as Calico's annotations have it. One that cannot be read names a pool that
/// cannot be, so that the pod gets no address instead of any.
pub fn pools(meta: &ObjectMeta) -> Option<Box<WantedPools>> {
    let annotations = meta.annotations.as_ref()?;
    let read = |key: &str| {
        let text = annotations.get(key)?;
        Some(serde_json::from_str(text).unwrap_or_else(|_| vec![text.clone()]))
    };
    let found = POOLS.map(read);
    found.iter().any(Option::is_some).then(|| Box::new(found.map(Option::unwrap_or_default)))
}

fn ports(container: &Container, field: &str, out: &mut Pod, problems: &mut Problems) {
    for (index, port) in container.ports.iter().flatten().enumerate() {
        let field = format!("{field}.ports[{index}]");
        let name = port.name.clone().unwrap_or_default();
        if !name.is_empty() && !names::is_port_name(&name) {
            problems.invalid(format!("{field}.name"), format!("{name:?} is not a port name"));
        }
        let protocol = match port.protocol.as_deref() {
            None | Some("" | "TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(other) => {
                problems.invalid(format!("{field}.protocol"), format!("{other:?} is none of TCP, UDP, SCTP"));
                None
            }
        };
        match u16::try_from(port.container_port) {
            // Policy can name those that have a name.
            Ok(number) if number > 0 => {
                out.ports.extend(protocol.filter(|_| !name.is_empty()).map(|protocol| NamedPort {
                    name,
                    protocol,
                    number,
                }))
            }
            _ => problems.invalid(
                format!("{field}.containerPort"),
                format!("{} is not in 1-65535", port.container_port),
            ),
        }
    }
}

fn status(pod: &v1::Pod, out: &mut Pod, problems: &mut Problems) {
    let Some(status) = &pod.status else { return };
    match status.phase.as_deref() {
        Some("Succeeded" | "Failed") => out.finished = true,
        None | Some("" | "Pending" | "Running" | "Unknown") => {}
        Some(other) => problems.invalid(
            "status.phase",
            format!("{other:?} is none of Pending, Running, Succeeded, Failed, Unknown"),
        ),
    }
    let mut texts: Vec<String> = status.pod_ips.iter().flatten().map(|entry| entry.ip.clone()).collect();
    let first = status.pod_ip.clone().filter(|text| !text.is_empty());
    match (texts.first(), first) {
        (None, Some(first)) => texts.push(first),
        (Some(listed), Some(first)) if *listed != first => {
            problems.invalid("status.podIP", format!("{first:?} is not status.podIPs[0], {listed:?}"));
        }
        _ => {}
    }
    for (index, text) in texts.iter().enumerate() {
        let field = format!("status.podIPs[{index}].ip");
        match cidr::address(text) {
            Ok(ip) if out.ips.contains(&ip) => problems.invalid(field, format!("{ip} stands there twice")),
            Ok(ip) => out.ips.push(ip),
            Err(message) => problems.invalid(field, message),
        }
    }
}
