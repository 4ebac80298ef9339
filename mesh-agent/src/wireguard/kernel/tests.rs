//! Requests against a naive kernel that takes them literally, and dumps in any number of parts.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, UNIX_EPOCH};

use keyservice::{PresharedKey, PrivateKey};
use mesh_uapi::{Peer, PeerUpdate};
use netlink_packet_core::{Emitable as _, Nla as _};
use netlink_packet_wireguard::{
    WireguardAllowedIp, WireguardAllowedIpAttr, WireguardDeviceFlags, WireguardPeer, WireguardPeerAttribute,
    WireguardPeerFlags, WireguardTimeSpec,
};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::wireguard::memory::carry_out;

/// What the kernel does with WG_CMD_SET_DEVICE (drivers/net/wireguard/netlink.c), as far as a device shows it.
fn naive_kernel(device: &mut Device, attributes: &[WireguardAttribute]) {
    for attribute in attributes {
        match attribute {
            WireguardAttribute::PrivateKey([0, rest @ ..]) if rest.iter().all(|byte| *byte == 0) => {
                device.public_key = None;
            }
            WireguardAttribute::PrivateKey(key) => {
                let key = PrivateKey::from_bytes(key).public();
                device.peers.remove(&key);
                device.public_key = Some(key);
            }
            WireguardAttribute::Flags(flags) if flags.contains(WireguardDeviceFlags::ReplacePeers) => {
                device.peers.clear();
            }
            WireguardAttribute::ListenPort(port) => device.listen_port = *port,
            WireguardAttribute::Fwmark(mark) => device.fwmark = *mark,
            WireguardAttribute::Peers(peers) => peers.iter().for_each(|peer| naive_peer(device, peer)),
            _ => {}
        }
    }
}

fn naive_peer(device: &mut Device, attributes: &WireguardPeer) {
    let (mut key, mut flags) = (None, WireguardPeerFlags::empty());
    for attribute in &attributes.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(bytes) => key = Some(PublicKey::from_bytes(*bytes)),
            WireguardPeerAttribute::Flags(found) => flags = *found,
            _ => {}
        }
    }
    let key = key.unwrap();
    if flags.contains(WireguardPeerFlags::RemoveMe) {
        device.peers.remove(&key);
        return;
    }
    let known = device.peers.contains_key(&key);
    if device.public_key == Some(key) || flags.contains(WireguardPeerFlags::UpdateOnly) && !known {
        return;
    }
    if flags.contains(WireguardPeerFlags::ReplaceAllowedIps) {
        device.peers.entry(key).or_default().allowed_ips.clear();
    }
    device.peers.entry(key).or_default();
    for attribute in &attributes.0 {
        if let WireguardPeerAttribute::AllowedIps(prefixes) = attribute {
            for (prefix, remove) in prefixes.iter().map(naive_prefix) {
                let mine = device.peers[&key].allowed_ips.contains(&prefix);
                if !remove || mine {
                    for peer in device.peers.values_mut() {
                        peer.allowed_ips.remove(&prefix);
                    }
                }
                if !remove {
                    device.peers.get_mut(&key).unwrap().allowed_ips.insert(prefix);
                }
            }
        }
        let peer = device.peers.get_mut(&key).unwrap();
        match attribute {
            WireguardPeerAttribute::PresharedKey(key) => peer.has_preshared_key = *key != [0; 32],
            WireguardPeerAttribute::Endpoint(at) => peer.endpoint = Some(*at),
            WireguardPeerAttribute::PersistentKeepalive(seconds) => peer.persistent_keepalive = *seconds,
            _ => {}
        }
    }
}

fn naive_prefix(allowed: &WireguardAllowedIp) -> (IpNet, bool) {
    let (mut ip, mut bits, mut remove) = (None, None, false);
    for attribute in &allowed.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(address) => ip = Some(*address),
            WireguardAllowedIpAttr::Cidr(length) => bits = Some(*length),
            WireguardAllowedIpAttr::Flags(_) => remove = true,
            _ => {}
        }
    }
    (IpNet::new(ip.unwrap(), bits.unwrap()).unwrap(), remove)
}

