//! What was seen and how it went: the board where reconcilers, the planner and the CNI server leave their
//! outcome, and the pure step from there to the [`Status`] that the sockets tell.

mod peer;
mod peers;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use keyservice::PublicKey;
use mesh_api::status::{
    DeviceStatus, EndpointStatus, Generation, Issue, PeerState, PolicyStatus, ReconcilerStatus,
    RotationStatus, Status,
};
use mesh_uapi::{Device, Offload, Stats};
use tokio::sync::watch;

use crate::desired::Desired;
use crate::heal::Health;
use crate::reconcile::{ReconcileError, Report};
use crate::snapshot::Snapshot;
pub use peer::PeerTracker;

/// Kind and core of a device whose packets the kernel carries.
pub const KERNEL: &str = "kernel";

/// Peers that were or are in trouble, by device and key.
pub type Healths = BTreeMap<(String, PublicKey), Health>;

/// A WireGuard device as it was last read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceSeen {
    /// The link's IFF_UP; `None` when there is no such link.
    pub up: Option<bool>,
    /// The link's MTU, bytes; 0 when there is no link.
    pub mtu: u32,
    /// What the UAPI socket answered; `None` when nobody did.
    pub device: Option<Device>,
    /// The datapath's counters; `None` from an implementation that has none.
    pub stats: Option<Stats>,
    /// Release of the kernel that carries its packets; `None` for a device in user space.
    pub kernel: Option<String>,
}

/// The last pass of a reconciler, successful or not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pass {
    /// Of the plan it worked on.
    pub generation: u64,
    /// It could not even read what is there: nothing was done.
    pub aborted: bool,
    /// What could not be made so.
    pub errors: Vec<ReconcileError>,
    /// Passes since the start that left something undone.
    pub failures: u64,
}

/// Everything on the board at one moment.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// The newest snapshot that was planned.
    pub snapshot: Arc<Snapshot>,
    /// Its plan.
    pub desired: Arc<Desired>,
    /// The reconcilers in the order they run.
    pub reconcilers: Vec<ReconcilerStatus>,
    /// Their last passes, by name.
    pub passes: BTreeMap<String, Pass>,
    /// Issues by who found them; each reporter replaces its own.
    pub issues: BTreeMap<String, Vec<Issue>>,
    /// Devices by name.
    pub devices: BTreeMap<String, DeviceSeen>,
    /// Peers' states by device and key.
    pub peers: BTreeMap<(String, PublicKey), PeerState>,
    /// What was done about peers that do not answer.
    pub health: Healths,
    /// Policies and where they are live.
    pub policies: Vec<PolicyStatus>,
    /// `closed`, `open` or `policed`, by host-side interface.
    pub endpoint_policy: BTreeMap<String, String>,
    /// This node's keys.
    pub rotation: RotationStatus,
}

impl Observed {
    /// How far the sources' state has got.
    pub fn generation(&self) -> Generation {
        Generation {
            snapshot: self.snapshot.generation,
            enforced: self.reconcilers.iter().map(|r| r.generation).min().unwrap_or(0),
            policy: self.reconcilers.iter().find(|r| r.name == "policy").map_or(0, |r| r.generation),
        }
    }

    /// All issues; those of the sources first, each once.
    pub fn all_issues(&self) -> Vec<Issue> {
        let mut all: Vec<Issue> = Vec::new();
        for issue in self.issues.values().flatten() {
            if !all.contains(issue) {
                all.push(issue.clone());
            }
        }
        for reconciler in &self.reconcilers {
            if let Some(error) = &reconciler.error {
                all.push(Issue {
                    object: format!("reconciler {}", reconciler.name),
                    field: String::new(),
                    reason: "ReconcileFailed".to_owned(),
                    message: error.clone(),
                });
            }
        }
        all
    }
}

/// The board. Clones share it.
#[derive(Debug, Clone)]
pub struct Board {
    observed: Arc<watch::Sender<Observed>>,
    started: Instant,
}

