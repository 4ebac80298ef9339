//! Addresses from IPPools: this node's allocator, whose turn it is, and the regular round.
//!
//! ```text
//!   ADD ─▶ turn ─▶ pick (or demand) ─▶ journal ─▶ answer        turn ─▶ round ─▶ blocks, holdings, tunnel addresses
//! ```
//!
//! There is one turn at a time: from the choice of an address until the journal has it nobody else may choose. A round asks
//! the API server, which may take long, so it gives way to an ADD: it is dropped where it waits for an answer, and begun
//! again. To the allocator that is an answer that was lost.

mod answers;
mod collect;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use kube::Client;
use mesh_api::status::Issue;
use mesh_ipam::catalogue::{Ask as Wish, Catalogue};
use mesh_ipam::node::{NodeAllocator, Picked, Settings, Site};
use mesh_ipam::{Family, IpamError};
use rand::Rng as _;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::holdings::{HoldingsFile, boot, identity, since_boot};
use super::known::Known;
use crate::cni::Server;
use crate::kubernetes::blocks::ApiBlocks;
use crate::snapshot::ipam::BlockView;
use crate::snapshot::{Labels, Snapshot};
use crate::state::StateDir;
use crate::status::Board;
use crate::store::Store;
pub use answers::Unanswered;

/// Reporter of our issues on the board.
const REPORTER: &str = "ipam";
/// Between two rounds in which nothing happens, at most.
const ROUND: Duration = Duration::from_secs(60);
/// After an ADD or DEL, for others to come.
const SETTLE: Duration = Duration::from_millis(300);
/// After failures, the first and the longest wait.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

type Allocator = NodeAllocator<HoldingsFile>;

/// The addresses of this node.
pub struct Pools {
    store: Store,
    board: Board,
    blocks: ApiBlocks,
    allocator: AsyncMutex<Allocator>,
    /// How many ADDs want the turn or have it.
    waiting: watch::Sender<usize>,
    changed: Notify,
    summary: Mutex<Summary>,
}

impl std::fmt::Debug for Pools {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pools").field("summary", &self.summary).finish_non_exhaustive()
    }
}

/// How it stood after the last turn.
#[derive(Debug, Clone, Copy, Default)]
struct Summary {
    /// Addresses of its own, given or ready.
    held: usize,
    /// Until when addresses are given, since boot.
    until: Option<Duration>,
}

impl Summary {
    fn of(allocator: &Allocator, store: &Store) -> Self {
        let holdings = allocator.holdings();
        let trust = settings(&store.current()).trust;
        Self { held: holdings.addresses.len(), until: holdings.confirmed.map(|at| at + trust) }
    }
}

/// The right to choose an address.
pub(crate) struct Turn<'a> {
    pools: &'a Pools,
    allocator: MutexGuard<'a, Allocator>,
    _waiting: Waiting<'a>,
}

struct Waiting<'a>(&'a watch::Sender<usize>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.pools.sum_up(&self.allocator);
    }
}

impl Turn<'_> {
    /// Addresses for a pod: of those kept ready, without asking anybody; else of the API server.
    pub(crate) async fn choose(
        &mut self,
        snapshot: &Snapshot,
        wish: &Wish,
        known: &Known,
    ) -> std::result::Result<Vec<IpAddr>, IpamError> {
        let at = Place::of(snapshot);
        self.allocator.set_settings(settings(snapshot));
        let (now, site, local) = (since_boot()?, at.site(), known.local());
        match self.allocator.pick(now, &site, wish, &local)? {
            Picked::Ready(ips) => Ok(ips),
            Picked::Short(_) => self.allocator.demand(&self.pools.blocks, now, &site, wish, &local).await,
        }
    }
}

/// What the snapshot says of this node and its pools.
struct Place<'a> {
    catalogue: &'a Catalogue,
    labels: Labels,
    uid: Option<&'a str>,
}

impl<'a> Place<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let node = snapshot.cluster.nodes.get(&snapshot.local.node_name);
        Self {
            catalogue: &snapshot.cluster.ipam.catalogue,
            labels: node.map(|node| node.labels.clone()).unwrap_or_default(),
            uid: node.and_then(|node| node.uid.as_deref()),
        }
    }

    fn site(&self) -> Site<'_> {
        Site { catalogue: self.catalogue, labels: &self.labels, node_uid: self.uid }
    }
}

/// A change of these asks for a round.
#[derive(PartialEq)]
struct Concern {
    in_use: bool,
    catalogue: Catalogue,
    own: Vec<(IpNet, BlockView)>,
    labels: Labels,
    uid: Option<String>,
    reclaim_after: Duration,
}

