//! What must hold for any bytes. The fuzz targets call these, and so does the test that replays the corpora.

use std::net::SocketAddr;
use std::time::{Duration, Instant, UNIX_EPOCH};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_datapath::Device;
use mesh_datapath::ip_packet::IpPacket;
use mesh_datapath::offload::coalesce::{MAX_PACKETS, coalesce};
use mesh_datapath::offload::split::{SuperPacket, complete_checksum};
use mesh_datapath::offload::vnet_header::VnetHeader;
use mesh_datapath::outbox::Outbox;
use mesh_datapath::peer::Now;
use mesh_uapi::codec::{self, Lines, Request};
use mesh_uapi::{Op, PeerUpdate};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A UAPI connection: requests one after the other.
pub fn uapi_set(data: &[u8]) {
    let mut lines = Lines::new(data);
    for _ in 0..data.len() + 1 {
        match codec::read_request(&mut lines) {
            Ok(Some(Request::Set(ops))) => {
                let mut again = Vec::new();
                for request in codec::set::render_requests(&ops) {
                    match codec::read_request(&mut Lines::new(request.as_bytes())) {
                        Ok(Some(Request::Set(ops))) => again.extend(ops),
                        other => panic!("{other:?}"),
                    }
                }
                assert_eq!(format!("{again:?}"), format!("{ops:?}"));
                let device = Device::default();
                let _ = device.apply(&ops);
                device.view();
            }
            Ok(Some(Request::Get | Request::Stats)) => {}
            Ok(None) => return,
            Err(_) if lines.at_end() => return,
            Err(_) => {}
        }
    }
    panic!("more requests than bytes");
}

/// Replies of a server.
pub fn uapi_get(data: &[u8]) {
    if let Ok(device) = codec::get::read(&mut Lines::new(data)) {
        // The public half cannot be turned back, so the reply is rendered without its key.
        let preshared = |key: &PublicKey| {
            device.peers.get(key).filter(|p| p.has_preshared_key).map(|_| PresharedKey::from_bytes([1; 32]))
        };
        let text = codec::get::render(&device, None, preshared);
        let again = codec::get::read(&mut Lines::new(text.as_bytes())).expect("rendered");
        assert_eq!(again.peers, device.peers);
    }
    if let Ok(stats) = codec::stats::read(&mut Lines::new(data)) {
        let text = codec::stats::render(&stats);
        assert_eq!(codec::stats::read(&mut Lines::new(text.as_bytes())).expect("rendered"), stats);
    }
    let _ = codec::read_set_reply(&mut Lines::new(data));
}

/// A packet from the TUN.
pub fn ip_packet(data: &[u8]) {
    if let Some(packet) = IpPacket::parse(data) {
        assert!(packet.length <= data.len());
    }
    let world = World::new();
    let mut out = Outbox::default();
    world.device.handle_packet(world.now(0), data, &mut StdRng::seed_from_u64(1), &mut out);
    for (datagram, _) in out.network.iter() {
        assert!(datagram.len() >= 32);
    }
}

/// A large packet from the TUN, behind its header.
pub fn split(data: &[u8]) {
    let Some((header, packet)) = data.split_first_chunk() else { return };
    let header = VnetHeader::from_bytes(header);
    assert_eq!(header.to_bytes().as_slice(), &data[..VnetHeader::SIZE]);
    let mut copy = packet.to_vec();
    let _ = complete_checksum(&header, &mut copy);
    if let Some(large) = SuperPacket::parse(&header, packet) {
        let mut out = vec![0; 65_536];
        let lengths = (0..large.count()).map(|n| large.write(n, &mut out).expect("a piece that is counted"));
        assert!(lengths.fold(0, usize::max) <= packet.len());
    }
}

/// Packets for the TUN, two bytes of length before each: joined or not, the kernel ends up with the same ones.
pub fn joined(data: &[u8]) {
    let mut packets = Vec::new();
    let mut rest = data;
    while let [high, low, tail @ ..] = rest {
        let (packet, tail) = tail.split_at(tail.len().min(usize::from(u16::from_be_bytes([*high, *low]))));
        packets.push(packet);
        rest = tail;
    }
    let bursts = coalesce(packets.iter().copied(), true);
    let mut given: Vec<_> = bursts.iter().flat_map(|burst| burst.packets()).collect();
    for burst in &bursts {
        assert!(burst.count() <= MAX_PACKETS);
        let Some(head) = burst.head() else { continue };
        let mut packet = head.bytes().to_vec();
        burst.payloads().for_each(|payload| packet.extend_from_slice(payload));
        let large = SuperPacket::parse(&head.vnet, &packet).expect("a packet of ours");
        assert_eq!(large.count(), burst.count());
        let mut out = vec![0; 65_536];
        for (n, original) in burst.packets().enumerate() {
            let length = large.write(n, &mut out).expect("a piece that is counted");
            assert!(&out[..length] == original, "piece {n} differs");
        }
    }
    given.sort();
    packets.sort();
    assert!(given == packets);
}

