//! Who has which address on this node, kept so that no crash hands one out twice.
//!
//! Three witnesses must agree before an address is given out: the [`journal`] of what was promised, the
//! kernel's list of live interfaces (each says in its alias which addresses it holds), and the cluster's
//! objects. What one of them has lost, the others still know:
//!
//! * The journal is synced before an ADD answers. A torn last record was never answered and is dropped.
//! * A record damaged anywhere else is an issue: the file is kept aside, the readable records stay, and
//!   interfaces without a record block their addresses. Only while such an interface does not say its
//!   addresses is every ADD refused.
//! * A lease without an interface has no pod: its ADD never ended, or the host rebooted. It is released.

pub mod allocator;
pub mod holdings;
pub mod journal;
pub mod known;
mod lease;
pub mod pools;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use mesh_api::status::Issue;
use nix::fcntl::{Flock, FlockArg};

use allocator::Allocator;
use journal::{Journal, JournalError, Record};
pub use lease::{Ask, Key, Lease, LiveLink, alias, alias_addresses, host_interface, pod_mac};

/// Reason of the issue for an interface without a lease.
pub const STRAY: &str = "IpamStrayInterface";

/// What the cluster says about addresses at the moment of an ADD.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    /// The node's own pod CIDRs: where addresses come from.
    pub cidrs: Vec<IpNet>,
    /// Where an exact address may be.
    pub pools: Vec<IpNet>,
    /// Never a pod's: tunnel, network, broadcast and node addresses of the whole cluster.
    pub reserved: BTreeSet<IpAddr>,
    /// Other pods' addresses, here or elsewhere, by who has them.
    pub taken: BTreeMap<IpAddr, String>,
}

/// Why there is no address.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// Nothing to take addresses from.
    #[error("this node has no pod CIDR (Node.spec.podCIDRs)")]
    NoCidr,
    /// All handed out.
    #[error("no free address left in {0}")]
    Exhausted(IpNet),
    /// An exact address outside every pool.
    #[error("ips: {0} is in no pool of this cluster")]
    NotInPool(IpAddr),
    /// An exact address that belongs to a node or is no host's.
    #[error("ips: {0} is reserved: a node's, a tunnel's, or the first or last of a range")]
    Reserved(IpAddr),
    /// An exact address that is somebody's.
    #[error("ips: {0} is in use by {1}")]
    InUse(IpAddr, String),
    /// Two exact addresses of one family; Kubernetes knows one of each.
    #[error("ips: more than one address of a family: {0} and {1}")]
    TwoOfFamily(IpAddr, IpAddr),
    /// An interface of ours holds addresses that nobody remembers.
    #[error(
        "interface {0} is ours, but neither the journal nor its alias says its addresses; delete it to go on"
    )]
    UnknownInterface(String),
    /// The hash that names interfaces gave the same name twice.
    #[error("interface name {0} is taken by container {1}")]
    NameTaken(String, String),
    /// The disk.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The node's addresses and who has them.
#[derive(Debug)]
pub struct Ipam {
    journal: Journal,
    leases: BTreeMap<Key, Lease>,
    allocator: Allocator,
    /// Interfaces of ours that no lease knows, with their addresses if they say them.
    strays: BTreeMap<String, Option<Vec<IpAddr>>>,
    /// Held as long as we are: two agents must not share a journal.
    _lock: Flock<std::fs::File>,
}

