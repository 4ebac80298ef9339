//! Who talked through a device that was replaced by another of its name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use keyservice::PublicKey;
use mesh_uapi::Device;

/// REJECT_AFTER_TIME (whitepaper section 6.1): an older session carries nothing.
const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Peers that had a session with a device which is gone. They go on sending in it until they hear of the new one, so the new
/// one begins a handshake with each of them at once. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Live(Arc<Mutex<BTreeMap<String, BTreeSet<PublicKey>>>>);

impl Live {
    /// Notes the peers of the device `name`, which is about to go.
    pub fn note(&self, name: &str, device: &Device, now: SystemTime) {
        let live = device.peers.iter().filter(|(_, peer)| {
            peer.last_handshake.is_some_and(|at| now.duration_since(at).unwrap_or_default() < REJECT_AFTER)
        });
        self.all().insert(name.to_owned(), live.map(|(key, _)| *key).collect());
    }

    /// Those noted for a device.
    pub fn of(&self, name: &str) -> BTreeSet<PublicKey> {
        self.all().get(name).cloned().unwrap_or_default()
    }

    /// They have been told.
    pub fn forget(&self, name: &str) {
        self.all().remove(name);
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, BTreeSet<PublicKey>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
