//! Poly1305 (RFC 8439, section 2.5) over ciphertexts without additional data, eight lanes of AVX-512 IFMA.
//!
//! Numbers modulo p = 2^130 - 5 are three limbs of 44, 44 and 42 bits, a little more between reductions. IFMA multiplies
//! 52 by 52 bits and gives the low or the high 52 bits of the product. With h and r in limbs, and 2^132 = 20 mod p:
//!
//! ```text
//! d0 = h0 r0 + h1 20r2 + h2 20r1      d1 = h0 r1 + h1 r0 + h2 20r2      d2 = h0 r2 + h1 r1 + h2 r0
//! ```
//!
//! [`tags`] has two ways, and takes the cheaper one:
//! * *abreast*: a lane is a packet. Four blocks a step: h = (h + m1) r^4 + m2 r^3 + m3 r^2 + m4 r.
//! * *alone*: the lanes are eight blocks of one packet: h = (h + m) r^8, and at the end (h + m) (r^8, …, r).
//!
//! Zero blocks before a message change nothing as long as they have no bit 128, so messages are aligned at their ends:
//! packets of unequal length need no masks at the end, where the partial block and the lengths are.

#![allow(unsafe_code)] // SIMD loads and stores.

use std::arch::x86_64::*;

use super::chacha::transposed_quarters;

/// A one-time key: r, then s, as little-endian words.
pub(super) type MacKey = [u64; 4];

/// A tag as a little-endian number.
pub(super) type Tag = u128;

/// Lanes, which is packets abreast.
pub(super) const LANES: usize = 8;

/// Bytes of a block.
const BLOCK: usize = 16;

const MASK44: u64 = (1 << 44) - 1;
const MASK42: u64 = (1 << 42) - 1;

/// Bit 128 of a block, in its third limb.
const BIT128: i64 = 1 << 40;

/// Three limbs of eight numbers.
type Limbs = [__m512i; 3];

/// What to multiply by: r0, r1, r2, 20 r1, 20 r2.
#[derive(Clone, Copy)]
struct Factor([__m512i; 5]);

/// The tags of up to eight ciphertexts, each under its own one-time key.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
pub(super) fn tags(texts: &[&[u8]], keys: &[MacKey], tags: &mut [Tag]) {
    let steps_abreast = texts.iter().map(|t| blocks(t).div_ceil(4)).max().unwrap_or(0);
    let steps_alone: usize = texts.iter().map(|t| blocks(t).div_ceil(8)).sum();
    // Cycles, roughly, as measured.
    if 250 + 130 * steps_abreast < 250 * texts.len() + 45 * steps_alone {
        abreast(texts, keys, tags);
    } else {
        for ((text, key), tag) in texts.iter().zip(keys).zip(tags) {
            *tag = alone(text, key);
        }
    }
}

/// Blocks of a message: those of the text, and the lengths.
fn blocks(text: &[u8]) -> usize {
    text.len().div_ceil(BLOCK) + 1
}

/// 64 bytes of a message, as many from the last one that `text` has, `from` bytes into it: zeros where it has none, before it
/// and behind it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn piece(text: &[u8], from: isize) -> __m512i {
    let len = text.len() as isize;
    let bits = |count: isize| u64::MAX.checked_shl(count.max(0) as u32).unwrap_or(0);
    // Bytes from the start of the text on, and not those from its end on.
    let mask = bits(-from) & !bits(len - from);
    // SAFETY: only bytes of the text are in the mask.
    unsafe { _mm512_maskz_loadu_epi8(mask, text.as_ptr().wrapping_offset(from).cast()) }
}

/// The last 64 bytes of a message: the end of the text, padded with zeros to whole blocks, and the lengths.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn ending(text: &[u8]) -> __m512i {
    let end = piece(text, (blocks(text) * BLOCK) as isize - 64);
    _mm512_mask_set1_epi64(end, 0x80, text.len() as i64)
}