impl Concern {
    fn of(snapshot: &Snapshot) -> Self {
        let (ipam, own) = (&snapshot.cluster.ipam, snapshot.local.node_name.as_str());
        let node = snapshot.cluster.nodes.get(own);
        let blocks = ipam.blocks.iter().filter(|(_, block)| block.affinity.as_deref() == Some(own));
        Self {
            in_use: ipam.in_use,
            catalogue: ipam.catalogue.clone(),
            own: blocks.map(|(cidr, block)| (*cidr, block.clone())).collect(),
            labels: node.map(|node| node.labels.clone()).unwrap_or_default(),
            uid: node.and_then(|node| node.uid.clone()),
            reclaim_after: snapshot.cluster.mesh.reclaim_after,
        }
    }
}

/// Half a block at most is kept ready, so that small blocks leave something to others; and trust ends well before others may
/// take what a node had.
fn settings(snapshot: &Snapshot) -> Settings {
    let pools = &snapshot.cluster.ipam.catalogue.pools;
    let size = |pool: &mesh_ipam::catalogue::Pool| {
        1usize << u32::from(pool.cidr.max_prefix_len().saturating_sub(pool.block_size)).min(16)
    };
    let usual = Settings::default();
    let half = pools.iter().map(size).min().map_or(usual.high, |size| size / 2);
    let high = half.clamp(1, usual.high);
    let trust = snapshot.cluster.mesh.reclaim_after * 4 / 5;
    Settings { low: high.div_ceil(2), high, trust, ..usual }
}

/// What became of a round.
enum Round {
    Done(Vec<Issue>),
    /// An ADD came.
    GaveWay,
    Failed(String),
}

impl Pools {
    /// With what is on disk. The tunnel addresses are the node's from the first plan on.
    pub fn open(
        state: &StateDir,
        node: &str,
        client: Client,
        store: Store,
        board: Board,
    ) -> Result<Arc<Self>> {
        let path = state.ipam_instance();
        let identity = identity(node, &path).with_context(|| path.display().to_string())?;
        let path = state.ipam_holdings();
        let (file, holdings) =
            HoldingsFile::open(path.clone()).with_context(|| path.display().to_string())?;
        store.update_local(|local| local.tunnel_addresses = holdings.tunnels.iter().copied().collect());
        let boot = boot().context("boot id")?;
        let allocator = Allocator::new(identity, &boot, holdings, file, settings(&store.current()));
        let summary = Summary::of(&allocator, &store);
        let pools = Self {
            blocks: ApiBlocks::new(client, store.clone()),
            store,
            board,
            allocator: AsyncMutex::new(allocator),
            waiting: watch::Sender::new(0),
            changed: Notify::new(),
            summary: Mutex::new(summary),
        };
        Ok(Arc::new(pools))
    }

