//! From operations to WG_CMD_SET_DEVICE requests, in order. One attribute holds at most 64 KiB, so a large set of peers, or
//! of one peer's allowed IPs, takes several.

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;
use keyservice::PublicKey;
use mesh_uapi::{Op, PeerUpdate};
use netlink_packet_core::Nla;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAllowedIpFlags,
    WireguardAttribute, WireguardDeviceFlags, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use zeroize::Zeroize as _;

/// Most bytes of peers in a request: the kernel may have to find as much in one piece.
const REQUEST: usize = 32 << 10;
/// Bytes of one peer without its allowed IPs, at most.
const PEER: usize = 160;
/// Bytes of one allowed IP, with its flags: headers, family, an IPv6 address, length, flags.
const ALLOWED_IP: usize = 4 + 8 + 20 + 8 + 8;
/// Most allowed IPs of a peer in one request.
const ALLOWED_IPS: usize = (REQUEST - 2 * PEER) / ALLOWED_IP;

/// One step towards what was asked for.
#[derive(PartialEq)]
pub(super) enum Request {
    /// These attributes at once.
    Set(Vec<WireguardAttribute>),
    /// The UDP port, by itself: another socket may still have it.
    SetPort(u16),
    /// Single prefixes from a peer.
    RemoveAllowedIps(PublicKey, BTreeSet<IpNet>),
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Self::Set(attributes) = self {
            wipe(attributes);
        }
    }
}

/// For messages: no secret.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetPort(port) => write!(f, "set listen port {port}"),
            Self::RemoveAllowedIps(key, prefixes) => write!(f, "remove {prefixes:?} from peer {key}"),
            Self::Set(attributes) => match attributes.last() {
                Some(WireguardAttribute::PrivateKey(_)) => f.write_str("set private key"),
                Some(WireguardAttribute::Fwmark(mark)) => write!(f, "set fwmark {mark:#x}"),
                Some(WireguardAttribute::Peers(peers)) => match peers.as_slice() {
                    [peer] => write!(f, "set peer {}", key_of(peer)),
                    peers => write!(f, "set {} peers", peers.len()),
                },
                _ => f.write_str("set device"),
            },
        }
    }
}

fn key_of(peer: &WireguardPeer) -> String {
    let key = peer.0.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(PublicKey::from_bytes(*key).to_string()),
        _ => None,
    });
    key.unwrap_or_default()
}

/// Wipes the keys of a request.
pub(super) fn wipe(attributes: &mut [WireguardAttribute]) {
    for attribute in attributes {
        match attribute {
            WireguardAttribute::PrivateKey(key) => key.zeroize(),
            WireguardAttribute::Peers(peers) => {
                for attribute in peers.iter_mut().flat_map(|peer| &mut peer.0) {
                    if let WireguardPeerAttribute::PresharedKey(key) = attribute {
                        key.zeroize();
                    }
                }
            }
            _ => {}
        }
    }
}

/// The requests that carry these operations out on the device `name`.
pub(super) fn requests(name: &str, ops: Vec<Op>) -> Vec<Request> {
    let mut batch = Batch { name, requests: Vec::new(), peers: Vec::new(), bytes: 0 };
    for op in ops {
        match op {
            Op::SetPrivateKey(key) => batch.device(WireguardAttribute::PrivateKey(*key.expose())),
            Op::ClearPrivateKey => batch.device(WireguardAttribute::PrivateKey([0; 32])),
            Op::RemoveAllPeers => {
                batch.device(WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers));
            }
            Op::SetListenPort(port) => batch.push(Request::SetPort(port)),
            Op::SetFwmark(mark) => batch.device(WireguardAttribute::Fwmark(mark)),
            Op::SetPeer(key, update) => {
                // There is no command for a handshake.
                update.in_plain_uapi().iter().for_each(|update| batch.update(key, update));
            }
            Op::RemovePeer(key) => batch.peer(peer(key, WireguardPeerFlags::RemoveMe, None)),
        }
    }
    batch.flush();
    batch.requests
}

struct Batch<'a> {
    name: &'a str,
    requests: Vec<Request>,
    peers: Vec<WireguardPeer>,
    bytes: usize,
}

