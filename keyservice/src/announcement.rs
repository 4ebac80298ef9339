//! What a node says of itself, as `margay.io/` annotations on its Node object.

mod codec;
mod signature;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::key::PublicKey;
pub use signature::{AnnouncementKey, AnnouncementKeyError, Signature, SigningKey};

/// The version this code writes and the newest it reads.
pub const VERSION: u32 = 1;

/// `margay.io/announcement-version`: a decimal number.
pub const ANNOTATION_VERSION: &str = "margay.io/announcement-version";
/// `margay.io/keys`: JSON list of one or two [`KeyClaim`]s.
pub const ANNOTATION_KEYS: &str = "margay.io/keys";
/// `margay.io/endpoints`: comma-separated `address:port` candidates, best first.
pub const ANNOTATION_ENDPOINTS: &str = "margay.io/endpoints";
/// `margay.io/capabilities`: comma-separated words.
pub const ANNOTATION_CAPABILITIES: &str = "margay.io/capabilities";
/// `margay.io/pod-cidrs`: comma-separated prefixes, believed only where no authority names any.
pub const ANNOTATION_POD_CIDRS: &str = "margay.io/pod-cidrs";
/// `margay.io/announcement-signature`: `ed25519:KEY:SIGNATURE`; only where announcements are trusted on first use.
pub const ANNOTATION_SIGNATURE: &str = "margay.io/announcement-signature";
/// All the annotations an agent writes; every write carries all of them but the signature, which there may be none of.
pub const ANNOTATIONS: [&str; 6] = [
    ANNOTATION_VERSION,
    ANNOTATION_KEYS,
    ANNOTATION_ENDPOINTS,
    ANNOTATION_CAPABILITIES,
    ANNOTATION_POD_CIDRS,
    ANNOTATION_SIGNATURE,
];

/// Bytes any one of the annotations may have.
pub const MAX_VALUE_LEN: usize = 16 * 1024;
/// Keys a node may have: one, and its successor while it rotates.
pub const MAX_KEYS: usize = 2;
/// Endpoint candidates a node may name.
pub const MAX_ENDPOINTS: usize = 16;
/// Prefixes a node may wish for.
pub const MAX_POD_CIDRS: usize = 16;
/// Capabilities a node may name.
pub const MAX_CAPABILITIES: usize = 64;
/// Bytes one capability may have.
pub const MAX_CAPABILITY_LEN: usize = 64;

/// One public key and where it listens. A node rotating keys has two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeyClaim {
    /// The WireGuard public key.
    pub public_key: PublicKey,
    /// UDP port its device listens on.
    pub port: u16,
    /// Rotation epoch the key belongs to; the larger is the newer.
    pub epoch: u64,
}

/// What a node claims. Nothing in it is believed before [`crate::admission::admit`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// The Node's name (from the object that carries the annotations, never from a value inside).
    pub name: String,
    /// One key, or two while it rotates; newest epoch first.
    pub keys: Vec<KeyClaim>,
    /// Where it may be reached, best first. Ports belong to `keys[0]`.
    pub endpoints: Vec<SocketAddr>,
    /// What it can do; unknown words are kept and ignored.
    pub capabilities: BTreeSet<String>,
    /// Prefixes it would like to own; used only where no authority names any.
    pub pod_cidrs: Vec<IpNet>,
    /// That it is from who it says, where that is not for the API server to see to.
    pub signature: Option<Signature>,
}

/// Why annotations are not an announcement; names the annotation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("annotation {annotation}: {problem}")]
pub struct AnnouncementError {
    /// The annotation's full key.
    pub annotation: &'static str,
    /// What is wrong with its value.
    pub problem: String,
}

impl Announcement {
    /// The annotations that say this: always all of [`ANNOTATIONS`], the empty ones as empty strings and the signature if there is one, so
    /// that a write leaves nothing of an older announcement behind.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        codec::encode(self)
    }

    /// Reads the `margay.io/` annotations of Node `name`; `None` when the node announces nothing.
    ///
    /// Strict: what it returns passes [`Self::validate`], and some of [`ANNOTATIONS`] without the others (but for the signature)
    /// is an error. Other annotations are not looked at.
    pub fn from_annotations(
        name: &str,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, AnnouncementError> {
        codec::decode(name, annotations)
    }

    /// What every reader will check, for the writer to check first:
    /// * one or two keys with distinct keys, epochs and ports, newest epoch first, no port 0;
    /// * endpoints another host can send to: no port 0, not unspecified, multicast, broadcast or loopback
    ///   (it would send to itself), not IPv6 link-local (its zone means nothing elsewhere), IPv4 as IPv4;
    /// * prefixes that do not overlap each other, without host bits (one written `10.1.2.3/24` may
    ///   have meant something else, so it is refused and not masked);
    /// * capabilities of printable ASCII without commas;
    /// * no list longer than its limit, and no duplicates.
    pub fn validate(&self) -> Result<(), AnnouncementError> {
        codec::validate(self)
    }
}
