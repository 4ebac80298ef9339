//! What was enforced, in status's words. Pure.

use std::collections::BTreeMap;

use ebpf_policy::Compiled;
use ebpf_policy::model::{Direction, NetworkPolicy};
use mesh_api::status::PolicyStatus;

use crate::desired::Desired;
use crate::reconcile::ReconcileError;

/// Every policy with the local pods it selects, and `closed`, `open` or `policed` for every endpoint.
pub(super) fn describe(
    desired: &Desired,
    compiled: &Compiled,
    errors: &[ReconcileError],
) -> (Vec<PolicyStatus>, BTreeMap<String, String>) {
    let mut selects: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut endpoints = BTreeMap::new();
    for (interface, endpoint) in &desired.policy.endpoints {
        let isolating = [Direction::Ingress, Direction::Egress]
            .into_iter()
            .flat_map(|direction| compiled.policies(endpoint.ifindex, direction));
        let mut isolated = false;
        for policy in isolating {
            isolated = true;
            let pods = selects.entry(policy.clone()).or_default();
            let pod = endpoint.pod.to_string();
            if !pods.contains(&pod) {
                pods.push(pod);
            }
        }
        let unattached = errors.iter().any(|error| error.object == format!("link {interface}"));
        let state = match compiled.is_open(endpoint.ifindex) {
            false => "closed",
            true if unattached => "closed",
            true if isolated => "policed",
            true => "open",
        };
        endpoints.insert(interface.clone(), state.to_owned());
    }
    let policies = desired.policy.view.policies.iter().map(|policy| PolicyStatus {
        kind: "NetworkPolicy".to_owned(),
        namespace: policy.namespace.clone(),
        name: policy.name.clone(),
        selects: selects.remove(&format!("{}/{}", policy.namespace, policy.name)).unwrap_or_default(),
        policy_types: types(policy),
        enforced: desired.generation,
        issue: issue(policy),
    });
    (policies.collect(), endpoints)
}

fn types(policy: &NetworkPolicy) -> Vec<String> {
    let ingress = policy.ingress.as_ref().map(|_| "Ingress".to_owned());
    ingress.into_iter().chain(policy.egress.as_ref().map(|_| "Egress".to_owned())).collect()
}

fn issue(policy: &NetworkPolicy) -> Option<String> {
    let rules = |name, rules: &Option<Vec<ebpf_policy::model::Rule>>| {
        let invalid =
            rules.iter().flatten().enumerate().filter_map(move |(at, rule)| {
                rule.invalid.as_ref().map(|why| format!("{name}[{at}]: {why}"))
            });
        invalid.collect::<Vec<_>>()
    };
    let mut all: Vec<String> = policy.invalid.iter().cloned().collect();
    all.extend(rules("ingress", &policy.ingress));
    all.extend(rules("egress", &policy.egress));
    (!all.is_empty()).then(|| all.join("; "))
}
