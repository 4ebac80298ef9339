//! Receiver indices: how a datagram names the session it belongs to.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use rand::Rng;

/// Who has which index. They are random, so that one tells nothing about another peer's or about how many
/// there are.
#[derive(Debug)]
pub struct IndexTable<V>(HashMap<u32, V>);

impl<V> Default for IndexTable<V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<V> IndexTable<V> {
    /// Gives `value` an unused index; `None` if there is none left.
    pub fn insert(&mut self, value: V, rng: &mut impl Rng) -> Option<u32> {
        if self.0.len() >= 1 << 31 {
            // Half full: random tries would take long.
            return None;
        }
        loop {
            let index = rng.random();
            if let Entry::Vacant(entry) = self.0.entry(index) {
                entry.insert(value);
                return Some(index);
            }
        }
    }

    /// Puts `value` in the place of what has `index`.
    pub fn replace(&mut self, index: u32, value: V) {
        self.0.insert(index, value);
    }

    /// Frees an index.
    pub fn remove(&mut self, index: u32) {
        self.0.remove(&index);
    }

    /// Who has `index`.
    pub fn get(&self, index: u32) -> Option<&V> {
        self.0.get(&index)
    }

    /// How many are taken.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

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
        let steps = given.windows(2).filter(|w| w[1] == w[0].wrapping_add(1)).count();
        assert!(steps < 3, "indices are counted up, not random");
        // Spread over the whole range: each of 16 parts gets some.
        let parts: std::collections::HashSet<_> = given.iter().map(|i| i >> 28).collect();
        assert_eq!(parts.len(), 16);
    }
}
