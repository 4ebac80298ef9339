//! A block that was checked: a prefix, whose it is, and which node has which of its addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_api::status::Issue;
use serde_json::Value;

use crate::object::{Allocation, IpBlockSpec};
use crate::range::{Family, address, around, bits, prefix, span};

/// Most host bits of a block: 4096 addresses fit an object with room to spare.
pub const MAX_HOST_BITS: u8 = 12;

/// A block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its prefix, of at most [`MAX_HOST_BITS`] host bits.
    pub cidr: IpNet,
    /// The node whose block it is.
    pub affinity: Option<String>,
    /// See [`IpBlockSpec::renewals`].
    pub renewals: u32,
    /// Which node has which address.
    pub allocations: BTreeMap<IpAddr, Allocation>,
}

/// The object's name: the address's parts and the prefix length, with `-` between them.
pub fn name(cidr: &IpNet) -> String {
    match cidr.network() {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{a}-{b}-{c}-{d}-{}", cidr.prefix_len())
        }
        IpAddr::V6(ip) => {
            let parts: Vec<String> = ip.segments().iter().map(|part| format!("{part:x}")).collect();
            format!("{}-{}", parts.join("-"), cidr.prefix_len())
        }
    }
}

/// The prefix of which `text` is the [`name`].
pub fn cidr_of(text: &str) -> Option<IpNet> {
    let (parts, len) = text.rsplit_once('-')?;
    let parts: Vec<&str> = parts.split('-').collect();
    let ip = if let Ok(parts) = <[&str; 4]>::try_from(parts.as_slice()) {
        let mut octets = [0; 4];
        for (octet, part) in octets.iter_mut().zip(parts) {
            *octet = part.parse().ok()?;
        }
        IpAddr::V4(Ipv4Addr::from(octets))
    } else {
        let parts = <[&str; 8]>::try_from(parts.as_slice()).ok()?;
        let mut segments = [0; 8];
        for (segment, part) in segments.iter_mut().zip(parts) {
            *segment = u16::from_str_radix(part, 16).ok()?;
        }
        IpAddr::V6(Ipv6Addr::from(segments))
    };
    let cidr = around(ip, len.parse().ok()?)?;
    // One prefix has one name: no leading zeros, signs, capitals or host bits.
    (name(&cidr) == text).then_some(cidr)
}

impl Block {
    /// A block with nothing given out.
    pub fn new(cidr: IpNet, affinity: Option<String>) -> Self {
        Self { cidr, affinity, renewals: 0, allocations: BTreeMap::new() }
    }

    /// Its family.
    pub fn family(&self) -> Family {
        Family::of(self.cidr.addr())
    }

    /// Its object's name.
    pub fn name(&self) -> String {
        name(&self.cidr)
    }

    /// How many addresses it has.
    pub fn size(&self) -> u32 {
        let (first, last) = span(&self.cidr);
        u32::try_from(last - first).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// All its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let (first, last) = span(&self.cidr);
        let family = self.family();
        (first..=last).map(move |bits| address(family, bits))
    }

    /// Those that no node has.
    pub fn free(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses().filter(|ip| !self.allocations.contains_key(ip))
    }

    /// The object's `spec`.
    pub fn spec(&self) -> IpBlockSpec {
        let (first, _) = span(&self.cidr);
        let place = |ip: &IpAddr| bits(*ip).wrapping_sub(first).to_string();
        IpBlockSpec {
            cidr: self.cidr.to_string(),
            affinity: self.affinity.clone(),
            renewals: self.renewals,
            allocations: self.allocations.iter().map(|(ip, entry)| (place(ip), entry.clone())).collect(),
        }
    }

