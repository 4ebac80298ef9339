//! Figures and findings.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_api::ipam::{Counts, FindingKind};
use mesh_ipam::audit::{check, usage};
use mesh_ipam::block::Block;
use mesh_ipam::catalogue::{Catalogue, Object};
use mesh_ipam::collect::{OwnView, PodView, View};
use mesh_ipam::holdings::{Holdings, Identity};
use mesh_ipam::object::{Allocation, Handle, HandleKind};
use serde_json::json;

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn catalogue() -> Catalogue {
    let pool = Object { name: "p".into(), created: 0, spec: json!({"cidr": "10.0.0.0/24", "blockSize": 29}) };
    let reserved = Object { spec: json!({"reservedCIDRs": ["10.0.0.6/31"]}), ..Object::default() };
    let (catalogue, issues) = Catalogue::read(&[pool], &[reserved]);
    assert!(issues.is_empty());
    catalogue
}

fn handle(name: &str) -> Handle {
    let (namespace, uid) = ("d".to_owned(), format!("uid of {name}"));
    Handle { kind: HandleKind::Pod, namespace, name: name.into(), uid, ..Handle::tunnel() }
}

fn pod(name: &str, node: &str, ips: &[IpAddr]) -> PodView {
    PodView {
        namespace: "d".into(),
        name: name.into(),
        uid: format!("uid of {name}"),
        node: node.into(),
        ips: ips.to_vec(),
        finished: false,
    }
}

fn block(cidr: &str, node: &str, entries: &[(u8, &str, Option<Handle>)]) -> Block {
    let mut block = Block::new(cidr.parse().unwrap(), Some(node.to_owned()));
    for (last, node, handle) in entries {
        let entry = Allocation { node: (*node).to_owned(), instance: "1".into(), handle: handle.clone() };
        block.allocations.insert(ip(*last), entry);
    }
    block
}

/// A node `a`, this one, and a node `b`, without fault.
fn sound() -> Vec<Block> {
    let first = [
        (1, "a", Some(Handle::tunnel())),
        (2, "a", Some(handle("one"))),
        (3, "a", None),
        (4, "b", Some(handle("two"))),
    ];
    vec![block("10.0.0.0/29", "a", &first), block("10.0.0.8/29", "b", &[(8, "b", None)])]
}

fn findings(blocks: &[Block], pods: &[PodView], local: &[(u8, &str)]) -> Vec<(u8, FindingKind)> {
    let holdings = Holdings {
        addresses: [1, 2, 3].map(|last| (ip(last), blocks[0].cidr)).into(),
        ..Holdings::default()
    };
    let local: BTreeMap<IpAddr, Handle> =
        local.iter().map(|(last, name)| (ip(*last), handle(name))).collect();
    let live: BTreeSet<IpAddr> = local.keys().copied().collect();
    let identity = Identity { node: "a".into(), instance: "1".into() };
    let nodes = ["a", "b"].map(str::to_owned).into();
    let own = OwnView { identity: &identity, holdings: &holdings, live: &live };
    let view = View { blocks, pods, nodes: &nodes, own };
    let found = check(&catalogue(), &view, &local).findings;
    found
        .into_iter()
        .map(|finding| {
            (
                match finding.ip {
                    IpAddr::V4(ip) => ip.octets()[3],
                    IpAddr::V6(_) => 0,
                },
                finding.kind,
            )
        })
        .collect()
}

#[test]
fn figures_are_summed_by_block_and_pool() {
    let mut blocks = sound();
    blocks.push(block("10.0.1.0/29", "a", &[]));
    let usage = usage(&catalogue(), &blocks, Vec::new());
    let first = Counts { pods: 2, tunnels: 1, ready: 1, borrowed: 1, free: 4, reserved: 3 };
    assert_eq!(usage.blocks[0].counts, first);
    let [pool, other] = usage.pools.as_slice() else { panic!("{:?}", usage.pools) };
    assert_eq!((pool.name.as_str(), pool.blocks, pool.size), ("p", 2, Some(256)));
    assert_eq!(pool.counts, Counts { ready: 2, free: 11, ..first });
    assert_eq!((other.name.as_str(), other.blocks, other.size), ("", 1, None));
}

#[test]
fn a_sound_cluster_has_no_findings() {
    let pods = [pod("one", "a", &[ip(2)]), pod("two", "b", &[ip(4)]), pod("late", "b", &[ip(8)])];
    assert_eq!(findings(&sound(), &pods, &[(2, "one")]), []);
}

#[test]
fn each_fault_is_found() {
    let two = pod("two", "b", &[ip(4)]);
    let one = pod("one", "a", &[ip(2)]);
    // Given out to a node that is not there.
    let mut blocks = sound();
    blocks[0].allocations.insert(ip(5), Allocation { node: "c".into(), instance: "1".into(), handle: None });
    assert_eq!(findings(&blocks, &[one.clone(), two.clone()], &[]), [(5, FindingKind::Leaked)]);
    // Ours by the block, and not by us.
    let mut blocks = sound();
    blocks[0].allocations.insert(ip(5), Allocation { node: "a".into(), instance: "1".into(), handle: None });
    assert_eq!(findings(&blocks, &[], &[]), [(5, FindingKind::Leaked)]);
    // Two pods, and a pod elsewhere than the block says.
    let thief = pod("thief", "b", &[ip(2)]);
    let twice = findings(&sound(), &[one.clone(), thief], &[]);
    assert!(!twice.is_empty() && twice.iter().all(|found| *found == (2, FindingKind::Twice)), "{twice:?}");
    // A lease here of what is another node's.
    assert_eq!(findings(&sound(), &[], &[(8, "x")]), [(8, FindingKind::Twice)]);
    // A pod and no block; a pod and no pool.
    assert_eq!(findings(&sound(), &[pod("x", "b", &[ip(100)])], &[]), [(100, FindingKind::NotInBlock)]);
    let outside = pod("x", "b", &[IpAddr::from([10, 9, 9, 9])]);
    assert_eq!(findings(&sound(), &[outside], &[]), [(9, FindingKind::OutsidePools)]);
    assert_eq!(findings(&sound(), &[], &[(99, "x")]), [(99, FindingKind::NotInBlock)]);
    // Given out before it was reserved.
    let mut blocks = sound();
    let entry = Allocation { node: "b".into(), instance: "1".into(), handle: Some(handle("two")) };
    blocks[0].allocations.insert(ip(6), entry);
    assert_eq!(findings(&blocks, &[], &[]), [(6, FindingKind::Reserved)]);
    // Blocks that overlap.
    let mut blocks = sound();
    blocks.push(block("10.0.0.8/30", "b", &[(8, "b", None)]));
    assert_eq!(findings(&blocks, &[], &[]), [(8, FindingKind::Twice)]);
}