impl Ipam {
    /// Reads the journal in `directory` and sets it right against the links that are there. The issues are
    /// for status; an error means that no address may be handed out.
    pub fn open(directory: &Path, live: &[LiveLink]) -> Result<(Self, Vec<Issue>), JournalError> {
        let lock = lock(directory)?;
        let (journal, replayed) = Journal::open(directory)?;
        let mut issues = Vec::new();
        if let Some(aside) = &replayed.aside {
            let damage: Vec<String> = replayed.damage.iter().map(ToString::to_string).collect();
            issues.push(Issue {
                object: format!("file {}", directory.join(journal::FILE).display()),
                field: String::new(),
                reason: "IpamJournalDamaged".to_owned(),
                message: format!(
                    "{}; the file is kept as {}, addresses are taken from its readable records and the live interfaces",
                    damage.join("; "),
                    aside.display()
                ),
            });
        }
        let allocator = Allocator::new(&replayed.state);
        let leases = replayed.state.leases;
        let mut ipam = Self { journal, leases, allocator, strays: BTreeMap::new(), _lock: lock };
        // A link that is there says best what it has: a damaged journal may know of an earlier lease only.
        let mut wrong = Vec::new();
        for lease in ipam.leases.values() {
            let link = live.iter().find(|link| link.name == lease.host_interface);
            match link.map(|link| &link.addresses) {
                None => wrong.push((lease.key(), None)),
                Some(Some(ips)) if *ips != lease.ips => {
                    wrong.push((lease.key(), Some(Lease { ips: ips.clone(), ..lease.clone() })));
                }
                Some(_) => {}
            }
        }
        for (key, _) in &wrong {
            ipam.release(key)?;
        }
        for lease in wrong.into_iter().filter_map(|(_, right)| right) {
            ipam.insert(lease)?;
        }
        ipam.set_live(live);
        for (name, addresses) in &ipam.strays {
            let known = match addresses {
                Some(addresses) => format!("its addresses {addresses:?} are not handed out"),
                None => "it does not say its addresses, so no ADD is possible until it is deleted".to_owned(),
            };
            issues.push(Issue {
                object: format!("interface {name}"),
                field: String::new(),
                reason: STRAY.to_owned(),
                message: format!("a pod's interface that the IPAM journal does not know: {known}"),
            });
        }
        Ok((ipam, issues))
    }

    /// Compares with the links that are there now: those without a lease block their addresses.
    pub fn set_live(&mut self, live: &[LiveLink]) {
        let known: BTreeSet<&str> = self.leases.values().map(|lease| lease.host_interface.as_str()).collect();
        let strays = live.iter().filter(|link| !known.contains(link.name.as_str()));
        self.strays = strays.map(|link| (link.name.clone(), link.addresses.clone())).collect();
    }

    /// Interfaces that no lease knows.
    pub fn strays(&self) -> impl Iterator<Item = &String> {
        self.strays.keys()
    }

    /// Interfaces that no lease knows, with the addresses they say they have.
    pub fn stray_links(&self) -> impl Iterator<Item = (&String, &[IpAddr])> {
        self.strays.iter().map(|(name, ips)| (name, ips.as_deref().unwrap_or_default()))
    }

    /// Addresses given back, the longest free first.
    pub fn freed(&self) -> impl Iterator<Item = IpAddr> {
        self.allocator.freed()
    }