impl Batch<'_> {
    fn flush(&mut self) {
        if !self.peers.is_empty() {
            let peers = std::mem::take(&mut self.peers);
            self.requests.push(Request::Set(device(self.name, WireguardAttribute::Peers(peers))));
        }
        self.bytes = 0;
    }

    fn push(&mut self, request: Request) {
        self.flush();
        self.requests.push(request);
    }

    fn device(&mut self, attribute: WireguardAttribute) {
        self.push(Request::Set(device(self.name, attribute)));
    }

    fn peer(&mut self, peer: WireguardPeer) {
        let bytes = peer.value_len() + 4;
        if self.bytes + bytes > REQUEST {
            self.flush();
        }
        self.bytes += bytes;
        self.peers.push(peer);
    }

    fn update(&mut self, key: PublicKey, update: &PeerUpdate) {
        let mut flags = WireguardPeerFlags::empty();
        flags.set(WireguardPeerFlags::UpdateOnly, update.update_only);
        flags.set(WireguardPeerFlags::ReplaceAllowedIps, update.replace_allowed_ips);
        let prefixes: Vec<IpNet> = update.add_allowed_ips.iter().map(IpNet::trunc).collect();
        let (first, rest) = prefixes.split_at(prefixes.len().min(ALLOWED_IPS));
        let mut all = peer(key, flags, allowed_ips(first, false));
        // Within the capacity: growing would leave a copy of the key behind.
        all.0.extend(update.endpoint.map(WireguardPeerAttribute::Endpoint));
        all.0.extend(update.persistent_keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
        if let Some(key) = &update.preshared_key {
            all.0.push(WireguardPeerAttribute::PresharedKey(*key.expose()));
        }
        self.peer(all);
        for prefixes in rest.chunks(ALLOWED_IPS) {
            self.peer(peer(key, WireguardPeerFlags::UpdateOnly, allowed_ips(prefixes, false)));
        }
        if !update.remove_allowed_ips.is_empty() {
            self.push(Request::RemoveAllowedIps(
                key,
                update.remove_allowed_ips.iter().map(IpNet::trunc).collect(),
            ));
        }
    }
}

/// A request's attributes: always the name, and one more.
pub(super) fn device(name: &str, attribute: WireguardAttribute) -> Vec<WireguardAttribute> {
    vec![WireguardAttribute::IfName(name.to_owned()), attribute]
}

fn peer(
    key: PublicKey,
    flags: WireguardPeerFlags,
    allowed_ips: Option<WireguardPeerAttribute>,
) -> WireguardPeer {
    let mut attributes = Vec::with_capacity(6);
    attributes.push(WireguardPeerAttribute::PublicKey(*key.as_bytes()));
    attributes.extend((!flags.is_empty()).then_some(WireguardPeerAttribute::Flags(flags)));
    attributes.extend(allowed_ips);
    WireguardPeer(attributes)
}

fn allowed_ips(prefixes: &[IpNet], remove: bool) -> Option<WireguardPeerAttribute> {
    let one = |prefix: &IpNet| {
        let family = match prefix {
            IpNet::V4(_) => WireguardAddressFamily::Ipv4,
            IpNet::V6(_) => WireguardAddressFamily::Ipv6,
        };
        let mut attributes = vec![
            WireguardAllowedIpAttr::Family(family),
            WireguardAllowedIpAttr::IpAddr(prefix.addr()),
            WireguardAllowedIpAttr::Cidr(prefix.prefix_len()),
        ];
        attributes.extend(remove.then_some(WireguardAllowedIpAttr::Flags(WireguardAllowedIpFlags::RemoveMe)));
        WireguardAllowedIp(attributes)
    };
    let all: Vec<WireguardAllowedIp> = prefixes.iter().map(one).collect();
    (!all.is_empty()).then_some(WireguardPeerAttribute::AllowedIps(all))
}

/// Requests that take prefixes from a peer by WGALLOWEDIP_F_REMOVE_ME (Linux 6.16).
pub(super) fn removals(
    name: &str,
    key: PublicKey,
    prefixes: &BTreeSet<IpNet>,
) -> Vec<Vec<WireguardAttribute>> {
    let request = |prefixes: &[IpNet]| {
        let peer = peer(key, WireguardPeerFlags::UpdateOnly, allowed_ips(prefixes, true));
        device(name, WireguardAttribute::Peers(vec![peer]))
    };
    prefixes.iter().copied().collect::<Vec<_>>().chunks(ALLOWED_IPS).map(request).collect()
}

/// Requests that move prefixes to a peer that nobody is, and that peer away.
pub(super) fn moves(
    name: &str,
    nobody: PublicKey,
    prefixes: &BTreeSet<IpNet>,
) -> Vec<Vec<WireguardAttribute>> {
    let request = |prefixes: &[IpNet]| {
        let taker = peer(nobody, WireguardPeerFlags::empty(), allowed_ips(prefixes, false));
        let gone = peer(nobody, WireguardPeerFlags::RemoveMe, None);
        device(name, WireguardAttribute::Peers(vec![taker, gone]))
    };
    prefixes.iter().copied().collect::<Vec<_>>().chunks(ALLOWED_IPS).map(request).collect()
}
