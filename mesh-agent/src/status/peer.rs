//! Is a peer there? Judged from two counters and the last handshake, as WireGuard itself does: a packet
//! that gets no answer for KEEPALIVE_TIMEOUT + REKEY_TIMEOUT = 15 s makes it start over (whitepaper 6.5).

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use keyservice::PublicKey;
use mesh_api::status::PeerState;
use mesh_uapi::{Device, Peer};

/// REJECT_AFTER_TIME: older sessions carry nothing.
const REJECT_AFTER: Duration = Duration::from_secs(180);
/// Sending for so long without hearing anything is a fault.
const UNANSWERED: Duration = Duration::from_secs(15);
/// No longer sending for so long is no longer a fault, only silence.
const QUIET: Duration = Duration::from_secs(30);

/// Seconds since the last handshake; `None` before the first. A clock set back counts as no time.
pub(super) fn handshake_age(now: SystemTime, peer: &Peer) -> Option<u64> {
    peer.last_handshake.map(|at| now.duration_since(at).map_or(0, |age| age.as_secs()))
}

#[derive(Debug, Clone)]
struct Track {
    rx_bytes: u64,
    tx_bytes: u64,
    handshake: Option<SystemTime>,
    /// First growth of `tx_bytes` since anything was heard.
    sending_since: Option<Instant>,
    /// Last growth of `tx_bytes`.
    sent: Option<Instant>,
}

/// Remembers each peer's counters from one reading to the next.
#[derive(Debug, Clone, Default)]
pub struct PeerTracker {
    tracks: BTreeMap<(String, PublicKey), Track>,
}

impl PeerTracker {
    /// Takes a reading of a device and judges its peers. `now` is the monotonic clock (for spans between
    /// readings), `wall` the wall clock (for the age of handshakes). Peers that are gone are forgotten.
    pub fn observe(
        &mut self,
        name: &str,
        device: &Device,
        now: Instant,
        wall: SystemTime,
    ) -> BTreeMap<(String, PublicKey), PeerState> {
        self.tracks.retain(|(on, key), _| on != name || device.peers.contains_key(key));
        let states = device.peers.iter().map(|(key, peer)| {
            let id = (name.to_owned(), *key);
            let track = self.tracks.entry(id.clone()).or_insert_with(|| Track {
                rx_bytes: peer.rx_bytes,
                tx_bytes: peer.tx_bytes,
                handshake: peer.last_handshake,
                sending_since: None,
                sent: None,
            });
            track.read(peer, now);
            (id, track.judge(peer, now, wall))
        });
        states.collect()
    }
}

impl Track {
    fn read(&mut self, peer: &Peer, now: Instant) {
        // Counters that shrink are a new device behind the same name: start over.
        let heard = peer.rx_bytes != self.rx_bytes || peer.last_handshake != self.handshake;
        if heard || peer.tx_bytes < self.tx_bytes {
            self.sending_since = None;
            self.sent = None;
        } else if peer.tx_bytes > self.tx_bytes {
            self.sending_since.get_or_insert(now);
            self.sent = Some(now);
        }
        self.rx_bytes = peer.rx_bytes;
        self.tx_bytes = peer.tx_bytes;
        self.handshake = peer.last_handshake;
    }

    fn judge(&self, peer: &Peer, now: Instant, wall: SystemTime) -> PeerState {
        if let (Some(since), Some(sent)) = (self.sending_since, self.sent)
            && sent.saturating_duration_since(since) >= UNANSWERED
            && now.saturating_duration_since(sent) < QUIET
        {
            return PeerState::Down;
        }
        match handshake_age(wall, peer) {
            Some(age) if age <= REJECT_AFTER.as_secs() => PeerState::Up,
            _ => PeerState::Idle,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Clock {
        start: Instant,
        tracker: PeerTracker,
    }

    impl Clock {
        fn new() -> Self {
            Self { start: Instant::now(), tracker: PeerTracker::default() }
        }

        /// One reading at `at` seconds; the handshake was at `handshake` seconds.
        fn read(&mut self, at: u64, rx: u64, tx: u64, handshake: Option<u64>) -> PeerState {
            let epoch = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
            let peer = Peer {
                rx_bytes: rx,
                tx_bytes: tx,
                last_handshake: handshake.map(|at| epoch + Duration::from_secs(at)),
                ..Peer::default()
            };
            let mut device = Device::default();
            device.peers.insert(PublicKey::from_bytes([7; 32]), peer);
            let now = self.start + Duration::from_secs(at);
            let states = self.tracker.observe("margay0", &device, now, epoch + Duration::from_secs(at));
            *states.values().next().unwrap()
        }
    }

    #[test]
    fn a_recent_handshake_is_up_until_the_session_expires() {
        let mut clock = Clock::new();
        assert_eq!(clock.read(10, 100, 100, Some(0)), PeerState::Up);
        assert_eq!(clock.read(180, 100, 100, Some(0)), PeerState::Up);
        assert_eq!(clock.read(181, 100, 100, Some(0)), PeerState::Idle);
    }

    #[test]
    fn silence_without_traffic_is_idle_not_down() {
        let mut clock = Clock::new();
        for at in (0..600).step_by(5) {
            assert_eq!(clock.read(at, 0, 0, None), PeerState::Idle);
        }
    }

    #[test]
    fn handshakes_that_nobody_answers_are_down_after_fifteen_seconds() {
        let mut clock = Clock::new();
        assert_eq!(clock.read(0, 0, 0, None), PeerState::Idle);
        assert_eq!(clock.read(5, 0, 148, None), PeerState::Idle);
        assert_eq!(clock.read(15, 0, 444, None), PeerState::Idle);
        assert_eq!(clock.read(20, 0, 592, None), PeerState::Down);
        assert_eq!(clock.read(45, 0, 592, None), PeerState::Down);
        assert_eq!(clock.read(50, 0, 592, None), PeerState::Idle, "it gave up: nothing is being sent");
    }

    #[test]
    fn a_peer_that_dies_is_down_before_its_session_expires() {
        let mut clock = Clock::new();
        clock.read(0, 100, 100, Some(0));
        clock.read(10, 100, 200, Some(0));
        assert_eq!(clock.read(25, 100, 300, Some(0)), PeerState::Down);
        assert_eq!(clock.read(26, 192, 300, Some(26)), PeerState::Up);
    }

    #[test]
    fn one_passive_keepalive_is_not_a_fault() {
        let mut clock = Clock::new();
        clock.read(0, 100, 100, Some(0));
        assert_eq!(clock.read(10, 100, 132, Some(0)), PeerState::Up);
        assert_eq!(clock.read(60, 100, 132, Some(0)), PeerState::Up);
    }

    #[test]
    fn a_restarted_device_starts_with_a_clean_slate() {
        let mut clock = Clock::new();
        clock.read(0, 100, 5000, None);
        clock.read(5, 100, 5100, None);
        assert_eq!(clock.read(20, 100, 5200, None), PeerState::Down);
        assert_eq!(clock.read(22, 0, 0, None), PeerState::Idle);
    }
}
