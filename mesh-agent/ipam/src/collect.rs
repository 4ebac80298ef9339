//! What nobody uses any more and nobody will give back: leaks. Pure: from what is seen, and what was seen
//! before, to what may be freed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::block::Block;
use crate::holdings::{Holdings, Identity};
use crate::object::{Allocation, Handle, HandleKind};

/// A pod as the API server has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodView {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `spec.nodeName`, or empty.
    pub node: String,
    /// Every entry of `status.podIPs`; none for a pod on the host's network.
    pub ips: Vec<IpAddr>,
    /// Phase Succeeded or Failed.
    pub finished: bool,
}

/// What the own node knows besides.
#[derive(Debug, Clone, Copy)]
pub struct OwnView<'a> {
    /// Who we are.
    pub identity: &'a Identity,
    /// What is ours.
    pub holdings: &'a Holdings,
    /// Addresses in use here: the journal's, every interface's of ours, the tunnel's.
    pub live: &'a BTreeSet<IpAddr>,
}

/// What is seen. Blocks are read first: what came into being after that is in the later lists.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Every block.
    pub blocks: &'a [Block],
    /// Every pod. Only a complete list may be given.
    pub pods: &'a [PodView],
    /// The names of all Nodes. Only a complete list may be given.
    pub nodes: &'a BTreeSet<String>,
    /// This node.
    pub own: OwnView<'a>,
}

/// How long a suspicion must last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grace {
    /// For addresses of nodes that are gone, or were built anew. It must be longer than every node's
    /// [`crate::node::Settings::trust`]: a node that was cut off gives addresses that long.
    pub gone: Duration,
    /// For what bears this machine's own name and is not its own: an answer that was lost.
    pub stray: Duration,
    /// The most that one look adds, however much time the clock says has passed.
    pub step: Duration,
}

impl Default for Grace {
    fn default() -> Self {
        Self {
            gone: Duration::from_secs(4500),
            stray: Duration::from_secs(600),
            step: Duration::from_secs(300),
        }
    }
}

/// Why an address looks leaked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leak {
    /// Its Node is not there.
    NodeGone,
    /// It is a former machine's of this node's name.
    Rebuilt,
    /// It is this machine's by the block, and the machine does not know it.
    Stray,
}

/// What is suspected.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Address(IpAddr, Allocation),
    Block(IpNet, String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    renewals: u32,
    last: Duration,
    lasted: Duration,
    looks: u32,
}

/// Suspicions, from one look to the next. They begin anew with the agent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observations(BTreeMap<Subject, Seen>);

/// An address to free, as long as the block still says this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The block.
    pub block: IpNet,
    /// Its renewals when the decision was taken.
    pub renewals: u32,
    /// The address.
    pub ip: IpAddr,
    /// What the block says of it.
    pub entry: Allocation,
    /// Why.
    pub leak: Leak,
}

/// A block whose node is gone, to be deleted if it is empty, else to be nobody's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// The block.
    pub block: IpNet,
    /// Its renewals when the decision was taken.
    pub renewals: u32,
    /// The node it belongs to.
    pub node: String,
}

/// What a look comes to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    /// Addresses to free.
    pub releases: Vec<Release>,
    /// Blocks to let go.
    pub orphans: Vec<Orphan>,
    /// For the next look.
    pub observations: Observations,
}

/// Looks, at the time `now` of a clock. It may jump: backwards it adds nothing, forwards at most a step.
pub fn collect(view: &View<'_>, now: Duration, grace: &Grace, before: &Observations) -> Collected {
    let index = PodIndex::new(view.pods);
    let mut out = Collected::default();
    for block in view.blocks {
        for (ip, entry) in &block.allocations {
            let Some(leak) = suspicion(view, &index, *ip, entry) else { continue };
            let needed = if leak == Leak::Stray { grace.stray } else { grace.gone };
            let subject = Subject::Address(*ip, entry.clone());
            if out.observations.look(before, subject, block.renewals, now, grace.step, needed) {
                out.releases.push(Release {
                    block: block.cidr,
                    renewals: block.renewals,
                    ip: *ip,
                    entry: entry.clone(),
                    leak,
                });
            }
        }
        if let Some(node) = block.affinity.as_ref().filter(|node| !view.nodes.contains(*node)) {
            let subject = Subject::Block(block.cidr, node.clone());
            if out.observations.look(before, subject, block.renewals, now, grace.step, grace.gone) {
                out.orphans.push(Orphan { block: block.cidr, renewals: block.renewals, node: node.clone() });
            }
        }
    }
    out
}

