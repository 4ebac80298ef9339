//! The timers of a peer.
//!
//! In the core (`Tunn::update_timers`): handshake retries every 5 s for 90 s, a handshake when 15 s of data
//! go unanswered, a keepalive 10 s after unanswered data, rekeying of sessions that carry data after 120 s,
//! their end after 180 s and of all keys after 540 s. Here:
//!
//! * *persistent keepalive*, after that long without authenticated traffic either way, and again with a
//!   handshake where the core has given up; the core sends it whether needed or not and stops when it expires;
//! * *rekeying by any packet*: the core counts data only, so an idle tunnel with keepalives would live until
//!   its session ends at 180 s and lose packets until the next one is due;
//! * *retry jitter*: a retried initiation waits up to 333 ms, so that two sides that began together do not
//!   stay in step (WireGuard paper, 6.1).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use boringtun::noise::TunnResult;
use boringtun::noise::errors::WireGuardError;
use rand::Rng;

use crate::batch::Batch;
use crate::counters::{Counters, Drop};
use crate::peer::{INITIATION, Now, Peer, tunn_has_session};

/// Age of a session at which its initiator makes a new one.
pub const REKEY_AFTER: Duration = Duration::from_secs(120);
/// Longest delay of a retried initiation.
pub const MAX_JITTER: Duration = Duration::from_millis(333);

/// Times of one peer.
#[derive(Debug)]
pub struct Timers {
    /// Persistent keepalive in seconds; 0 for off.
    pub keepalive: u16,
    last_traffic: Instant,
    /// Sends a keepalive at the next tick.
    pub(crate) keepalive_now: bool,
    /// When the session began, if it was ours to renew and was not yet.
    renewable_since: Option<Instant>,
    /// A retried initiation, and when it goes out.
    pub(crate) delayed: Option<(Instant, Vec<u8>)>,
}

impl Timers {
    /// For a peer that starts at `now`.
    pub fn new(now: Instant) -> Self {
        Self { keepalive: 0, last_traffic: now, keepalive_now: false, renewable_since: None, delayed: None }
    }

    /// Forgets all but the setting; a peer that has one is sent a keepalive at once, so a new session is made.
    pub(crate) fn restart(&mut self, now: Instant) {
        let keepalive = self.keepalive;
        *self = Self { keepalive, keepalive_now: keepalive > 0, ..Self::new(now) };
    }

    /// Something authenticated was sent or received.
    pub(crate) fn any_traffic(&mut self, now: Instant) {
        self.last_traffic = now;
    }

    /// A session was agreed on; its initiator renews it.
    pub(crate) fn session_began(&mut self, now: Instant, initiator: bool) {
        self.renewable_since = initiator.then_some(now);
        self.delayed = None;
    }

    /// True once for a session that is due for renewal.
    pub(crate) fn take_rekey(&mut self, now: Instant) -> bool {
        let due = self.renewable_since.is_some_and(|t| now.saturating_duration_since(t) >= REKEY_AFTER);
        if due {
            self.renewable_since = None;
        }
        due
    }

    fn keepalive_due(&mut self, now: Instant) -> bool {
        let period = Duration::from_secs(self.keepalive.into());
        let due = self.keepalive > 0
            && (self.keepalive_now || now.saturating_duration_since(self.last_traffic) >= period);
        self.keepalive_now &= !due;
        due
    }
}

impl Peer {
    /// Lets time pass: to be called every quarter of a second, and when it says.
    pub fn tick(
        &self,
        now: Now,
        mtu: usize,
        device_drops: &Counters,
        rng: &mut impl Rng,
        out: &mut Batch<SocketAddr>,
    ) -> Option<Instant> {
        let mut state = self.lock();
        let state = &mut *state;
        let tunn = state.tunn.as_mut()?;
        match tunn.update_timers(out.space(INITIATION)) {
            TunnResult::WriteToNetwork(message) if message.first() == Some(&1) => {
                let jitter = MAX_JITTER.mul_f64(rng.random::<f64>());
                state.timers.delayed = Some((now.instant + jitter, message.to_vec()));
            }
            TunnResult::WriteToNetwork(message) => {
                let length = message.len();
                if let Some(endpoint) = state.endpoint {
                    out.commit(length, endpoint);
                    state.sent(now, length);
                }
            }
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                for _ in state.staged.drain(..) {
                    self.drops.count(Drop::HandshakeFailed);
                    device_drops.count(Drop::HandshakeFailed);
                }
            }
            _ => {}
        }
        state.has_session = tunn_has_session(state.tunn.as_ref());

        let due = state.timers.delayed.take_if(|(at, _)| *at <= now.instant);
        if let (Some((_, message)), Some(endpoint)) = (due, state.endpoint) {
            out.push(&message, endpoint);
            state.sent(now, message.len());
        }
        if state.endpoint.is_some() && !state.has_session && !state.staged.is_empty() {
            state.initiate(now, out);
        }
        if state.endpoint.is_some() && state.timers.keepalive_due(now.instant) {
            state.send_keepalive(now, out);
        }
        state.send_staged(now, mtu, out);
        state.timers.delayed.as_ref().map(|(at, _)| *at)
    }
}
