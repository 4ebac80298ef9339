//! One node's allocator: what it gives without asking, and what it knows of its own.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::catalogue::{Ask, Catalogue, Pool};
use crate::error::IpamError;
use crate::holdings::{Holdings, Identity, Ledger};
use crate::object::{Allocation, Handle};
use crate::range::Family;
use crate::selector::Labels;
use crate::store::Store;

/// How an allocator behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Fewer free addresses of a family than this are topped up, ahead of need.
    pub low: usize,
    /// Topped up to this many; more are given back.
    pub high: usize,
    /// Tries of one compare-and-swap before giving up for now.
    pub attempts: usize,
    /// For how long a node gives addresses without having been confirmed. The grace that others allow a gone
    /// node ([`crate::collect::Grace::gone`]) must be longer.
    pub trust: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { low: 8, high: 16, attempts: 8, trust: Duration::from_secs(3600) }
    }
}

/// What the cluster says of this node and its pools. It must have been read once before anybody allocates.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// Pools and reservations.
    pub catalogue: &'a Catalogue,
    /// The Node's labels.
    pub labels: &'a Labels,
    /// The Node's uid; `None` while there is no such Node.
    pub node_uid: Option<&'a str>,
}

/// What this node itself knows of addresses.
#[derive(Debug, Clone, Copy)]
pub struct Local<'a> {
    /// What the journal says was given, and to whom. An interface without a lease counts too, with whatever
    /// is known of it: its addresses are in use.
    pub leases: &'a BTreeMap<IpAddr, Handle>,
    /// What must not be given for another reason: a pod elsewhere says it has it, it is a node's.
    pub blocked: &'a BTreeSet<IpAddr>,
    /// Addresses given back, the longest free first; they are given last.
    pub freed: &'a [IpAddr],
}

impl Local<'_> {
    pub(crate) fn is_taken(&self, ip: IpAddr) -> bool {
        self.leases.contains_key(&ip) || self.blocked.contains(&ip)
    }
}

/// What [`NodeAllocator::pick`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Picked {
    /// All the pod needs: one address of each family, or exactly those asked for.
    Ready(Vec<IpAddr>),
    /// This is not there yet.
    Short(Vec<Want>),
}

/// Something to get from the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Any address for the pod.
    Any(Family),
    /// This one.
    Exact(IpAddr),
}

/// The allocator of one node. It is one task's: from [`Self::pick`] or [`Self::demand`] until the journal has
/// the lease, nobody else may call it.
#[derive(Debug)]
pub struct NodeAllocator<L> {
    pub(crate) identity: Identity,
    pub(crate) settings: Settings,
    pub(crate) holdings: Holdings,
    pub(crate) ledger: L,
    /// The blocks that are affine to this node, as last seen; only the order of preference depends on it.
    pub(crate) affine: BTreeSet<IpNet>,
}

impl<L: Ledger> NodeAllocator<L> {
    /// With the holdings found on disk. After a boot they are worth nothing until they are confirmed: the
    /// machine may have been off for long.
    pub fn new(
        identity: Identity,
        boot: &str,
        mut holdings: Holdings,
        ledger: L,
        settings: Settings,
    ) -> Self {
        if holdings.boot != boot {
            holdings.boot = boot.to_owned();
            holdings.confirmed = None;
        }
        Self { identity, settings, holdings, ledger, affine: BTreeSet::new() }
    }

    /// Behaves like this from now on.
    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Who we are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The blocks that are this node's, as last seen: what its peers route to it as a whole. Of what it holds
    /// besides, every address is an exception of its own.
    pub fn affine(&self) -> impl Iterator<Item = IpNet> {
        self.affine.iter().copied()
    }

    /// What is this node's.
    pub fn holdings(&self) -> &Holdings {
        &self.holdings
    }

    /// Whether addresses may be given now: the last confirmation is young enough, `now` by the clock that
    /// counts from boot.
    pub fn is_trusted(&self, now: Duration) -> bool {
        self.holdings.confirmed.is_some_and(|at| now.saturating_sub(at) <= self.settings.trust)
    }

