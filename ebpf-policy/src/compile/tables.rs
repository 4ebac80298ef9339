//! Port tables: what a policy set says about an identity, protocol by protocol and port by port.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use margay_bpf::layout::{Decision, EMPTY_TABLE, RuleId, SetId, SetKey, TableId, TableKey};

use super::facts::{FactId, FactSet, Facts};
use super::identities::Identities;
use super::ids::Ids;
use super::sets::{CompiledPort, CompiledRule, Sets};
use super::{Compiled, TablePrefix};

/// Builds the tables of all sets and ties sets, identities and endpoints to them.
pub(super) fn build(
    sets: &Sets,
    identities: &Identities,
    facts: &Facts,
    ids: &mut Ids,
    compiled: &mut Compiled,
) {
    let mut by_fact: HashMap<FactId, Vec<u64>> = HashMap::new();
    for (identity, holds) in &identities.list {
        for fact in holds {
            by_fact.entry(*fact).or_default().push(*identity);
        }
    }
    let mut defaults: BTreeMap<SetId, TableId> = BTreeMap::new();
    for (set, rules) in &sets.rules {
        let default = table(rules, &FactSet::new(), facts, ids, compiled);
        defaults.insert(*set, default);
        // Only identities that some peer of the set matches can differ from the default.
        let asked: BTreeSet<u64> = rules
            .iter()
            .flat_map(|rule| match &rule.peers {
                Some(peers) => {
                    peers.iter().flat_map(|fact| by_fact.get(fact)).flatten().copied().collect::<Vec<_>>()
                }
                // Anyone, but perhaps at a port that is a name in the destination.
                None if has_names(rule) => identities.list.keys().copied().collect(),
                None => Vec::new(),
            })
            .collect();
        for identity in asked {
            let Some(holds) = identities.list.get(&identity) else { continue };
            let id = table(rules, holds, facts, ids, compiled);
            if id != default {
                compiled.sets.insert(SetKey { set: *set, identity }, id);
            }
        }
    }
    let default = |set| defaults.get(&set).copied().unwrap_or(EMPTY_TABLE);
    for endpoint in compiled.endpoints.values_mut() {
        endpoint.ingress_table = default(endpoint.ingress);
        endpoint.egress_table = default(endpoint.egress);
    }
}

fn has_names(rule: &CompiledRule) -> bool {
    rule.ports.iter().flatten().any(|port| matches!(port, CompiledPort::Named(..)))
}

/// The table for an identity with these facts.
fn table(
    rules: &[CompiledRule],
    holds: &FactSet,
    facts: &Facts,
    ids: &mut Ids,
    compiled: &mut Compiled,
) -> TableId {
    let entries = entries(rules, holds, facts);
    if entries.is_empty() {
        return EMPTY_TABLE;
    }
    let id = ids.id("table", &entries);
    for Entry { protocol, first, last, rule } in entries {
        let decision = Decision { rule, allow: 1, reserved: 0 };
        let mut put = |length, protocol, port| {
            let key = TablePrefix { length, key: TableKey::new(id, protocol, port) };
            compiled.tables.insert(key, decision);
        };
        match protocol {
            None => put(TableKey::ANY_PROTOCOL, 0, 0),
            Some(protocol) => {
                for (port, bits) in prefixes(first, last) {
                    put(TableKey::ANY_PORT + bits, protocol, port);
                }
            }
        }
    }
    id
}

/// A range of ports and the rule that allows it; without a protocol: whatever the other entries leave.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
struct Entry {
    protocol: Option<u8>,
    first: u16,
    last: u16,
    rule: RuleId,
}