impl Board {
    /// An empty board with a pending row for each reconciler, in the order given.
    pub fn new(reconcilers: &[&str]) -> Self {
        let rows = reconcilers.iter().map(|name| pending(name)).collect();
        let observed = Observed { reconcilers: rows, ..Observed::default() };
        Self { observed: Arc::new(watch::Sender::new(observed)), started: Instant::now() }
    }

    /// The board as it is now.
    pub fn observed(&self) -> Observed {
        self.observed.borrow().clone()
    }

    /// A look at the board without a copy of it. Nobody can write meanwhile.
    pub fn look<T>(&self, look: impl FnOnce(&Observed) -> T) -> T {
        look(&self.observed.borrow())
    }

    /// How far the rotation of keys is.
    pub fn rotation(&self) -> RotationStatus {
        self.look(|seen| seen.rotation.clone())
    }

    /// For whoever waits for something to appear on it.
    pub fn subscribe(&self) -> watch::Receiver<Observed> {
        self.observed.subscribe()
    }

    /// A snapshot was planned.
    pub fn planned(&self, snapshot: Arc<Snapshot>, desired: Arc<Desired>, issues: Vec<Issue>) {
        self.observed.send_modify(|seen| {
            seen.snapshot = snapshot;
            seen.desired = desired;
            seen.issues.insert("plan".to_owned(), issues);
        });
    }

    /// A reconciler ended a pass over the plan of this generation.
    pub fn passed(&self, name: &str, generation: u64, outcome: &Result<Report, ReconcileError>) {
        self.observed.send_modify(|seen| {
            let row = row(&mut seen.reconcilers, name);
            let aborted = outcome.is_err();
            let errors = match outcome {
                Ok(report) => {
                    row.operations = row.operations.saturating_add(report.operations);
                    report.errors.as_slice()
                }
                Err(error) => std::slice::from_ref(error),
            };
            if errors.is_empty() {
                row.state = "done".to_owned();
                row.generation = row.generation.max(generation);
                row.error = None;
            } else {
                row.state = "error".to_owned();
                row.error = Some(sentence(errors));
            }
            let pass = seen.passes.entry(name.to_owned()).or_default();
            let failures = pass.failures + u64::from(!errors.is_empty());
            *pass = Pass { generation, aborted, errors: errors.to_vec(), failures };
        });
    }

    /// A reporter's issues, all of them; an empty list takes its former ones back.
    pub fn set_issues(&self, reporter: &str, issues: Vec<Issue>) {
        self.observed.send_if_modified(|seen| {
            if seen.issues.get(reporter).map_or(issues.is_empty(), |old| *old == issues) {
                return false;
            }
            seen.issues.insert(reporter.to_owned(), issues);
            true
        });
    }

    /// The devices as read now, the states of their peers, and what was done about them.
    pub fn set_devices(
        &self,
        devices: BTreeMap<String, DeviceSeen>,
        peers: BTreeMap<(String, PublicKey), PeerState>,
        health: Healths,
    ) {
        self.observed.send_modify(|seen| {
            seen.devices = devices;
            seen.peers = peers;
            seen.health = health;
        });
    }

    /// How far the rotation of keys is.
    pub fn set_rotation(&self, rotation: RotationStatus) {
        self.observed.send_if_modified(|seen| {
            let changed = seen.rotation != rotation;
            seen.rotation = rotation;
            changed
        });
    }

    /// What policy does here.
    pub fn set_policies(&self, policies: Vec<PolicyStatus>, endpoints: BTreeMap<String, String>) {
        self.observed.send_modify(|seen| {
            seen.policies = policies;
            seen.endpoint_policy = endpoints;
        });
    }

    /// The whole answer of `/v1/status`.
    pub fn status(&self, now: SystemTime) -> Status {
        assemble(&self.observed.borrow(), now, self.started.elapsed())
    }
}

/// The first few errors; a thousand equal ones help nobody.
fn sentence(errors: &[ReconcileError]) -> String {
    const TOLD: usize = 3;
    let told: Vec<String> = errors.iter().take(TOLD).map(ReconcileError::to_string).collect();
    let more = errors.len().saturating_sub(TOLD);
    let tail = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    told.join("; ") + &tail
}