    /// Reads an object of this name and `spec`. Any fault refuses all of it: who writes a block back must
    /// have understood it whole.
    pub fn decode(object: &str, spec: &Value) -> Result<Self, Box<Issue>> {
        let wrong = |field: &str, message: String| {
            Box::new(Issue {
                object: format!("IPBlock/{object}"),
                field: field.to_owned(),
                reason: "InvalidField".to_owned(),
                message,
            })
        };
        let spec: IpBlockSpec =
            serde_json::from_value(spec.clone()).map_err(|error| wrong("spec", error.to_string()))?;
        let cidr = prefix(&spec.cidr).map_err(|message| wrong("spec.cidr", message))?;
        if cidr.max_prefix_len() - cidr.prefix_len() > MAX_HOST_BITS {
            let most = 1u32 << MAX_HOST_BITS;
            return Err(wrong("spec.cidr", format!("{cidr} has more than {most} addresses")));
        }
        if name(&cidr) != object {
            let message = format!("{cidr} is the block of object {}", name(&cidr));
            return Err(wrong("spec.cidr", message));
        }
        let mut block = Self::new(cidr, spec.affinity);
        block.renewals = spec.renewals;
        let size = block.size();
        let (first, _) = span(&cidr);
        for (place, entry) in spec.allocations {
            let index = place.parse::<u32>().ok().filter(|index| *index < size && index.to_string() == place);
            let Some(index) = index else {
                let message = format!("{place:?} is no place in a block of {size} addresses");
                return Err(wrong("spec.allocations", message));
            };
            if entry.node.is_empty() {
                return Err(wrong(&format!("spec.allocations.{place}.node"), "it is empty".to_owned()));
            }
            block.allocations.insert(address(block.family(), first + u128::from(index)), entry);
        }
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_block_is_named_by_its_prefix() {
        let name = |text: &str| name(&text.parse().unwrap());
        assert_eq!(name("10.244.3.64/26"), "10-244-3-64-26");
        assert_eq!(name("fd00:10::40/122"), "fd00-10-0-0-0-0-0-40-122");
        for bad in [
            "",
            "-",
            "10-244-3-64",
            "10-244-3-65-26",
            "010-244-3-64-26",
            "10-244-3-64-33",
            "a-b-c-d-26",
            "FD00-10-0-0-0-0-0-40-122",
            "10-244-3-64-+26",
            "10-244-3-64-0-26",
        ] {
            assert_eq!(cidr_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_fault_anywhere_refuses_the_block_by_field() {
        let field = |object: &str, json: &str| {
            Block::decode(object, &serde_json::from_str(json).unwrap()).unwrap_err().field
        };
        let name = "10-0-0-0-30";
        assert_eq!(field(name, r#"{"cidr":"10.0.0.0/30","later":1}"#), "spec");
        assert_eq!(field(name, r#"{"cidr":"10.0.0.1/30"}"#), "spec.cidr");
        assert_eq!(field(name, r#"{"cidr":"10.0.0.4/30"}"#), "spec.cidr");
        assert_eq!(field("10-0-0-0-19", r#"{"cidr":"10.0.0.0/19"}"#), "spec.cidr");
        for place in ["4", "-1", "01", "x", ""] {
            let json = format!(
                r#"{{"cidr":"10.0.0.0/30","allocations":{{"{place}":{{"node":"a","instance":"1"}}}}}}"#
            );
            assert_eq!(field(name, &json), "spec.allocations", "{place:?}");
        }
        let json = r#"{"cidr":"10.0.0.0/30","allocations":{"3":{"node":"","instance":"1"}}}"#;
        assert_eq!(field(name, json), "spec.allocations.3.node");
    }

    proptest! {
        #[test]
        fn a_name_leads_back_to_its_prefix(bits in any::<u128>(), v6 in any::<bool>(), len in 0u8..=128) {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let cidr = around(address(family, bits), if v6 { len } else { len % 33 }).unwrap();
            prop_assert_eq!(cidr_of(&name(&cidr)), Some(cidr));
        }

        #[test]
        fn what_is_written_is_read_again(
            host in 0u8..=MAX_HOST_BITS, v6 in any::<bool>(), start in any::<u128>(),
            entries in prop::collection::btree_map(any::<u16>(), "[a-z]{1,3}", 0..20), renewals in any::<u32>(),
        ) {
            let (family, len) = if v6 { (Family::V6, 128 - host) } else { (Family::V4, 32 - host) };
            let mut block = Block::new(around(address(family, start), len).unwrap(), None);
            block.renewals = renewals;
            let all: Vec<IpAddr> = block.addresses().collect();
            prop_assert_eq!(all.len(), block.size() as usize);
            for (at, node) in entries {
                let entry = Allocation { node, instance: "i".into(), handle: None };
                block.allocations.insert(all[usize::from(at) % all.len()], entry);
            }
            let json = serde_json::to_value(block.spec()).unwrap();
            prop_assert_eq!(Block::decode(&block.name(), &json).unwrap(), block);
        }

        #[test]
        fn any_text_as_a_name_has_an_answer(text in "[0-9a-fA-F:./-]{0,40}") {
            if let Some(cidr) = cidr_of(&text) {
                prop_assert_eq!(name(&cidr), text);
            }
        }
    }
}
