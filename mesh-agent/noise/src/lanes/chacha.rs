//! ChaCha20 (RFC 8439, section 2.3), sixteen blocks at once in AVX-512: register *i* holds word *i* of sixteen states.
//!
//! The blocks of a batch need not belong together: each has its own packet counter, block number and destination, so a
//! batch is filled with whatever blocks a burst has, and only the last batch of a burst runs half empty.

#![allow(unsafe_code)] // SIMD loads and stores, at addresses that wait until a batch is full.

use std::arch::x86_64::*;

/// Blocks a batch holds.
const LANES: usize = 16;

/// Bytes of a ChaCha20 block.
pub(super) const BLOCK: usize = 64;

/// Blocks that wait for their key stream.
pub(super) struct Batch<'k> {
    key: &'k [u32; 8],
    filled: usize,
    block: [u32; LANES],
    counter_low: [u32; LANES],
    counter_high: [u32; LANES],
    /// Where the key stream goes, and how many bytes of it: at most [`BLOCK`].
    target: [(*mut u8, usize); LANES],
}

impl<'k> Batch<'k> {
    pub(super) fn new(key: &'k [u32; 8]) -> Self {
        Batch {
            key,
            filled: 0,
            block: [0; LANES],
            counter_low: [0; LANES],
            counter_high: [0; LANES],
            target: [(std::ptr::null_mut(), 0); LANES],
        }
    }

    /// Adds the key stream of packet `counter` from block `first` on to `bytes`, by and by: it is done when
    /// [`Batch::finish`] returns.
    ///
    /// # Safety
    /// `bytes` stays valid, and is not used otherwise, until then.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn add(&mut self, counter: u64, first: u32, bytes: *mut [u8]) {
        let (mut at, mut left, mut block) = (bytes.cast::<u8>(), bytes.len(), first);
        while left > 0 {
            let len = left.min(BLOCK);
            let lane = self.filled;
            self.block[lane] = block;
            self.counter_low[lane] = counter as u32;
            self.counter_high[lane] = (counter >> 32) as u32;
            self.target[lane] = (at, len);
            self.filled += 1;
            if self.filled == LANES {
                // SAFETY: the caller's promise.
                unsafe { self.finish() };
            }
            // SAFETY: `len` of the `left` bytes from here on.
            at = unsafe { at.add(len) };
            left -= len;
            block = block.wrapping_add(1);
        }
    }

    /// Adds the key stream to all blocks that wait.
    ///
    /// # Safety
    /// As for [`Batch::add`].
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn finish(&mut self) {
        if self.filled == 0 {
            return;
        }
        let stream =
            sixteen_blocks(self.key, load(&self.block), load(&self.counter_low), load(&self.counter_high));
        for (&(at, len), stream) in self.target[..self.filled].iter().zip(stream) {
            let at: *mut i8 = at.cast();
            if len == BLOCK {
                // SAFETY: a whole block at `at`, by the caller's promise.
                unsafe {
                    _mm512_storeu_si512(at.cast(), _mm512_xor_si512(_mm512_loadu_si512(at.cast()), stream))
                };
            } else {
                let mask = (1u64 << len) - 1;
                // SAFETY: only the `len` bytes of the mask are touched.
                unsafe {
                    let text = _mm512_maskz_loadu_epi8(mask, at);
                    _mm512_mask_storeu_epi8(at, mask, _mm512_xor_si512(text, stream));
                }
            }
        }
        self.filled = 0;
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(words: &[u32; LANES]) -> __m512i {
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// The key stream of sixteen states, one block a register.
#[inline]
#[target_feature(enable = "avx512f")]
fn sixteen_blocks(
    key: &[u32; 8],
    block: __m512i,
    counter_low: __m512i,
    counter_high: __m512i,
) -> [__m512i; LANES] {
    let word = |w: u32| _mm512_set1_epi32(w as i32);
    let start = [
        word(0x6170_7865),
        word(0x3320_646e),
        word(0x7962_2d32),
        word(0x6b20_6574),
        word(key[0]),
        word(key[1]),
        word(key[2]),
        word(key[3]),
        word(key[4]),
        word(key[5]),
        word(key[6]),
        word(key[7]),
        block,
        _mm512_setzero_si512(),
        counter_low,
        counter_high,
    ];
    // Sixteen variables, so that they are registers.
    let [mut a0, mut a1, mut a2, mut a3, mut b0, mut b1, mut b2, mut b3, ..] = start;
    let [.., mut c0, mut c1, mut c2, mut c3, mut d0, mut d1, mut d2, mut d3] = start;
    // One step of four quarter rounds, which do not depend on each other.
    macro_rules! step {
        ($($x:ident $y:ident $z:ident),*; $turn:literal) => {$(
            $x = _mm512_add_epi32($x, $y);
            $z = _mm512_rol_epi32::<$turn>(_mm512_xor_si512($z, $x));
        )*};
    }
    for _ in 0..10 {
        step!(a0 b0 d0, a1 b1 d1, a2 b2 d2, a3 b3 d3; 16);
        step!(c0 d0 b0, c1 d1 b1, c2 d2 b2, c3 d3 b3; 12);
        step!(a0 b0 d0, a1 b1 d1, a2 b2 d2, a3 b3 d3; 8);
        step!(c0 d0 b0, c1 d1 b1, c2 d2 b2, c3 d3 b3; 7);
        step!(a0 b1 d3, a1 b2 d0, a2 b3 d1, a3 b0 d2; 16);
        step!(c2 d3 b1, c3 d0 b2, c0 d1 b3, c1 d2 b0; 12);
        step!(a0 b1 d3, a1 b2 d0, a2 b3 d1, a3 b0 d2; 8);
        step!(c2 d3 b1, c3 d0 b2, c0 d1 b3, c1 d2 b0; 7);
    }
    let mut end = [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3];
    for (end, start) in end.iter_mut().zip(start) {
        *end = _mm512_add_epi32(*end, start);
    }
    transposed(end)
}

/// Rows to columns: from word *i* of sixteen blocks to block *i*.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(s: [__m512i; 16]) -> [__m512i; 16] {
    let mut out = [_mm512_setzero_si512(); 16];
    // fours[q][k]: words 4q to 4q+3 of the blocks k, 4+k, 8+k and 12+k.
    let mut fours = [[_mm512_setzero_si512(); 4]; 4];
    for q in 0..4 {
        let [a, b, c, d] = [s[4 * q], s[4 * q + 1], s[4 * q + 2], s[4 * q + 3]];
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        fours[q] = [
            _mm512_unpacklo_epi64(ab_low, cd_low),
            _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ];
    }
    for k in 0..4 {
        let blocks = transposed_quarters([fours[0][k], fours[1][k], fours[2][k], fours[3][k]]);
        for (n, block) in blocks.into_iter().enumerate() {
            out[4 * n + k] = block;
        }
    }
    out
}

/// Result *i* is made of quarter *i* (128 bits) of each of the four.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transposed_quarters([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab_low, ab_high) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
    let (cd_low, cd_high) = (_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d));
    [
        _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low),
        _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low),
        _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high),
        _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high),
    ]
}
