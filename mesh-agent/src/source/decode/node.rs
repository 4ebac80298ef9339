//! Node.

use std::sync::Arc;

use k8s_openapi::api::core::v1;
use keyservice::Announcement;
use keyservice::announcement::ANNOTATIONS;

use super::problem::Problems;
use super::{cidr, meta};
use crate::names;
use crate::snapshot::{Labels, Node};

/// Converts a Node.
pub fn decode(node: &v1::Node, problems: &mut Problems) -> Node {
    let name = node.metadata.name.as_deref().unwrap_or_default();
    if !names::is_dns_subdomain(name) {
        problems.invalid("metadata.name", format!("{name:?} is not a DNS-1123 subdomain"));
    }
    meta::check(&node.metadata, problems);
    let mut out = Node {
        uid: meta::uid(&node.metadata),
        labels: node.metadata.labels.clone().unwrap_or_default(),
        annotations: meta::own_annotations(&node.metadata),
        ..Node::default()
    };
    pod_cidrs(node, &mut out, problems);
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
    for (index, address) in addresses.into_iter().flatten().enumerate() {
        let field = format!("status.addresses[{index}].address");
        let list = match address.type_.as_str() {
            "InternalIP" => &mut out.internal_ips,
            "ExternalIP" => &mut out.external_ips,
            // Names are no addresses of a route or an endpoint.
            "Hostname" | "InternalDNS" | "ExternalDNS" => continue,
            other => {
                problems.warn(
                    format!("status.addresses[{index}].type"),
                    "UnknownAddressType",
                    format!("{other:?} is not known and has no effect"),
                );
                continue;
            }
        };
        match cidr::address(&address.address) {
            Ok(ip) if list.contains(&ip) => {}
            Ok(ip) => list.push(ip),
            Err(message) => problems.invalid(field, message),
        }
    }
    out
}

/// Goes on with what the Node of that name announced `before`, where what it announces now is illegible, or signed by somebody
/// else: a slip of a hand in an annotation is repaired by its agent, and must cost no packet until then. A new UID is another node.
pub fn remember(name: &str, now: &mut Arc<Node>, before: &Node) {
    let legible =
        |annotations: &Labels| matches!(Announcement::from_annotations(name, annotations), Ok(Some(_)));
    let signer = |annotations: &Labels| {
        let announced = Announcement::from_annotations(name, annotations).ok().flatten();
        announced.and_then(|announced| announced.signer(now.uid.as_deref()))
    };
    let illegible = Announcement::from_annotations(name, &now.annotations).is_err();
    let (of_before, first) = (signer(&before.annotations), signer(&before.announced_before));
    let expected = first.or(of_before);
    let foreign = expected.is_some() && signer(&now.annotations) != expected;
    if now.uid != before.uid || !(illegible || foreign) {
        return;
    }
    let now = Arc::make_mut(now);
    now.announced_before = if legible(&before.annotations) && of_before == expected {
        let announced = before.annotations.iter().filter(|(key, _)| ANNOTATIONS.contains(&key.as_str()));
        announced.map(|(key, value)| (key.clone(), value.clone())).collect()
    } else {
        before.announced_before.clone()
    };
}

/// `spec.podCIDRs`: at most one a family, and `spec.podCIDR` the first of them where both are given.
fn pod_cidrs(node: &v1::Node, out: &mut Node, problems: &mut Problems) {
    let Some(spec) = &node.spec else { return };
    let mut texts = spec.pod_cidrs.clone().unwrap_or_default();
    let first = spec.pod_cidr.clone().filter(|text| !text.is_empty());
    match (texts.first(), first) {
        (None, Some(first)) => texts.push(first),
        (Some(listed), Some(first)) if *listed != first => {
            problems.invalid("spec.podCIDR", format!("{first:?} is not spec.podCIDRs[0], {listed:?}"));
        }
        _ => {}
    }
    for (index, text) in texts.iter().enumerate() {
        let field = format!("spec.podCIDRs[{index}]");
        match cidr::prefix(text) {
            Ok((net, _)) if out.pod_cidrs.iter().any(|n| n.addr().is_ipv4() == net.addr().is_ipv4()) => {
                problems.invalid(field, format!("{net} is a second prefix of its family"));
            }
            Ok((net, cut)) => {
                if cut {
                    problems.warn(field, "HostBits", format!("{text} has host bits, taken as {net}"));
                }
                out.pod_cidrs.push(net);
            }
            Err(message) => problems.invalid(field, message),
        }
    }
}
