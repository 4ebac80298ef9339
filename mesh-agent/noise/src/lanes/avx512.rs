//! A burst by AVX-512: all blocks through [`chacha::Batch`], all tags by [`poly::tags`].

#![allow(unsafe_code)] // Calls of functions that need a CPU feature, and blocks handed on as pointers until a batch is full.

use std::hint::black_box;

use zeroize::Zeroizing;

use super::chacha::Batch;
use super::poly::{self, MacKey, Tag};
use super::{BURST, Packet};

/// Whether the CPU has what the functions here need.
pub(super) fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512ifma")
        && is_x86_feature_detected!("avx512vbmi2")
}

/// Seals at most [`BURST`] packets. The CPU must be supported.
pub(super) fn seal(key: &[u8; 32], packets: &mut [Packet<'_>]) {
    assert!(is_supported());
    // SAFETY: supported.
    unsafe { seal_burst(&words(key), packets) }
}

/// Opens at most [`BURST`] packets. The CPU must be supported.
pub(super) fn open(key: &[u8; 32], packets: &mut [Packet<'_>], authentic: &mut [bool]) {
    assert!(is_supported());
    // SAFETY: supported.
    unsafe { open_burst(&words(key), packets, authentic) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn seal_burst(key: &[u32; 8], packets: &mut [Packet<'_>]) {
    let mut keys = Zeroizing::new([[0; 4]; BURST]);
    let mut batch = Batch::new(key);
    for (packet, mac_key) in packets.iter_mut().zip(keys.iter_mut()) {
        let counter = packet.counter;
        let Some((text, _)) = packet.split() else { continue };
        // SAFETY: until `finish` both are left alone.
        unsafe {
            batch.add(counter, 0, mac_key_bytes(mac_key));
            batch.add(counter, 1, text);
        }
    }
    // SAFETY: what was added is still there.
    unsafe { batch.finish() };
    let tags = tags(packets, &keys);
    for (packet, tag) in packets.iter_mut().zip(tags) {
        let Some((_, room)) = packet.split() else { continue };
        *room = tag.to_le_bytes();
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn open_burst(key: &[u32; 8], packets: &mut [Packet<'_>], authentic: &mut [bool]) {
    let mut keys = Zeroizing::new([[0; 4]; BURST]);
    let mut batch = Batch::new(key);
    for (packet, mac_key) in packets.iter().zip(keys.iter_mut()) {
        // SAFETY: left alone until `finish`.
        unsafe { batch.add(packet.counter, 0, mac_key_bytes(mac_key)) };
    }
    // SAFETY: what was added is still there.
    unsafe { batch.finish() };
    let tags = tags(packets, &keys);
    for ((packet, tag), authentic) in packets.iter_mut().zip(tags).zip(authentic) {
        let counter = packet.counter;
        let Some((text, received)) = packet.split() else { continue };
        // One comparison, and only its outcome is seen.
        let difference = black_box(u128::from_le_bytes(*received) ^ tag);
        *authentic = difference == 0;
        if *authentic {
            // SAFETY: left alone until `finish`.
            unsafe { batch.add(counter, 1, text) };
        }
    }
    // SAFETY: what was added is still there.
    unsafe { batch.finish() };
}

/// The tags of all texts. That of a packet too short for one means nothing.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn tags(packets: &[Packet<'_>], keys: &[MacKey; BURST]) -> [Tag; BURST] {
    let mut texts: [&[u8]; BURST] = [&[]; BURST];
    for (text, packet) in texts.iter_mut().zip(packets) {
        *text = packet.bytes.split_last_chunk::<{ super::TAG }>().map_or(&[], |(text, _)| text);
    }
    let mut tags = [0; BURST];
    let texts = texts.get(..packets.len()).unwrap_or(&texts);
    for ((texts, keys), tags) in
        texts.chunks(poly::LANES).zip(keys.chunks(poly::LANES)).zip(tags.chunks_mut(poly::LANES))
    {
        poly::tags(texts, keys, tags);
    }
    tags
}

/// The key in words.
fn words(key: &[u8; 32]) -> Zeroizing<[u32; 8]> {
    let mut words = Zeroizing::new([0; 8]);
    for (word, bytes) in words.iter_mut().zip(key.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// A key's memory, where the first 32 bytes of a block go.
fn mac_key_bytes(key: &mut MacKey) -> *mut [u8] {
    std::ptr::slice_from_raw_parts_mut(key.as_mut_ptr().cast(), size_of::<MacKey>())
}
