//! Which lab a case needs, and what has to change from one case's pods to the next's. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use ipnet::IpNet;
use serde_json::json;

use super::case::{Case, End, External, Node, Pod};
use crate::manifests::PodStatus;
use crate::spec;

/// Hosts that cases share: those with the same hosts are replayed in one lab.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hosts {
    /// Nodes, by what the cases say.
    pub nodes: Vec<Node>,
    /// Externals.
    pub externals: Vec<External>,
}

/// The hosts a case needs: its own, and pods' nodes that it names without an address.
fn hosts(case: &Case) -> Hosts {
    let mut nodes = case.nodes.clone();
    for pod in pods_of(case) {
        if let Some(name) = node_of(case, pod)
            && !nodes.iter().any(|node| node.name == name)
        {
            // A host-network pod has its node's address.
            let ip = if pod.host_network { pod.ip.clone() } else { Vec::new() };
            nodes.push(Node { name, ip, labels: BTreeMap::new() });
        }
    }
    nodes.sort();
    let mut externals = case.externals.clone();
    externals.sort();
    Hosts { nodes, externals }
}

/// The node that a pod is on by what the case says: its `node`, or for a host-network pod the one whose address
/// it has.
fn node_of(case: &Case, pod: &Pod) -> Option<String> {
    let by_address = || {
        let known = case.nodes.iter().find(|node| node.ip.iter().any(|ip| pod.ip.contains(ip)));
        known.map_or_else(|| format!("host-of-{}-{}", pod.namespace, pod.name), |node| node.name.clone())
    };
    pod.node.clone().or_else(|| pod.host_network.then(by_address))
}

/// Groups cases by the lab they need; order within a group is the file's.
pub fn group(cases: &[Case]) -> BTreeMap<Hosts, Vec<&Case>> {
    let mut groups: BTreeMap<Hosts, Vec<&Case>> = BTreeMap::new();
    for case in cases {
        groups.entry(hosts(case)).or_default().push(case);
    }
    groups
}

/// The lab for a group of cases: their hosts (at least two nodes), and pools that hold all their pods.
pub fn lab(name: &str, hosts: &Hosts, cases: &[&Case]) -> Result<spec::Lab> {
    let pods: BTreeSet<IpAddr> =
        cases.iter().flat_map(|case| pods_of(case)).flat_map(|pod| pod.ip.clone()).collect();
    let fixed: BTreeSet<IpAddr> = hosts
        .nodes
        .iter()
        .flat_map(|node| node.ip.clone())
        .chain(hosts.externals.iter().flat_map(|external| external.ip.clone()))
        .collect();
    // Host-network pods have their node's address, which is in no pool.
    let pods: BTreeSet<IpAddr> = pods.difference(&fixed).copied().collect();
    let taken = |net: &IpNet| pods.iter().chain(&fixed).any(|ip| net.contains(ip));
    let base = (0u8..64)
        .find(|n| !taken(&v4(100, 64 + n, 0, 0, 16)) && !taken(&v6(0xfd42, u16::from(*n), 0, 32)))
        .unwrap_or(0);
    let mut nodes = Vec::new();
    let mut add = |node: Option<&Node>| {
        let index = nodes.len() as u8 + 1;
        let mut ips = node.map(|node| node.ip.clone()).unwrap_or_default();
        if ips.is_empty() {
            ips = vec![
                IpAddr::V4(Ipv4Addr::new(198, 18, 42, index)),
                IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x42, 0, 0, 0, 0, u16::from(index))),
            ];
        }
        nodes.push(spec::Node {
            name: node.map_or_else(|| format!("lab-node-{index}"), |node| node.name.clone()),
            ips,
            pod_cidrs: vec![
                v4(100, 64 + base, index, 0, 24),
                v6(0xfd42, u16::from(base), u16::from(index), 64),
            ],
            labels: node.map(|node| node.labels.clone()).unwrap_or_default(),
            datapath: spec::Datapath::default(),
        });
    };
    hosts.nodes.iter().for_each(|node| add(Some(node)));
    for _ in hosts.nodes.len()..2 {
        add(None);
    }
    let mut pools: BTreeSet<IpNet> =
        BTreeSet::from([v4(100, 64 + base, 0, 0, 16), v6(0xfd42, u16::from(base), 0, 32)]);
    for ip in &pods {
        pools.insert(pool(*ip, &fixed));
    }
    let pools: Vec<_> =
        IpNet::aggregate(&pools.into_iter().collect()).iter().map(|net| json!({ "cidr": net })).collect();
    let externals = hosts
        .externals
        .iter()
        .map(|ext| spec::External { name: ext.name.clone(), ips: ext.ip.clone() })
        .collect();
    let lab = spec::Lab {
        name: name.into(),
        nodes,
        externals,
        mesh: BTreeMap::from([("pools".to_string(), pools.into())]),
        ..Default::default()
    };
    lab.check()?;
    Ok(lab)
}

