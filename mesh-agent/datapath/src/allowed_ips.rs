//! Which peer an address belongs to: a hash table for each length of prefix that there is, the longest first.
//!
//! A mesh has few lengths (a node's pod prefixes, single addresses) and many prefixes of each, so a look-up is a few probes,
//! however many peers there are; at worst one for each of 33 lengths, or 129.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;

use ipnet::IpNet;

/// Prefixes of both families, each with a value.
#[derive(Debug)]
pub struct AllowedIps<V> {
    ipv4: Tables<V>,
    ipv6: Tables<V>,
}

/// By length of prefix, the longest first; none is empty.
#[derive(Debug)]
struct Tables<V>(Vec<Table<V>>);

#[derive(Debug)]
struct Table<V> {
    length: u8,
    mask: u128,
    values: HashMap<u128, V, Fold>,
}

impl<V> Default for AllowedIps<V> {
    fn default() -> Self {
        Self { ipv4: Tables(Vec::new()), ipv6: Tables(Vec::new()) }
    }
}

fn left_aligned(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)) << 96,
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The first `length` bits.
fn mask(length: u8) -> u128 {
    !u128::MAX.checked_shr(length.into()).unwrap_or(0)
}

impl<V> Tables<V> {
    /// Where the table of a length is, or where it belongs.
    fn place(&self, length: u8) -> Result<usize, usize> {
        self.0.binary_search_by(|table| length.cmp(&table.length))
    }

    fn insert(&mut self, bits: u128, length: u8, value: V) -> Option<V> {
        let at = self.place(length).unwrap_or_else(|at| {
            self.0.insert(at, Table { length, mask: mask(length), values: HashMap::default() });
            at
        });
        let table = self.0.get_mut(at)?;
        table.values.insert(bits & table.mask, value)
    }

    fn remove(&mut self, bits: u128, length: u8) -> Option<V> {
        let at = self.place(length).ok()?;
        let table = self.0.get_mut(at)?;
        let removed = table.values.remove(&(bits & table.mask));
        if table.values.is_empty() {
            self.0.remove(at);
        }
        removed
    }

    fn longest_match(&self, bits: u128) -> Option<&V> {
        self.0.iter().find_map(|table| table.values.get(&(bits & table.mask)))
    }
}

impl<V> AllowedIps<V> {
    fn tables(&mut self, prefix: &IpNet) -> &mut Tables<V> {
        match prefix {
            IpNet::V4(_) => &mut self.ipv4,
            IpNet::V6(_) => &mut self.ipv6,
        }
    }

    /// Gives `prefix` to `value`; returns who had exactly this prefix before.
    pub fn insert(&mut self, prefix: IpNet, value: V) -> Option<V> {
        self.tables(&prefix).insert(left_aligned(prefix.addr()), prefix.prefix_len(), value)
    }

    /// Takes exactly `prefix` away; returns who had it.
    pub fn remove(&mut self, prefix: &IpNet) -> Option<V> {
        self.tables(prefix).remove(left_aligned(prefix.addr()), prefix.prefix_len())
    }

    /// The value of the longest prefix that holds `address`.
    pub fn longest_match(&self, address: IpAddr) -> Option<&V> {
        let tables = if address.is_ipv4() { &self.ipv4 } else { &self.ipv6 };
        tables.longest_match(left_aligned(address))
    }
}

/// Two multiplications for a prefix. The seed is secret, though only who configures the device could choose what collides.
#[derive(Debug, Clone, Copy)]
struct Fold {
    seed: u64,
    state: u64,
}

impl Default for Fold {
    fn default() -> Self {
        Self { seed: RandomState::new().hash_one(0_u8), state: 0 }
    }
}

impl BuildHasher for Fold {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        Self { state: self.seed, ..*self }
    }
}

impl Hasher for Fold {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u128(u128::from(*byte)));
    }

    fn write_u128(&mut self, value: u128) {
        for half in [value as u64, (value >> 64) as u64] {
            // An odd number without pattern: 2^64 by the golden ratio.
            let product = u128::from(self.state ^ half).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.state = (product ^ (product >> 64)) as u64 ^ self.seed;
        }
    }

    fn finish(&self) -> u64 {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Few distinct bits, so that prefixes nest, collide and fork.
    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            prop::array::uniform4(prop_oneof![Just(0u8), Just(10), Just(11), Just(255)])
                .prop_map(IpAddr::from),
            prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(128), Just(255)], 16)
                .prop_map(|b| IpAddr::from(<[u8; 16]>::try_from(b).unwrap())),
        ]
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (address(), any::<u8>()).prop_map(|(ip, n)| {
            let width = if ip.is_ipv4() { 32 } else { 128 };
            IpNet::new(ip, n % (width + 1)).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn tables_agree_with_a_linear_scan(
            steps in prop::collection::vec((any::<bool>(), prefix(), 0u8..8), 0..120),
            asked in prop::collection::vec(address(), 0..40),
        ) {
            let mut tables = AllowedIps::default();
            let mut list = BTreeMap::new();
            for (add, prefix, value) in steps {
                if add {
                    prop_assert_eq!(tables.insert(prefix, value), list.insert(prefix, value));
                } else {
                    prop_assert_eq!(tables.remove(&prefix), list.remove(&prefix));
                }
            }
            let ends = list.keys().flat_map(|p| [p.network(), p.broadcast()]);
            for address in ends.chain(asked) {
                let scanned = list.iter().filter(|(p, _)| p.contains(&address)).max_by_key(|(p, _)| p.prefix_len());
                prop_assert_eq!(tables.longest_match(address), scanned.map(|(_, v)| v));
            }
            for prefix in list.keys() {
                prop_assert!(tables.remove(prefix).is_some());
            }
            prop_assert!(tables.ipv4.0.is_empty() && tables.ipv6.0.is_empty(), "tables are left behind");
        }
    }
}
