//! Handshakes of two of our own cores: what is changed, replayed or crossed.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blake2::digest::consts::U16;
use blake2::digest::{Digest as _, Mac as _};
use blake2::{Blake2s256, Blake2sMac};
use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_noise::handshake::MIN_INTERVAL;
use mesh_noise::message::{COOKIE_REPLY, INITIATION, RESPONSE};
use mesh_noise::{
    CookieMaker, Datagram, HandshakeError, Identity, Keypair, Remote, classify, cookie, open_initiation,
};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// One end, and the one other it knows.
struct End {
    identity: Identity,
    remote: Remote,
    rng: StdRng,
}

fn ends(seed: u64, psk: bool) -> [End; 2] {
    let mut rng = StdRng::seed_from_u64(seed);
    let keys = [PrivateKey::generate(&mut rng), PrivateKey::generate(&mut rng)];
    let psk = psk.then(|| PresharedKey::from_bytes(rng.random()));
    [(0, 1), (1, 0)].map(|(own, other): (usize, usize)| {
        let identity = Identity::new(&keys[own]);
        let remote = Remote::new(&identity, &keys[other].public(), psk.as_ref()).unwrap();
        End { identity, remote, rng: StdRng::seed_from_u64(rng.random()) }
    })
}

impl End {
    fn initiate(&mut self, now: Instant, wall: SystemTime) -> [u8; INITIATION] {
        let index = self.rng.random();
        self.remote.initiate(&self.identity, index, now, wall, &mut self.rng).unwrap()
    }

    /// All that a device does before it answers, but for the mac.
    fn answer(
        &mut self,
        message: &[u8; INITIATION],
        now: Instant,
    ) -> Result<([u8; RESPONSE], Keypair), HandshakeError> {
        let opened = open_initiation(&self.identity, message)?;
        let index = self.rng.random();
        self.remote.respond(&self.identity, opened, index, now, &mut self.rng)
    }

    fn complete(&mut self, message: &[u8; RESPONSE]) -> Result<Keypair, HandshakeError> {
        self.remote.accept_response(&self.identity, message)
    }
}

/// Whether what one side seals the other opens, both ways.
fn same_session(a: &Keypair, b: &Keypair) -> bool {
    [(a, b), (b, a)].into_iter().all(|(from, to)| {
        let mut datagram = [7; 16 + 48 + 16];
        let counter = from.sending.reserve(1).unwrap();
        assert!(from.sending.seal(counter, &mut datagram));
        let Ok(Datagram::Data { receiver, counter: sent }) = classify(&datagram) else { return false };
        (receiver, sent) == (to.local_index, counter)
            && to.receiving.open(counter, &mut datagram) == Ok(48)
            && datagram[16..64] == [7; 48]
    })
}

/// Makes mac1 right again for `receiver`, as anyone can who knows its public key.
fn mend_mac1(message: &mut [u8], receiver: &PublicKey) {
    let key = Blake2s256::new().chain_update(b"mac1----").chain_update(receiver.as_bytes()).finalize();
    let (signed, macs) = message.split_at_mut(message.len() - 32);
    let mac = <Blake2sMac<U16> as blake2::digest::Mac>::new_from_slice(&key).unwrap();
    macs[..16].copy_from_slice(&mac.chain_update(signed).finalize().into_bytes());
}

/// The bytes that Noise does not cover: the sender's index, and the macs, which are checked by others.
fn is_free(at: usize, length: usize) -> bool {
    (4..8).contains(&at) || at >= length - 32
}

#[test]
fn every_byte_of_a_handshake_counts_even_when_its_mac_is_mended() {
    let now = Instant::now();
    let [mut a, mut b] = ends(1, true);
    let (key_a, key_b) = (a.identity.public(), b.identity.public());
    let initiation = a.initiate(now, SystemTime::now());
    for at in (4..INITIATION).filter(|at| !is_free(*at, INITIATION)) {
        let mut bad = initiation;
        bad[at] ^= 1 << (at % 8);
        assert!(!b.identity.check_mac1(&bad), "byte {at}");
        mend_mac1(&mut bad, &key_b);
        assert!(b.identity.check_mac1(&bad));
        assert_eq!(b.answer(&bad, now).unwrap_err(), HandshakeError::Auth, "byte {at}");
    }
    let (response, theirs) = b.answer(&initiation, now).expect("the real one still counts");
    for at in (4..RESPONSE).filter(|at| !is_free(*at, RESPONSE)) {
        let mut bad = response;
        bad[at] ^= 1 << (at % 8);
        mend_mac1(&mut bad, &key_a);
        assert!(a.identity.check_mac1(&bad));
        let expected = if at < 12 { HandshakeError::Unexpected } else { HandshakeError::Auth };
        assert_eq!(a.complete(&bad).unwrap_err(), expected, "byte {at}");
    }
    let ours = a.complete(&response).expect("the real one still counts");
    assert!(same_session(&ours, &theirs));
    assert_eq!(a.complete(&response).unwrap_err(), HandshakeError::Unexpected, "once");
}

