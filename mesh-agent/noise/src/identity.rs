//! The device's own static key, and what only its owner can check.

use keyservice::{PrivateKey, PublicKey};
use subtle::ConstantTimeEq as _;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::hash::{Secret, hash, mac};
use crate::message::MAC;

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

/// Our static key pair.
pub struct Identity {
    secret: StaticSecret,
    public: PublicKey,
    /// Keys for the macs of messages to us.
    keys: MacKeys,
}

/// What messages *to* the owner of a public key are signed with: everyone who knows that key can.
#[derive(Clone, Copy)]
pub(crate) struct MacKeys {
    /// For mac1.
    pub(crate) mac1: [u8; 32],
    /// For the encryption of cookies that the owner sends.
    pub(crate) cookie: [u8; 32],
}

impl MacKeys {
    pub(crate) fn of(public: &PublicKey) -> Self {
        let key = |label| hash(&[label, public.as_bytes()]);
        Self { mac1: key(LABEL_MAC1), cookie: key(LABEL_COOKIE) }
    }
}

impl Identity {
    /// Of a private key.
    pub fn new(key: &PrivateKey) -> Self {
        let public = key.public();
        Self { secret: StaticSecret::from(*key.expose()), public, keys: MacKeys::of(&public) }
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// Whether an initiation or response (its whole bytes) was made by one who knows our public key.
    pub fn check_mac1(&self, message: &[u8]) -> bool {
        let Some((signed, macs)) = message.split_last_chunk::<{ 2 * MAC }>() else { return false };
        let expected = mac(&self.keys.mac1, &[signed]);
        macs.get(..MAC).is_some_and(|got| bool::from(got.ct_eq(&expected)))
    }

    pub(crate) fn cookie_key(&self) -> &[u8; 32] {
        &self.keys.cookie
    }

    /// DH with our static key; `None` for a point of low order.
    pub(crate) fn dh(&self, public: &[u8; 32]) -> Option<Secret> {
        dh(&self.secret, public)
    }
}

/// X25519; `None` where the other's point leaves nothing of ours in the result (RFC 7748, 6.1).
pub(crate) fn dh(secret: &StaticSecret, public: &[u8; 32]) -> Option<Secret> {
    let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(*public));
    shared.was_contributory().then(|| Zeroizing::new(shared.to_bytes()))
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("public", &self.public).finish_non_exhaustive()
    }
}
