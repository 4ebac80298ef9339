//! Configuration of a device: applies the UAPI's operations and tells what is there.

use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_uapi::{Op, Peer as PeerView, PeerUpdate, Stats};
use rand::Rng;

use crate::device::{Device, Entry, Identity, Tables};
use crate::peer::Peer;

/// An operation that cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Its Diffie-Hellman result is known to everyone.
    #[error("peer {0}: the public key has low order")]
    LowOrderKey(PublicKey),
    /// Millions of peers.
    #[error("peer {0}: no receiver index is left")]
    TooManyPeers(PublicKey),
}

/// What to do with the sockets; the core has none.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct SocketChange {
    /// The last `listen_port=`.
    pub port: Option<u16>,
    /// The last `fwmark=`.
    pub fwmark: Option<u32>,
}

impl SocketChange {
    /// What `ops` ask of the sockets.
    pub fn of(ops: &[Op]) -> Self {
        let mut change = Self::default();
        for op in ops {
            match op {
                Op::SetListenPort(port) => change.port = Some(*port),
                Op::SetFwmark(mark) => change.fwmark = Some(*mark),
                _ => {}
            }
        }
        change
    }
}

/// Refuses a request before any of it is applied.
pub fn check(ops: &[Op]) -> Result<(), Refusal> {
    for op in ops {
        if let Op::SetPeer(key, _) = op
            && key.is_low_order()
        {
            return Err(Refusal::LowOrderKey(*key));
        }
    }
    Ok(())
}

impl Device {
    /// Applies operations in order; those on sockets are the caller's ([`SocketChange`]).
    pub fn apply(&self, ops: &[Op], now: Instant, rng: &mut impl Rng) -> Result<(), Refusal> {
        check(ops)?;
        let mut tables = self.write();
        for op in ops {
            match op {
                Op::SetPrivateKey(key) => tables.set_identity(Some(key.clone()), now, rng)?,
                Op::ClearPrivateKey => tables.set_identity(None, now, rng)?,
                Op::SetListenPort(_) | Op::SetFwmark(_) => {}
                Op::RemoveAllPeers => tables.remove_all(),
                Op::RemovePeer(key) => tables.remove_peer(key),
                Op::SetPeer(key, update) => tables.set_peer(*key, update, now, rng)?,
            }
        }
        Ok(())
    }

    /// The device as `get=1` tells it, apart from the sockets; with the private key and each preshared key.
    pub fn view(&self) -> (mesh_uapi::Device, Option<PrivateKey>, Vec<(PublicKey, PresharedKey)>) {
        let tables = self.read();
        let mut device = mesh_uapi::Device::default();
        let mut preshared = Vec::new();
        device.public_key = tables.identity.as_ref().map(|id| id.key.public());
        for (key, Entry { peer, allowed_ips }) in &tables.peers {
            let state = peer.lock();
            preshared.extend(state.preshared_key.clone().map(|secret| (*key, secret)));
            let view = PeerView {
                has_preshared_key: state.preshared_key.is_some(),
                endpoint: state.endpoint,
                allowed_ips: allowed_ips.clone(),
                persistent_keepalive: state.timers.keepalive,
                last_handshake: state.last_handshake,
                rx_bytes: state.rx_bytes,
                tx_bytes: state.tx_bytes,
            };
            device.peers.insert(*key, view);
        }
        (device, tables.identity.as_ref().map(|id| id.key.clone()), preshared)
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        let tables = self.read();
        let peers = tables.peers.iter().map(|(key, entry)| (*key, entry.peer.drops.by_name(false)));
        Stats {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mtu: u32::try_from(self.mtu()).unwrap_or(u32::MAX),
            drops: self.drops.by_name(true),
            peers: peers.filter(|(_, drops)| !drops.is_empty()).collect(),
        }
    }
}

