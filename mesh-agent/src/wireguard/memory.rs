//! A device that carries no packet: what the reconciler and its tests can be held against.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use ipnet::IpNet;
use keyservice::PublicKey;
use mesh_uapi::{Device, Op, Peer, PeerUpdate, Stats};

use super::{Datapath, DatapathError, Datapaths};

#[derive(Debug, Default)]
struct State {
    device: Device,
    applied: Vec<Op>,
    refuse: bool,
}

/// One device. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemoryDatapath(Arc<Mutex<State>>);

impl MemoryDatapath {
    /// With this to start from.
    pub fn new(device: Device) -> Self {
        Self(Arc::new(Mutex::new(State { device, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the device behind the agent's back.
    pub fn change(&self, change: impl FnOnce(&mut Device)) {
        change(&mut self.state().device);
    }

    /// Every operation since the last call.
    pub fn take_applied(&self) -> Vec<Op> {
        std::mem::take(&mut self.state().applied)
    }

    /// Refuses everything from now on, or no longer.
    pub fn refuse(&self, refuse: bool) {
        self.state().refuse = refuse;
    }
}

/// Carries out one operation on a device, as the UAPI defines it.
pub fn carry_out(device: &mut Device, op: &Op) {
    match op {
        Op::SetPrivateKey(key) => {
            device.public_key = Some(key.public());
            // A device does not talk to itself.
            device.peers.remove(&key.public());
        }
        Op::ClearPrivateKey => device.public_key = None,
        Op::RemoveAllPeers => device.peers.clear(),
        Op::SetListenPort(port) => device.listen_port = *port,
        Op::SetFwmark(mark) => device.fwmark = *mark,
        Op::SetPeer(key, update) => set_peer(device, *key, update),
        Op::RemovePeer(key) => drop(device.peers.remove(key)),
    }
}

fn set_peer(device: &mut Device, key: PublicKey, update: &PeerUpdate) {
    if device.public_key == Some(key) || update.update_only && !device.peers.contains_key(&key) {
        return;
    }
    for (other, peer) in &mut device.peers {
        if *other != key {
            peer.allowed_ips.retain(|prefix| !update.add_allowed_ips.contains(prefix));
        }
    }
    let peer: &mut Peer = device.peers.entry(key).or_default();
    if let Some(preshared) = &update.preshared_key {
        peer.has_preshared_key = !preshared.is_none();
    }
    peer.endpoint = update.endpoint.or(peer.endpoint);
    peer.persistent_keepalive = update.persistent_keepalive.unwrap_or(peer.persistent_keepalive);
    if update.replace_allowed_ips {
        peer.allowed_ips.clear();
    }
    peer.allowed_ips.extend(update.add_allowed_ips.iter().map(IpNet::trunc));
    peer.allowed_ips.retain(|prefix| !update.remove_allowed_ips.contains(prefix));
}

impl Datapath for MemoryDatapath {
    fn read(&self) -> BoxFuture<'_, Result<Device, DatapathError>> {
        Box::pin(async { Ok(self.state().device.clone()) })
    }

    fn apply(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<(), DatapathError>> {
        Box::pin(async move {
            let mut state = self.state();
            if state.refuse {
                return Err(DatapathError::Failed("refused".to_owned()));
            }
            for op in &ops {
                carry_out(&mut state.device, op);
            }
            state.applied.extend(ops);
            Ok(())
        })
    }

    fn stats(&self) -> BoxFuture<'_, Result<Option<Stats>, DatapathError>> {
        Box::pin(async { Ok(None) })
    }
}

/// Devices by name.
#[derive(Debug, Clone, Default)]
pub struct MemoryDatapaths(pub BTreeMap<String, MemoryDatapath>);

impl Datapaths for MemoryDatapaths {
    fn open(&self, name: &str) -> Box<dyn Datapath> {
        match self.0.get(name) {
            Some(device) => Box::new(device.clone()),
            None => Box::new(AbsentDatapath(name.to_owned())),
        }
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

/// A device that is not there.
struct AbsentDatapath(String);

impl AbsentDatapath {
    fn fail<T>(&self) -> Result<T, DatapathError> {
        Err(DatapathError::Absent(format!("no device {}", self.0)))
    }
}

impl Datapath for AbsentDatapath {
    fn read(&self) -> BoxFuture<'_, Result<Device, DatapathError>> {
        Box::pin(async { self.fail() })
    }

    fn apply(&self, _: Vec<Op>) -> BoxFuture<'_, Result<(), DatapathError>> {
        Box::pin(async { self.fail() })
    }

    fn stats(&self) -> BoxFuture<'_, Result<Option<Stats>, DatapathError>> {
        Box::pin(async { self.fail() })
    }
}
