//! From the plan's policy to the kernel: programs on every pod's veth and on the tunnel devices, maps that
//! hold what was compiled.
//!
//! A program that knows nothing of its device lets nothing through, so a pod's interface is never detached
//! while it exists: superfluous is closed. When programs cannot be loaded at all, pods that are policed
//! stay so (programs and maps are pinned) and new ones are refused.

mod describe;
pub mod events;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebpf_policy::model::{LocalEndpoint, PodRef, Ranges};
use ebpf_policy::{Attached, Compiled, Counter, Enforcer, Error, Events, Framing, Options, Role, compile};
use futures::future::BoxFuture;
use netlink_packet_route::link::LinkLayerType;
use tokio::sync::Notify;

use super::netlink::{Links, Netlink};
use super::{ReconcileError, Reconciler, Report, Stage};
use crate::cni::Gate;
use crate::desired::{self, Desired};
use crate::status::Board;

/// The programs and maps, shared by the reconciler, the CNI server, the event reader and the metrics.
#[derive(Debug)]
pub struct Engine {
    pin_dir: PathBuf,
    state: Mutex<State>,
    opened: Notify,
}

#[derive(Debug)]
struct State {
    enforcer: Result<Enforcer, String>,
    /// What was applied last, for the names in it.
    applied: Arc<Compiled>,
}

impl Engine {
    /// Loads the programs, or adopts what an earlier agent pinned below `pin_dir`. A failure is kept: pods
    /// are refused with it, and each pass of the reconciler tries again.
    pub fn open(pin_dir: &Path) -> Arc<Self> {
        let enforcer = open(pin_dir);
        if let Err(error) = &enforcer {
            tracing::error!("policy cannot be enforced, so no pod is admitted: {error}");
        }
        let state = State { enforcer, applied: Arc::default() };
        Arc::new(Self { pin_dir: pin_dir.to_owned(), state: Mutex::new(state), opened: Notify::new() })
    }

    /// Takes everything of ours out of the kernel.
    ///
    /// # Errors
    /// Says what is left.
    pub fn cleanup(pin_dir: &Path) -> Result<(), Error> {
        Enforcer::cleanup(pin_dir)
    }

    /// Packets and bytes per endpoint, direction and reason; empty while nothing is loaded.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn counters(&self) -> Result<Vec<Counter>, Error> {
        self.state().enforcer.as_ref().map_or_else(|_| Ok(Vec::new()), Enforcer::counters)
    }

    /// Denied packets that nobody was told of, because the buffer was full.
    pub fn events_lost(&self) -> u64 {
        self.state().enforcer.as_ref().map_or(0, |enforcer| enforcer.events_lost().unwrap_or(0))
    }

    /// What was applied last.
    pub fn applied(&self) -> Arc<Compiled> {
        Arc::clone(&self.state().applied)
    }

    /// The stream of denied packets, once programs are loaded. One reader at a time.
    async fn events(&self) -> Result<Events, Error> {
        loop {
            let opened = self.opened.notified();
            if let Ok(enforcer) = &self.state().enforcer {
                return enforcer.events();
            }
            opened.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries to load the programs if they are not.
    fn ensure_open(&self, state: &mut State) -> Result<(), ReconcileError> {
        if state.enforcer.is_err() {
            state.enforcer = open(&self.pin_dir);
            self.opened.notify_waiters();
        }
        let unavailable = |error: &String| ReconcileError::new("policy engine", error);
        state.enforcer.as_ref().map(|_| ()).map_err(unavailable)
    }
}

fn open(pin_dir: &Path) -> Result<Enforcer, String> {
    let options = Options::new(pin_dir);
    let opened = match Enforcer::open(&options) {
        Err(error @ Error::Incompatible { .. }) => {
            tracing::warn!(
                "an earlier agent's policy maps cannot be adopted, so pods are closed for a moment: {error}"
            );
            Enforcer::open(&Options { replace_incompatible: true, ..options })
        }
        other => other,
    };
    opened.map_err(|error| chain(&error))
}

/// An error with what is behind it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let words = source.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = source.source();
    }
    text
}

impl Gate for Engine {
    fn ready(&self) -> Result<(), String> {
        let state = self.state();
        state.enforcer.as_ref().map(|_| ()).map_err(|error| format!("policy cannot be enforced: {error}"))
    }

    fn attach_closed(&self, interface: &str) -> Result<(), String> {
        match &mut self.state().enforcer {
            Ok(enforcer) => enforcer.attach_pod(interface).map_err(|error| chain(&error)),
            Err(error) => Err(error.clone()),
        }
    }

    fn forget(&self, _interface: &str) -> Result<(), String> {
        match &mut self.state().enforcer {
            Ok(enforcer) => enforcer.forget_vanished().map_err(|error| chain(&error)),
            Err(_) => Ok(()),
        }
    }
}

/// Keeps policy as desired.
#[derive(Debug)]
pub struct PolicyReconciler {
    engine: Arc<Engine>,
    board: Board,
    netlink: Netlink,
    /// What the last plan compiled to.
    compiled: Option<(Arc<desired::Policy>, Arc<Compiled>)>,
}

impl PolicyReconciler {
    /// On these programs; what it finds out goes to the board.
    pub fn new(engine: Arc<Engine>, board: Board, netlink: Netlink) -> Self {
        Self { engine, board, netlink, compiled: None }
    }

