//! One or two nodes and a store, case by case.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ipnet::IpNet;
use mesh_api::ipam::Released;
use mesh_api::status::Issue;
use mesh_ipam::block::Block;
use mesh_ipam::catalogue::{Ask, Catalogue, Object, Refusal};
use mesh_ipam::collect::{Collected, Grace, OwnView, PodView, View, collect};
use mesh_ipam::holdings::{Holdings, Identity, Ledger};
use mesh_ipam::memory::{Fault, Memory};
use mesh_ipam::node::{Local, NodeAllocator, Picked, Settings, Site, Want};
use mesh_ipam::object::{Allocation, Handle, HandleKind};
use mesh_ipam::selector::Labels;
use mesh_ipam::{EXHAUSTED, Family, IpamError, TWICE};
use serde_json::{Value, json};

const HOUR: Duration = Duration::from_secs(3600);

fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<(Holdings, bool)>>);

impl Ledger for Disk {
    fn save(&mut self, holdings: &Holdings) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.1 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        disk.0 = holdings.clone();
        Ok(())
    }
}

/// A node with its journal.
struct Node {
    allocator: NodeAllocator<Disk>,
    disk: Disk,
    leases: BTreeMap<IpAddr, Handle>,
    blocked: BTreeSet<IpAddr>,
    labels: Labels,
    catalogue: Catalogue,
    now: Duration,
    fault: Option<Fault>,
}

fn pools(pools: &[Value]) -> Catalogue {
    let object =
        |(at, spec): (usize, &Value)| Object { name: format!("p{at}"), created: 0, spec: spec.clone() };
    let objects: Vec<Object> = pools.iter().enumerate().map(object).collect();
    let (catalogue, issues) = Catalogue::read(&objects, &[]);
    assert!(issues.is_empty(), "{issues:?}");
    catalogue
}

fn small() -> Catalogue {
    pools(&[json!({"cidr": "10.0.0.0/28", "blockSize": 29})])
}

impl Node {
    fn new(name: &str, catalogue: &Catalogue) -> Self {
        let identity = Identity { node: name.into(), instance: format!("first {name}") };
        let settings = Settings { low: 2, high: 3, ..Settings::default() };
        let disk = Disk::default();
        let allocator = NodeAllocator::new(identity, "boot", Holdings::default(), disk.clone(), settings);
        Self {
            allocator,
            disk,
            leases: BTreeMap::new(),
            blocked: BTreeSet::new(),
            labels: Labels::new(),
            catalogue: catalogue.clone(),
            now: Duration::ZERO,
            fault: None,
        }
    }

    fn maintain(&mut self, memory: &Memory) -> Result<Vec<Issue>, IpamError> {
        let client = memory.client();
        let fault = self.fault;
        client.set_faults(move || fault);
        let site = Site { catalogue: &self.catalogue, labels: &self.labels, node_uid: Some("uid") };
        let local = Local { leases: &self.leases, blocked: &self.blocked, freed: &[] };
        now(self.allocator.maintain(&client, self.now, &site, &local))
    }

    fn add(&mut self, memory: &Memory, ask: &Ask) -> Result<Vec<IpAddr>, IpamError> {
        let client = memory.client();
        let fault = self.fault;
        client.set_faults(move || fault);
        let site = Site { catalogue: &self.catalogue, labels: &self.labels, node_uid: Some("uid") };
        let local = Local { leases: &self.leases, blocked: &self.blocked, freed: &[] };
        let ips = now(self.allocator.demand(&client, self.now, &site, ask, &local))?;
        let name = format!("pod{}", self.leases.len());
        self.leases.extend(ips.iter().map(|ip| (*ip, handle(&name))));
        Ok(ips)
    }

    fn pick(&self, ask: &Ask) -> Result<Picked, IpamError> {
        let site = Site { catalogue: &self.catalogue, labels: &self.labels, node_uid: Some("uid") };
        let local = Local { leases: &self.leases, blocked: &self.blocked, freed: &[] };
        self.allocator.pick(self.now, &site, ask, &local)
    }

    fn reasons(&mut self, memory: &Memory) -> Vec<String> {
        self.maintain(memory).unwrap().into_iter().map(|issue| issue.reason).collect()
    }
}

