//! `meshctl peers`.

use mesh_api::status::{PeerState, PeerStatus};

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
    let mut header = vec!["NAME", "STATE", "ENDPOINT", "HANDSHAKE", "RX", "TX", "MTU", "ALLOWED IPS"];
    if verbose {
        header.extend(["DEVICE", "PUBLIC KEY"]);
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
            peer.mtu.to_string(),
            prefixes(peer, verbose),
        ];
        if verbose {
            row.extend([peer.device.clone(), peer.public_key.clone()]);
        }
        out.add_row(row);
    }
    text(&out)
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
            endpoint: handshake.map(|_| "192.0.2.2:51820".parse().unwrap()),
            allowed_ips: ["10.244.2.0/24", "fd00:2::/64", "192.0.2.2/32", "10.9.9.9/32"]
                .map(|prefix| prefix.parse().unwrap())
                .to_vec(),
            state,
            handshake_age_seconds: handshake,
            rx_bytes: 1_500_000,
            tx_bytes: 12,
            mtu: 1420,
        }
    }

    #[test]
    fn a_row_per_peer_with_handshake_and_traffic() {
        let peers = [peer("b", PeerState::Up, Some(5)), peer("c", PeerState::Down, None)];
        assert_eq!(
            table(&peers, false),
            "NAME  STATE  ENDPOINT         HANDSHAKE  RX       TX    MTU   ALLOWED IPS\n\
             b     up     192.0.2.2:51820  5s ago     1.4 MiB  12 B  1420  10.244.2.0/24,fd00:2::/64,192.0.2.2/32,+1\n\
             c     down   -                never      1.4 MiB  12 B  1420  10.244.2.0/24,fd00:2::/64,192.0.2.2/32,+1"
        );
    }

    #[test]
    fn verbose_leaves_nothing_out() {
        let text = table(&[peer("b", PeerState::Idle, Some(500))], true);
        assert!(text.contains("10.9.9.9/32") && text.contains("margay0") && text.contains("AAAA"), "{text}");
    }
}