/// The pod's neighbourhood as a pool, wide enough that the pod is not at its edge (which IPAM gives to nobody), or
/// the pod alone where that holds a host of the case.
fn pool(ip: IpAddr, hosts: &BTreeSet<IpAddr>) -> IpNet {
    let widest: u8 = if ip.is_ipv4() { 24 } else { 112 };
    let nets = (widest - 8..=widest).rev().filter_map(|length| IpNet::new(ip, length).ok());
    let inside = |net: &IpNet| ip != net.network() && ip != net.broadcast();
    match nets.map(|net| net.trunc()).find(inside) {
        Some(net) if !hosts.iter().any(|host| net.contains(host)) => net,
        _ => IpNet::from(ip),
    }
}

fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> IpNet {
    IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

fn v6(a: u16, b: u16, c: u16, length: u8) -> IpNet {
    IpNet::V6(ipnet::Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), length))
}

fn pods_of(case: &Case) -> impl Iterator<Item = &Pod> {
    case.pods.iter().chain(case.steps.iter().filter_map(|step| step.pods.as_ref()).flatten())
}

/// The namespaces and pods that are there at one moment of a case.
#[derive(Debug, Clone, PartialEq)]
pub struct World {
    /// Namespaces.
    pub namespaces: Vec<spec::Namespace>,
    /// Pods of the lab with their status; those without an address have no network.
    pub pods: Vec<(spec::Pod, PodStatus)>,
}

/// The world of each step.
pub fn worlds(case: &Case, nodes: &[String]) -> Result<Vec<World>> {
    let (mut namespaces, mut pods) = (case.namespaces.clone(), case.pods.clone());
    let mut worlds = Vec::new();
    for step in &case.steps {
        namespaces = step.namespaces.clone().unwrap_or(namespaces);
        pods = step.pods.clone().unwrap_or(pods);
        worlds.push(world(case, &namespaces, &pods, nodes)?);
    }
    Ok(worlds)
}

fn world(case: &Case, namespaces: &[spec::Namespace], pods: &[Pod], nodes: &[String]) -> Result<World> {
    ensure!(!nodes.is_empty(), "no node to put pods on");
    let mut list = Vec::new();
    for pod in pods {
        let node = match node_of(case, pod) {
            Some(node) => node,
            // By name and not by place, so that a pod keeps its node from case to case; neighbours in a
            // namespace are on different ones.
            None => spread(pod, nodes),
        };
        let spec = spec::Pod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            node,
            labels: pod.labels.clone(),
            ips: pod.ip.clone(),
            ports: pod.ports.clone(),
            host_network: pod.host_network,
        };
        let status = PodStatus {
            ips: pod.ip.clone(),
            phase: pod.phase.clone(),
            deletion_timestamp: pod.deletion_timestamp.clone(),
        };
        list.push((spec, status));
    }
    Ok(World { namespaces: namespaces.to_vec(), pods: list })
}

