//! Looks at what no event tells: the WireGuard devices, who is behind them, and the host's own addresses.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_uapi::Device;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use crate::own;
use crate::reconcile::ReconcileError;
use crate::reconcile::netlink::{Links, Netlink};
use crate::status::{Board, DeviceSeen, PeerTracker};
use crate::store::Store;
use crate::wireguard::Datapaths;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);

/// Reads the devices and puts what it sees on the board and in the store.
pub struct Observer {
    netlink: Netlink,
    datapaths: Box<dyn Datapaths>,
    tracker: PeerTracker,
    board: Board,
    store: Store,
    said: Option<String>,
}

impl Observer {
    /// Over these.
    pub fn new(netlink: Netlink, datapaths: Box<dyn Datapaths>, board: Board, store: Store) -> Self {
        Self { netlink, datapaths, tracker: PeerTracker::default(), board, store, said: None }
    }

    /// Looks for ever; `appeared` is told when a device comes back, so that nobody waits for a timer.
    pub async fn run(mut self, appeared: Arc<Notify>) {
        let mut timer = interval(PERIOD);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = 0;
        loop {
            timer.tick().await;
            match self.look().await {
                Ok(answering) => {
                    if answering > before {
                        appeared.notify_one();
                    }
                    before = answering;
                    self.said = None;
                }
                Err(error) => {
                    let text = error.to_string();
                    if self.said.as_ref() != Some(&text) {
                        warn!("{text}");
                    }
                    self.said = Some(text);
                }
            }
        }
    }

    /// One look. Gives the number of devices that answer.
    pub async fn look(&mut self) -> Result<usize, ReconcileError> {
        let links = self.netlink.links().await?;
        let addresses = self.host_addresses(&links).await?;
        self.store.update_local(|local| local.addresses = addresses);

        let desired = self.board.observed().desired;
        let mut names = self.datapaths.names();
        names.extend(desired.wireguard.keys().cloned());
        names.extend(links.keys().filter(|name| own::is_device(name)).cloned());
        names.sort();
        names.dedup();
        let mut devices = BTreeMap::new();
        let mut peers = BTreeMap::new();
        for name in names {
            let datapath = self.datapaths.open(&name);
            let device: Option<Device> = datapath.read().await.ok();
            let stats = match device {
                Some(_) => datapath.stats().await.ok().flatten(),
                None => None,
            };
            if let Some(device) = &device {
                peers.extend(self.tracker.observe(&name, device, Instant::now(), SystemTime::now()));
            }
            let link = links.get(&name);
            let (up, mtu) = (link.map(|link| link.up), link.map_or(0, |link| link.mtu));
            let seen = DeviceSeen { up, mtu, device, stats };
            devices.insert(name, seen);
        }
        let answering = devices.values().filter(|seen| seen.up.is_some() && seen.device.is_some()).count();
        self.board.set_devices(devices, peers);
        Ok(answering)
    }

    /// Addresses of this host outside the mesh that others could reach.
    async fn host_addresses(&self, links: &Links) -> Result<Vec<IpAddr>, ReconcileError> {
        let names: BTreeMap<u32, &String> = links.iter().map(|(name, link)| (link.index, name)).collect();
        let request = self.netlink.handle().address().get().execute();
        let dump = self.netlink.dump("addresses", request).await?;
        let outside = |message: &&AddressMessage| {
            let name = names.get(&message.header.index);
            name.is_some_and(|name| !own::is_device(name) && !own::is_veth(name))
        };
        let mut addresses: Vec<IpAddr> = dump.iter().filter(outside).filter_map(address).collect();
        addresses.sort();
        addresses.dedup();
        Ok(addresses)
    }
}

fn address(message: &AddressMessage) -> Option<IpAddr> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => found = Some(*ip),
            AddressAttribute::Address(ip) => found = found.or(Some(*ip)),
            _ => {}
        }
    }
    found.filter(|ip| match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    })
}
