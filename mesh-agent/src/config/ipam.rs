//! `spec.ipam` of the MeshConfiguration: pod addresses from IPPools.

use std::ops::RangeInclusive;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rotation::{parse, within};

/// Longer than anything that a node that is there needs to be heard; an address may lie idle for a week.
const RECLAIMS: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(7 * 86_400);
const RECLAIM: &str = "75m";

/// How addresses of IPPools come free.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct IpamSpec {
    /// After how long the addresses of a node whose Node object is gone may be given to others. A node that does not reach
    /// the API server gives addresses to new pods for four fifths of it. Shorten it only while every node reaches it.
    #[schemars(extend("format" = "duration"))]
    pub reclaim_after: String,
}

impl Default for IpamSpec {
    fn default() -> Self {
        Self { reclaim_after: RECLAIM.to_owned() }
    }
}

impl IpamSpec {
    /// What is wrong with the values: (field below `spec`, message).
    pub fn check(&self, errors: &mut Vec<(String, String)>) {
        if let Err(message) = within(&self.reclaim_after, &RECLAIMS) {
            errors.push(("ipam.reclaimAfter".to_owned(), message));
        }
    }

    /// `reclaimAfter`, or its default where [`Self::check`] finds fault with it.
    pub fn reclaim_after(&self) -> Duration {
        let default = || parse(RECLAIM).unwrap_or(*RECLAIMS.end());
        within(&self.reclaim_after, &RECLAIMS).unwrap_or_else(|_| default())
    }
}
