//! Identities: classes of addresses for which the same facts hold.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use margay_bpf::layout::{Address, IdentityId, WORLD};

use super::facts::{BlockFacts, FactSet, Facts, PodFacts};
use super::ids::Ids;
use super::{Compiled, addr, prefix};
use crate::model::{ClusterView, LocalEndpoint, Pod, PodRef};

/// Every identity in use and what holds for it. [`WORLD`], for which nothing does, is not among them.
#[derive(Debug, Default)]
pub(super) struct Identities {
    pub(super) list: BTreeMap<IdentityId, FactSet>,
    by_facts: HashMap<FactSet, IdentityId>,
}

impl Identities {
    /// Gives every pod address and every boundary of a block its identity.
    pub(super) fn assign(
        view: &ClusterView,
        local: &[LocalEndpoint],
        facts: &Facts,
        ids: &mut Ids,
        compiled: &mut Compiled,
    ) -> Self {
        let mut identities = Self::default();
        let (pods, blocks) = (PodFacts::new(view, facts), BlockFacts::new(facts));
        for (edge, holds) in blocks.boundaries() {
            let identity = identities.of(holds.clone(), facts, ids);
            compiled.prefixes.insert(prefix(edge), identity);
        }
        for (ip, owner) in owners(view, local) {
            // Several pods with one address: only what is true of each of them can be believed.
            let mut holds = owner
                .pods
                .iter()
                .map(|pod| pods.of(pod))
                .reduce(|both, next| both.intersection(&next).copied().collect())
                .unwrap_or_default();
            let around = blocks.of(ip);
            let plain = holds.is_empty();
            holds.extend(around.into_iter().flatten());
            // Without a fact of its own a remote pod's address is no different from the addresses around it.
            if owner.ifindex != 0 || !plain {
                let identity = identities.of(holds, facts, ids);
                compiled
                    .addresses
                    .insert(addr(ip), Address { identity, ifindex: owner.ifindex, reserved: 0 });
            }
        }
        identities
    }

    fn of(&mut self, holds: FactSet, facts: &Facts, ids: &mut Ids) -> IdentityId {
        if holds.is_empty() {
            return WORLD;
        }
        if let Some(id) = self.by_facts.get(&holds) {
            return *id;
        }
        let content: Vec<_> = holds.iter().filter_map(|id| facts.list.get(*id as usize)).collect();
        // Sorted by content: the order in which policies were seen must not matter.
        let mut texts: Vec<_> =
            content.iter().map(|fact| serde_json::to_string(fact).unwrap_or_default()).collect();
        texts.sort();
        let id = ids.id("identity", &texts);
        self.by_facts.insert(holds.clone(), id);
        self.list.insert(id, holds);
        id
    }
}

/// Whose an address is.
#[derive(Default)]
struct Owner<'a> {
    ifindex: u32,
    pods: Vec<&'a Pod>,
}

/// Owners of every pod address. What the CNI plugin gave out here beats what `status.podIPs` say.
fn owners<'a>(view: &'a ClusterView, local: &[LocalEndpoint]) -> BTreeMap<IpAddr, Owner<'a>> {
    let mut owners: BTreeMap<IpAddr, Owner<'a>> = BTreeMap::new();
    for pod in view.pods.iter().filter(|pod| pod.is_policed()) {
        for ip in &pod.ips {
            owners.entry(ip.to_canonical()).or_default().pods.push(pod);
        }
    }
    let by_name: HashMap<PodRef, &Pod> = view.pods.iter().map(|pod| (pod.reference(), &**pod)).collect();
    for endpoint in local {
        let pod = endpoint.pod.as_ref().and_then(|name| by_name.get(name)).copied();
        for ip in &endpoint.ips {
            let pods = pod.into_iter().filter(|pod| pod.is_policed()).collect();
            owners.insert(ip.to_canonical(), Owner { ifindex: endpoint.ifindex, pods });
        }
    }
    owners
}
