//! Which peer an address belongs to: a path-compressed binary trie for each family, longest match wins.

use std::net::IpAddr;

use ipnet::IpNet;

/// Prefixes of both families, each with a value.
#[derive(Debug)]
pub struct AllowedIps<V> {
    ipv4: Link<V>,
    ipv6: Link<V>,
}

type Link<V> = Option<Box<Node<V>>>;

/// A prefix. Without a value it is only where two longer ones part.
#[derive(Debug)]
struct Node<V> {
    /// The prefix, left aligned.
    bits: u128,
    length: u8,
    value: Option<V>,
    children: [Link<V>; 2],
}

impl<V> Default for AllowedIps<V> {
    fn default() -> Self {
        Self { ipv4: None, ipv6: None }
    }
}

fn left_aligned(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)) << 96,
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The bit after the first `length` ones.
fn bit(bits: u128, length: u8) -> usize {
    usize::from(bits.checked_shl(u32::from(length)).unwrap_or(0) >> 127 == 1)
}

fn first(bits: u128, length: u8) -> u128 {
    bits & !u128::MAX.checked_shr(u32::from(length)).unwrap_or(0)
}

fn common(a: u128, b: u128, limit: u8) -> u8 {
    // At most 128, so it fits.
    ((a ^ b).leading_zeros() as u8).min(limit)
}

impl<V> Node<V> {
    fn new(bits: u128, length: u8, value: Option<V>) -> Box<Self> {
        Box::new(Self { bits, length, value, children: [None, None] })
    }

    fn child(&mut self, towards: u128) -> &mut Link<V> {
        let [zero, one] = &mut self.children;
        if bit(towards, self.length) == 0 { zero } else { one }
    }
}

impl<V> AllowedIps<V> {
    fn root(&mut self, prefix: &IpNet) -> &mut Link<V> {
        match prefix {
            IpNet::V4(_) => &mut self.ipv4,
            IpNet::V6(_) => &mut self.ipv6,
        }
    }

    /// Gives `prefix` to `value`; returns who had exactly this prefix before.
    pub fn insert(&mut self, prefix: IpNet, value: V) -> Option<V> {
        let length = prefix.prefix_len();
        let bits = first(left_aligned(prefix.addr()), length);
        let mut link = self.root(&prefix);
        loop {
            let Some(node) = link else {
                *link = Some(Node::new(bits, length, Some(value)));
                return None;
            };
            let shared = common(node.bits, bits, node.length.min(length));
            if shared < node.length {
                // The new prefix, or a fork on the way to it, goes above this node.
                let mut above = Node::new(first(bits, shared), shared, None);
                let below = link.take();
                if let Some(node) = below {
                    let towards = node.bits;
                    *above.child(towards) = Some(node);
                }
                if shared == length {
                    above.value = Some(value);
                } else {
                    *above.child(bits) = Some(Node::new(bits, length, Some(value)));
                }
                *link = Some(above);
                return None;
            }
            if shared == length {
                return node.value.replace(value);
            }
            link = link.as_mut()?.child(bits);
        }
    }

    /// Takes exactly `prefix` away; returns who had it.
    pub fn remove(&mut self, prefix: &IpNet) -> Option<V> {
        let length = prefix.prefix_len();
        let bits = first(left_aligned(prefix.addr()), length);
        remove(self.root(prefix), bits, length)
    }

    /// The value of the longest prefix that holds `address`.
    pub fn longest_match(&self, address: IpAddr) -> Option<&V> {
        let bits = left_aligned(address);
        let (mut link, width) = match address {
            IpAddr::V4(_) => (&self.ipv4, 32),
            IpAddr::V6(_) => (&self.ipv6, 128),
        };
        let mut best = None;
        while let Some(node) = link {
            if common(node.bits, bits, node.length) < node.length {
                break;
            }
            best = node.value.as_ref().or(best);
            if node.length == width {
                break;
            }
            let [zero, one] = &node.children;
            link = if bit(bits, node.length) == 0 { zero } else { one };
        }
        best
    }
}

fn remove<V>(link: &mut Link<V>, bits: u128, length: u8) -> Option<V> {
    let node = link.as_mut()?;
    if node.length > length || common(node.bits, bits, node.length) < node.length {
        return None;
    }
    let removed =
        if node.length == length { node.value.take() } else { remove(node.child(bits), bits, length) };
    // A node that is neither a prefix nor a fork is spliced out, so that the depth follows the content.
    if node.value.is_none() {
        match &mut node.children {
            [Some(_), Some(_)] => {}
            [only, None] | [None, only] => *link = only.take(),
        }
    }
    removed
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
        fn trie_agrees_with_a_linear_scan(
            steps in prop::collection::vec((any::<bool>(), prefix(), 0u8..8), 0..120),
            asked in prop::collection::vec(address(), 0..40),
        ) {
            let mut trie = AllowedIps::default();
            let mut list = BTreeMap::new();
            for (add, prefix, value) in steps {
                if add {
                    prop_assert_eq!(trie.insert(prefix, value), list.insert(prefix, value));
                } else {
                    prop_assert_eq!(trie.remove(&prefix), list.remove(&prefix));
                }
            }
            let ends = list.keys().flat_map(|p| [p.network(), p.broadcast()]);
            for address in ends.chain(asked) {
                let scanned = list.iter().filter(|(p, _)| p.contains(&address)).max_by_key(|(p, _)| p.prefix_len());
                prop_assert_eq!(trie.longest_match(address), scanned.map(|(_, v)| v));
            }
            for prefix in list.keys() {
                prop_assert!(trie.remove(prefix).is_some());
            }
            prop_assert!(trie.ipv4.is_none() && trie.ipv6.is_none(), "nodes are left behind");
        }
    }
}
