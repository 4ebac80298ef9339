//! NetworkPolicy, with the API server's defaults. Whatever it would refuse fails closed: a rule that cannot
//! be understood allows nothing, and a policy that cannot isolates all it may have meant.

use ebpf_policy::model::{self, Direction, Peer, Port, PortNumber, Protocol, Rule};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{self, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

use super::problem::Problems;
use super::{cidr, meta, selector};
use crate::names;
use crate::snapshot::ObjectRef;

/// Converts a NetworkPolicy. Total: what is wrong is in `problems` and closed in the result.
pub fn decode(policy: &v1::NetworkPolicy, key: &ObjectRef, problems: &mut Problems) -> model::NetworkPolicy {
    let mut out = shell(key);
    let mut whole = Problems::default();
    if !names::is_dns_subdomain(policy.metadata.name.as_deref().unwrap_or_default()) {
        whole.invalid("metadata.name", format!("{:?} is not a DNS-1123 subdomain", key.name));
    }
    meta::check(&policy.metadata, problems);
    let spec = policy.spec.clone().unwrap_or_default();
    // A selector that is not there selects all, as an empty one does.
    if let Some(pods) = &spec.pod_selector {
        out.pod_selector = selector::decode(pods, "spec.podSelector", &mut whole).unwrap_or_default();
    }
    let (ingress, egress) = directions(&spec, &mut whole);
    if ingress {
        let rules = spec.ingress.iter().flatten().enumerate();
        out.ingress = Some(
            rules
                .map(|(i, rule)| {
                    decode_rule(Direction::Ingress, i, rule.from.as_deref(), rule.ports.as_deref(), problems)
                })
                .collect(),
        );
    }
    if egress {
        let rules = spec.egress.iter().flatten().enumerate();
        out.egress = Some(
            rules
                .map(|(i, rule)| {
                    decode_rule(Direction::Egress, i, rule.to.as_deref(), rule.ports.as_deref(), problems)
                })
                .collect(),
        );
    }
    out.invalid = whole.first_refusal().map(|problem| format!("{}: {}", problem.field, problem.message));
    problems.0.append(&mut whole.0);
    out
}

/// What is left of a policy that is not even of the right shape: what it selects, if that can be read, else
/// the whole namespace; isolated in the directions it names, if those can be read, else in both.
pub fn salvage(value: &Value, key: &ObjectRef, why: &str) -> model::NetworkPolicy {
    let mut out = shell(key);
    let spec = value.get("spec").unwrap_or(&Value::Null);
    if let Some(pods) = spec.get("podSelector")
        && let Ok(pods) = serde_json::from_value::<LabelSelector>(pods.clone())
    {
        out.pod_selector = selector::decode(&pods, "", &mut Problems::default()).unwrap_or_default();
    }
    let types =
        spec.get("policyTypes").and_then(|types| serde_json::from_value::<Vec<String>>(types.clone()).ok());
    let types = types.filter(|types| {
        !types.is_empty() && types.iter().all(|name| matches!(name.as_str(), "Ingress" | "Egress"))
    });
    let isolates = |name: &str| types.as_ref().is_none_or(|types| types.iter().any(|listed| listed == name));
    out.ingress = isolates("Ingress").then(Vec::new);
    out.egress = isolates("Egress").then(Vec::new);
    out.invalid = Some(why.to_owned());
    out
}

fn shell(key: &ObjectRef) -> model::NetworkPolicy {
    model::NetworkPolicy {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        ..model::NetworkPolicy::default()
    }
}

/// Which directions the policy isolates: (ingress, egress). Left out, `policyTypes` means Ingress, and Egress
/// too if there are egress rules.
fn directions(spec: &v1::NetworkPolicySpec, problems: &mut Problems) -> (bool, bool) {
    let types = spec.policy_types.clone().unwrap_or_default();
    if types.is_empty() {
        return (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()));
    }
    let mut valid = true;
    if types.len() > 2 {
        valid = false;
        problems.invalid("spec.policyTypes", "there are at most two");
    }
    for (index, name) in types.iter().enumerate() {
        if !matches!(name.as_str(), "Ingress" | "Egress") {
            valid = false;
            problems.invalid(
                format!("spec.policyTypes[{index}]"),
                format!("{name:?} is neither Ingress nor Egress"),
            );
        }
    }
    let has = |name: &str| !valid || types.iter().any(|listed| listed == name);
    (has("Ingress"), has("Egress"))
}

