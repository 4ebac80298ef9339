//! ChaCha20-Poly1305 (RFC 8439) of many packets at once, as WireGuard uses it: the nonce is four zero bytes and the
//! packet's counter, and there is no additional data.
//!
//! A library's call seals one packet: it computes blocks that nobody needs, and waits for the one chain of multiplications
//! that a Poly1305 is. A burst under one key has neither trouble: its blocks fill batches of sixteen without a rest
//! (`chacha`), and eight packets are eight chains (`poly`).
//!
//! That takes AVX-512 with IFMA. Without it `ring` does the work, packet by packet; the tests compare with it, too.
//! No branch and no address depends on a secret: only on lengths, counters and verdicts.

use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod chacha;
#[cfg(target_arch = "x86_64")]
mod poly;
mod single;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

/// Bytes of a tag.
pub const TAG: usize = 16;

/// The packets that are worked on together: they stay in the first-level cache from the cipher to the
/// authenticator, and their Poly1305 keys are one batch.
pub const BURST: usize = 16;

/// One packet of a burst.
#[derive(Debug, Default)]
pub struct Packet<'a> {
    /// The nonce.
    pub counter: u64,
    /// The text, and behind it the tag, or room for it.
    pub bytes: &'a mut [u8],
}

impl Packet<'_> {
    /// Blocks of ChaCha20: those of the text, and the one that gives the Poly1305 key.
    fn blocks(&self) -> usize {
        self.bytes.len().saturating_sub(TAG).div_ceil(64) + 1
    }

    /// The text and the tag; `None` if the packet is too short for a tag.
    fn split(&mut self) -> Option<(&mut [u8], &mut [u8; TAG])> {
        self.bytes.split_last_chunk_mut()
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// `ring`, packet by packet.
    Ring,
    /// AVX-512 F, BW, IFMA and VBMI2.
    Avx512,
}

/// Seals a burst, of at most [`BURST`] packets or so, by what is fastest for it. As [`Engine::seal`].
pub fn seal(key: &[u8; 32], packets: &mut [Packet<'_>]) {
    Engine::for_burst(packets, 10).seal(key, packets);
}

/// Opens a burst, of at most [`BURST`] packets or so, by what is fastest for it. As [`Engine::open`].
pub fn open(key: &[u8; 32], packets: &mut [Packet<'_>], authentic: &mut [bool]) {
    Engine::for_burst(packets, if packets.len() > 1 { 15 } else { 32 }).open(key, packets, authentic);
}

static ONLY_RING: AtomicBool = AtomicBool::new(false);

impl Engine {
    /// Whether this CPU has what it needs.
    pub fn is_supported(self) -> bool {
        match self {
            Engine::Ring => true,
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512 => avx512::is_supported(),
            #[cfg(not(target_arch = "x86_64"))]
            Engine::Avx512 => false,
        }
    }

    /// The one this process uses: the fastest one of this CPU, unless [`Engine::only_ring`] was called.
    pub fn current() -> Engine {
        if !ONLY_RING.load(Ordering::Relaxed) && Engine::Avx512.is_supported() {
            Engine::Avx512
        } else {
            Engine::Ring
        }
    }

    /// Batches that are mostly empty do not pay. What a burst costs `ring`: its blocks, and two more a packet. The least for
    /// which lanes are faster is measured (`examples/crypto_speed.rs`).
    fn for_burst(packets: &[Packet<'_>], least_cost: usize) -> Engine {
        let cost = packets.iter().map(|packet| packet.blocks() + 2).sum::<usize>();
        if cost < least_cost { Engine::Ring } else { Engine::current() }
    }

    /// From here on this process uses [`Engine::Ring`]: to compare.
    pub fn only_ring() {
        ONLY_RING.store(true, Ordering::Relaxed);
    }

    /// Encrypts the text of each packet and writes its tag. One that is too short for a tag is left as it is.
    pub fn seal(self, key: &[u8; 32], packets: &mut [Packet<'_>]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512 if avx512::is_supported() => {
                packets.chunks_mut(BURST).for_each(|packets| avx512::seal(key, packets));
            }
            _ => single::seal(key, packets),
        }
    }

    /// Decrypts the packets whose tag is right, and says of each whether it was. The bytes of the others are
    /// undefined but never their text.
    pub fn open(self, key: &[u8; 32], packets: &mut [Packet<'_>], authentic: &mut [bool]) {
        authentic.fill(false);
        match self {
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512 if avx512::is_supported() => {
                let bursts = packets.chunks_mut(BURST).zip(authentic.chunks_mut(BURST));
                bursts.for_each(|(packets, authentic)| avx512::open(key, packets, authentic));
            }
            _ => single::open(key, packets, authentic),
        }
    }
}