fn handle(name: &str) -> Handle {
    let (namespace, uid) = ("d".to_owned(), format!("uid of {name}"));
    Handle { kind: HandleKind::Pod, namespace, name: name.into(), uid, ..Handle::tunnel() }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn exactly(ips: &[&str]) -> Ask {
    Ask { ips: ips.iter().map(|text| ip(text)).collect(), ..Ask::default() }
}

fn block(memory: &Memory, cidr: &str) -> Block {
    let cidr: IpNet = cidr.parse().unwrap();
    memory.blocks().into_iter().find(|stored| stored.block.cidr == cidr).unwrap().block
}

#[test]
fn an_add_in_the_usual_case_asks_nobody_and_is_written_behind() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    assert!(node.maintain(&memory).unwrap().is_empty());
    let calls = memory.calls();
    let given = node.add(&memory, &Ask::default()).unwrap();
    node.fault = Some(Fault::Lost);
    node.add(&memory, &Ask::default()).unwrap();
    assert_eq!(memory.calls(), calls);
    assert!(matches!(node.maintain(&memory), Err(IpamError::Store(_))));
    node.fault = None;
    node.maintain(&memory).unwrap();
    let block = memory.blocks().remove(0).block;
    assert_eq!(block.affinity.as_deref(), Some("a"));
    assert_eq!(block.allocations[&given[0]].handle, Some(handle("pod0")));
    // Topped up again, behind.
    assert_eq!(block.allocations.values().filter(|entry| entry.handle.is_none()).count(), 3);
    // And once all is written, a round writes nothing.
    let before = memory.blocks();
    node.maintain(&memory).unwrap();
    assert_eq!(memory.blocks(), before);
}

#[test]
fn a_node_that_was_never_confirmed_gives_nothing() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    assert!(matches!(node.add(&memory, &Ask::default()), Err(IpamError::Unconfirmed)));
    node.maintain(&memory).unwrap();
    node.add(&memory, &Ask::default()).unwrap();
    // Cut off for longer than it is trusted, it gives nothing either.
    node.now = HOUR;
    node.add(&memory, &Ask::default()).unwrap();
    node.now = HOUR + Duration::from_secs(1);
    assert!(matches!(node.pick(&Ask::default()), Err(IpamError::Unconfirmed)));
    let before = memory.blocks()[0].block.renewals;
    node.maintain(&memory).unwrap();
    assert_eq!(memory.blocks()[0].block.renewals, before + 1);
    node.add(&memory, &Ask::default()).unwrap();
}

#[test]
fn after_a_boot_holdings_must_be_confirmed_and_after_a_restart_not() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    let kept = node.disk.0.lock().unwrap().0.clone();
    assert_eq!(Holdings::decode(&kept.encode().unwrap()).unwrap(), kept);
    let identity = node.allocator.identity().clone();
    let start =
        |boot| NodeAllocator::new(identity.clone(), boot, kept.clone(), Disk::default(), Settings::default());
    assert!(start("boot").is_trusted(node.now));
    assert!(!start("next").is_trusted(node.now));
    assert!(Holdings::decode(b"{").is_err());
}

#[test]
fn two_nodes_that_want_the_same_block_get_two() {
    let memory = Memory::default();
    let (mut a, mut b) = (Node::new("a", &small()), Node::new("b", &small()));
    a.maintain(&memory).unwrap();
    b.maintain(&memory).unwrap();
    assert_eq!(memory.blocks().len(), 2);
    let (of_a, of_b) = (a.add(&memory, &Ask::default()).unwrap(), b.add(&memory, &Ask::default()).unwrap());
    assert_ne!(of_a, of_b);
}

