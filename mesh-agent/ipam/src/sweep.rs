//! Freeing what was found leaked, and what an operator names.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::ipam::{ReleaseRefused, Released};

use crate::collect::{Collected, Leak, PodIndex, View, suspicion};
use crate::error::IpamError;
use crate::holdings::Ledger;
use crate::node::NodeAllocator;
use crate::object::Allocation;
use crate::store::{Store, StoreError};

impl<L: Ledger> NodeAllocator<L> {
    /// Frees what [`crate::collect::collect`] found, unless anything about it has changed since; that is left
    /// to a later look. Says how many addresses were freed.
    pub async fn sweep<S: Store>(&mut self, store: &S, found: &Collected) -> Result<usize, IpamError> {
        let mut blocks: BTreeMap<IpNet, u32> = BTreeMap::new();
        blocks.extend(found.releases.iter().map(|release| (release.block, release.renewals)));
        blocks.extend(found.orphans.iter().map(|orphan| (orphan.block, orphan.renewals)));
        let mut freed = 0;
        for (cidr, renewals) in blocks {
            let stored = match store.get(cidr).await {
                Ok(stored) if stored.block.renewals == renewals => stored,
                Ok(_) | Err(StoreError::NotFound | StoreError::Unreadable(_)) => continue,
                Err(error) => return Err(error.into()),
            };
            let mut block = stored.block.clone();
            for release in found.releases.iter().filter(|release| release.block == cidr) {
                if block.allocations.get(&release.ip) == Some(&release.entry) && !self.has(release.ip) {
                    block.allocations.remove(&release.ip);
                }
            }
            let count = stored.block.allocations.len() - block.allocations.len();
            let orphan = found.orphans.iter().find(|orphan| orphan.block == cidr);
            if orphan.is_some_and(|orphan| block.affinity.as_ref() == Some(&orphan.node)) {
                block.affinity = None;
            }
            let written = if block == stored.block {
                continue;
            } else if block.affinity.is_none() && block.allocations.is_empty() {
                store.delete(cidr, &stored.version).await
            } else {
                store.update(&block, &stored.version).await.map(drop)
            };
            match written {
                Ok(()) => freed += count,
                Err(StoreError::Conflict | StoreError::NotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(freed)
    }

    /// Frees an address for an operator, who need not wait for the grace; what is in use is not freed for
    /// anybody. Freeing what is free already is success.
    pub async fn release<S: Store>(
        &mut self,
        store: &S,
        ip: IpAddr,
        view: &View<'_>,
    ) -> Result<Result<Released, ReleaseRefused>, IpamError> {
        let index = PodIndex::new(view.pods);
        for _ in 0..self.settings.attempts {
            let home = store.prefixes().await?.into_iter().find(|cidr| cidr.contains(&ip));
            let free = Released { ip, block: None, node: None, handle: None };
            let Some(cidr) = home else { return Ok(Ok(free)) };
            let stored = match store.get(cidr).await {
                Ok(stored) => stored,
                Err(StoreError::NotFound) => continue,
                Err(error) => return Err(error.into()),
            };
            let free = Released { block: Some(cidr), ..free };
            let Some(entry) = stored.block.allocations.get(&ip) else { return Ok(Ok(free)) };
            if let Err(reason) = may_release(view, &index, ip, entry, self.has(ip)) {
                return Ok(Err(ReleaseRefused { ip, reason }));
            }
            let mut block = stored.block.clone();
            block.allocations.remove(&ip);
            let written = if block.affinity.is_none() && block.allocations.is_empty() {
                store.delete(cidr, &stored.version).await
            } else {
                store.update(&block, &stored.version).await.map(drop)
            };
            match written {
                Ok(()) => {
                    let handle = entry.handle.as_ref().map(ToString::to_string);
                    return Ok(Ok(Released { node: Some(entry.node.clone()), handle, ..free }));
                }
                Err(StoreError::Conflict | StoreError::NotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(IpamError::Contended)
    }

    fn has(&self, ip: IpAddr) -> bool {
        self.holdings.addresses.contains_key(&ip) || self.holdings.tunnels.contains(&ip)
    }
}

fn may_release(
    view: &View<'_>,
    index: &PodIndex<'_>,
    ip: IpAddr,
    entry: &Allocation,
    ours: bool,
) -> Result<Leak, String> {
    if let Some(pod) = index.by_ip.get(&ip).and_then(|pods| pods.first()) {
        return Err(format!("pod {}/{} has it", pod.namespace, pod.name));
    }
    if view.own.live.contains(&ip) {
        return Err("an interface of this node has it".to_owned());
    }
    if ours {
        return Err("this node keeps it ready, and gives it back by itself when it has too many".to_owned());
    }
    suspicion(view, index, ip, entry).ok_or_else(|| {
        format!("it is node {}'s, which is in the cluster and frees its addresses itself", entry.node)
    })
}
