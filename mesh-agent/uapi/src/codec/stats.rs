//! Replies to `get=stats`, the extension that carries mesh-datapath's counters.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;

use keyservice::PublicKey;

use super::{CodecError, Lines, finish, parse_errno, parse_number, render_errno};
use crate::stats::{Offload, PeerStats, Stats};

/// The reply of a server: what is true of the device, then each peer's counters after its `public_key`.
pub fn render(stats: &Stats) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "version={}\nmtu={}", stats.version, stats.mtu);
    let _ = writeln!(out, "core={}\ncrypto={}", stats.core, stats.crypto);
    for (name, state) in &stats.offloads {
        let _ = writeln!(out, "offload_{name}={state}");
    }
    render_drops(&mut out, &stats.drops);
    for (key, peer) in &stats.peers {
        let _ = writeln!(out, "public_key={}", key.to_hex());
        let _ = writeln!(out, "rx_packets={}\ntx_packets={}", peer.rx_packets, peer.tx_packets);
        let _ = writeln!(out, "handshakes={}\ninitiations={}", peer.handshakes, peer.initiations);
        render_drops(&mut out, &peer.drops);
    }
    out + &render_errno(0)
}

fn render_drops(out: &mut String, drops: &BTreeMap<String, u64>) {
    for (reason, count) in drops {
        let _ = writeln!(out, "drop_{reason}={count}");
    }
}

/// Reads a reply; unknown keys are passed over, as newer servers may send them.
pub fn read<R: Read>(lines: &mut Lines<R>) -> Result<Stats, CodecError> {
    let mut stats = Stats::default();
    let mut current: Option<(PublicKey, PeerStats)> = None;
    let mut status = None;
    while let Some((line, key, value)) = lines.next_pair()? {
        match (key, &mut current) {
            ("errno", _) => status = Some(parse_errno(line, value)?),
            ("public_key", _) => {
                let key = PublicKey::from_hex(value).map_err(|e| CodecError::field(line, key, e))?;
                stats.peers.extend(current.replace((key, PeerStats::default())));
            }
            (_, Some((_, peer))) => peer_line(peer, line, key, value)?,
            (_, None) => device_line(&mut stats, line, key, value)?,
        }
    }
    stats.peers.extend(current);
    finish(lines, status)?;
    Ok(stats)
}

fn device_line(stats: &mut Stats, line: usize, key: &str, value: &str) -> Result<(), CodecError> {
    match key {
        "version" => value.clone_into(&mut stats.version),
        "mtu" => stats.mtu = parse_number(line, key, value)?,
        "core" => value.clone_into(&mut stats.core),
        "crypto" => value.clone_into(&mut stats.crypto),
        _ => {
            if let Some(name) = key.strip_prefix("offload_") {
                let Ok(state) = value.parse::<Offload>();
                stats.offloads.insert(name.to_owned(), state);
            }
            take_drop(&mut stats.drops, line, key, value)?;
        }
    }
    Ok(())
}

fn peer_line(peer: &mut PeerStats, line: usize, key: &str, value: &str) -> Result<(), CodecError> {
    match key {
        "rx_packets" => peer.rx_packets = parse_number(line, key, value)?,
        "tx_packets" => peer.tx_packets = parse_number(line, key, value)?,
        "handshakes" => peer.handshakes = parse_number(line, key, value)?,
        "initiations" => peer.initiations = parse_number(line, key, value)?,
        _ => take_drop(&mut peer.drops, line, key, value)?,
    }
    Ok(())
}

fn take_drop(
    drops: &mut BTreeMap<String, u64>,
    line: usize,
    key: &str,
    value: &str,
) -> Result<(), CodecError> {
    if let Some(reason) = key.strip_prefix("drop_") {
        drops.insert(reason.to_owned(), parse_number(line, key, value)?);
    }
    Ok(())
}
