//! The CNI server: what mesh-cni asks on `cni.sock` is done here.
//!
//! An ADD goes: address (on disk) → veth pair, the pod's end born in the pod's namespace → policy attached,
//! closed → host end up → the pod's end configured → endpoint into the snapshot → wait until reconcilers
//! have routes and policy in place → answer. Whatever fails, all of it is undone. Routes, neighbours and
//! policy of the host's side are the plan's business, not ours.

mod attach;
mod enforced;
mod netns;
mod pooled;
mod ranges;
mod refusal;
pub mod serve;
mod veth;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use mesh_api::cni::{Attachment, Command, Reply, Request};
use mesh_api::status::Issue;
use tokio::sync::Mutex as AsyncMutex;

use crate::ipam::pools::Pools;
use crate::ipam::{Ipam, Key, Lease, LiveLink, STRAY};
use crate::reconcile::netlink::Netlink;
use crate::status::Board;
use crate::store::Store;
pub use ranges::ranges;
use refusal::Refusal;

/// Name of this source in the store.
pub const SOURCE: &str = "cni";
/// Reporter of our issues on the board.
const REPORTER: &str = "cni";
/// Why there are no pods of ours.
const EXTERNAL: &str =
    "MeshConfiguration default: spec.podNetwork is external, so another plugin attaches pods";
/// Within this a generation is enforced, or the ADD is undone. mesh-cni waits 90 s.
const ENFORCED_WITHIN: Duration = Duration::from_secs(30);

/// What the CNI server needs of the policy engine.
pub trait Gate: Send + Sync {
    /// Whether pods can be policed at all, or why not.
    fn ready(&self) -> Result<(), String>;
    /// Attaches the programs to a pod's host-side interface; it lets nothing through until told otherwise.
    fn attach_closed(&self, interface: &str) -> Result<(), String>;
    /// Forgets an interface that is gone; unknown is success.
    fn forget(&self, interface: &str) -> Result<(), String>;
}

/// The server. One for the node; requests on different containers run side by side.
pub struct Server {
    store: Store,
    board: Board,
    gate: Arc<dyn Gate>,
    netlink: Netlink,
    state_dir: PathBuf,
    /// `None` while the journal cannot be used, with the reason.
    ipam: AsyncMutex<Result<Ipam, String>>,
    /// Where IPPools can be: an API server decides between nodes.
    pools: OnceLock<Arc<Pools>>,
    /// Containers with a request under way.
    busy: Mutex<BTreeSet<Key>>,
    enforced_within: Duration,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("state_dir", &self.state_dir).finish_non_exhaustive()
    }
}

