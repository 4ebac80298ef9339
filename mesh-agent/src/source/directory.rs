//! The file source: a directory tree of ordinary Kubernetes manifests, followed as it changes.
//!
//! inotify says when to look; a walk of the tree says what there is. A look every few seconds makes up for
//! events that never come (network file systems, a full queue).

pub mod edit;
pub mod file;
pub mod scan;
#[cfg(test)]
mod tests;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_api::status::Issue;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::assemble::{self, Entry};
use crate::store::{Store, SyncRequest};
use scan::Tree;
use watch::Watch;

/// The source's name in status.
pub const NAME: &str = "directory";
/// Quiet time after an event before looking, so that a burst of changes is one.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Longest a burst may put the look off.
const DEBOUNCE_LIMIT: Duration = Duration::from_millis(500);
/// A look without an event.
const RESCAN: Duration = Duration::from_secs(3);

/// Follows a directory for as long as it lives.
#[derive(Debug)]
pub struct DirectorySource {
    tree: Tree,
    watch: Watch,
    node_name: String,
    store: Store,
    requests: mpsc::Receiver<SyncRequest>,
}

impl DirectorySource {
    /// A source for `root`, whether it exists yet or not. `node_name` is this node's, for overrides.
    pub fn new(root: &Path, node_name: &str, store: Store) -> std::io::Result<Self> {
        Ok(Self {
            tree: Tree::new(root),
            watch: Watch::new()?,
            node_name: node_name.to_owned(),
            requests: store.register_reader(),
            store,
        })
    }

    /// Runs it until the task is aborted.
    pub fn spawn(self) -> JoinHandle<()> {
        tokio::spawn(self.run())
    }

    /// Looks, reports, waits, for ever.
    pub async fn run(mut self) {
        let mut timer = interval(RESCAN);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut waiting: Vec<SyncRequest> = Vec::new();
        loop {
            // Who asks to sync may have changed a file within the granularity of its times.
            let all = !waiting.is_empty();
            self = match self.look(all).await {
                Some(source) => source,
                None => return,
            };
            for done in waiting.drain(..) {
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            tokio::select! {
                biased;
                Some(done) = self.requests.recv() => {
                    waiting.push(done);
                    while let Ok(done) = self.requests.try_recv() {
                        waiting.push(done);
                    }
                }
                () = self.watch.changed() => self.settle(&mut waiting).await,
                _ = timer.tick() => {}
            }
        }
    }

    /// Waits until events have stopped for a moment. A sync does not wait.
    async fn settle(&mut self, waiting: &mut Vec<SyncRequest>) {
        let limit = Instant::now() + DEBOUNCE_LIMIT;
        loop {
            let quiet = (Instant::now() + DEBOUNCE).min(limit);
            tokio::select! {
                biased;
                Some(done) = self.requests.recv() => return waiting.push(done),
                () = sleep_until(quiet) => return,
                () = self.watch.changed() => {}
            }
        }
    }

    /// Reads the tree off the runtime's threads and tells the store. `None` when the runtime ends.
    async fn look(self, all: bool) -> Option<Self> {
        let looked = tokio::task::spawn_blocking(move || {
            let mut source = self;
            source.read(all);
            source
        });
        match looked.await {
            Ok(source) => Some(source),
            // A bug here must end this task as loudly as it would anywhere else.
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => None,
        }
    }

    fn read(&mut self, all: bool) {
        let watch = &self.watch;
        watch.add_parent_of(self.tree.root());
        let read = self.tree.scan(all, &mut |directory| watch.add(directory));
        match read {
            Ok(()) => {
                let entries: Vec<Entry<'_>> = self.tree.files().map(Entry::from).collect();
                let (mut cluster, objects) = assemble::assemble(&entries, &self.node_name);
                cluster.issues.extend(self.tree.problems().iter().map(|(path, message)| Issue {
                    object: format!("file {path}"),
                    field: String::new(),
                    reason: "Unreadable".into(),
                    message: message.clone(),
                }));
                self.store.set_cluster(NAME, cluster, objects);
            }
            Err(error) => {
                let root: PathBuf = self.tree.root().into();
                self.store.set_cluster_issues(vec![Issue {
                    object: format!("file {}", root.display()),
                    field: String::new(),
                    reason: "Unreadable".into(),
                    message: format!("{error}; what was read before stays in force"),
                }]);
            }
        }
    }
}
