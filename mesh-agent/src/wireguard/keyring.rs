//! The node's private keys, kept beside the plan that knows only their public halves.

use std::collections::BTreeMap;

use keyservice::{PrivateKey, PublicKey};

/// Private keys by public half. Printing it shows the public halves only.
#[derive(Clone, Default)]
pub struct KeyRing(BTreeMap<PublicKey, PrivateKey>);

impl KeyRing {
    /// Of these keys.
    pub fn new(keys: impl IntoIterator<Item = PrivateKey>) -> Self {
        Self(keys.into_iter().map(|key| (key.public(), key)).collect())
    }

    /// The private half of `public`, if it is ours.
    pub fn get(&self, public: &PublicKey) -> Option<&PrivateKey> {
        self.0.get(public)
    }
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}
