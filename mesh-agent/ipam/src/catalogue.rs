//! The pools and reservations that were checked, and which of them a pod's addresses may come from.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::status::Issue;
use serde_json::Value;

use crate::block::MAX_HOST_BITS;
use crate::object::{IpPoolSpec, IpReservationSpec};
use crate::range::{Family, overlap, prefix};
use crate::selector::{LabelSelector, Labels, is_subdomain};

/// Prefix length of blocks unless a pool says another.
const BLOCK_SIZE: [u8; 2] = [26, 122];

/// A custom resource as the API server or a manifest has it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Object {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.creationTimestamp` in seconds since 1970; 0 where there is none.
    pub created: i64,
    /// `spec`.
    pub spec: Value,
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// The object's name.
    pub name: String,
    /// Its range.
    pub cidr: IpNet,
    /// Prefix length of a new block.
    pub block_size: u8,
    /// Which nodes take blocks of it.
    pub node_selector: LabelSelector,
    /// Which namespaces' pods get addresses of it.
    pub namespace_selector: LabelSelector,
    /// Nothing more is given out.
    pub disabled: bool,
    /// Whether single addresses of other nodes' blocks may be taken.
    pub allow_borrowing: bool,
}

impl Pool {
    /// Its family.
    pub fn family(&self) -> Family {
        Family::of(self.cidr.addr())
    }

    /// Whether any namespace's pods may use it, so that addresses may be kept ready without knowing for whom.
    pub fn is_general(&self) -> bool {
        self.namespace_selector == LabelSelector::default()
    }

    /// Whether `ip` is the pool's network or IPv4 broadcast address. A prefix of one or two addresses has
    /// neither (RFC 3021). Blocks have no such edges: they are no networks.
    fn is_edge(&self, ip: IpAddr) -> bool {
        let wide = self.cidr.prefix_len() + 1 < self.cidr.max_prefix_len();
        wide && (ip == self.cidr.network() || (ip.is_ipv4() && ip == self.cidr.broadcast()))
    }
}

/// Everything the operator said about pod addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Catalogue {
    /// The pools, by name; no two overlap.
    pub pools: Vec<Pool>,
    /// What no pod gets.
    pub reserved: Vec<IpNet>,
}

/// Which pools and addresses a pod asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ask {
    /// Labels of the pod's namespace.
    pub namespace_labels: Labels,
    /// Pools by name or prefix for IPv4, in order of preference; empty for any.
    pub ipv4_pools: Vec<String>,
    /// The same for IPv6.
    pub ipv6_pools: Vec<String>,
    /// Exactly these addresses; empty for any.
    pub ips: Vec<IpAddr>,
}

/// A wish that no pool can fulfil, whatever is free.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is nothing for this node and namespace.
    #[error("no enabled IPPool selects this node and the pod's namespace")]
    NoPool,
    /// An annotation names what is not there.
    #[error("IPPool {0} does not exist, is invalid, or is not of {1}")]
    UnknownPool(String, Family),
    /// An annotation names a pool out of which nothing more is given.
    #[error("IPPool {0} is disabled")]
    Disabled(String),
    /// An annotation names another namespace's pool.
    #[error("IPPool {0} is not for the pod's namespace")]
    NotForNamespace(String),
    /// An exact address outside every pool.
    #[error("address {0} is in no IPPool")]
    NotInPool(IpAddr),
    /// An exact address that no pod gets.
    #[error("address {0} is reserved, or the first or last of its pool")]
    Reserved(IpAddr),
    /// Two exact addresses of one family; Kubernetes knows one of each.
    #[error("more than one address of a family: {0} and {1}")]
    TwoOfFamily(IpAddr, IpAddr),
}

impl Catalogue {
    /// Reads the objects. What is wrong with one is an issue and stops no other. Of two pools that overlap
    /// the older stays.
    pub fn read(pools: &[Object], reservations: &[Object]) -> (Self, Vec<Issue>) {
        let mut issues = Vec::new();
        let mut catalogue = Self::default();
        let mut pools: Vec<&Object> = pools.iter().collect();
        pools.sort_by_key(|object| (object.created, &object.name));
        for object in pools {
            match read_pool(object, &catalogue.pools) {
                Ok(pool) => catalogue.pools.push(pool),
                Err(wrong) => issues.extend(wrong.into_iter().map(|w| issue("IPPool", &object.name, w))),
            }
        }
        catalogue.pools.sort_by(|a, b| a.name.cmp(&b.name));
        for object in reservations {
            let mut wrong = Vec::new();
            match serde_json::from_value::<IpReservationSpec>(object.spec.clone()) {
                Err(error) => wrong.push(("spec".to_owned(), error.to_string())),
                Ok(spec) => {
                    for (index, text) in spec.reserved_cidrs.iter().enumerate() {
                        match prefix(text) {
                            Ok(net) => catalogue.reserved.push(net),
                            Err(message) => wrong.push((format!("spec.reservedCIDRs[{index}]"), message)),
                        }
                    }
                }
            }
            issues.extend(wrong.into_iter().map(|w| issue("IPReservation", &object.name, w)));
        }
        (catalogue, issues)
    }

