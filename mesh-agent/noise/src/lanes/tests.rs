//! The authenticator against arithmetic by hand, at the numbers where carries go furthest. (That bursts are what `ring`
//! makes of them is in `tests/lanes.rs`.)

#![allow(clippy::unwrap_used, unsafe_code)] // Calls of functions that need a CPU feature.

use proptest::collection::vec;
use proptest::prelude::*;

use super::poly::{self, LANES, MacKey, Tag};

/// p = 2^130 - 5, from the top: 2^128 units, then the rest.
const P: (u128, u128) = (3, u128::MAX - 4);

/// a + b mod p, both below p.
fn add(a: (u128, u128), b: (u128, u128)) -> (u128, u128) {
    let (low, carry) = a.1.overflowing_add(b.1);
    let high = a.0 + b.0 + u128::from(carry);
    if (high, low) < P {
        return (high, low);
    }
    let (low, borrow) = low.overflowing_sub(P.1);
    (high - P.0 - u128::from(borrow), low)
}

/// a · b mod p, bit by bit.
fn multiply(a: (u128, u128), b: u128) -> (u128, u128) {
    (0..128).rev().fold((0, 0), |sum, bit| {
        let double = add(sum, sum);
        if b >> bit & 1 == 1 { add(double, a) } else { double }
    })
}

/// Poly1305 of a message as in RFC 8439, 2.5.1.
fn poly1305(message: &[u8], key: &MacKey) -> Tag {
    let word = |n: usize| u128::from(key[n]) | u128::from(key[n + 1]) << 64;
    let r = word(0) & 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;
    let mut h = (0, 0);
    for chunk in message.chunks(16) {
        let mut bytes = [0; 16];
        bytes[..chunk.len()].copy_from_slice(chunk);
        let block = u128::from_le_bytes(bytes);
        let block = if chunk.len() == 16 { (1, block) } else { (0, block | 1 << (8 * chunk.len())) };
        h = multiply(add(h, block), r);
    }
    h.1.wrapping_add(word(2))
}

/// What the AEAD authenticates: the text, padded, and the lengths (2.8).
fn tag(text: &[u8], key: &MacKey) -> Tag {
    let mut message = text.to_vec();
    message.resize(text.len().next_multiple_of(16), 0);
    message.extend([0; 8]);
    message.extend((text.len() as u64).to_le_bytes());
    poly1305(&message, key)
}

/// RFC 8439, 2.5.2, and A.3, vectors 7 to 11, where h passes p or a carry runs through.
#[test]
fn the_oracle_agrees_with_the_rfc() {
    let key = |bytes: [u8; 32]| -> MacKey {
        std::array::from_fn(|n| u64::from_le_bytes(bytes[8 * n..][..8].try_into().unwrap()))
    };
    let rfc = key([
        0x85, 0xd6, 0xbe, 0x78, 0x57, 0x55, 0x6d, 0x33, 0x7f, 0x44, 0x52, 0xfe, 0x42, 0xd5, 0x06, 0xa8, 0x01,
        0x03, 0x80, 0x8a, 0xfb, 0x0d, 0xb2, 0xfd, 0x4a, 0xbf, 0xf6, 0xaf, 0x41, 0x49, 0xf5, 0x1b,
    ]);
    let tag = poly1305(b"Cryptographic Forum Research Group", &rfc);
    assert_eq!(tag.to_be_bytes(), 0xa806_1dc1_3051_36c6_c22b_8baf_0c01_27a9_u128.to_le_bytes());

    let ones = [0xff; 16];
    assert_eq!(poly1305(&ones, &[2, 0, 0, 0]), 3);
    assert_eq!(
        poly1305(
            &{
                let mut m = [0; 16];
                m[0] = 2;
                m
            },
            &[2, 0, u64::MAX, u64::MAX]
        ),
        3
    );
    let sum: Vec<u8> = [&ones[..], &[0xf0], &ones[1..], &[0x11], &[0; 15]].concat();
    assert_eq!(poly1305(&sum, &[1, 0, 0, 0]), 5);
    let sum: Vec<u8> = [&ones[..], &[0xfb], &[0xfe; 15], &[1; 16]].concat();
    assert_eq!(poly1305(&sum, &[1, 0, 0, 0]), 0);
    let minus: Vec<u8> = [&[0xfd], &ones[1..]].concat();
    assert_eq!(poly1305(&minus, &[2, 0, 0, 0]), u128::MAX - 5);
}

/// Words at the ends of their range more often than in the middle.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(u64::MAX - 4), any::<u64>()]
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        vec(any::<u8>(), 0..700),
        vec(prop_oneof![Just(0xff), Just(0), Just(0xfb)], 0..700),
        (0..700_usize).prop_map(|len| vec![0xff; len]),
    ]
}

proptest! {
    #[test]
    fn both_ways_of_authenticating_agree_with_arithmetic_by_hand(
        packets in vec((text(), [word(), word(), word(), word()]), 1..=LANES),
    ) {
        if !super::Engine::Avx512.is_supported() {
            eprintln!("NOT TESTED: this CPU has no AVX-512 with IFMA and VBMI2");
            return Ok(());
        }
        let expected: Vec<Tag> = packets.iter().map(|(text, key)| tag(text, key)).collect();
        let texts: Vec<&[u8]> = packets.iter().map(|(text, _)| &text[..]).collect();
        let keys: Vec<MacKey> = packets.iter().map(|(_, key)| *key).collect();
        let mut abreast = vec![0; packets.len()];
        // SAFETY: supported.
        unsafe { poly::abreast(&texts, &keys, &mut abreast) };
        prop_assert_eq!(&abreast, &expected);
        // SAFETY: supported.
        let alone: Vec<Tag> = packets.iter().map(|(text, key)| unsafe { poly::alone(text, key) }).collect();
        prop_assert_eq!(&alone, &expected);
        let mut chosen = vec![0; packets.len()];
        // SAFETY: supported.
        unsafe { poly::tags(&texts, &keys, &mut chosen) };
        prop_assert_eq!(&chosen, &expected);
    }
}