/// Up to eight packets, each in a lane of its own.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
pub(super) fn abreast(texts: &[&[u8]], keys: &[MacKey], tags: &mut [Tag]) {
    // Spare lanes repeat the first packet: they cost nothing and need no masks.
    let lane = |n: usize| if n < texts.len() { n } else { 0 };
    let text: [&[u8]; LANES] = std::array::from_fn(|n| texts[lane(n)]);
    let steps = text.iter().map(|t| blocks(t).div_ceil(4)).max().unwrap_or(0);
    let zeros: [usize; LANES] = std::array::from_fn(|n| 4 * steps - blocks(text[n]));
    let zero_count = load(&zeros.map(|zeros| zeros as u64));
    let most_zeros = zeros.into_iter().max().unwrap_or(0);

    let r: [[u64; 3]; LANES] = std::array::from_fn(|n| clamped(&keys[lane(n)]));
    let r1 = std::array::from_fn(|limb| load(&std::array::from_fn(|n| r[n][limb])));
    let f1 = factor(r1);
    let r2 = multiply(r1, &f1);
    let f2 = factor(r2);
    let (f3, f4) = (factor(multiply(r2, &f1)), factor(multiply(r2, &f2)));

    let mut h = [_mm512_setzero_si512(); 3];
    for step in 0..steps {
        let mut rows = [_mm512_setzero_si512(); LANES];
        if step + 1 == steps {
            for (row, text) in rows.iter_mut().zip(text) {
                *row = ending(text);
            }
        } else if 4 * step >= most_zeros {
            for ((row, text), zeros) in rows.iter_mut().zip(text).zip(zeros) {
                // Only the last step, which is not this one, holds less than 64 bytes of a text.
                debug_assert!((4 * step - zeros) * BLOCK + 64 <= text.len());
                // SAFETY: 64 bytes of the text.
                *row = unsafe { _mm512_loadu_si512(text.as_ptr().add((4 * step - zeros) * BLOCK).cast()) };
            }
        } else {
            for ((row, text), zeros) in rows.iter_mut().zip(text).zip(zeros) {
                let skipped = zeros.saturating_sub(4 * step).min(4);
                let mask = (0xff_u32 << (2 * skipped)) as u8;
                let at = text.as_ptr().wrapping_add(4 * step * BLOCK).wrapping_sub(zeros * BLOCK);
                // SAFETY: 64 bytes of the text, less the blocks before it, which the mask leaves out.
                *row = unsafe { _mm512_maskz_loadu_epi64(mask, at.cast()) };
            }
        }
        let [p0, p1, p2, p3, p4, p5, p6, p7] = rows;
        let low = transposed_quarters([
            _mm512_unpacklo_epi64(p0, p1),
            _mm512_unpacklo_epi64(p2, p3),
            _mm512_unpacklo_epi64(p4, p5),
            _mm512_unpacklo_epi64(p6, p7),
        ]);
        let high = transposed_quarters([
            _mm512_unpackhi_epi64(p0, p1),
            _mm512_unpackhi_epi64(p2, p3),
            _mm512_unpackhi_epi64(p4, p5),
            _mm512_unpackhi_epi64(p6, p7),
        ]);
        let bits128 = if 4 * step >= most_zeros {
            [_mm512_set1_epi64(BIT128); 4]
        } else {
            let zeros = _mm512_sub_epi64(zero_count, _mm512_set1_epi64(4 * step as i64));
            [bit128(zeros, 0), bit128(zeros, 1), bit128(zeros, 2), bit128(zeros, 3)]
        };
        let m0 = limbs(low[0], high[0], bits128[0]);
        let m1 = limbs(low[1], high[1], bits128[1]);
        let m2 = limbs(low[2], high[2], bits128[2]);
        let m3 = limbs(low[3], high[3], bits128[3]);
        let mut sum = Product::zero();
        sum.add(m3, &f1);
        sum.add(m2, &f2);
        sum.add(m1, &f3);
        sum.add(plus(h, m0), &f4);
        h = sum.reduced();
    }
    let h = [store(h[0]), store(h[1]), store(h[2])];
    for (n, (tag, key)) in tags.iter_mut().zip(keys).enumerate().take(texts.len()) {
        *tag = finished([h[0][n], h[1][n], h[2][n]], key);
    }
}

