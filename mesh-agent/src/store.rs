//! The one place the sources write to: each change makes the next [`Snapshot`], and everyone who watches
//! sees whole snapshots only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keyservice::Incumbents;
use mesh_api::status::SourceStatus;
use tokio::sync::{mpsc, oneshot, watch};

use crate::snapshot::{Cluster, Endpoint, Local, Snapshot};

/// Asks a source to read everything again; answered when that is in the store.
pub type SyncRequest = oneshot::Sender<()>;

/// A handle on the store; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    snapshot: Arc<watch::Sender<Arc<Snapshot>>>,
    readers: Arc<Mutex<Vec<mpsc::Sender<SyncRequest>>>>,
}

impl Store {
    /// A store that counts as synced once every source named here has reported.
    pub fn new(sources: &[&str]) -> Self {
        let sources = sources
            .iter()
            .map(|name| SourceStatus { name: (*name).to_owned(), synced: false, objects: 0 })
            .collect::<Vec<_>>();
        let first = Snapshot { generation: 1, synced: sources.is_empty(), sources, ..Snapshot::default() };
        Self {
            snapshot: Arc::new(watch::Sender::new(Arc::new(first))),
            readers: Arc::new(Mutex::new(Vec::new())),
        }
    }

    /// The newest snapshot.
    pub fn current(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// Follows the snapshots; a slow reader skips to the newest.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }

    /// Changes the snapshot under the store's lock. The generation grows only if something did change.
    /// Returns the generation that holds the change.
    fn update(&self, change: impl FnOnce(&mut Snapshot)) -> u64 {
        let mut generation = 0;
        self.snapshot.send_if_modified(|current| {
            let mut next = Snapshot::clone(current);
            change(&mut next);
            next.synced = next.sources.iter().all(|source| source.synced);
            let changed = next != **current;
            if changed {
                next.generation += 1;
                *current = Arc::new(next);
            }
            generation = current.generation;
            changed
        });
        generation
    }

    /// A source has been read in full: `objects` is what it holds now.
    pub fn source_synced(&self, name: &str, objects: usize) -> u64 {
        self.update(|snapshot| report(snapshot, name, objects))
    }

    /// Source `name` has read all of the cluster's objects.
    pub fn set_cluster(&self, name: &str, cluster: Cluster, objects: usize) -> u64 {
        self.update(|snapshot| {
            if *snapshot.cluster != cluster {
                snapshot.cluster = Arc::new(cluster);
            }
            report(snapshot, name, objects);
        })
    }

    /// Source `name` could not be read: what it said before stays, with these issues beside it.
    pub fn set_cluster_issues(&self, issues: Vec<mesh_api::status::Issue>) -> u64 {
        self.update(|snapshot| {
            if snapshot.cluster.issues != issues {
                Arc::make_mut(&mut snapshot.cluster).issues = issues;
            }
        })
    }

    /// All the local pods' interfaces at once, as the IPAM journal has them after a restart.
    pub fn set_endpoints(&self, name: &str, endpoints: BTreeMap<String, Endpoint>) -> u64 {
        self.update(|snapshot| {
            let objects = endpoints.len();
            snapshot.endpoints = endpoints;
            report(snapshot, name, objects);
        })
    }

    /// CNI ADD made `interface`. Returns the generation to wait for.
    pub fn set_endpoint(&self, interface: &str, endpoint: Endpoint) -> u64 {
        self.update(|snapshot| {
            snapshot.endpoints.insert(interface.to_owned(), endpoint);
        })
    }

    /// CNI DEL took `interface` away. Returns the generation to wait for.
    pub fn remove_endpoint(&self, interface: &str) -> u64 {
        self.update(|snapshot| {
            snapshot.endpoints.remove(interface);
        })
    }

    /// What the node knows of itself has changed.
    pub fn update_local(&self, change: impl FnOnce(&mut Local)) -> u64 {
        self.update(|snapshot| change(&mut snapshot.local))
    }

    /// Whom the last plan admitted, to be remembered by the next.
    pub fn set_incumbents(&self, incumbents: Incumbents) -> u64 {
        self.update_local(|local| local.incumbents = incumbents)
    }

    /// Registers a source that can be asked to read again.
    pub fn register_reader(&self) -> mpsc::Receiver<SyncRequest> {
        let (sender, receiver) = mpsc::channel(16);
        self.readers().push(sender);
        receiver
    }

    /// Makes every source read again; the generation returned holds everything they had when called.
    pub async fn sync(&self) -> u64 {
        let readers = self.readers().clone();
        let mut answers = Vec::new();
        for reader in readers {
            let (done, answer) = oneshot::channel();
            if reader.send(done).await.is_ok() {
                answers.push(answer);
            }
        }
        for answer in answers {
            // A source that ended has nothing newer to say.
            let _ = answer.await;
        }
        self.current().generation
    }

    fn readers(&self) -> MutexGuard<'_, Vec<mpsc::Sender<SyncRequest>>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn report(snapshot: &mut Snapshot, name: &str, objects: usize) {
    match snapshot.sources.iter_mut().find(|source| source.name == name) {
        Some(source) => {
            source.synced = true;
            source.objects = objects;
        }
        None => snapshot.sources.push(SourceStatus { name: name.to_owned(), synced: true, objects }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_generation_grows_only_with_a_change() {
        let store = Store::new(&["directory"]);
        assert_eq!(store.current().generation, 1);
        assert!(!store.current().synced);
        assert_eq!(store.set_cluster("directory", Cluster::default(), 0), 2);
        assert!(store.current().synced);
        assert_eq!(store.set_cluster("directory", Cluster::default(), 0), 2);
        assert_eq!(store.remove_endpoint("mgy0"), 2);
        assert_eq!(store.update_local(|local| local.node_name = "a".into()), 3);
    }

    #[test]
    fn it_is_synced_only_when_every_source_has_reported() {
        let store = Store::new(&["directory", "cni"]);
        store.source_synced("cni", 0);
        assert!(!store.current().synced);
        store.set_cluster("directory", Cluster::default(), 0);
        assert!(store.current().synced);
    }

    #[test]
    fn an_unreadable_source_keeps_its_objects() {
        let store = Store::new(&["directory"]);
        let mut cluster = Cluster::default();
        cluster.nodes.insert("a".into(), Arc::default());
        store.set_cluster("directory", cluster, 1);
        store.set_cluster_issues(vec![mesh_api::status::Issue {
            object: "file .".into(),
            field: String::new(),
            reason: "Unreadable".into(),
            message: "gone".into(),
        }]);
        assert!(store.current().cluster.nodes.contains_key("a"));
        assert_eq!(store.current().cluster.issues.len(), 1);
    }

    #[tokio::test]
    async fn sync_waits_for_every_reader_and_tells_the_generation_that_holds_their_answer() {
        let store = Store::new(&["directory"]);
        let mut requests = store.register_reader();
        drop(store.register_reader());
        let reader = tokio::spawn({
            let store = store.clone();
            async move {
                let done = requests.recv().await.unwrap();
                store.set_cluster("directory", Cluster::default(), 0);
                done.send(()).unwrap();
            }
        });
        assert_eq!(store.sync().await, 2);
        reader.await.unwrap();
    }
}
