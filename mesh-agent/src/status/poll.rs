//! Reads the WireGuard devices every so often, for status and metrics; changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use mesh_uapi::client::{Client, socket_path};
use tokio_util::sync::CancellationToken;

use super::{Board, DeviceSeen, PeerTracker};
use crate::reconcile::netlink::Netlink;

/// Between two readings.
const EVERY: Duration = Duration::from_secs(2);

/// Reads until cancelled, and at once when the set of devices changes.
pub async fn poll(board: Board, netlink: Netlink, cancel: CancellationToken) {
    let mut tracker = PeerTracker::default();
    let mut changes = board.subscribe();
    loop {
        let names: BTreeSet<String> = board.observed().desired.wireguard.keys().cloned().collect();
        read(&board, &netlink, &names, &mut tracker).await;
        let changed = changes.wait_for(|seen| !seen.desired.wireguard.keys().eq(&names));
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = changed => {}
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn read(board: &Board, netlink: &Netlink, names: &BTreeSet<String>, tracker: &mut PeerTracker) {
    let links = netlink.links().await.unwrap_or_default();
    let mut devices = BTreeMap::new();
    let mut peers = BTreeMap::new();
    for name in names {
        let link = links.get(name);
        let client = Client::new(socket_path(name)).with_timeout(Duration::from_secs(2));
        // Other implementations than mesh-datapath have no counters.
        let answers = tokio::task::spawn_blocking(move || (client.get().ok(), client.stats().ok()));
        let (device, stats) = answers.await.unwrap_or_default();
        if let Some(device) = &device {
            peers.extend(tracker.observe(name, device, Instant::now(), SystemTime::now()));
        }
        let (up, mtu) = (link.map(|link| link.up), link.map_or(0, |link| link.mtu));
        devices.insert(name.clone(), DeviceSeen { up, mtu, device, stats });
    }
    board.set_devices(devices, peers);
}