#[test]
fn a_node_borrows_only_when_there_is_no_block_left_and_only_where_it_may() {
    for allowed in [true, false] {
        let memory = Memory::default();
        let catalogue = pools(&[json!({"cidr": "10.0.0.0/28", "blockSize": 29, "allowBorrowing": allowed})]);
        let (mut a, mut b) = (Node::new("a", &catalogue), Node::new("b", &catalogue));
        a.maintain(&memory).unwrap();
        b.maintain(&memory).unwrap();
        // 7 in each block, and 3 of b's are kept ready.
        for _ in 0..7 {
            a.add(&memory, &Ask::default()).unwrap();
        }
        assert_eq!(a.reasons(&memory), [EXHAUSTED]);
        for _ in 0..4 {
            if !allowed {
                break;
            }
            let borrowed = a.add(&memory, &Ask::default()).unwrap()[0];
            let home = memory.blocks().into_iter().find(|s| s.block.cidr.contains(&borrowed)).unwrap();
            assert_eq!(home.block.affinity.as_deref(), Some("b"));
        }
        assert!(matches!(a.add(&memory, &Ask::default()), Err(IpamError::Exhausted(Family::V4))));
        // What b keeps ready is b's.
        for _ in 0..3 {
            b.add(&memory, &Ask::default()).unwrap();
        }
    }
}

#[test]
fn exact_addresses_are_had_wherever_they_are_free() {
    let memory = Memory::default();
    let catalogue = pools(&[
        json!({"cidr": "10.0.0.0/28", "blockSize": 29}),
        json!({"cidr": "10.1.0.0/28", "blockSize": 29, "allowBorrowing": false}),
    ]);
    let (mut a, mut b) = (Node::new("a", &catalogue), Node::new("b", &catalogue));
    a.maintain(&memory).unwrap();
    b.maintain(&memory).unwrap();
    assert_eq!(a.add(&memory, &exactly(&["10.0.0.12"])).unwrap(), [ip("10.0.0.12")]);
    assert!(matches!(a.add(&memory, &exactly(&["10.0.0.12"])), Err(IpamError::InUse(..))));
    assert!(matches!(b.add(&memory, &exactly(&["10.0.0.12"])), Err(IpamError::InUse(..))));
    assert_eq!(a.add(&memory, &exactly(&["10.1.0.9"])).unwrap(), [ip("10.1.0.9")]);
    let refused = b.add(&memory, &exactly(&["10.1.0.10"]));
    assert!(matches!(&refused, Err(IpamError::NotLent(_, node)) if node == "a"), "{refused:?}");
    let edge = a.add(&memory, &exactly(&["10.0.0.0"]));
    assert!(matches!(edge, Err(IpamError::Refused(Refusal::Reserved(_)))));
    a.blocked.insert(ip("10.0.0.13"));
    assert!(matches!(a.add(&memory, &exactly(&["10.0.0.13"])), Err(IpamError::InUse(..))));
}

#[test]
fn of_two_families_a_pod_gets_both_or_none() {
    let memory = Memory::default();
    let catalogue = pools(&[json!({"cidr": "10.0.0.0/30"}), json!({"cidr": "fd00::/120", "blockSize": 124})]);
    let mut node = Node::new("a", &catalogue);
    node.maintain(&memory).unwrap();
    for _ in 0..2 {
        assert_eq!(node.add(&memory, &Ask::default()).unwrap().len(), 2);
    }
    assert!(
        matches!(node.pick(&Ask::default()).unwrap(), Picked::Short(short) if short.contains(&Want::Any(Family::V4)))
    );
    assert!(matches!(node.add(&memory, &Ask::default()), Err(IpamError::Exhausted(Family::V4))));
    assert_eq!(node.leases.len(), 4);
}

#[test]
fn the_tunnels_address_is_an_allocation_and_stays() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    let (catalogue, labels) = (node.catalogue.clone(), Labels::new());
    let site = Site { catalogue: &catalogue, labels: &labels, node_uid: Some("uid") };
    let (leases, blocked) = (BTreeMap::new(), BTreeSet::new());
    let local = Local { leases: &leases, blocked: &blocked, freed: &[] };
    let own = node.allocator.tunnel(node.now, Family::V4, &site, &local).unwrap().unwrap();
    assert_eq!(node.allocator.tunnel(node.now, Family::V4, &site, &local).unwrap(), Some(own));
    assert_eq!(node.allocator.tunnel(node.now, Family::V6, &site, &local).unwrap(), None);
    node.maintain(&memory).unwrap();
    let entry = memory.blocks()[0].block.allocations[&own].clone();
    assert_eq!(entry.handle, Some(Handle::tunnel()));
    for _ in 0..7 {
        assert_ne!(node.add(&memory, &Ask::default()).map(|ips| ips[0]).unwrap_or(ip("::")), own);
    }
}