/// Holds a container for one request.
struct Busy<'a> {
    server: &'a Server,
    key: Key,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.server.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl Server {
    /// Reads the journal, compares it with the interfaces that are there, and puts the endpoints into the
    /// store. A journal that cannot be used is an issue: running pods keep what they have (the source then
    /// never counts as synced, so nothing is pruned), and ADD is refused.
    pub async fn open(
        state_dir: &Path,
        store: Store,
        board: Board,
        gate: Arc<dyn Gate>,
        netlink: Netlink,
    ) -> Arc<Self> {
        Self::open_within(state_dir, store, board, gate, netlink, ENFORCED_WITHIN).await
    }

    /// The same with another time for a generation to be enforced; after it an ADD is undone.
    pub async fn open_within(
        state_dir: &Path,
        store: Store,
        board: Board,
        gate: Arc<dyn Gate>,
        netlink: Netlink,
        enforced_within: Duration,
    ) -> Arc<Self> {
        let opened = Self::open_ipam(state_dir, &netlink).await;
        let ipam = match opened {
            Ok((ipam, links, issues)) => {
                let endpoints = ipam.leases().map(|lease| {
                    let link = links.iter().find(|link| link.name == lease.host_interface);
                    (lease.host_interface.clone(), lease.endpoint(link.map_or(0, |link| link.ifindex)))
                });
                store.set_endpoints(SOURCE, endpoints.collect());
                for issue in &issues {
                    tracing::warn!(object = issue.object, reason = issue.reason, "{}", issue.message);
                }
                board.set_issues(REPORTER, issues);
                Ok(ipam)
            }
            Err(message) => {
                tracing::error!("no CNI ADD is possible: {message}");
                board.set_issues(
                    REPORTER,
                    vec![Issue {
                        object: format!("file {}", state_dir.join(crate::ipam::journal::FILE).display()),
                        field: String::new(),
                        reason: "IpamUnavailable".to_owned(),
                        message: message.clone(),
                    }],
                );
                Err(message)
            }
        };
        Arc::new(Self {
            store,
            board,
            gate,
            netlink,
            state_dir: state_dir.to_owned(),
            ipam: AsyncMutex::new(ipam),
            pools: OnceLock::new(),
            busy: Mutex::new(BTreeSet::new()),
            enforced_within,
        })
    }

    /// From now on addresses come from IPPools where there are any. Said once, before anything is served.
    pub fn use_pools(&self, pools: Arc<Pools>) {
        let _ = self.pools.set(pools);
    }

    async fn open_ipam(
        state_dir: &Path,
        netlink: &Netlink,
    ) -> Result<(Ipam, Vec<LiveLink>, Vec<Issue>), String> {
        let links = veth::own(netlink).await.map_err(|error| error.to_string())?;
        let (ipam, issues) = Ipam::open(state_dir, &links).map_err(|error| error.to_string())?;
        Ok((ipam, links, issues))
    }

    /// Carries out one request. `netns` is the descriptor that came with it.
    pub async fn handle(&self, request: Request, netns: Option<OwnedFd>) -> Reply {
        let command = request.command;
        let done = match command {
            Command::Add => self.add(&request, netns).await.map(Some),
            Command::Del => self.del(&request).await.map(|()| None),
            Command::Check => self.check(&request, netns).await.map(Some),
            Command::Gc => self.gc(&request).await.map(|()| None),
            Command::Status => self.status().await.map(|()| None),
        };
        let (container, pod) =
            (&request.container_id, format!("{}/{}", request.pod_namespace, request.pod_name));
        match done {
            Ok(result) => {
                let addresses = result.as_ref().map(|attachment: &Attachment| &attachment.addresses);
                if !matches!(command, Command::Status | Command::Check) {
                    tracing::info!(?command, container, pod, ?addresses, "CNI request done");
                }
                Reply::Done { result }
            }
            Err(refusal) => {
                tracing::warn!(
                    ?command,
                    container,
                    pod,
                    code = refusal.code,
                    "CNI request failed: {refusal}"
                );
                refusal.into_reply()
            }
        }
    }

    fn hold(&self, key: &Key) -> Result<Busy<'_>, Refusal> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if busy.insert(key.clone()) {
            Ok(Busy { server: self, key: key.clone() })
        } else {
            Err(Refusal::try_again(format!("another request for {key} is under way")))
        }
    }

    /// Idempotent: what is not there is gone. The address is free only once the interface is.
    async fn del(&self, request: &Request) -> Result<(), Refusal> {
        let key = key(request)?;
        let _busy = self.hold(&key)?;
        self.remove(&key).await
    }

    async fn remove(&self, key: &Key) -> Result<(), Refusal> {
        let mut ipam = self.ipam.lock().await;
        let interface = crate::ipam::host_interface(key);
        if let Ok(ipam) = ipam.as_ref()
            && ipam.lease(key).is_none()
            && let Some(lease) = ipam.leases().find(|lease| lease.host_interface == interface)
        {
            // Equal hashes: that interface is another container's.
            tracing::debug!(%key, container = lease.container_id, "nothing to delete");
            return Ok(());
        }
        veth::delete(&self.netlink, &interface).await?;
        self.store.remove_endpoint(&interface);
        if let Err(error) = self.gate.forget(&interface) {
            // The interface is gone and its programs with it; only pins are left, for the next pass.
            tracing::warn!(interface, "cannot forget a deleted interface's policy: {error}");
        }
        match ipam.as_mut() {
            Ok(ipam) => {
                ipam.release(key).map_err(|error| Refusal::io(error.to_string()))?;
                if let Some(pools) = self.pools.get() {
                    pools.changed();
                }
                Ok(())
            }
            // The interface is gone; the journal, once it can be used, will see that.
            Err(_) => Ok(()),
        }
    }

    /// Everything of this network that is not valid any more goes, and interfaces nobody knows.
    async fn gc(&self, request: &Request) -> Result<(), Refusal> {
        let valid: BTreeSet<Key> = request
            .valid_attachments
            .iter()
            .map(|(container_id, ifname)| Key { container_id: container_id.clone(), ifname: ifname.clone() })
            .collect();
        let stale: Vec<Key> = {
            let mut ipam = self.ipam.lock().await;
            let ipam = ipam.as_mut().map_err(|error| Refusal::try_again(error.clone()))?;
            ipam.set_live(&veth::own(&self.netlink).await?);
            let names: BTreeSet<String> = valid.iter().map(crate::ipam::host_interface).collect();
            for stray in ipam.strays().filter(|name| !names.contains(*name)) {
                veth::delete(&self.netlink, stray).await?;
            }
            ipam.set_live(&veth::own(&self.netlink).await?);
            self.forget_stray_issues(ipam);
            let ours = ipam.leases().filter(|lease| lease.network == request.network);
            ours.map(Lease::key).filter(|key| !valid.contains(key)).collect()
        };
        let mut failures = Vec::new();
        for key in stale {
            let removed = match self.hold(&key) {
                Ok(_busy) => self.remove(&key).await,
                // An ADD of just now is younger than the runtime's list.
                Err(_) => Ok(()),
            };
            if let Err(refusal) = removed {
                failures.push(format!("{key}: {refusal}"));
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(Refusal::io(failures.join("; "))) }
    }

    /// Interfaces that nobody knew are no issue once they are gone.
    fn forget_stray_issues(&self, ipam: &Ipam) {
        let mut issues = self.board.observed().issues.remove(REPORTER).unwrap_or_default();
        let strays: BTreeSet<String> = ipam.strays().map(|name| format!("interface {name}")).collect();
        issues.retain(|issue| issue.reason != STRAY || strays.contains(&issue.object));
        self.board.set_issues(REPORTER, issues);
    }

    /// Whether an ADD would work now.
    async fn status(&self) -> Result<(), Refusal> {
        if let Err(error) = self.ipam.lock().await.as_ref() {
            return Err(Refusal::unavailable(error.clone()));
        }
        self.gate.ready().map_err(Refusal::unavailable)?;
        let snapshot = self.store.current();
        if let Some(source) = snapshot.sources.iter().find(|source| !source.synced) {
            return Err(Refusal::unavailable(format!("source {} has not been read yet", source.name)));
        }
        if snapshot.cluster.mesh.external {
            return Err(Refusal::unavailable(EXTERNAL));
        }
        let seen = self.board.observed();
        if snapshot.cluster.ipam.in_use {
            let why =
                self.pools.get().map_or(Some(mesh_ipam::IpamError::Unconfirmed), |pools| pools.held().1);
            if let Some(why) = why {
                return Err(Refusal::unavailable(why.to_string()));
            }
        } else if seen.desired.pod_cidrs.is_empty() {
            return Err(Refusal::unavailable(crate::ipam::IpamError::NoCidr.to_string()));
        }
        if let Some((name, _)) = seen.devices.iter().find(|(_, device)| device.device.is_none()) {
            return Err(Refusal::limited(format!("device {name} is absent: mesh-datapath does not run")));
        }
        Ok(())
    }

    /// Addresses in use and free (`None` for more than a `u64` counts), for metrics; `None` when IPAM does
    /// not work.
    pub async fn usage(&self) -> Option<(usize, Option<u64>)> {
        let snapshot = self.store.current();
        let ipam = self.ipam.lock().await;
        let ipam = ipam.as_ref().ok()?;
        if snapshot.cluster.ipam.in_use {
            let held = self.pools.get().map_or(0, |pools| pools.held().0);
            return Some((ipam.used(), u64::try_from(held.saturating_sub(ipam.used())).ok()));
        }
        let mut everywhere = ranges(&snapshot, &self.board.observed().desired.pod_cidrs, None);
        // Our own pods are counted as leases.
        everywhere.taken = BTreeMap::new();
        Some((ipam.used(), ipam.free(&everywhere)))
    }
}

fn key(request: &Request) -> Result<Key, Refusal> {
    let missing = |name: &str| Refusal::environment(format!("{name}: is not set"));
    if request.container_id.is_empty() {
        return Err(missing("CNI_CONTAINERID"));
    }
    if request.ifname.is_empty() {
        return Err(missing("CNI_IFNAME"));
    }
    Ok(Key { container_id: request.container_id.clone(), ifname: request.ifname.clone() })
}
