//! Receiver indices. The protocol core takes 24 bits from its caller and counts its handshakes in the low 8.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use rand::Rng;

/// The 24 bits of a message's receiver index that name the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerIndex(u32);

impl PeerIndex {
    /// Of a receiver index on the wire.
    pub fn of(receiver_index: u32) -> Self {
        Self(receiver_index >> 8)
    }

    /// As `Tunn::new` wants it.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// Who has which index. They are random, so that one tells nothing about another peer's or about how many
/// there are.
#[derive(Debug)]
pub struct IndexTable<V>(HashMap<PeerIndex, V>);

impl<V> Default for IndexTable<V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<V> IndexTable<V> {
    /// Gives `value` an unused index; `None` if there is none left.
    pub fn insert(&mut self, value: V, rng: &mut impl Rng) -> Option<PeerIndex> {
        if self.0.len() >= 1 << 23 {
            // Half full: random tries would take long, and 8 million peers do not fit anyway.
            return None;
        }
        loop {
            let index = PeerIndex(rng.random::<u32>() >> 8);
            if let Entry::Vacant(entry) = self.0.entry(index) {
                entry.insert(value);
                return Some(index);
            }
        }
    }

    /// Frees an index.
    pub fn remove(&mut self, index: PeerIndex) {
        self.0.remove(&index);
    }

    /// Who has `index`.
    pub fn get(&self, index: PeerIndex) -> Option<&V> {
        self.0.get(&index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn session_indices_are_random_and_unique() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut table = IndexTable::default();
        let given: Vec<_> = (0..1000).map(|n| table.insert(n, &mut rng).unwrap()).collect();
        for (n, index) in given.iter().enumerate() {
            assert_eq!(table.get(*index), Some(&n));
        }
        let steps = given.windows(2).filter(|w| w[1].0 == w[0].0.wrapping_add(1)).count();
        assert!(steps < 3, "indices are counted up, not random");
        // Spread over the whole range: each of 16 parts gets some.
        let parts: std::collections::HashSet<_> = given.iter().map(|i| i.0 >> 20).collect();
        assert_eq!(parts.len(), 16);
    }
}
