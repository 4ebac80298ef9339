//! Replies to `get=stats`, the extension that carries mesh-datapath's counters.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;

use keyservice::PublicKey;

use super::{CodecError, Lines, finish, parse_errno, parse_number, render_errno};
use crate::stats::Stats;

/// The reply of a server: `version`, `mtu`, `drop_REASON=COUNT` lines, then each peer's.
pub fn render(stats: &Stats) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "version={}\nmtu={}", stats.version, stats.mtu);
    render_drops(&mut out, &stats.drops);
    for (key, drops) in &stats.peers {
        let _ = writeln!(out, "public_key={}", key.to_hex());
        render_drops(&mut out, drops);
    }
    out + &render_errno(0)
}

fn render_drops(out: &mut String, drops: &BTreeMap<String, u64>) {
    for (reason, count) in drops {
        let _ = writeln!(out, "drop_{reason}={count}");
    }
}

/// Reads a reply; unknown keys are passed over.
pub fn read<R: Read>(lines: &mut Lines<R>) -> Result<Stats, CodecError> {
    let mut stats = Stats::default();
    let mut peer = None;
    let mut status = None;
    while let Some((line, key, value)) = lines.next_pair()? {
        match key {
            "errno" => status = Some(parse_errno(line, value)?),
            "version" => stats.version = value.to_owned(),
            "mtu" => stats.mtu = parse_number(line, key, value)?,
            "public_key" => {
                let key = PublicKey::from_hex(value).map_err(|e| CodecError::field(line, key, e))?;
                stats.peers.entry(key).or_default();
                peer = Some(key);
            }
            _ => {
                let Some(reason) = key.strip_prefix("drop_") else { continue };
                let count = parse_number(line, key, value)?;
                let drops = match peer {
                    Some(key) => stats.peers.entry(key).or_default(),
                    None => &mut stats.drops,
                };
                drops.insert(reason.to_owned(), count);
            }
        }
    }
    finish(lines, status)?;
    Ok(stats)
}
