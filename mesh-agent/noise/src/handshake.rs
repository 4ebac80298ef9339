//! The handshake (paper, 5.4.1–5.4.5): Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s, each step under its Noise token.
//!
//! ```text
//! <- s
//! ...
//! -> e, es, s, ss, {timestamp}
//! <- e, ee, se, psk, {}
//! ```
//!
//! A message that turns out wrong leaves everything as it was: a forged response does not end the handshake that
//! waits for the real one.

use std::time::{Duration, Instant, SystemTime};

use keyservice::{PresharedKey, PublicKey};
use rand::CryptoRng;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::cookie::{self, mac1_of};
use crate::hash::{Secret, hash, kdf, mac};
use crate::identity::{Identity, MacKeys, dh};
use crate::keypair::{Keypair, ReceivingKey, SendingKey};
use crate::message::{
    COOKIE_REPLY, INITIATION, MAC, RESPONSE, TAG, TYPE_INITIATION, TYPE_RESPONSE, array_at,
    response_receiver, sender,
};
use crate::timestamp::Timestamp;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// One peer's initiations are answered at most this often (INITIATIONS_PER_SECOND, messages.h).
pub const MIN_INTERVAL: Duration = Duration::from_millis(20);

/// Why a handshake message was refused. None of them changes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The sender lacks a key, or the message was changed.
    #[error("wrong authenticator")]
    Auth,
    /// A public key that leaves nothing of ours in the shared secret.
    #[error("a key of low order")]
    LowOrder,
    /// Not newer than the newest initiation of this peer.
    #[error("an old initiation")]
    Stale,
    /// Too soon after the last initiation of this peer.
    #[error("too many initiations")]
    Flood,
    /// Not the answer to what we sent last.
    #[error("nobody waits for it")]
    Unexpected,
}

/// Chaining key and hash of a handshake under way.
#[derive(Clone)]
struct Symmetric {
    ck: Secret,
    h: [u8; 32],
}

impl Symmetric {
    /// `<- s`
    fn new(responder: &PublicKey) -> Self {
        let ck = hash(&[CONSTRUCTION]);
        let h = hash(&[&hash(&[&ck, IDENTIFIER]), responder.as_bytes()]);
        Self { ck: Zeroizing::new(ck), h }
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.h = hash(&[&self.h, data]);
    }

    fn mix_key(&mut self, input: &[u8]) {
        let [ck] = kdf(&self.ck, input);
        self.ck = ck;
    }

    fn mix_key_and_get(&mut self, input: &[u8]) -> Secret {
        let [ck, key] = kdf(&self.ck, input);
        self.ck = ck;
        key
    }

    fn e(&mut self, public: &[u8; 32]) {
        self.mix_hash(public);
        self.mix_key(public);
    }

    fn psk(&mut self, psk: &Secret) -> Secret {
        let [ck, t, key] = kdf(&self.ck, psk.as_slice());
        self.ck = ck;
        self.mix_hash(t.as_slice());
        key
    }

    /// Encrypts `to`, whose last 16 bytes are room for the authenticator.
    fn encrypt_and_hash(&mut self, key: &Secret, to: &mut [u8]) -> Option<()> {
        let (text, tag) = to.split_last_chunk_mut::<TAG>()?;
        let sealed = aead(key)?.seal_in_place_separate_tag(zero(), Aad::from(self.h), text).ok()?;
        tag.copy_from_slice(sealed.as_ref());
        self.mix_hash(to);
        Some(())
    }

    fn decrypt_and_hash<const SEALED: usize, const N: usize>(
        &mut self,
        key: &Secret,
        sealed: [u8; SEALED],
    ) -> Result<[u8; N], HandshakeError> {
        let mut text = sealed;
        let opened = aead(key)
            .and_then(|aead| aead.open_in_place(zero(), Aad::from(self.h), &mut text).ok())
            .and_then(|opened| (&*opened).try_into().ok());
        let opened = opened.ok_or(HandshakeError::Auth)?;
        self.mix_hash(&sealed);
        Ok(opened)
    }

