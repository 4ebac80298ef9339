//! Which peer an address belongs to: the longest prefix wins.
//!
//! A hash table for each length that there is, longest first. A mesh has few lengths (pod ranges, single addresses), so
//! a look-up takes as long with ten thousand prefixes as with one; the kernel's trie gets deeper with each doubling.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;

use ipnet::IpNet;

/// Prefixes of both families, each with a value.
#[derive(Debug)]
pub struct AllowedIps<V> {
    ipv4: Family<V>,
    ipv6: Family<V>,
}

/// Prefixes by length, longest first; none of the tables is empty.
type Family<V> = Vec<(u8, HashMap<u128, V, Folded>)>;

impl<V> Default for AllowedIps<V> {
    fn default() -> Self {
        Self { ipv4: Vec::new(), ipv6: Vec::new() }
    }
}

fn left_aligned(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)) << 96,
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn first(bits: u128, length: u8) -> u128 {
    bits & !u128::MAX.checked_shr(u32::from(length)).unwrap_or(0)
}

impl<V> AllowedIps<V> {
    fn family(&mut self, prefix: &IpNet) -> &mut Family<V> {
        match prefix {
            IpNet::V4(_) => &mut self.ipv4,
            IpNet::V6(_) => &mut self.ipv6,
        }
    }

    /// Gives `prefix` to `value`; returns who had exactly this prefix before.
    pub fn insert(&mut self, prefix: IpNet, value: V) -> Option<V> {
        let length = prefix.prefix_len();
        let bits = first(left_aligned(prefix.addr()), length);
        let family = self.family(&prefix);
        match family.binary_search_by(|(other, _)| length.cmp(other)) {
            Ok(at) => family.get_mut(at)?.1.insert(bits, value),
            Err(at) => {
                let mut table = HashMap::with_hasher(Folded::default());
                table.insert(bits, value);
                family.insert(at, (length, table));
                None
            }
        }
    }

    /// Takes exactly `prefix` away; returns who had it.
    pub fn remove(&mut self, prefix: &IpNet) -> Option<V> {
        let length = prefix.prefix_len();
        let bits = first(left_aligned(prefix.addr()), length);
        let family = self.family(prefix);
        let at = family.binary_search_by(|(other, _)| length.cmp(other)).ok()?;
        let (_, table) = family.get_mut(at)?;
        let removed = table.remove(&bits);
        if table.is_empty() {
            family.remove(at);
        }
        removed
    }

    /// The value of the longest prefix that holds `address`.
    pub fn longest_match(&self, address: IpAddr) -> Option<&V> {
        let bits = left_aligned(address);
        let family = if address.is_ipv4() { &self.ipv4 } else { &self.ipv6 };
        family.iter().find_map(|(length, table)| table.get(&first(bits, *length)))
    }
}

/// A hash of one multiplication, over a random number: these keys are from the configuration, and the default hash
/// takes longer than the rest of a look-up.
#[derive(Debug, Clone)]
struct Folded(u64);

impl Default for Folded {
    fn default() -> Self {
        Self(RandomState::new().hash_one(0))
    }
}

impl BuildHasher for Folded {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        self.clone()
    }
}

impl Folded {
    fn add(&mut self, word: u64) {
        // The golden ratio, as in Fibonacci hashing; both halves of the product, for either alone keeps patterns.
        let product = u128::from(self.0 ^ word) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

impl Hasher for Folded {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            self.add(u64::from_ne_bytes(word));
        }
    }

    fn write_u128(&mut self, key: u128) {
        self.add(key as u64);
        self.add((key >> 64) as u64);
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
            let mut table = AllowedIps::default();
            let mut list = BTreeMap::new();
            for (add, prefix, value) in steps {
                if add {
                    prop_assert_eq!(table.insert(prefix, value), list.insert(prefix, value));
                } else {
                    prop_assert_eq!(table.remove(&prefix), list.remove(&prefix));
                }
            }
            let ends = list.keys().flat_map(|p| [p.network(), p.broadcast()]);
            for address in ends.chain(asked) {
                let scanned = list.iter().filter(|(p, _)| p.contains(&address)).max_by_key(|(p, _)| p.prefix_len());
                prop_assert_eq!(table.longest_match(address), scanned.map(|(_, v)| v));
            }
            for prefix in list.keys() {
                prop_assert!(table.remove(prefix).is_some());
            }
            prop_assert!(table.ipv4.is_empty() && table.ipv6.is_empty(), "tables are left behind");
        }
    }

    #[test]
    fn pod_ranges_and_addresses_spread_over_the_whole_hash() {
        let hasher = Folded::default();
        let keys = (0..4096u32).flat_map(|n| {
            let v4 = u128::from(0x0a00_0000 + (n << 8)) << 96;
            [v4, (0xfd00_0010u128 << 96) + (u128::from(n) << 64)]
        });
        // The table takes its place from the low bits, and seven more from the top.
        let hashes: Vec<u64> = keys.map(|key| hasher.hash_one(key)).collect();
        for (part, all) in [((|hash| hash & 0xfff) as fn(u64) -> u64, 4096), (|hash| hash >> 57, 128)] {
            let parts: std::collections::HashSet<_> = hashes.iter().map(|hash| part(*hash)).collect();
            // Random numbers would leave one place in seven empty.
            assert!(parts.len() * 10 > all * 7, "{} of {all}", parts.len());
        }
    }
}
