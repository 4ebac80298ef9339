//! One pod's addresses, and the names that follow from its container.

use std::fmt;
use std::net::IpAddr;

use mesh_api::defaults::VETH_PREFIX;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::snapshot::{Endpoint, ObjectRef};

/// What CNI knows an attachment by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Key {
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
}

/// An attachment that wants addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// The CNI configuration's name.
    pub network: String,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// CNI_NETNS, for messages.
    pub netns: String,
    /// The pod.
    pub pod: ObjectRef,
    /// Its uid, or empty.
    pub pod_uid: String,
    /// Exactly these; empty for any.
    pub ips: Vec<IpAddr>,
}

/// What was promised: all that is needed to know the pod again after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lease {
    /// The CNI configuration's name; GC touches only its own.
    pub network: String,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// CNI_NETNS, for messages.
    pub netns: String,
    /// The pod.
    #[serde(with = "pod")]
    pub pod: ObjectRef,
    /// Its uid, or empty.
    pub pod_uid: String,
    /// The host's end.
    pub host_interface: String,
    /// MAC of the pod's end.
    pub pod_mac: [u8; 6],
    /// One address per family.
    pub ips: Vec<IpAddr>,
}

impl Ask {
    pub(super) fn key(&self) -> Key {
        Key { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }

    pub(super) fn lease(&self, host_interface: String, pod_mac: [u8; 6], ips: Vec<IpAddr>) -> Lease {
        let Self { network, container_id, ifname, netns, pod, pod_uid, ips: _ } = self.clone();
        Lease { network, container_id, ifname, netns, pod, pod_uid, host_interface, pod_mac, ips }
    }
}

impl Lease {
    /// What it is known by.
    pub fn key(&self) -> Key {
        Key { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }

    /// As the snapshot has it. `ifindex` is the host end's, 0 when it is not there (yet).
    pub fn endpoint(&self, ifindex: u32) -> Endpoint {
        Endpoint {
            pod: self.pod.clone(),
            container_id: self.container_id.clone(),
            ifname: self.ifname.clone(),
            ifindex,
            pod_mac: self.pod_mac,
            ips: self.ips.clone(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

/// A pod's host-side interface as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveLink {
    /// Interface name.
    pub name: String,
    /// Interface index.
    pub ifindex: u32,
    /// What its alias says; `None` when it says nothing we understand.
    pub addresses: Option<Vec<IpAddr>>,
}

fn digest(key: &Key) -> [u8; 32] {
    // NUL occurs in neither part, so no two keys give one text.
    Sha256::new()
        .chain_update(&key.container_id)
        .chain_update([0])
        .chain_update(&key.ifname)
        .finalize()
        .into()
}

/// Name of the host's end: our prefix and 40 bits of a hash, as a name holds 15 bytes.
pub fn host_interface(key: &Key) -> String {
    let hash = digest(key);
    hash.iter().take(5).fold(VETH_PREFIX.to_owned(), |name, byte| name + &format!("{byte:02x}"))
}

/// MAC of the pod's end: from the same hash, locally administered, unicast (IEEE 802, section 8.4).
pub fn pod_mac(key: &Key) -> [u8; 6] {
    let hash = digest(key);
    [hash[5] & 0xfc | 0x02, hash[6], hash[7], hash[8], hash[9], hash[10]]
}

const ALIAS: &str = "margay pod ";

/// What the host's end says of itself in its alias (at most 255 bytes): the addresses behind it.
pub fn alias(ips: &[IpAddr]) -> String {
    let ips: Vec<String> = ips.iter().map(IpAddr::to_string).collect();
    format!("{ALIAS}{}", ips.join(","))
}

/// The addresses in an [`alias`].
pub fn alias_addresses(alias: &str) -> Option<Vec<IpAddr>> {
    alias.strip_prefix(ALIAS)?.split(',').map(|ip| ip.parse().ok()).collect()
}

/// `namespace/name` in the journal.
mod pod {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    use crate::snapshot::ObjectRef;

    pub(super) fn serialize<S: Serializer>(pod: &ObjectRef, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(pod)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectRef, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (namespace, name) =
            text.split_once('/').ok_or_else(|| de::Error::custom("pod is not namespace/name"))?;
        Ok(ObjectRef { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(container: &str, ifname: &str) -> Key {
        Key { container_id: container.into(), ifname: ifname.into() }
    }

    #[test]
    fn a_name_fits_an_interface_and_a_mac_is_local_and_unicast() {
        let name = host_interface(&key("c1", "eth0"));
        assert_eq!(name.len(), 13);
        assert!(name.starts_with("mgy") && name[3..].bytes().all(|b| b.is_ascii_hexdigit()));
        assert_eq!(pod_mac(&key("c1", "eth0"))[0] & 3, 2);
        assert_ne!(host_interface(&key("c", "1eth0")), host_interface(&key("c1", "eth0")));
    }

    #[test]
    fn an_alias_says_the_addresses_and_a_foreign_one_nothing() {
        let ips: Vec<IpAddr> = vec!["10.1.2.3".parse().unwrap(), "fd00::3".parse().unwrap()];
        assert_eq!(alias_addresses(&alias(&ips)), Some(ips));
        assert_eq!(alias_addresses("cable to rack 7"), None);
        assert_eq!(alias_addresses("margay pod 10.1.2."), None);
        assert_eq!(alias_addresses("margay pod "), None);
    }
}
