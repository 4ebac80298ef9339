//! Policies to compact rules.
//!
//! Three steps, each in a file of its own: what a rule asks of an address becomes a [`facts::Fact`]; addresses with the same
//! facts share an *identity* ([`identities`]); what a *set* of policies says about an identity is a *port table* ([`tables`]).
//! Every id is a hash of what it stands for, so equal things share entries and an entry never changes its meaning.

mod facts;
mod identities;
mod ids;
mod sets;
mod tables;

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_bpf::layout::{
    Addr, Address, Decision, Endpoint, IdentityId, RuleId, ServiceKey, SetId, SetKey, TableId, TableKey,
    WORLD, range,
};

use crate::model::{ClusterView, Direction, LocalEndpoint, PodRef, Ranges, RuleName, ServiceAddress};

/// A prefix of addresses, as a longest-prefix-match key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Prefix {
    /// Bits that count, of 128.
    pub(crate) length: u32,
    /// The address, host bits zero.
    pub(crate) address: Addr,
}

/// A prefix of a port table's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TablePrefix {
    pub(crate) length: u32,
    pub(crate) key: TableKey,
}

/// What the maps are to hold, and the names behind every id in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compiled {
    pub(crate) endpoints: BTreeMap<u32, Endpoint>,
    pub(crate) addresses: BTreeMap<Addr, Address>,
    pub(crate) prefixes: BTreeMap<Prefix, IdentityId>,
    pub(crate) sets: BTreeMap<SetKey, TableId>,
    pub(crate) tables: BTreeMap<TablePrefix, Decision>,
    pub(crate) services: BTreeMap<ServiceKey, u32>,
    pub(crate) ranges: BTreeMap<Prefix, u32>,
    pub(crate) names: Names,
}

/// What ids stand for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) pods: BTreeMap<u32, PodRef>,
    pub(crate) sets: BTreeMap<SetId, Vec<String>>,
    pub(crate) rules: BTreeMap<RuleId, RuleName>,
}

/// How large the compiled state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Local endpoints.
    pub endpoints: usize,
    /// Addresses with an entry of their own.
    pub addresses: usize,
    /// Prefixes of ipBlocks.
    pub prefixes: usize,
    /// Pairs of policy set and identity.
    pub sets: usize,
    /// Entries of port tables.
    pub tables: usize,
}

impl Compiled {
    /// How many entries each map is to hold.
    pub fn size(&self) -> Size {
        Size {
            endpoints: self.endpoints.len(),
            addresses: self.addresses.len(),
            prefixes: self.prefixes.len(),
            sets: self.sets.len(),
            tables: self.tables.len(),
        }
    }

    /// The same where not every way out of the node can be watched: what goes to a Service is then judged by the Service's own
    /// address, which only an ipBlock can name.
    pub fn without_services(mut self) -> Self {
        self.services.clear();
        self
    }

    /// Whether the endpoint is known and not closed.
    pub fn is_open(&self, ifindex: u32) -> bool {
        self.endpoints.get(&ifindex).is_some_and(|endpoint| endpoint.closed == 0)
    }

    /// The policies (`namespace/name`) that isolate an endpoint in a direction.
    pub fn policies(&self, ifindex: u32, direction: Direction) -> &[String] {
        self.endpoints
            .get(&ifindex)
            .map(|endpoint| match direction {
                Direction::Ingress => endpoint.ingress,
                Direction::Egress => endpoint.egress,
            })
            .and_then(|set| self.names.sets.get(&set))
            .map_or(&[], Vec::as_slice)
    }
}

/// Compiles the cluster's policies for this node's endpoints. Pure and total: what is invalid is compiled closed.
pub fn compile(view: &ClusterView, local: &[LocalEndpoint], ranges: &Ranges) -> Compiled {
    let mut compiled = Compiled::default();
    let mut ids = ids::Ids::default();
    let mut facts = facts::Facts::default();

    let sets = sets::Sets::select(view, local, &mut facts, &mut ids, &mut compiled);
    let identities = identities::Identities::assign(view, local, &facts, &mut ids, &mut compiled);
    tables::build(&sets, &identities, &facts, &mut ids, &mut compiled);

    compiled.services = view.services.iter().map(|service| (service_key(service), 1)).collect();
    // Ours is written last: for one prefix that both sides claim, the source counts as forged.
    for (nets, kind) in [(&ranges.remote, range::REMOTE), (&ranges.own, range::OWN)] {
        compiled.ranges.extend(nets.iter().map(|net| (prefix(net), kind)));
    }
    compiled.ranges.entry(IPV4).or_insert(0);
    compiled.prefixes.entry(IPV4).or_insert(WORLD);
    compiled
}

/// All of IPv4. It always has an entry, so that a prefix of IPv6 that happens to contain `::ffff:0:0/96` says nothing of IPv4.
const IPV4: Prefix = Prefix { length: 96, address: Addr::v4([0; 4]) };

fn service_key(service: &ServiceAddress) -> ServiceKey {
    let (protocol, port) = service.port.map_or((0, 0), |(protocol, port)| (protocol.number(), port));
    ServiceKey { address: addr(service.ip), port, protocol, reserved: 0 }
}

/// An address as the maps know it.
pub(crate) fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(ip) => Addr::v4(ip.octets()),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => Addr::v4(ip.octets()),
            None => Addr::v6(ip.octets()),
        },
    }
}

/// An address as people know it.
pub(crate) fn ip(addr: Addr) -> IpAddr {
    let v6 = std::net::Ipv6Addr::from(addr.octets());
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

/// A prefix as the maps know it, host bits masked.
pub(crate) fn prefix(net: &IpNet) -> Prefix {
    let net = net.trunc();
    let length = u32::from(net.prefix_len());
    Prefix {
        length: if matches!(net, IpNet::V4(_)) { 96 + length } else { length },
        address: addr(net.network()),
    }
}
