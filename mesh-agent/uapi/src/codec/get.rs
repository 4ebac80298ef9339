//! Replies to `get=1`: the device as text and back.

use std::fmt::Write as _;
use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keyservice::{PresharedKey, PrivateKey, PublicKey};
use zeroize::Zeroizing;

use super::set::{parse_endpoint, parse_prefix};
use super::{CodecError, Lines, finish, parse_errno, parse_number, render_errno};
use crate::device::{Device, Peer};

/// The reply of a server that has `device` with these secrets.
pub fn render(
    device: &Device,
    private_key: Option<&PrivateKey>,
    preshared_key: impl Fn(&PublicKey) -> Option<PresharedKey>,
) -> Zeroizing<String> {
    let prefixes: usize = device.peers.values().map(|p| p.allowed_ips.len()).sum();
    // Large enough that it never moves: a moved String would leave a copy of the secrets behind.
    let room = 256 + 512 * device.peers.len() + 64 * prefixes;
    let mut out = Zeroizing::new(String::with_capacity(room));
    let text: &mut String = &mut out;
    // Writing to a String cannot fail.
    if let Some(key) = private_key {
        let _ = writeln!(text, "private_key={}", *key.expose_hex());
    }
    let _ = writeln!(text, "listen_port={}", device.listen_port);
    if device.fwmark != 0 {
        let _ = writeln!(text, "fwmark={}", device.fwmark);
    }
    for (key, peer) in &device.peers {
        let _ = writeln!(text, "public_key={}", key.to_hex());
        if let Some(preshared) = preshared_key(key) {
            let _ = writeln!(text, "preshared_key={}", *preshared.expose_hex());
        }
        let _ = render_peer(text, peer);
    }
    text.push_str(&render_errno(0));
    out
}

fn render_peer(out: &mut String, peer: &Peer) -> std::fmt::Result {
    writeln!(out, "protocol_version=1")?;
    if let Some(endpoint) = &peer.endpoint {
        writeln!(out, "endpoint={endpoint}")?;
    }
    let since = peer.last_handshake.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    writeln!(out, "last_handshake_time_sec={}", since.as_secs())?;
    writeln!(out, "last_handshake_time_nsec={}", since.subsec_nanos())?;
    writeln!(out, "tx_bytes={}", peer.tx_bytes)?;
    writeln!(out, "rx_bytes={}", peer.rx_bytes)?;
    writeln!(out, "persistent_keepalive_interval={}", peer.persistent_keepalive)?;
    for prefix in &peer.allowed_ips {
        writeln!(out, "allowed_ip={prefix}")?;
    }
    Ok(())
}

/// Reads a reply. The secrets in it are dropped here: what is kept is their public half and whether a
/// preshared key exists. Unknown keys are passed over, as newer servers may send them.
pub fn read<R: Read>(lines: &mut Lines<R>) -> Result<Device, CodecError> {
    let mut device = Device::default();
    let mut status = None;
    let mut current: Option<(PublicKey, Peer, Duration)> = None;
    while let Some((line, key, value)) = lines.next_pair()? {
        match key {
            "errno" => status = Some(parse_errno(line, value)?),
            "public_key" => {
                end_peer(&mut device, current.take());
                let key = PublicKey::from_hex(value).map_err(|e| CodecError::field(line, key, e))?;
                current = Some((key, Peer::default(), Duration::ZERO));
            }
            _ => match &mut current {
                Some((_, peer, handshake)) => peer_line(peer, handshake, line, key, value)?,
                None => device_line(&mut device, line, key, value)?,
            },
        }
    }
    end_peer(&mut device, current);
    finish(lines, status)?;
    Ok(device)
}

fn end_peer(device: &mut Device, peer: Option<(PublicKey, Peer, Duration)>) {
    if let Some((key, mut peer, handshake)) = peer {
        if !handshake.is_zero() {
            peer.last_handshake = UNIX_EPOCH.checked_add(handshake);
        }
        device.peers.insert(key, peer);
    }
}

fn device_line(device: &mut Device, line: usize, key: &str, value: &str) -> Result<(), CodecError> {
    match key {
        "private_key" => {
            let bad = |e| CodecError::field(line, key, e);
            let unset = value.len() == 64 && value.bytes().all(|b| b == b'0');
            device.public_key = match unset {
                true => None,
                false => Some(PrivateKey::from_hex(value).map_err(bad)?.public()),
            };
        }
        "listen_port" => device.listen_port = parse_number(line, key, value)?,
        "fwmark" => device.fwmark = parse_number(line, key, value)?,
        _ => {}
    }
    Ok(())
}

fn peer_line(
    peer: &mut Peer,
    handshake: &mut Duration,
    line: usize,
    key: &str,
    value: &str,
) -> Result<(), CodecError> {
    match key {
        "preshared_key" => {
            let secret = PresharedKey::from_hex(value).map_err(|e| CodecError::field(line, key, e))?;
            peer.has_preshared_key = !secret.is_none();
        }
        "endpoint" => peer.endpoint = Some(parse_endpoint(line, key, value)?),
        "last_handshake_time_sec" => {
            let seconds = parse_number(line, key, value)?;
            *handshake = Duration::new(seconds, handshake.subsec_nanos());
            if SystemTime::UNIX_EPOCH.checked_add(*handshake).is_none() {
                return Err(CodecError::field(line, key, "out of range"));
            }
        }
        "last_handshake_time_nsec" => {
            let nanos: u32 = parse_number(line, key, value)?;
            if nanos >= 1_000_000_000 {
                return Err(CodecError::field(line, key, "out of range"));
            }
            *handshake = Duration::new(handshake.as_secs(), nanos);
        }
        "tx_bytes" => peer.tx_bytes = parse_number(line, key, value)?,
        "rx_bytes" => peer.rx_bytes = parse_number(line, key, value)?,
        "persistent_keepalive_interval" => peer.persistent_keepalive = parse_number(line, key, value)?,
        "allowed_ip" => {
            peer.allowed_ips.insert(parse_prefix(line, key, value)?);
        }
        _ => {}
    }
    Ok(())
}
