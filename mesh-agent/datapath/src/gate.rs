//! Who may make us compute a handshake.
//!
//! boringtun's limiter counts all handshakes together, so that one flooder puts every peer under load, and
//! its cookie ignores the source port. Here each source has a bucket of its own. A source beyond it must
//! return a cookie, which proves that it receives what is sent to its address *and port*; with the cookie
//! it has a second bucket, so that forged sources cannot drain the one of the real owner. Only when all
//! together send more than [`TOTAL_RATE`] does everyone need a cookie.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use boringtun::x25519;

use crate::counters::Drop;
use crate::limiter::SourceLimiter;

/// Handshakes a second from all sources beyond which everyone needs a cookie. One costs about 0.3 ms.
pub const TOTAL_RATE: u32 = 1000;
/// Length of a cookie reply.
pub const COOKIE_REPLY: usize = 64;

/// What became of a handshake message.
pub enum Verdict<'a> {
    /// It may be worked on.
    Pass(Packet<'a>),
    /// Send this many bytes of the reply buffer back to the source.
    Cookie(usize),
    /// Drop it.
    Drop(Drop),
}

/// The guard of one private key.
pub struct Gate {
    /// Checks mac1 only.
    open: RateLimiter,
    /// Is always under load: demands a cookie.
    strict: RateLimiter,
    /// Turns a source address and port into the address that the cookie is made for.
    binding: [RandomState; 2],
    first: SourceLimiter,
    with_cookie: SourceLimiter,
    window: (Instant, u32),
}

impl Gate {
    /// For the device whose public key this is.
    pub fn new(public: &x25519::PublicKey, now: Instant) -> Self {
        Self {
            open: RateLimiter::new(public, u64::MAX),
            strict: RateLimiter::new(public, 0),
            binding: [RandomState::new(), RandomState::new()],
            first: SourceLimiter::default(),
            with_cookie: SourceLimiter::default(),
            window: (now, 0),
        }
    }

    /// Judges a handshake initiation or response. A cookie reply is written to `reply`.
    pub fn check<'a>(
        &mut self,
        now: Instant,
        from: SocketAddr,
        message: &'a [u8],
        reply: &mut [u8; COOKIE_REPLY],
    ) -> Verdict<'a> {
        // Without the right mac1 a message says nothing, so it takes no token either.
        let packet = match self.open.verify_packet(None, message, reply) {
            Ok(packet) => packet,
            Err(TunnResult::Err(WireGuardError::InvalidMac)) => return Verdict::Drop(Drop::BadMac),
            Err(_) => return Verdict::Drop(Drop::UnknownType),
        };
        let all_busy = self.count(now);
        if !all_busy && self.first.take(from.ip(), now) {
            return Verdict::Pass(packet);
        }
        let bound = Some(self.bound_address(from));
        match self.strict.verify_packet(bound, message, reply) {
            Ok(packet) if self.with_cookie.take(from.ip(), now) => Verdict::Pass(packet),
            Ok(_) => Verdict::Drop(Drop::RateLimited),
            Err(TunnResult::WriteToNetwork(cookie)) => Verdict::Cookie(cookie.len()),
            Err(_) => Verdict::Drop(Drop::BadMac),
        }
    }

    /// Counts a message; true once more than [`TOTAL_RATE`] came in this second.
    fn count(&mut self, now: Instant) -> bool {
        let (start, count) = &mut self.window;
        if now.saturating_duration_since(*start) >= Duration::from_secs(1) {
            self.window = (now, 1);
            return false;
        }
        *count = count.saturating_add(1);
        *count > TOTAL_RATE
    }

    fn bound_address(&self, from: SocketAddr) -> IpAddr {
        let mut bytes = [0; 16];
        for (half, key) in bytes.chunks_exact_mut(8).zip(&self.binding) {
            half.copy_from_slice(&key.hash_one((from.ip(), from.port())).to_be_bytes());
        }
        IpAddr::from(bytes)
    }

    /// Drops the sources that have gone quiet.
    pub fn forget_quiet(&mut self, now: Instant) {
        self.first.forget_full(now);
        self.with_cookie.forget_full(now);
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("sources", &self.first.len()).finish_non_exhaustive()
    }
}
