//! What is told and done for `meshctl ipam`.

use std::net::IpAddr;
use std::time::Duration;

use mesh_api::ipam::{Check, ReleaseRefused, Released, Usage};
use mesh_ipam::IpamError;
use mesh_ipam::audit;
use mesh_ipam::block::Block;
use mesh_ipam::collect::{OwnView, View};
use mesh_ipam::store::{Scope, Store as _};
use tokio::time::timeout;

use super::collect::{is_complete, live, pods};
use super::{Allocator, Pools};
use crate::cni::Server;
use crate::ipam::known::Known;
use crate::snapshot::Snapshot;

/// For all objects to be listed anew.
const LISTED: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    /// Addresses come from elsewhere.
    #[error("there is no IPPool: pod addresses come from spec.podCIDRs, or from another plugin")]
    NotInUse,
    /// The API server, the disk or the journal.
    #[error("{0}")]
    Failed(String),
}

impl From<IpamError> for Unanswered {
    fn from(error: IpamError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl Pools {
    fn in_use(&self) -> Result<(), Unanswered> {
        let ipam = &self.store.current().cluster.ipam;
        if ipam.in_use || !ipam.blocks.is_empty() { Ok(()) } else { Err(Unanswered::NotInUse) }
    }

    /// How much of what is in use, by the API server's word.
    pub async fn usage(&self) -> Result<Usage, Unanswered> {
        self.in_use()?;
        let listing = self.blocks.list(Scope::All).await.map_err(IpamError::from)?;
        let snapshot = self.store.current();
        let of_us = ["IPPool/", "IPReservation/"];
        let mut issues = snapshot.cluster.issues.clone();
        issues.retain(|issue| of_us.iter().any(|kind| issue.object.starts_with(kind)));
        issues.extend(listing.issues);
        let blocks: Vec<Block> = listing.blocks.into_iter().map(|stored| stored.block).collect();
        Ok(audit::usage(&snapshot.cluster.ipam.catalogue, &blocks, issues))
    }

    /// What does not fit together. Blocks are read first, and everything else after them.
    pub async fn check(&self, server: &Server) -> Result<Check, Unanswered> {
        self.in_use()?;
        let listing = self.blocks.list(Scope::All).await.map_err(IpamError::from)?;
        let blocks: Vec<Block> = listing.blocks.into_iter().map(|stored| stored.block).collect();
        let snapshot = self.listed().await?;
        let turn = self.turn().await;
        let known = server.known(&snapshot, None).await.map_err(Unanswered::Failed)?;
        Ok(seen(&snapshot, &known, &turn.allocator, &blocks, |view| {
            audit::check(&snapshot.cluster.ipam.catalogue, view, &known.leases)
        }))
    }

    /// Frees an address that nobody uses.
    pub async fn release(
        &self,
        server: &Server,
        ip: IpAddr,
    ) -> Result<Result<Released, ReleaseRefused>, Unanswered> {
        self.in_use()?;
        let snapshot = self.listed().await?;
        let mut turn = self.turn().await;
        let known = server.known(&snapshot, None).await.map_err(Unanswered::Failed)?;
        let (pods, live) = (pods(&snapshot), live(&snapshot, &known, &turn.allocator));
        let nodes = snapshot.cluster.nodes.keys().cloned().collect();
        let (identity, holdings) = (turn.allocator.identity().clone(), turn.allocator.holdings().clone());
        let own = OwnView { identity: &identity, holdings: &holdings, live: &live };
        let view = View { blocks: &[], pods: &pods, nodes: &nodes, own };
        let released = turn.allocator.release(&self.blocks, ip, &view).await?;
        drop(turn);
        self.changed();
        Ok(released)
    }

    async fn listed(&self) -> Result<std::sync::Arc<Snapshot>, Unanswered> {
        let failed = || Unanswered::Failed("the API server does not say all it has".to_owned());
        timeout(LISTED, self.store.sync()).await.map_err(|_| failed())?;
        let snapshot = self.store.current();
        if is_complete(&snapshot) { Ok(snapshot) } else { Err(failed()) }
    }
}

fn seen<T>(
    snapshot: &Snapshot,
    known: &Known,
    allocator: &Allocator,
    blocks: &[Block],
    look: impl FnOnce(&View<'_>) -> T,
) -> T {
    let (pods, live) = (pods(snapshot), live(snapshot, known, allocator));
    let nodes = snapshot.cluster.nodes.keys().cloned().collect();
    let own = OwnView { identity: allocator.identity(), holdings: allocator.holdings(), live: &live };
    look(&View { blocks, pods: &pods, nodes: &nodes, own })
}
