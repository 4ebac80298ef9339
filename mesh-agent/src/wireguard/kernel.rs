//! WireGuard in the kernel, driven over generic netlink (include/uapi/linux/wireguard.h).
//!
//! `socket` carries requests, `dump` reads what the kernel tells, `set` makes requests of operations.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use ipnet::IpNet;
use keyservice::PublicKey;
use mesh_uapi::{Device, Op, Stats};
use netlink_packet_wireguard::WireguardAttribute;

use super::{Datapath, DatapathError};

mod dump;
mod set;
mod socket;
#[cfg(test)]
mod tests;

use set::{Request, requests};
use socket::Socket;

/// A dump that others' changes broke off is begun again so often.
const DUMPS: usize = 20;
/// For a port that a datapath which has just ended has not let go of yet: so often, and so long between.
const PORT_TRIES: usize = 100;
const PORT_PAUSE: Duration = Duration::from_millis(20);

/// What is known of the kernel's WireGuard. Clones share one socket, on which one request or dump runs at a time.
#[derive(Debug, Clone)]
pub struct Kernel(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    socket: Option<Socket>,
    /// The kernel refused to take a single allowed IP away (it can since Linux 6.16).
    lacks_removal: bool,
}

impl Kernel {
    /// Of this kernel. Sockets are opened when they are first needed.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(State { socket: None, lacks_removal: false })))
    }

    /// Whether the kernel has WireGuard; asking loads the module where there is one.
    ///
    /// # Errors
    /// It could not be asked.
    pub fn has_wireguard(&self) -> io::Result<bool> {
        self.state().socket().map(|_| true).or_else(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::EPROTONOSUPPORT) => Ok(false),
            _ => Err(error),
        })
    }

    /// The device `name`.
    pub fn open(&self, name: &str) -> KernelDatapath {
        KernelDatapath { name: name.to_owned(), kernel: self.clone() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn socket(&mut self) -> io::Result<&mut Socket> {
        if self.socket.is_none() {
            self.socket = Some(Socket::open()?);
        }
        self.socket.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn read(&mut self, name: &str) -> io::Result<Device> {
        let socket = self.socket()?;
        for _ in 0..DUMPS {
            let mut device = Device::default();
            match socket.dump(name, |part| dump::join(&mut device, part)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return outcome.map(|()| device),
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "it changes faster than it can be read"))
    }

    fn apply(&mut self, name: &str, mut request: Request) -> io::Result<()> {
        match &mut request {
            Request::Set(attributes) => self.socket()?.set(std::mem::take(attributes)),
            Request::SetPort(port) => self.set_port(name, *port),
            Request::RemoveAllowedIps(key, prefixes) => self.remove(name, *key, prefixes),
        }
    }

    fn set_port(&mut self, name: &str, port: u16) -> io::Result<()> {
        let mut tries = 1;
        loop {
            match self.socket()?.set(set::device(name, WireguardAttribute::ListenPort(port))) {
                Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) && tries < PORT_TRIES => {
                    tries += 1;
                    std::thread::sleep(PORT_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    /// Takes single prefixes from a peer, the others being its own at every moment.
    fn remove(&mut self, name: &str, key: PublicKey, prefixes: &BTreeSet<IpNet>) -> io::Result<()> {
        if !self.lacks_removal {
            for request in set::removals(name, key, prefixes) {
                match self.socket()?.set(request) {
                    // A kernel that does not know the flag refuses the attribute.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                        return self.remove_by_moving(name, key, prefixes);
                    }
                    outcome => outcome?,
                }
            }
            return Ok(());
        }
        self.remove_by_moving(name, key, prefixes)
    }

    /// Before Linux 6.16: a prefix goes to a peer that nobody is, which goes in the same request. Each move is atomic,
    /// and the kernel carries out a whole request before anyone else's.
    fn remove_by_moving(&mut self, name: &str, key: PublicKey, prefixes: &BTreeSet<IpNet>) -> io::Result<()> {
        // Not what is another's by now: the move would take it from there.
        let device = self.read(name)?;
        let Some(peer) = device.peers.get(&key) else { return Ok(()) };
        let owned: BTreeSet<IpNet> = prefixes.intersection(&peer.allowed_ips).copied().collect();
        let nobody = PublicKey::from_bytes(rand::random());
        for request in set::moves(name, nobody, &owned) {
            self.socket()?.set(request)?;
        }
        self.lacks_removal = true;
        Ok(())
    }
}

/// One kernel device.
#[derive(Debug, Clone)]
pub struct KernelDatapath {
    name: String,
    kernel: Kernel,
}

impl KernelDatapath {
    // The answers come at once, but the kernel takes locks for them: a runtime's thread must not wait.
    async fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut State, &str) -> Result<T, DatapathError> + Send + 'static,
    ) -> Result<T, DatapathError> {
        let Self { name, kernel } = self.clone();
        let answer = tokio::task::spawn_blocking(move || request(&mut kernel.state(), &name)).await;
        answer.map_err(|error| DatapathError::Failed(error.to_string()))?
    }
}

fn failed(name: &str, what: &str, error: &io::Error) -> DatapathError {
    let message = format!("kernel device {name}: {what}: {error}");
    match error.raw_os_error() {
        Some(libc::ENODEV) => DatapathError::Absent(message),
        _ => DatapathError::Failed(message),
    }
}

impl Datapath for KernelDatapath {
    fn read(&self) -> BoxFuture<'_, Result<Device, DatapathError>> {
        Box::pin(self.ask(|state, name| state.read(name).map_err(|error| failed(name, "read", &error))))
    }

    fn apply(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<(), DatapathError>> {
        Box::pin(self.ask(move |state, name| {
            for request in requests(name, ops) {
                let what = request.to_string();
                state.apply(name, request).map_err(|error| failed(name, &what, &error))?;
            }
            Ok(())
        }))
    }

    /// The kernel counts bytes only.
    fn stats(&self) -> BoxFuture<'_, Result<Option<Stats>, DatapathError>> {
        Box::pin(async { Ok(None) })
    }
}
