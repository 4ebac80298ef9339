//! Which counters of a session were received (RFC 6479; kernel: `counter_validate` in receive.c).

/// Counters from here on are refused, whoever sends them (REJECT_AFTER_MESSAGES, paper 6.2).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// How far a counter may be behind the newest.
pub const WIDTH: u64 = 8192;

const BITS: u64 = u64::BITS as u64;
/// One word more than the width, so that a word can be emptied as a whole.
const WORDS: u64 = WIDTH / BITS + 1;

/// A bit for each of the last 8192 counters.
#[derive(Clone, PartialEq, Eq)]
pub struct Window {
    /// One more than the largest counter accepted; 0 before the first.
    next: u64,
    seen: [u64; WORDS as usize],
}

impl Default for Window {
    fn default() -> Self {
        Self { next: 0, seen: [0; WORDS as usize] }
    }
}

fn place(counter: u64) -> (usize, u64) {
    (((counter / BITS) % WORDS) as usize, 1 << (counter % BITS))
}

impl Window {
    /// Whether a packet with this counter would be new. Ask before the work of opening it.
    pub fn check(&self, counter: u64) -> bool {
        let (word, bit) = place(counter);
        counter < REJECT_AFTER_MESSAGES
            && (counter >= self.next
                || self.next - counter <= WIDTH && self.seen.get(word).is_some_and(|word| word & bit == 0))
    }

    /// Notes the counter of a packet that was authentic; false if it is none that is new.
    pub fn accept(&mut self, counter: u64) -> bool {
        if !self.check(counter) {
            return false;
        }
        if counter >= self.next {
            let newest = self.next.saturating_sub(1) / BITS;
            // Nothing was seen in the words that become current now.
            for word in (newest + 1..=counter / BITS).rev().take(WORDS as usize) {
                self.clear(word);
            }
            self.next = counter + 1;
        }
        let (word, bit) = place(counter);
        if let Some(word) = self.seen.get_mut(word) {
            *word |= bit;
        }
        true
    }

    fn clear(&mut self, word: u64) {
        if let Some(word) = self.seen.get_mut((word % WORDS) as usize) {
            *word = 0;
        }
    }

    /// Its state as numbers, for [`Window::from_words`].
    pub(crate) fn words(&self) -> impl Iterator<Item = u64> {
        std::iter::once(self.next).chain(self.seen)
    }

    /// How many numbers [`Window::words`] gives.
    pub(crate) const COUNT: usize = WORDS as usize + 1;

    /// `None` for one that was never: beyond the last counter.
    pub(crate) fn from_words(words: &[u64; Self::COUNT]) -> Option<Self> {
        let (next, seen) = words.split_first()?;
        if *next > REJECT_AFTER_MESSAGES {
            return None;
        }
        Some(Self { next: *next, seen: seen.try_into().ok()? })
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window").field("next", &self.next).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Remembers everything.
    #[derive(Default)]
    struct Naive(BTreeSet<u64>);

    impl Naive {
        fn accept(&mut self, counter: u64) -> bool {
            let newest = self.0.last().copied();
            counter < REJECT_AFTER_MESSAGES
                && newest.is_none_or(|newest| counter > newest || newest - counter < WIDTH)
                && self.0.insert(counter)
        }
    }

    fn step() -> impl Strategy<Value = i64> {
        prop_oneof![
            4 => -3i64..4,
            2 => -200i64..200,
            2 => Just(-8191i64),
            2 => Just(-8192i64),
            1 => -9000i64..9000,
            1 => Just(8192i64),
            1 => 100_000i64..1_000_000,
        ]
    }

    proptest! {
        #[test]
        fn window_agrees_with_a_set_of_all_counters(
            start in prop_oneof![Just(0u64), any::<u64>(), Just(REJECT_AFTER_MESSAGES - 20)],
            steps in prop::collection::vec(step(), 0..400),
        ) {
            let (mut window, mut naive) = (Window::default(), Naive::default());
            let mut at = start;
            for step in steps {
                at = at.saturating_add_signed(step);
                prop_assert_eq!(window.check(at), window.clone().accept(at));
                prop_assert_eq!(window.accept(at), naive.accept(at), "counter {}", at);
            }
        }
    }

    #[test]
    fn the_window_is_8192_wide() {
        let mut window = Window::default();
        assert!(window.accept(10_000));
        assert!(!window.check(10_000 - WIDTH));
        assert!(window.accept(10_001 - WIDTH));
        assert!(!window.accept(10_001 - WIDTH));
    }
}
