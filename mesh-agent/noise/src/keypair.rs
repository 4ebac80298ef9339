//! A session's keys (paper, 5.4.6): one to seal with, one to open with.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::hash::Secret;
use crate::lanes::{self, BURST, Packet};
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
        let mut counter = first;
        let mut sealed = 0;
        for burst in datagrams.chunks_mut(BURST) {
            let mut packets: [Packet<'_>; BURST] = Default::default();
            let mut ready = 0;
            for (packet, datagram) in packets.iter_mut().zip(burst.iter_mut()) {
                let Some(bytes) = self.write_header(counter, datagram) else { break };
                *packet = Packet { counter, bytes };
                counter = counter.wrapping_add(1);
                ready += 1;
            }
            lanes::seal(&self.key, packets.get_mut(..ready).unwrap_or_default());
            sealed += ready;
            if ready < burst.len() {
                break;
            }
        }
        sealed
    }

    /// What is behind the header, if there is room for a tag in it.
    fn write_header<'d>(&self, counter: u64, datagram: &'d mut [u8]) -> Option<&'d mut [u8]> {
        let (header, sealed) = datagram.split_first_chunk_mut::<HEADER>()?;
        if sealed.len() < TAG {
            return None;
        }
        let (kind, rest) = header.split_first_chunk_mut::<4>()?;
        let (receiver, number) = rest.split_first_chunk_mut::<4>()?;
        *kind = TYPE_DATA.to_le_bytes();
        *receiver = self.remote_index.to_le_bytes();
        number.copy_from_slice(&counter.to_le_bytes());
        Some(sealed)
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
        for (burst, results) in datagrams.chunks_mut(BURST).zip(results.chunks_mut(BURST)) {
            let count = burst.len().min(results.len());
            let mut packets: [Packet<'_>; BURST] = Default::default();
            for (((counter, datagram), packet), result) in
                burst.iter_mut().zip(&mut packets).zip(&mut *results)
            {
                // What is too short for a tag stays an empty packet, which is never authentic.
                let sealed = datagram.get_mut(HEADER..).filter(|sealed| sealed.len() >= TAG);
                *result = if sealed.is_some() { Err(OpenError::Auth) } else { Err(OpenError::Truncated) };
                *packet = Packet { counter: *counter, bytes: sealed.unwrap_or_default() };
            }
            let mut authentic = [false; BURST];
            let packets = packets.get_mut(..count).unwrap_or_default();
            lanes::open(&self.key, packets, &mut authentic);
            for ((packet, authentic), result) in packets.iter().zip(authentic).zip(results) {
                if authentic {
                    *result = Ok(packet.bytes.len().saturating_sub(TAG));
                }
            }
        }
    }

    pub(crate) fn key(&self) -> &Secret {
        &self.key
    }
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
