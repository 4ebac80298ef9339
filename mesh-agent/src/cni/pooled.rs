//! Addresses from IPPools, for ADD.

use std::time::Duration;

use mesh_ipam::catalogue::Ask as Wish;
use mesh_ipam::{IpamError, store::StoreError};
use tokio::time::timeout;

use super::Server;
use super::refusal::Refusal;
use crate::ipam::known::Known;
use crate::ipam::{Ask, Lease, Ranges};
use crate::snapshot::{ObjectRef, Snapshot};

/// For the pod's object, whose annotations may name pools. Without an API server it does not come.
const HEARD_WITHIN: Duration = Duration::from_secs(1);

impl Server {
    /// What this node knows of addresses, or why it cannot be told.
    pub(crate) async fn known(&self, snapshot: &Snapshot, pod: Option<&ObjectRef>) -> Result<Known, String> {
        match self.ipam.lock().await.as_ref() {
            Ok(ipam) => Ok(Known::of(ipam, snapshot, pod)),
            Err(error) => Err(error.clone()),
        }
    }

    pub(super) async fn lease_of_pools(&self, ask: &Ask) -> Result<Lease, Refusal> {
        let pools = self.pools.get().ok_or_else(|| Refusal::unavailable("IPPools need an API server"))?;
        self.heard_of(&ask.pod).await;
        let mut turn = pools.turn().await;
        let snapshot = self.store.current();
        self.see_strays().await?;
        let known = self.known(&snapshot, Some(&ask.pod)).await.map_err(Refusal::unavailable)?;
        let ips = turn.choose(&snapshot, &wish(&snapshot, ask), &known).await?;
        let catalogue = &snapshot.cluster.ipam.catalogue;
        // The allocator has seen to the rest.
        let ranges =
            Ranges { pools: catalogue.pools.iter().map(|pool| pool.cidr).collect(), ..Ranges::default() };
        let mut ipam = self.ipam.lock().await;
        let ipam = ipam.as_mut().map_err(|error| Refusal::unavailable(error.clone()))?;
        let lease = ipam.allocate(&Ask { ips, ..ask.clone() }, &ranges)?;
        // The journal has it.
        drop(turn);
        pools.changed();
        Ok(lease)
    }

    async fn heard_of(&self, pod: &ObjectRef) {
        let mut snapshots = self.store.watch();
        let heard = snapshots.wait_for(|now| now.cluster.pods.contains_key(pod));
        if !pod.namespace.is_empty() && timeout(HEARD_WITHIN, heard).await.is_err() {
            tracing::debug!(%pod, "not heard of yet, so its annotations do not count");
        }
    }
}

fn wish(snapshot: &Snapshot, ask: &Ask) -> Wish {
    let cluster = &snapshot.cluster;
    let namespace = cluster.namespaces.get(&ask.pod.namespace);
    let [ipv4_pools, ipv6_pools] = cluster.ipam.wanted.get(&ask.pod).cloned().unwrap_or_default();
    Wish {
        namespace_labels: namespace.cloned().unwrap_or_default(),
        ipv4_pools,
        ipv6_pools,
        ips: ask.ips.clone(),
    }
}

impl From<IpamError> for Refusal {
    fn from(error: IpamError) -> Self {
        let text = error.to_string();
        match error {
            IpamError::Refused(_) => Self::config(text),
            IpamError::Ledger(_) => Self::io(text),
            IpamError::Store(StoreError::Refused(_)) => Self::unavailable(text),
            IpamError::Exhausted(_)
            | IpamError::InUse(..)
            | IpamError::NotLent(..)
            | IpamError::Unconfirmed
            | IpamError::Contended
            | IpamError::Store(_) => Self::try_again(text),
        }
    }
}
