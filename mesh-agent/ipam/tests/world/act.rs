//! What an agent does in a case, one thing at a time, as a future that may be dropped at any call.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use mesh_ipam::catalogue::Ask;
use mesh_ipam::collect::{OwnView, PodView, View, collect};
use mesh_ipam::memory::Client;
use mesh_ipam::node::{Local, Site};
use mesh_ipam::store::{Scope, Store};
use mesh_ipam::{Family, IpamError};

use super::{Api, GRACE, Machine, pod_handle};

#[derive(Debug, Clone)]
pub enum Act {
    /// A pod of this name, asking for these addresses.
    Add {
        name: String,
        ips: Vec<IpAddr>,
        pools: Vec<String>,
        crash_before_answer: bool,
    },
    /// The pod of this uid goes.
    Delete(String),
    Maintain,
    Sweep,
}

/// What was given, for the laws.
#[derive(Debug)]
pub struct Done {
    pub error: Option<IpamError>,
    pub given: Vec<IpAddr>,
    /// The agent dies now.
    pub dies: bool,
}

impl Done {
    fn well() -> Self {
        Self { error: None, given: Vec::new(), dies: false }
    }

    fn failed(error: IpamError) -> Self {
        Self { error: Some(error), ..Self::well() }
    }
}

pub async fn act(
    machine: &mut Machine,
    store: &Client<'_>,
    api: &Mutex<Api>,
    now: Duration,
    act: Act,
) -> Done {
    let Some(agent) = machine.agent.as_mut() else { return Done::well() };
    let node = machine.identity.node.clone();
    let uid = api.lock().unwrap().nodes.get(&node).cloned().filter(|_| !machine.cut_off);
    let blocked: BTreeSet<IpAddr> = BTreeSet::new();
    let (leases, freed) = {
        let disk = machine.disk.lock().unwrap();
        (disk.leases.clone(), disk.freed.clone())
    };
    let site = Site { catalogue: &machine.catalogue, labels: &machine.labels, node_uid: uid.as_deref() };
    let local = Local { leases: &leases, blocked: &blocked, freed: &freed };
    match act {
        Act::Add { name, ips, pools, crash_before_answer } => {
            let ask = Ask { ips, ipv4_pools: pools, ..Ask::default() };
            let ips = match agent.demand(store, now, &site, &ask, &local).await {
                Ok(ips) => ips,
                Err(error) => return Done::failed(error),
            };
            let uid = format!("pod{}", api.lock().unwrap().fresh());
            let mut disk = machine.disk.lock().unwrap();
            if disk.full {
                return Done::well();
            }
            for ip in &ips {
                let before = disk.leases.insert(*ip, pod_handle(&name, &uid));
                assert!(before.is_none(), "{node} gives {ip} twice");
                disk.freed.retain(|old| old != ip);
            }
            if crash_before_answer {
                return Done { dies: true, ..Done::well() };
            }
            disk.interfaces.insert(uid.clone());
            // The object is there; its status says the addresses later.
            let pod =
                PodView { namespace: "default".into(), name, uid, node, ips: Vec::new(), finished: false };
            if machine.replaced.is_none() {
                api.lock().unwrap().pods.push(pod);
            }
            Done { given: ips, ..Done::well() }
        }
        Act::Delete(uid) => {
            let mut disk = machine.disk.lock().unwrap();
            disk.interfaces.remove(&uid);
            let ips: Vec<IpAddr> =
                disk.leases.iter().filter(|(_, handle)| handle.uid == uid).map(|(ip, _)| *ip).collect();
            for ip in ips {
                disk.leases.remove(&ip);
                disk.freed.push(ip);
            }
            Done::well()
        }
        Act::Maintain => {
            let done = agent.maintain(store, now, &site, &local).await;
            if let Err(error) = done {
                return Done::failed(error);
            }
            for family in Family::ALL {
                if let Err(error) = agent.tunnel(now, family, &site, &local) {
                    return Done::failed(error);
                }
            }
            Done::well()
        }
        Act::Sweep => {
            let listing = match store.list(Scope::All).await {
                Ok(listing) => listing,
                Err(error) => return Done::failed(error.into()),
            };
            let blocks: Vec<_> = listing.blocks.into_iter().map(|stored| stored.block).collect();
            let (nodes, pods) = {
                let api = api.lock().unwrap();
                (api.nodes.keys().cloned().collect(), api.pods.clone())
            };
            let holdings = agent.holdings().clone();
            let live: BTreeSet<IpAddr> = leases.keys().chain(&holdings.tunnels).copied().collect();
            let own = OwnView { identity: &machine.identity, holdings: &holdings, live: &live };
            let view = View { blocks: &blocks, pods: &pods, nodes: &nodes, own };
            let found = collect(&view, now, &GRACE, &machine.observations);
            machine.observations = found.observations.clone();
            match agent.sweep(store, &found).await {
                Ok(_) => Done::well(),
                Err(error) => Done::failed(error),
            }
        }
    }
}
