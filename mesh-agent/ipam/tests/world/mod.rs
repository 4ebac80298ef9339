//! Machines with a disk each, an API server with objects, and hands that do to both whatever happens.

pub mod act;
pub mod law;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use mesh_ipam::catalogue::{Catalogue, Object};
use mesh_ipam::collect::{Grace, Observations, PodView};
use mesh_ipam::holdings::{Holdings, Identity, Ledger};
use mesh_ipam::memory::{Fault, Memory};
use mesh_ipam::node::{NodeAllocator, Settings};
use mesh_ipam::object::{Handle, HandleKind};
use mesh_ipam::selector::Labels;
use serde_json::{Value, json};

pub const GRACE: Grace = Grace {
    gone: Duration::from_secs(75 * 60),
    stray: Duration::from_secs(10 * 60),
    step: Duration::from_secs(40 * 60),
};
pub const SETTINGS: Settings = Settings { low: 2, high: 4, attempts: 6, trust: Duration::from_secs(60 * 60) };

/// xorshift64*: the interleaving of a case follows from its seed.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize) % n
    }

    pub fn percent(&mut self, n: usize) -> bool {
        self.below(100) < n
    }
}

/// What survives a crash of the agent.
#[derive(Debug, Default)]
pub struct Disk {
    pub holdings: Vec<u8>,
    /// The journal.
    pub leases: BTreeMap<IpAddr, Handle>,
    pub freed: Vec<IpAddr>,
    /// Uids of the pods whose interface is there.
    pub interfaces: BTreeSet<String>,
    pub full: bool,
}

#[derive(Debug, Clone)]
pub struct Drive(pub Arc<Mutex<Disk>>);

impl Ledger for Drive {
    fn save(&mut self, holdings: &Holdings) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        disk.holdings = holdings.encode().unwrap();
        Ok(())
    }
}

/// One machine.
#[derive(Debug)]
pub struct Machine {
    pub identity: Identity,
    pub boot: u32,
    pub disk: Arc<Mutex<Disk>>,
    /// The agent; `None` once the machine is destroyed.
    pub agent: Option<NodeAllocator<Drive>>,
    pub observations: Observations,
    /// Pools as this machine has last heard of them.
    pub catalogue: Catalogue,
    pub labels: Labels,
    pub cut_off: bool,
    /// Another machine bears its name now, since then.
    pub replaced: Option<Duration>,
}

impl Machine {
    fn new(node: &str, instance: usize, catalogue: Catalogue) -> Self {
        let mut machine = Self {
            identity: Identity { node: node.to_owned(), instance: instance.to_string() },
            boot: 0,
            disk: Arc::default(),
            agent: None,
            observations: Observations::default(),
            catalogue,
            labels: Labels::new(),
            cut_off: false,
            replaced: None,
        };
        machine.start();
        machine
    }

    /// The agent starts: leases without an interface are dropped, as the journal does it.
    pub fn start(&mut self) {
        let holdings = {
            let mut disk = self.disk.lock().unwrap();
            let Disk { leases, interfaces, freed, .. } = &mut *disk;
            leases.retain(|ip, handle| {
                let stays = interfaces.contains(&handle.uid);
                if !stays {
                    freed.push(*ip);
                }
                stays
            });
            Holdings::decode(&disk.holdings).unwrap_or_default()
        };
        self.observations = Observations::default();
        let boot = format!("boot {}", self.boot);
        let drive = Drive(self.disk.clone());
        self.agent = Some(NodeAllocator::new(self.identity.clone(), &boot, holdings, drive, SETTINGS));
    }

    /// The machine starts: all its pods are gone.
    pub fn reboot(&mut self) {
        self.boot += 1;
        self.disk.lock().unwrap().interfaces.clear();
        self.start();
    }

    pub fn delete_pods(&self) {
        let mut disk = self.disk.lock().unwrap();
        disk.interfaces.clear();
        let ips: Vec<IpAddr> = std::mem::take(&mut disk.leases).into_keys().collect();
        disk.freed.extend(ips);
    }
}

/// The API server's other objects.
#[derive(Debug, Default)]
pub struct Api {
    /// Node name to uid.
    pub nodes: BTreeMap<String, String>,
    /// Since when a node that was there is not.
    pub absent: BTreeMap<String, Duration>,
    pub pods: Vec<PodView>,
    pub pools: BTreeMap<String, Value>,
    pub reserved: Vec<String>,
    pub made: usize,
}

