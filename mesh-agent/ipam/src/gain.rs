//! Getting addresses by compare-and-swap: in this node's blocks, by making a block, by borrowing.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::block::Block;
use crate::catalogue::Pool;
use crate::error::IpamError;
use crate::holdings::Ledger;
use crate::node::{Local, NodeAllocator, Site};
use crate::object::Handle;
use crate::range::{address, around, overlap, span};
use crate::store::{Scope, Store, StoreError, Stored};

/// Places of a pool looked at for a new block before giving up for now.
const MOST_STEPS: u32 = 65_536;

impl<L: Ledger> NodeAllocator<L> {
    /// Gets up to `count` addresses of `pools`, and says how many.
    pub(crate) async fn gain<S: Store>(
        &mut self,
        store: &S,
        site: &Site<'_>,
        pools: &[&Pool],
        count: usize,
        borrow: bool,
        local: &Local<'_>,
    ) -> Result<usize, IpamError> {
        let mut got = 0;
        let mut contended = false;
        let own = store.list(Scope::Node(&self.identity.node)).await?;
        self.affine = own.blocks.iter().map(|stored| stored.block.cidr).collect();
        for stored in own.blocks {
            if got < count
                && let Some(pool) = pools.iter().find(|pool| pool.cidr.contains(&stored.block.cidr))
            {
                let taken = self.take(store, site, pool, stored, count - got, false, local).await;
                got += or_contended(taken, &mut contended)?;
            }
        }
        for pool in pools {
            if got < count {
                let taken = self.claim(store, site, pool, count - got, local).await;
                got += or_contended(taken, &mut contended)?;
            }
        }
        if borrow && got == 0 {
            let mut all = store.list(Scope::All).await?.blocks;
            // Nobody's first, then those with most left; not all borrowers at the same one.
            all.sort_by_key(|stored| {
                let taken = stored.block.allocations.len();
                let free = (stored.block.size() as usize).saturating_sub(taken);
                (stored.block.affinity.is_some(), std::cmp::Reverse(free), stored.block.cidr)
            });
            for stored in all {
                let own = stored.block.affinity.as_ref() == Some(&self.identity.node);
                let pool = pools.iter().find(|pool| pool.cidr.contains(&stored.block.cidr));
                if got == 0
                    && !own
                    && let Some(pool) = pool
                {
                    let taken = self.take(store, site, pool, stored, 1, true, local).await;
                    got += or_contended(taken, &mut contended)?;
                }
            }
        }
        if got == 0 && contended { Err(IpamError::Contended) } else { Ok(got) }
    }

    /// Takes up to `count` free addresses of a block: another node's only if we `borrow`. One that is nobody's
    /// becomes this node's.
    #[allow(clippy::too_many_arguments)]
    async fn take<S: Store>(
        &mut self,
        store: &S,
        site: &Site<'_>,
        pool: &Pool,
        mut stored: Stored,
        count: usize,
        borrow: bool,
        local: &Local<'_>,
    ) -> Result<usize, IpamError> {
        let usable = |ip: &IpAddr| site.catalogue.is_usable(*ip) && !local.is_taken(*ip);
        for _ in 0..self.settings.attempts {
            let mut block = stored.block.clone();
            let cidr = block.cidr;
            let own = block.affinity.as_ref() == Some(&self.identity.node);
            if !own && block.affinity.is_some() && !(borrow && pool.allow_borrowing) {
                return Ok(0);
            }
            // Left over from a write whose answer was lost: ours already.
            let left = block.allocations.iter().filter(|(ip, entry)| {
                self.is_own(entry) && !self.holdings.addresses.contains_key(*ip) && usable(ip)
            });
            let mut ips: Vec<IpAddr> = left.map(|(ip, _)| *ip).take(count).collect();
            let fresh: Vec<IpAddr> = block.free().filter(usable).take(count - ips.len()).collect();
            if ips.is_empty() && fresh.is_empty() {
                return Ok(0);
            }
            block.allocations.extend(fresh.iter().map(|ip| (*ip, self.entry(None))));
            if !ips.is_empty() {
                // A late write of ours may still be about to take them out: let it meet a changed object.
                block.renewals = block.renewals.wrapping_add(1);
            }
            if block.affinity.is_none() && pool.node_selector.matches(site.labels) {
                block.affinity = Some(self.identity.node.clone());
            }
            if block != stored.block {
                match store.update(&block, &stored.version).await {
                    Ok(_) => {}
                    Err(StoreError::Conflict) => {
                        match store.get(cidr).await {
                            Ok(now) => stored = now,
                            Err(StoreError::NotFound | StoreError::Unreadable(_)) => return Ok(0),
                            Err(error) => return Err(error.into()),
                        }
                        continue;
                    }
                    Err(StoreError::NotFound) => return Ok(0),
                    Err(error) => return Err(error.into()),
                }
            }
            ips.extend(fresh);
            return self.keep(store, cidr, &ips).await;
        }
        Err(IpamError::Contended)
    }

