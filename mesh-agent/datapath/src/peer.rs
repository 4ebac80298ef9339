//! One peer: what every packet touches, without a lock, and what handshakes and timers change, behind one.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwapOption;
use keyservice::{PresharedKey, PublicKey};
use mesh_noise::Remote;
use mesh_uapi::PeerStats;

use crate::counters::Counters;
use crate::session::Session;
use crate::timers::Timers;

/// Packets that wait for a handshake; the oldest goes when one more comes (as in the kernel's WireGuard).
pub const MAX_STAGED: usize = 128;
/// Most bytes sealed into one datagram: UDP over IPv4 carries 65,507.
pub const MAX_PLAINTEXT: usize = 65_507 - mesh_noise::message::OVERHEAD;

/// A peer of the device.
pub struct Peer {
    /// Who it is.
    pub key: PublicKey,
    /// What was dropped of or for it.
    pub drops: Counters,
    pub(crate) traffic: Traffic,
    /// Seals what is sent.
    pub(crate) sending: ArcSwapOption<Session>,
    endpoint: Mutex<Option<SocketAddr>>,
    /// Set while somebody was already told that a handshake is wanted.
    pub(crate) wanted: AtomicBool,
    state: Mutex<State>,
}

/// What a peer's lock guards.
pub struct State {
    /// `None` while the device has no private key.
    pub(crate) remote: Option<Remote>,
    pub(crate) preshared_key: Option<PresharedKey>,
    pub(crate) sessions: Sessions,
    pub(crate) timers: Timers,
    pub(crate) staged: VecDeque<Vec<u8>>,
    pub(crate) last_handshake: Option<SystemTime>,
}

/// The sessions with a peer, as in the kernel's `noise_keypairs`.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    /// What we send with.
    pub(crate) current: Option<Arc<Session>>,
    /// The one before, for what is still under way.
    pub(crate) previous: Option<Arc<Session>>,
    /// One that the peer began and has not used yet.
    pub(crate) next: Option<Arc<Session>>,
}

impl Sessions {
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Session>> {
        self.current.iter().chain(&self.previous).chain(&self.next)
    }
}

/// Counters and times, written for every burst. Times are milliseconds of the device's clock; 0 is never.
#[derive(Debug, Default)]
pub struct Traffic {
    pub(crate) rx_bytes: AtomicU64,
    pub(crate) tx_bytes: AtomicU64,
    pub(crate) rx_packets: AtomicU64,
    pub(crate) tx_packets: AtomicU64,
    /// Completed, whoever began them.
    pub(crate) handshakes: AtomicU64,
    /// Sent, retries included.
    pub(crate) initiations: AtomicU64,
    /// Anything authenticated, handshakes and keepalives included.
    pub(crate) last_sent: AtomicU64,
    pub(crate) last_received: AtomicU64,
    /// The first data since something was received.
    pub(crate) unanswered_since: AtomicU64,
    /// The first data received since something was sent.
    pub(crate) owed_since: AtomicU64,
}

impl Traffic {
    /// Notes datagrams that were sent, `bytes` in all.
    pub(crate) fn sent(&self, ms: u64, packets: u64, bytes: usize, data: bool) {
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.last_sent.store(ms, Ordering::Relaxed);
        self.owed_since.store(0, Ordering::Relaxed);
        if data && self.unanswered_since.load(Ordering::Relaxed) == 0 {
            self.unanswered_since.store(ms, Ordering::Relaxed);
        }
    }

    /// Notes authentic datagrams, `bytes` in all.
    pub(crate) fn received(&self, ms: u64, packets: u64, bytes: usize, data: bool) {
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.rx_packets.fetch_add(packets, Ordering::Relaxed);
        self.last_received.store(ms, Ordering::Relaxed);
        self.unanswered_since.store(0, Ordering::Relaxed);
        if data && self.owed_since.load(Ordering::Relaxed) == 0 {
            self.owed_since.store(ms, Ordering::Relaxed);
        }
    }

    pub(crate) fn forget_times(&self) {
        for time in [&self.last_sent, &self.last_received, &self.unanswered_since, &self.owed_since] {
            time.store(0, Ordering::Relaxed);
        }
    }
}

/// The time of one step, in both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For durations.
    pub instant: Instant,
    /// For people.
    pub wall: SystemTime,
}

impl Peer {
    /// A peer without sessions or settings.
    pub fn new(key: PublicKey) -> Self {
        let state = State {
            remote: None,
            preshared_key: None,
            sessions: Sessions::default(),
            timers: Timers::default(),
            staged: VecDeque::new(),
            last_handshake: None,
        };
        Self {
            key,
            drops: Counters::default(),
            traffic: Traffic::default(),
            sending: ArcSwapOption::empty(),
            endpoint: Mutex::default(),
            wanted: AtomicBool::new(false),
            state: Mutex::new(state),
        }
    }

    /// Its state. A thread that panicked with the lock held leaves it usable: every step is complete.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its numbers.
    pub(crate) fn stats(&self) -> PeerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PeerStats {
            rx_packets: read(&self.traffic.rx_packets),
            tx_packets: read(&self.traffic.tx_packets),
            handshakes: read(&self.traffic.handshakes),
            initiations: read(&self.traffic.initiations),
            drops: self.drops.by_name(false),
        }
    }

    /// Where it is reached.
    pub(crate) fn endpoint(&self) -> Option<SocketAddr> {
        *self.endpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is reached there from now on.
    pub(crate) fn set_endpoint(&self, endpoint: SocketAddr) {
        *self.endpoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(endpoint);
    }
}