    /// Chooses among what is this node's, without asking anybody. The caller makes the lease durable before
    /// it answers.
    pub fn pick(
        &self,
        now: Duration,
        site: &Site<'_>,
        ask: &Ask,
        local: &Local<'_>,
    ) -> Result<Picked, IpamError> {
        let catalogue = site.catalogue;
        if ask.ips.is_empty() {
            let mut families = 0;
            let (mut ips, mut short) = (Vec::new(), Vec::new());
            for family in Family::ALL {
                let Some(pools) = catalogue.candidates(family, site.labels, ask)? else { continue };
                families += 1;
                match pools.iter().find_map(|pool| self.best(catalogue, pool, local)) {
                    Some(ip) => ips.push(ip),
                    None => short.push(Want::Any(family)),
                }
            }
            if families == 0 {
                return Err(crate::catalogue::Refusal::NoPool.into());
            }
            return self.if_trusted(now, ips, short);
        }
        catalogue.check_exact(ask)?;
        let mut short = Vec::new();
        for ip in &ask.ips {
            if let Some(handle) = local.leases.get(ip) {
                return Err(IpamError::InUse(*ip, handle.to_string()));
            }
            if self.holdings.tunnels.contains(ip) {
                return Err(IpamError::InUse(*ip, Handle::tunnel().to_string()));
            }
            if local.blocked.contains(ip) {
                return Err(IpamError::InUse(*ip, "another pod or node".to_owned()));
            }
            if !self.holdings.addresses.contains_key(ip) {
                short.push(Want::Exact(*ip));
            }
        }
        self.if_trusted(now, ask.ips.clone(), short)
    }

    fn if_trusted(&self, now: Duration, ips: Vec<IpAddr>, short: Vec<Want>) -> Result<Picked, IpamError> {
        if !self.is_trusted(now) {
            return Err(IpamError::Unconfirmed);
        }
        Ok(if short.is_empty() { Picked::Ready(ips) } else { Picked::Short(short) })
    }

    /// Like [`Self::pick`], but gets what is missing: in this node's blocks, in a new one, and only then in
    /// others' blocks.
    pub async fn demand<S: Store>(
        &mut self,
        store: &S,
        now: Duration,
        site: &Site<'_>,
        ask: &Ask,
        local: &Local<'_>,
    ) -> Result<Vec<IpAddr>, IpamError> {
        // What was got can be lost again only to a hand that edits blocks; once more, and that is it.
        for _ in 0..2 {
            let wants = match self.pick(now, site, ask, local)? {
                Picked::Ready(ips) => return Ok(ips),
                Picked::Short(wants) => wants,
            };
            for want in wants {
                match want {
                    Want::Any(family) => {
                        let pools = site.catalogue.candidates(family, site.labels, ask)?.unwrap_or_default();
                        if self.gain(store, site, &pools, 1, true, local).await? == 0 {
                            return Err(IpamError::Exhausted(family));
                        }
                    }
                    Want::Exact(ip) => self.gain_exact(store, site, ip, local, None).await?,
                }
            }
        }
        Err(IpamError::Contended)
    }

    /// The address of this pool to give next: this node's own blocks first, those never used before those
    /// given back.
    fn best(&self, catalogue: &Catalogue, pool: &Pool, local: &Local<'_>) -> Option<IpAddr> {
        let age = |ip: &IpAddr| local.freed.iter().position(|freed| freed == ip);
        self.spare(catalogue, local)
            .filter(|(ip, _)| pool.cidr.contains(ip))
            .min_by_key(|(ip, block)| (age(ip), Reverse(self.affine.contains(block)), *ip))
            .map(|(ip, _)| ip)
    }

