//! `meshctl peers`.

use mesh_api::status::{DeviceStatus, PeerState, PeerStatus};

use super::{age, bytes, or_dash, table as new_table, text};

/// Allowed IPs shown without `-v`.
const SHOWN_PREFIXES: usize = 3;

pub(crate) fn state(state: PeerState) -> &'static str {
    match state {
        PeerState::Up => "up",
        PeerState::Idle => "idle",
        PeerState::Down => "down",
        PeerState::Unknown => "unknown",
    }
}

pub(crate) fn table(peers: &[PeerStatus], verbose: bool) -> String {
    if peers.is_empty() {
        return "no peers".to_owned();
    }
    let mut header =
        vec!["NAME", "STATE", "ENDPOINT", "HANDSHAKE", "RX", "TX", "HEALS", "MTU", "ALLOWED IPS"];
    if verbose {
        header.extend(["DEVICE", "RX PACKETS", "TX PACKETS", "HANDSHAKES", "PUBLIC KEY"]);
    }
    let mut out = new_table(&header);
    for peer in peers {
        let mut row = vec![
            peer.name.clone(),
            state(peer.state).to_owned(),
            or_dash(peer.endpoint.map(|endpoint| endpoint.to_string())),
            peer.handshake_age_seconds
                .map_or_else(|| "never".to_owned(), |seconds| format!("{} ago", age(seconds))),
            bytes(peer.rx_bytes),
            bytes(peer.tx_bytes),
            heals(peer),
            peer.mtu.to_string(),
            prefixes(peer, verbose),
        ];
        if verbose {
            row.extend([devices(peer), number(peer.rx_packets), number(peer.tx_packets)]);
            row.extend([handshakes(peer), peer.public_key.clone()]);
        }
        out.add_row(row);
    }
    text(&out)
}

/// What was dropped, of the devices by every reason there is, and of the peers by those that happened.
pub(crate) fn drops(devices: &[DeviceStatus], peers: &[PeerStatus]) -> String {
    let mut out = new_table(&["DROPPED", "REASON", "PACKETS"]);
    let of_devices = devices.iter().map(|device| (device.name.clone(), &device.drops));
    let of_peers = peers.iter().map(|peer| (format!("peer {}", peer.name), &peer.drops));
    let mut none = true;
    for (whose, drops) in of_devices.chain(of_peers) {
        for (reason, count) in drops {
            none = false;
            out.add_row(vec![whose.clone(), reason.clone(), count.to_string()]);
        }
    }
    if none { String::new() } else { text(&out) }
}

/// How often the agent had to try afresh, and whether it does now.
fn heals(peer: &PeerStatus) -> String {
    match peer.silent_seconds {
        Some(seconds) => format!("{}, silent {}", peer.heals, age(seconds)),
        None => peer.heals.to_string(),
    }
}

/// The device in use first.
fn devices(peer: &PeerStatus) -> String {
    if peer.devices.is_empty() { peer.device.clone() } else { peer.devices.join(",") }
}

fn number(count: Option<u64>) -> String {
    or_dash(count.map(|count| count.to_string()))
}

/// Completed of begun here.
fn handshakes(peer: &PeerStatus) -> String {
    match (peer.handshakes, peer.initiations) {
        (Some(completed), Some(begun)) => format!("{completed} ({begun} begun)"),
        _ => "-".to_owned(),
    }
}

fn prefixes(peer: &PeerStatus, all: bool) -> String {
    let shown = if all { peer.allowed_ips.len() } else { SHOWN_PREFIXES };
    let mut line = peer.allowed_ips.iter().take(shown).map(ToString::to_string).collect::<Vec<_>>().join(",");
    if peer.allowed_ips.len() > shown {
        line.push_str(&format!(",+{}", peer.allowed_ips.len() - shown));
    }
    if line.is_empty() { "-".to_owned() } else { line }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn peer(name: &str, state: PeerState, handshake: Option<u64>) -> PeerStatus {
        PeerStatus {
            name: name.to_owned(),
            public_key: "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".to_owned(),
            device: "margay0".to_owned(),
            devices: vec!["margay0".to_owned(), "margay1".to_owned()],
            endpoint: handshake.map(|_| "192.0.2.2:51820".parse().unwrap()),
            allowed_ips: ["10.244.2.0/24", "fd00:2::/64", "192.0.2.2/32", "10.9.9.9/32"]
                .map(|prefix| prefix.parse().unwrap())
                .to_vec(),
            state,
            handshake_age_seconds: handshake,
            rx_bytes: 1_500_000,
            tx_bytes: 12,
            rx_packets: Some(1234),
            tx_packets: None,
            handshakes: Some(3),
            initiations: Some(5),
            drops: [("spoofed_source".to_owned(), 7)].into(),
            heals: 2,
            silent_seconds: handshake.is_none().then_some(65),
            mtu: 1420,
        }
    }

    #[test]
    fn a_row_per_peer_with_handshake_and_traffic() {
        let peers = [peer("b", PeerState::Up, Some(5)), peer("c", PeerState::Down, None)];
        assert_eq!(
            table(&peers, false),
            "NAME  STATE  ENDPOINT         HANDSHAKE  RX       TX    HEALS            MTU   ALLOWED IPS\n\
             b     up     192.0.2.2:51820  5s ago     1.4 MiB  12 B  2                1420  10.244.2.0/24,fd00:2::/64,192.0.2.2/32,+1\n\
             c     down   -                never      1.4 MiB  12 B  2, silent 1m05s  1420  10.244.2.0/24,fd00:2::/64,192.0.2.2/32,+1"
        );
    }

    #[test]
    fn verbose_leaves_nothing_out() {
        let text = table(&[peer("b", PeerState::Idle, Some(500))], true);
        for part in ["10.9.9.9/32", "margay0,margay1", "AAAA", "1234", "3 (5 begun)"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn drops_are_told_of_devices_and_peers() {
        let peers = [peer("b", PeerState::Up, Some(1))];
        assert_eq!(drops(&[], &peers), "DROPPED  REASON          PACKETS\npeer b   spoofed_source  7");
        assert_eq!(drops(&[], &[]), "");
    }
}