impl Observations {
    /// Adds a look; whether the suspicion has lasted long enough.
    fn look(
        &mut self,
        before: &Self,
        subject: Subject,
        renewals: u32,
        now: Duration,
        step: Duration,
        needed: Duration,
    ) -> bool {
        let seen = match before.0.get(&subject).filter(|seen| seen.renewals == renewals) {
            None => Seen { renewals, last: now, lasted: Duration::ZERO, looks: 1 },
            Some(seen) => Seen {
                last: now,
                lasted: seen.lasted + now.saturating_sub(seen.last).min(step),
                looks: seen.looks.saturating_add(1),
                ..*seen
            },
        };
        let enough = seen.looks >= 2 && seen.lasted >= needed;
        self.0.insert(subject, seen);
        enough
    }
}

/// Pods that still run, by what an entry can be matched with.
#[derive(Debug)]
pub(crate) struct PodIndex<'a> {
    pub(crate) by_ip: BTreeMap<IpAddr, Vec<&'a PodView>>,
    by_name: BTreeMap<(&'a str, &'a str), &'a PodView>,
}

impl<'a> PodIndex<'a> {
    pub(crate) fn new(pods: &'a [PodView]) -> Self {
        let mut index = Self { by_ip: BTreeMap::new(), by_name: BTreeMap::new() };
        for pod in pods.iter().filter(|pod| !pod.finished) {
            index.by_name.insert((&pod.namespace, &pod.name), pod);
            for ip in &pod.ips {
                index.by_ip.entry(*ip).or_default().push(pod);
            }
        }
        index
    }

    /// The pod that a handle means, if it still runs. Its status may not say its address yet.
    pub(crate) fn of_handle(&self, handle: &Handle) -> Option<&'a PodView> {
        if handle.kind != HandleKind::Pod {
            return None;
        }
        let pod = self.by_name.get(&(handle.namespace.as_str(), handle.name.as_str()))?;
        (handle.uid.is_empty() || pod.uid.is_empty() || handle.uid == pod.uid).then_some(*pod)
    }
}

/// Whether an entry looks leaked. Only who gave an address knows that it is free again: the agent of its
/// node, or nobody once the node is gone. Another node's live agent is left to do it itself.
pub(crate) fn suspicion(
    view: &View<'_>,
    index: &PodIndex<'_>,
    ip: IpAddr,
    entry: &Allocation,
) -> Option<Leak> {
    if index.by_ip.contains_key(&ip) || view.own.live.contains(&ip) {
        return None;
    }
    let pod = entry.handle.as_ref().and_then(|handle| index.of_handle(handle));
    if pod.is_some_and(|pod| pod.node.is_empty() || pod.node == entry.node) {
        return None;
    }
    let own = view.own.identity;
    if entry.node == own.node {
        if entry.instance != own.instance {
            return Some(Leak::Rebuilt);
        }
        let known = view.own.holdings.addresses.contains_key(&ip) || view.own.holdings.tunnels.contains(&ip);
        return (!known).then_some(Leak::Stray);
    }
    (!view.nodes.contains(&entry.node)).then_some(Leak::NodeGone)
}

/// Whether this node is among the `share` that look after a block of others: by rendezvous hashing, so that a
/// thousand agents do not all free the same addresses. Its own node's are everybody's own.
pub fn is_responsible(block: &IpNet, node: &str, nodes: &BTreeSet<String>, share: usize) -> bool {
    let weight = |name: &str| {
        let text = format!("{block} {name}");
        // FNV-1a, then its bits mixed: names differ in their last bytes only.
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^ (hash >> 29)
    };
    let own = (weight(node), node);
    nodes.iter().filter(|other| (weight(other), other.as_str()) > own).count() < share
}