const KEYS: [[u8; 32]; 3] = [[1; 32], [2; 32], [3; 32]];

/// A device with two peers, one of them with a session.
struct World {
    device: Device,
    peer: Tunn,
    start: Instant,
}

impl World {
    fn new() -> Self {
        let [own, first, second] = KEYS.map(|bytes| PrivateKey::from_bytes(&bytes));
        let device = Device::default();
        let mut ops = vec![Op::SetPrivateKey(own.clone())];
        for (key, prefix) in [(&first, "10.0.0.0/8"), (&second, "10.1.0.0/16")] {
            let add_allowed_ips = prefix.parse().into_iter().collect();
            let endpoint = Some(from(0));
            ops.push(Op::SetPeer(
                key.public(),
                PeerUpdate { endpoint, add_allowed_ips, ..Default::default() },
            ));
        }
        let start = Instant::now();
        device.apply(&ops).expect("sound configuration");
        let secret = x25519::StaticSecret::from(*first.expose());
        let public = x25519::PublicKey::from(*own.public().as_bytes());
        let peer = Tunn::new(secret, public, None, None, 5, None);
        let mut world = Self { device, peer, start };
        let mut buffer = [0; 256];
        if let TunnResult::WriteToNetwork(initiation) =
            world.peer.format_handshake_initiation(&mut buffer, false)
        {
            let initiation = initiation.to_vec();
            world.receive(0, &initiation);
        }
        world
    }

    fn now(&self, seconds: u64) -> Now {
        Now {
            instant: self.start + Duration::from_secs(seconds),
            wall: UNIX_EPOCH + Duration::from_secs(seconds),
        }
    }

    /// Lets the device have a datagram, and the peer have the answers.
    fn receive(&mut self, source: u8, datagram: &[u8]) {
        let mut out = Outbox::default();
        let (mut bytes, mut rng) = (datagram.to_vec(), StdRng::seed_from_u64(2));
        self.device.handle_datagram(self.now(0), from(source), &mut bytes, &mut rng, &mut out);
        for place in &out.packets {
            let packet = &bytes[place.clone()];
            let parsed = IpPacket::parse(packet).expect("only packets reach the TUN");
            assert_eq!(parsed.length, packet.len());
            assert!(parsed.source.to_string().starts_with("10."), "a spoofed source got through");
            assert!(!parsed.source.to_string().starts_with("10.1."), "another peer's source got through");
        }
        let mut buffer = [0; 256];
        for (answer, _) in out.network.iter() {
            if answer.len() <= 128
                && let TunnResult::WriteToNetwork(reply) = self.peer.decapsulate(None, answer, &mut buffer)
            {
                let mut reply = reply.to_vec();
                let mut ignored = Outbox::default();
                self.device.handle_datagram(self.now(0), from(source), &mut reply, &mut rng, &mut ignored);
            }
        }
    }
}

fn from(source: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, source], 51820))
}

/// Steps of `kind, source, length, bytes`: raw datagrams, sealed packets (whole, or with a byte flipped),
/// replays, and time.
pub fn datagram(data: &[u8]) {
    let mut world = World::new();
    let mut last = Vec::new();
    let mut rest = data;
    for _ in 0..64 {
        let [kind, source, length, tail @ ..] = rest else { return };
        let (body, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        match kind % 6 {
            0 => world.receive(*source, body),
            1 | 2 => {
                let mut buffer = vec![0; 512];
                if let TunnResult::WriteToNetwork(sealed) = world.peer.encapsulate(body, &mut buffer) {
                    last = sealed.to_vec();
                    let at = usize::from(*source) % last.len();
                    if kind % 6 == 2
                        && let Some(byte) = last.get_mut(at)
                    {
                        *byte ^= 0x80;
                    }
                    world.receive(*source, &last);
                }
            }
            3 => world.receive(*source, &last.clone()),
            4 => {
                let mut buffer = [0; 256];
                if let TunnResult::WriteToNetwork(initiation) =
                    world.peer.format_handshake_initiation(&mut buffer, true)
                {
                    let initiation = initiation.to_vec();
                    world.receive(*source, &initiation);
                }
            }
            _ => {
                let mut out = Outbox::default();
                let now = world.now(u64::from(*length) * 10);
                world.device.tick(now, &mut StdRng::seed_from_u64(1), &mut out);
            }
        }
    }
}
