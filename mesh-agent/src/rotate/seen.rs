//! What the machine looks at, from what the devices, the plan and the reconcilers say. Pure.

use std::collections::BTreeMap;
use std::time::SystemTime;

use keyservice::KeyClaim;
use keyservice::rotation::{Link, PeerSeen, Slot, State, device_of};
use mesh_api::defaults::DEVICES;

use crate::planner::Claims;
use crate::status::{DeviceSeen, Observed};

/// Reconcilers that a rotation depends on. What else fails is no reason to stop half-way.
const CONCERNED: [&str; 5] = ["policy", "links", "addresses", "wireguard", "routes"];

/// Everything of the snapshot `generation` that concerns keys is in place.
pub(super) fn is_settled(seen: &Observed, generation: u64) -> bool {
    let rows = seen.reconcilers.iter().filter(|row| CONCERNED.contains(&row.name.as_str()));
    rows.clone().count() == CONCERNED.len() && rows.into_iter().all(|row| row.generation >= generation)
}

/// Which of the two devices are there and answer.
pub(super) fn devices(seen: &Observed) -> [bool; 2] {
    let answers = |device: &DeviceSeen| device.up.is_some() && device.device.is_some();
    DEVICES.map(|name| seen.devices.get(name).is_some_and(answers))
}

/// The admitted peers, which announce `claims`.
pub(super) fn peers(
    seen: &Observed,
    state: &State,
    claims: &Claims,
    wall: SystemTime,
) -> BTreeMap<String, PeerSeen> {
    let peer = |(name, claims): (&String, &Vec<KeyClaim>)| {
        let link = |slot: Option<&Slot>| link(seen, state, slot?, name, claims, wall);
        let (new, old) = (link(state.newest()), link(state.old()));
        (name.clone(), PeerSeen { claims: claims.clone(), new, old })
    };
    claims.iter().map(peer).collect()
}

/// A peer on the device of one of our keys; `None` when it is none there, or the device has another key.
fn link(
    seen: &Observed,
    state: &State,
    slot: &Slot,
    name: &str,
    claims: &[KeyClaim],
    wall: SystemTime,
) -> Option<Link> {
    let device = seen.devices.get(DEVICES[device_of(slot.epoch)])?.device.as_ref()?;
    let key = state.claim(slot.epoch, name, claims)?.public_key;
    let peer = device.peers.get(&key).filter(|_| device.public_key == Some(slot.public_key))?;
    let handshake_age = peer.last_handshake.map(|at| wall.duration_since(at).unwrap_or_default());
    Some(Link { handshake_age, rx_bytes: peer.rx_bytes })
}
