//! The reference evaluator: NetworkPolicy read aloud, slow and obvious.
//!
//! Nothing is prepared or shared with the compiler but the model and label selectors. Tests compare everything else with it, and
//! it can be asked for a second opinion at run time.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    ClusterView, Direction, LocalEndpoint, NetworkPolicy, Peer, Pod, PodRef, Port, PortNumber, Rule, RuleName,
};

/// What policy says about one new connection, at one end of it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// The pod is unknown or has no network of its own: nothing may pass.
    Closed,
    /// No policy isolates the pod in this direction.
    NotIsolated,
    /// This rule allows it (the first in order of policy names and rules).
    Allowed(RuleName),
    /// These policies (`namespace/name`) isolate the pod and no rule allows it.
    Denied(Vec<String>),
}

impl Answer {
    /// Whether the connection may come about, as far as this end is concerned.
    pub fn allows(&self) -> bool {
        matches!(self, Self::NotIsolated | Self::Allowed(_))
    }
}

/// A connection between one of our pods and some address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Ingress if the connection is opened towards the pod.
    pub direction: Direction,
    /// The other end.
    pub remote: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port.
    pub port: u16,
}

/// Judges a new connection at a pod.
pub fn evaluate(view: &ClusterView, pod: &PodRef, flow: &Flow) -> Answer {
    let Some(pod) =
        view.pods.iter().find(|candidate| candidate.reference() == *pod && candidate.is_policed())
    else {
        return Answer::Closed;
    };
    let mut isolating: Vec<(&NetworkPolicy, &Vec<Rule>)> = Vec::new();
    for policy in &view.policies {
        let rules = match flow.direction {
            Direction::Ingress => &policy.ingress,
            Direction::Egress => &policy.egress,
        };
        if let Some(rules) = rules
            && policy.namespace == pod.namespace
            && policy.pod_selector.matches(&pod.labels)
        {
            isolating.push((policy, rules));
        }
    }
    if isolating.is_empty() {
        return Answer::NotIsolated;
    }
    isolating.sort_by_key(|(policy, _)| &policy.name);
    for (policy, rules) in &isolating {
        for (index, rule) in rules.iter().enumerate() {
            if policy.invalid.is_none() && rule_allows(view, policy, rule, pod, flow) {
                return Answer::Allowed(RuleName {
                    namespace: policy.namespace.clone(),
                    policy: policy.name.clone(),
                    direction: flow.direction,
                    index,
                });
            }
        }
    }
    Answer::Denied(
        isolating.iter().map(|(policy, _)| format!("{}/{}", policy.namespace, policy.name)).collect(),
    )
}

fn rule_allows(view: &ClusterView, policy: &NetworkPolicy, rule: &Rule, pod: &Pod, flow: &Flow) -> bool {
    let peers =
        rule.peers.is_empty() || rule.peers.iter().any(|peer| peer_matches(view, policy, peer, flow.remote));
    let ports = rule.ports.is_empty() || rule.ports.iter().any(|port| port_matches(view, port, pod, flow));
    rule.invalid.is_none() && peers && ports
}

fn peer_matches(view: &ClusterView, policy: &NetworkPolicy, peer: &Peer, remote: IpAddr) -> bool {
    match peer {
        Peer::IpBlock { cidr, except } => {
            cidr.contains(&remote) && !except.iter().any(|except| except.contains(&remote))
        }
        Peer::Pods { namespace_selector, pod_selector } => every_pod_at(view, remote, |pod| {
            let namespace = match namespace_selector {
                None => pod.namespace == policy.namespace,
                Some(selector) => {
                    view.namespaces.get(&pod.namespace).is_some_and(|labels| selector.matches(labels))
                }
            };
            namespace && pod_selector.as_ref().is_none_or(|selector| selector.matches(&pod.labels))
        }),
    }
}

fn port_matches(view: &ClusterView, port: &Port, pod: &Pod, flow: &Flow) -> bool {
    if port.protocol.number() != flow.protocol {
        return false;
    }
    match &port.number {
        PortNumber::All => true,
        PortNumber::Range(first, last) => (*first..=*last).contains(&flow.port),
        PortNumber::Named(name) => {
            let declares = |pod: &Pod| {
                pod.ports
                    .iter()
                    .find(|declared| declared.name == *name && declared.protocol == port.protocol)
                    .map(|d| d.number)
                    == Some(flow.port)
            };
            match flow.direction {
                Direction::Ingress => declares(pod),
                Direction::Egress => every_pod_at(view, flow.remote, declares),
            }
        }
    }
}

/// Whether some pod has the address and the condition holds for each that has: a stale claim to an address must not open it.
fn every_pod_at(view: &ClusterView, address: IpAddr, condition: impl Fn(&Pod) -> bool) -> bool {
    let mut pods = view.pods.iter().filter(|pod| pod.is_policed() && pod.ips.contains(&address)).peekable();
    pods.peek().is_some() && pods.all(|pod| condition(pod))
}

impl ClusterView {
    /// The view with addresses as this node knows them: what the CNI plugin gave to a pod here is that pod's and nobody else's.
    pub fn with_local(&self, local: &[LocalEndpoint]) -> Self {
        let mut view = self.clone();
        for endpoint in local {
            for pod in &mut view.pods {
                Arc::make_mut(pod).ips.retain(|ip| !endpoint.ips.contains(ip));
            }
        }
        for endpoint in local {
            let owner = view.pods.iter_mut().find(|pod| Some(pod.reference()) == endpoint.pod);
            owner.into_iter().for_each(|pod| Arc::make_mut(pod).ips.extend(&endpoint.ips));
        }
        view
    }
}
