//! Ed25519 signatures of announcements (RFC 8032), for clusters whose API server does not keep nodes from writing each
//! other's annotations.
//!
//! A signature is over the Node's name and UID and over every other annotation of the announcement, so it says nothing about
//! another node, a rebuilt one, or other keys.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hkdf::Hkdf;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::Announcement;
use crate::key::PrivateKey;

/// What a signature of ours is about, and nothing else ever is.
const CONTEXT: &str = "margay.io announcement, version 1";
const INFO: &[u8] = b"margay.io announcement key";
/// In front of key and signature in the annotation.
const SCHEME: &str = "ed25519";

/// The public half of the key that a node signs its announcements with: 32 bytes, base64 for people.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AnnouncementKey([u8; 32]);

/// Not base64 of 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is not base64 of the 32 bytes of an Ed25519 key")]
pub struct AnnouncementKeyError;

impl fmt::Display for AnnouncementKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for AnnouncementKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnnouncementKey({self})")
    }
}

impl FromStr for AnnouncementKey {
    type Err = AnnouncementKeyError;

    fn from_str(text: &str) -> Result<Self, AnnouncementKeyError> {
        let bytes = STANDARD.decode(text).map_err(|_| AnnouncementKeyError)?;
        bytes.try_into().map(Self).map_err(|_| AnnouncementKeyError)
    }
}

impl Serialize for AnnouncementKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AnnouncementKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A signature and the key it is said to be by. Nothing is known before [`Announcement::signer`] has looked.
#[derive(Clone, PartialEq, Eq)]
pub struct Signature {
    key: AnnouncementKey,
    bytes: [u8; 64],
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature(by {})", self.key)
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}:{}:{}", self.key, STANDARD.encode(self.bytes))
    }
}

impl FromStr for Signature {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "is not ed25519:KEY:SIGNATURE, both in base64";
        let mut parts = text.split(':');
        let (scheme, key, bytes) = (parts.next(), parts.next(), parts.next());
        if scheme != Some(SCHEME) || parts.next().is_some() {
            return Err(WRONG);
        }
        let key = key.and_then(|key| key.parse().ok()).ok_or(WRONG)?;
        let bytes = bytes.and_then(|text| STANDARD.decode(text).ok()).ok_or(WRONG)?;
        Ok(Self { key, bytes: bytes.try_into().map_err(|_| WRONG)? })
    }
}

/// What a node signs with. Never printed.
pub struct SigningKey(Ed25519KeyPair);

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public())
    }
}

impl SigningKey {
    /// The one that belongs to this secret (HKDF-SHA256, RFC 5869). `None` if the library refuses the seed, which it does for
    /// none of 32 bytes.
    pub fn derive(secret: &PrivateKey) -> Option<Self> {
        let mut seed = Zeroizing::new([0u8; 32]);
        Hkdf::<Sha256>::new(None, secret.expose().as_ref()).expand(INFO, seed.as_mut()).ok()?;
        Ed25519KeyPair::from_seed_unchecked(seed.as_ref()).ok().map(Self)
    }

    /// Its public half.
    pub fn public(&self) -> AnnouncementKey {
        let mut bytes = [0u8; 32];
        bytes.copy_from_slice(self.0.public_key().as_ref());
        AnnouncementKey(bytes)
    }
}

impl Announcement {
    /// Signs it, as that of the Node object with this UID.
    #[must_use]
    pub fn signed(self, uid: Option<&str>, key: &SigningKey) -> Self {
        let mut bytes = [0u8; 64];
        bytes.copy_from_slice(key.0.sign(message(&self, uid).as_bytes()).as_ref());
        Self { signature: Some(Signature { key: key.public(), bytes }), ..self }
    }

    /// Who signed it, as that of the Node object with this UID; `None` if nobody did, or it was changed since.
    pub fn signer(&self, uid: Option<&str>) -> Option<AnnouncementKey> {
        let Signature { key, bytes } = self.signature.as_ref()?;
        let public = UnparsedPublicKey::new(&ED25519, key.0);
        public.verify(message(self, uid).as_bytes(), bytes).is_ok().then_some(*key)
    }
}

/// What is signed. No name, UID or value holds a line break.
fn message(announcement: &Announcement, uid: Option<&str>) -> String {
    let bare = Announcement { signature: None, ..announcement.clone() };
    let values = bare.to_annotations().into_iter().map(|(key, value)| format!("{key}: {value}\n"));
    let head = format!("{CONTEXT}\nname: {}\nuid: {}\n", announcement.name, uid.unwrap_or_default());
    head + &values.collect::<String>()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;
    use crate::announcement::{ANNOTATION_SIGNATURE, KeyClaim};
    use crate::key::PublicKey;

    fn announcement(name: &str) -> Announcement {
        Announcement {
            name: name.to_owned(),
            keys: vec![KeyClaim { public_key: PublicKey::from_bytes([9; 32]), port: 51820, epoch: 3 }],
            endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
            capabilities: BTreeSet::from(["wireguard".to_owned()]),
            pod_cidrs: vec!["10.42.0.0/24".parse().unwrap()],
            signature: None,
        }
    }

    fn key(byte: u8) -> SigningKey {
        SigningKey::derive(&PrivateKey::from_bytes(&[byte; 32])).unwrap()
    }

    #[test]
    fn a_signature_survives_the_annotations_and_is_the_same_each_time() {
        let signed = announcement("a").signed(Some("u1"), &key(1));
        assert_eq!(signed, announcement("a").signed(Some("u1"), &key(1)));
        let read = Announcement::from_annotations("a", &signed.to_annotations()).unwrap().unwrap();
        assert_eq!(read.signer(Some("u1")), Some(key(1).public()));
        assert_eq!(key(1).public().to_string().parse(), Ok(key(1).public()));
    }

    #[test]
    fn it_is_good_for_that_very_node_and_announcement_only() {
        let signed = announcement("a").signed(Some("u1"), &key(1));
        assert_eq!(announcement("a").signer(Some("u1")), None, "unsigned");
        for uid in [None, Some(""), Some("u2")] {
            assert_eq!(signed.signer(uid), None, "{uid:?}");
        }
        let other = |change: &dyn Fn(&mut Announcement)| {
            let mut other = signed.clone();
            change(&mut other);
            assert_eq!(other.signer(Some("u1")), None, "{other:?}");
        };
        other(&|a| a.name = "b".to_owned());
        other(&|a| a.keys[0].public_key = PublicKey::from_bytes([8; 32]));
        other(&|a| a.keys[0].port = 1);
        other(&|a| a.keys[0].epoch = 4);
        other(&|a| a.endpoints.clear());
        other(&|a| a.capabilities.clear());
        other(&|a| a.pod_cidrs.clear());
        other(&|a| a.signature.as_mut().unwrap().key = key(2).public());
    }

    #[test]
    fn what_is_no_signature_is_told() {
        let mut annotations = announcement("a").signed(None, &key(1)).to_annotations();
        for text in ["x", "ed25519:AA==:AA==", "rsa:1:2", "ed25519:1:2:3"] {
            annotations.insert(ANNOTATION_SIGNATURE.to_owned(), text.to_owned());
            let error = Announcement::from_annotations("a", &annotations).unwrap_err();
            assert_eq!(error.annotation, ANNOTATION_SIGNATURE);
            assert!(error.problem.ends_with("both in base64"), "{error}");
        }
    }

    #[test]
    fn no_secret_is_printed() {
        assert_eq!(format!("{:?}", key(1)), format!("SigningKey({})", key(1).public()));
    }
}
