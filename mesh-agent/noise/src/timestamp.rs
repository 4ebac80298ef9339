//! TAI64N (<https://cr.yp.to/libtai/tai64.html>), by which an initiation is newer than the one before.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// 2^62, and the 10 leap seconds of 1972 that TAI64 begins with.
const BASE: u64 = 0x4000_0000_0000_000a;
/// Steps of 2^24 ns, as in the kernel: a finer clock tells more about the machine than anyone needs.
const STEP: u32 = 1 << 24;

/// 8 bytes of seconds and 4 of nanoseconds, big endian: they compare as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp(pub [u8; 12]);

impl Timestamp {
    /// The time `wall`, or a step after `last` if that is not later: clocks go back, timestamps never do.
    pub fn after(last: Self, wall: SystemTime) -> Self {
        let since = wall.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let now = Self::of(BASE.saturating_add(since.as_secs()), since.subsec_nanos() / STEP * STEP);
        if now > last { now } else { last.next() }
    }

    fn of(seconds: u64, nanos: u32) -> Self {
        let mut bytes = [0; 12];
        let (high, low) = bytes.split_at_mut(8);
        high.copy_from_slice(&seconds.to_be_bytes());
        low.copy_from_slice(&nanos.to_be_bytes());
        Self(bytes)
    }

    fn next(self) -> Self {
        let (seconds, nanos) = self.0.split_at(8);
        let seconds = seconds.try_into().map_or(0, u64::from_be_bytes);
        let nanos = nanos.try_into().map_or(0, u32::from_be_bytes);
        match nanos.checked_add(STEP).filter(|nanos| *nanos < 1_000_000_000) {
            Some(nanos) => Self::of(seconds, nanos),
            None => Self::of(seconds.saturating_add(1), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_grow_even_when_the_clock_goes_back() {
        let now = UNIX_EPOCH + Duration::new(1_700_000_000, 999_999_999);
        let mut last = Timestamp::after(Timestamp::default(), now);
        assert_eq!(last.0[..8], 0x4000_0000_6553_f10a_u64.to_be_bytes());
        for back in 0..200 {
            let next = Timestamp::after(last, now - Duration::from_secs(back));
            assert!(next > last);
            last = next;
        }
        assert!(Timestamp::after(last, now + Duration::from_secs(60)) > last);
    }
}
