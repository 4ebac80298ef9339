//! A device behind a UAPI socket: mesh-datapath's, wireguard-go's or any other's.

use std::path::PathBuf;

use futures::future::BoxFuture;
use mesh_uapi::client::{Client, ClientError, SOCKET_DIR};
use mesh_uapi::{Device, Op, Stats};

use super::{Datapath, DatapathError, Datapaths};
use crate::own;

/// One device by its socket.
#[derive(Debug, Clone)]
pub struct UserspaceDatapath {
    client: Client,
}

impl UserspaceDatapath {
    /// Behind the socket at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { client: Client::new(path) }
    }

    /// Older versions of mesh-datapath do not name their core.
    async fn knows_initiate(&self) -> bool {
        self.ask(Client::stats).await.is_ok_and(|stats| !stats.core.is_empty())
    }

    // The client blocks, as everything that speaks the UAPI does; a runtime's thread must not.
    async fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(&Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T, DatapathError> {
        let client = self.client.clone();
        let answer = tokio::task::spawn_blocking(move || request(&client)).await;
        answer.map_err(|error| DatapathError::Failed(error.to_string()))?.map_err(|error| {
            let message = error.to_string();
            match error.is_absent() {
                true => DatapathError::Absent(message),
                false => DatapathError::Failed(message),
            }
        })
    }
}

/// The same operations for a device that has no extensions.
fn in_plain_uapi(ops: Vec<Op>) -> Vec<Op> {
    let plain = |op| match op {
        Op::SetPeer(key, update) => {
            update.in_plain_uapi().into_iter().map(|update| Op::SetPeer(key, update)).collect()
        }
        other => vec![other],
    };
    ops.into_iter().flat_map(plain).collect()
}

impl Datapath for UserspaceDatapath {
    fn read(&self) -> BoxFuture<'_, Result<Device, DatapathError>> {
        Box::pin(self.ask(Client::get))
    }

    fn apply(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<(), DatapathError>> {
        Box::pin(async move {
            let initiates = |op: &Op| matches!(op, Op::SetPeer(_, update) if update.initiate);
            // Others refuse a request with a line they do not know.
            let plain = ops.iter().any(initiates) && !self.knows_initiate().await;
            let ops = if plain { in_plain_uapi(ops) } else { ops };
            self.ask(move |client| client.apply(&ops)).await
        })
    }

    fn stats(&self) -> BoxFuture<'_, Result<Option<Stats>, DatapathError>> {
        Box::pin(async {
            match self.ask(Client::stats).await {
                Ok(stats) => Ok(Some(stats)),
                // Only mesh-datapath counts; the others refuse the question.
                Err(DatapathError::Failed(_)) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }
}

/// The devices of a directory of sockets.
#[derive(Debug, Clone)]
pub struct UserspaceDatapaths {
    directory: PathBuf,
}

impl UserspaceDatapaths {
    /// Sockets in `directory`.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }
}

impl Default for UserspaceDatapaths {
    fn default() -> Self {
        Self::new(SOCKET_DIR)
    }
}

impl Datapaths for UserspaceDatapaths {
    fn open(&self, name: &str) -> Box<dyn Datapath> {
        Box::new(UserspaceDatapath::new(self.directory.join(format!("{name}.sock"))))
    }

    fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return Vec::new() };
        let files = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let devices = files.filter_map(|file| file.strip_suffix(".sock").map(str::to_owned));
        devices.filter(|name| own::is_device(name)).collect()
    }
}
