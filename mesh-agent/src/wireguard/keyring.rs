//! The node's secrets, kept beside the plan that knows only the public halves of its keys.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keyservice::rotation::{Secret, SlotKey};
use keyservice::{PresharedKey, PrivateKey, PublicKey};

/// Private keys, and what preshared keys are made from, by public half. Clones share it; printing it shows the public
/// halves only.
#[derive(Clone, Default)]
pub struct KeyRing(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    keys: BTreeMap<PublicKey, Entry>,
    /// How many secrets there have been.
    version: u64,
}

struct Entry {
    epoch: u64,
    private: PrivateKey,
    secret: Option<(Secret, u64)>,
}

impl KeyRing {
    /// Of these keys, without preshared keys.
    pub fn new(keys: impl IntoIterator<Item = PrivateKey>) -> Self {
        let ring = Self::default();
        for (epoch, private) in (0..).zip(keys) {
            ring.put(epoch, &SlotKey { private, secret: None });
        }
        ring
    }

    /// Adds the key of an epoch, or changes its secret.
    pub fn put(&self, epoch: u64, key: &SlotKey) {
        let mut held = self.held();
        let public = key.private.public();
        let before = held.keys.get(&public).and_then(|entry| entry.secret.clone());
        let secret = key.secret.clone().map(|secret| match before {
            Some((same, version)) if same == secret => (same, version),
            _ => {
                held.version += 1;
                (secret, held.version)
            }
        });
        held.keys.insert(public, Entry { epoch, private: key.private.clone(), secret });
    }

    /// Forgets every key but these.
    pub fn retain(&self, wanted: impl Fn(&PublicKey) -> bool) {
        self.held().keys.retain(|key, _| wanted(key));
    }

    /// The private half of `public`, if it is ours.
    pub fn get(&self, public: &PublicKey) -> Option<PrivateKey> {
        self.held().keys.get(public).map(|entry| entry.private.clone())
    }

    /// Which of the secrets there have been is our key `own`'s; `None` when it has none. It says no more than
    /// whether two are the same.
    pub fn secret_version(&self, own: &PublicKey) -> Option<u64> {
        self.held().keys.get(own)?.secret.as_ref().map(|(_, version)| *version)
    }

    /// Whether `secret` (or none) is what our key `own` has.
    pub fn has_secret(&self, own: &PublicKey, secret: Option<&Secret>) -> bool {
        let held = self.held();
        let entry = held.keys.get(own);
        entry.is_some_and(|entry| entry.secret.as_ref().map(|(secret, _)| secret) == secret)
    }

    /// The preshared key of our key `own` and a peer's.
    pub fn preshared(&self, own: &PublicKey, peer: &PublicKey) -> Option<PresharedKey> {
        let held = self.held();
        let entry = held.keys.get(own)?;
        entry.secret.as_ref().map(|(secret, _)| secret.derive(entry.epoch, own, peer))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.held().keys.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_secret_keeps_its_version_until_it_is_another_and_nothing_is_printed() {
        let ring = KeyRing::default();
        let private = PrivateKey::from_bytes(&[3; 32]);
        let (own, peer) = (private.public(), PrivateKey::from_bytes(&[4; 32]).public());
        let secret = |text: &[u8]| Some(Secret::new(text).unwrap());
        let put = |secret| ring.put(7, &SlotKey { private: private.clone(), secret });
        put(None);
        assert_eq!((ring.secret_version(&own), ring.preshared(&own, &peer)), (None, None));
        put(secret(b"a secret of sixteen bytes"));
        let first = (ring.secret_version(&own).unwrap(), ring.preshared(&own, &peer).unwrap());
        assert!(first.1 == secret(b"a secret of sixteen bytes").unwrap().derive(7, &peer, &own));
        put(secret(b"a secret of sixteen bytes"));
        assert_eq!(ring.secret_version(&own), Some(first.0));
        put(secret(b"another secret of many bytes"));
        assert_ne!(ring.secret_version(&own), Some(first.0));
        assert!(ring.preshared(&own, &peer).unwrap() != first.1);
        assert_eq!(format!("{ring:?}"), format!("{{{own:?}}}"));
        ring.retain(|key| *key != own);
        assert!(ring.get(&own).is_none());
    }
}
