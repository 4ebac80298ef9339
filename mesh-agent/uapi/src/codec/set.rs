//! `set=1` requests: text to operations and back.

use std::fmt::Write as _;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use keyservice::{KeyError, PresharedKey, PrivateKey, PublicKey};
use zeroize::Zeroizing;

use super::{CodecError, Lines, parse_number};
use crate::device::{Op, PeerUpdate};

/// Reads the lines after `set=1` up to the empty line.
pub fn read_ops<R: Read>(lines: &mut Lines<R>) -> Result<Vec<Op>, CodecError> {
    let mut parser = Parser::default();
    while let Some((line, key, value)) = lines.next_pair()? {
        parser.take(line, key, value)?;
    }
    parser.end_peer();
    Ok(parser.ops)
}

#[derive(Default)]
struct Parser {
    ops: Vec<Op>,
    peer: Option<Section>,
}

/// The lines of one peer so far.
struct Section {
    key: PublicKey,
    remove: bool,
    update: PeerUpdate,
}

impl Parser {
    fn take(&mut self, line: usize, key: &str, value: &str) -> Result<(), CodecError> {
        if key == "public_key" {
            self.end_peer();
            let public = PublicKey::from_hex(value).map_err(|e| CodecError::field(line, key, e))?;
            self.peer = Some(Section { key: public, remove: false, update: PeerUpdate::default() });
            return Ok(());
        }
        match &mut self.peer {
            Some(section) => section.take(line, key, value),
            None => {
                self.ops.extend(device_op(line, key, value)?);
                Ok(())
            }
        }
    }

    fn end_peer(&mut self) {
        if let Some(section) = self.peer.take() {
            self.ops.push(match section.remove {
                true => Op::RemovePeer(section.key),
                false => Op::SetPeer(section.key, section.update),
            });
        }
    }
}

fn device_op(line: usize, key: &str, value: &str) -> Result<Option<Op>, CodecError> {
    let op = match key {
        "private_key" => {
            let bad = |e: KeyError| CodecError::field(line, key, e);
            if value.len() == 64 && value.bytes().all(|b| b == b'0') {
                Op::ClearPrivateKey
            } else {
                Op::SetPrivateKey(PrivateKey::from_hex(value).map_err(bad)?)
            }
        }
        "listen_port" => Op::SetListenPort(parse_number(line, key, value)?),
        "fwmark" => Op::SetFwmark(parse_number(line, key, value)?),
        "replace_peers" => {
            only_true(line, key, value)?;
            Op::RemoveAllPeers
        }
        _ => return Err(CodecError::field(line, key, "unknown device key")),
    };
    Ok(Some(op))
}

fn only_true(line: usize, key: &str, value: &str) -> Result<(), CodecError> {
    match value {
        "true" => Ok(()),
        _ => Err(CodecError::field(line, key, "only true is allowed")),
    }
}

impl Section {
    fn take(&mut self, line: usize, key: &str, value: &str) -> Result<(), CodecError> {
        let update = &mut self.update;
        match key {
            "update_only" => {
                only_true(line, key, value)?;
                update.update_only = true;
            }
            "remove" => {
                only_true(line, key, value)?;
                self.remove = true;
            }
            "preshared_key" => {
                let key = PresharedKey::from_hex(value).map_err(|e| CodecError::field(line, key, e))?;
                update.preshared_key = Some(key);
            }
            "endpoint" => update.endpoint = Some(parse_endpoint(line, key, value)?),
            "persistent_keepalive_interval" => {
                update.persistent_keepalive = Some(parse_number(line, key, value)?);
            }
            "replace_allowed_ips" => {
                only_true(line, key, value)?;
                update.replace_allowed_ips = true;
                update.add_allowed_ips.clear();
                update.remove_allowed_ips.clear();
            }
            "allowed_ip" => match value.strip_prefix('-') {
                Some(prefix) => {
                    let prefix = parse_prefix(line, key, prefix)?;
                    update.add_allowed_ips.remove(&prefix);
                    update.remove_allowed_ips.insert(prefix);
                }
                None => {
                    // wg(8) writes `+` for an incremental addition.
                    let prefix = parse_prefix(line, key, value.strip_prefix('+').unwrap_or(value))?;
                    update.remove_allowed_ips.remove(&prefix);
                    update.add_allowed_ips.insert(prefix);
                }
            },
            "initiate" => {
                only_true(line, key, value)?;
                update.initiate = true;
            }
            "protocol_version" if value == "1" => {}
            "protocol_version" => return Err(CodecError::field(line, key, "only version 1 exists")),
            _ => return Err(CodecError::field(line, key, "unknown peer key")),
        }
        Ok(())
    }
}

