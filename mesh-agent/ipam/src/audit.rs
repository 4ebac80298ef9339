//! How much is in use, and what does not fit together. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::ipam::{BlockUsage, Check, Counts, Finding, FindingKind, PoolUsage, Usage};
use mesh_api::status::Issue;

use crate::block::Block;
use crate::catalogue::Catalogue;
use crate::collect::{Leak, PodIndex, PodView, View, suspicion};
use crate::object::{Allocation, Handle, HandleKind};
use crate::range::span;

/// Figures for each pool and block.
pub fn usage(catalogue: &Catalogue, blocks: &[Block], issues: Vec<Issue>) -> Usage {
    let mut rows: Vec<BlockUsage> = blocks
        .iter()
        .map(|block| BlockUsage {
            cidr: block.cidr,
            pool: pool_of(catalogue, &block.cidr).map(str::to_owned),
            node: block.affinity.clone(),
            counts: counts(catalogue, block),
        })
        .collect();
    rows.sort_by_key(|row| row.cidr);
    let sum = |pool: Option<&str>| {
        let mut total = Counts::default();
        let mut blocks = 0;
        for row in rows.iter().filter(|row| row.pool.as_deref() == pool) {
            let Counts { pods, tunnels, ready, borrowed, free, reserved } = row.counts;
            total.pods += pods;
            total.tunnels += tunnels;
            total.ready += ready;
            total.borrowed += borrowed;
            total.free += free;
            total.reserved += reserved;
            blocks += 1;
        }
        (blocks, total)
    };
    let mut pools: Vec<PoolUsage> = catalogue
        .pools
        .iter()
        .map(|pool| {
            let (blocks, counts) = sum(Some(&pool.name));
            let (first, last) = span(&pool.cidr);
            let size = (last - first).checked_add(1).and_then(|size| u64::try_from(size).ok());
            let (name, cidr) = (pool.name.clone(), Some(pool.cidr));
            PoolUsage { name, cidr, disabled: pool.disabled, size, blocks, counts }
        })
        .collect();
    let (blocks, counts) = sum(None);
    if blocks > 0 {
        let (name, cidr, size) = (String::new(), None, None);
        pools.push(PoolUsage { name, cidr, disabled: true, size, blocks, counts });
    }
    Usage { pools, blocks: rows, issues }
}

fn pool_of<'a>(catalogue: &'a Catalogue, block: &IpNet) -> Option<&'a str> {
    catalogue.pools.iter().find(|pool| pool.cidr.contains(block)).map(|pool| pool.name.as_str())
}

fn counts(catalogue: &Catalogue, block: &Block) -> Counts {
    let mut counts = Counts::default();
    for entry in block.allocations.values() {
        match entry.handle.as_ref().map(|handle| handle.kind) {
            Some(HandleKind::Pod) => counts.pods += 1,
            Some(HandleKind::Tunnel) => counts.tunnels += 1,
            None => counts.ready += 1,
        }
        counts.borrowed += u64::from(block.affinity.as_ref() != Some(&entry.node));
    }
    for ip in block.free() {
        counts.free += 1;
        counts.reserved += u64::from(!catalogue.is_usable(ip));
    }
    counts
}