    /// All leases.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values()
    }

    /// One lease.
    pub fn lease(&self, key: &Key) -> Option<&Lease> {
        self.leases.get(key)
    }

    /// Addresses handed out.
    pub fn used(&self) -> usize {
        self.allocator.used()
    }

    /// Gives what `ask` wants and remembers it on disk before returning. There must be no lease for its key.
    pub fn allocate(&mut self, ask: &Ask, ranges: &Ranges) -> Result<Lease, IpamError> {
        if let Some((name, _)) = self.strays.iter().find(|(_, addresses)| addresses.is_none()) {
            return Err(IpamError::UnknownInterface(name.clone()));
        }
        let key = ask.key();
        let host_interface = host_interface(&key);
        if let Some(other) = self.leases.values().find(|lease| lease.host_interface == host_interface) {
            return Err(IpamError::NameTaken(host_interface, other.container_id.clone()));
        }
        let ips = if ask.ips.is_empty() { self.any(ranges)? } else { self.exactly(&ask.ips, ranges)? };
        let lease = ask.lease(host_interface, pod_mac(&key), ips);
        self.insert(lease.clone())?;
        Ok(lease)
    }

    fn insert(&mut self, lease: Lease) -> Result<(), JournalError> {
        self.journal.append(Record::Lease(lease.clone()))?;
        self.allocator.take(&lease);
        self.leases.insert(lease.key(), lease);
        self.compact_if_worth_it()
    }

    /// Takes the lease back; its addresses are reused last. Nothing is known of it: nothing to do. Call it
    /// only once the interface is gone.
    pub fn release(&mut self, key: &Key) -> Result<Option<Lease>, JournalError> {
        if !self.leases.contains_key(key) {
            return Ok(None);
        }
        self.journal.append(Record::Release(key.clone()))?;
        let lease = self.leases.remove(key);
        if let Some(lease) = &lease {
            self.allocator.free(lease);
        }
        self.compact_if_worth_it()?;
        Ok(lease)
    }

    /// Addresses still free in the node's own ranges; `None` for more than a `u64` counts.
    pub fn free(&self, ranges: &Ranges) -> Option<u64> {
        let mut free = 0u64;
        for cidr in &ranges.cidrs {
            let size = allocator::size(cidr)?;
            let gone = |ip: &&IpAddr| cidr.contains(*ip) && allocator::is_host(cidr, **ip);
            let blocked: BTreeSet<IpAddr> = self
                .allocator
                .addresses()
                .chain(self.stray_addresses())
                .chain(ranges.taken.keys().copied())
                .chain(ranges.reserved.iter().copied())
                .collect();
            free = free.checked_add(size.saturating_sub(blocked.iter().filter(gone).count() as u64))?;
        }
        Some(free)
    }

    fn stray_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.strays.values().flatten().flatten().copied()
    }

    /// One address of each family the node has a range of, from the first range with one left.
    fn any(&self, ranges: &Ranges) -> Result<Vec<IpAddr>, IpamError> {
        let strays: BTreeSet<IpAddr> = self.stray_addresses().collect();
        let blocked = |ip: IpAddr| {
            ranges.reserved.contains(&ip) || ranges.taken.contains_key(&ip) || strays.contains(&ip)
        };
        let mut ips = Vec::new();
        for ipv6 in [false, true] {
            let cidrs: Vec<&IpNet> =
                ranges.cidrs.iter().filter(|cidr| cidr.addr().is_ipv6() == ipv6).collect();
            let Some(last) = cidrs.last() else { continue };
            let found = cidrs.iter().find_map(|cidr| self.allocator.choose(cidr, &blocked));
            ips.push(found.ok_or(IpamError::Exhausted(**last))?);
        }
        if ips.is_empty() { Err(IpamError::NoCidr) } else { Ok(ips) }
    }

    fn exactly(&self, asked: &[IpAddr], ranges: &Ranges) -> Result<Vec<IpAddr>, IpamError> {
        let mut ips: Vec<IpAddr> = Vec::new();
        for ip in asked {
            if let Some(other) = ips.iter().find(|other| other.is_ipv4() == ip.is_ipv4()) {
                return Err(IpamError::TwoOfFamily(*other, *ip));
            }
            let mut pools =
                ranges.pools.iter().chain(&ranges.cidrs).filter(|pool| pool.contains(ip)).peekable();
            if pools.peek().is_none() {
                return Err(IpamError::NotInPool(*ip));
            }
            let edge = |pool: &IpNet| *ip == pool.network() || (ip.is_ipv4() && *ip == pool.broadcast());
            // A prefix of one or two addresses has no edges (RFC 3021).
            let wide = |pool: &IpNet| pool.prefix_len() + 1 < pool.max_prefix_len();
            let unusable = ip.is_multicast() || ip.is_unspecified() || ip.is_loopback();
            if unusable || ranges.reserved.contains(ip) || pools.any(|pool| wide(pool) && edge(pool)) {
                return Err(IpamError::Reserved(*ip));
            }
            if let Some(owner) = self.owner(*ip, ranges) {
                return Err(IpamError::InUse(*ip, owner));
            }
            ips.push(*ip);
        }
        Ok(ips)
    }

    fn owner(&self, ip: IpAddr, ranges: &Ranges) -> Option<String> {
        let leased = self.allocator.owner(ip).and_then(|key| self.leases.get(key));
        let stray = || self.strays.iter().find(|(_, ips)| ips.as_ref().is_some_and(|ips| ips.contains(&ip)));
        leased
            .map(|lease| format!("pod {} (container {})", lease.pod, lease.container_id))
            .or_else(|| stray().map(|(name, _)| format!("interface {name}")))
            .or_else(|| ranges.taken.get(&ip).cloned())
    }

    fn compact_if_worth_it(&mut self) -> Result<(), JournalError> {
        if self.journal.is_long(self.leases.len() + self.allocator.freed().count()) {
            self.journal.rewrite(self.leases.values(), self.allocator.freed())?;
        }
        Ok(())
    }
}

fn lock(directory: &Path) -> Result<Flock<std::fs::File>, JournalError> {
    let path = directory.join("ipam.lock");
    let failed = |source| JournalError::Io { what: "cannot lock", path: path.clone(), source };
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(failed)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| failed(errno.into()))
}

#[cfg(test)]
mod tests;