/// One packet, eight blocks at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
pub(super) fn alone(text: &[u8], key: &MacKey) -> Tag {
    // Where unpacking puts the blocks of a step.
    let order = load(&[0, 4, 1, 5, 2, 6, 3, 7]);
    let steps = blocks(text).div_ceil(8);
    let zeros = 8 * steps - blocks(text);

    // Lane by lane r^(8 - order), by the bits of 7 - order.
    let r1 = clamped(key).map(|limb| _mm512_set1_epi64(limb as i64));
    let r2 = multiply(r1, &factor(r1));
    let f2 = factor(r2);
    let f4 = factor(multiply(r2, &f2));
    let f8 = factor(multiply([f4.0[0], f4.0[1], f4.0[2]], &f4));
    let power = pick(ODD, r1, r2);
    let power = pick(TWO, power, multiply(power, &f2));
    let last = factor(pick(FOUR, power, multiply(power, &f4)));

    let mut h = [_mm512_setzero_si512(); 3];
    for step in 0..steps {
        let at_end = step + 1 == steps;
        let (front, back) = if at_end {
            (piece(text, (blocks(text) * BLOCK) as isize - 128), ending(text))
        } else {
            let skipped = if step == 0 { zeros } else { 0 };
            let mask = 0xffff_u32 << (2 * skipped);
            let at = text.as_ptr().wrapping_add(8 * step * BLOCK).wrapping_sub(zeros * BLOCK);
            // SAFETY: 128 bytes of the text, less the blocks before it, which the mask leaves out.
            unsafe {
                (
                    _mm512_maskz_loadu_epi64(mask as u8, at.cast()),
                    _mm512_maskz_loadu_epi64((mask >> 8) as u8, at.wrapping_add(64).cast()),
                )
            }
        };
        let bit128 = if step == 0 {
            let present = _mm512_cmpge_epi64_mask(order, _mm512_set1_epi64(zeros as i64));
            _mm512_maskz_set1_epi64(present, BIT128)
        } else {
            _mm512_set1_epi64(BIT128)
        };
        let m = limbs(_mm512_unpacklo_epi64(front, back), _mm512_unpackhi_epi64(front, back), bit128);
        h = multiply(plus(h, m), if at_end { &last } else { &f8 });
    }
    let h = [_mm512_reduce_add_epi64(h[0]), _mm512_reduce_add_epi64(h[1]), _mm512_reduce_add_epi64(h[2])];
    finished(h.map(|limb| limb as u64), key)
}

/// `b` in the lanes of the mask, elsewhere `a`.
#[inline]
#[target_feature(enable = "avx512f")]
fn pick(mask: u8, a: Limbs, b: Limbs) -> Limbs {
    [
        _mm512_mask_blend_epi64(mask, a[0], b[0]),
        _mm512_mask_blend_epi64(mask, a[1], b[1]),
        _mm512_mask_blend_epi64(mask, a[2], b[2]),
    ]
}

/// Bit 128 where a lane has no more zero blocks than `block`.
#[inline]
#[target_feature(enable = "avx512f")]
fn bit128(zeros: __m512i, block: i64) -> __m512i {
    _mm512_maskz_set1_epi64(_mm512_cmple_epi64_mask(zeros, _mm512_set1_epi64(block)), BIT128)
}

/// Lanes of [`alone`] whose exponent less one (7, 3, 6, 2, 5, 1, 4, 0) has bit 0, 1, 2.
const ODD: u8 = 0b0011_0011;
const TWO: u8 = 0b0000_1111;
const FOUR: u8 = 0b0101_0101;

/// r of a one-time key, clamped, in limbs.
fn clamped(key: &MacKey) -> [u64; 3] {
    let low = key[0] & 0x0fff_fffc_0fff_ffff;
    let high = key[1] & 0x0fff_fffc_0fff_fffc;
    [low & MASK44, (low >> 44 | high << 20) & MASK44, high >> 24]
}