/// An endpoint as `1.2.3.4:5` or `[::1]:5`; an IPv4-mapped address means its IPv4 one.
pub(super) fn parse_endpoint(line: usize, key: &str, value: &str) -> Result<SocketAddr, CodecError> {
    let endpoint: SocketAddr =
        value.parse().map_err(|_| CodecError::field(line, key, "not an address and port"))?;
    if endpoint.port() == 0 {
        return Err(CodecError::field(line, key, "port 0"));
    }
    Ok(canonical(endpoint))
}

fn canonical(endpoint: SocketAddr) -> SocketAddr {
    match endpoint.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, endpoint.port()),
        IpAddr::V6(_) => endpoint,
    }
}

/// A prefix with its host bits cleared; an address alone is a prefix of its full length.
pub(super) fn parse_prefix(line: usize, key: &str, value: &str) -> Result<IpNet, CodecError> {
    let bad = |_| CodecError::field(line, key, "not an address with a prefix length");
    match value.parse::<IpAddr>() {
        Ok(address) => Ok(IpNet::from(address)),
        Err(_) => value.parse::<IpNet>().map(|net| net.trunc()).map_err(|_| ()).map_err(bad),
    }
}

fn is_device_op(op: &Op) -> bool {
    !matches!(op, Op::SetPeer(..) | Op::RemovePeer(_))
}

/// The requests that apply `ops` in order. The UAPI has its device keys first, so a device operation
/// after a peer's starts a new request.
pub fn render_requests(ops: &[Op]) -> Vec<Zeroizing<String>> {
    let mut requests = Vec::new();
    let mut after_peer = true;
    for op in ops {
        if requests.is_empty() || (is_device_op(op) && after_peer) {
            requests.push(Zeroizing::new(String::from("set=1\n")));
        }
        after_peer = !is_device_op(op);
        if let Some(request) = requests.last_mut() {
            render_op(request, op);
        }
    }
    for request in &mut requests {
        request.push('\n');
    }
    requests
}

fn render_op(out: &mut String, op: &Op) {
    // Writing to a String cannot fail.
    let _ = match op {
        Op::SetPrivateKey(key) => writeln!(out, "private_key={}", *key.expose_hex()),
        Op::ClearPrivateKey => writeln!(out, "private_key={:064}", 0),
        Op::RemoveAllPeers => writeln!(out, "replace_peers=true"),
        Op::SetListenPort(port) => writeln!(out, "listen_port={port}"),
        Op::SetFwmark(mark) => writeln!(out, "fwmark={mark}"),
        Op::RemovePeer(key) => writeln!(out, "public_key={}\nremove=true", key.to_hex()),
        Op::SetPeer(key, update) => {
            let _ = writeln!(out, "public_key={}", key.to_hex());
            render_update(out, update)
        }
    };
}

fn render_update(out: &mut String, update: &PeerUpdate) -> std::fmt::Result {
    if update.update_only {
        writeln!(out, "update_only=true")?;
    }
    if let Some(key) = &update.preshared_key {
        writeln!(out, "preshared_key={}", *key.expose_hex())?;
    }
    if let Some(endpoint) = &update.endpoint {
        writeln!(out, "endpoint={endpoint}")?;
    }
    if let Some(seconds) = update.persistent_keepalive {
        writeln!(out, "persistent_keepalive_interval={seconds}")?;
    }
    if update.replace_allowed_ips {
        writeln!(out, "replace_allowed_ips=true")?;
    }
    for prefix in &update.remove_allowed_ips {
        writeln!(out, "allowed_ip=-{prefix}")?;
    }
    for prefix in &update.add_allowed_ips {
        writeln!(out, "allowed_ip={prefix}")?;
    }
    if update.initiate {
        writeln!(out, "initiate=true")?;
    }
    Ok(())
}