impl Api {
    pub fn catalogue(&self) -> Catalogue {
        let pools: Vec<Object> = self
            .pools
            .iter()
            .map(|(name, spec)| Object { name: name.clone(), created: 0, spec: spec.clone() })
            .collect();
        let reserved = json!({"reservedCIDRs": self.reserved});
        let (catalogue, issues) =
            Catalogue::read(&pools, &[Object { name: "r".into(), created: 0, spec: reserved }]);
        assert!(issues.is_empty(), "{issues:?}");
        catalogue
    }

    pub fn fresh(&mut self) -> usize {
        self.made += 1;
        self.made
    }
}

pub struct World {
    pub memory: Memory,
    pub api: Mutex<Api>,
    pub machines: Vec<Machine>,
    pub now: Duration,
    pub dice: Dice,
    /// Chance in percent that a call goes wrong.
    pub trouble: usize,
}

impl World {
    pub fn new(seed: u64, nodes: usize) -> Self {
        let mut api = Api::default();
        api.pools.insert("four".into(), json!({"cidr": "10.0.0.0/26", "blockSize": 29}));
        api.pools.insert("six".into(), json!({"cidr": "fd00::/120", "blockSize": 125}));
        api.pools
            .insert("more".into(), json!({"cidr": "10.0.1.0/28", "blockSize": 30, "allowBorrowing": false}));
        api.reserved = vec!["10.0.0.8/29".into(), "10.0.0.17/32".into(), "fd00::5/128".into()];
        let mut machines = Vec::new();
        for at in 0..nodes {
            let name = format!("n{at}");
            let uid = format!("uid{}", api.fresh());
            api.nodes.insert(name.clone(), uid);
            let instance = api.fresh();
            machines.push(Machine::new(&name, instance, api.catalogue()));
        }
        Self {
            memory: Memory::default(),
            api: Mutex::new(api),
            machines,
            now: Duration::from_secs(1),
            dice: Dice::new(seed),
            trouble: 12,
        }
    }

    /// What its calls meet.
    pub fn faults(&mut self, machine: usize) -> impl FnMut() -> Option<Fault> + Send + use<> {
        let mut dice = Dice::new(self.dice.below(usize::MAX / 2) as u64);
        let (trouble, cut_off) = (self.trouble, self.machines[machine].cut_off);
        move || {
            if cut_off {
                return Some(Fault::Lost);
            }
            if !dice.percent(trouble) {
                return None;
            }
            let faults = [Fault::Lost, Fault::AnswerLost, Fault::Overtaken, Fault::Overtaken, Fault::Refused];
            Some(faults[dice.below(faults.len())])
        }
    }

    /// A machine under `name`, built anew; the former one is destroyed, or goes on cut off.
    pub fn rebuild(&mut self, old: usize, destroyed: bool, new_uid: bool) {
        let name = self.machines[old].identity.node.clone();
        if destroyed {
            self.machines[old].agent = None;
        } else {
            self.machines[old].cut_off = true;
        }
        self.machines[old].replaced = Some(self.now);
        let api = self.api.get_mut().unwrap();
        api.pods.retain(|pod| pod.node != name);
        api.absent.remove(&name);
        if new_uid || !api.nodes.contains_key(&name) {
            let uid = format!("uid{}", api.fresh());
            api.nodes.insert(name.clone(), uid);
        }
        let instance = api.fresh();
        let catalogue = api.catalogue();
        self.machines.push(Machine::new(&name, instance, catalogue));
    }

    /// Whether others may have taken the machine for gone by now: its pods are no pods of the cluster's.
    pub fn is_outcast(&self, machine: &Machine) -> bool {
        let absent = self.api.lock().unwrap().absent.get(&machine.identity.node).copied();
        let since = machine.replaced.or(absent);
        since.is_some_and(|since| self.now.saturating_sub(since) >= GRACE.gone)
    }
}

pub fn pod_handle(name: &str, uid: &str) -> Handle {
    Handle {
        kind: HandleKind::Pod,
        namespace: "default".into(),
        name: name.into(),
        uid: uid.into(),
        ..Handle::tunnel()
    }
}

/// What an agent is at.
pub type Running<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Polls once.
pub fn poll<T>(future: &mut Running<'_, T>) -> Option<T> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}
