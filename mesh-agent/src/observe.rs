//! Looks at what no event tells: the WireGuard devices, who is behind them, and the host's own addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use keyservice::PublicKey;
use mesh_api::status::Issue;
use mesh_uapi::Device;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::warn;

use crate::desired::Desired;
use crate::heal::{Healer, Health};
use crate::learned::{self, Learned};
use crate::own;
use crate::reconcile::ReconcileError;
use crate::reconcile::netlink::{Links, Netlink, WIREGUARD};
use crate::status::{Board, DeviceSeen, Healths, PeerTracker};
use crate::store::Store;
use crate::wireguard::Datapaths;

/// Between two looks; more where a look takes long, as with a thousand peers, so that a node at rest is at rest.
const PERIOD: Duration = Duration::from_secs(1);
/// The longest between two looks: what is silent has to be noticed in time.
const LONGEST: Duration = Duration::from_secs(2);
/// Between two writes of the learned endpoints' file.
const WRITES: Duration = Duration::from_secs(10);

/// Reads the devices and puts what it sees on the board and in the store.
pub struct Observer {
    netlink: Netlink,
    datapaths: Box<dyn Datapaths>,
    tracker: PeerTracker,
    healer: Healer,
    memory: Memory,
    board: Board,
    store: Store,
    said: Option<String>,
    /// Of this kernel.
    release: String,
}

/// The file of learned endpoints, and what is in it.
struct Memory {
    path: PathBuf,
    written: Learned,
    next: Instant,
}

impl Observer {
    /// Over these.
    /// `learned` is the file of learned endpoints; what the store has of them is what was in it.
    pub fn new(
        netlink: Netlink,
        datapaths: Box<dyn Datapaths>,
        board: Board,
        store: Store,
        learned: PathBuf,
    ) -> Self {
        let written = store.current().local.learned_endpoints.clone();
        let memory = Memory { path: learned, written, next: Instant::now() };
        let (tracker, healer) = (PeerTracker::default(), Healer::default());
        let release =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        Self { netlink, datapaths, tracker, healer, memory, board, store, said: None, release }
    }

    /// Looks for ever; `appeared` is told when a device comes back, so that nobody waits for a timer.
    pub async fn run(mut self, appeared: Arc<Notify>) {
        let mut before = 0;
        let mut pause = Duration::ZERO;
        loop {
            sleep(pause).await;
            let start = Instant::now();
            let looked = self.look().await;
            pause = (start.elapsed() * 100).clamp(PERIOD, LONGEST);
            match looked {
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
            match &device {
                Some(device) => {
                    let (now, wall) = (Instant::now(), SystemTime::now());
                    peers.extend(self.tracker.observe(&name, device, now, wall));
                    self.healer.observe(&name, device, now, wall);
                }
                None => self.healer.device_lost(&name),
            }
            let link = links.get(&name);
            let (up, mtu) = (link.map(|link| link.up), link.map_or(0, |link| link.mtu));
            let kernel = link.filter(|link| link.kind == WIREGUARD).map(|_| self.release.clone());
            let seen = DeviceSeen { up, mtu, device, stats, kernel };
            devices.insert(name, seen);
        }
        let answering = devices.values().filter(|seen| seen.up.is_some() && seen.device.is_some()).count();
        self.feed_back(addresses, present(&links), &desired, &devices).await;
        let health = self.healer.health(Instant::now());
        self.board.set_issues("heal", silent(&desired, &devices, &health));
        self.board.set_devices(devices, peers, health);
        Ok(answering)
    }

    /// What the devices have learned is a source like any other: in one change, so that it is planned once.
    async fn feed_back(
        &mut self,
        addresses: Vec<IpAddr>,
        present: BTreeSet<String>,
        desired: &Desired,
        devices: &BTreeMap<String, DeviceSeen>,
    ) {
        let local = &self.store.current().local;
        let wanted = |key: &_| {
            !desired.prune || desired.wireguard.values().any(|device| device.peers.contains_key(key))
        };
        let answered = devices.values().filter_map(|seen| seen.device.as_ref());
        let learned = learned::merge(&local.learned_endpoints, answered, wanted, SystemTime::now());
        self.healer.retain(wanted);
        let reach = self.healer.reach();
        self.memory.keep(&learned).await;
        self.store.update_local(|local| {
            local.addresses = addresses;
            local.devices = present;
            local.learned_endpoints = learned;
            local.reach = reach;
        });
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

/// The tunnel devices there are.
pub fn present(links: &Links) -> BTreeSet<String> {
    links.keys().filter(|name| own::is_device(name)).cloned().collect()
}

impl Memory {
    /// Writes the file if it is out of date, and not all the time.
    async fn keep(&mut self, learned: &Learned) {
        if *learned == self.written || Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + WRITES;
        let (path, copy) = (self.path.clone(), learned.clone());
        match spawn_blocking(move || learned::store(&path, &copy)).await {
            Ok(Ok(())) => self.written = learned.clone(),
            Ok(Err(error)) => warn!("{error}: learned endpoints are not kept"),
            Err(error) => warn!("{error}"),
        }
    }
}

/// What to tell of peers that did not come back at once.
fn silent(desired: &Desired, devices: &BTreeMap<String, DeviceSeen>, health: &Healths) -> Vec<Issue> {
    let issue = |((device, key), health): (&(String, PublicKey), &Health)| {
        health.silent.filter(|(_, tries)| *tries > 1)?;
        let peer = desired.wireguard.get(device)?.peers.get(key)?;
        let seen = devices.get(device).and_then(|seen| seen.device.as_ref()?.peers.get(key)?.endpoint);
        let at = seen.map(|endpoint| format!(" at {endpoint}")).unwrap_or_default();
        Some(Issue {
            object: format!("Node/{}", peer.name),
            field: String::new(),
            reason: "PeerSilent".to_owned(),
            message: format!("nothing is heard of it{at} through {device}, though it is sent to"),
        })
    };
    health.iter().filter_map(issue).collect()
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
