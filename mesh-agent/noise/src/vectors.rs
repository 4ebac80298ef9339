//! Published vectors. That the parts are put together rightly, the other implementations show (`tests/boringtun.rs`).
#![allow(clippy::unwrap_used)]

use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::hash::{hash, kdf};
use crate::identity::dh;

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn array<const N: usize>(hex: &str) -> [u8; N] {
    bytes(hex).try_into().unwrap()
}

/// RFC 7693, appendix B.
#[test]
fn blake2s_of_abc() {
    let expected = array("508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982");
    assert_eq!(hash(&[b"abc"]), expected);
    assert_eq!(hash(&[b"a", b"", b"bc"]), expected);
}

/// The three vectors of wireguard-go's `kdf_test.go`. (An HMAC takes a short key as one with zeros behind it.)
#[test]
fn keys_are_derived_as_elsewhere() {
    for (key, input, outputs) in [
        (
            &b"test-key"[..],
            &b"test-input"[..],
            [
                "6f0e5ad38daba1bea8a0d213688736f19763239305e0f58aba697f9ffc41c633",
                "df1194df20802a4fe594cde27e92991c8cae66c366e8106aaa937a55fa371e8a",
                "fac6e2745a325f5dc5d11a5b165aad08b0ada28e7b4e666b7c077934a4d76c24",
            ],
        ),
        (
            b"wireguard",
            b"wireguard",
            [
                "491d43bbfdaa8750aaf535e334ecbfe5129967cd64635101c566d4caefda96e8",
                "1e71a379baefd8a79aa4662212fcafe19a23e2b609a3db7d6bcba8f560e3d25f",
                "31e1ae48bddfbe5de38f295e5452b1909a1b4e38e183926af3780b0c1e1f0160",
            ],
        ),
        (
            b"",
            b"",
            [
                "8387b46bf43eccfcf349552a095d8315c4055beb90208fb1be23b894bc2ed5d0",
                "58a0e5f6faefccf4807bff1f05fa8a9217945762040bcec2f4b4a62bdfe0e86e",
                "0ce6ea98ec548f8e281e93e32db65621c45eb18dc6f0a7ad94178610a2f7338e",
            ],
        ),
    ] {
        let mut padded = [0; 32];
        padded[..key.len()].copy_from_slice(key);
        let derived: [_; 3] = kdf(&padded, input);
        assert_eq!(derived.map(|key| *key), outputs.map(array));
        let [first] = kdf::<1>(&padded, input);
        assert_eq!(*first, array(outputs[0]));
    }
}

/// RFC 7748, 6.1; and the points of low order, which make every secret the same.
#[test]
fn curve25519_agrees_and_knows_points_of_low_order() {
    let alice = StaticSecret::from(array("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"));
    let bob = StaticSecret::from(array("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"));
    let public = PublicKey::from(&bob).to_bytes();
    assert_eq!(public, array("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"));
    let shared = array("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742");
    assert_eq!(*dh(&alice, &public).unwrap(), shared);
    assert_eq!(*dh(&bob, &PublicKey::from(&alice).to_bytes()).unwrap(), shared);
    for low in [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ] {
        assert!(dh(&alice, &array(low)).is_none(), "{low}");
    }
}

/// draft-irtf-cfrg-xchacha-03, A.3.1: what cookies are encrypted with.
#[test]
fn xchacha20poly1305_as_in_the_draft() {
    let mut text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it.".to_vec();
    let key: [u8; 32] = array("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f");
    let nonce: [u8; 24] = array("404142434445464748494a4b4c4d4e4f5051525354555657");
    let tag = XChaCha20Poly1305::new(&key.into())
        .encrypt_in_place_detached(&nonce.into(), &bytes("50515253c0c1c2c3c4c5c6c7"), &mut text)
        .unwrap();
    assert_eq!(text[..32], bytes("bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb"));
    assert_eq!(tag[..], bytes("c0875924c1c7987947deafd8780acf49"));
}
