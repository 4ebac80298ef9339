//! Facts: what rules ask of the other end's address.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use crate::model::{ClusterView, LabelSelector, Peer, Pod, Protocol};

/// Index of a fact.
pub(super) type FactId = u32;

/// Facts that hold for an address.
pub(super) type FactSet = BTreeSet<FactId>;

/// One yes-or-no question about an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub(super) enum Fact {
    /// It is a pod's that these selectors match.
    Pods {
        /// The one namespace looked in, when there is no namespace selector.
        home: Option<String>,
        namespaces: Option<LabelSelector>,
        pods: Option<LabelSelector>,
    },
    /// It lies in the block and in none of the exceptions.
    Block { cidr: IpNet, except: Vec<IpNet> },
    /// It is a pod's that declares this named port with this number.
    Port { name: String, protocol: Protocol, number: u16 },
}

/// All facts that some rule in use asks for.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) list: Vec<Fact>,
    index: HashMap<Fact, FactId>,
    /// Named ports that egress rules refer to: each pod that declares one gets a fact of its own.
    named: BTreeSet<(String, Protocol)>,
}

impl Facts {
    fn intern(&mut self, fact: Fact) -> FactId {
        if let Some(id) = self.index.get(&fact) {
            return *id;
        }
        let id = self.list.len() as FactId;
        self.list.push(fact.clone());
        self.index.insert(fact, id);
        id
    }

    /// The fact behind a peer of a policy in namespace `home`.
    pub(super) fn peer(&mut self, home: &str, peer: &Peer) -> FactId {
        self.intern(match peer {
            Peer::Pods { namespace_selector, pod_selector } => Fact::Pods {
                home: namespace_selector.is_none().then(|| home.to_owned()),
                namespaces: namespace_selector.clone(),
                pods: pod_selector.clone(),
            },
            Peer::IpBlock { cidr, except } => {
                Fact::Block { cidr: cidr.trunc(), except: except.iter().map(IpNet::trunc).collect() }
            }
        })
    }

    /// Asks for the facts about a named port, for every pod that declares it.
    pub(super) fn named_port(&mut self, view: &ClusterView, name: &str, protocol: Protocol) {
        if self.named.insert((name.to_owned(), protocol)) {
            for port in view.pods.iter().filter_map(|pod| declared(pod, name, protocol)) {
                self.intern(Fact::Port { name: name.to_owned(), protocol, number: port });
            }
        }
    }

    /// The number that a named port has in an identity with these facts.
    pub(super) fn port_numbers(&self, facts: &FactSet, name: &str, protocol: Protocol) -> Vec<u16> {
        facts
            .iter()
            .filter_map(|id| match self.list.get(*id as usize)? {
                Fact::Port { name: n, protocol: p, number } if n == name && *p == protocol => Some(*number),
                _ => None,
            })
            .collect()
    }
}

/// The number a pod declares for a named port.
pub(super) fn declared(pod: &Pod, name: &str, protocol: Protocol) -> Option<u16> {
    pod.ports.iter().find(|port| port.name == name && port.protocol == protocol).map(|port| port.number)
}

/// Pod facts, sorted by the namespaces they can match in, so that a pod is only asked what could be true of it.
pub(super) struct PodFacts<'a> {
    by_namespace: HashMap<&'a str, Vec<(FactId, Option<&'a LabelSelector>)>>,
    named: HashMap<(&'a str, Protocol, u16), FactId>,
}

impl<'a> PodFacts<'a> {
    pub(super) fn new(view: &'a ClusterView, facts: &'a Facts) -> Self {
        let mut by_namespace: HashMap<&str, Vec<_>> = HashMap::new();
        let mut named = HashMap::new();
        for (id, fact) in (0..).zip(&facts.list) {
            match fact {
                Fact::Pods { home: Some(home), pods, .. } => {
                    by_namespace.entry(home).or_default().push((id, pods.as_ref()));
                }
                Fact::Pods { home: None, namespaces, pods } => {
                    for (name, labels) in &view.namespaces {
                        if namespaces.as_ref().is_some_and(|selector| selector.matches(labels)) {
                            by_namespace.entry(name).or_default().push((id, pods.as_ref()));
                        }
                    }
                }
                Fact::Port { name, protocol, number } => {
                    named.insert((name.as_str(), *protocol, *number), id);
                }
                Fact::Block { .. } => {}
            }
        }
        Self { by_namespace, named }
    }

    /// The facts that hold for a pod by its labels and ports.
    pub(super) fn of(&self, pod: &Pod) -> FactSet {
        let by_labels = self
            .by_namespace
            .get(pod.namespace.as_str())
            .into_iter()
            .flatten()
            .filter(|(_, selector)| selector.is_none_or(|selector| selector.matches(&pod.labels)))
            .map(|(id, _)| *id);
        let by_port = pod.ports.iter().filter_map(|port| {
            // The first declaration of a name counts, as everywhere.
            let number = declared(pod, &port.name, port.protocol)?;
            self.named.get(&(port.name.as_str(), port.protocol, number)).copied()
        });
        by_labels.chain(by_port).collect()
    }
}

/// Block facts, by the boundaries of the blocks and their exceptions: between two boundaries nothing changes.
pub(super) struct BlockFacts {
    boundaries: HashMap<IpNet, FactSet>,
    /// Prefix lengths in use, longest first, by family (IPv4, IPv6).
    lengths: [Vec<u8>; 2],
}

impl BlockFacts {
    pub(super) fn new(facts: &Facts) -> Self {
        let blocks: Vec<_> = (0..)
            .zip(&facts.list)
            .filter_map(|(id, fact)| match fact {
                Fact::Block { cidr, except } => Some((id, cidr, except)),
                _ => None,
            })
            .collect();
        let edges: BTreeSet<IpNet> =
            blocks.iter().flat_map(|(_, cidr, except)| except.iter().chain([*cidr])).copied().collect();
        let mut lengths = [BTreeSet::new(), BTreeSet::new()];
        let boundaries = edges
            .into_iter()
            .map(|edge| {
                if let Some(lengths) = lengths.get_mut(family(edge.addr())) {
                    lengths.insert(edge.prefix_len());
                }
                let holds = blocks
                    .iter()
                    .filter(|(_, cidr, except)| {
                        cidr.contains(&edge) && !except.iter().any(|except| except.contains(&edge))
                    })
                    .map(|(id, _, _)| *id)
                    .collect();
                (edge, holds)
            })
            .collect();
        Self { boundaries, lengths: lengths.map(|lengths| lengths.into_iter().rev().collect()) }
    }

    /// Every boundary with the facts that hold from there on.
    pub(super) fn boundaries(&self) -> impl Iterator<Item = (&IpNet, &FactSet)> {
        self.boundaries.iter()
    }

    /// The facts that hold for an address by the blocks around it.
    pub(super) fn of(&self, ip: IpAddr) -> Option<&FactSet> {
        self.lengths
            .get(family(ip))?
            .iter()
            .find_map(|length| self.boundaries.get(&IpNet::new(ip, *length).ok()?.trunc()))
    }
}

fn family(ip: IpAddr) -> usize {
    usize::from(ip.is_ipv6())
}
