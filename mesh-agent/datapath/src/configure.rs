//! Configuration of a device: applies the UAPI's operations and tells what is there.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ipnet::IpNet;
use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_noise::Remote;
use mesh_uapi::{Op, Peer as PeerView, PeerStats, PeerUpdate, Stats};

use crate::device::{Device, Identity, Member, Tables};
use crate::peer::Peer;

/// An operation that cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Its Diffie-Hellman result is known to everyone.
    #[error("peer {0}: the public key has low order")]
    LowOrderKey(PublicKey),
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
    /// Applies operations in order; those on sockets are the caller's ([`SocketChange`]). Packets pass between two
    /// of them, so that a thousand peers hold nothing up.
    pub fn apply(&self, ops: &[Op]) -> Result<(), Refusal> {
        check(ops)?;
        for op in ops {
            match op {
                Op::SetPrivateKey(key) => self.set_identity(Some(key.clone())),
                Op::ClearPrivateKey => self.set_identity(None),
                Op::SetListenPort(_) | Op::SetFwmark(_) => {}
                Op::RemoveAllPeers => self.remove_all(),
                Op::RemovePeer(key) => self.remove_peer(key),
                Op::SetPeer(key, update) => self.set_peer(*key, update),
            }
        }
        Ok(())
    }

    /// The device as `get=1` tells it, apart from the sockets; with the private key and each preshared key.
    pub fn view(&self) -> (mesh_uapi::Device, Option<PrivateKey>, Vec<(PublicKey, PresharedKey)>) {
        let tables = self.read();
        let mut device = mesh_uapi::Device::default();
        let mut preshared = Vec::new();
        device.public_key = tables.identity.as_ref().map(|id| id.noise.public());
        for (key, Member { peer, allowed_ips }) in &tables.peers {
            let state = peer.lock();
            preshared.extend(state.preshared_key.clone().map(|secret| (*key, secret)));
            let view = PeerView {
                has_preshared_key: state.preshared_key.is_some(),
                endpoint: peer.endpoint(),
                allowed_ips: allowed_ips.clone(),
                persistent_keepalive: state.timers.keepalive,
                last_handshake: state.last_handshake,
                rx_bytes: peer.traffic.rx_bytes.load(Ordering::Relaxed),
                tx_bytes: peer.traffic.tx_bytes.load(Ordering::Relaxed),
            };
            device.peers.insert(*key, view);
        }
        (device, tables.identity.as_ref().map(|id| id.key.clone()), preshared)
    }

    /// The counters; what the TUN and the sockets do is the engine's to add.
    pub fn stats(&self) -> Stats {
        let tables = self.read();
        let peers = tables.peers.iter().map(|(key, member)| (*key, member.peer.stats()));
        Stats {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mtu: u32::try_from(self.mtu()).unwrap_or(u32::MAX),
            drops: self.drops.by_name(true),
            peers: peers.filter(|(_, stats)| *stats != PeerStats::default()).collect(),
            core: "mesh-noise".to_owned(),
            crypto: self.cipher.name().to_owned(),
            ..Stats::default()
        }
    }

    fn set_identity(&self, key: Option<PrivateKey>) {
        let identity = key.map(|key| Arc::new(Identity::new(key)));
        let mut tables = self.write();
        let public = |identity: &Option<Arc<Identity>>| identity.as_ref().map(|id| id.noise.public());
        if public(&tables.identity) == public(&identity) {
            return;
        }
        // A device is no peer of itself.
        if let Some(own) = public(&identity) {
            self.take_peer(&mut tables, &own);
        }
        // Cookies of the old key are worth nothing to the new one.
        *self.gate() = None;
        tables.identity = identity;
        let peers: Vec<_> = tables.peers.values().map(|member| member.peer.clone()).collect();
        peers.iter().for_each(|peer| self.restart(tables.identity.as_deref(), peer));
    }

    /// Lets the peer begin afresh, as a new key demands; without `identity` it ends. Packets that wait stay.
    fn restart(&self, identity: Option<&Identity>, peer: &Arc<Peer>) {
        self.stop(peer);
        let mut state = peer.lock();
        let preshared = state.preshared_key.as_ref();
        // Refused only for a key of low order, which was checked.
        let remote = identity.and_then(|id| Remote::new(&id.noise, &peer.key, preshared).ok());
        state.remote = remote;
        state.timers.restart();
    }

    /// Ends every session and handshake of the peer.
    fn stop(&self, peer: &Peer) {
        let mut state = peer.lock();
        self.forget_pending(&mut state);
        state.remote = None;
        peer.sending.store(None);
        let sessions = std::mem::take(&mut state.sessions);
        let mut indices = self.indices();
        sessions.all().for_each(|session| indices.remove(session.keypair.local_index));
        state.last_handshake = None;
        peer.traffic.forget_times();
    }

    fn remove_all(&self) {
        let mut tables = self.write();
        let keys: Vec<_> = tables.peers.keys().copied().collect();
        keys.iter().for_each(|key| self.take_peer(&mut tables, key));
    }

    fn remove_peer(&self, key: &PublicKey) {
        self.take_peer(&mut self.write(), key);
    }

    fn take_peer(&self, tables: &mut Tables, key: &PublicKey) {
        let Some(member) = tables.peers.remove(key) else { return };
        for prefix in &member.allowed_ips {
            tables.allowed_ips.remove(prefix);
        }
        self.stop(&member.peer);
    }

    fn set_peer(&self, key: PublicKey, update: &PeerUpdate) {
        let (identity, known) = {
            let tables = self.read();
            (tables.identity.clone(), tables.peers.get(&key).map(|member| member.peer.clone()))
        };
        if identity.as_ref().is_some_and(|id| id.noise.public() == key) {
            return;
        }
        let (peer, new) = match known {
            Some(peer) => (peer, false),
            None if update.update_only => return,
            None => (Arc::new(Peer::new(key)), true),
        };
        set_fields(&peer, update);
        if new {
            // Its first key agreement takes long, so it is done before anybody has to wait.
            self.restart(identity.as_deref(), &peer);
        }
        let mut tables = self.write();
        if new {
            tables.peers.insert(key, Member { peer: peer.clone(), allowed_ips: Default::default() });
        }
        tables.set_allowed_ips(&peer, update);
    }
}

