//! What a node says of itself, as `margay.io/` annotations on its Node object.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::key::PublicKey;

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
/// All the annotations an agent writes; every write carries all of them.
pub const ANNOTATIONS: [&str; 5] = [
    ANNOTATION_VERSION,
    ANNOTATION_KEYS,
    ANNOTATION_ENDPOINTS,
    ANNOTATION_CAPABILITIES,
    ANNOTATION_POD_CIDRS,
];

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
    /// The annotations that say this.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        let _ = self;
        BTreeMap::new()
    }

    /// Reads the `margay.io/` annotations of Node `name`; `None` when the node announces nothing.
    pub fn from_annotations(
        name: &str,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, AnnouncementError> {
        let _ = (name, annotations);
        Ok(None)
    }
}
