//! The device without I/O: what comes in, what goes out, and who is who.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn};
use boringtun::x25519;
use ipnet::IpNet;
use keyservice::{PrivateKey, PublicKey};
use rand::Rng;

use crate::allowed_ips::AllowedIps;
use crate::batch::Outbox;
use crate::counters::{Counters, Drop};
use crate::gate::{COOKIE_REPLY, Gate, Verdict};
use crate::index::{IndexTable, PeerIndex};
use crate::ip_packet::IpPacket;
use crate::peer::{Now, OVERHEAD, Peer};
use crate::receive::Sources;

/// MTU of a new tunnel: 1500 less IPv6 (40), UDP (8) and WireGuard (32).
pub const DEFAULT_MTU: usize = 1420;

/// A WireGuard device.
pub struct Device {
    pub(crate) tables: RwLock<Tables>,
    mtu: AtomicUsize,
    /// Packets dropped, by reason.
    pub drops: Counters,
}

/// Who is who. Read for every packet, written by configuration only.
#[derive(Default)]
pub(crate) struct Tables {
    pub(crate) identity: Option<Identity>,
    pub(crate) peers: HashMap<PublicKey, Entry>,
    pub(crate) indices: IndexTable<Arc<Peer>>,
    pub(crate) allowed_ips: AllowedIps<Arc<Peer>>,
}

/// A peer and its prefixes.
pub(crate) struct Entry {
    pub(crate) peer: Arc<Peer>,
    pub(crate) allowed_ips: BTreeSet<IpNet>,
}

/// The device's own key, and the guard of its handshakes.
pub(crate) struct Identity {
    pub(crate) key: PrivateKey,
    pub(crate) secret: x25519::StaticSecret,
    pub(crate) public: x25519::PublicKey,
    /// For every tunnel: the gate has checked mac1 and the limits, so this one is never under load.
    pub(crate) no_limit: Arc<RateLimiter>,
    gate: Mutex<Gate>,
}

impl Identity {
    pub(crate) fn new(key: PrivateKey, now: Instant) -> Self {
        let secret = x25519::StaticSecret::from(*key.expose());
        let public = x25519::PublicKey::from(&secret);
        let gate = Mutex::new(Gate::new(&public, now));
        let no_limit = Arc::new(RateLimiter::new(&public, u64::MAX));
        Self { key, secret, public, no_limit, gate }
    }
}

impl Sources for Tables {
    fn belongs_to(&self, peer: &Peer, packet: &IpPacket) -> bool {
        self.allowed_ips.longest_match(packet.source).is_some_and(|owner| owner.key == peer.key)
    }
}

impl Default for Device {
    fn default() -> Self {
        let (tables, drops) = (RwLock::default(), Counters::default());
        Self { tables, mtu: AtomicUsize::new(DEFAULT_MTU), drops }
    }
}

