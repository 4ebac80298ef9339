//! The regular round: what the blocks say and what this node knows are made one; free addresses are topped up
//! or given back; the node is confirmed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use mesh_api::status::Issue;

use crate::block::Block;
use crate::error::IpamError;
use crate::holdings::Ledger;
use crate::node::{Local, NodeAllocator, Site, general};
use crate::object::Allocation;
use crate::range::Family;
use crate::store::{Scope, Store, StoreError, Stored};

/// Reason of the issue for an address that is used here and is another node's.
pub const TWICE: &str = "IpamAddressTwice";
/// Reason of the issue for a family of which too few addresses could be kept ready.
pub const EXHAUSTED: &str = "IpamPoolsExhausted";

/// A confirmation is written to disk again after this part of the trust.
const SAVED_EACH: u32 = 8;

/// What a block should be, and what follows from it.
#[derive(Debug)]
struct Settled {
    block: Block,
    /// Ours by the block and not yet by the holdings.
    adopt: Vec<IpAddr>,
    /// Ours by the holdings and not by the block.
    lost: Vec<IpAddr>,
    /// In use here, and another's.
    twice: Vec<(IpAddr, Allocation)>,
}

impl<L: Ledger> NodeAllocator<L> {
    /// One round, at the time `now` of the clock that counts from boot. Run it every minute, after changes, and
    /// whenever few addresses are ready. Pools and the own Node must have been read once. The issues are for
    /// status; after an error the next round goes on where this one stopped.
    pub async fn maintain<S: Store>(
        &mut self,
        store: &S,
        now: Duration,
        site: &Site<'_>,
        local: &Local<'_>,
    ) -> Result<Vec<Issue>, IpamError> {
        // Out of trust, or a Node made anew: others may have taken us for gone, and be about to free what is
        // ours. Every block is written, so that whatever they decided meets a changed object.
        let renew = !self.is_trusted(now) || site.node_uid.is_some_and(|uid| uid != self.holdings.node_uid);
        let surplus = self.surplus(site, local);
        let listing = store.list(Scope::Node(&self.identity.node)).await?;
        let mut issues = listing.issues;
        let mut seen: BTreeMap<IpNet, Option<Stored>> =
            listing.blocks.into_iter().map(|stored| (stored.block.cidr, Some(stored))).collect();
        self.affine = seen.keys().copied().collect();
        let borrowed: BTreeSet<IpNet> = self.holdings.addresses.values().copied().collect();
        for cidr in borrowed {
            if seen.contains_key(&cidr) {
                continue;
            }
            let stored = match store.get(cidr).await {
                Ok(stored) => Some(stored),
                Err(StoreError::NotFound) => None,
                // Nobody writes what nobody understands, so what is in use there is safe; no more is given.
                Err(StoreError::Unreadable(issue)) => {
                    if !issues.contains(&issue) {
                        issues.push(*issue);
                    }
                    None
                }
                Err(error) => return Err(error.into()),
            };
            seen.insert(cidr, stored);
        }
        for (cidr, stored) in seen {
            match stored {
                Some(stored) => {
                    self.settle_block(store, site, local, stored, &surplus, renew, &mut issues).await?
                }
                None => self.renounce_block(cidr)?,
            }
        }
        self.regain(store, site, local, &mut issues).await?;
        if let Some(uid) = site.node_uid {
            self.confirm(now, uid)?;
            self.top_up(store, site, local, &mut issues).await?;
        }
        Ok(issues)
    }

