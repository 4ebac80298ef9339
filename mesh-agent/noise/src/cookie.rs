//! Cookies (paper, 5.3 and 5.4.7): under load, only who shows that it receives at its address is worked for.
//!
//! The cookie is a MAC of the sender's address *and port* under a secret that changes every two minutes; it goes
//! back encrypted, and comes again as the key of mac2. Nothing is stored for anybody.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305};
use rand::{CryptoRng, Rng as _};
use subtle::ConstantTimeEq as _;

use crate::hash::{Secret, mac};
use crate::identity::Identity;
use crate::message::{COOKIE_REPLY, MAC, TYPE_COOKIE, array_at, sender};

/// How long a cookie is good for (COOKIE_SECRET_MAX_AGE, messages.h).
pub const LIFETIME: Duration = Duration::from_secs(120);

/// Makes and checks the cookies of one identity.
pub struct CookieMaker {
    current: (Secret, Instant),
    /// Cookies made just before a change must not die with it.
    previous: Option<Secret>,
}

impl CookieMaker {
    /// With a fresh secret.
    pub fn new(now: Instant, rng: &mut impl CryptoRng) -> Self {
        Self { current: (random(rng), now), previous: None }
    }

    /// Changes the secret when it is due.
    pub fn rotate(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        if now.saturating_duration_since(self.current.1) >= LIFETIME {
            let old = std::mem::replace(&mut self.current, (random(rng), now));
            // A secret that is two lifetimes old belongs to nobody any more.
            self.previous = (now.saturating_duration_since(old.1) < 2 * LIFETIME).then_some(old.0);
        }
    }

    /// The reply to an initiation or response whose mac1 was right.
    pub fn reply(
        &self,
        identity: &Identity,
        from: SocketAddr,
        message: &[u8],
        rng: &mut impl CryptoRng,
    ) -> [u8; COOKIE_REPLY] {
        let mut reply = [0; COOKIE_REPLY];
        let nonce: [u8; 24] = rng.random();
        let mut cookie = cookie(&self.current.0, from);
        let mac1 = mac1_of(message).unwrap_or_default();
        // Refused only for more bytes than there are in the world.
        let Ok(tag) = XChaCha20Poly1305::new(identity.cookie_key().into()).encrypt_in_place_detached(
            &nonce.into(),
            &mac1,
            &mut cookie,
        ) else {
            return reply;
        };
        let parts: [&[u8]; 5] =
            [&TYPE_COOKIE.to_le_bytes(), &sender(message).to_le_bytes(), &nonce, &cookie, &tag];
        reply.iter_mut().zip(parts.concat()).for_each(|(to, from)| *to = from);
        reply
    }

    /// Whether mac2 of an initiation or response was made with a cookie of ours for this sender.
    pub fn check_mac2(&self, from: SocketAddr, message: &[u8]) -> bool {
        let Some((signed, mac2)) = message.split_last_chunk::<MAC>() else { return false };
        let fits = |secret: &Secret| bool::from(mac(&cookie(secret, from), &[signed]).ct_eq(mac2));
        fits(&self.current.0) || self.previous.as_ref().is_some_and(fits)
    }
}

fn random(rng: &mut impl CryptoRng) -> Secret {
    let mut secret = Secret::default();
    rng.fill_bytes(secret.as_mut_slice());
    secret
}

fn cookie(secret: &Secret, from: SocketAddr) -> [u8; MAC] {
    let port = from.port().to_be_bytes();
    match from.ip() {
        std::net::IpAddr::V4(ip) => mac(secret.as_slice(), &[&ip.octets(), &port]),
        std::net::IpAddr::V6(ip) => mac(secret.as_slice(), &[&ip.octets(), &port]),
    }
}

/// mac1 of an initiation or response.
pub(crate) fn mac1_of(message: &[u8]) -> Option<[u8; MAC]> {
    array_at(message, message.len().checked_sub(2 * MAC)?)
}

/// The cookie in a reply to the message that had `mac1`, from the owner of `cookie_key`.
pub(crate) fn open(reply: &[u8; COOKIE_REPLY], cookie_key: &[u8; 32], mac1: &[u8; MAC]) -> Option<[u8; MAC]> {
    let nonce: [u8; 24] = array_at(reply, 8)?;
    let mut cookie: [u8; MAC] = array_at(reply, 32)?;
    let tag: [u8; 16] = array_at(reply, 48)?;
    XChaCha20Poly1305::new(cookie_key.into())
        .decrypt_in_place_detached(&nonce.into(), mac1, &mut cookie, &tag.into())
        .ok()?;
    Some(cookie)
}

impl std::fmt::Debug for CookieMaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CookieMaker").finish_non_exhaustive()
    }
}
