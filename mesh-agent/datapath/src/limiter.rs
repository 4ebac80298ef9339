//! Token buckets, one for each source address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Handshakes a second that one source may go on with.
pub const RATE: u32 = 20;
/// Handshakes one source may send at once: several peers may be behind one address.
pub const BURST: u32 = 32;
/// Sources remembered. Beyond it, new ones are treated as over their limit.
pub const MAX_SOURCES: usize = 8192;

const COST: Duration = Duration::from_millis(1000 / RATE as u64);
const DEPTH: Duration = Duration::from_millis((1000 / RATE * BURST) as u64);

/// One bucket a source. A bucket is the time at which it will be full again.
#[derive(Debug, Default)]
pub struct SourceLimiter {
    full_at: HashMap<IpAddr, Instant>,
}

/// The unit of limiting: an IPv4 address, or an IPv6 /64, which one sender can have all of.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) & !u128::from(u64::MAX)).to_be_bytes()),
        v4 => v4,
    }
}

impl SourceLimiter {
    /// Takes a token of `address`; false if it has none left.
    pub fn take(&mut self, address: IpAddr, now: Instant) -> bool {
        let source = source_of(address);
        if !self.full_at.contains_key(&source) && self.full_at.len() >= MAX_SOURCES {
            self.forget_full(now);
            if self.full_at.len() >= MAX_SOURCES {
                return false;
            }
        }
        let full_at = self.full_at.entry(source).or_insert(now);
        let after = (*full_at).max(now) + COST;
        if after > now + DEPTH {
            return false;
        }
        *full_at = after;
        true
    }

    /// Drops the sources that have been quiet long enough to start afresh.
    pub fn forget_full(&mut self, now: Instant) {
        self.full_at.retain(|_, full_at| *full_at > now);
    }

    /// Sources remembered.
    pub fn len(&self) -> usize {
        self.full_at.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.full_at.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gets_its_burst_then_its_rate_and_no_other_source_pays() {
        let mut limiter = SourceLimiter::default();
        let (flooder, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let start = Instant::now();
        let at_once = (0..1000).filter(|_| limiter.take(flooder, start)).count();
        assert_eq!(at_once, BURST as usize);
        assert!(limiter.take(other, start));
        let later = start + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| limiter.take(flooder, later)).count(), RATE as usize);
    }

    #[test]
    fn addresses_of_one_ipv6_subnet_share_a_bucket() {
        let mut limiter = SourceLimiter::default();
        let now = Instant::now();
        let taken =
            (0..1000u128).filter(|n| limiter.take(IpAddr::from((n | 0x2001 << 112).to_be_bytes()), now));
        assert_eq!(taken.count(), BURST as usize);
    }

    #[test]
    fn memory_is_bounded_and_quiet_sources_are_forgotten() {
        let mut limiter = SourceLimiter::default();
        let now = Instant::now();
        for n in 0..2 * MAX_SOURCES as u32 {
            limiter.take(IpAddr::from(n.to_be_bytes()), now);
        }
        assert_eq!(limiter.len(), MAX_SOURCES);
        assert!(limiter.take(IpAddr::from([200, 0, 0, 1]), now + DEPTH * 2));
        assert_eq!(limiter.len(), 1);
    }
}