    /// What is used here and in no block that we know: its block was deleted, or the holdings were lost.
    async fn regain<S: Store>(
        &mut self,
        store: &S,
        site: &Site<'_>,
        local: &Local<'_>,
        issues: &mut Vec<Issue>,
    ) -> Result<(), IpamError> {
        let missing = |(ip, _): &(&IpAddr, _)| {
            !self.holdings.addresses.contains_key(*ip) && site.catalogue.pool_of(**ip).is_some()
        };
        let missing: Vec<_> = local.leases.iter().filter(missing).collect();
        for (ip, handle) in missing {
            match self.gain_exact(store, site, *ip, local, Some(handle)).await {
                Ok(()) => {}
                // Said above, of the block.
                Err(IpamError::Store(StoreError::Unreadable(issue))) => {
                    if !issues.contains(&issue) {
                        issues.push(*issue);
                    }
                }
                Err(IpamError::InUse(ip, whose)) => {
                    let issue = twice(ip, &format!("{handle} here has it, and so has {whose}"));
                    if !issues.contains(&issue) && !issues.iter().any(|old| old.object == issue.object) {
                        issues.push(issue);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn top_up<S: Store>(
        &mut self,
        store: &S,
        site: &Site<'_>,
        local: &Local<'_>,
        issues: &mut Vec<Issue>,
    ) -> Result<(), IpamError> {
        for family in Family::ALL {
            let pools = general(site, family);
            let ready = self.ready(family, site, local);
            if pools.is_empty() || ready >= self.settings.low {
                continue;
            }
            let wanted = self.settings.high.saturating_sub(ready);
            let got = self.gain(store, site, &pools, wanted, false, local).await?;
            if ready + got < self.settings.low {
                issues.push(Issue {
                    object: pools.iter().map(|p| format!("IPPool/{}", p.name)).collect::<Vec<_>>().join(", "),
                    field: "spec.cidr".to_owned(),
                    reason: EXHAUSTED.to_owned(),
                    message: format!(
                        "{} {family} addresses are ready on this node, and there is no place for another block",
                        ready + got
                    ),
                });
            }
        }
        Ok(())
    }

    /// Sets one block right, giving back what is in `surplus`.
    #[allow(clippy::too_many_arguments)]
    async fn settle_block<S: Store>(
        &mut self,
        store: &S,
        site: &Site<'_>,
        local: &Local<'_>,
        mut stored: Stored,
        surplus: &BTreeSet<IpAddr>,
        renew: bool,
        issues: &mut Vec<Issue>,
    ) -> Result<(), IpamError> {
        for _ in 0..self.settings.attempts {
            let cidr = stored.block.cidr;
            let settled = self.settle(&stored.block, local, surplus, renew);
            let going = settled.lost.iter().chain(surplus.iter().filter(|ip| cidr.contains(*ip)));
            let going: Vec<IpAddr> = going.copied().collect();
            let mut written = Ok(());
            if settled.block.allocations.is_empty() && self.is_superfluous(&settled.block, site) {
                self.renounce(&going)?;
                written = store.delete(cidr, &stored.version).await;
                if written.is_ok() {
                    self.affine.remove(&cidr);
                }
            } else {
                self.renounce(&going)?;
                if settled.block != stored.block {
                    written = store.update(&settled.block, &stored.version).await.map(drop);
                }
            }
            match written {
                Ok(()) => {
                    if !settled.adopt.is_empty() {
                        self.keep(store, cidr, &settled.adopt).await?;
                    }
                    issues.extend(settled.twice.iter().map(|(ip, entry)| {
                        let here = self.handle(*ip, local).map(|h| h.to_string()).unwrap_or_default();
                        twice(*ip, &format!("{here} here has it, and so has node {}", entry.node))
                    }));
                    return Ok(());
                }
                Err(StoreError::Conflict) => {}
                Err(StoreError::NotFound) => return self.renounce_block(cidr),
                Err(StoreError::Refused(message)) => {
                    issues.push(refused(&settled.block, message));
                    // What was read is certain, unless it had to be written to be so.
                    return if renew { self.renounce_block(cidr) } else { Ok(()) };
                }
                Err(error) => return Err(error.into()),
            }
            stored = match store.get(cidr).await {
                Ok(stored) => stored,
                Err(StoreError::NotFound | StoreError::Unreadable(_)) => return self.renounce_block(cidr),
                Err(error) => return Err(error.into()),
            };
        }
        Err(IpamError::Contended)
    }

    fn renounce_block(&mut self, cidr: IpNet) -> Result<(), IpamError> {
        let ours = self.holdings.addresses.iter().filter(|(_, block)| **block == cidr);
        let ours: Vec<IpAddr> = ours.map(|(ip, _)| *ip).collect();
        self.renounce(&ours)
    }

    fn settle(&self, block: &Block, local: &Local<'_>, surplus: &BTreeSet<IpAddr>, renew: bool) -> Settled {
        let mut out =
            Settled { block: block.clone(), adopt: Vec::new(), lost: Vec::new(), twice: Vec::new() };
        let here = |ip: &&IpAddr| block.cidr.contains(*ip);
        let known = block.allocations.keys().chain(self.holdings.addresses.keys()).chain(local.leases.keys());
        let known: BTreeSet<IpAddr> = known.filter(here).copied().collect();
        for ip in known {
            let held = self.holdings.addresses.contains_key(&ip);
            let handle = self.handle(ip, local);
            match block.allocations.get(&ip) {
                Some(entry) if !self.is_own(entry) => {
                    if held {
                        out.lost.push(ip);
                    }
                    if handle.is_some() {
                        out.twice.push((ip, entry.clone()));
                    }
                }
                Some(_) if surplus.contains(&ip) => {
                    out.block.allocations.remove(&ip);
                }
                Some(_) => {
                    out.block.allocations.insert(ip, self.entry(handle));
                    if !held {
                        out.adopt.push(ip);
                    }
                }
                // In use here: it is taken again, since nobody else has it. Until that is done it is not ours.
                None if handle.is_some() => {
                    out.block.allocations.insert(ip, self.entry(handle));
                    out.adopt.push(ip);
                    if held {
                        out.lost.push(ip);
                    }
                }
                None if held => out.lost.push(ip),
                None => {}
            }
        }
        let ours = |block: &Block| block.allocations.values().any(|entry| self.is_own(entry));
        // What is adopted without having been asked for just now may be on its way out: a write of ours of before whose
        // answer never came. Written again, the object is another one to it.
        if (renew && (ours(block) || ours(&out.block))) || !out.adopt.is_empty() {
            out.block.renewals = block.renewals.wrapping_add(1);
        }
        out
    }

    /// An empty block that is nobody's, or is this node's and none of it is about to be needed: others keep enough
    /// ready.
    fn is_superfluous(&self, block: &Block, site: &Site<'_>) -> bool {
        if block.affinity.is_none() {
            return true;
        }
        let served = general(site, block.family()).iter().any(|pool| pool.cidr.contains(&block.cidr));
        let elsewhere = self.holdings.addresses.iter().any(|(ip, other)| {
            Family::of(*ip) == block.family() && *other != block.cidr && self.affine.contains(other)
        });
        block.affinity.as_ref() == Some(&self.identity.node) && (elsewhere || !served)
    }

    /// What is to be given back: what no pod here may get any more, and of the rest, pool by pool that is for
    /// some namespaces and family by family for the others, what is above the high-water mark.
    fn surplus(&self, site: &Site<'_>, local: &Local<'_>) -> BTreeSet<IpAddr> {
        let mut used: BTreeMap<IpNet, usize> = BTreeMap::new();
        for (ip, block) in &self.holdings.addresses {
            *used.entry(*block).or_default() += usize::from(self.handle(*ip, local).is_some());
        }
        let mut groups: BTreeMap<(Family, &str), Vec<(IpAddr, IpNet)>> = BTreeMap::new();
        let mut out = BTreeSet::new();
        for (ip, block) in &self.holdings.addresses {
            // What is blocked may be an interface's that nobody remembers.
            if self.handle(*ip, local).is_some() || local.blocked.contains(ip) {
                continue;
            }
            let pool = site.catalogue.pool_of(*ip).filter(|pool| !pool.disabled);
            match pool.filter(|pool| pool.node_selector.matches(site.labels) && site.catalogue.is_usable(*ip))
            {
                None => {
                    out.insert(*ip);
                }
                Some(pool) => {
                    let name = if pool.is_general() { "" } else { pool.name.as_str() };
                    groups.entry((pool.family(), name)).or_default().push((*ip, *block));
                }
            }
        }
        for mut spare in groups.into_values() {
            spare.sort_by_key(|(ip, block)| {
                let used = used.get(block).copied().unwrap_or_default();
                (!self.affine.contains(block), Reverse(used), *block, *ip)
            });
            out.extend(spare.into_iter().skip(self.settings.high).map(|(ip, _)| ip));
        }
        out
    }

    fn confirm(&mut self, now: Duration, uid: &str) -> Result<(), IpamError> {
        let mut holdings = self.holdings.clone();
        holdings.node_uid = uid.to_owned();
        let fresh = |at: Duration| now.saturating_sub(at) < self.settings.trust / SAVED_EACH;
        if holdings == self.holdings && holdings.confirmed.is_some_and(fresh) {
            return Ok(());
        }
        holdings.confirmed = Some(now);
        self.save(holdings)
    }
}

fn refused(block: &Block, message: String) -> Issue {
    Issue {
        object: format!("IPBlock/{}", block.name()),
        field: "spec".to_owned(),
        reason: "IpamWriteRefused".to_owned(),
        message,
    }
}

fn twice(ip: IpAddr, message: &str) -> Issue {
    Issue {
        object: format!("address {ip}"),
        field: String::new(),
        reason: TWICE.to_owned(),
        message: message.to_owned(),
    }
}
