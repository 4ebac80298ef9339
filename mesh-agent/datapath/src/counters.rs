//! Why packets were dropped.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! drops {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// The reason one packet went no further.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Drop { $($(#[doc = $doc])+ $name,)+ }

        impl Drop {
            /// Every reason.
            pub const ALL: &'static [Drop] = &[$(Drop::$name,)+];

            /// Its name in `get=stats` (after `drop_`) and in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Drop::$name => $text,)+ }
            }
        }
    };
}

drops! {
    /// A datagram shorter than its message type needs.
    Truncated = "truncated",
    /// A handshake message longer than its type is, a datagram longer than the buffer, or a packet from
    /// the TUN too long for a datagram.
    Oversized = "oversized",
    /// Not a WireGuard message (type or reserved bytes).
    UnknownType = "unknown_type",
    /// No session or handshake of ours has the receiver index.
    UnknownIndex = "unknown_index",
    /// The counter was seen before, or is too far behind the newest.
    Replayed = "replayed",
    /// A counter that no honest peer reaches (2^64 - 2^13, REJECT_AFTER_MESSAGES).
    CounterExhausted = "counter_exhausted",
    /// mac1 of a handshake message is wrong: the sender does not know our public key.
    BadMac = "bad_mac",
    /// The authenticator is wrong.
    BadAuth = "bad_auth",
    /// A handshake by a key that is no peer of ours.
    UnknownPeer = "unknown_peer",
    /// A handshake initiation older than one already seen from the peer.
    StaleHandshake = "stale_handshake",
    /// A handshake response or cookie reply that nobody waits for.
    Unexpected = "unexpected",
    /// Answered by a cookie reply instead: its source sends many handshakes, or everyone does.
    CookieDemanded = "cookie_demanded",
    /// A handshake beyond its source's limit, in spite of a valid cookie.
    RateLimited = "rate_limited",
    /// A handshake that came while more waited to be worked on than can.
    HandshakeQueueFull = "handshake_queue_full",
    /// Authenticated, but not an IP packet of the length it says.
    BadInner = "bad_inner",
    /// Authenticated, but its inner source belongs to another peer or to none.
    SpoofedSource = "spoofed_source",
    /// From the TUN: not an IP packet.
    BadPacket = "bad_packet",
    /// From the TUN: no peer's allowed IPs hold the destination.
    NoPeer = "no_peer",
    /// From the TUN: the peer has no endpoint yet.
    NoEndpoint = "no_endpoint",
    /// From the TUN: too many packets wait for the handshake; the oldest goes.
    QueueFull = "queue_full",
    /// Waited for a handshake that did not come about.
    HandshakeFailed = "handshake_failed",
    /// The device has no private key.
    NoKey = "no_key",
    /// No socket of the endpoint's address family, or the kernel refused to send.
    SendFailed = "send_failed",
    /// The TUN refused the packet, as it does while its link is down.
    TunWriteFailed = "tun_write_failed",
}

/// One number a reason.
#[derive(Debug)]
pub struct Counters([AtomicU64; Drop::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; Drop::ALL.len()])
    }
}

impl Counters {
    /// Counts one.
    pub fn count(&self, reason: Drop) {
        self.add(reason, 1);
    }

    /// Counts several.
    pub fn add(&self, reason: Drop, packets: u64) {
        if let Some(counter) = self.0.get(reason as usize) {
            counter.fetch_add(packets, Ordering::Relaxed);
        }
    }

    /// The number so far.
    pub fn get(&self, reason: Drop) -> u64 {
        self.0.get(reason as usize).map_or(0, |c| c.load(Ordering::Relaxed))
    }

    /// All reasons by name; with `zeros` also those that never happened.
    pub fn by_name(&self, zeros: bool) -> BTreeMap<String, u64> {
        let all = Drop::ALL.iter().map(|&reason| (reason.name().to_owned(), self.get(reason)));
        all.filter(|(_, count)| zeros || *count > 0).collect()
    }
}
