//! The server of WireGuard's UAPI: `/var/run/wireguard/IFNAME.sock`.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use mesh_uapi::codec::{self, Lines, Request};
use nix::sys::stat::{Mode, umask};
use zeroize::Zeroizing;

use crate::engine::{Engine, Exit};

/// Connections served at once; more wait.
const MAX_CONNECTIONS: usize = 32;
/// How long a client may be silent in the middle of a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the socket's file is looked for.
const WATCH: Duration = Duration::from_millis(250);

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Somebody answers on it.
    #[error("{0}: another process serves this interface")]
    Live(PathBuf),
    /// Something else has its name.
    #[error("{0}: exists and is no socket")]
    NotSocket(PathBuf),
    /// Some call failed.
    #[error("{path}: {call}: {source}")]
    Call {
        /// The socket or its directory.
        path: PathBuf,
        /// What was tried.
        call: &'static str,
        /// With its errno.
        source: io::Error,
    },
}

/// The listening socket and its file.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode of the file, to know it from one that another process puts in its place.
    identity: (u64, u64),
}

fn call<'a>(path: &'a Path, call: &'static str) -> impl FnOnce(io::Error) -> ServerError + 'a {
    move |source| ServerError::Call { path: path.to_owned(), call, source }
}

/// Refuses if another process serves `path`; a dead one's socket is removed.
pub fn claim(path: &Path) -> Result<(), ServerError> {
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => return Err(ServerError::NotSocket(path.to_owned())),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(call(path, "stat")(e)),
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ServerError::Live(path.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
            // `wg` removes stale sockets too, and may be the faster.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(call(path, "remove stale socket")),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(call(path, "connect")(e)),
    }
}

impl Server {
    /// Listens on `path` (0600), in a directory that is made (0700) if there is none.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        claim(path)?;
        if let Some(parent) = path.parent() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
            made.map_err(call(parent, "create directory"))?;
        }
        // Under another name until it listens: `wg` removes a socket that nobody answers on.
        let mut early = path.as_os_str().to_owned();
        early.push(".new");
        let early = Path::new(&early);
        match fs::remove_file(early) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(call(early, "remove stale socket")(e));
            }
            _ => {}
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(early);
        umask(before);
        let listener = bound.map_err(call(early, "bind"))?;
        fs::rename(early, path).map_err(call(path, "rename the socket"))?;
        let file = fs::symlink_metadata(path).map_err(call(path, "stat"))?;
        Ok(Self { path: path.to_owned(), listener, identity: (file.dev(), file.ino()) })
    }

    /// Goes on with a socket that another process bound to `path`.
    pub fn adopt(path: &Path, listener: UnixListener) -> Result<Self, ServerError> {
        let file = fs::symlink_metadata(path).map_err(call(path, "stat"))?;
        Ok(Self { path: path.to_owned(), listener, identity: (file.dev(), file.ino()) })
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Whether the socket's file is still the one bound here.
    pub fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.identity)
    }

    /// Removes the socket's file, if it is ours.
    pub fn remove(&self) {
        if self.is_there()
            && let Err(e) = fs::remove_file(&self.path)
        {
            tracing::warn!("{}: remove: {e}", self.path.display());
        }
    }

    /// Serves in threads of its own. Says through `exit` when the file is removed.
    pub fn start(self: &Arc<Self>, engine: &Arc<Engine>, exit: &Sender<Exit>) -> io::Result<()> {
        let (server, engine) = (self.clone(), engine.clone());
        thread::Builder::new().name("uapi".into()).spawn(move || server.accept(&engine))?;
        let (server, exit) = (self.clone(), exit.clone());
        thread::Builder::new().name("uapi-watch".into()).spawn(move || {
            while server.is_there() {
                thread::sleep(WATCH);
            }
            let _ = exit.send(Exit::SocketRemoved);
        })?;
        Ok(())
    }

    fn accept(&self, engine: &Arc<Engine>) {
        let open = Arc::new(AtomicUsize::new(0));
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) => {
                    tracing::warn!("{}: accept: {e}", self.path.display());
                    thread::sleep(WATCH);
                    continue;
                }
            };
            while open.load(Ordering::Acquire) >= MAX_CONNECTIONS {
                thread::sleep(Duration::from_millis(10));
            }
            open.fetch_add(1, Ordering::AcqRel);
            let (engine, slot) = (engine.clone(), Slot(open.clone()));
            let spawned = thread::Builder::new().name("uapi-conn".into()).spawn(move || {
                let _slot = slot;
                if let Err(e) = serve(&engine, &stream) {
                    tracing::debug!("uapi connection: {e}");
                }
            });
            if let Err(e) = spawned {
                tracing::warn!("{}: thread: {e}", self.path.display());
            }
        }
    }
}

/// One of the connections served at once, until it is dropped.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Serves the requests of one connection until it ends or goes silent.
fn serve(engine: &Engine, mut stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut lines = Lines::new(stream);
    loop {
        let reply = match codec::read_request(&mut lines) {
            Ok(None) => return Ok(()),
            Ok(Some(request)) => answer(engine, request),
            Err(error) => {
                tracing::warn!("uapi request refused: {error}");
                let reply = codec::render_errno(error.errno());
                stream.write_all(reply.as_bytes())?;
                return Ok(());
            }
        };
        stream.write_all(reply.as_bytes())?;
    }
}

fn answer(engine: &Engine, request: Request) -> Zeroizing<String> {
    match request {
        Request::Get => {
            let (mut device, private, preshared) = engine.device.view();
            let sockets = engine.sockets();
            device.listen_port = sockets.port;
            device.fwmark = sockets.fwmark;
            let preshared: std::collections::HashMap<_, _> = preshared.into_iter().collect();
            codec::get::render(&device, private.as_ref(), |key| preshared.get(key).cloned())
        }
        Request::Stats => Zeroizing::new(codec::stats::render(&engine.stats())),
        Request::Set(ops) => {
            let errno = engine.apply(&ops).map_or_else(
                |error| {
                    tracing::warn!("uapi request refused: {error}");
                    error.errno()
                },
                |()| 0,
            );
            Zeroizing::new(codec::render_errno(errno))
        }
    }
}