    /// Makes a block of `pool` with up to `count` addresses kept ready. 0 when there is no place for one.
    async fn claim<S: Store>(
        &mut self,
        store: &S,
        site: &Site<'_>,
        pool: &Pool,
        count: usize,
        local: &Local<'_>,
    ) -> Result<usize, IpamError> {
        let mut taken: Vec<IpNet> = store.prefixes().await?;
        taken.extend(site.catalogue.reserved.iter().filter(|net| net.prefix_len() <= pool.block_size));
        let places = Places::new(pool, &self.identity.node, &taken);
        let mut attempts = self.settings.attempts;
        for cidr in places {
            let mut block = Block::new(cidr, Some(self.identity.node.clone()));
            let usable = |ip: &IpAddr| site.catalogue.is_usable(*ip) && !local.is_taken(*ip);
            let ips: Vec<IpAddr> = block.addresses().filter(usable).take(count).collect();
            if ips.is_empty() {
                continue;
            }
            block.allocations.extend(ips.iter().map(|ip| (*ip, self.entry(None))));
            match store.create(&block).await {
                Ok(_) => {
                    let kept = self.keep(store, cidr, &ips).await?;
                    if kept > 0 {
                        self.affine.insert(cidr);
                        return Ok(kept);
                    }
                }
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
            attempts = attempts.saturating_sub(1);
            if attempts == 0 {
                return Err(IpamError::Contended);
            }
        }
        Ok(0)
    }

    /// Gets exactly `ip`. With a `lease` it is in use here already, so neither its pool's state nor a refusal
    /// to lend matters.
    pub(crate) async fn gain_exact<S: Store>(
        &mut self,
        store: &S,
        site: &Site<'_>,
        ip: IpAddr,
        local: &Local<'_>,
        lease: Option<&Handle>,
    ) -> Result<(), IpamError> {
        let Some(pool) = site.catalogue.pool_of(ip) else {
            return Err(crate::catalogue::Refusal::NotInPool(ip).into());
        };
        if lease.is_none() && local.is_taken(ip) {
            return Err(IpamError::InUse(ip, "another pod or node".to_owned()));
        }
        let serves = !pool.disabled && pool.node_selector.matches(site.labels);
        let affinity = serves.then(|| self.identity.node.clone());
        let entry = self.entry(lease.cloned());
        for _ in 0..self.settings.attempts {
            let home = store.prefixes().await?.into_iter().find(|cidr| cidr.contains(&ip));
            let written = match home {
                None => {
                    let Some(cidr) = around(ip, pool.block_size) else {
                        return Err(crate::catalogue::Refusal::NotInPool(ip).into());
                    };
                    let mut block = Block::new(cidr, affinity.clone());
                    block.allocations.insert(ip, entry.clone());
                    store.create(&block).await.map(|stored| stored.block.cidr)
                }
                Some(cidr) => match store.get(cidr).await {
                    Err(error) => Err(error),
                    Ok(stored) => {
                        let mut block = stored.block;
                        match block.allocations.get(&ip) {
                            Some(held) if !self.is_own(held) => {
                                let what =
                                    held.handle.as_ref().map(|h| format!("{h} on ")).unwrap_or_default();
                                return Err(IpamError::InUse(ip, format!("{what}node {}", held.node)));
                            }
                            _ => {}
                        }
                        if let Some(owner) = block.affinity.clone().filter(|o| *o != self.identity.node)
                            && lease.is_none()
                            && !pool.allow_borrowing
                        {
                            return Err(IpamError::NotLent(ip, owner));
                        }
                        block.affinity = block.affinity.or(affinity.clone());
                        if block.allocations.insert(ip, entry.clone()).is_some() {
                            block.renewals = block.renewals.wrapping_add(1);
                        }
                        store.update(&block, &stored.version).await.map(|stored| stored.block.cidr)
                    }
                },
            };
            match written {
                Ok(cidr) => {
                    if self.keep(store, cidr, &[ip]).await? > 0 {
                        return Ok(());
                    }
                }
                Err(StoreError::Conflict | StoreError::NotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(IpamError::Contended)
    }

    /// Makes addresses that a block shows as ours our own, unless the block overlaps another: then they are
    /// given up, and the answer is 0.
    pub(crate) async fn keep<S: Store>(
        &mut self,
        store: &S,
        cidr: IpNet,
        ips: &[IpAddr],
    ) -> Result<usize, IpamError> {
        if !self.is_alone(store, cidr).await? {
            self.abandon(store, cidr).await;
            return Ok(0);
        }
        self.adopt(ips, cidr)?;
        Ok(ips.len())
    }

    /// Whether a block overlaps no other. Two that do can both be made where the pool's block size was
    /// changed by replacing the pool. Whoever makes the second, or takes an address of it, sees the first here, for
    /// this reads after that write. So of two that do this at once at least one gives up.
    async fn is_alone<S: Store>(&self, store: &S, cidr: IpNet) -> Result<bool, IpamError> {
        // As long as an entry of ours is in it, it cannot have been deleted and made anew.
        if self.holdings.has_of(&cidr) {
            return Ok(true);
        }
        Ok(!store.prefixes().await?.iter().any(|other| *other != cidr && overlap(other, &cidr)))
    }

    /// Takes out of a block what is there in our name but was never ours. What fails is done by a later round.
    async fn abandon<S: Store>(&mut self, store: &S, cidr: IpNet) {
        let Ok(stored) = store.get(cidr).await else { return };
        let mut block = stored.block;
        block.allocations.retain(|ip, entry| {
            !(entry.node == self.identity.node && entry.instance == self.identity.instance)
                || self.holdings.addresses.contains_key(ip)
        });
        block.affinity = block.affinity.filter(|owner| *owner != self.identity.node);
        let _ = if block.allocations.is_empty() && block.affinity.is_none() {
            store.delete(cidr, &stored.version).await
        } else {
            store.update(&block, &stored.version).await.map(drop)
        };
    }
}

fn or_contended(taken: Result<usize, IpamError>, contended: &mut bool) -> Result<usize, IpamError> {
    match taken {
        Err(IpamError::Contended) => {
            *contended = true;
            Ok(0)
        }
        other => other,
    }
}

/// Where a new block could be: the pool's places one after the other, from one that depends on the node, so
/// that nodes that start together do not all want the same.
struct Places<'a> {
    pool: &'a Pool,
    taken: Vec<(u128, u128)>,
    next: u128,
    left: u128,
    steps: u32,
}

impl<'a> Places<'a> {
    fn new(pool: &'a Pool, node: &str, taken: &[IpNet]) -> Self {
        let same = taken.iter().filter(|net| net.addr().is_ipv4() == pool.cidr.addr().is_ipv4());
        // FNV-1a.
        let hash = node.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let places = 1u128 << u32::from(pool.block_size.saturating_sub(pool.cidr.prefix_len())).min(127);
        Self {
            pool,
            taken: same.map(span).collect(),
            next: u128::from(hash) % places,
            left: places,
            steps: 0,
        }
    }

    fn places(&self) -> u128 {
        1u128 << u32::from(self.pool.block_size.saturating_sub(self.pool.cidr.prefix_len())).min(127)
    }
}

impl Iterator for Places<'_> {
    type Item = IpNet;

    fn next(&mut self) -> Option<IpNet> {
        let size = 1u128 << u32::from(self.pool.cidr.max_prefix_len() - self.pool.block_size).min(127);
        let (start, _) = span(&self.pool.cidr);
        while self.left > 0 && self.steps < MOST_STEPS {
            self.steps += 1;
            let first = start + self.next * size;
            let last = first + (size - 1);
            let end = self.taken.iter().filter(|(f, l)| *f <= last && *l >= first).map(|(_, l)| *l).max();
            // Behind what is there, which may be more than a block.
            let on = match end {
                None => 1,
                Some(end) => (end - start) / size + 1 - self.next,
            };
            let on = on.min(self.places() - self.next).max(1);
            self.left = self.left.saturating_sub(on);
            self.next = (self.next + on) % self.places();
            if end.is_none() {
                return IpNet::new(address(self.pool.family(), first), self.pool.block_size).ok();
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::catalogue::{Catalogue, Object};

    fn pool(cidr: &str, size: u8) -> Pool {
        let object = Object { name: "p".into(), created: 0, spec: json!({"cidr": cidr, "blockSize": size}) };
        Catalogue::read(&[object], &[]).0.pools.remove(0)
    }

    #[test]
    fn a_vast_pool_is_looked_through_only_as_far_as_needed() {
        let pool = pool("fd00::/8", 122);
        let first: Vec<IpNet> = Places::new(&pool, "n", &[]).take(3).collect();
        assert_eq!(Places::new(&pool, "n", &first).next().map(|net| pool.cidr.contains(&net)), Some(true));
        assert!(!first.contains(&Places::new(&pool, "n", &first).next().unwrap()));
    }

    proptest! {
        #[test]
        fn every_place_that_nothing_overlaps_comes_once(
            node in "[a-z]{1,4}", taken in prop::collection::vec((0u32..256, 24u8..=32), 0..12)
        ) {
            let pool = pool("10.0.0.0/24", 28);
            let taken: Vec<IpNet> = taken
                .into_iter()
                .map(|(last, len)| around(IpAddr::from([10, 0, 0, last as u8]), len.max(25)).unwrap())
                .collect();
            let mut got: Vec<IpNet> = Places::new(&pool, &node, &taken).collect();
            got.sort();
            let all = (0..16u8).map(|at| IpNet::new(IpAddr::from([10, 0, 0, at * 16]), 28).unwrap());
            let naive: Vec<IpNet> = all.filter(|net| !taken.iter().any(|other| overlap(net, other))).collect();
            prop_assert_eq!(got, naive);
        }
    }
}