    /// The session's keys: the initiator's sending one first.
    fn split(&self) -> [Secret; 2] {
        kdf(&self.ck, &[])
    }
}

fn aead(key: &Secret) -> Option<LessSafeKey> {
    UnboundKey::new(&CHACHA20_POLY1305, key.as_slice()).ok().map(LessSafeKey::new)
}

/// Each handshake key encrypts one thing.
fn zero() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

/// An initiation of ours that waits for its response.
struct Pending {
    symmetric: Symmetric,
    ephemeral: StaticSecret,
    index: u32,
}

/// The handshakes with one peer.
pub struct Remote {
    public: PublicKey,
    static_static: Secret,
    psk: Secret,
    mac_keys: MacKeys,
    pending: Option<Pending>,
    last_sent: Timestamp,
    last_received: Timestamp,
    last_answered: Option<Instant>,
    /// mac1 of the last message to the peer: a cookie reply must be about it, and only one can be.
    last_mac1: Option<[u8; MAC]>,
    cookie: Option<([u8; MAC], Instant)>,
}

/// An initiation whose sender said who it is, which is not proved before [`Remote::respond`].
pub struct OpenedInitiation {
    symmetric: Symmetric,
    peer: PublicKey,
    ephemeral: [u8; 32],
    timestamp: [u8; 28],
    sender: u32,
}

impl OpenedInitiation {
    /// The static public key in it.
    pub fn peer(&self) -> PublicKey {
        self.peer
    }
}

/// Reads who sent an initiation. Its mac1 is not looked at: see [`Identity::check_mac1`].
pub fn open_initiation(
    identity: &Identity,
    message: &[u8; INITIATION],
) -> Result<OpenedInitiation, HandshakeError> {
    let auth = HandshakeError::Auth;
    let mut symmetric = Symmetric::new(&identity.public());
    // e
    let ephemeral = array_at(message, 8).ok_or(auth)?;
    symmetric.e(&ephemeral);
    // es
    let key = symmetric.mix_key_and_get(identity.dh(&ephemeral).ok_or(HandshakeError::LowOrder)?.as_slice());
    // s
    let sealed: [u8; 48] = array_at(message, 40).ok_or(auth)?;
    let peer = PublicKey::from_bytes(symmetric.decrypt_and_hash(&key, sealed)?);
    let timestamp = array_at(message, 88).ok_or(auth)?;
    Ok(OpenedInitiation { symmetric, peer, ephemeral, timestamp, sender: sender(message) })
}

impl Remote {
    /// For the peer with this public key; refused if that is of low order.
    pub fn new(
        identity: &Identity,
        public: &PublicKey,
        psk: Option<&PresharedKey>,
    ) -> Result<Self, HandshakeError> {
        let mut remote = Self {
            public: *public,
            static_static: identity.dh(public.as_bytes()).ok_or(HandshakeError::LowOrder)?,
            psk: Secret::default(),
            mac_keys: MacKeys::of(public),
            pending: None,
            last_sent: Timestamp::default(),
            last_received: Timestamp::default(),
            last_answered: None,
            last_mac1: None,
            cookie: None,
        };
        remote.set_preshared_key(psk);
        Ok(remote)
    }

    /// For the handshakes to come; sessions that live go on. `None` is a key of zeros.
    pub fn set_preshared_key(&mut self, psk: Option<&PresharedKey>) {
        self.psk = psk.map(|psk| Zeroizing::new(*psk.expose())).unwrap_or_default();
    }

    /// The index of the initiation that waits for a response.
    pub fn pending_index(&self) -> Option<u32> {
        self.pending.as_ref().map(|pending| pending.index)
    }

    /// Gives the pending handshake up.
    pub fn forget_pending(&mut self) {
        self.pending = None;
    }

