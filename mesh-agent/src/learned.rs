//! Where peers were last heard from, kept over restarts of the datapath and the agent: how a peer behind a NAT, which
//! announces nothing that can be reached, is found again. A hint and no more: a lost or damaged file costs nothing else.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use keyservice::PublicKey;
use mesh_uapi::Device;
use serde::{Deserialize, Serialize};

use crate::files;

/// Endpoints by peer.
pub type Learned = BTreeMap<PublicKey, SocketAddr>;

/// Longest file that is read, in bytes: more than 10,000 peers.
const LONGEST: u64 = 1 << 20;
/// REJECT_AFTER_TIME: an older session proves nothing.
const REJECT_AFTER: Duration = Duration::from_secs(180);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    endpoints: BTreeMap<String, SocketAddr>,
}

/// Adds what the devices know of peers with a live session. Keys that are `wanted` no more are forgotten.
pub fn merge<'a>(
    known: &Learned,
    devices: impl Iterator<Item = &'a Device>,
    wanted: impl Fn(&PublicKey) -> bool,
    wall: SystemTime,
) -> Learned {
    let mut merged = known.clone();
    for (key, peer) in devices.flat_map(|device| &device.peers) {
        let live = |at| wall.duration_since(at).unwrap_or_default() < REJECT_AFTER;
        if let Some(endpoint) = peer.endpoint.filter(|_| peer.last_handshake.is_some_and(live)) {
            merged.insert(*key, endpoint);
        }
    }
    merged.retain(|key, _| wanted(key));
    merged
}

/// Reads the file; none is nothing.
pub fn load(path: &Path) -> Result<Learned, String> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Learned::new()),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let named = |why: String| format!("{}: {why}; learned endpoints are forgotten", path.display());
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(|error| named(error.to_string()))?;
    if bytes.len() as u64 > LONGEST {
        return Err(named(format!("longer than {LONGEST} bytes")));
    }
    let file: File = serde_json::from_slice(&bytes).map_err(|error| named(error.to_string()))?;
    if file.version != 1 {
        return Err(named(format!("version {} is not 1", file.version)));
    }
    let parse = |(key, endpoint): (String, SocketAddr)| {
        key.parse().map(|key| (key, endpoint)).map_err(|error| named(format!("endpoints: {key}: {error}")))
    };
    file.endpoints.into_iter().map(parse).collect()
}

/// Writes the file.
pub fn store(path: &Path, learned: &Learned) -> Result<(), String> {
    let endpoints = learned.iter().map(|(key, endpoint)| (key.to_string(), *endpoint)).collect();
    let text =
        serde_json::to_vec_pretty(&File { version: 1, endpoints }).map_err(|error| error.to_string())?;
    files::write_atomic(path, &text, 0o600).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use mesh_uapi::Peer;

    use super::*;

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32])
    }

    fn at(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, n], 1000))
    }

    #[test]
    fn only_endpoints_of_live_sessions_are_learned_and_only_of_peers() {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let peer = |n, age: Option<u64>| {
            let last_handshake = age.map(|age| wall - Duration::from_secs(age));
            (key(n), Peer { endpoint: Some(at(n)), last_handshake, ..Peer::default() })
        };
        let device = Device {
            peers: [peer(1, Some(5)), peer(2, Some(500)), peer(3, None), peer(4, Some(5))].into(),
            ..Device::default()
        };
        let known = [(key(2), at(20)), (key(5), at(50))].into();
        let merged =
            merge(&known, [&device].into_iter(), |key| *key != self::key(4) && *key != self::key(5), wall);
        assert_eq!(merged, [(key(1), at(1)), (key(2), at(20))].into());
    }

    #[test]
    fn the_file_goes_round_and_a_bad_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("learned.json");
        assert_eq!(load(&path), Ok(Learned::new()));
        let learned: Learned = [(key(1), at(1)), (key(2), "[2001:db8::1]:9".parse().unwrap())].into();
        store(&path, &learned).unwrap();
        assert_eq!(load(&path), Ok(learned));
        for bad in [
            "",
            "{}",
            "{\"version\":2,\"endpoints\":{}}",
            "{\"version\":1,\"endpoints\":{\"x\":\"1.2.3.4:5\"}}",
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(load(&path).unwrap_err().contains("learned.json"), "{bad}");
        }
        std::fs::write(&path, vec![b' '; LONGEST as usize + 1]).unwrap();
        assert!(load(&path).unwrap_err().contains("longer than"));
    }
}