fn pending(name: &str) -> ReconcilerStatus {
    ReconcilerStatus {
        name: name.to_owned(),
        state: "pending".to_owned(),
        generation: 0,
        operations: 0,
        error: None,
    }
}

fn row<'a>(rows: &'a mut Vec<ReconcilerStatus>, name: &str) -> &'a mut ReconcilerStatus {
    let at = rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
        rows.push(pending(name));
        rows.len() - 1
    });
    &mut rows[at]
}

/// From the board to the answer. Pure.
pub fn assemble(seen: &Observed, now: SystemTime, uptime: Duration) -> Status {
    Status {
        node: seen.snapshot.local.node_name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: uptime.as_secs(),
        generation: seen.generation(),
        devices: devices(seen),
        peers: peers::peers(seen, now),
        sources: seen.snapshot.sources.clone(),
        reconcilers: seen.reconcilers.clone(),
        endpoints: endpoints(seen),
        issues: seen.all_issues(),
        rotation: seen.rotation.clone(),
        announcement_trust: match seen.snapshot.cluster.mesh.first_use {
            true => "trust-on-first-use",
            false => "admission",
        }
        .to_owned(),
    }
}

fn devices(seen: &Observed) -> Vec<DeviceStatus> {
    let absent = DeviceSeen::default();
    let wanted = seen.desired.wireguard.iter().map(|(name, wanted)| {
        let actual = seen.devices.get(name).unwrap_or(&absent);
        let key = actual.device.as_ref().and_then(|device| device.public_key).unwrap_or(wanted.public_key);
        device(name, actual, Some(key.to_string()), wanted.listen_port)
    });
    let others = seen.devices.iter().filter(|(name, _)| !seen.desired.wireguard.contains_key(*name));
    let others = others.map(|(name, actual)| {
        let key = actual.device.as_ref().and_then(|device| device.public_key);
        device(name, actual, key.map(|key| key.to_string()), 0)
    });
    wanted.chain(others).collect()
}

fn device(name: &str, seen: &DeviceSeen, public_key: Option<String>, wanted_port: u16) -> DeviceStatus {
    let state = match (seen.up, &seen.device) {
        (None, _) | (_, None) => "absent",
        (Some(true), Some(_)) => "up",
        (Some(false), Some(_)) => "down",
    };
    let mut stats = seen.stats.clone().unwrap_or_default();
    if let Some(release) = &seen.kernel {
        (stats.version, stats.core) = (release.clone(), KERNEL.to_owned());
    }
    DeviceStatus {
        name: name.to_owned(),
        kind: if seen.kernel.is_some() { KERNEL } else { "userspace" }.to_owned(),
        state: state.to_owned(),
        public_key,
        listen_port: seen.device.as_ref().map_or(wanted_port, |device| device.listen_port),
        mtu: seen.mtu,
        version: stats.version,
        core: stats.core,
        crypto: stats.crypto,
        offloads: stats.offloads.into_iter().map(|(name, state)| (name, sentence_of(&state))).collect(),
        drops: stats.drops,
    }
}

/// For people: the error by name, not only by number.
pub fn sentence_of(state: &Offload) -> String {
    let error = |errno: i32| std::io::Error::from_raw_os_error(errno);
    match state {
        Offload::Refused(errno) => format!("refused: {}", error(*errno)),
        Offload::Below(bytes, errno) => format!("below {bytes} bytes: {}", error(*errno)),
        state => state.to_string(),
    }
}

fn endpoints(seen: &Observed) -> Vec<EndpointStatus> {
    let endpoints = seen.snapshot.endpoints.iter().map(|(interface, endpoint)| EndpointStatus {
        pod: endpoint.pod.to_string(),
        interface: interface.clone(),
        addresses: endpoint.ips.clone(),
        policy: seen.endpoint_policy.get(interface).cloned().unwrap_or_else(|| "closed".to_owned()),
    });
    let mut endpoints: Vec<_> = endpoints.collect();
    endpoints.sort_by(|a, b| (&a.pod, &a.interface).cmp(&(&b.pod, &b.interface)));
    endpoints
}

#[cfg(test)]
mod tests;