    /// An initiation; it takes the place of one that still waits. `index` is to be random and unused.
    pub fn initiate(
        &mut self,
        identity: &Identity,
        index: u32,
        now: Instant,
        wall: SystemTime,
        rng: &mut impl CryptoRng,
    ) -> Result<[u8; INITIATION], HandshakeError> {
        let timestamp = Timestamp::after(self.last_sent, wall);
        let mut symmetric = Symmetric::new(&self.public);
        let mut message = [0; INITIATION];
        put(&mut message, 0, &TYPE_INITIATION.to_le_bytes());
        put(&mut message, 4, &index.to_le_bytes());
        // e
        let (ephemeral, public) = generate(rng);
        put(&mut message, 8, &public);
        symmetric.e(&public);
        // es
        let shared = dh(&ephemeral, self.public.as_bytes()).ok_or(HandshakeError::LowOrder)?;
        let key = symmetric.mix_key_and_get(shared.as_slice());
        // s
        put(&mut message, 40, identity.public().as_bytes());
        encrypt(&mut symmetric, &key, &mut message, 40..88)?;
        // ss
        let key = symmetric.mix_key_and_get(self.static_static.as_slice());
        // {timestamp}
        put(&mut message, 88, &timestamp.0);
        encrypt(&mut symmetric, &key, &mut message, 88..116)?;
        self.sign(&mut message, now);
        self.last_sent = timestamp;
        self.pending = Some(Pending { symmetric, ephemeral, index });
        Ok(message)
    }

