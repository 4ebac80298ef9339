//! Policy sets: all policies that isolate an endpoint in one direction.

use std::collections::{BTreeMap, HashMap};

use margay_bpf::layout::{EMPTY_TABLE, Endpoint, NOT_ISOLATED, RuleId, SetId};

use super::Compiled;
use super::facts::{FactId, Facts, declared};
use super::ids::Ids;
use crate::model::{
    ClusterView, Direction, LocalEndpoint, NetworkPolicy, Pod, PodRef, PortNumber, Protocol, Rule, RuleName,
};

/// A rule, ready to be asked about an identity.
#[derive(Debug)]
pub(super) struct CompiledRule {
    pub(super) id: RuleId,
    /// Facts of which one must hold; `None` is anyone.
    pub(super) peers: Option<Vec<FactId>>,
    /// `None` is every port of every protocol.
    pub(super) ports: Option<Vec<CompiledPort>>,
}

/// A port of a rule.
#[derive(Debug)]
pub(super) enum CompiledPort {
    Range(Protocol, u16, u16),
    /// To be looked up in the facts of the destination.
    Named(Protocol, String),
}

/// The sets in use.
#[derive(Debug, Default)]
pub(super) struct Sets {
    pub(super) rules: BTreeMap<SetId, Vec<CompiledRule>>,
}

impl Sets {
    /// Finds each local endpoint's sets and notes the endpoint; its tables come later.
    pub(super) fn select(
        view: &ClusterView,
        local: &[LocalEndpoint],
        facts: &mut Facts,
        ids: &mut Ids,
        compiled: &mut Compiled,
    ) -> Self {
        let mut policies: HashMap<&str, Vec<&NetworkPolicy>> = HashMap::new();
        for policy in &view.policies {
            policies.entry(&policy.namespace).or_default().push(policy);
        }
        for list in policies.values_mut() {
            list.sort_by_key(|policy| &policy.name);
        }
        let pods: HashMap<PodRef, &Pod> = view.pods.iter().map(|pod| (pod.reference(), &**pod)).collect();
        let mut sets = Self::default();
        for endpoint in local {
            compiled.names.pods.extend(endpoint.pod.clone().map(|pod| (endpoint.ifindex, pod)));
            let pod = endpoint.pod.as_ref().and_then(|name| pods.get(name)).filter(|pod| pod.is_policed());
            let Some(pod) = pod else {
                compiled.endpoints.insert(endpoint.ifindex, Endpoint { closed: 1, ..Endpoint::default() });
                continue;
            };
            let candidates = policies.get(pod.namespace.as_str()).map_or(&[][..], Vec::as_slice);
            let mut set = |direction| sets.of(view, pod, candidates, direction, facts, ids, compiled);
            let (ingress, egress) = (set(Direction::Ingress), set(Direction::Egress));
            compiled.endpoints.insert(
                endpoint.ifindex,
                Endpoint {
                    ingress,
                    egress,
                    ingress_table: EMPTY_TABLE,
                    egress_table: EMPTY_TABLE,
                    closed: 0,
                    reserved: 0,
                },
            );
        }
        sets
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one compilation")]
    fn of(
        &mut self,
        view: &ClusterView,
        pod: &Pod,
        candidates: &[&NetworkPolicy],
        direction: Direction,
        facts: &mut Facts,
        ids: &mut Ids,
        compiled: &mut Compiled,
    ) -> SetId {
        let isolating: Vec<_> = candidates
            .iter()
            .filter(|policy| policy.pod_selector.matches(&pod.labels))
            .filter_map(|policy| rules(policy, direction).map(|rules| (*policy, rules)))
            .collect();
        if isolating.is_empty() {
            return NOT_ISOLATED;
        }
        let content: Vec<_> = isolating
            .iter()
            .map(|(policy, rules)| {
                let resolved: Vec<_> =
                    named(rules).map(|(name, p)| own_port(pod, direction, name, p)).collect();
                (&policy.namespace, &policy.name, &policy.invalid, rules, resolved)
            })
            .collect();
        let id = ids.id("set", &(direction, content));
        if self.rules.contains_key(&id) {
            return id;
        }
        let mut list = Vec::new();
        for (policy, rules) in &isolating {
            for (index, rule) in rules.iter().enumerate() {
                if policy.invalid.is_some() || rule.invalid.is_some() {
                    continue;
                }
                let name = RuleName {
                    namespace: policy.namespace.clone(),
                    policy: policy.name.clone(),
                    direction,
                    index,
                };
                let id = ids.id("rule", &name);
                compiled.names.rules.insert(id, name);
                list.push(CompiledRule {
                    id,
                    peers: (!rule.peers.is_empty())
                        .then(|| rule.peers.iter().map(|peer| facts.peer(&policy.namespace, peer)).collect()),
                    ports: (!rule.ports.is_empty()).then(|| ports(view, pod, rule, direction, facts)),
                });
            }
        }
        let names = isolating.iter().map(|(policy, _)| format!("{}/{}", policy.namespace, policy.name));
        compiled.names.sets.insert(id, names.collect());
        self.rules.insert(id, list);
        id
    }
}

/// A policy's rules in a direction, if it isolates in that direction.
fn rules(policy: &NetworkPolicy, direction: Direction) -> Option<&Vec<Rule>> {
    match direction {
        Direction::Ingress => policy.ingress.as_ref(),
        Direction::Egress => policy.egress.as_ref(),
    }
}

/// Named ports that rules refer to.
fn named(rules: &[Rule]) -> impl Iterator<Item = (&str, Protocol)> {
    rules.iter().flat_map(|rule| &rule.ports).filter_map(|port| match &port.number {
        PortNumber::Named(name) => Some((name.as_str(), port.protocol)),
        _ => None,
    })
}

/// On ingress the destination is the endpoint's own pod, so a name is settled here.
fn own_port(pod: &Pod, direction: Direction, name: &str, protocol: Protocol) -> Option<u16> {
    if direction == Direction::Ingress { declared(pod, name, protocol) } else { None }
}

fn ports(
    view: &ClusterView,
    pod: &Pod,
    rule: &Rule,
    direction: Direction,
    facts: &mut Facts,
) -> Vec<CompiledPort> {
    let mut list = Vec::new();
    for port in &rule.ports {
        match &port.number {
            PortNumber::All => list.push(CompiledPort::Range(port.protocol, 0, u16::MAX)),
            PortNumber::Range(first, last) => list.push(CompiledPort::Range(port.protocol, *first, *last)),
            PortNumber::Named(name) if direction == Direction::Ingress => list
                .extend(declared(pod, name, port.protocol).map(|n| CompiledPort::Range(port.protocol, n, n))),
            PortNumber::Named(name) => {
                facts.named_port(view, name, port.protocol);
                list.push(CompiledPort::Named(port.protocol, name.clone()));
            }
        }
    }
    list
}
