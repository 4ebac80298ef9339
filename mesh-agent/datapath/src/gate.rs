//! Who may make us compute a handshake.
//!
//! Each source has a bucket of its own. A source beyond it must return a cookie, which proves that it receives what
//! is sent to its address *and port*; with the cookie it has a second bucket, so that forged sources cannot drain
//! the one of the real owner. Only when sources that are all within their own limit send more than [`TOTAL_RATE`]
//! together does everyone need a cookie: what one source sends beyond its limit is no load, and nobody else's matter.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_noise::message::COOKIE_REPLY;
use mesh_noise::{CookieMaker, Identity};
use rand::CryptoRng;

use crate::counters::Drop;
use crate::limiter::SourceLimiter;

/// Handshakes a second, of all sources within their limits, beyond which everyone needs a cookie. One costs about 0.3 ms.
pub const TOTAL_RATE: u32 = 1000;

/// What became of a handshake message.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may be worked on.
    Pass,
    /// This goes back to the source instead.
    Cookie([u8; COOKIE_REPLY]),
    /// Drop it.
    Drop(Drop),
}

/// The guard of one private key.
pub struct Gate {
    cookies: CookieMaker,
    first: SourceLimiter,
    with_cookie: SourceLimiter,
    window: (Instant, u32),
}

impl Gate {
    /// With all buckets full.
    pub fn new(now: Instant, rng: &mut impl CryptoRng) -> Self {
        Self {
            cookies: CookieMaker::new(now, rng),
            first: SourceLimiter::default(),
            with_cookie: SourceLimiter::default(),
            window: (now, 0),
        }
    }

    /// Judges a handshake initiation or response to `identity`.
    pub fn check(
        &mut self,
        identity: &Identity,
        now: Instant,
        from: SocketAddr,
        message: &[u8],
        rng: &mut impl CryptoRng,
    ) -> Verdict {
        // Without the right mac1 a message says nothing, so it takes no token either.
        if !identity.check_mac1(message) {
            return Verdict::Drop(Drop::BadMac);
        }
        if self.first.take(from.ip(), now) && !self.is_busy(now) {
            return Verdict::Pass;
        }
        self.cookies.rotate(now, rng);
        if !self.cookies.check_mac2(from, message) {
            return Verdict::Cookie(self.cookies.reply(identity, from, message, rng));
        }
        match self.with_cookie.take(from.ip(), now) {
            true => Verdict::Pass,
            false => Verdict::Drop(Drop::RateLimited),
        }
    }

    /// Counts a message within its source's limit; true once more than [`TOTAL_RATE`] came in this second.
    fn is_busy(&mut self, now: Instant) -> bool {
        let (start, count) = &mut self.window;
        if now.saturating_duration_since(*start) >= Duration::from_secs(1) {
            self.window = (now, 1);
            return false;
        }
        *count = count.saturating_add(1);
        *count > TOTAL_RATE
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
