//! Looking for what nobody will give back, every few minutes, and freeing it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use mesh_ipam::IpamError;
use mesh_ipam::block::Block;
use mesh_ipam::collect::{Collected, Grace, Observations, OwnView, PodView, View, collect, is_responsible};
use mesh_ipam::store::{Store as _, StoreError};
use rand::Rng as _;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::super::holdings::since_boot;
use super::super::known::Known;
use super::{Allocator, Pools};
use crate::cni::Server;
use crate::snapshot::{Pod, Snapshot};

/// How many nodes look after what a gone one left.
const SHARE: usize = 3;
/// For all objects to be listed anew.
const LISTED: Duration = Duration::from_secs(60);

/// What was seen so far.
#[derive(Default)]
pub(super) struct Collector {
    before: Observations,
    next: Option<Instant>,
}

/// With 75 minutes: strays after ten, and a look adds five at most.
fn grace(snapshot: &Snapshot) -> Grace {
    let gone = snapshot.cluster.mesh.reclaim_after;
    Grace { gone, stray: gone * 2 / 15, step: gone / 15 }
}

/// The pods of a snapshot, as the collector sees them.
pub(super) fn pods(snapshot: &Snapshot) -> Vec<PodView> {
    let ips = |pod: &Pod| if pod.host_network { Vec::new() } else { pod.ips.clone() };
    let all = snapshot.cluster.pods.iter().map(|(name, pod)| PodView {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        uid: pod.uid.clone().unwrap_or_default(),
        node: pod.node.clone().unwrap_or_default(),
        ips: ips(pod),
        finished: pod.finished,
    });
    all.collect()
}

/// Addresses in use here, whoever knows of it.
pub(super) fn live(snapshot: &Snapshot, known: &Known, allocator: &Allocator) -> BTreeSet<IpAddr> {
    let endpoints = snapshot.endpoints.values().flat_map(|endpoint| &endpoint.ips);
    let local = &snapshot.local;
    let of_host = local.addresses.iter().chain(&local.tunnel_addresses).chain(&allocator.holdings().tunnels);
    known.leases.keys().chain(endpoints).chain(of_host).copied().collect()
}

/// Whether all of it was heard, and lately: nothing is taken from anybody on the word of a silent API server.
pub(super) fn is_complete(snapshot: &Snapshot) -> bool {
    let silent = snapshot.cluster.issues.iter().any(|issue| issue.object == "API server");
    snapshot.synced && !snapshot.cluster.ipam.incomplete && !silent
}

impl Collector {
    /// Looks, if it is time. What fails is done by a later look.
    pub(super) async fn look(&mut self, pools: &Pools, server: &Server) {
        let snapshot = pools.store.current();
        let every = grace(&snapshot).step;
        // Sooner, if `reclaimAfter` is shorter now.
        let due = Instant::now() + every;
        let due = self.next.map_or(due, |next| next.min(due));
        if Instant::now() < due {
            self.next = Some(due);
            return;
        }
        self.next = Some(Instant::now() + every.mul_f64(rand::rng().random_range(1.0..1.2)));
        match self.collect(pools, server, &snapshot).await {
            Ok(0) => {}
            Ok(freed) => info!(freed, "addresses of IPPools that nobody uses any more are free again"),
            Err(error) => warn!("addresses of IPPools that nobody uses were not looked for: {error}"),
        }
    }

    async fn collect(
        &mut self,
        pools: &Pools,
        server: &Server,
        snapshot: &Snapshot,
    ) -> Result<usize, IpamError> {
        // Blocks first: what came into being after that is in the lists.
        let blocks = read(pools, snapshot).await?;
        let now = since_boot()?;
        let found = self.judge(pools, server, &blocks, now).await;
        if found.releases.is_empty() && found.orphans.is_empty() {
            self.before = found.observations;
            return Ok(0);
        }
        // A watch may lag, a list does not. That every object is listed happens only here, where something is to be freed.
        if timeout(LISTED, pools.store.sync()).await.is_err() || !is_complete(&pools.store.current()) {
            return Ok(0);
        }
        let found = self.judge(pools, server, &blocks, now).await;
        let freed = pools.allocator.lock().await.sweep(&pools.blocks, &found).await?;
        self.before = found.observations;
        Ok(freed)
    }

    async fn judge(&self, pools: &Pools, server: &Server, blocks: &[Block], now: Duration) -> Collected {
        let allocator = pools.allocator.lock().await;
        let snapshot = pools.store.current();
        let known = match server.known(&snapshot, None).await {
            Ok(known) if is_complete(&snapshot) => known,
            _ => return Collected { observations: self.before.clone(), ..Collected::default() },
        };
        let (pods, live) = (pods(&snapshot), live(&snapshot, &known, &allocator));
        let nodes = snapshot.cluster.nodes.keys().cloned().collect();
        let own = OwnView { identity: allocator.identity(), holdings: allocator.holdings(), live: &live };
        let view = View { blocks, pods: &pods, nodes: &nodes, own };
        collect(&view, now, &grace(&snapshot), &self.before)
    }
}

/// The blocks in which something may be leaked: with this node's addresses, and, for a few nodes each, with those of nodes
/// that are gone.
async fn read(pools: &Pools, snapshot: &Snapshot) -> Result<Vec<Block>, IpamError> {
    let own = snapshot.local.node_name.as_str();
    let nodes: BTreeSet<String> = snapshot.cluster.nodes.keys().cloned().collect();
    let mut out = Vec::new();
    for (cidr, block) in &snapshot.cluster.ipam.blocks {
        let mut names = block.holders.iter().chain(&block.affinity);
        let ours = names.clone().any(|name| name == own);
        let gone = names.any(|name| !nodes.contains(name)) && is_responsible(cidr, own, &nodes, SHARE);
        if !ours && !gone {
            continue;
        }
        match pools.blocks.get(*cidr).await {
            Ok(stored) => out.push(stored.block),
            Err(StoreError::NotFound | StoreError::Unreadable(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(out)
}
