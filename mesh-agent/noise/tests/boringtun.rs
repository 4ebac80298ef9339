//! Our protocol core against boringtun's, each in both roles.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_noise::message::{HEADER, OVERHEAD, TAG};
use mesh_noise::{
    CookieMaker, Datagram, HandshakeError, Identity, Keypair, OpenError, Remote, Window, classify, export,
    open_initiation,
};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const FROM: &str = "192.0.2.7:51820";

/// One of ours and one of theirs who know each other.
struct Pair {
    identity: Identity,
    remote: Remote,
    tunn: Tunn,
    tunn_public: PublicKey,
    rng: StdRng,
    now: Instant,
}

fn pair(seed: u64, psk: Option<[u8; 32]>, limit: u64) -> Pair {
    let mut rng = StdRng::seed_from_u64(seed);
    let (ours, theirs) = (PrivateKey::generate(&mut rng), PrivateKey::generate(&mut rng));
    let identity = Identity::new(&ours);
    let shared = psk.map(PresharedKey::from_bytes);
    let remote = Remote::new(&identity, &theirs.public(), shared.as_ref()).unwrap();
    let secret = x25519::StaticSecret::from(*theirs.expose());
    let public = x25519::PublicKey::from(&secret);
    let limiter = std::sync::Arc::new(RateLimiter::new(&public, limit));
    let peer = x25519::PublicKey::from(*ours.public().as_bytes());
    let tunn = Tunn::new(secret, peer, psk, None, rng.random::<u32>() >> 8, Some(limiter));
    Pair { identity, remote, tunn, tunn_public: theirs.public(), rng, now: Instant::now() }
}

fn reply(result: TunnResult<'_>) -> Vec<u8> {
    match result {
        TunnResult::WriteToNetwork(message) => message.to_vec(),
        other => panic!("no message but {other:?}"),
    }
}

impl Pair {
    fn initiation(&mut self) -> [u8; 148] {
        let index = self.rng.random();
        self.remote.initiate(&self.identity, index, self.now, SystemTime::now(), &mut self.rng).unwrap()
    }

    /// They answer our initiation.
    fn we_begin(&mut self) -> Keypair {
        let initiation = self.initiation();
        let mut buffer = [0; 256];
        let response = reply(self.tunn.decapsulate(None, &initiation, &mut buffer));
        let Ok(Datagram::Response(response)) = classify(&response) else { panic!("no response") };
        assert!(self.identity.check_mac1(response));
        self.remote.accept_response(&self.identity, response).unwrap()
    }

    /// We answer their initiation.
    fn they_begin(&mut self) -> Keypair {
        let mut buffer = [0; 256];
        let initiation = reply(self.tunn.format_handshake_initiation(&mut buffer, true));
        let Ok(Datagram::Initiation(initiation)) = classify(&initiation) else { panic!("no initiation") };
        assert!(self.identity.check_mac1(initiation));
        let opened = open_initiation(&self.identity, initiation).unwrap();
        assert_eq!(opened.peer(), self.tunn_public);
        let index = self.rng.random();
        let (response, keypair) =
            self.remote.respond(&self.identity, opened, index, self.now, &mut self.rng).unwrap();
        let keepalive = reply(self.tunn.decapsulate(None, &response, &mut buffer));
        let mut window = Window::default();
        assert_eq!(open(&keypair, &mut window, keepalive).unwrap(), b"");
        keypair
    }
}

fn packet(body: u8, length: usize) -> Vec<u8> {
    let total = (20 + length) as u16;
    let mut packet = vec![body; 20 + length];
    packet[..20].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet
}

fn seal(keypair: &Keypair, packet: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0; packet.len() + OVERHEAD];
    datagram[HEADER..HEADER + packet.len()].copy_from_slice(packet);
    let counter = keypair.sending.reserve(1).unwrap();
    assert!(keypair.sending.seal(counter, &mut datagram));
    datagram
}

fn open(keypair: &Keypair, window: &mut Window, mut datagram: Vec<u8>) -> Result<Vec<u8>, OpenError> {
    let Ok(Datagram::Data { receiver, counter }) = classify(&datagram) else { panic!("no data") };
    assert_eq!(receiver, keypair.local_index);
    assert!(window.check(counter));
    let length = keypair.receiving.open(counter, &mut datagram)?;
    assert!(window.accept(counter) && !window.check(counter));
    Ok(datagram[HEADER..HEADER + length].to_vec())
}

fn packets_go_both_ways(pair: &mut Pair, keypair: &Keypair) {
    let mut window = Window::default();
    for (n, length) in [0, 1, 63, 1400, 9000].into_iter().enumerate() {
        let packet = packet(n as u8, length);
        let mut buffer = vec![0; packet.len() + 256];
        match pair.tunn.decapsulate(None, &seal(keypair, &packet), &mut buffer) {
            TunnResult::WriteToTunnelV4(got, _) => assert_eq!(got, packet),
            other => panic!("not opened: {other:?}"),
        }
        let sealed = reply(pair.tunn.encapsulate(&packet, &mut buffer));
        assert_eq!(open(keypair, &mut window, sealed).unwrap(), packet);
    }
}

