//! Notices peers that we send to and hear nothing from, and says what to try next, for that peer alone.
//!
//! A peer that gets data owes a sign of life within 10 s (KEEPALIVE_TIMEOUT, whitepaper 6.5), and one that gets a
//! handshake initiation owes an answer at once, after one retry at the latest (REKEY_TIMEOUT, 5 s). Whoever is silent
//! for longer is tried afresh: first by a new handshake where it was last heard, then each time at the next of its
//! endpoints. What failed is remembered in the snapshot ([`Reach`]), from where the plan chooses the endpoint and the
//! WireGuard reconciler learns that a new attempt is due. It works for every kind of device, from two counters and the
//! time of the last handshake.

use std::collections::BTreeMap;

use std::time::{Duration, Instant, SystemTime};

use keyservice::PublicKey;
use mesh_uapi::{Device, Peer};

use crate::snapshot::Reach;

/// Silence of a peer with a live session that is a fault: the 10 s it may take, two readings, and a slow wire.
pub const ANSWER: Duration = Duration::from_secs(13);
/// Silence of a peer without one: an initiation, its first retry, and the wire.
pub const HANDSHAKE: Duration = Duration::from_secs(6);
/// Nothing sent for so long: nobody wants anything of the peer, and its silence is no fault.
const QUIET: Duration = Duration::from_secs(10);
/// Between two attempts, once the first few have failed.
const LONGEST: Duration = Duration::from_secs(30);
/// Attempts in quick succession. Each makes the device try for 90 s, so the later ones are further apart than that:
/// else our own attempts would look like somebody's wish to reach the peer.
const EAGER: u32 = 8;
const AFTER_EAGER: Duration = Duration::from_secs(150);
/// REJECT_AFTER_TIME: an older session carries nothing.
const REJECT_AFTER: Duration = Duration::from_secs(180);
/// Attempts of one device at one reading: when the whole network is gone, no burst of handshakes.
pub const AT_ONCE: usize = 64;
/// Failed endpoints remembered for one peer.
pub const REMEMBERED: usize = 8;

/// How a peer is doing, for status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    /// Attempts to reach it since the agent began.
    pub heals: u64,
    /// For how long it has been silent, and how often it was tried since; `None` while nothing is wrong.
    pub silent: Option<(Duration, u32)>,
}

/// Watches the peers of all devices from one reading to the next.
#[derive(Debug, Clone, Default)]
pub struct Healer {
    peers: BTreeMap<(String, PublicKey), Watched>,
}

#[derive(Debug, Clone)]
struct Watched {
    rx_bytes: u64,
    tx_bytes: u64,
    handshake: Option<SystemTime>,
    /// When something was first sent after the last that was heard.
    silent_since: Option<Instant>,
    last_sent: Instant,
    /// Attempts since it went silent, and the last of them.
    tries: u32,
    tried: Instant,
    heals: u64,
    reach: Reach,
}

impl Healer {
    /// Takes a reading of the device `name`. `now` is the monotonic clock, `wall` the wall clock (for the age of
    /// sessions).
    pub fn observe(&mut self, name: &str, device: &Device, now: Instant, wall: SystemTime) {
        let mut due = Vec::new();
        for (key, peer) in &device.peers {
            let id = (name.to_owned(), *key);
            let watched = self.peers.entry(id.clone()).or_insert_with(|| Watched::new(peer, now));
            watched.read(peer, now);
            if watched.is_due(peer, now, wall) {
                due.push((watched.tried, id, peer));
            }
        }
        // Who was not tried for longest is first, so that everyone gets a turn.
        due.sort_by_key(|(tried, ..)| *tried);
        for (_, id, peer) in due.into_iter().take(AT_ONCE) {
            if let Some(watched) = self.peers.get_mut(&id) {
                watched.attempt(peer, now, wall);
            }
        }
    }

    /// Forgets all peers but these.
    pub fn retain(&mut self, wanted: impl Fn(&PublicKey) -> bool) {
        self.peers.retain(|(_, key), _| wanted(key));
    }

