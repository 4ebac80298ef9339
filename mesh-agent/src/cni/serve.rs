//! The socket: root only, a task per connection, one request each.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::refusal::Refusal;
use super::{Server, wire};

/// Requests at a time; a node starting up has no more pods than this in the making.
const AT_ONCE: usize = 64;

/// Binds a Unix socket at `path` with `mode`, in place of what a dead agent left. Another agent that still
/// answers there is an error.
pub fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let context = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(context(io::ErrorKind::AddrInUse.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(context)?;
        }
        Err(error) => return Err(context(error)),
    }
    // Under another name until its mode is right: no moment in which others could connect.
    let temporary = path.with_extension(format!("new.{}", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary).map_err(context)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode)).map_err(context)?;
    std::fs::rename(&temporary, path).map_err(context)?;
    Ok(listener)
}

/// Serves until cancelled; requests under way are finished, since a half-made pod is worse than a late one.
pub async fn serve(server: Arc<Server>, listener: UnixListener, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: they come back.
                tracing::warn!("cannot accept a CNI connection: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
        let server = Arc::clone(&server);
        tasks.spawn(async move {
            connection(&server, stream).await;
            drop(slot);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn connection(server: &Server, mut stream: UnixStream) {
    let reply = match authorised(&stream) {
        Ok(()) => match wire::receive(&stream).await {
            Ok((request, netns)) => server.handle(request, netns).await,
            Err(refusal) => {
                tracing::warn!("CNI request refused: {refusal}");
                refusal.into_reply()
            }
        },
        Err(refusal) => refusal.into_reply(),
    };
    if let Err(error) = wire::answer(&mut stream, &reply).await {
        tracing::warn!("cannot answer a CNI request: {error}");
    }
}

fn authorised(stream: &UnixStream) -> Result<(), Refusal> {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 => Ok(()),
        Ok(peer) => Err(Refusal::io(format!("only root may ask, not uid {}", peer.uid()))),
        Err(error) => Err(Refusal::io(format!("who asks is not known: {error}"))),
    }
}