/// Sets the plain fields. Sessions live on under a new preshared key; the next handshake has it.
fn set_fields(peer: &Peer, update: &PeerUpdate) {
    let mut state = peer.lock();
    if let Some(endpoint) = update.endpoint {
        peer.set_endpoint(endpoint);
    }
    if let Some(seconds) = update.persistent_keepalive {
        // A keepalive that is switched on is sent at once, and brings the tunnel up.
        state.timers.keepalive_now |= state.timers.keepalive == 0 && seconds > 0;
        state.timers.keepalive = seconds;
    }
    if update.initiate {
        state.timers.initiate_now = true;
        state.timers.hurry();
    }
    if let Some(wanted) = &update.preshared_key {
        let wanted = (!wanted.is_none()).then(|| wanted.clone());
        if state.preshared_key != wanted {
            if let Some(remote) = &mut state.remote {
                remote.set_preshared_key(wanted.as_ref());
            }
            state.preshared_key = wanted;
            state.timers.hurry();
        }
    }
}

impl Tables {
    fn set_allowed_ips(&mut self, peer: &Arc<Peer>, update: &PeerUpdate) {
        if update.replace_allowed_ips
            && let Some(member) = self.peers.get_mut(&peer.key)
        {
            for prefix in std::mem::take(&mut member.allowed_ips) {
                self.allowed_ips.remove(&prefix);
            }
        }
        for prefix in &update.remove_allowed_ips {
            self.remove_prefix(&peer.key, prefix);
        }
        for prefix in &update.add_allowed_ips {
            self.add_prefix(peer, prefix.trunc());
        }
    }

    fn remove_prefix(&mut self, key: &PublicKey, prefix: &IpNet) {
        if let Some(member) = self.peers.get_mut(key)
            && member.allowed_ips.remove(&prefix.trunc())
        {
            self.allowed_ips.remove(&prefix.trunc());
        }
    }

    fn add_prefix(&mut self, peer: &Arc<Peer>, prefix: IpNet) {
        if let Some(previous) = self.allowed_ips.insert(prefix, peer.clone())
            && let Some(member) = self.peers.get_mut(&previous.key)
        {
            member.allowed_ips.remove(&prefix);
        }
        if let Some(member) = self.peers.get_mut(&peer.key) {
            member.allowed_ips.insert(prefix);
        }
    }
}