#[test]
fn an_ephemeral_key_of_low_order_is_refused_on_both_sides() {
    let now = Instant::now();
    let [mut a, mut b] = ends(2, false);
    let initiation = a.initiate(now, SystemTime::now());
    let mut bad = initiation;
    bad[8..40].fill(0);
    assert_eq!(b.answer(&bad, now).unwrap_err(), HandshakeError::LowOrder);
    let (mut response, _) = b.answer(&initiation, now).unwrap();
    response[12..44].fill(0);
    assert_eq!(a.complete(&response).unwrap_err(), HandshakeError::LowOrder);
    let low = PublicKey::from_bytes([0; 32]);
    assert_eq!(Remote::new(&a.identity, &low, None).unwrap_err(), HandshakeError::LowOrder);
}

#[test]
fn a_handshake_is_for_the_peer_it_names() {
    let now = Instant::now();
    let [mut a, mut b] = ends(3, false);
    let [mut stranger, _] = ends(4, false);
    stranger.remote = Remote::new(&stranger.identity, &b.identity.public(), None).unwrap();
    let opened = open_initiation(&b.identity, &stranger.initiate(now, SystemTime::now())).unwrap();
    assert_eq!(opened.peer(), stranger.identity.public());
    let refused = b.remote.respond(&b.identity, opened, 1, now, &mut b.rng).map(drop);
    assert_eq!(refused, Err(HandshakeError::Auth));
    // And one to another device is read by nobody else.
    let message = a.initiate(now, SystemTime::now());
    assert!(!stranger.identity.check_mac1(&message));
    assert_eq!(open_initiation(&stranger.identity, &message).map(drop), Err(HandshakeError::Auth));
}

