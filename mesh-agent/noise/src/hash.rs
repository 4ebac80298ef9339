//! BLAKE2s and what WireGuard makes of it (paper, 5.4: HASH, MAC, HMAC, KDF).

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput as _, Mac, Update as _};
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use hmac::SimpleHmac;
use zeroize::Zeroizing;

/// 32 secret bytes.
pub(crate) type Secret = Zeroizing<[u8; 32]>;

/// HASH of the parts, one behind the other.
pub(crate) fn hash(parts: &[&[u8]]) -> [u8; 32] {
    parts.iter().fold(Blake2s256::new(), |state, part| state.chain(part)).finalize().into()
}

/// MAC: keyed BLAKE2s with 16 bytes of output. `key` has at most 32.
pub(crate) fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    let state = <Blake2sMac<U16> as Mac>::new_from_slice(key);
    // Only a key of more than 32 bytes is refused, and all of ours have 16 or 32.
    let Ok(state) = state else { return [0; 16] };
    parts.iter().fold(state, |state, part| state.chain(part)).finalize_fixed().into()
}

fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> Secret {
    // A key of any length is fine for an HMAC.
    let Ok(state) = <SimpleHmac<Blake2s256> as Mac>::new_from_slice(key) else { return Secret::default() };
    let state = parts.iter().fold(state, |state, part| state.chain_update(part));
    Zeroizing::new(state.finalize().into_bytes().into())
}

/// KDF_n: `N` keys from `input` (HKDF, RFC 5869, with HMAC-BLAKE2s).
pub(crate) fn kdf<const N: usize>(key: &[u8; 32], input: &[u8]) -> [Secret; N] {
    let secret = hmac(key, &[input]);
    let mut previous: Option<Secret> = None;
    let mut counter = 0u8;
    std::array::from_fn(|_| {
        counter += 1;
        let before = previous.as_ref().map_or(&[][..], |p| p.as_slice());
        let next = hmac(&secret, &[before, &[counter]]);
        previous = Some(next.clone());
        next
    })
}
