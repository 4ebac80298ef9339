//! One peer: a tunnel of the protocol core, and around it what that leaves to its caller.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use keyservice::{PresharedKey, PublicKey};

use crate::batch::Batch;
use crate::counters::{Counters, Drop};
use crate::index::PeerIndex;
use crate::ip_packet::padded_length;
use crate::timers::Timers;

/// Packets that wait for a handshake; the oldest goes when one more comes (as in the kernel's WireGuard).
pub const MAX_STAGED: usize = 128;
/// Bytes a data message adds: type, receiver index, counter, authenticator.
pub const OVERHEAD: usize = 32;
/// Length of a handshake initiation, the longest handshake message.
pub const INITIATION: usize = 148;
/// Most bytes sealed into one datagram: UDP over IPv4 carries 65,507.
pub const MAX_PLAINTEXT: usize = 65_507 - OVERHEAD;

/// A peer of the device.
pub struct Peer {
    /// Who it is.
    pub key: PublicKey,
    /// What was dropped of or for it.
    pub drops: Counters,
    state: Mutex<State>,
}

/// What a peer's lock guards.
pub struct State {
    /// `None` while the device has no private key.
    pub(crate) tunn: Option<Tunn>,
    pub(crate) index: Option<PeerIndex>,
    pub(crate) preshared_key: Option<PresharedKey>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) timers: Timers,
    pub(crate) staged: VecDeque<Vec<u8>>,
    /// Whether `tunn` can seal; kept here because asking it reads the clock.
    pub(crate) has_session: bool,
    /// The receiver index of a session the peer began, until its first packet proves that it is live.
    pub(crate) unconfirmed: Option<u32>,
    pub(crate) last_handshake: Option<SystemTime>,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
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
    /// A peer without tunnel or settings.
    pub fn new(key: PublicKey, now: Instant) -> Self {
        let state = State {
            tunn: None,
            index: None,
            preshared_key: None,
            endpoint: None,
            timers: Timers::new(now),
            staged: VecDeque::new(),
            has_session: false,
            unconfirmed: None,
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        Self { key, drops: Counters::default(), state: Mutex::new(state) }
    }

    /// Its state. A thread that panicked with the lock held leaves it usable: every step is complete.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Starts the tunnel afresh, as a new key on either side demands. Packets that wait stay.
    pub(crate) fn restart(
        &mut self,
        secret: &x25519::StaticSecret,
        peer: &PublicKey,
        limiter: Arc<RateLimiter>,
        index: PeerIndex,
        now: Instant,
    ) {
        let preshared = self.preshared_key.as_ref().map(|key| *key.expose());
        let public = x25519::PublicKey::from(*peer.as_bytes());
        self.tunn = Some(Tunn::new(secret.clone(), public, preshared, None, index.get(), Some(limiter)));
        self.index = Some(index);
        self.forget_session();
        self.timers.restart(now);
    }

    /// Ends the tunnel.
    pub(crate) fn stop(&mut self) {
        self.tunn = None;
        self.index = None;
        self.forget_session();
    }

    fn forget_session(&mut self) {
        self.has_session = false;
        self.unconfirmed = None;
        self.last_handshake = None;
    }

    /// Seals the first `length` bytes of `buffer`, an IP packet, or keeps them until there is a session.
    /// Room after the packet, if there is any, saves a copy for the padding.
    pub(crate) fn send_packet(
        &mut self,
        now: Now,
        buffer: &mut [u8],
        length: usize,
        mtu: usize,
        out: &mut Batch<SocketAddr>,
    ) -> Result<(), Drop> {
        if self.tunn.is_none() {
            return Err(Drop::NoKey);
        }
        let Some(endpoint) = self.endpoint else {
            return Err(Drop::NoEndpoint);
        };
        if length > MAX_PLAINTEXT {
            return Err(Drop::Oversized);
        }
        if !self.has_session {
            return self.stage(now, buffer.get(..length).unwrap_or_default(), out);
        }
        let padded = padded_length(length, mtu);
        if let Some(padding) = buffer.get_mut(length..padded) {
            padding.fill(0);
            self.seal(now, buffer.get(..padded).unwrap_or_default(), endpoint, out);
        } else {
            let mut copy = buffer.get(..length).unwrap_or_default().to_vec();
            copy.resize(padded, 0);
            self.seal(now, &copy, endpoint, out);
        }
        Ok(())
    }

    fn stage(&mut self, now: Now, packet: &[u8], out: &mut Batch<SocketAddr>) -> Result<(), Drop> {
        let full = self.staged.len() >= MAX_STAGED;
        if full {
            self.staged.pop_front();
        }
        self.staged.push_back(packet.to_vec());
        self.initiate(now, out);
        if full { Err(Drop::QueueFull) } else { Ok(()) }
    }

    /// Seals `plaintext` for `to`; empty is a keepalive.
    fn seal(&mut self, now: Now, plaintext: &[u8], to: SocketAddr, out: &mut Batch<SocketAddr>) {
        let Some(tunn) = &mut self.tunn else { return };
        let space = out.space((plaintext.len() + OVERHEAD).max(INITIATION));
        if let TunnResult::WriteToNetwork(message) = tunn.encapsulate(plaintext, space) {
            let length = message.len();
            out.commit(length, to);
            self.sent(now, length);
        }
        self.rekey_if_old(now, out);
    }

    pub(crate) fn sent(&mut self, now: Now, length: usize) {
        self.tx_bytes = self.tx_bytes.saturating_add(length as u64);
        self.timers.any_traffic(now.instant);
    }

    /// Sends what waited for the session.
    pub(crate) fn send_staged(&mut self, now: Now, mtu: usize, out: &mut Batch<SocketAddr>) {
        while self.has_session && self.endpoint.is_some() {
            let Some(mut packet) = self.staged.pop_front() else { return };
            let length = packet.len();
            packet.resize(padded_length(length, mtu), 0);
            // Cannot be dropped: there are a session and an endpoint, and its length was checked before.
            let _ = self.send_packet(now, &mut packet, length, mtu, out);
        }
    }

    /// An empty packet, or a handshake if there is no session.
    pub(crate) fn send_keepalive(&mut self, now: Now, out: &mut Batch<SocketAddr>) {
        match self.endpoint {
            Some(endpoint) if self.has_session => self.seal(now, &[], endpoint, out),
            _ => self.initiate(now, out),
        }
    }

    /// Begins a handshake unless one is under way or nobody could be reached.
    pub(crate) fn initiate(&mut self, now: Now, out: &mut Batch<SocketAddr>) {
        let (Some(tunn), Some(endpoint)) = (&mut self.tunn, self.endpoint) else { return };
        if let TunnResult::WriteToNetwork(message) =
            tunn.format_handshake_initiation(out.space(INITIATION), false)
        {
            let length = message.len();
            out.commit(length, endpoint);
            self.sent(now, length);
        }
    }

    /// The core does this for data only; keepalives must keep a session fresh too.
    pub(crate) fn rekey_if_old(&mut self, now: Now, out: &mut Batch<SocketAddr>) {
        if self.has_session && self.timers.take_rekey(now.instant) {
            self.initiate(now, out);
        }
    }
}

/// Whether the core's current session exists.
pub(crate) fn tunn_has_session(tunn: Option<&Tunn>) -> bool {
    tunn.is_some_and(|tunn| tunn.time_since_last_handshake().is_some())
}