impl Device {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tunnel's MTU in bytes.
    pub fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed)
    }

    /// Says what the tunnel's MTU is.
    pub fn set_mtu(&self, mtu: usize) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Takes an IP packet from the TUN: the first `length` bytes of `buffer`, which may be written to after
    /// them.
    pub fn handle_packet(&self, now: Now, buffer: &mut [u8], length: usize, out: &mut Outbox) {
        let packet = buffer.get(..length).unwrap_or_default();
        let Some(parsed) = IpPacket::parse(packet) else {
            return self.drops.count(Drop::BadPacket);
        };
        let tables = self.read();
        let Some(peer) = tables.allowed_ips.longest_match(parsed.destination) else {
            return self.drops.count(Drop::NoPeer);
        };
        let sent = peer.lock().send_packet(now, buffer, length, self.mtu(), &mut out.network);
        self.count(peer, sent);
    }

    /// Takes a datagram from the network.
    pub fn handle_datagram(&self, now: Now, from: SocketAddr, datagram: &[u8], out: &mut Outbox) {
        let result = match classify(datagram) {
            Ok(Message::Data(index)) => self.handle_data(now, from, datagram, index, out),
            Ok(Message::Initiation) => self.handle_initiation(now, from, datagram, out),
            Ok(Message::Response(index)) => self.handle_response(now, from, datagram, index, out),
            Ok(Message::Cookie(index)) => self.handle_cookie(now, from, datagram, index, out),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = result {
            self.drops.count(reason);
        }
    }

    fn handle_data(
        &self,
        now: Now,
        from: SocketAddr,
        datagram: &[u8],
        index: PeerIndex,
        out: &mut Outbox,
    ) -> Result<(), Drop> {
        let tables = self.read();
        let peer = tables.indices.get(index).ok_or(Drop::UnknownIndex)?;
        let result = peer.lock().receive_data(now, from, datagram, self.mtu(), (peer, &*tables), out);
        self.count(peer, result);
        Ok(())
    }

    fn handle_initiation(
        &self,
        now: Now,
        from: SocketAddr,
        datagram: &[u8],
        out: &mut Outbox,
    ) -> Result<(), Drop> {
        let tables = self.read();
        let identity = tables.identity.as_ref().ok_or(Drop::NoKey)?;
        let Packet::HandshakeInit(initiation) = pass(identity, now, from, datagram, out)? else {
            return Err(Drop::UnknownType);
        };
        let half = parse_handshake_anon(&identity.secret, &identity.public, &initiation)
            .map_err(|_| Drop::BadAuth)?;
        let key = PublicKey::from_bytes(half.peer_static_public);
        let Entry { peer, .. } = tables.peers.get(&key).ok_or(Drop::UnknownPeer)?;
        let result = peer.lock().receive_handshake(now, from, datagram, self.mtu(), &mut out.network);
        self.count(peer, result);
        Ok(())
    }

    fn handle_response(
        &self,
        now: Now,
        from: SocketAddr,
        datagram: &[u8],
        index: PeerIndex,
        out: &mut Outbox,
    ) -> Result<(), Drop> {
        let tables = self.read();
        let identity = tables.identity.as_ref().ok_or(Drop::NoKey)?;
        let peer = tables.indices.get(index).ok_or(Drop::UnknownIndex)?;
        pass(identity, now, from, datagram, out)?;
        let result = peer.lock().receive_handshake(now, from, datagram, self.mtu(), &mut out.network);
        self.count(peer, result);
        Ok(())
    }

    fn handle_cookie(
        &self,
        now: Now,
        from: SocketAddr,
        datagram: &[u8],
        index: PeerIndex,
        out: &mut Outbox,
    ) -> Result<(), Drop> {
        let tables = self.read();
        let peer = tables.indices.get(index).ok_or(Drop::UnknownIndex)?;
        let result = peer.lock().receive_handshake(now, from, datagram, self.mtu(), &mut out.network);
        self.count(peer, result);
        Ok(())
    }

    /// Lets time pass; returns when to come back at the latest.
    pub fn tick(&self, now: Now, rng: &mut impl Rng, out: &mut Outbox) -> Option<Instant> {
        let tables = self.read();
        if let Some(identity) = &tables.identity {
            identity.gate.lock().unwrap_or_else(PoisonError::into_inner).forget_quiet(now.instant);
        }
        let mut tick = |peer: &Peer| peer.tick(now, self.mtu(), &self.drops, rng, &mut out.network);
        tables.peers.values().filter_map(|entry| tick(&entry.peer)).min()
    }

    fn count(&self, peer: &Peer, result: Result<(), Drop>) {
        if let Err(reason) = result {
            peer.drops.count(reason);
            self.drops.count(reason);
        }
    }
}

/// Asks the gate; a cookie reply goes straight back.
fn pass<'a>(
    identity: &Identity,
    now: Now,
    from: SocketAddr,
    datagram: &'a [u8],
    out: &mut Outbox,
) -> Result<Packet<'a>, Drop> {
    let mut reply = [0; COOKIE_REPLY];
    let mut gate = identity.gate.lock().unwrap_or_else(PoisonError::into_inner);
    match gate.check(now.instant, from, datagram, &mut reply) {
        Verdict::Pass(packet) => Ok(packet),
        Verdict::Drop(reason) => Err(reason),
        Verdict::Cookie(length) => {
            out.network.push(reply.get(..length).unwrap_or_default(), from);
            Err(Drop::CookieDemanded)
        }
    }
}

/// A datagram's type, with the peer's part of the receiver index.
enum Message {
    Initiation,
    Response(PeerIndex),
    Cookie(PeerIndex),
    Data(PeerIndex),
}

fn classify(datagram: &[u8]) -> Result<Message, Drop> {
    let word = |at: usize| {
        let bytes = datagram.get(at..at + 4).ok_or(Drop::Truncated)?;
        Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| Drop::Truncated)?))
    };
    // The type and three reserved bytes, which are zero.
    let (length, longer_is_fine) = match word(0)? {
        1 => (148, false),
        2 => (92, false),
        3 => (64, false),
        4 => (OVERHEAD, true),
        _ => return Err(Drop::UnknownType),
    };
    if datagram.len() < length {
        return Err(Drop::Truncated);
    }
    if datagram.len() > length && !longer_is_fine {
        return Err(Drop::Oversized);
    }
    match Tunn::parse_incoming_packet(datagram) {
        Ok(Packet::HandshakeInit(_)) => Ok(Message::Initiation),
        Ok(Packet::HandshakeResponse(p)) => Ok(Message::Response(PeerIndex::of(p.receiver_idx))),
        Ok(Packet::PacketCookieReply(p)) => Ok(Message::Cookie(PeerIndex::of(p.receiver_idx))),
        Ok(Packet::PacketData(p)) => Ok(Message::Data(PeerIndex::of(p.receiver_idx))),
        Err(_) => Err(Drop::UnknownType),
    }
}