fn spread(pod: &Pod, nodes: &[String]) -> String {
    let sum: usize = pod.namespace.bytes().chain(pod.name.bytes()).map(usize::from).sum();
    nodes.get(sum % nodes.len().max(1)).cloned().unwrap_or_default()
}

/// The pod has a network of its own or its node's.
pub fn has_network(pod: &spec::Pod, status: &PodStatus) -> bool {
    !status.ips.is_empty() && !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
        || pod.host_network
}

/// A pod may be kept (its labels perhaps rewritten) if it is on the same node with the same addresses.
pub fn same_network(a: &spec::Pod, b: &spec::Pod) -> bool {
    (&a.namespace, &a.name, &a.node, &a.ips, a.host_network)
        == (&b.namespace, &b.name, &b.node, &b.ips, b.host_network)
}

/// The distinct probes of all steps that can be made in this world, without their verdicts.
pub fn baseline(case: &Case, world: &World) -> BTreeSet<(End, End, u16, spec::Protocol)> {
    let there = |end: &End| match end {
        End::Pod(namespace, name) => world.pods.iter().any(|(pod, status)| {
            (&pod.namespace, &pod.name) == (namespace, name) && has_network(pod, status)
        }),
        End::Node(_) | End::External(_) => true,
    };
    case.steps
        .iter()
        .flat_map(|step| &step.expected)
        .filter(|expected| there(&expected.0) && there(&expected.1))
        .map(|expected| (expected.0.clone(), expected.1.clone(), expected.2, expected.3))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_hold_the_pods_and_no_host() {
        let text = r#"[{"name": "n", "namespaces": [], "pods": [
            {"ns": "x", "name": "a", "ip": "192.0.2.7", "node": "k"}, {"ns": "x", "name": "b", "ip": "fd00::1"}],
            "nodes": [{"name": "k", "ip": "192.0.2.1"}], "externals": [{"name": "e", "ip": "100.64.3.4"}],
            "steps": []}]"#;
        let cases = super::super::case::parse(text.as_bytes()).unwrap();
        let groups = group(&cases);
        let (hosts, of_group) = groups.iter().next().unwrap();
        let lab = lab("t", hosts, of_group).unwrap();
        assert_eq!(lab.nodes.len(), 2);
        let pools: Vec<IpNet> = lab.mesh["pools"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pool| pool["cidr"].as_str().unwrap().parse().unwrap())
            .collect();
        let inside = |ip: &str| pools.iter().any(|net| net.contains(&ip.parse::<IpAddr>().unwrap()));
        assert!(inside("192.0.2.7") && inside("fd00::1") && !inside("192.0.2.1") && !inside("100.64.3.4"));
        assert!(lab.nodes.iter().flat_map(|node| &node.pod_cidrs).all(|net| inside(&net.addr().to_string())));
    }

    #[test]
    fn no_pod_is_at_the_edge_of_its_pool() {
        for ip in ["10.0.0.255", "10.0.1.0", "10.0.7.255", "fd00::", "10.0.0.7", "fd00::1:0"] {
            let ip: IpAddr = ip.parse().unwrap();
            let net = pool(ip, &BTreeSet::new());
            assert!(
                net.contains(&ip) && ip != net.network() && ip != net.broadcast() || net.prefix_len() > 64
            );
        }
        assert_eq!(pool("10.0.1.0".parse().unwrap(), &BTreeSet::new()).to_string(), "10.0.0.0/23");
    }

    #[test]
    fn neighbours_in_a_namespace_are_spread() {
        let nodes = ["k".to_string(), "l".to_string()];
        let pod = |name: &str| Pod {
            namespace: "x".into(),
            name: name.into(),
            labels: BTreeMap::new(),
            ip: vec![],
            ports: vec![],
            node: None,
            host_network: false,
            phase: None,
            deletion_timestamp: None,
        };
        assert_ne!(spread(&pod("a"), &nodes), spread(&pod("b"), &nodes));
    }
}