#[test]
fn what_was_deleted_by_hand_is_taken_again_unless_somebody_has_it() {
    let memory = Memory::default();
    let (mut a, mut b) = (Node::new("a", &small()), Node::new("b", &small()));
    a.maintain(&memory).unwrap();
    let given = a.add(&memory, &Ask::default()).unwrap()[0];
    let name = memory.blocks()[0].block.name();
    memory.remove(&name);
    assert!(a.reasons(&memory).is_empty());
    let again = memory.blocks().into_iter().find_map(|s| s.block.allocations.get(&given).cloned()).unwrap();
    assert_eq!((again.node.as_str(), again.handle), ("a", Some(handle("pod0"))));

    for stored in memory.blocks() {
        memory.remove(&stored.block.name());
    }
    b.maintain(&memory).unwrap();
    b.add(&memory, &Ask { ips: vec![given], ..Ask::default() }).unwrap();
    assert!(a.reasons(&memory).contains(&TWICE.to_owned()));
    assert!(!a.allocator.holdings().addresses.contains_key(&given));
}

#[test]
fn a_block_nobody_understands_is_left_alone_and_stops_no_other() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    node.add(&memory, &Ask::default()).unwrap();
    let name = memory.blocks()[0].block.name();
    let odd = json!({"cidr": "10.0.0.0/29", "affinity": "a", "fromTheFuture": true});
    memory.put(&name, odd);
    let issues = node.maintain(&memory).unwrap();
    assert!(issues.iter().any(|issue| issue.object == format!("IPBlock/{name}")), "{issues:?}");
    // The other block serves.
    let given = node.add(&memory, &Ask::default()).unwrap()[0];
    assert!(block(&memory, &memory.blocks()[0].block.cidr.to_string()).cidr.contains(&given));
}

#[test]
fn a_refused_write_is_an_issue_and_what_was_read_still_counts() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    node.add(&memory, &Ask::default()).unwrap();
    node.fault = Some(Fault::Refused);
    assert!(matches!(node.maintain(&memory), Err(IpamError::Store(_))));
    node.add(&memory, &Ask::default()).unwrap();
}

#[test]
fn a_disk_that_is_full_gives_nothing_new_and_forgets_nothing() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.disk.0.lock().unwrap().1 = true;
    assert!(matches!(node.maintain(&memory), Err(IpamError::Ledger(_))));
    assert!(node.allocator.holdings().addresses.is_empty());
    node.disk.0.lock().unwrap().1 = false;
    node.maintain(&memory).unwrap();
    assert_eq!(memory.blocks().len(), 1);
}

#[test]
fn what_is_too_much_is_given_back_and_empty_blocks_go() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    for _ in 0..9 {
        node.add(&memory, &Ask::default()).unwrap();
    }
    node.maintain(&memory).unwrap();
    assert_eq!(memory.blocks().len(), 2);
    node.leases.clear();
    node.maintain(&memory).unwrap();
    node.maintain(&memory).unwrap();
    let blocks = memory.blocks();
    assert_eq!(blocks.len(), 1);
    assert_eq!(blocks[0].block.allocations.len(), 3);
    assert_eq!(node.allocator.affine().count(), 1);
}

#[test]
fn a_closed_pool_keeps_what_is_given_and_gives_no_more() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    let given = node.add(&memory, &Ask::default()).unwrap()[0];
    for closed in [pools(&[json!({"cidr": "10.0.0.0/28", "blockSize": 29, "disabled": true})]), pools(&[])] {
        node.catalogue = closed;
        node.maintain(&memory).unwrap();
        assert!(matches!(node.add(&memory, &Ask::default()), Err(IpamError::Refused(Refusal::NoPool))));
        let block = memory.blocks().remove(0).block;
        assert_eq!(block.allocations.keys().copied().collect::<Vec<_>>(), [given]);
    }
    node.leases.clear();
    node.maintain(&memory).unwrap();
    assert!(memory.blocks().is_empty());
}