#[test]
fn initiations_count_in_order_of_their_making_even_when_the_clock_goes_back() {
    let [mut a, mut b] = ends(5, false);
    let (start, wall) = (Instant::now(), UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let mut old = Vec::new();
    for n in 0..50u32 {
        let now = start + MIN_INTERVAL * n;
        let message = a.initiate(now, wall - Duration::from_secs(u64::from(n) * 3600));
        assert!(b.answer(&message, now).is_ok(), "initiation {n}");
        old.push(message);
    }
    let later = start + Duration::from_secs(60);
    for message in &old {
        assert_eq!(b.answer(message, later).unwrap_err(), HandshakeError::Stale);
    }
}

#[test]
fn a_flood_of_one_peer_is_refused_and_forgets_nothing() {
    let [mut a, mut b] = ends(6, false);
    let (start, wall) = (Instant::now(), SystemTime::now());
    let (first, second) = (a.initiate(start, wall), a.initiate(start, wall));
    b.answer(&first, start).unwrap();
    let hasty = start + MIN_INTERVAL - Duration::from_millis(1);
    assert_eq!(b.answer(&second, hasty).unwrap_err(), HandshakeError::Flood);
    let (response, theirs) = b.answer(&second, start + MIN_INTERVAL).unwrap();
    assert!(same_session(&a.complete(&response).unwrap(), &theirs));
}

#[test]
fn handshakes_that_cross_give_two_sessions_that_work() {
    let now = Instant::now();
    let [mut a, mut b] = ends(7, true);
    let (from_a, from_b) = (a.initiate(now, SystemTime::now()), b.initiate(now, SystemTime::now()));
    let (to_b, a_second) = a.answer(&from_b, now).unwrap();
    let (to_a, b_second) = b.answer(&from_a, now).unwrap();
    let (a_first, b_first) = (a.complete(&to_a).unwrap(), b.complete(&to_b).unwrap());
    assert!(a_first.initiator && b_first.initiator && !a_second.initiator && !b_second.initiator);
    assert!(same_session(&a_first, &b_second) && same_session(&b_first, &a_second));
    assert!(!same_session(&a_first, &b_first));
}

#[test]
fn a_newer_initiation_takes_the_place_of_the_one_that_waits() {
    let now = Instant::now();
    let [mut a, mut b] = ends(8, false);
    let first = a.initiate(now, SystemTime::now());
    let (late, _) = b.answer(&first, now).unwrap();
    let second = a.initiate(now, SystemTime::now());
    let (response, theirs) = b.answer(&second, now + MIN_INTERVAL).unwrap();
    assert_eq!(a.complete(&late).unwrap_err(), HandshakeError::Unexpected);
    assert!(same_session(&a.complete(&response).unwrap(), &theirs));
    a.initiate(now, SystemTime::now());
    a.remote.forget_pending();
    assert_eq!(a.remote.pending_index(), None);
}

#[test]
fn preshared_keys_must_agree() {
    let now = Instant::now();
    let [mut a, mut b] = ends(9, true);
    b.remote.set_preshared_key(None);
    let message = a.initiate(now, SystemTime::now());
    let (response, _) = b.answer(&message, now).expect("the key comes in with the response only");
    assert_eq!(a.complete(&response).unwrap_err(), HandshakeError::Auth);
    // No key is the same as one of zeros, as everywhere.
    b.remote.set_preshared_key(Some(&PresharedKey::from_bytes([0; 32])));
    a.remote.set_preshared_key(None);
    let (response, theirs) = b.answer(&a.initiate(now, SystemTime::now()), now + MIN_INTERVAL).unwrap();
    assert!(same_session(&a.complete(&response).unwrap(), &theirs));
}

fn cookie_in(reply: &[u8]) -> &[u8; COOKIE_REPLY] {
    match classify(reply) {
        Ok(Datagram::CookieReply(reply)) => reply,
        other => panic!("no cookie reply but {other:?}"),
    }
}

#[test]
fn a_cookie_answers_the_last_message_and_lasts_two_minutes() {
    let now = Instant::now();
    let [mut a, mut b] = ends(10, false);
    let from: SocketAddr = "[2001:db8::7]:51820".parse().unwrap();
    let maker = CookieMaker::new(now, &mut b.rng);
    let old = a.initiate(now, SystemTime::now());
    let late = maker.reply(&b.identity, from, &old, &mut b.rng);
    let message = a.initiate(now, SystemTime::now());
    assert_eq!(message[INITIATION - 16..], [0; 16], "no cookie, no mac2");
    assert_eq!(a.remote.accept_cookie(cookie_in(&late), now), Err(HandshakeError::Auth));
    let reply = maker.reply(&b.identity, from, &message, &mut b.rng);
    for at in 8..COOKIE_REPLY {
        let mut bad = reply;
        bad[at] ^= 1 << (at % 8);
        assert_eq!(a.remote.accept_cookie(&bad, now), Err(HandshakeError::Auth), "byte {at}");
    }
    a.remote.accept_cookie(cookie_in(&reply), now).expect("the real one still counts");
    assert!(a.remote.pending_index().is_some());
    let with_cookie = a.initiate(now + cookie::LIFETIME - Duration::from_secs(1), SystemTime::now());
    assert!(maker.check_mac2(from, &with_cookie));
    for elsewhere in ["[2001:db8::8]:51820", "[2001:db8::7]:51821", "192.0.2.7:51820"] {
        assert!(!maker.check_mac2(elsewhere.parse().unwrap(), &with_cookie), "{elsewhere}");
    }
    let without = a.initiate(now + cookie::LIFETIME, SystemTime::now());
    assert_eq!(without[INITIATION - 16..], [0; 16]);
}

#[test]
fn a_responder_can_be_asked_for_a_cookie_too() {
    let now = Instant::now();
    let [mut a, mut b] = ends(11, false);
    let from: SocketAddr = "192.0.2.7:51820".parse().unwrap();
    let maker = CookieMaker::new(now, &mut a.rng);
    let (response, _) = b.answer(&a.initiate(now, SystemTime::now()), now).unwrap();
    assert!(a.identity.check_mac1(&response) && !maker.check_mac2(from, &response));
    let reply = maker.reply(&a.identity, from, &response, &mut a.rng);
    b.remote.accept_cookie(cookie_in(&reply), now).unwrap();
    let (response, theirs) = b.answer(&a.initiate(now, SystemTime::now()), now + MIN_INTERVAL).unwrap();
    assert!(maker.check_mac2(from, &response));
    assert!(same_session(&a.complete(&response).unwrap(), &theirs));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_two_ends_agree(seed in any::<u64>(), psk in any::<bool>(), rounds in 1u32..4) {
        let start = Instant::now();
        let [mut a, mut b] = ends(seed, psk);
        let mut before: Option<(Keypair, Keypair)> = None;
        for n in 0..rounds {
            let now = start + MIN_INTERVAL * (n + 1);
            let (one, other) = if seed >> n & 1 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
            let (response, theirs) = other.answer(&one.initiate(now, SystemTime::now()), now).unwrap();
            let ours = one.complete(&response).unwrap();
            prop_assert!(same_session(&ours, &theirs));
            if let Some((old, _)) = &before {
                prop_assert!(!same_session(old, &theirs));
            }
            before = Some((ours, theirs));
        }
    }

    #[test]
    fn any_body_with_a_right_mac_is_refused(body in prop::collection::vec(any::<u8>(), INITIATION)) {
        let now = Instant::now();
        let [mut a, mut b] = ends(12, false);
        let mut message: [u8; INITIATION] = body.clone().try_into().unwrap();
        message[..4].copy_from_slice(&[1, 0, 0, 0]);
        mend_mac1(&mut message, &b.identity.public());
        prop_assert!(b.identity.check_mac1(&message));
        prop_assert!(b.answer(&message, now).is_err());
        let initiation = a.initiate(now, SystemTime::now());
        let mut response: [u8; RESPONSE] = body[..RESPONSE].try_into().unwrap();
        response[..4].copy_from_slice(&[2, 0, 0, 0]);
        response[8..12].copy_from_slice(&initiation[4..8]);
        mend_mac1(&mut response, &a.identity.public());
        prop_assert!(a.complete(&response).is_err());
        let (response, theirs) = b.answer(&initiation, now).unwrap();
        prop_assert!(same_session(&a.complete(&response).unwrap(), &theirs));
    }
}
