//! From what the devices say to one row a node: while keys rotate a node is a peer on two devices, and what it sends and
//! receives is the sum of both.

use std::collections::BTreeMap;
use std::time::SystemTime;

use ipnet::IpNet;
use keyservice::PublicKey;
use mesh_api::status::{PeerState, PeerStatus};

use super::{Observed, peer};
use crate::desired::{RouteTarget, WireguardPeer};

/// The rows, by name.
pub(super) fn peers(seen: &Observed, now: SystemTime) -> Vec<PeerStatus> {
    let ways = ways(seen);
    let mut nodes: BTreeMap<&str, Vec<PeerStatus>> = BTreeMap::new();
    for (device, wish) in &seen.desired.wireguard {
        for (key, wanted) in &wish.peers {
            nodes.entry(&wanted.name).or_default().push(one(seen, device, (key, wanted), now));
        }
    }
    let merge = |rows: Vec<PeerStatus>| {
        let way = rows.first().and_then(|row| row.allowed_ips.iter().find_map(|prefix| ways.get(prefix)));
        merge(rows, way.copied())
    };
    nodes.into_values().filter_map(merge).collect()
}

/// The devices that routes lead into.
fn ways(seen: &Observed) -> BTreeMap<IpNet, &str> {
    let routes = seen.desired.routes.iter().filter_map(|route| match &route.target {
        RouteTarget::Device { name, .. } => Some((route.dst, name.as_str())),
        RouteTarget::Throw | RouteTarget::Unreachable => None,
    });
    routes.collect()
}

fn one(
    seen: &Observed,
    device: &str,
    (key, wanted): (&PublicKey, &WireguardPeer),
    now: SystemTime,
) -> PeerStatus {
    let actual = seen.devices.get(device);
    let running = actual.and_then(|seen| seen.device.as_ref()).and_then(|dev| dev.peers.get(key));
    let stats = actual.and_then(|seen| seen.stats.as_ref());
    // Who has stats leaves out peers that are all zeros.
    let counted = stats.map(|stats| stats.peers.get(key).cloned().unwrap_or_default());
    let id = (device.to_owned(), *key);
    let state = match running {
        Some(_) => seen.peers.get(&id).copied().unwrap_or(PeerState::Unknown),
        None => PeerState::Unknown,
    };
    let health = seen.health.get(&id).copied().unwrap_or_default();
    PeerStatus {
        name: wanted.name.clone(),
        public_key: key.to_string(),
        device: device.to_owned(),
        devices: vec![device.to_owned()],
        endpoint: running.and_then(|peer| peer.endpoint).or(wanted.endpoint),
        allowed_ips: wanted.allowed_ips.iter().copied().collect(),
        state,
        handshake_age_seconds: running.and_then(|peer| peer::handshake_age(now, peer)),
        rx_bytes: running.map_or(0, |peer| peer.rx_bytes),
        tx_bytes: running.map_or(0, |peer| peer.tx_bytes),
        rx_packets: counted.as_ref().map(|stats| stats.rx_packets),
        tx_packets: counted.as_ref().map(|stats| stats.tx_packets),
        handshakes: counted.as_ref().map(|stats| stats.handshakes),
        initiations: counted.as_ref().map(|stats| stats.initiations),
        drops: counted.unwrap_or_default().drops,
        heals: health.heals,
        silent_seconds: health.silent.map(|(time, _)| time.as_secs()),
        mtu: actual.map_or(0, |device| device.mtu),
    }
}

/// One row of several: the device that is sent through says how it is, all of them how much there was.
fn merge(rows: Vec<PeerStatus>, way: Option<&str>) -> Option<PeerStatus> {
    // Where no route tells, the newest handshake does.
    let rank =
        |row: &PeerStatus| (Some(row.device.as_str()) != way, row.handshake_age_seconds.unwrap_or(u64::MAX));
    let mut rows = rows;
    rows.sort_by_key(rank);
    let mut rows = rows.into_iter();
    let mut node = rows.next()?;
    for other in rows {
        let sum = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (None, None) => None,
            (a, b) => Some(a.unwrap_or(0).saturating_add(b.unwrap_or(0))),
        };
        node.rx_bytes = node.rx_bytes.saturating_add(other.rx_bytes);
        node.tx_bytes = node.tx_bytes.saturating_add(other.tx_bytes);
        node.rx_packets = sum(node.rx_packets, other.rx_packets);
        node.tx_packets = sum(node.tx_packets, other.tx_packets);
        node.handshakes = sum(node.handshakes, other.handshakes);
        node.initiations = sum(node.initiations, other.initiations);
        for (reason, count) in other.drops {
            *node.drops.entry(reason).or_default() += count;
        }
        node.heals += other.heals;
        let ages = node.handshake_age_seconds.into_iter().chain(other.handshake_age_seconds);
        node.handshake_age_seconds = ages.min();
        node.devices.extend(other.devices);
    }
    Some(node)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn row(device: &str, age: Option<u64>, bytes: u64) -> PeerStatus {
        let seen = Observed::default();
        let wanted = WireguardPeer {
            name: "b".into(),
            endpoint: None,
            allowed_ips: Default::default(),
            persistent_keepalive: 0,
            learned: false,
            reach: Default::default(),
            connect: false,
        };
        let key = PublicKey::from_bytes([1; 32]);
        PeerStatus {
            handshake_age_seconds: age,
            rx_bytes: bytes,
            tx_packets: Some(bytes),
            drops: [("replayed".to_owned(), bytes)].into(),
            state: if age.is_some() { PeerState::Up } else { PeerState::Idle },
            ..one(&seen, device, (&key, &wanted), SystemTime::UNIX_EPOCH)
        }
    }

    #[test]
    fn a_node_on_two_devices_is_one_row_with_the_sum_of_both() {
        let both = || vec![row("margay0", Some(9), 5), row("margay1", Some(90), 7)];
        let merged = merge(both(), Some("margay1")).unwrap();
        assert_eq!((merged.device.as_str(), merged.handshake_age_seconds), ("margay1", Some(9)));
        assert_eq!((merged.rx_bytes, merged.tx_packets, merged.drops["replayed"]), (12, Some(12), 12));
        assert_eq!((merged.rx_packets, merged.devices.len()), (None, 2));
        assert_eq!(merge(both(), None).unwrap().device, "margay0", "the newest handshake");
        assert!(merge(Vec::new(), None).is_none());
    }
}
