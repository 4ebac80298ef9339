//! What WG_CMD_GET_DEVICE tells, joined. A device with many peers comes in many messages, and a peer with many allowed IPs
//! goes on in the next one, with its key and the rest of them only.

use std::time::{Duration, UNIX_EPOCH};

use ipnet::IpNet;
use keyservice::PublicKey;
use mesh_uapi::{Device, Peer};
use netlink_packet_core::{DecodeError, NlaBuffer, NlasIterator, Parseable as _};
use netlink_packet_wireguard::{
    WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardPeerAttribute,
};

// include/uapi/linux/wireguard.h
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PRESHARED_KEY: u16 = 2;

/// Takes the attributes of one message. Secrets are stepped over, never copied.
pub(super) fn join(device: &mut Device, attributes: &[u8]) -> Result<(), DecodeError> {
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute?;
        match attribute.kind() {
            WGDEVICE_A_PRIVATE_KEY => {}
            WGDEVICE_A_PEERS => {
                for peer in NlasIterator::new(attribute.value()) {
                    join_peer(device, &peer?)?;
                }
            }
            _ => match WireguardAttribute::parse(&attribute)? {
                WireguardAttribute::PublicKey(key) => device.public_key = Some(PublicKey::from_bytes(key)),
                WireguardAttribute::ListenPort(port) => device.listen_port = port,
                WireguardAttribute::Fwmark(mark) => device.fwmark = mark,
                _ => {}
            },
        }
    }
    Ok(())
}

/// What one attribute says of a peer, until its key is known.
type Change = Box<dyn FnOnce(&mut Peer)>;

fn join_peer(device: &mut Device, attributes: &NlaBuffer<&[u8]>) -> Result<(), DecodeError> {
    let mut key = None;
    let mut changes: Vec<Change> = Vec::new();
    for attribute in NlasIterator::new(attributes.value()) {
        let attribute = attribute?;
        if attribute.kind() == WGPEER_A_PRESHARED_KEY {
            let some = attribute.value().iter().any(|byte| *byte != 0);
            changes.push(Box::new(move |peer| peer.has_preshared_key = some));
            continue;
        }
        match WireguardPeerAttribute::parse(&attribute)? {
            WireguardPeerAttribute::PublicKey(bytes) => key = Some(PublicKey::from_bytes(bytes)),
            WireguardPeerAttribute::Endpoint(at) => {
                changes.push(Box::new(move |peer| peer.endpoint = Some(at)));
            }
            WireguardPeerAttribute::PersistentKeepalive(seconds) => {
                changes.push(Box::new(move |peer| peer.persistent_keepalive = seconds));
            }
            WireguardPeerAttribute::LastHandshake(time) => {
                let since = u64::try_from(time.seconds).ok().zip(u32::try_from(time.nano_seconds).ok());
                let since = since.filter(|since| *since != (0, 0));
                let at = since.and_then(|(s, ns)| {
                    UNIX_EPOCH.checked_add(Duration::from_secs(s) + Duration::from_nanos(ns.into()))
                });
                changes.push(Box::new(move |peer| peer.last_handshake = at));
            }
            WireguardPeerAttribute::RxBytes(bytes) => {
                changes.push(Box::new(move |peer| peer.rx_bytes = bytes));
            }
            WireguardPeerAttribute::TxBytes(bytes) => {
                changes.push(Box::new(move |peer| peer.tx_bytes = bytes));
            }
            WireguardPeerAttribute::AllowedIps(prefixes) => changes
                .push(Box::new(move |peer| peer.allowed_ips.extend(prefixes.iter().filter_map(prefix)))),
            _ => {}
        }
    }
    let key = key.ok_or_else(|| DecodeError::from("a peer without a public key".to_owned()))?;
    let peer = device.peers.entry(key).or_default();
    changes.into_iter().for_each(|change| change(peer));
    Ok(())
}

fn prefix(allowed: &WireguardAllowedIp) -> Option<IpNet> {
    let (mut ip, mut length) = (None, None);
    for attribute in &allowed.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(address) => ip = Some(*address),
            WireguardAllowedIpAttr::Cidr(bits) => length = Some(*bits),
            _ => {}
        }
    }
    IpNet::new(ip?, length?).ok()
}