/// Disjoint entries for one identity: of the rules that match, the first in order names itself.
fn entries(rules: &[CompiledRule], holds: &FactSet, facts: &Facts) -> Vec<Entry> {
    let matching: Vec<_> = rules
        .iter()
        .filter(|rule| rule.peers.as_ref().is_none_or(|peers| peers.iter().any(|fact| holds.contains(fact))))
        .map(|rule| (rule.id, rule.ports.as_ref().map(|ports| ranges(ports, holds, facts))))
        .collect();
    let protocols: BTreeSet<u8> = matching
        .iter()
        .filter_map(|(_, ports)| ports.as_ref())
        .flatten()
        .map(|(protocol, ..)| *protocol)
        .collect();
    // The first rule without ports decides for every protocol that no rule names.
    let any = matching.iter().find(|(_, ports)| ports.is_none()).map(|(rule, _)| *rule);
    let mut entries = Vec::new();
    for protocol in protocols {
        // Between two neighbouring edges the answer is the same.
        let mut edges: BTreeSet<u32> = [0, 1 << 16].into();
        for (_, first, last) in matching.iter().filter_map(|(_, ports)| ports.as_ref()).flatten() {
            edges.extend([u32::from(*first), u32::from(*last) + 1]);
        }
        for (first, next) in edges.iter().zip(edges.iter().skip(1)) {
            let first = *first as u16;
            let rule = matching.iter().find(|(_, ports)| match ports {
                None => true,
                Some(ports) => {
                    ports.iter().any(|(p, from, to)| *p == protocol && *from <= first && first <= *to)
                }
            });
            let Some((rule, _)) = rule else { continue };
            let last = (*next - 1) as u16;
            match entries.last_mut() {
                Some(Entry { protocol: p, last: end, rule: r, .. })
                    if *p == Some(protocol) && *r == *rule && end.checked_add(1) == Some(first) =>
                {
                    *end = last;
                }
                _ => entries.push(Entry { protocol: Some(protocol), first, last, rule: *rule }),
            }
        }
    }
    entries.retain(|entry| Some(entry.rule) != any);
    entries.extend(any.map(|rule| Entry { protocol: None, first: 0, last: u16::MAX, rule }));
    entries
}

fn ranges(ports: &[CompiledPort], holds: &FactSet, facts: &Facts) -> Vec<(u8, u16, u16)> {
    let mut list = Vec::new();
    for port in ports {
        match port {
            CompiledPort::Range(protocol, first, last) => list.push((protocol.number(), *first, *last)),
            CompiledPort::Named(protocol, name) => {
                let numbers = facts.port_numbers(holds, name, *protocol);
                list.extend(numbers.into_iter().map(|n| (protocol.number(), n, n)));
            }
        }
    }
    list
}

/// The fewest prefixes (value, bits that count of 16) that cover an inclusive range of ports.
fn prefixes(first: u16, last: u16) -> Vec<(u16, u32)> {
    let (mut at, end) = (u32::from(first), u32::from(last) + 1);
    let mut list = Vec::new();
    while at < end {
        let aligned = if at == 0 { 16 } else { at.trailing_zeros() };
        let fits = (end - at).ilog2();
        let size = aligned.min(fits);
        list.push((at as u16, 16 - size));
        at += 1 << size;
    }
    list
}

#[cfg(test)]
mod tests {
    use super::prefixes;
    use proptest::prelude::*;

    #[test]
    fn all_ports_are_one_prefix() {
        assert_eq!(prefixes(0, u16::MAX), [(0, 0)]);
        assert_eq!(prefixes(80, 80), [(80, 16)]);
    }

    proptest! {
        #[test]
        fn prefixes_cover_the_range_exactly_and_once(a: u16, b: u16) {
            let (first, last) = (a.min(b), a.max(b));
            let list = prefixes(first, last);
            prop_assert!(list.len() <= 30);
            let mut at = u32::from(first);
            for (value, bits) in list {
                prop_assert_eq!(u32::from(value), at);
                prop_assert_eq!(value.trailing_zeros().min(16) >= 16 - bits, true);
                at += 1 << (16 - bits);
            }
            prop_assert_eq!(at, u32::from(last) + 1);
        }
    }
}
