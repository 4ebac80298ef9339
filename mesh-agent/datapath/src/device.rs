//! The device without I/O: what comes in, what goes out, and who is who.
//!
//! Packets pass through a [`Step`], which looks things up for a whole batch and takes no peer's lock. What is rare or
//! slow (handshakes, packets without a session) it leaves in the outbox for [`Device::settle`].

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keyservice::{PrivateKey, PublicKey};
use rand::CryptoRng;

use crate::allowed_ips::AllowedIps;
use crate::counters::{Counters, Drop};
use crate::gate::Gate;
use crate::index::IndexTable;
use crate::outbox::{Event, Outbox};
use crate::peer::{Now, Peer};
use crate::session::{Cipher, Session};

/// MTU of a new tunnel: 1500 less IPv6 (40), UDP (8) and WireGuard (32).
pub const DEFAULT_MTU: usize = 1420;

/// A WireGuard device.
///
/// Locks are taken in this order: tables, a peer, indices. A [`Step`] holds the first and the last for reading and
/// must not take a peer's.
pub struct Device {
    pub(crate) tables: RwLock<Tables>,
    pub(crate) indices: RwLock<IndexTable<Entry>>,
    gate: Mutex<Option<Gate>>,
    pub(crate) strays: Mutex<Strays>,
    pub(crate) cipher: Cipher,
    mtu: AtomicUsize,
    /// What times are counted from.
    epoch: Instant,
    /// Packets dropped, by reason.
    pub drops: Counters,
}

/// Who is who. Read for every batch, written by configuration only.
#[derive(Default)]
pub(crate) struct Tables {
    pub(crate) identity: Option<Arc<Identity>>,
    pub(crate) peers: HashMap<PublicKey, Member>,
    pub(crate) allowed_ips: AllowedIps<Arc<Peer>>,
}

/// A peer and its prefixes.
pub(crate) struct Member {
    pub(crate) peer: Arc<Peer>,
    pub(crate) allowed_ips: BTreeSet<IpNet>,
}

/// Whose an index is: a session's, or a handshake's that we began.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) peer: Arc<Peer>,
    pub(crate) session: Option<Arc<Session>>,
}

/// The device's own key.
pub(crate) struct Identity {
    pub(crate) key: PrivateKey,
    pub(crate) noise: mesh_noise::Identity,
}

impl Identity {
    pub(crate) fn new(key: PrivateKey) -> Self {
        let noise = mesh_noise::Identity::new(&key);
        Self { key, noise }
    }
}

/// Who sent stray packets in this second of the device's clock.
#[derive(Default)]
pub(crate) struct Strays {
    pub(crate) second: u64,
    pub(crate) senders: HashSet<SocketAddr>,
}

impl Default for Device {
    fn default() -> Self {
        Self::new(Cipher::Sealed)
    }
}

impl Device {
    /// Without a key.
    #[allow(clippy::disallowed_methods)] // The clock's zero; every time comes in as an argument.
    pub fn new(cipher: Cipher) -> Self {
        Self {
            tables: RwLock::default(),
            indices: RwLock::default(),
            gate: Mutex::default(),
            strays: Mutex::default(),
            cipher,
            mtu: AtomicUsize::new(DEFAULT_MTU),
            // Before any session that may be taken over.
            epoch: Instant::now().checked_sub(Duration::from_secs(3600)).unwrap_or_else(Instant::now),
            drops: Counters::default(),
        }
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn indices(&self) -> RwLockWriteGuard<'_, IndexTable<Entry>> {
        self.indices.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn gate(&self) -> MutexGuard<'_, Option<Gate>> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tunnel's MTU in bytes.
    pub fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed)
    }

    /// Says what the tunnel's MTU is.
    pub fn set_mtu(&self, mtu: usize) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Milliseconds of the device's clock, never 0.
    pub(crate) fn ms(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_millis() as u64 + 1
    }

    /// Looks things up for a batch of packets. Configuration waits until it is dropped.
    pub fn step(&self, now: Now) -> Step<'_> {
        let tables = self.read();
        let indices = self.indices.read().unwrap_or_else(PoisonError::into_inner);
        Step { device: self, ms: self.ms(now.instant), mtu: self.mtu(), now, tables, indices, way: None }
    }

    /// Does at once what steps left over. An engine with a thread for handshakes picks the events itself.
    pub fn settle(&self, now: Now, rng: &mut impl CryptoRng, out: &mut Outbox) {
        // Nothing that is done here leaves an event behind.
        for event in std::mem::take(&mut out.events) {
            self.handle(now, event, rng, out);
        }
    }

    /// Does what one event asks for.
    pub(crate) fn handle(&self, now: Now, event: Event, rng: &mut impl CryptoRng, out: &mut Outbox) {
        match event {
            Event::Confirmed(peer, session) => self.confirm(now, &peer, &session, out),
            Event::Stage(peer, packet) => {
                if self.stage(now, &peer, packet, out) {
                    self.initiate(now, &peer, rng, out);
                }
            }
            Event::Message(from, message) => match self.pass(now, from, message.bytes(), rng, out) {
                Ok(()) => self.handle_handshake(now, from, message.bytes(), rng, out),
                Err(reason) => self.drops.count(reason),
            },
            Event::Stray(from) if self.minds_stray(now, from) => self.handle_stray(now, from, rng, out),
            Event::Stray(_) => {}
            Event::Initiate(peer) => self.initiate(now, &peer, rng, out),
            Event::Nothing => {}
        }
        out.seal();
    }

    /// Takes an IP packet from the TUN.
    pub fn handle_packet(&self, now: Now, packet: &[u8], rng: &mut impl CryptoRng, out: &mut Outbox) {
        self.step(now).send(packet, out);
        out.seal();
        self.settle(now, rng, out);
    }

    /// Takes a datagram from the network, and leaves the packet for the TUN in it.
    pub fn handle_datagram(
        &self,
        now: Now,
        from: SocketAddr,
        datagram: &mut [u8],
        rng: &mut impl CryptoRng,
        out: &mut Outbox,
    ) {
        let length = datagram.len();
        self.step(now).receive(from, 0, datagram, length, out);
        self.settle(now, rng, out);
    }

    pub(crate) fn count(&self, peer: &Peer, reason: Drop, packets: u64) {
        peer.drops.add(reason, packets);
        self.drops.add(reason, packets);
    }
}

/// A batch of packets under way.
pub struct Step<'a> {
    pub(crate) device: &'a Device,
    pub(crate) now: Now,
    pub(crate) ms: u64,
    pub(crate) mtu: usize,
    pub(crate) tables: RwLockReadGuard<'a, Tables>,
    pub(crate) indices: RwLockReadGuard<'a, IndexTable<Entry>>,
    /// Where the last packet went.
    pub(crate) way: Option<crate::transmit::Way>,
}