    /// A device that does not answer is not the peers' fault, and a new one starts anew. What failed stays known.
    pub fn device_lost(&mut self, name: &str) {
        let of_device = self.peers.iter_mut().filter(|((on, _), _)| on == name);
        of_device.for_each(|(_, watched)| watched.heard());
    }

    /// What is known of reaching the peers; those without any trouble are left out.
    pub fn reach(&self) -> BTreeMap<PublicKey, Reach> {
        let known = self.peers.iter().filter(|(_, watched)| watched.reach != Reach::default());
        known.map(|((_, key), watched)| (*key, watched.reach.clone())).collect()
    }

    /// How the peers are doing, by device and key; those without any trouble are left out.
    pub fn health(&self, now: Instant) -> BTreeMap<(String, PublicKey), Health> {
        let health = |watched: &Watched| Health {
            heals: watched.heals,
            silent: watched
                .silent_since
                .filter(|_| watched.tries > 0)
                .map(|since| (now.saturating_duration_since(since), watched.tries)),
        };
        let all = self.peers.iter().map(|(id, watched)| (id.clone(), health(watched)));
        all.filter(|(_, health)| *health != Health::default()).collect()
    }
}

impl Watched {
    fn new(peer: &Peer, now: Instant) -> Self {
        Self {
            rx_bytes: peer.rx_bytes,
            tx_bytes: peer.tx_bytes,
            handshake: peer.last_handshake,
            silent_since: None,
            last_sent: now,
            tries: 0,
            tried: now,
            heals: 0,
            reach: Reach::default(),
        }
    }

    fn read(&mut self, peer: &Peer, now: Instant) {
        // Counters that shrink are a new device behind the same name.
        let anew = peer.rx_bytes < self.rx_bytes || peer.tx_bytes < self.tx_bytes;
        let heard = peer.rx_bytes > self.rx_bytes || peer.last_handshake != self.handshake;
        if anew || heard {
            self.heard();
        }
        if heard && !anew {
            // Whatever was thought of it, this one works.
            self.reach.failed.retain(|failed| Some(*failed) != peer.endpoint);
        }
        if peer.tx_bytes > self.tx_bytes && !anew {
            self.last_sent = now;
            if !heard {
                self.silent_since.get_or_insert(now);
            }
        } else if now.saturating_duration_since(self.last_sent) >= QUIET {
            self.heard();
        }
        self.rx_bytes = peer.rx_bytes;
        self.tx_bytes = peer.tx_bytes;
        self.handshake = peer.last_handshake;
    }

    fn heard(&mut self) {
        self.silent_since = None;
        self.tries = 0;
    }

    fn is_due(&self, peer: &Peer, now: Instant, wall: SystemTime) -> bool {
        let Some(since) = self.silent_since else { return false };
        let (since, patience) = match self.tries {
            0 if is_live(peer, wall) => (since, ANSWER),
            0 => (since, HANDSHAKE),
            tries if tries >= EAGER => (self.tried, AFTER_EAGER),
            tries => (self.tried, (HANDSHAKE * (1 << tries.saturating_sub(3).min(8))).min(LONGEST)),
        };
        now.saturating_duration_since(since) >= patience
    }

    /// The next thing to try: a handshake alone where there was a session, else another endpoint too.
    fn attempt(&mut self, peer: &Peer, now: Instant, wall: SystemTime) {
        let once_more = self.tries == 0 && is_live(peer, wall);
        if let Some(endpoint) = peer.endpoint.filter(|_| !once_more) {
            let failed = &mut self.reach.failed;
            failed.retain(|known| *known != endpoint);
            failed.push(endpoint);
            if failed.len() > REMEMBERED {
                failed.remove(0);
            }
        }
        self.reach.attempt += 1;
        self.heals += 1;
        self.tries += 1;
        self.tried = now;
    }
}

fn is_live(peer: &Peer, wall: SystemTime) -> bool {
    peer.last_handshake.is_some_and(|at| wall.duration_since(at).unwrap_or_default() < REJECT_AFTER)
}

#[cfg(test)]
mod tests;