/// Carries requests out, removals by the flag or by the older way, as [`State`] does.
fn carry_out_requests(device: &mut Device, ops: &[Op], flag: bool) {
    for mut request in requests("margay0", ops.to_vec()) {
        let sets = match &mut request {
            Request::Set(attributes) => vec![std::mem::take(attributes)],
            Request::SetPort(port) => vec![set::device("margay0", WireguardAttribute::ListenPort(*port))],
            Request::RemoveAllowedIps(key, prefixes) if flag => set::removals("margay0", *key, prefixes),
            Request::RemoveAllowedIps(key, prefixes) => {
                let owned = device.peers.get(key).map(|peer| &peer.allowed_ips & &*prefixes);
                set::moves("margay0", PublicKey::from_bytes([0xee; 32]), &owned.unwrap_or_default())
            }
        };
        for attributes in sets {
            assert_eq!(attributes[0], WireguardAttribute::IfName("margay0".to_owned()));
            for attribute in &attributes {
                assert!(attribute.value_len() < 1 << 16, "an attribute's length has 16 bits");
            }
            naive_kernel(device, &attributes);
        }
    }
}

fn key(n: u8) -> PublicKey {
    PrivateKey::from_bytes(&[n; 32]).public()
}

fn prefixes() -> impl Strategy<Value = BTreeSet<IpNet>> {
    let four = (0..4u8, 24..=32u8).prop_map(|(n, bits)| IpNet::new([10, n, 0, 0].into(), bits).unwrap());
    let six = (0..4u16).prop_map(|n| IpNet::new([0xfd00, n, 0, 0, 0, 0, 0, 0].into(), 64).unwrap());
    btree_set(prop_oneof![four, six], 0..6)
}

fn update() -> impl Strategy<Value = PeerUpdate> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let fields = (option::of(0..2u8), option::of(1..9u16), option::of(0..30u16));
    (flags, fields, prefixes(), prefixes()).prop_map(|(flags, fields, add, remove)| PeerUpdate {
        update_only: flags.0,
        replace_allowed_ips: flags.1,
        initiate: flags.2,
        preshared_key: fields.0.map(|n| PresharedKey::from_bytes([n; 32])),
        endpoint: fields.1.map(|port| ([192, 0, 2, 1], port).into()),
        persistent_keepalive: fields.2,
        add_allowed_ips: add,
        remove_allowed_ips: remove,
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (1..5u8, update()).prop_map(|(n, update)| Op::SetPeer(key(n), update)),
        2 => (1..5u8).prop_map(|n| Op::RemovePeer(key(n))),
        1 => (1..5u8).prop_map(|n| Op::SetPrivateKey(PrivateKey::from_bytes(&[n; 32]))),
        1 => Just(Op::ClearPrivateKey),
        1 => Just(Op::RemoveAllPeers),
        1 => any::<u16>().prop_map(Op::SetListenPort),
        1 => any::<u32>().prop_map(Op::SetFwmark),
    ]
}

/// In plain UAPI, which is all that the kernel knows.
fn plain(ops: &[Op]) -> Vec<Op> {
    let plain = |op: &Op| match op {
        Op::SetPeer(key, update) => {
            update.in_plain_uapi().into_iter().map(|update| Op::SetPeer(*key, update)).collect()
        }
        other => vec![other.clone()],
    };
    ops.iter().flat_map(plain).collect()
}

