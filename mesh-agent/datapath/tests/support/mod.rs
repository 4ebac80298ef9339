//! Devices without sockets, and the wire between them.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use keyservice::{PrivateKey, PublicKey};
use mesh_datapath::Device;
use mesh_datapath::counters::Drop;
use mesh_datapath::outbox::Outbox;
use mesh_datapath::peer::Now;
use mesh_uapi::{Op, PeerUpdate};
use rand::SeedableRng;
use rand::rngs::StdRng;

pub type Datagram = (SocketAddr, Vec<u8>);

/// A device and where the wire has it.
pub struct Node {
    pub device: Device,
    pub key: PrivateKey,
    pub at: SocketAddr,
}

pub fn now() -> Now {
    Now { instant: Instant::now(), wall: SystemTime::now() }
}

pub fn later(now: Now, by: Duration) -> Now {
    Now { instant: now.instant + by, wall: now.wall + by }
}

pub fn rng() -> StdRng {
    StdRng::seed_from_u64(1)
}

pub fn key(seed: u8) -> PrivateKey {
    PrivateKey::from_bytes(&[seed; 32])
}

pub fn node(seed: u8) -> Node {
    let node = Node { device: Device::default(), key: key(seed), at: ([192, 0, 2, seed], 51820).into() };
    node.apply(&[Op::SetPrivateKey(node.key.clone())]);
    node
}

/// Two nodes that know each other; node N is 10.0.0.N.
pub fn pair() -> (Node, Node) {
    let (a, b) = (node(1), node(2));
    a.befriend(&b, &["10.0.0.2/32"]);
    b.befriend(&a, &["10.0.0.1/32"]);
    (a, b)
}

/// A pair with a session that has carried a packet each way.
pub fn connected() -> (Node, Node) {
    let (a, b) = pair();
    assert_eq!(run(&[&a, &b], a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))).len(), 1);
    assert_eq!(run(&[&a, &b], b.send(now(), &packet("10.0.0.2", "10.0.0.1", 84))).len(), 1);
    (a, b)
}

impl Node {
    pub fn public(&self) -> PublicKey {
        self.key.public()
    }

    pub fn apply(&self, ops: &[Op]) {
        self.device.apply(ops).unwrap();
    }

    pub fn update(&self, peer: &Node, update: PeerUpdate) {
        self.apply(&[Op::SetPeer(peer.public(), update)]);
    }

    pub fn befriend(&self, peer: &Node, prefixes: &[&str]) {
        let add_allowed_ips = prefixes.iter().map(|p| p.parse().unwrap()).collect();
        self.update(peer, PeerUpdate { endpoint: Some(peer.at), add_allowed_ips, ..Default::default() });
    }

    /// What goes onto the wire when the TUN has this packet.
    pub fn send(&self, now: Now, packet: &[u8]) -> Vec<Datagram> {
        let mut out = Outbox::default();
        self.device.handle_packet(now, packet, &mut rand::rng(), &mut out);
        assert!(out.packets.is_empty());
        datagrams(&out)
    }

    /// What goes onto the wire and into the TUN when this datagram arrives.
    pub fn receive(&self, now: Now, from: SocketAddr, datagram: &[u8]) -> (Vec<Datagram>, Vec<Vec<u8>>) {
        let mut out = Outbox::default();
        let mut buffer = datagram.to_vec();
        self.device.handle_datagram(now, from, &mut buffer, &mut rand::rng(), &mut out);
        (datagrams(&out), out.packets.iter().map(|place| buffer[place.clone()].to_vec()).collect())
    }

    pub fn tick(&self, now: Now) -> Vec<Datagram> {
        let mut out = Outbox::default();
        self.device.tick(now, &mut rng(), &mut out);
        datagrams(&out)
    }

    pub fn drops(&self, reason: Drop) -> u64 {
        self.device.drops.get(reason)
    }

    pub fn endpoint_of(&self, peer: &Node) -> Option<SocketAddr> {
        self.device.view().0.peers[&peer.public()].endpoint
    }

    pub fn view_of(&self, peer: &Node) -> mesh_uapi::Peer {
        self.device.view().0.peers[&peer.public()].clone()
    }
}

fn datagrams(out: &Outbox) -> Vec<Datagram> {
    out.network.iter().map(|(bytes, to)| (*to, bytes.to_vec())).collect()
}

/// Carries datagrams between the nodes until all is quiet; returns the packets that came out of a TUN. The
/// first node with another address than the receiver's is the sender, so this is for two.
pub fn run(nodes: &[&Node], first: Vec<Datagram>) -> Vec<Vec<u8>> {
    let mut wire: VecDeque<Datagram> = first.into();
    let mut packets = Vec::new();
    for _ in 0..10_000 {
        let Some((to, bytes)) = wire.pop_front() else { return packets };
        let Some(node) = nodes.iter().find(|n| n.at == to) else { continue };
        let from = nodes.iter().find(|n| n.at != to).unwrap().at;
        let (answers, received) = node.receive(now(), from, &bytes);
        wire.extend(answers);
        packets.extend(received);
    }
    panic!("the wire never falls quiet");
}

/// An IP packet of `length` bytes.
pub fn packet(from: &str, to: &str, length: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; length];
    let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&(length as u16 - 40).to_be_bytes());
            packet[8..24].copy_from_slice(&from.octets());
            packet[24..40].copy_from_slice(&to.octets());
        }
        _ => panic!("two families"),
    }
    packet
}

/// A tunnel of the bare protocol core, which does as it is told.
pub fn bare(own: &PrivateKey, peer: &PublicKey) -> Tunn {
    let secret = x25519::StaticSecret::from(*own.expose());
    Tunn::new(secret, x25519::PublicKey::from(*peer.as_bytes()), None, None, 7, None)
}

/// A new handshake initiation of it.
pub fn initiation(tunn: &mut Tunn) -> Vec<u8> {
    let mut buffer = [0; 148];
    match tunn.format_handshake_initiation(&mut buffer, true) {
        TunnResult::WriteToNetwork(message) => message.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// What it says to a datagram.
pub fn answer(tunn: &mut Tunn, datagram: &[u8]) -> Option<Vec<u8>> {
    let mut buffer = [0; 2048];
    match tunn.decapsulate(None, datagram, &mut buffer) {
        TunnResult::WriteToNetwork(message) => Some(message.to_vec()),
        _ => None,
    }
}

/// A sealed packet of it.
pub fn sealed(tunn: &mut Tunn, plaintext: &[u8]) -> Vec<u8> {
    let mut buffer = [0; 4096];
    match tunn.encapsulate(plaintext, &mut buffer) {
        TunnResult::WriteToNetwork(message) => message.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// Brings a bare tunnel up with a node that has it as a peer.
pub fn join(tunn: &mut Tunn, node: &Node, from: SocketAddr) {
    let (response, _) = node.receive(now(), from, &initiation(tunn));
    let keepalive = answer(tunn, &response[0].1).unwrap();
    node.receive(now(), from, &keepalive);
}