#[test]
fn a_node_that_loses_every_race_gives_up_after_a_bounded_number_of_tries() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    for _ in 0..3 {
        node.add(&memory, &Ask::default()).unwrap();
    }
    node.fault = Some(Fault::Overtaken);
    let calls = memory.calls();
    assert!(matches!(node.add(&memory, &Ask::default()), Err(IpamError::Contended)));
    assert!(memory.calls() - calls < 100, "{}", memory.calls() - calls);
}

#[test]
fn an_operator_frees_what_nobody_uses_and_nothing_else() {
    let memory = Memory::default();
    let mut node = Node::new("a", &small());
    node.maintain(&memory).unwrap();
    let given = node.add(&memory, &Ask::default()).unwrap()[0];
    node.maintain(&memory).unwrap();
    let mut stored = memory.blocks().remove(0).block;
    let lost = stored.free().last().unwrap();
    let of = |node: &str| Allocation { node: node.into(), instance: "1".into(), handle: Some(handle("x")) };
    stored.allocations.insert(lost, of("gone"));
    memory.put(&stored.name(), serde_json::to_value(stored.spec()).unwrap());

    let (holdings, identity) = (node.allocator.holdings().clone(), node.allocator.identity().clone());
    let live: BTreeSet<IpAddr> = node.leases.keys().copied().collect();
    let nodes: BTreeSet<String> = ["a".to_owned()].into();
    let user = PodView { name: "x".into(), node: "gone".into(), ips: vec![lost], ..PodView::default() };
    let mut free = |ip: IpAddr, pods: &[PodView]| {
        let own = OwnView { identity: &identity, holdings: &holdings, live: &live };
        let blocks: Vec<Block> = memory.blocks().into_iter().map(|stored| stored.block).collect();
        let view = View { blocks: &blocks, pods, nodes: &nodes, own };
        now(node.allocator.release(&memory.client(), ip, &view)).unwrap()
    };
    assert!(free(given, &[]).unwrap_err().reason.contains("interface of this node"));
    let ready = *holdings.addresses.keys().find(|ip| !live.contains(ip)).unwrap();
    assert!(free(ready, &[]).unwrap_err().reason.contains("keeps it ready"));
    assert!(free(lost, std::slice::from_ref(&user)).unwrap_err().reason.contains("pod /x has it"));
    let released = free(lost, &[]).unwrap();
    assert_eq!(released.node.as_deref(), Some("gone"));
    // Again: it is free already.
    assert!(matches!(free(lost, &[]), Ok(Released { node: None, .. })));
    assert!(matches!(free(ip("192.0.2.1"), &[]), Ok(Released { block: None, .. })));
    assert!(!memory.blocks()[0].block.allocations.contains_key(&lost));
}

#[test]
fn a_node_that_comes_back_overtakes_the_decision_to_free_what_it_had() {
    for comes_back in [true, false] {
        let memory = Memory::default();
        let (mut a, mut b) = (Node::new("a", &small()), Node::new("b", &small()));
        a.maintain(&memory).unwrap();
        b.maintain(&memory).unwrap();
        a.add(&memory, &Ask::default()).unwrap();
        a.maintain(&memory).unwrap();
        let held = a.allocator.holdings().addresses.len();
        let nodes: BTreeSet<String> = ["b".to_owned()].into();
        let (identity, live) = (b.allocator.identity().clone(), BTreeSet::new());
        let mut found = Collected::default();
        for minutes in (0..=80).step_by(5) {
            let blocks: Vec<Block> = memory.blocks().into_iter().map(|stored| stored.block).collect();
            let own = OwnView { identity: &identity, holdings: b.allocator.holdings(), live: &live };
            let view = View { blocks: &blocks, pods: &[], nodes: &nodes, own };
            let time = Duration::from_secs(minutes * 60);
            found = collect(&view, time, &Grace::default(), &found.observations);
        }
        assert_eq!(found.releases.len(), held);
        if comes_back {
            a.now = Duration::from_secs(80 * 60);
            a.maintain(&memory).unwrap();
        }
        let freed = now(b.allocator.sweep(&memory.client(), &found)).unwrap();
        assert_eq!(freed, if comes_back { 0 } else { held });
        assert_eq!(memory.blocks().len(), if comes_back { 2 } else { 1 });
    }
}
