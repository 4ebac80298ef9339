//! The timers of a peer (WireGuard paper, 6; kernel: timers.c). All are looked at every quarter of a second:
//!
//! * *retry*: an initiation without a response is sent again after 5 s and up to 333 ms of jitter, so that two sides
//!   that began together do not stay in step; after 90 s the packets that wait are dropped;
//! * *renew*: the initiator of a session makes a new one when it is used at an age of 120 s, or received by at 165 s,
//!   or has sealed 2^60 packets; keepalives count, else an idle tunnel would end at 180 s and lose packets until the
//!   next one is due;
//! * *unanswered*: data to a peer that is silent for 15 s starts a handshake;
//! * *owed*: a keepalive 10 s after data that we sent nothing after;
//! * *persistent keepalive*: after that long without authenticated traffic either way; it brings up a session
//!   where there is none;
//! * *on demand*: `initiate=true` starts a handshake whatever session there is;
//! * *end*: a session is wiped when it is 180 s old, and a handshake key when its retries end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::{CryptoRng, Rng};

use crate::counters::Drop;
use crate::device::{Device, Identity};
use crate::outbox::Outbox;
use crate::peer::{Now, Peer, State};

/// Age of a session at which its initiator makes a new one (REKEY_AFTER_TIME).
pub const REKEY_AFTER: Duration = Duration::from_secs(120);
/// Packets after which its initiator does (REKEY_AFTER_MESSAGES).
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Least time between two initiations to a peer (REKEY_TIMEOUT).
pub const RETRY_AFTER: Duration = Duration::from_secs(5);
/// When to stop trying (REKEY_ATTEMPT_TIME).
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(90);
/// Longest delay of a retried initiation.
pub const MAX_JITTER: Duration = Duration::from_millis(333);
/// When a keepalive is owed, in milliseconds (KEEPALIVE_TIMEOUT).
const KEEPALIVE: u64 = 10_000;
/// When data counts as unanswered, in milliseconds (KEEPALIVE_TIMEOUT + REKEY_TIMEOUT).
const UNANSWERED: u64 = 15_000;
/// Age of a session at which receiving by it renews it, in milliseconds: a session's life less those.
const RENEW_RECEIVING: u64 = 165_000;

/// Times of one peer that the packets themselves do not note.
#[derive(Debug, Default)]
pub struct Timers {
    /// Persistent keepalive in seconds; 0 for off.
    pub keepalive: u16,
    /// Sends a keepalive at the next tick.
    pub(crate) keepalive_now: bool,
    /// Begins a handshake at the next tick, whatever session there is.
    pub(crate) initiate_now: bool,
    /// When the handshake that is under way began.
    began: Option<Instant>,
    last_initiation: Option<Instant>,
    retry_at: Option<Instant>,
}

impl Timers {
    /// Forgets all but the setting; a peer that has one is sent a keepalive at once, so a new session is made.
    pub(crate) fn restart(&mut self) {
        let keepalive = self.keepalive;
        *self = Self { keepalive, keepalive_now: keepalive > 0, ..Self::default() };
    }

    /// What made the last handshake fail may be over: the next one need not wait.
    pub(crate) fn hurry(&mut self) {
        (self.began, self.retry_at, self.last_initiation) = (None, None, None);
    }

    /// Whether a handshake may begin: none is under way, and the last was not a moment ago.
    pub(crate) fn may_begin(&self, now: Instant) -> bool {
        let recent = |at| now.saturating_duration_since(at) < RETRY_AFTER;
        self.began.is_none() && !self.last_initiation.is_some_and(recent)
    }

    /// An initiation was sent.
    pub(crate) fn initiated(&mut self, now: Instant, rng: &mut impl Rng) {
        self.began.get_or_insert(now);
        self.last_initiation = Some(now);
        self.retry_at = Some(now + RETRY_AFTER + MAX_JITTER.mul_f64(rng.random::<f64>()));
    }

    /// A handshake led to a session, whoever began it.
    pub(crate) fn completed(&mut self) {
        (self.began, self.retry_at) = (None, None);
    }

    fn gives_up(&mut self, now: Instant) -> bool {
        let over = self.began.is_some_and(|began| now.saturating_duration_since(began) >= GIVE_UP_AFTER);
        if over {
            self.completed();
        }
        over
    }