    /// An ADD's: a round gives way to it.
    pub(crate) async fn turn(&self) -> Turn<'_> {
        self.waiting.send_modify(|count| *count += 1);
        let waiting = Waiting(&self.waiting);
        Turn { pools: self, allocator: self.allocator.lock().await, _waiting: waiting }
    }

    /// An address was given or came back.
    pub(crate) fn changed(&self) {
        self.changed.notify_one();
    }

    /// Addresses held, and why none of them is given, if that is so.
    pub(crate) fn held(&self) -> (usize, Option<IpamError>) {
        let summary = *self.summary.lock().unwrap_or_else(PoisonError::into_inner);
        let confirmed = since_boot().is_ok_and(|now| summary.until.is_some_and(|until| now <= until));
        (summary.held, (!confirmed).then_some(IpamError::Unconfirmed))
    }

    fn sum_up(&self, allocator: &Allocator) {
        *self.summary.lock().unwrap_or_else(PoisonError::into_inner) = Summary::of(allocator, &self.store);
    }

    /// Rounds and collections, for ever.
    pub async fn run(self: Arc<Self>, server: Arc<Server>) {
        let mut snapshots = self.store.watch();
        let mut collector = collect::Collector::default();
        let mut failures = 0u32;
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let mut wait = round_every(&snapshot);
            if snapshot.synced && self.is_concerned(&snapshot).await {
                match self.round(&server).await {
                    Round::GaveWay => {
                        let mut waiting = self.waiting.subscribe();
                        // The sender is ours.
                        let _ = waiting.wait_for(|count| *count == 0).await;
                        continue;
                    }
                    Round::Done(issues) => {
                        failures = 0;
                        self.tell(&snapshot, issues);
                        collector.look(&self, &server).await;
                    }
                    Round::Failed(message) => {
                        failures = failures.saturating_add(1);
                        let longest = RETRY.0.saturating_mul(1 << failures.min(6)).min(RETRY.1).min(wait);
                        wait = longest.mul_f64(rand::rng().random_range(0.5..1.0));
                        // The first failure is mostly a connection that was closed.
                        if failures > 1 {
                            let held = &snapshot.local.node_name;
                            let object = format!("Node/{held}");
                            let reason = "IpamNotConfirmed".to_owned();
                            self.tell(
                                &snapshot,
                                vec![Issue { object, field: String::new(), reason, message }],
                            );
                        }
                    }
                }
            }
            let concern = Concern::of(&snapshot);
            let was_synced = snapshot.synced;
            drop(snapshot);
            let until = Instant::now() + wait;
            let other = |now: &Arc<Snapshot>| now.synced != was_synced || Concern::of(now) != concern;
            let heard = async { snapshots.wait_for(other).await.is_ok() };
            tokio::select! {
                () = async { self.changed.notified().await; sleep(SETTLE).await } => {}
                is_there = heard => if !is_there { return },
                () = sleep_until(until) => {}
            }
        }
    }

    /// Blocks are given back also after the last pool is gone.
    async fn is_concerned(&self, snapshot: &Snapshot) -> bool {
        let own = snapshot.local.node_name.as_str();
        snapshot.cluster.ipam.in_use
            || snapshot.cluster.ipam.blocks_of(own).next().is_some()
            || !self.allocator.lock().await.holdings().addresses.is_empty()
    }

    async fn round(&self, server: &Server) -> Round {
        let mut allocator = self.allocator.lock().await;
        let snapshot = self.store.current();
        let known = match server.known(&snapshot, None).await {
            Ok(known) => known,
            Err(why) => return Round::Failed(why),
        };
        let place = Place::of(&snapshot);
        allocator.set_settings(settings(&snapshot));
        let now = match since_boot() {
            Ok(now) => now,
            Err(error) => return Round::Failed(error.to_string()),
        };
        let (site, local) = (place.site(), known.local());
        let mut waiting = self.waiting.subscribe();
        let done = tokio::select! {
            biased;
            _ = waiting.wait_for(|count| *count > 0) => return Round::GaveWay,
            done = allocator.maintain(&self.blocks, now, &site, &local) => done,
        };
        let issues = match done {
            Ok(issues) => issues,
            Err(error) => return Round::Failed(error.to_string()),
        };
        let mut tunnels = Vec::new();
        for family in Family::ALL.into_iter().filter(|_| snapshot.cluster.ipam.in_use) {
            match allocator.tunnel(now, family, &site, &local) {
                Ok(ip) => tunnels.extend(ip),
                Err(error) => return Round::Failed(error.to_string()),
            }
        }
        self.sum_up(&allocator);
        if snapshot.local.tunnel_addresses != tunnels {
            self.store.update_local(|local| local.tunnel_addresses = tunnels);
            // The blocks are to say so.
            self.changed();
        }
        Round::Done(issues)
    }

    /// What the objects' own issues say already is not said twice.
    fn tell(&self, snapshot: &Snapshot, mut issues: Vec<Issue>) {
        let said = &snapshot.cluster.issues;
        issues.retain(|issue| {
            !said.iter().any(|said| said.object == issue.object && said.field == issue.field)
        });
        self.board.set_issues(REPORTER, issues);
    }
}

/// Much sooner than trust ends.
fn round_every(snapshot: &Snapshot) -> Duration {
    let longest = ROUND.min(snapshot.cluster.mesh.reclaim_after / 10);
    longest.mul_f64(rand::rng().random_range(0.8..1.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use mesh_ipam::catalogue::Object;
    use serde_json::json;

    use super::*;
    use crate::snapshot::Cluster;

    #[test]
    fn a_node_keeps_half_a_small_block_and_trust_ends_before_others_reclaim() {
        let of = |spec: serde_json::Value| {
            let mut cluster = Cluster::default();
            let object = Object { name: "p".into(), created: 0, spec };
            cluster.ipam.catalogue = Catalogue::read(&[object], &[]).0;
            let snapshot = Snapshot { cluster: Arc::new(cluster), ..Snapshot::default() };
            let settings = settings(&snapshot);
            assert!(settings.trust < snapshot.cluster.mesh.reclaim_after);
            (settings.low, settings.high)
        };
        assert_eq!(of(json!({"cidr": "10.0.0.0/16"})), (8, 16));
        assert_eq!(of(json!({"cidr": "10.0.0.0/16", "blockSize": 29})), (2, 4));
        assert_eq!(of(json!({"cidr": "10.0.0.0/16", "blockSize": 32})), (1, 1));
        assert_eq!(of(json!({"cidr": "fd00::/64", "blockSize": 125})), (2, 4));
        assert_eq!(settings(&Snapshot::default()), Settings::default());
    }
}