/// Compares blocks, pods and this node's endpoints. What others' agents have not written yet is no finding
/// of itself: a pod whose address its node keeps ready is in order.
pub fn check(catalogue: &Catalogue, view: &View<'_>, local: &BTreeMap<IpAddr, Handle>) -> Check {
    let index = PodIndex::new(view.pods);
    let mut found = BTreeSet::new();
    let mut add = |ip: IpAddr, kind: FindingKind, message: String| {
        found.insert(Finding { ip, kind, message });
    };
    let mut entries: BTreeMap<IpAddr, Vec<(&Block, &Allocation)>> = BTreeMap::new();
    for block in view.blocks {
        for (ip, entry) in &block.allocations {
            entries.entry(*ip).or_default().push((block, entry));
        }
    }
    let mut out = Check { blocks: view.blocks.len() as u64, ..Check::default() };
    for (ip, holders) in &entries {
        for (block, entry) in holders {
            if entry.handle.is_some() {
                out.allocated += 1
            } else {
                out.ready += 1
            }
            let whose = whose(entry);
            if let Some(leak) = suspicion(view, &index, *ip, entry) {
                let why = match leak {
                    Leak::NodeGone => "the node is not in the cluster",
                    Leak::Rebuilt => "the node has been built anew since",
                    Leak::Stray => "the node does not know it",
                };
                add(*ip, FindingKind::Leaked, format!("{whose} (IPBlock {}): {why}", block.name()));
            }
            if entry.handle.is_some() {
                match catalogue.pool_of(*ip) {
                    None => add(*ip, FindingKind::OutsidePools, format!("{whose}: in no IPPool")),
                    Some(pool) if !catalogue.is_usable(*ip) => {
                        let message = format!("{whose}: reserved, or an edge of IPPool {}", pool.name);
                        add(*ip, FindingKind::Reserved, message);
                    }
                    Some(_) => {}
                }
            }
            for pod in index.by_ip.get(ip).into_iter().flatten() {
                if let Some(message) = contradiction(&index, entry, pod) {
                    add(*ip, FindingKind::Twice, message);
                }
            }
            if entry.node != view.own.identity.node
                && let Some(handle) = local.get(ip)
            {
                add(*ip, FindingKind::Twice, format!("{whose}, and {handle} on this node"));
            }
        }
        if let [(one, _), (other, _), ..] = holders.as_slice() {
            let message = format!("in two blocks, {} and {}", one.name(), other.name());
            add(*ip, FindingKind::Twice, message);
        }
    }
    for (ip, pods) in &index.by_ip {
        if let [one, other, ..] = pods.as_slice() {
            let message = format!("{} and {} both have it", pod_name(one), pod_name(other));
            add(*ip, FindingKind::Twice, message);
        }
        let in_pool = catalogue.pool_of(*ip).is_some();
        out.pods += u64::from(in_pool);
        if !entries.contains_key(ip) {
            for pod in pods {
                let (kind, what) = if in_pool {
                    (FindingKind::NotInBlock, "no IPBlock says so")
                } else {
                    (FindingKind::OutsidePools, "it is in no IPPool")
                };
                add(*ip, kind, format!("{} has it, and {what}", pod_name(pod)));
            }
        }
    }
    for (ip, handle) in local.iter().filter(|(ip, _)| !entries.contains_key(*ip)) {
        if catalogue.pool_of(*ip).is_some() && !index.by_ip.contains_key(ip) {
            add(
                *ip,
                FindingKind::NotInBlock,
                format!("{handle} on this node has it, and no IPBlock says so"),
            );
        }
    }
    out.findings = found.into_iter().collect();
    out
}

fn whose(entry: &Allocation) -> String {
    match &entry.handle {
        Some(handle) => format!("{handle} on node {}", entry.node),
        None => format!("kept ready by node {}", entry.node),
    }
}

fn pod_name(pod: &PodView) -> String {
    format!("pod {}/{}", pod.namespace, pod.name)
}

/// What a pod says against an entry of its address. The handle of a pod that is gone may be an old one: its
/// node writes after the fact.
fn contradiction(index: &PodIndex<'_>, entry: &Allocation, pod: &PodView) -> Option<String> {
    if pod.node != entry.node {
        let (pod_name, node) = (pod_name(pod), &pod.node);
        return Some(format!("{pod_name} on node {node} has it, and it is {}", whose(entry)));
    }
    let handle = entry.handle.as_ref()?;
    if handle.kind == HandleKind::Tunnel {
        return Some(format!("{} has it, and it is the tunnel's of node {}", pod_name(pod), entry.node));
    }
    let other = index.of_handle(handle)?;
    let same = (&other.namespace, &other.name) == (&pod.namespace, &pod.name);
    (!same).then(|| format!("{} has it, and it was given to {}", pod_name(pod), pod_name(other)))
}