    fn keepalive_due(&mut self, ms: u64, last_traffic: u64) -> bool {
        let period = u64::from(self.keepalive) * 1000;
        let due = self.keepalive > 0 && (self.keepalive_now || ms.saturating_sub(last_traffic) >= period);
        self.keepalive_now &= !due;
        due
    }
}

impl Device {
    /// Lets time pass: to be called every quarter of a second, and when it says.
    pub fn tick(&self, now: Now, rng: &mut impl CryptoRng, out: &mut Outbox) -> Option<Instant> {
        if let Some(gate) = self.gate().as_mut() {
            gate.forget_quiet(now.instant);
        }
        let (identity, peers) = {
            let tables = self.read();
            let identity = tables.identity.clone()?;
            (identity, tables.peers.values().map(|member| member.peer.clone()).collect::<Vec<_>>())
        };
        let next = peers.iter().filter_map(|peer| self.tick_peer(now, &identity, peer, rng, out)).min();
        out.seal();
        next
    }

    fn tick_peer(
        &self,
        now: Now,
        identity: &Identity,
        peer: &Arc<Peer>,
        rng: &mut impl CryptoRng,
        out: &mut Outbox,
    ) -> Option<Instant> {
        let ms = self.ms(now.instant);
        let mut state = peer.lock();
        let state = &mut *state;
        state.remote.as_ref()?;
        self.end_sessions(now, peer, state);
        if state.timers.gives_up(now.instant) {
            self.count(peer, Drop::HandshakeFailed, state.staged.len() as u64);
            state.staged.clear();
            self.forget_pending(state);
        }
        // A change of the endpoint alone does not send what waits for it.
        self.send_staged(now, peer, state, out);

        let traffic = &peer.traffic;
        let since = |time: &std::sync::atomic::AtomicU64| match time.load(Ordering::Relaxed) {
            0 => 0,
            at => ms.saturating_sub(at),
        };
        if since(&traffic.owed_since) >= KEEPALIVE {
            traffic.owed_since.store(0, Ordering::Relaxed);
            self.send_keepalive(now, peer, out);
        }
        let last_sent = traffic.last_sent.load(Ordering::Relaxed);
        let last_traffic = last_sent.max(traffic.last_received.load(Ordering::Relaxed));
        let mut wanted = !state.staged.is_empty();
        if peer.endpoint().is_some() && state.timers.keepalive_due(ms, last_traffic) {
            wanted |= !self.send_keepalive(now, peer, out);
        }
        if since(&traffic.unanswered_since) >= UNANSWERED {
            traffic.unanswered_since.store(0, Ordering::Relaxed);
            wanted = true;
        }
        wanted |= std::mem::take(&mut state.timers.initiate_now) || self.wants_renewal(peer, state);
        let retry = state.timers.retry_at.is_some_and(|at| at <= now.instant);
        if retry || wanted && state.timers.may_begin(now.instant) {
            self.send_initiation(now, identity, peer, state, rng, out);
        }
        state.timers.retry_at
    }

    fn wants_renewal(&self, peer: &Peer, state: &State) -> bool {
        let Some(session) = state.sessions.current.as_ref().filter(|session| session.keypair.initiator)
        else {
            return false;
        };
        let born = self.ms(session.born);
        let sent = peer.traffic.last_sent.load(Ordering::Relaxed);
        let received = peer.traffic.last_received.load(Ordering::Relaxed);
        sent >= born + REKEY_AFTER.as_millis() as u64
            || received >= born + RENEW_RECEIVING
            || session.keypair.sending.used() >= REKEY_AFTER_MESSAGES
    }

    /// Wipes what is too old to be used.
    fn end_sessions(&self, now: Now, peer: &Peer, state: &mut State) {
        let sessions = &mut state.sessions;
        for place in [&mut sessions.current, &mut sessions.previous, &mut sessions.next] {
            if let Some(old) = place.take_if(|session| !session.is_live(now.instant)) {
                self.indices().remove(old.keypair.local_index);
            }
        }
        if sessions.current.is_none() && peer.sending.load().is_some() {
            peer.sending.store(None);
        }
    }

    pub(crate) fn forget_pending(&self, state: &mut State) {
        if let Some(remote) = &mut state.remote
            && let Some(index) = remote.pending_index()
        {
            remote.forget_pending();
            self.indices().remove(index);
        }
    }
}