impl Tables {
    fn set_identity(
        &mut self,
        key: Option<PrivateKey>,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Result<(), Refusal> {
        let same = match (&self.identity, &key) {
            (Some(old), Some(new)) => old.key.public() == new.public(),
            (None, None) => true,
            _ => false,
        };
        if same {
            return Ok(());
        }
        // A device is no peer of itself.
        if let Some(own) = key.as_ref().map(PrivateKey::public) {
            self.remove_peer(&own);
        }
        self.identity = key.map(|key| Identity::new(key, now));
        let peers: Vec<_> = self.peers.values().map(|entry| entry.peer.clone()).collect();
        peers.iter().try_for_each(|peer| self.restart(peer, now, rng))
    }

    /// Gives the peer a fresh tunnel under a new index, or none while there is no private key.
    fn restart(&mut self, peer: &Arc<Peer>, now: Instant, rng: &mut impl Rng) -> Result<(), Refusal> {
        let mut state = peer.lock();
        if let Some(index) = state.index {
            self.indices.remove(index);
        }
        state.stop();
        if let Some(identity) = &self.identity {
            let index = self.indices.insert(peer.clone(), rng).ok_or(Refusal::TooManyPeers(peer.key))?;
            state.restart(&identity.secret, &peer.key, identity.no_limit.clone(), index, now);
        }
        Ok(())
    }

    fn remove_all(&mut self) {
        let keys: Vec<_> = self.peers.keys().copied().collect();
        keys.iter().for_each(|key| self.remove_peer(key));
    }

    fn remove_peer(&mut self, key: &PublicKey) {
        let Some(entry) = self.peers.remove(key) else { return };
        for prefix in &entry.allowed_ips {
            self.allowed_ips.remove(prefix);
        }
        let mut state = entry.peer.lock();
        if let Some(index) = state.index {
            self.indices.remove(index);
        }
        state.stop();
    }

    fn set_peer(
        &mut self,
        key: PublicKey,
        update: &PeerUpdate,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Result<(), Refusal> {
        if self.identity.as_ref().is_some_and(|id| id.key.public() == key) {
            return Ok(());
        }
        let (peer, new) = match self.peers.get(&key) {
            Some(entry) => (entry.peer.clone(), false),
            None if update.update_only => return Ok(()),
            None => {
                let peer = Arc::new(Peer::new(key, now));
                self.peers.insert(key, Entry { peer: peer.clone(), allowed_ips: Default::default() });
                (peer, true)
            }
        };
        let changed = self.set_fields(&peer, update);
        if new || changed {
            self.restart(&peer, now, rng)?;
        }
        if update.replace_allowed_ips
            && let Some(entry) = self.peers.get_mut(&key)
        {
            for prefix in std::mem::take(&mut entry.allowed_ips) {
                self.allowed_ips.remove(&prefix);
            }
        }
        for prefix in &update.remove_allowed_ips {
            self.remove_prefix(&key, prefix);
        }
        for prefix in &update.add_allowed_ips {
            self.add_prefix(&peer, prefix.trunc());
        }
        Ok(())
    }

    /// Sets the plain fields; true if the tunnel has to start afresh.
    fn set_fields(&self, peer: &Peer, update: &PeerUpdate) -> bool {
        let mut state = peer.lock();
        if let Some(endpoint) = update.endpoint {
            state.endpoint = Some(endpoint);
        }
        if let Some(seconds) = update.persistent_keepalive {
            // A keepalive that is switched on is sent at once, and brings the tunnel up.
            state.timers.keepalive_now |= state.timers.keepalive == 0 && seconds > 0;
            state.timers.keepalive = seconds;
        }
        let Some(wanted) = &update.preshared_key else { return false };
        let wanted = (!wanted.is_none()).then(|| wanted.clone());
        let changed = state.preshared_key != wanted;
        state.preshared_key = wanted;
        changed
    }

    fn remove_prefix(&mut self, key: &PublicKey, prefix: &IpNet) {
        if let Some(entry) = self.peers.get_mut(key)
            && entry.allowed_ips.remove(&prefix.trunc())
        {
            self.allowed_ips.remove(&prefix.trunc());
        }
    }

    fn add_prefix(&mut self, peer: &Arc<Peer>, prefix: IpNet) {
        if let Some(previous) = self.allowed_ips.insert(prefix, peer.clone())
            && let Some(entry) = self.peers.get_mut(&previous.key)
        {
            entry.allowed_ips.remove(&prefix);
        }
        if let Some(entry) = self.peers.get_mut(&peer.key) {
            entry.allowed_ips.insert(prefix);
        }
    }
}