/// Blocks in limbs. `bit128` is bit 40 of the third one.
#[inline]
#[target_feature(enable = "avx512f,avx512vbmi2")]
fn limbs(low: __m512i, high: __m512i, bit128: __m512i) -> Limbs {
    let mask = _mm512_set1_epi64(MASK44 as i64);
    [
        _mm512_and_si512(low, mask),
        _mm512_and_si512(_mm512_shrdi_epi64::<44>(low, high), mask),
        _mm512_or_si512(_mm512_srli_epi64::<24>(high), bit128),
    ]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn plus(a: Limbs, b: Limbs) -> Limbs {
    [_mm512_add_epi64(a[0], b[0]), _mm512_add_epi64(a[1], b[1]), _mm512_add_epi64(a[2], b[2])]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn five_times(x: __m512i) -> __m512i {
    _mm512_add_epi64(x, _mm512_slli_epi64::<2>(x))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn factor(r: Limbs) -> Factor {
    Factor([
        r[0],
        r[1],
        r[2],
        _mm512_slli_epi64::<2>(five_times(r[1])),
        _mm512_slli_epi64::<2>(five_times(r[2])),
    ])
}

#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn multiply(a: Limbs, b: &Factor) -> Limbs {
    let mut sum = Product::zero();
    sum.add(a, b);
    sum.reduced()
}

/// A sum of products before its reduction: the low and the high 52 bits apart.
struct Product {
    low: Limbs,
    high: Limbs,
}

impl Product {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn zero() -> Product {
        Product { low: [_mm512_setzero_si512(); 3], high: [_mm512_setzero_si512(); 3] }
    }

    /// Adds h·r. Limbs of h have at most 46 bits, those of r at most 45; so four sums stay below 2^64 by far.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn add(&mut self, h: Limbs, &Factor([r0, r1, r2, s1, s2]): &Factor) {
        macro_rules! add {
            ($($column:literal $h:literal $r:ident),*) => {$(
                self.low[$column] = _mm512_madd52lo_epu64(self.low[$column], h[$h], $r);
                self.high[$column] = _mm512_madd52hi_epu64(self.high[$column], h[$h], $r);
            )*};
        }
        add!(0 0 r0, 1 0 r1, 2 0 r2);
        add!(0 1 s2, 1 1 r0, 2 1 r1);
        add!(0 2 s1, 1 2 s2, 2 2 r0);
    }

    /// The limbs, reduced but for a few bits: at most 2^44 + 2^18, 2^44 + 2^14, 2^42 + 2^14.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn reduced(self) -> Limbs {
        let [l0, l1, l2] = self.low;
        let [h0, h1, h2] = self.high;
        // The high part of a column is 2^52 = 2^44 2^8 of it: 2^8 of the next; after the last 2^140 = 5 2^10 of the first.
        let t0 = _mm512_add_epi64(l0, five_times(_mm512_slli_epi64::<10>(h2)));
        let t1 = _mm512_add_epi64(l1, _mm512_slli_epi64::<8>(h0));
        let t2 = _mm512_add_epi64(l2, _mm512_slli_epi64::<8>(h1));
        let mask44 = _mm512_set1_epi64(MASK44 as i64);
        let mask42 = _mm512_set1_epi64(MASK42 as i64);
        // All carries at once: what they leave above the limb is a few bits.
        [
            _mm512_add_epi64(_mm512_and_si512(t0, mask44), five_times(_mm512_srli_epi64::<42>(t2))),
            _mm512_add_epi64(_mm512_and_si512(t1, mask44), _mm512_srli_epi64::<44>(t0)),
            _mm512_add_epi64(_mm512_and_si512(t2, mask42), _mm512_srli_epi64::<44>(t1)),
        ]
    }
}

/// The tag: h reduced to below p, plus the second half of the key, modulo 2^128.
fn finished(h: [u64; 3], key: &MacKey) -> Tag {
    let [mut h0, mut h1, mut h2] = h;
    // Twice round: limbs may come in with up to 50 bits.
    for _ in 0..2 {
        h1 += h0 >> 44;
        h0 &= MASK44;
        h2 += h1 >> 44;
        h1 &= MASK44;
        h0 += 5 * (h2 >> 42);
        h2 &= MASK42;
    }
    h1 += h0 >> 44;
    h0 &= MASK44;
    h2 += h1 >> 44;
    h1 &= MASK44;
    // h - p = h + 5 - 2^130, taken if it is not negative.
    let g0 = h0 + 5;
    let g1 = h1 + (g0 >> 44);
    let g2 = h2 + (g1 >> 44);
    let take = 0_u64.wrapping_sub(g2 >> 42);
    let pick = |h: u64, g: u64| u128::from((h & !take) | (g & take));
    let value = pick(h0, g0 & MASK44) | pick(h1, g1 & MASK44) << 44 | pick(h2, g2 & MASK42) << 88;
    value.wrapping_add(u128::from(key[2]) | u128::from(key[3]) << 64)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(words: &[u64; LANES]) -> __m512i {
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(lanes: __m512i) -> [u64; LANES] {
    let mut out = [0; LANES];
    // SAFETY: 64 bytes.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), lanes) };
    out
}
