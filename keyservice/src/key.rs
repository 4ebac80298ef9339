//! X25519 keys as WireGuard uses them: 32 bytes, base64 for people, lower-case hex in the UAPI.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize, Zeroizing};

/// Bytes in every key.
pub const KEY_LEN: usize = 32;

/// Why a key text was refused. Never holds the text: it may be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not base64 (44 characters, RFC 4648 with padding) or not hex (64 characters).
    #[error("key is not valid {0}")]
    Encoding(&'static str),
    /// Decoded, but not to 32 bytes.
    #[error("key is {0} bytes long, not 32")]
    Length(usize),
}

fn decode_base64(text: &str) -> Result<[u8; KEY_LEN], KeyError> {
    let raw = Zeroizing::new(STANDARD.decode(text).map_err(|_| KeyError::Encoding("base64"))?);
    raw.as_slice().try_into().map_err(|_| KeyError::Length(raw.len()))
}

fn decode_hex(text: &str) -> Result<[u8; KEY_LEN], KeyError> {
    if text.len() != 2 * KEY_LEN {
        return Err(KeyError::Length(text.len() / 2));
    }
    let mut out = [0u8; KEY_LEN];
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| (c as char).to_digit(16).ok_or(KeyError::Encoding("hex"));
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Ok(out)
}

fn encode_hex(bytes: &[u8; KEY_LEN]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The coordinates of all points of small order (<https://cr.yp.to/ecdh.html#validate>): 0, 1, the two of order 8, p - 1, and p
/// and p + 1, which are 0 and 1 again. A thousand nodes' keys are looked at with every plan, so none of them is multiplied.
const LOW_ORDER: [[u8; KEY_LEN]; 7] = [
    by_ends(0, 0, 0),
    by_ends(1, 0, 0),
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda,
        0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04,
        0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
    by_ends(0xec, 0xff, 0x7f),
    by_ends(0xed, 0xff, 0x7f),
    by_ends(0xee, 0xff, 0x7f),
];

/// A coordinate by its least byte, those between, and its highest.
const fn by_ends(first: u8, between: u8, last: u8) -> [u8; KEY_LEN] {
    let mut coordinate = [between; KEY_LEN];
    coordinate[0] = first;
    coordinate[KEY_LEN - 1] = last;
    coordinate
}

/// A peer's public key: a point on Curve25519 (RFC 7748).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; KEY_LEN]);

impl PublicKey {
    /// From its 32 bytes.
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// From the UAPI's 64 hex digits.
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        decode_hex(text).map(Self)
    }

    /// As the UAPI writes it.
    pub fn to_hex(&self) -> String {
        encode_hex(&self.0)
    }

    /// True for the points of small order, whose Diffie-Hellman result does not depend on the other
    /// side's secret (RFC 7748 section 6.1: the all-zero output).
    pub fn is_low_order(&self) -> bool {
        let mut coordinate = self.0;
        // The highest bit does not count (RFC 7748 section 5).
        coordinate[KEY_LEN - 1] &= 0x7f;
        LOW_ORDER.contains(&coordinate)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode_base64(text).map(Self)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A node's secret key. Wiped on drop, and never printed.
#[derive(Clone)]
pub struct PrivateKey(StaticSecret);

impl PrivateKey {
    /// A new key from the caller's generator.
    pub fn generate(rng: &mut impl rand::CryptoRng) -> Self {
        let mut bytes = Zeroizing::new([0u8; KEY_LEN]);
        rng.fill_bytes(bytes.as_mut());
        Self::from_bytes(&bytes)
    }

    /// From 32 bytes, clamped as RFC 7748 section 5 says.
    pub fn from_bytes(bytes: &[u8; KEY_LEN]) -> Self {
        let mut clamped = Zeroizing::new(*bytes);
        clamped[0] &= 248;
        clamped[31] = clamped[31] & 127 | 64;
        Self(StaticSecret::from(*clamped))
    }

    /// From the UAPI's 64 hex digits.
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        decode_hex(text).map(|mut bytes| {
            let key = Self::from_bytes(&bytes);
            bytes.zeroize();
            key
        })
    }

    /// From the base64 that key files and `wg genkey` hold.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        decode_base64(text).map(|mut bytes| {
            let key = Self::from_bytes(&bytes);
            bytes.zeroize();
            key
        })
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&self.0).to_bytes())
    }

    /// The secret bytes, for the key file and the UAPI only.
    pub fn expose(&self) -> Zeroizing<[u8; KEY_LEN]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// The secret as UAPI hex, for `private_key=` only.
    pub fn expose_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(encode_hex(&self.expose()))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

/// A preshared key between two peers. Wiped on drop, and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey(Zeroizing<[u8; KEY_LEN]>);

impl PresharedKey {
    /// From 32 bytes.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// From the UAPI's 64 hex digits.
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        decode_hex(text).map(Self::from_bytes)
    }

    /// The secret bytes, for the protocol and the UAPI only.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// The secret as UAPI hex, for `preshared_key=` only.
    pub fn expose_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(encode_hex(&self.0))
    }

    /// All zero, which the protocol and the UAPI take for "none".
    pub fn is_none(&self) -> bool {
        *self.0 == [0; KEY_LEN]
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By what it means: the result of Diffie-Hellman does not depend on the secret.
    fn contributes_nothing(key: &PublicKey) -> bool {
        let probe = StaticSecret::from([0x5a; KEY_LEN]);
        !probe.diffie_hellman(&x25519_dalek::PublicKey::from(key.0)).was_contributory()
    }

    #[test]
    fn the_points_of_small_order_are_those_that_contribute_nothing() {
        for coordinate in LOW_ORDER {
            for highest in [0, 0x80] {
                let mut bytes = coordinate;
                bytes[KEY_LEN - 1] |= highest;
                let key = PublicKey(bytes);
                assert!(key.is_low_order() && contributes_nothing(&key), "{key}");
                // Its neighbours are ordinary, but for those that are on the list themselves.
                bytes[1] ^= 1;
                let near = PublicKey(bytes);
                assert_eq!(near.is_low_order(), contributes_nothing(&near), "{near}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_key_is_judged_as_diffie_hellman_does(bytes: [u8; KEY_LEN]) {
            let key = PublicKey(bytes);
            prop_assert_eq!(key.is_low_order(), contributes_nothing(&key));
        }
    }
}