proptest! {
    #[test]
    fn requests_do_what_the_operations_say(ops in vec(op(), 0..12), flag in any::<bool>()) {
        let (mut wanted, mut device) = (Device::default(), Device::default());
        plain(&ops).iter().for_each(|op| carry_out(&mut wanted, op));
        carry_out_requests(&mut device, &ops, flag);
        prop_assert_eq!(device, wanted);
    }

    #[test]
    fn a_dump_is_joined_whatever_its_parts(
        peers in vec((option::of(1..9u16), prefixes(), any::<bool>(), any::<u32>()), 0..5),
        cut in 1..4usize,
    ) {
        let mut device = Device { public_key: Some(key(9)), listen_port: 7, fwmark: 3, ..Device::default() };
        let mut parts = Vec::new();
        for (n, (port, allowed_ips, psk, bytes)) in peers.iter().enumerate() {
            let key = key(n as u8 + 1);
            let handshake = (bytes % 3 > 0).then(|| UNIX_EPOCH + Duration::new(u64::from(*bytes), 5));
            let peer = Peer {
                has_preshared_key: *psk,
                endpoint: port.map(|port| ([192, 0, 2, 1], port).into()),
                allowed_ips: allowed_ips.clone(),
                persistent_keepalive: 25,
                last_handshake: handshake,
                rx_bytes: u64::from(*bytes),
                tx_bytes: 5,
            };
            parts.extend(dumped(key, &peer, cut));
            device.peers.insert(key, peer);
        }
        let first = vec![
            WireguardAttribute::ListenPort(7),
            WireguardAttribute::Fwmark(3),
            WireguardAttribute::IfIndex(4),
            WireguardAttribute::IfName("margay0".to_owned()),
            WireguardAttribute::PrivateKey([0x55; 32]),
            WireguardAttribute::PublicKey(*key(9).as_bytes()),
        ];
        let mut joined = Device::default();
        dump::join(&mut joined, &bytes(&first)).unwrap();
        for parts in parts.chunks(cut) {
            dump::join(&mut joined, &bytes(&[WireguardAttribute::Peers(parts.to_vec())])).unwrap();
        }
        prop_assert_eq!(joined, device);
    }
}

fn bytes(attributes: &[WireguardAttribute]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

/// A peer as the kernel tells it, at most `most` allowed IPs at once: what goes on has the key only.
fn dumped(key: PublicKey, peer: &Peer, most: usize) -> Vec<WireguardPeer> {
    let allowed = |prefix: &IpNet| {
        WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Cidr(prefix.prefix_len()),
            WireguardAllowedIpAttr::IpAddr(prefix.addr()),
        ])
    };
    let allowed: Vec<_> = peer.allowed_ips.iter().map(allowed).collect();
    let since = peer.last_handshake.map(|at| at.duration_since(UNIX_EPOCH).unwrap()).unwrap_or_default();
    let time =
        WireguardTimeSpec { seconds: since.as_secs() as i64, nano_seconds: since.subsec_nanos().into() };
    let mut first = vec![
        WireguardPeerAttribute::PublicKey(*key.as_bytes()),
        WireguardPeerAttribute::PresharedKey([u8::from(peer.has_preshared_key); 32]),
        WireguardPeerAttribute::LastHandshake(time),
        WireguardPeerAttribute::PersistentKeepalive(peer.persistent_keepalive),
        WireguardPeerAttribute::TxBytes(peer.tx_bytes),
        WireguardPeerAttribute::RxBytes(peer.rx_bytes),
    ];
    first.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
    let mut parts = vec![WireguardPeer(first)];
    for allowed in allowed.chunks(most) {
        parts.push(WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(*key.as_bytes()),
            WireguardPeerAttribute::AllowedIps(allowed.to_vec()),
        ]));
    }
    parts
}

#[test]
fn a_large_set_is_cut_and_nothing_of_it_lost() {
    let many = |peer: u16, count: u16| -> BTreeSet<IpNet> {
        (0..count).map(|n| IpNet::new([0xfd00, peer, n, 0, 0, 0, 0, 0].into(), 48).unwrap().trunc()).collect()
    };
    let mut ops: Vec<Op> = (1..200u8)
        .map(|n| {
            Op::SetPeer(key(n), PeerUpdate { add_allowed_ips: many(n.into(), 9), ..PeerUpdate::default() })
        })
        .collect();
    let large = PeerUpdate { add_allowed_ips: many(0, 5000), ..PeerUpdate::default() };
    ops.push(Op::SetPeer(key(200), large));
    let (mut wanted, mut device) = (Device::default(), Device::default());
    ops.iter().for_each(|op| carry_out(&mut wanted, op));
    carry_out_requests(&mut device, &ops, false);
    assert_eq!(device, wanted);
    let count = requests("margay0", ops).len();
    assert!((6..40).contains(&count), "{count} requests");
}

#[test]
fn a_request_shows_no_key() {
    let secret = PrivateKey::from_bytes(&[7; 32]);
    let update =
        PeerUpdate { preshared_key: Some(PresharedKey::from_bytes([9; 32])), ..PeerUpdate::default() };
    let all = requests("margay0", vec![Op::SetPrivateKey(secret), Op::SetPeer(key(1), update)]);
    let said: Vec<String> = all.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["set private key".to_owned(), format!("set peer {}", key(1))]);
}