    /// Answers an initiation of this peer. The session is the peer's to use first.
    pub fn respond(
        &mut self,
        identity: &Identity,
        initiation: OpenedInitiation,
        index: u32,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Result<([u8; RESPONSE], Keypair), HandshakeError> {
        let OpenedInitiation { mut symmetric, peer, ephemeral: theirs, timestamp, sender } = initiation;
        if peer != self.public || peer == identity.public() {
            return Err(HandshakeError::Auth);
        }
        // ss
        let key = symmetric.mix_key_and_get(self.static_static.as_slice());
        // {timestamp}
        let timestamp = Timestamp(symmetric.decrypt_and_hash(&key, timestamp)?);
        if timestamp <= self.last_received {
            return Err(HandshakeError::Stale);
        }
        if self.last_answered.is_some_and(|last| now.saturating_duration_since(last) < MIN_INTERVAL) {
            return Err(HandshakeError::Flood);
        }
        let mut message = [0; RESPONSE];
        put(&mut message, 0, &TYPE_RESPONSE.to_le_bytes());
        put(&mut message, 4, &index.to_le_bytes());
        put(&mut message, 8, &sender.to_le_bytes());
        // e
        let (ephemeral, public) = generate(rng);
        put(&mut message, 12, &public);
        symmetric.e(&public);
        // ee
        symmetric.mix_key(dh(&ephemeral, &theirs).ok_or(HandshakeError::LowOrder)?.as_slice());
        // se
        symmetric.mix_key(dh(&ephemeral, peer.as_bytes()).ok_or(HandshakeError::LowOrder)?.as_slice());
        // psk
        let key = symmetric.psk(&self.psk);
        // {}
        encrypt(&mut symmetric, &key, &mut message, 44..60)?;
        self.sign(&mut message, now);
        self.last_received = timestamp;
        self.last_answered = Some(now);
        let [receiving, sending] = symmetric.split();
        Ok((message, keypair(sending, receiving, index, sender, false)))
    }

    /// Completes the pending handshake.
    pub fn accept_response(
        &mut self,
        identity: &Identity,
        message: &[u8; RESPONSE],
    ) -> Result<Keypair, HandshakeError> {
        let pending = self.pending.as_ref().ok_or(HandshakeError::Unexpected)?;
        if pending.index != response_receiver(message) {
            return Err(HandshakeError::Unexpected);
        }
        let mut symmetric = pending.symmetric.clone();
        // e
        let theirs = array_at(message, 12).ok_or(HandshakeError::Auth)?;
        symmetric.e(&theirs);
        // ee
        symmetric.mix_key(dh(&pending.ephemeral, &theirs).ok_or(HandshakeError::LowOrder)?.as_slice());
        // se
        symmetric.mix_key(identity.dh(&theirs).ok_or(HandshakeError::LowOrder)?.as_slice());
        // psk
        let key = symmetric.psk(&self.psk);
        // {}
        let sealed: [u8; TAG] = array_at(message, 44).ok_or(HandshakeError::Auth)?;
        let _: [u8; 0] = symmetric.decrypt_and_hash(&key, sealed)?;
        let index = pending.index;
        self.pending = None;
        let [sending, receiving] = symmetric.split();
        Ok(keypair(sending, receiving, index, sender(message), true))
    }

    /// Keeps the cookie for the messages to come. The peer wants nothing repeated at once.
    pub fn accept_cookie(&mut self, reply: &[u8; COOKIE_REPLY], now: Instant) -> Result<(), HandshakeError> {
        let mac1 = self.last_mac1.ok_or(HandshakeError::Unexpected)?;
        let cookie = cookie::open(reply, &self.mac_keys.cookie, &mac1).ok_or(HandshakeError::Auth)?;
        self.cookie = Some((cookie, now));
        self.last_mac1 = None;
        Ok(())
    }

    /// mac1, and mac2 while there is a cookie.
    fn sign(&mut self, message: &mut [u8], now: Instant) {
        let Some((signed, macs)) = message.split_last_chunk_mut::<{ 2 * MAC }>() else { return };
        let (mac1, mac2) = macs.split_at_mut(MAC);
        mac1.copy_from_slice(&mac(&self.mac_keys.mac1, &[signed]));
        let fresh = |(_, at): &&([u8; MAC], Instant)| now.saturating_duration_since(*at) < cookie::LIFETIME;
        if let Some((cookie, _)) = self.cookie.as_ref().filter(fresh) {
            mac2.copy_from_slice(&mac(cookie, &[signed, mac1]));
        }
        self.last_mac1 = mac1_of(message);
    }

    pub(crate) fn timestamps(&self) -> [Timestamp; 2] {
        [self.last_sent, self.last_received]
    }

    pub(crate) fn set_timestamps(&mut self, [sent, received]: [Timestamp; 2]) {
        self.last_sent = self.last_sent.max(sent);
        self.last_received = self.last_received.max(received);
    }
}

fn keypair(sending: Secret, receiving: Secret, local: u32, remote: u32, initiator: bool) -> Keypair {
    Keypair {
        sending: SendingKey::new(sending, remote, 0),
        receiving: ReceivingKey::new(receiving),
        local_index: local,
        remote_index: remote,
        initiator,
    }
}

fn generate(rng: &mut impl CryptoRng) -> (StaticSecret, [u8; 32]) {
    let mut bytes = Secret::default();
    rng.fill_bytes(bytes.as_mut_slice());
    let secret = StaticSecret::from(*bytes);
    let public = x25519_dalek::PublicKey::from(&secret).to_bytes();
    (secret, public)
}

fn put(message: &mut [u8], at: usize, bytes: &[u8]) {
    message.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
}

fn encrypt(
    symmetric: &mut Symmetric,
    key: &Secret,
    message: &mut [u8],
    range: std::ops::Range<usize>,
) -> Result<(), HandshakeError> {
    let to = message.get_mut(range).ok_or(HandshakeError::Auth)?;
    symmetric.encrypt_and_hash(key, to).ok_or(HandshakeError::Auth)
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pending = self.pending_index();
        f.debug_struct("Remote")
            .field("public", &self.public)
            .field("pending", &pending)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for OpenedInitiation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenedInitiation").field("peer", &self.peer).finish_non_exhaustive()
    }
}