    fn pass(&mut self, desired: &Desired, links: &Links) -> Result<Report, ReconcileError> {
        let mut compiled = self.compile(&desired.policy);
        let engine = Arc::clone(&self.engine);
        let mut state = engine.state();
        engine.ensure_open(&mut state)?;
        let State { enforcer: Ok(enforcer), applied } = &mut *state else {
            return Err(ReconcileError::new("policy engine", "is not loaded"));
        };
        let mut report = Report::default();
        let maps = |error: Error| ReconcileError::new("policy maps", chain(&error));
        enforcer.forget_vanished().map_err(maps)?;
        let attached = enforcer.attached().map_err(maps)?;
        let mut watched = true;
        for (name, role) in wanting(&desired.policy, &attached, links) {
            let outcome = enforcer.attach(name, role);
            watched &= outcome.is_ok() || role == Role::Pod;
            report
                .record(outcome.map_err(|error| ReconcileError::new(format!("link {name}"), chain(&error))));
        }
        if !watched {
            // By one of the ways out nobody would judge what goes to Services.
            compiled = Arc::new(Compiled::clone(&compiled).without_services());
        }
        if !desired.prune {
            // Not everything has been read. Pods that a predecessor policed must not be closed for want of
            // objects that are about to be read: what it enforced stays, and new pods stay closed.
            return Ok(report);
        }
        for device in superfluous(&desired.policy, &attached) {
            let detached = enforcer.detach(device);
            report.record(
                detached.map_err(|error| ReconcileError::new(format!("link {device}"), chain(&error))),
            );
        }
        match enforcer.apply(&compiled) {
            Ok(done) => report.operations += (done.written + done.removed) as u64,
            Err(error) => {
                // What could not be written is closed, whatever the maps were to say.
                let closed = desired.policy.endpoints.keys().map(|name| (name.clone(), "closed".to_owned()));
                self.board.set_policies(self.board.observed().policies, closed.collect());
                return Err(maps(error));
            }
        }
        *applied = Arc::clone(&compiled);
        drop(state);
        let (policies, endpoints) = describe::describe(desired, &compiled, &report.errors);
        self.board.set_policies(policies, endpoints);
        Ok(report)
    }

    fn compile(&mut self, policy: &Arc<desired::Policy>) -> Arc<Compiled> {
        if let Some((of, compiled)) = &self.compiled
            && of == policy
        {
            return Arc::clone(compiled);
        }
        let compiled = Arc::new(compile(&policy.view, &local_endpoints(policy), &ranges(policy)));
        self.compiled = Some((Arc::clone(policy), Arc::clone(&compiled)));
        compiled
    }
}

impl Reconciler for PolicyReconciler {
    fn name(&self) -> &'static str {
        "policy"
    }

    fn stage(&self) -> Stage {
        Stage::Policy
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let links = self.netlink.links().await?;
            self.pass(desired, &links)
        })
    }
}

/// Devices that are there and lack our programs, and what they are. A pod's interface that is gone waits for its DEL, a
/// tunnel device for its datapath. Every other device is a way out.
fn wanting<'a>(policy: &'a desired::Policy, attached: &[Attached], links: &'a Links) -> Vec<(&'a str, Role)> {
    let role = |name: &str, layer: LinkLayerType| {
        if policy.endpoints.contains_key(name) {
            return Role::Pod;
        }
        match layer {
            _ if policy.tunnels.contains(name) => Role::Tunnel,
            LinkLayerType::Ether => Role::Exit(Framing::Ethernet),
            _ => Role::Exit(Framing::Ip),
        }
    };
    let lacks = |name: &str, role: Role| {
        let found = attached.iter().find(|of| of.ifname == name).map(|of| of.role);
        // A pod's interface whose pod is not known here keeps what it has.
        found.is_none_or(|found| found != role && matches!(role, Role::Pod | Role::Tunnel))
    };
    links
        .iter()
        .filter(|(_, link)| link.layer != LinkLayerType::Loopback)
        .map(|(name, link)| (name.as_str(), role(name, link.layer)))
        .filter(|(name, role)| lacks(name, *role))
        .collect()
}

/// Tunnel devices that are none any more. Pods' interfaces stay as they are: see the module.
fn superfluous<'a>(policy: &desired::Policy, attached: &'a [Attached]) -> Vec<&'a str> {
    let gone = attached.iter().filter(|of| of.role == Role::Tunnel && !policy.tunnels.contains(&of.ifname));
    gone.map(|of| of.ifname.as_str()).collect()
}

fn local_endpoints(policy: &desired::Policy) -> Vec<LocalEndpoint> {
    let there = policy.endpoints.iter().filter(|(_, endpoint)| endpoint.ifindex != 0);
    let endpoints = there.map(|(ifname, endpoint)| LocalEndpoint {
        ifindex: endpoint.ifindex,
        ifname: ifname.clone(),
        pod: Some(PodRef { namespace: endpoint.pod.namespace.clone(), name: endpoint.pod.name.clone() }),
        ips: endpoint.ips.clone(),
    });
    endpoints.collect()
}

fn ranges(policy: &desired::Policy) -> Ranges {
    Ranges {
        remote: policy.remote_ranges.iter().copied().collect(),
        own: policy.own_ranges.iter().copied().collect(),
    }
}

#[cfg(test)]
mod tests;
