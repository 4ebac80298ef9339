//! The sockets and who may use them.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

use axum::Router;
use axum::serve::Listener;
use mesh_api::defaults;
use mesh_api::status::Issue;
use nix::unistd::{Gid, Group, chown};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use super::Api;
use crate::cni::serve::bind;
use crate::status::Board;

/// May read status.
const GROUP: &str = "margay";
/// Reporter of our issues on the board.
const REPORTER: &str = "api";

fn at(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The group's number, if it exists on this host.
fn group() -> Option<Gid> {
    Group::from_name(GROUP).ok().flatten().map(|group| group.gid)
}

/// Makes the run directory, 0750, passable for the group `margay` if there is one.
pub fn prepare_run_dir(run_dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(run_dir).map_err(at(run_dir))?;
    std::fs::set_permissions(run_dir, std::fs::Permissions::from_mode(0o750)).map_err(at(run_dir))?;
    give_to_group(run_dir)
}

fn give_to_group(path: &Path) -> io::Result<()> {
    match group() {
        Some(group) => chown(path, None, Some(group)).map_err(|errno| at(path)(errno.into())),
        None => Ok(()),
    }
}

/// Serves `control.sock` and `status.sock` in `run_dir` and TCP on `metrics` until cancelled. The sockets
/// are needed; a TCP address that cannot be bound is an issue.
pub async fn serve(api: Api, run_dir: &Path, metrics: &str, cancel: CancellationToken) -> io::Result<()> {
    let tcp = bind_tcp(metrics, &api.board).await;
    let control = RootOnly(bind(&run_dir.join(defaults::CONTROL_SOCKET), 0o600)?);
    let status_path = run_dir.join(defaults::STATUS_SOCKET);
    let status = bind(&status_path, 0o660)?;
    give_to_group(&status_path)?;
    let ended = || cancel.clone().cancelled_owned();
    let control = axum::serve(control, api.control()).with_graceful_shutdown(ended());
    let status = axum::serve(status, api.reads()).with_graceful_shutdown(ended());
    let health = async {
        match tcp {
            Some(listener) => serve_tcp(listener, api.health(), ended()).await,
            None => Ok(()),
        }
    };
    tokio::try_join!(control.into_future(), status.into_future(), health).map(|_| ())
}

async fn bind_tcp(address: &str, board: &Board) -> Option<TcpListener> {
    match TcpListener::bind(address).await {
        Ok(listener) => Some(listener),
        Err(error) => {
            let message = format!("health and metrics are not served: {error}");
            tracing::warn!(address, "{message}");
            board.set_issues(
                REPORTER,
                vec![Issue {
                    object: format!("address {address}"),
                    field: "metricsAddress".to_owned(),
                    reason: "MetricsAddressUnavailable".to_owned(),
                    message,
                }],
            );
            None
        }
    }
}

async fn serve_tcp(
    listener: TcpListener,
    router: Router,
    ended: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router).with_graceful_shutdown(ended).await
}

/// Closes connections of anyone but root, whatever happened to the file's mode.
struct RootOnly(UnixListener);

impl Listener for RootOnly {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = Listener::accept(&mut self.0).await;
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == 0 => return (stream, address),
                Ok(peer) => tracing::warn!(uid = peer.uid(), "control.sock is for root only"),
                Err(error) => tracing::warn!("who is on control.sock is not known: {error}"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}