    /// The pool that `ip` is in.
    pub fn pool_of(&self, ip: IpAddr) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.cidr.contains(&ip))
    }

    /// Whether a pod may have `ip`, as far as reservations and the pool's edges go.
    pub fn is_usable(&self, ip: IpAddr) -> bool {
        !self.reserved.iter().any(|net| net.contains(&ip)) && self.pool_of(ip).is_some_and(|p| !p.is_edge(ip))
    }

    /// Where addresses of `family` may come from, the preferred first. `None`: the pod gets none of it.
    pub fn candidates(
        &self,
        family: Family,
        node: &Labels,
        ask: &Ask,
    ) -> Result<Option<Vec<&Pool>>, Refusal> {
        let named = match family {
            Family::V4 => &ask.ipv4_pools,
            Family::V6 => &ask.ipv6_pools,
        };
        if named.is_empty() {
            let fits = |pool: &&Pool| {
                pool.family() == family
                    && !pool.disabled
                    && pool.node_selector.matches(node)
                    && pool.namespace_selector.matches(&ask.namespace_labels)
            };
            let pools: Vec<&Pool> = self.pools.iter().filter(fits).collect();
            return Ok((!pools.is_empty()).then_some(pools));
        }
        let mut pools = Vec::new();
        for text in named {
            let cidr = text.parse::<IpNet>().ok();
            let known = self
                .pools
                .iter()
                .find(|pool| pool.family() == family && (pool.name == *text || Some(pool.cidr) == cidr));
            let pool = known.ok_or_else(|| Refusal::UnknownPool(text.clone(), family))?;
            if pool.disabled {
                return Err(Refusal::Disabled(pool.name.clone()));
            }
            // A pod may choose among what its namespace may have, not more.
            if !pool.namespace_selector.matches(&ask.namespace_labels) {
                return Err(Refusal::NotForNamespace(pool.name.clone()));
            }
            pools.push(pool);
        }
        Ok(Some(pools))
    }

    /// Checks exact addresses, as far as pools go.
    pub fn check_exact(&self, ask: &Ask) -> Result<(), Refusal> {
        for (at, ip) in ask.ips.iter().enumerate() {
            if let Some(other) = ask.ips[..at].iter().find(|other| other.is_ipv4() == ip.is_ipv4()) {
                return Err(Refusal::TwoOfFamily(*other, *ip));
            }
            let pool = self.pool_of(*ip).ok_or(Refusal::NotInPool(*ip))?;
            if pool.disabled {
                return Err(Refusal::Disabled(pool.name.clone()));
            }
            if !pool.namespace_selector.matches(&ask.namespace_labels) {
                return Err(Refusal::NotForNamespace(pool.name.clone()));
            }
            if !self.is_usable(*ip) {
                return Err(Refusal::Reserved(*ip));
            }
        }
        Ok(())
    }
}

type Wrong = (String, String);

fn issue(kind: &str, name: &str, (field, message): Wrong) -> Issue {
    let reason = if message.contains(OVERLAPS) { "PoolOverlap" } else { "InvalidField" };
    Issue { object: format!("{kind}/{name}"), field, reason: reason.to_owned(), message }
}

const OVERLAPS: &str = " overlaps IPPool ";

fn read_pool(object: &Object, others: &[Pool]) -> Result<Pool, Vec<Wrong>> {
    let spec: IpPoolSpec = serde_json::from_value(object.spec.clone())
        .map_err(|error| vec![("spec".to_owned(), error.to_string())])?;
    let mut wrong = Vec::new();
    if !is_subdomain(&object.name) {
        wrong.push(("metadata.name".to_owned(), format!("{:?} is not a DNS subdomain", object.name)));
    }
    wrong.extend(spec.node_selector.check("spec.nodeSelector"));
    wrong.extend(spec.namespace_selector.check("spec.namespaceSelector"));
    let cidr = prefix(&spec.cidr).map_err(|message| {
        wrong.push(("spec.cidr".to_owned(), message));
        wrong.clone()
    })?;
    let ip = cidr.addr();
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if cidr.prefix_len() == 0 || ip.is_loopback() || ip.is_multicast() || ip.is_unspecified() || link_local {
        wrong.push(("spec.cidr".to_owned(), format!("{cidr} cannot be a range of pods")));
    }
    if let Some(other) = others.iter().find(|other| overlap(&other.cidr, &cidr)) {
        let message = format!("{cidr}{OVERLAPS}{} ({})", other.name, other.cidr);
        wrong.push(("spec.cidr".to_owned(), message));
    }
    let [v4, v6] = BLOCK_SIZE;
    let usual = if ip.is_ipv4() { v4 } else { v6 };
    // A pool smaller than a usual block is one block.
    let block_size = spec.block_size.unwrap_or(usual.max(cidr.prefix_len()));
    let bounds = cidr.max_prefix_len() - MAX_HOST_BITS..=cidr.max_prefix_len();
    if !bounds.contains(&block_size) {
        let message = format!("{block_size} is not in {}-{}", bounds.start(), bounds.end());
        wrong.push(("spec.blockSize".to_owned(), message));
    } else if block_size < cidr.prefix_len() {
        let message = format!("a block of /{block_size} is larger than the pool {cidr}");
        wrong.push(("spec.blockSize".to_owned(), message));
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    Ok(Pool {
        name: object.name.clone(),
        cidr,
        block_size,
        node_selector: spec.node_selector,
        namespace_selector: spec.namespace_selector,
        disabled: spec.disabled,
        allow_borrowing: spec.allow_borrowing,
    })
}

#[cfg(test)]
mod tests;
