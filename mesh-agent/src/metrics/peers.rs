//! The WireGuard devices and their peers. Per device: while keys rotate a node is a peer on two.
//!
//! At 1,000 peers this is some ten thousand lines: a peer has a fixed number of them, and one for each reason for
//! which something of it was dropped.

use std::time::UNIX_EPOCH;

use keyservice::PublicKey;
use mesh_api::status::PeerState;
use mesh_uapi::{Device, Offload, Peer, PeerStats};

use super::{Labels, Page, count, tally};
use crate::status::{DeviceSeen, KERNEL, Observed, sentence_of};

/// One peer of one device.
struct Row<'a> {
    iface: &'a str,
    device: &'a Device,
    seen: &'a DeviceSeen,
    key: &'a PublicKey,
    peer: &'a Peer,
}

fn rows(seen: &Observed) -> impl Iterator<Item = Row<'_>> {
    let devices = seen.devices.iter().filter_map(|(iface, seen)| Some((iface, seen, seen.device.as_ref()?)));
    devices.flat_map(|(iface, seen, device)| {
        device.peers.iter().map(move |(key, peer)| Row { iface, device, seen, key, peer })
    })
}

fn own(seen: &Observed, iface: &str, device: &Device) -> Labels {
    vec![
        ("hostname", seen.snapshot.local.node_name.clone()),
        ("public_key", device.public_key.map(|key| key.to_string()).unwrap_or_default()),
        ("iface", iface.to_owned()),
        ("listen_port", device.listen_port.to_string()),
    ]
}

impl Row<'_> {
    /// Calico's labels.
    fn calico(&self, seen: &Observed) -> Labels {
        let mut labels = own(seen, self.iface, self.device);
        let endpoint = self.peer.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default();
        labels.extend([("peer_key", self.key.to_string()), ("peer_endpoint", endpoint)]);
        labels
    }

    /// Ours: who it is, and nothing that changes.
    fn ours(&self, seen: &Observed) -> Labels {
        let wish = seen.desired.wireguard.get(self.iface).and_then(|device| device.peers.get(self.key));
        vec![
            ("iface", self.iface.to_owned()),
            ("peer", wish.map(|peer| peer.name.clone()).unwrap_or_default()),
            ("peer_key", self.key.to_string()),
        ]
    }
}

pub(super) fn peers(page: &mut Page, seen: &Observed) {
    let of = |value: fn(&Peer) -> u64| rows(seen).map(move |row| (row.calico(seen), count(value(row.peer))));
    page.gauges("wireguard_bytes_sent", "Bytes sent to a peer", of(|peer| peer.tx_bytes));
    page.gauges("wireguard_bytes_rcvd", "Bytes received from a peer", of(|peer| peer.rx_bytes));
    let handshake = |peer: &Peer| {
        let at = peer.last_handshake.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        at.map_or(0, |at| at.as_secs())
    };
    page.gauges(
        "wireguard_latest_handshake_seconds",
        "Unix time of the last handshake with a peer, 0 for never",
        of(handshake),
    );
    let counted = |value: fn(&PeerStats) -> u64| {
        rows(seen).filter_map(move |row| {
            let stats = row.seen.stats.as_ref()?;
            Some((row.ours(seen), stats.peers.get(row.key).map_or(0, value)))
        })
    };
    let packets = "Datagrams of a peer: data, keepalives and handshakes";
    page.counters("margay_peer_packets_sent", packets, counted(|stats| stats.tx_packets));
    page.counters("margay_peer_packets_rcvd", packets, counted(|stats| stats.rx_packets));
    page.counters("margay_peer_handshakes", "Handshakes completed", counted(|stats| stats.handshakes));
    page.counters(
        "margay_peer_initiations",
        "Handshakes begun, retries included",
        counted(|s| s.initiations),
    );
    let drops = rows(seen)
        .filter_map(|row| Some((row.ours(seen), &row.seen.stats.as_ref()?.peers.get(row.key)?.drops)));
    let drops = drops.flat_map(|(labels, drops)| {
        drops.iter().map(move |(reason, n)| {
            let mut labels = labels.clone();
            labels.push(("reason", reason.clone()));
            (labels, *n)
        })
    });
    page.counters("margay_peer_drops", "Packets of or for a peer that were dropped", drops);
    let health = |row: &Row<'_>| seen.health.get(&(row.iface.to_owned(), *row.key)).copied();
    let heals = rows(seen).map(|row| (row.ours(seen), health(&row).map_or(0, |health| health.heals)));
    page.counters("margay_peer_heals", "Attempts to reach a peer afresh that did not answer", heals);
    let silent =
        rows(seen).filter_map(|row| Some((row.ours(seen), count(health(&row)?.silent?.0.as_secs()))));
    page.gauges("margay_peer_silent_seconds", "For how long a peer that is sent to has not answered", silent);
    let states = seen.peers.values().map(|state| match state {
        PeerState::Up => "up",
        PeerState::Idle => "idle",
        PeerState::Down => "down",
        PeerState::Unknown => "unknown",
    });
    page.gauges("margay_peers", "Peers by state", tally("state", states).into_iter());
}

pub(super) fn devices(page: &mut Page, seen: &Observed) {
    let meta = seen
        .devices
        .iter()
        .filter_map(|(iface, device)| Some((own(seen, iface, device.device.as_ref()?), 1)));
    page.gauges("wireguard_meta", "A WireGuard device", meta);
    let counted = || seen.devices.iter().filter_map(|(iface, seen)| Some((iface, seen.stats.as_ref()?)));
    let info = counted().map(|(iface, stats)| {
        let labels = vec![
            ("iface", iface.clone()),
            ("version", stats.version.clone()),
            ("core", stats.core.clone()),
            ("crypto", stats.crypto.clone()),
        ];
        (labels, 1)
    });
    let kernel = seen.devices.iter().filter_map(|(iface, seen)| {
        let labels = vec![
            ("iface", iface.clone()),
            ("version", seen.kernel.clone()?),
            ("core", KERNEL.to_owned()),
            ("crypto", String::new()),
        ];
        Some((labels, 1))
    });
    page.gauges("margay_datapath_info", "What a device is made of", info.chain(kernel));
    let offloads = counted().flat_map(|(iface, stats)| {
        stats.offloads.iter().map(move |(name, state)| {
            let labels =
                vec![("iface", iface.clone()), ("offload", name.clone()), ("state", sentence_of(state))];
            (labels, i64::from(matches!(state, Offload::On | Offload::Below(..))))
        })
    });
    page.gauges("margay_datapath_offload", "1 while many packets are handled at once here", offloads);
    let drops = counted().flat_map(|(iface, stats)| {
        stats
            .drops
            .iter()
            .map(move |(reason, n)| (vec![("iface", iface.clone()), ("reason", reason.clone())], *n))
    });
    page.counters("margay_datapath_drops", "Packets a device dropped", drops);
}
