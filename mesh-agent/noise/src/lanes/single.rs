//! Packet by packet, by `ring`.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};

use super::Packet;

/// The key as ring wants it. Made for each burst: ring's own copy cannot be wiped, so it lives on the stack only.
fn aead(key: &[u8; 32]) -> Option<LessSafeKey> {
    UnboundKey::new(&CHACHA20_POLY1305, key).ok().map(LessSafeKey::new)
}

/// Four zero bytes, then the counter.
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes.iter_mut().skip(4).zip(counter.to_le_bytes()).for_each(|(to, from)| *to = from);
    Nonce::assume_unique_for_key(bytes)
}

pub(super) fn seal(key: &[u8; 32], packets: &mut [Packet<'_>]) {
    let Some(key) = aead(key) else { return };
    for packet in packets {
        let nonce = nonce(packet.counter);
        let Some((text, tag)) = packet.split() else { continue };
        // Only a text of 256 GiB and more is refused.
        let Ok(sealed) = key.seal_in_place_separate_tag(nonce, Aad::empty(), text) else { continue };
        tag.copy_from_slice(sealed.as_ref());
    }
}

pub(super) fn open(key: &[u8; 32], packets: &mut [Packet<'_>], authentic: &mut [bool]) {
    let Some(key) = aead(key) else { return };
    for (packet, authentic) in packets.iter_mut().zip(authentic) {
        let nonce = nonce(packet.counter);
        let Some((text, tag)) = packet.split() else { continue };
        let tag = Tag::from(*tag);
        *authentic = key.open_in_place_separate_tag(nonce, Aad::empty(), tag, text, 0..).is_ok();
    }
}
