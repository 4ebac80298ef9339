//! A session as bytes, for the process that takes a running device over. They are secret: they belong into a
//! sealed memory file between the two, never on a disk. Whoever puts these pieces together gives the whole a version.
//!
//! A keypair is, little endian: role u8 (1 initiator), local index u32, remote index u32, next counter u64, sending
//! key 32, receiving key 32, the replay window as u64s. A peer's timestamps are the two of 12 bytes.

use zeroize::Zeroizing;

use crate::handshake::Remote;
use crate::hash::Secret;
use crate::keypair::{Keypair, ReceivingKey, SendingKey};
use crate::message::array_at;
use crate::replay::{REJECT_AFTER_MESSAGES, Window};
use crate::timestamp::Timestamp;

/// Bytes of a keypair with its window.
pub const KEYPAIR: usize = 1 + 4 + 4 + 8 + 32 + 32 + 8 * Window::COUNT;
/// Bytes of a peer's timestamps.
pub const TIMESTAMPS: usize = 24;

/// A session as bytes. Whoever writes it must not seal with it any more.
pub fn keypair(keypair: &Keypair, window: &Window) -> Zeroizing<Vec<u8>> {
    // Room for all of it: growing would leave copies of keys behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEYPAIR));
    bytes.push(u8::from(keypair.initiator));
    bytes.extend(keypair.local_index.to_le_bytes());
    bytes.extend(keypair.sending.remote_index().to_le_bytes());
    bytes.extend(keypair.sending.used().to_le_bytes());
    bytes.extend(keypair.sending.key().iter());
    bytes.extend(keypair.receiving.key().iter());
    window.words().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes
}

/// A session from [`keypair`]'s bytes, which goes on counting where that one stopped; `None` if they are none.
pub fn keypair_from(bytes: &[u8]) -> Option<(Keypair, Window)> {
    if bytes.len() != KEYPAIR {
        return None;
    }
    let u32_at = |at| array_at(bytes, at).map(u32::from_le_bytes);
    let u64_at = |at| array_at(bytes, at).map(u64::from_le_bytes);
    let key_at = |at| array_at::<32>(bytes, at).map(Secret::new);
    let initiator = match bytes.first()? {
        0 => false,
        1 => true,
        _ => return None,
    };
    let (local_index, remote_index, used) = (u32_at(1)?, u32_at(5)?, u64_at(9)?);
    let mut words = [0; Window::COUNT];
    for (n, word) in words.iter_mut().enumerate() {
        *word = u64_at(81 + 8 * n)?;
    }
    if used > REJECT_AFTER_MESSAGES {
        return None;
    }
    let window = Window::from_words(&words)?;
    let sending = SendingKey::new(key_at(17)?, remote_index, used);
    let receiving = ReceivingKey::new(key_at(49)?);
    Some((Keypair { sending, receiving, local_index, remote_index, initiator }, window))
}

/// The newest timestamps sent to and received from a peer: without them its old initiations could be replayed.
pub fn timestamps(remote: &Remote) -> [u8; TIMESTAMPS] {
    let mut bytes = [0; TIMESTAMPS];
    let all = remote.timestamps().into_iter().flat_map(|timestamp| timestamp.0);
    bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
    bytes
}

/// Gives `remote` the timestamps of [`timestamps`]; never older ones than it has.
pub fn restore_timestamps(remote: &mut Remote, bytes: &[u8; TIMESTAMPS]) {
    let at = |at| Timestamp(array_at(bytes, at).unwrap_or_default());
    remote.set_timestamps([at(0), at(12)]);
}