#[test]
fn sessions_agree_with_boringtun_whoever_begins_with_and_without_preshared_key() {
    for (seed, psk) in [(1, None), (2, Some([7; 32]))] {
        let mut pair = pair(seed, psk, u64::MAX);
        let keypair = pair.we_begin();
        assert!(keypair.initiator);
        packets_go_both_ways(&mut pair, &keypair);
        let keypair = pair.they_begin();
        assert!(!keypair.initiator);
        // They saw a keepalive's worth of counters already: the window starts anew, which is fine here.
        packets_go_both_ways(&mut pair, &keypair);
    }
}

#[test]
fn a_wrong_preshared_key_makes_no_session_and_a_late_one_does_not_end_one() {
    let mut pair = pair(3, Some([7; 32]), u64::MAX);
    let keypair = pair.we_begin();
    pair.remote.set_preshared_key(Some(&PresharedKey::from_bytes([8; 32])));
    packets_go_both_ways(&mut pair, &keypair);
    let initiation = pair.initiation();
    let mut buffer = [0; 256];
    let response = reply(pair.tunn.decapsulate(None, &initiation, &mut buffer));
    let Ok(Datagram::Response(response)) = classify(&response) else { panic!() };
    let refused = pair.remote.accept_response(&pair.identity, response).unwrap_err();
    assert_eq!(refused, HandshakeError::Auth);
    assert!(pair.remote.pending_index().is_some(), "the handshake waits on");
    pair.remote.set_preshared_key(Some(&PresharedKey::from_bytes([7; 32])));
    pair.remote.accept_response(&pair.identity, response).unwrap();
}

#[test]
fn their_cookie_lets_us_in_and_ours_lets_them() {
    // They are under load from the first message on.
    let mut pair = pair(4, None, 0);
    let from: SocketAddr = FROM.parse().unwrap();
    let mut buffer = [0; 256];
    let initiation = pair.initiation();
    let cookie = reply(pair.tunn.decapsulate(Some(from.ip()), &initiation, &mut buffer));
    let Ok(Datagram::CookieReply(cookie)) = classify(&cookie) else { panic!("no cookie") };
    let mut forged = *cookie;
    forged[40] ^= 1;
    assert_eq!(pair.remote.accept_cookie(&forged, pair.now), Err(HandshakeError::Auth));
    pair.remote.accept_cookie(cookie, pair.now).unwrap();
    assert_eq!(pair.remote.accept_cookie(cookie, pair.now), Err(HandshakeError::Unexpected));
    let initiation = pair.initiation();
    let response = reply(pair.tunn.decapsulate(Some(from.ip()), &initiation, &mut buffer));
    assert!(matches!(classify(&response), Ok(Datagram::Response(_))));
    // And the other way round.
    let maker = CookieMaker::new(pair.now, &mut pair.rng);
    let theirs = reply(pair.tunn.format_handshake_initiation(&mut buffer, true));
    assert!(!maker.check_mac2(from, &theirs));
    let cookie = maker.reply(&pair.identity, from, &theirs, &mut pair.rng);
    assert!(matches!(pair.tunn.decapsulate(None, &cookie, &mut buffer), TunnResult::Done));
    let theirs = reply(pair.tunn.format_handshake_initiation(&mut buffer, true));
    assert!(maker.check_mac2(from, &theirs));
    let other_port = SocketAddr::new(from.ip(), 1);
    assert!(!maker.check_mac2(other_port, &theirs), "a cookie is for an address and a port");
    let mut maker = maker;
    maker.rotate(pair.now + Duration::from_secs(121), &mut pair.rng);
    assert!(maker.check_mac2(from, &theirs), "the cookie made before the change is still good");
    maker.rotate(pair.now + Duration::from_secs(242), &mut pair.rng);
    assert!(!maker.check_mac2(from, &theirs));
}

#[test]
fn an_old_or_hasty_initiation_is_refused() {
    let mut pair = pair(5, None, u64::MAX);
    let mut buffer = [0; 256];
    let first: [u8; 148] =
        reply(pair.tunn.format_handshake_initiation(&mut buffer, true)).try_into().unwrap();
    let respond = |pair: &mut Pair, message: &[u8; 148], now| {
        let opened = open_initiation(&pair.identity, message).unwrap();
        pair.remote.respond(&pair.identity, opened, 1, now, &mut pair.rng).map(drop)
    };
    let now = pair.now;
    respond(&mut pair, &first, now).unwrap();
    let later = now + Duration::from_secs(1);
    assert_eq!(respond(&mut pair, &first, later), Err(HandshakeError::Stale));
    std::thread::sleep(Duration::from_millis(1));
    let second: [u8; 148] =
        reply(pair.tunn.format_handshake_initiation(&mut buffer, true)).try_into().unwrap();
    assert_eq!(respond(&mut pair, &second, now), Err(HandshakeError::Flood));
    respond(&mut pair, &second, later).unwrap();
}

