//! A cluster's API server as the source of objects: what a directory of manifests says, said by watches.

mod follow;
mod item;
mod shelf;

use std::time::Duration;

use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::assemble;
use super::decode::Kind;
use crate::store::{Store, SyncRequest};
use follow::{Heard, follow};
use shelf::Shelf;

/// Name of this source in the store.
pub const NAME: &str = "kubernetes";

/// No change for so long, or so long after the first: a burst of changes is one snapshot.
const QUIET: Duration = Duration::from_millis(20);
const LONGEST_BURST: Duration = Duration::from_millis(200);
/// Putting a snapshot together takes at most this part of a core: one in so many.
const SHARE: u32 = 5;
/// Heard and not yet taken; followers wait then.
const QUEUE: usize = 1024;

/// Follows the API server for as long as it lives.
pub struct KubernetesSource {
    client: Client,
    node_name: String,
    store: Store,
    requests: mpsc::Receiver<SyncRequest>,
    kinds: Vec<Kind>,
}

impl std::fmt::Debug for KubernetesSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubernetesSource").field("node_name", &self.node_name).finish_non_exhaustive()
    }
}

impl KubernetesSource {
    /// Over this connection. `node_name` is this node's, for overrides.
    pub fn new(client: Client, node_name: &str, store: Store) -> Self {
        let (node_name, requests) = (node_name.to_owned(), store.register_reader());
        Self { client, node_name, requests, store, kinds: Kind::ALL.to_vec() }
    }

    /// Follows these kinds only: what the others would say does not count.
    #[must_use]
    pub fn following(self, kinds: &[Kind]) -> Self {
        Self { kinds: kinds.to_vec(), ..self }
    }

    /// Listens, reports, for ever.
    pub async fn run(mut self) {
        let (tell, mut heard) = mpsc::channel(QUEUE);
        let (ask, asked) = watch::channel(0);
        let mut followers = self.followers(&tell, &asked);
        drop(tell);
        let mut shelf = Shelf::new(&self.kinds);
        let mut due: Option<(Instant, Instant)> = None;
        let mut not_before = Instant::now();
        let mut waiting: Vec<SyncRequest> = Vec::new();
        let mut missing: Vec<Kind> = Vec::new();
        let mut listed = false;
        loop {
            let at = due.map(|(quiet, limit)| quiet.min(limit).max(not_before));
            tokio::select! {
                biased;
                Some(request) = self.requests.recv() => {
                    waiting.push(request);
                    missing.clone_from(&self.kinds);
                    ask.send_modify(|count| *count += 1);
                }
                told = heard.recv() => {
                    let Some((kind, what)) = told else { return };
                    // One that cannot be asked holds nobody up.
                    if matches!(what, Heard::All(_) | Heard::Silent(..)) {
                        missing.retain(|other| *other != kind);
                    }
                    let now = Instant::now();
                    listed |= matches!(what, Heard::All(_));
                    if shelf.take(kind, what) {
                        let limit = due.map_or(now + LONGEST_BURST, |(_, limit)| limit);
                        due = Some((now + QUIET, limit));
                    }
                    if missing.is_empty() && !waiting.is_empty() {
                        self.report(&shelf);
                        (due, not_before) = (None, after(now));
                        for done in waiting.drain(..) {
                            // Whoever asked may have gone.
                            let _ = done.send(());
                        }
                    }
                }
                () = sleep_until(at.unwrap_or(not_before)), if at.is_some() => {
                    let now = Instant::now();
                    self.report(&shelf);
                    if std::mem::take(&mut listed) && shelf.is_whole() {
                        crate::memory::give_back();
                    }
                    (due, not_before) = (None, after(now));
                }
                Some(ended) = followers.join_next() => {
                    // They end when we do; a bug in one must end this task as loudly as it would anywhere else.
                    if let Err(error) = ended && error.is_panic() {
                        std::panic::resume_unwind(error.into_panic());
                    }
                    return;
                }
            }
        }
    }

    fn followers(&self, tell: &mpsc::Sender<(Kind, Heard)>, asked: &watch::Receiver<u64>) -> JoinSet<()> {
        let mut followers = JoinSet::new();
        for kind in &self.kinds {
            let (client, tell, asked) = (self.client.clone(), tell.clone(), asked.clone());
            match kind {
                Kind::MeshConfiguration => {
                    followers.spawn(follow::<item::MeshConfiguration>(client, tell, asked))
                }
                Kind::Node => followers.spawn(follow::<item::Node>(client, tell, asked)),
                Kind::Namespace => followers.spawn(follow::<item::Namespace>(client, tell, asked)),
                Kind::Pod => followers.spawn(follow::<item::Pod>(client, tell, asked)),
                Kind::Service => followers.spawn(follow::<item::Service>(client, tell, asked)),
                Kind::NetworkPolicy => followers.spawn(follow::<item::NetworkPolicy>(client, tell, asked)),
                Kind::IpPool => followers.spawn(follow::<item::IpPool>(client, tell, asked)),
                Kind::IpReservation => followers.spawn(follow::<item::IpReservation>(client, tell, asked)),
                Kind::IpBlock => followers.spawn(follow::<item::IpBlock>(client, tell, asked)),
            };
        }
        followers
    }

    /// A cluster of which a part has never been heard is none: without its policies it would be open, without its
    /// nodes nobody would be in the mesh.
    fn report(&self, shelf: &Shelf) {
        if !shelf.is_whole() {
            self.store.set_cluster_issues(shelf.issues());
            return;
        }
        let (mut cluster, objects) = assemble::of_server(shelf.objects(), &self.node_name);
        cluster.issues.extend(shelf.issues());
        self.store.set_cluster(NAME, cluster, objects);
    }
}

/// When the next report may be, after one that began at `start`.
fn after(start: Instant) -> Instant {
    let now = Instant::now();
    now + now.saturating_duration_since(start) * (SHARE - 1)
}
