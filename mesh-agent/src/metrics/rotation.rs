//! This node's keys and how far their rotation is.

use super::{Page, count};
use crate::status::Observed;

const PHASES: [&str; 5] = ["starting", "steady", "preparing", "moving", "leaving"];
const REASONS: [&str; 3] = ["NotBegun", "NoHandshake", "NotMoved"];
const BLOCKS: [&str; 2] = ["NoDevice", "NoSecret"];

pub(super) fn rotation(page: &mut Page, seen: &Observed) {
    let rotation = &seen.rotation;
    let epochs = rotation.keys.iter().map(|key| (vec![("iface", key.device.clone())], count(key.epoch)));
    page.gauges("margay_rotation_epoch", "Epoch of this node's key in a device", epochs);
    let phases = PHASES.map(|phase| (vec![("phase", phase.to_owned())], i64::from(rotation.phase == phase)));
    page.gauges("margay_rotation_phase", "1 for the phase that the rotation is in", phases.into_iter());
    let waiting = REASONS.map(|reason| {
        let peers = rotation.waiting.iter().filter(|peer| peer.reason == reason).count();
        (vec![("reason", reason.to_owned())], count(peers as u64))
    });
    page.gauges("margay_rotation_waiting_peers", "Peers that the rotation waits for", waiting.into_iter());
    let blocked = BLOCKS.map(|reason| {
        let is = rotation.blocked.as_ref().is_some_and(|blocked| blocked.reason == reason);
        (vec![("reason", reason.to_owned())], i64::from(is))
    });
    page.gauges("margay_rotation_blocked", "1 while the next epoch cannot begin", blocked.into_iter());
    let age = rotation.age_seconds.map(|age| (Vec::new(), count(age)));
    page.gauges("margay_rotation_age_seconds", "Seconds since the newest epoch began", age.into_iter());
    let completed = std::iter::once((Vec::new(), rotation.completed));
    page.counters("margay_rotation_completed", "Rotations completed since the agent started", completed);
}
