//! inotify on every directory of the tree.

use std::io;
use std::path::Path;

use futures::{FutureExt, StreamExt};
use inotify::{EventStream, Inotify, WatchMask, Watches};

/// What is worth a look: entries that came, went or were written, and the directory itself going.
fn mask() -> WatchMask {
    WatchMask::ATTRIB
        | WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
}

/// Directories under watch. The kernel drops the watch of one that is deleted, and keeps one for each inode.
pub(super) struct Watch {
    events: Option<EventStream<Vec<u8>>>,
    watches: Watches,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("working", &self.events.is_some()).finish_non_exhaustive()
    }
}

impl Watch {
    /// An empty queue. Must be called within a Tokio runtime.
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let watches = inotify.watches();
        Ok(Self { events: Some(inotify.into_event_stream(vec![0; 16 * 1024])?), watches })
    }

    /// Watches `directory`, if it is there. Without a watch (`fs.inotify.max_user_watches`) changes are
    /// found by the timer.
    pub(super) fn add(&self, directory: &Path) {
        if let Err(error) = self.watches.clone().add(directory, mask())
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(directory = %directory.display(), %error, "no watch");
        }
    }

    /// Watches the nearest directory above `path` that exists, where `path` may come and go.
    pub(super) fn add_parent_of(&self, path: &Path) {
        if let Some(parent) = path.ancestors().skip(1).find(|ancestor| ancestor.is_dir()) {
            self.add(parent);
        }
    }

    /// Returns when something has changed, having taken all events there are. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        let Some(events) = &mut self.events else { return std::future::pending().await };
        let mut event = events.next().await;
        while let Some(Ok(_)) = event {
            match events.next().now_or_never() {
                Some(next) => event = next,
                None => return,
            }
        }
        tracing::warn!(?event, "inotify failed; the directory is read every few seconds");
        self.events = None;
    }
}