#[test]
fn an_exported_session_goes_on_where_it_stopped() {
    let mut pair = pair(6, None, u64::MAX);
    let keypair = pair.we_begin();
    packets_go_both_ways(&mut pair, &keypair);
    let mut window = Window::default();
    assert!(window.accept(17));
    let bytes = export::keypair(&keypair, &window);
    let (resumed, mut restored) = export::keypair_from(&bytes).unwrap();
    assert_eq!(restored, window);
    assert_eq!((resumed.local_index, resumed.initiator), (keypair.local_index, true));
    assert_eq!(resumed.sending.used(), keypair.sending.used());
    assert!(!restored.accept(17));
    drop(keypair);
    packets_go_both_ways(&mut pair, &resumed);
    assert!(export::keypair_from(&bytes[1..]).is_none());
    // The timestamps keep a replay out.
    let mut buffer = [0; 256];
    let old: [u8; 148] = reply(pair.tunn.format_handshake_initiation(&mut buffer, true)).try_into().unwrap();
    let opened = open_initiation(&pair.identity, &old).unwrap();
    pair.remote.respond(&pair.identity, opened, 1, pair.now, &mut pair.rng).unwrap();
    let kept = export::timestamps(&pair.remote);
    let mut successor = Remote::new(&pair.identity, &pair.tunn_public, None).unwrap();
    export::restore_timestamps(&mut successor, &kept);
    let opened = open_initiation(&pair.identity, &old).unwrap();
    let refused = successor.respond(&pair.identity, opened, 1, pair.now, &mut pair.rng).map(drop);
    assert_eq!(refused, Err(HandshakeError::Stale));
}

#[test]
fn nothing_secret_is_printed() {
    let mut pair = pair(7, Some([0x5a; 32]), u64::MAX);
    let keypair = pair.we_begin();
    let secret = format!("{:?}", keypair.sending);
    let text = format!("{:?} {:?} {:?} {secret}", pair.identity, pair.remote, keypair);
    assert!(!text.contains("90, 90") && !text.contains("5a5a"), "{text}");
    assert!(text.len() < 600, "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_changed_message_is_refused_and_changes_nothing(seed in any::<u64>(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut pair = pair(seed, None, u64::MAX);
        let initiation = pair.initiation();
        let mut buffer = [0; 256];
        let response: [u8; 92] = reply(pair.tunn.decapsulate(None, &initiation, &mut buffer)).try_into().unwrap();
        let mut bad = response;
        bad[at.index(92)] ^= 1 << bit;
        let taken = matches!(classify(&bad), Ok(Datagram::Response(m)) if pair.identity.check_mac1(m)
            && pair.remote.accept_response(&pair.identity, m).is_ok());
        // mac2 is not looked at here.
        prop_assert_eq!(taken, at.index(92) >= 76);
        if !taken {
            pair.remote.accept_response(&pair.identity, &response).unwrap();
        }
        let theirs: [u8; 148] = reply(pair.tunn.format_handshake_initiation(&mut buffer, true)).try_into().unwrap();
        let mut bad = theirs;
        bad[at.index(132)] ^= 1 << bit;
        if let Ok(Datagram::Initiation(m)) = classify(&bad) {
            prop_assert!(!pair.identity.check_mac1(m));
        }
        let opened = open_initiation(&pair.identity, &theirs).unwrap();
        let (_, keypair) = pair.remote.respond(&pair.identity, opened, 9, pair.now, &mut pair.rng).unwrap();
        let mut sealed = seal(&keypair, &packet(1, 40));
        let Ok(Datagram::Data { counter, .. }) = classify(&sealed) else { panic!() };
        let length = sealed.len();
        let where_to = HEADER + at.index(length - HEADER);
        sealed[where_to] ^= 1 << bit;
        // The keys of the two directions differ, so this is refused in any case; the tag covers all bytes.
        prop_assert_eq!(keypair.receiving.open(counter, &mut sealed), Err(OpenError::Auth));
        prop_assert_eq!(keypair.receiving.open(counter, &mut sealed[..TAG]), Err(OpenError::Truncated));
    }

    #[test]
    fn any_bytes_are_told_apart_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 1u8..5) {
        let pair = pair(1, None, u64::MAX);
        let mut bytes = bytes;
        for (to, from) in bytes.iter_mut().zip([kind, 0, 0, 0]) {
            *to = from;
        }
        if let Ok(Datagram::Initiation(message)) = classify(&bytes) {
            prop_assert!(!pair.identity.check_mac1(message));
            prop_assert!(open_initiation(&pair.identity, message).is_err());
        }
        prop_assert!(export::keypair_from(&bytes).is_none());
    }
}
