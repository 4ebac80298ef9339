//! A session's keys (paper, 5.4.6): one to seal with, one to open with.

use std::sync::atomic::{AtomicU64, Ordering};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use crate::hash::Secret;
use crate::message::{HEADER, TAG, TYPE_DATA};
use crate::replay::REJECT_AFTER_MESSAGES;

/// What a handshake agreed on.
#[derive(Debug)]
pub struct Keypair {
    /// Seals what we send.
    pub sending: SendingKey,
    /// Opens what we receive.
    pub receiving: ReceivingKey,
    /// How the peer names the session in what it sends.
    pub local_index: u32,
    /// How we do.
    pub remote_index: u32,
    /// Whether we began the handshake. The other side may send only after it has received something: until
    /// then it cannot know that we have the keys.
    pub initiator: bool,
}

/// Seals packets, each under a number of its own.
pub struct SendingKey {
    key: Secret,
    remote_index: u32,
    next: AtomicU64,
}

/// Opens packets. Which numbers were there before is a [`crate::Window`]'s to know.
pub struct ReceivingKey {
    key: Secret,
}

/// Why a packet could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Shorter than an empty packet.
    #[error("too short")]
    Truncated,
    /// Not sealed with our key, or changed since.
    #[error("wrong authenticator")]
    Auth,
}

/// The key as ring wants it. Made for each burst: ring's own copy cannot be wiped, so it lives on the stack only.
fn aead(key: &Secret) -> Option<LessSafeKey> {
    UnboundKey::new(&CHACHA20_POLY1305, key.as_slice()).ok().map(LessSafeKey::new)
}

/// Four zero bytes, then the counter.
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes.iter_mut().skip(4).zip(counter.to_le_bytes()).for_each(|(to, from)| *to = from);
    Nonce::assume_unique_for_key(bytes)
}

impl SendingKey {
    pub(crate) fn new(key: Secret, remote_index: u32, next: u64) -> Self {
        Self { key, remote_index, next: AtomicU64::new(next) }
    }

    /// The first of `count` numbers in a row that nobody else gets; `None` when the key is used up.
    pub fn reserve(&self, count: u64) -> Option<u64> {
        let advance = |next: u64| next.checked_add(count).filter(|end| *end <= REJECT_AFTER_MESSAGES);
        self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance).ok()
    }

    /// How many numbers were given.
    pub fn used(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Makes a data message in place: `datagram` is 16 bytes of room, the padded packet, 16 bytes of room. False
    /// if there is no room.
    pub fn seal(&self, counter: u64, datagram: &mut [u8]) -> bool {
        self.seal_many(counter, &mut [datagram]) == 1
    }

    /// The same for several with numbers in a row; returns how many were sealed, all before the first without
    /// room.
    pub fn seal_many(&self, first: u64, datagrams: &mut [&mut [u8]]) -> usize {
        let Some(key) = aead(&self.key) else { return 0 };
        let mut counter = first;
        for (n, datagram) in datagrams.iter_mut().enumerate() {
            if self.seal_one(&key, counter, datagram).is_none() {
                return n;
            }
            counter = counter.wrapping_add(1);
        }
        datagrams.len()
    }

    fn seal_one(&self, key: &LessSafeKey, counter: u64, datagram: &mut [u8]) -> Option<()> {
        let (header, rest) = datagram.split_first_chunk_mut::<HEADER>()?;
        let (packet, tag) = rest.split_last_chunk_mut::<TAG>()?;
        let (kind, rest) = header.split_first_chunk_mut::<4>()?;
        let (receiver, number) = rest.split_first_chunk_mut::<4>()?;
        *kind = TYPE_DATA.to_le_bytes();
        *receiver = self.remote_index.to_le_bytes();
        number.copy_from_slice(&counter.to_le_bytes());
        let sealed = key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), packet).ok()?;
        tag.copy_from_slice(sealed.as_ref());
        Some(())
    }

    pub(crate) fn key(&self) -> &Secret {
        &self.key
    }

    pub(crate) fn remote_index(&self) -> u32 {
        self.remote_index
    }
}

impl ReceivingKey {
    pub(crate) fn new(key: Secret) -> Self {
        Self { key }
    }

    /// Opens a data message in place; the packet, with its padding, begins after the header and is this long.
    pub fn open(&self, counter: u64, datagram: &mut [u8]) -> Result<usize, OpenError> {
        let mut result = [Err(OpenError::Auth)];
        self.open_many(&mut [(counter, datagram)], &mut result);
        let [result] = result;
        result
    }

    /// The same for several, each with its number; `results` has a place for each. What is not authentic stays
    /// unreleased: its bytes are not to be used.
    pub fn open_many(&self, datagrams: &mut [(u64, &mut [u8])], results: &mut [Result<usize, OpenError>]) {
        let Some(key) = aead(&self.key) else { return results.fill(Err(OpenError::Auth)) };
        for ((counter, datagram), result) in datagrams.iter_mut().zip(results) {
            *result = open_one(&key, *counter, datagram);
        }
    }

    pub(crate) fn key(&self) -> &Secret {
        &self.key
    }
}

fn open_one(key: &LessSafeKey, counter: u64, datagram: &mut [u8]) -> Result<usize, OpenError> {
    let sealed = datagram.get_mut(HEADER..).filter(|sealed| sealed.len() >= TAG);
    let sealed = sealed.ok_or(OpenError::Truncated)?;
    let packet = key.open_in_place(nonce(counter), Aad::empty(), sealed).map_err(|_| OpenError::Auth)?;
    Ok(packet.len())
}

impl std::fmt::Debug for SendingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendingKey").field("used", &self.used()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ReceivingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceivingKey").finish_non_exhaustive()
    }
}
