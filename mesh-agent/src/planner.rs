//! Plans every new snapshot, and carries what the plan says besides: whom to remember, what to announce.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keyservice::publish::directory::DirectoryPublisher;
use keyservice::publish::{Publish as _, Published};
use keyservice::{Announcement, Incumbents, KeyClaim, SigningKey};
use mesh_api::status::Issue;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::desired::Desired;
use crate::plan::plan;
use crate::snapshot::Snapshot;
use crate::status::Board;
use crate::store::Store;

/// Until a failed write is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// The admitted peers' keys, by name.
pub type Claims = BTreeMap<String, Vec<KeyClaim>>;

/// Plans, remembers, announces.
pub struct Planner {
    /// Where snapshots come from.
    pub store: Store,
    /// Where plans are seen.
    pub board: Board,
    /// For the reconcilers.
    pub plans: watch::Sender<Arc<Desired>>,
    /// For the announcer.
    pub announcements: watch::Sender<Option<Announcement>>,
    /// For the rotation of keys: the admitted peers' keys, by name.
    pub claims: watch::Sender<Arc<Claims>>,
    /// File of the nodes admitted before.
    pub incumbents: PathBuf,
    /// What announcements are signed with, where they are.
    pub signing_key: SigningKey,
}

impl Planner {
    /// Plans every new snapshot, for ever.
    pub async fn run(self) {
        let mut snapshots = self.store.watch();
        let mut remembered = self.store.current().local.incumbents.clone();
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let planned = plan(&snapshot);
            let desired = Arc::new(planned.desired);
            self.claims.send_replace(Arc::new(planned.claims));
            self.board.planned(snapshot.clone(), desired.clone(), planned.issues);
            // On disk before anything of it is programmed: a restart must not forget whom this node
            // already talks to.
            let issue = self.remember(&mut remembered, &planned.incumbents);
            let failed = issue.is_some();
            self.board.set_issues("incumbents", issue.into_iter().collect());
            self.plans.send_replace(desired);
            self.store.set_incumbents(planned.incumbents);
            if snapshot.synced {
                let announcement = planned.announcement.map(|said| self.signed(&snapshot, said));
                self.announcements.send_if_modified(|old| replace(old, announcement));
            }
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { return },
                () = sleep(RETRY), if failed => {}
            }
        }
    }

    fn signed(&self, snapshot: &Snapshot, announcement: Announcement) -> Announcement {
        if !snapshot.cluster.mesh.first_use {
            return announcement;
        }
        let node = snapshot.cluster.nodes.get(&snapshot.local.node_name);
        announcement.signed(node.and_then(|node| node.uid.as_deref()), &self.signing_key)
    }

    fn remember(&self, remembered: &mut Incumbents, incumbents: &Incumbents) -> Option<Issue> {
        if remembered == incumbents {
            return None;
        }
        match incumbents.store(&self.incumbents) {
            Ok(()) => {
                *remembered = incumbents.clone();
                None
            }
            Err(error) => Some(Issue {
                object: format!("file {}", self.incumbents.display()),
                field: String::new(),
                reason: "NotRemembered".to_owned(),
                message: format!("{error}: after a restart this node may admit others"),
            }),
        }
    }
}

fn replace<T: PartialEq>(old: &mut T, new: T) -> bool {
    let changed = *old != new;
    *old = new;
    changed
}

/// Publishes each new announcement into the manifest directory, and again until it succeeds. It is looked
/// at every few seconds, since a carrier may have overwritten it.
pub async fn announce(
    manifests: PathBuf,
    mut announcements: watch::Receiver<Option<Announcement>>,
    board: Board,
) {
    /// Between two looks at what others see of us.
    const CHECK: Duration = Duration::from_secs(10);
    let mut said = None;
    loop {
        let announcement = announcements.borrow_and_update().clone();
        let mut wait = CHECK;
        if let Some(announcement) = announcement {
            let directory = manifests.clone();
            let name = announcement.name.clone();
            let write = move || DirectoryPublisher::new(directory).publish(&announcement);
            let problem = match tokio::task::spawn_blocking(write).await {
                Ok(Ok(Published::Changed)) => {
                    info!(node = name, "announced");
                    None
                }
                Ok(Ok(Published::Unchanged)) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            if problem.is_some() {
                wait = RETRY;
            }
            let issue = problem.as_ref().map(|problem| Issue {
                object: format!("Node/{name}"),
                field: "metadata.annotations".to_owned(),
                reason: "NotAnnounced".to_owned(),
                message: problem.clone(),
            });
            board.set_issues("announcement", issue.into_iter().collect());
            if let Some(problem) = problem.as_ref().filter(|problem| said.as_ref() != Some(*problem)) {
                warn!("cannot announce: {problem}");
            }
            said = problem;
        }
        tokio::select! {
            changed = announcements.changed() => if changed.is_err() { return },
            () = sleep(wait) => {}
        }
    }
}
