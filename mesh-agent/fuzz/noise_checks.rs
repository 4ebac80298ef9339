// What a fuzzer may do to the protocol core. Shared by the fuzz targets and the test that replays their corpora.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keyservice::{PresharedKey, PrivateKey};
use mesh_noise::message::{HEADER, OVERHEAD};
use mesh_noise::{
    CookieMaker, Datagram, Identity, Keypair, Remote, Window, classify, export, open_initiation,
};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// One end: it answers whatever arrives, as a device would, but keeps every session.
struct End {
    identity: Identity,
    remote: Remote,
    sessions: Vec<(Keypair, Window)>,
    cookies: CookieMaker,
    /// Initiations are answered with a cookie first.
    loaded: bool,
}

/// Two ends that know each other, and everything that was ever sent between them.
struct Wire {
    ends: [End; 2],
    sent: Vec<(usize, Vec<u8>)>,
    /// The packets sealed, and whether they arrived.
    packets: Vec<(Vec<u8>, bool)>,
    rng: StdRng,
    start: Instant,
    milliseconds: u64,
}

impl Wire {
    fn new(seed: u8) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.into());
        let keys = [PrivateKey::generate(&mut rng), PrivateKey::generate(&mut rng)];
        let psk = (seed & 1 == 1).then(|| PresharedKey::from_bytes([seed; 32]));
        let start = Instant::now();
        let ends = [(0, 1), (1, 0)].map(|(own, other): (usize, usize)| {
            let identity = Identity::new(&keys[own]);
            let remote = Remote::new(&identity, &keys[other].public(), psk.as_ref()).expect("a sound key");
            let cookies = CookieMaker::new(start, &mut rng);
            End { identity, remote, sessions: Vec::new(), cookies, loaded: false }
        });
        Self { ends, sent: Vec::new(), packets: Vec::new(), rng, start, milliseconds: 0 }
    }

    fn now(&self) -> (Instant, SystemTime) {
        let since = Duration::from_millis(self.milliseconds);
        (self.start + since, UNIX_EPOCH + Duration::from_secs(1_700_000_000) + since)
    }

    fn initiate(&mut self, end: usize) {
        let (now, wall) = self.now();
        let index = self.rng.random();
        let End { identity, remote, .. } = &mut self.ends[end];
        let message = remote.initiate(identity, index, now, wall, &mut self.rng).expect("a sound key");
        self.sent.push((1 - end, message.to_vec()));
    }

    fn seal(&mut self, end: usize, session: u8, body: &[u8]) {
        let sessions = &self.ends[end].sessions;
        let Some((keypair, _)) = sessions.get(usize::from(session) % sessions.len().max(1)) else { return };
        // A number of its own makes every packet another.
        let packet = [&(self.packets.len() as u32).to_le_bytes(), body].concat();
        let mut datagram = vec![0; packet.len() + OVERHEAD];
        datagram[HEADER..HEADER + packet.len()].copy_from_slice(&packet);
        let Some(counter) = keypair.sending.reserve(1) else { return };
        assert!(keypair.sending.seal(counter, &mut datagram));
        self.packets.push((packet, false));
        self.sent.push((1 - end, datagram));
    }

    fn deliver(&mut self, to: usize, mut datagram: Vec<u8>, genuine: bool) {
        let (now, _) = self.now();
        let from: SocketAddr = ([192, 0, 2, to as u8], 51820).into();
        let End { identity, remote, sessions, cookies, loaded } = &mut self.ends[to];
        match classify(&datagram) {
            Ok(Datagram::Initiation(message)) => {
                let known = identity.check_mac1(message);
                assert!(known || !genuine);
                if known && *loaded && !cookies.check_mac2(from, message) {
                    let reply = cookies.reply(identity, from, message, &mut self.rng);
                    self.sent.push((1 - to, reply.to_vec()));
                    return;
                }
                // Worked on in spite of a wrong mac1: what is behind it must stand by itself.
                let Ok(opened) = open_initiation(identity, message) else { return };
                let index = self.rng.random();
                if let Ok((response, keypair)) = remote.respond(identity, opened, index, now, &mut self.rng) {
                    self.sent.push((1 - to, response.to_vec()));
                    sessions.push((keypair, Window::default()));
                }
            }
            Ok(Datagram::Response(message)) => {
                if let Ok(keypair) = remote.accept_response(identity, message) {
                    sessions.push((keypair, Window::default()));
                }
            }
            Ok(Datagram::CookieReply(message)) => {
                let _ = remote.accept_cookie(message, now);
            }
            Ok(Datagram::Data { receiver, counter }) => {
                let session = sessions.iter_mut().find(|(keypair, _)| keypair.local_index == receiver);
                let Some((keypair, window)) = session else { return };
                let new = window.check(counter);
                let Ok(length) = keypair.receiving.open(counter, &mut datagram) else { return };
                assert_eq!(window.accept(counter), new);
                if !new {
                    return;
                }
                let packet = &datagram[HEADER..HEADER + length];
                let known = self.packets.iter_mut().find(|(sealed, _)| sealed == packet);
                let (_, arrived) = known.expect("nobody sealed this packet");
                assert!(!std::mem::replace(arrived, true), "a packet arrived twice");
            }
            Err(_) => {}
        }
    }

    /// A successor takes the last session over.
    fn hand_over(&mut self, end: usize) {
        let Some((keypair, window)) = self.ends[end].sessions.pop() else { return };
        let bytes = export::keypair(&keypair, &window);
        let taken = export::keypair_from(&bytes).expect("what was exported");
        self.ends[end].sessions.push(taken);
    }
}

/// Steps of `kind, which, length, bytes`: two ends talk, and what they say is delivered, changed, repeated, lost.
pub fn protocol(data: &[u8]) {
    let Some((seed, mut rest)) = data.split_first() else { return };
    let mut wire = Wire::new(*seed);
    for _ in 0..48 {
        let [kind, which, length, tail @ ..] = rest else { return };
        let (body, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        let end = usize::from(which & 1);
        let message =
            usize::from(*which).checked_rem(wire.sent.len()).and_then(|n| wire.sent.get(n)).cloned();
        match (kind % 8, message) {
            (0, _) => wire.initiate(end),
            (1, _) => wire.seal(end, *which >> 1, body),
            (2 | 3, Some((to, datagram))) => wire.deliver(to, datagram, true),
            (4, Some((to, mut datagram))) => {
                let original = datagram.clone();
                for (at, value) in body.iter().enumerate() {
                    let at = (usize::from(*length) * 7 + at * 13) % datagram.len();
                    datagram[at] ^= value;
                }
                wire.deliver(to, datagram.clone(), datagram == original);
            }
            (5, _) => wire.deliver(end, body.to_vec(), false),
            (6, _) => {
                wire.milliseconds += u64::from(*length) * 8;
                wire.ends[end].loaded = which & 2 == 2;
            }
            (7, _) => wire.hand_over(end),
            _ => {}
        }
    }
}

/// A session's bytes.
pub fn exported(data: &[u8]) {
    let Some((keypair, window)) = export::keypair_from(data) else { return };
    assert_eq!(export::keypair(&keypair, &window).as_slice(), data);
    let _ = keypair.sending.reserve(1);
}