fn decode_rule(
    direction: Direction,
    index: usize,
    peers: Option<&[NetworkPolicyPeer]>,
    ports: Option<&[NetworkPolicyPort]>,
    problems: &mut Problems,
) -> Rule {
    let rule = format!("spec.{direction}[{index}]");
    let list = if direction == Direction::Ingress { "from" } else { "to" };
    let mut own = Problems::default();
    let peers = peers
        .unwrap_or_default()
        .iter()
        .enumerate()
        .filter_map(|(i, peer)| decode_peer(peer, &format!("{rule}.{list}[{i}]"), &mut own))
        .collect();
    let ports = ports
        .unwrap_or_default()
        .iter()
        .enumerate()
        .filter_map(|(i, port)| decode_port(port, &format!("{rule}.ports[{i}]"), &mut own))
        .collect();
    let invalid = own.first_refusal().map(|problem| format!("{}: {}", problem.field, problem.message));
    problems.0.append(&mut own.0);
    // An empty list means "anyone", so a rule that lost an entry must not be used at all.
    match invalid {
        Some(why) => Rule { invalid: Some(why), ..Rule::default() },
        None => Rule { peers, ports, invalid: None },
    }
}

fn decode_peer(peer: &NetworkPolicyPeer, field: &str, problems: &mut Problems) -> Option<Peer> {
    let selectors = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
    match &peer.ip_block {
        Some(_) if selectors => {
            problems.invalid(field, "an ipBlock stands alone, without selectors");
            None
        }
        Some(block) => decode_block(block, &format!("{field}.ipBlock"), problems),
        None if !selectors => {
            problems.invalid(field, "a peer needs a podSelector, a namespaceSelector or an ipBlock");
            None
        }
        None => {
            let mut decode = |selector: &Option<LabelSelector>, name: &str| match selector {
                Some(selector) => selector::decode(selector, &format!("{field}.{name}"), problems).map(Some),
                None => Some(None),
            };
            let namespace_selector = decode(&peer.namespace_selector, "namespaceSelector");
            let pod_selector = decode(&peer.pod_selector, "podSelector");
            Some(Peer::Pods { namespace_selector: namespace_selector?, pod_selector: pod_selector? })
        }
    }
}

fn decode_block(block: &v1::IPBlock, field: &str, problems: &mut Problems) -> Option<Peer> {
    let mut prefix = |text: &str, field: String| -> Option<IpNet> {
        match cidr::prefix(text) {
            Ok((net, cut)) => {
                if cut {
                    problems.warn(field, "HostBits", format!("{text} has host bits, taken as {net}"));
                }
                Some(net)
            }
            Err(message) => {
                problems.invalid(field, message);
                None
            }
        }
    };
    let cidr = prefix(&block.cidr, format!("{field}.cidr"));
    let except: Vec<Option<IpNet>> = block
        .except
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, text)| prefix(text, format!("{field}.except[{i}]")))
        .collect();
    let cidr = cidr?;
    for (index, net) in except.iter().enumerate() {
        if let Some(net) = net
            && !(cidr.contains(net) && cidr.prefix_len() < net.prefix_len())
        {
            problems
                .invalid(format!("{field}.except[{index}]"), format!("{net} is not a strict part of {cidr}"));
        }
    }
    Some(Peer::IpBlock { cidr, except: except.into_iter().collect::<Option<Vec<_>>>()? })
}

fn decode_port(port: &NetworkPolicyPort, field: &str, problems: &mut Problems) -> Option<Port> {
    let before = problems.0.len();
    let protocol = match port.protocol.as_deref() {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            problems.invalid(format!("{field}.protocol"), format!("{other:?} is none of TCP, UDP, SCTP"));
            None
        }
    };
    let mut in_range = |number: i32, field: String| match u16::try_from(number) {
        Ok(number) if number > 0 => Some(number),
        _ => {
            problems.invalid(field, format!("{number} is not in 1-65535"));
            None
        }
    };
    let first = match &port.port {
        Some(IntOrString::Int(number)) => in_range(*number, format!("{field}.port")),
        _ => None,
    };
    let last = port.end_port.and_then(|number| in_range(number, format!("{field}.endPort")));
    let number = match (&port.port, port.end_port) {
        (Some(IntOrString::Int(_)), None) => first.map(|first| PortNumber::Range(first, first)),
        (Some(IntOrString::Int(_)), Some(_)) => match (first, last) {
            (Some(first), Some(last)) if last < first => {
                problems.invalid(format!("{field}.endPort"), format!("{last} is less than port {first}"));
                None
            }
            (Some(first), Some(last)) => Some(PortNumber::Range(first, last)),
            _ => None,
        },
        (Some(IntOrString::String(name)), None) => {
            if !names::is_port_name(name) {
                problems.invalid(format!("{field}.port"), format!("{name:?} is not a port name"));
            }
            Some(PortNumber::Named(name.clone()))
        }
        (_, Some(_)) => {
            problems.invalid(format!("{field}.endPort"), "needs a numeric port");
            None
        }
        (None, None) => Some(PortNumber::All),
    };
    let port = Port { protocol: protocol?, number: number? };
    (problems.0.len() == before).then_some(port)
}