    /// This node's addresses that could be given, with their blocks.
    pub(crate) fn spare<'a>(
        &'a self,
        catalogue: &'a Catalogue,
        local: &'a Local<'_>,
    ) -> impl Iterator<Item = (IpAddr, IpNet)> {
        let free = |ip: IpAddr| {
            !local.is_taken(ip) && !self.holdings.tunnels.contains(&ip) && catalogue.is_usable(ip)
        };
        self.holdings.addresses.iter().map(|(ip, block)| (*ip, *block)).filter(move |(ip, _)| free(*ip))
    }

    /// How many addresses of a family could be given at once to a pod of any namespace.
    pub fn ready(&self, family: Family, site: &Site<'_>, local: &Local<'_>) -> usize {
        let pools = general(site, family);
        self.spare(site.catalogue, local).filter(|(ip, _)| pools.iter().any(|p| p.cidr.contains(ip))).count()
    }

    /// The node's own end of the tunnel: the one it has, if its pool still serves it, else one more of its
    /// addresses. `None` while it has none, or is not confirmed.
    pub fn tunnel(
        &mut self,
        now: Duration,
        family: Family,
        site: &Site<'_>,
        local: &Local<'_>,
    ) -> Result<Option<IpAddr>, IpamError> {
        let pools = general(site, family);
        let of_pool = |ip: &IpAddr| pools.iter().any(|pool| pool.cidr.contains(ip));
        let held = |ip: &&IpAddr| self.holdings.addresses.contains_key(ip);
        let own = self.holdings.tunnels.iter().filter(held).find(|ip| of_pool(ip)).copied();
        if own.is_some() || !self.is_trusted(now) {
            return Ok(own);
        }
        let Some(ip) = pools.iter().find_map(|pool| self.best(site.catalogue, pool, local)) else {
            return Ok(None);
        };
        let mut holdings = self.holdings.clone();
        holdings.tunnels.retain(|old| Family::of(*old) != family);
        holdings.tunnels.insert(ip);
        self.save(holdings)?;
        Ok(Some(ip))
    }

    /// What an address is given to, the tunnel included.
    pub(crate) fn handle(&self, ip: IpAddr, local: &Local<'_>) -> Option<Handle> {
        let tunnel = || self.holdings.tunnels.contains(&ip).then(Handle::tunnel);
        local.leases.get(&ip).cloned().or_else(tunnel)
    }

    /// Whether an entry is this machine's.
    pub(crate) fn is_own(&self, entry: &Allocation) -> bool {
        entry.node == self.identity.node && entry.instance == self.identity.instance
    }

    /// An entry of ours.
    pub(crate) fn entry(&self, handle: Option<Handle>) -> Allocation {
        let Identity { node, instance } = self.identity.clone();
        Allocation { node, instance, handle }
    }

    /// These addresses of a block are this node's now: on disk first.
    pub(crate) fn adopt(&mut self, ips: &[IpAddr], block: IpNet) -> Result<(), IpamError> {
        let mut holdings = self.holdings.clone();
        holdings.addresses.extend(ips.iter().map(|ip| (*ip, block)));
        self.save(holdings)
    }

    /// These are no longer: on disk first, and before any write that takes them out of a block.
    pub(crate) fn renounce(&mut self, ips: &[IpAddr]) -> Result<(), IpamError> {
        let mut holdings = self.holdings.clone();
        for ip in ips {
            holdings.addresses.remove(ip);
        }
        // Should the disk refuse, memory at least gives none of them.
        let saved = self.save(holdings.clone());
        self.holdings = holdings;
        saved
    }

    pub(crate) fn save(&mut self, holdings: Holdings) -> Result<(), IpamError> {
        if holdings != self.holdings {
            self.ledger.save(&holdings)?;
            self.holdings = holdings;
        }
        Ok(())
    }
}

/// The pools of a family that serve this node and every namespace.
pub(crate) fn general<'a>(site: &Site<'a>, family: Family) -> Vec<&'a Pool> {
    let fits = |pool: &&Pool| {
        pool.family() == family
            && !pool.disabled
            && pool.is_general()
            && pool.node_selector.matches(site.labels)
    };
    site.catalogue.pools.iter().filter(fits).collect()
}
