//! The running process's side: who asks on the hand-over socket gets the device.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;

use nix::sys::stat::{Mode, umask};

use super::socket::{self, Estate};
use super::transfer::Extent;
use crate::engine::{Engine, Exit};
use crate::server::Server;

/// The socket and its file.
#[derive(Debug)]
pub struct Service {
    path: PathBuf,
    listener: UnixListener,
    identity: (u64, u64),
}

impl Service {
    /// Listens on `path` (0600). A file that is there is a dead process's: we have the device.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(before);
        let listener = bound?;
        let file = fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), listener, identity: (file.dev(), file.ino()) })
    }

    /// Removes the socket's file, if it is ours still.
    pub fn remove(&self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            tracing::warn!("{}: remove: {e}", self.path.display());
        }
    }

    /// Serves in a thread of its own, until somebody has taken the device over.
    pub fn start(
        self: &Arc<Self>,
        engine: &Arc<Engine>,
        server: &Arc<Server>,
        exit: &Sender<Exit>,
    ) -> io::Result<()> {
        let (service, engine, server, exit) = (self.clone(), engine.clone(), server.clone(), exit.clone());
        thread::Builder::new().name("handover".into()).spawn(move || {
            loop {
                match service.listener.accept() {
                    Ok((stream, _)) => service.answer(&stream, &engine, &server, &exit),
                    Err(e) => {
                        tracing::warn!("{}: accept: {e}", service.path.display());
                        return;
                    }
                }
            }
        })?;
        Ok(())
    }

    fn answer(&self, stream: &UnixStream, engine: &Arc<Engine>, server: &Server, exit: &Sender<Exit>) {
        if !socket::may_ask(stream).unwrap_or(false) {
            tracing::warn!("{}: somebody who may not asked for the device", self.path.display());
            return;
        }
        // What is configured from here on would be lost.
        let configuring = engine.configuring();
        engine.stop();
        let sockets = engine.sockets();
        let estate = Estate {
            tun: engine.tun().as_fd(),
            listener: server.listener().as_fd(),
            sockets: [sockets.ipv4.as_ref(), sockets.ipv6.as_ref()],
        };
        match socket::give(stream, &engine.export(Extent::Everything), &estate) {
            Ok(true) => {
                let _ = exit.send(Exit::HandedOver);
                // Whoever waits to configure us is to see the connection break, and asks our successor.
                loop {
                    thread::park();
                }
            }
            refused => {
                tracing::warn!("the hand-over failed, so this process goes on: {refused:?}");
                if let Err(e) = engine.start(exit) {
                    let _ = exit.send(Exit::Failed(format!("threads: {e}")));
                }
            }
        }
        drop(configuring);
    }
}
