//! What is leaked, against an oracle that reads the whole history anew at each look.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use mesh_ipam::block::Block;
use mesh_ipam::collect::{
    Collected, Grace, Leak, Observations, OwnView, PodView, View, collect, is_responsible,
};
use mesh_ipam::holdings::{Holdings, Identity};
use mesh_ipam::object::{Allocation, Handle, HandleKind};
use proptest::prelude::*;

const MINUTE: Duration = Duration::from_secs(60);
const GRACE: Grace = Grace {
    gone: Duration::from_secs(75 * 60),
    stray: Duration::from_secs(10 * 60),
    step: Duration::from_secs(20 * 60),
};

#[derive(Debug, Clone)]
struct Scene {
    blocks: Vec<Block>,
    pods: Vec<PodView>,
    nodes: BTreeSet<String>,
    holdings: Holdings,
    live: BTreeSet<IpAddr>,
    now: Duration,
}

impl Scene {
    fn new() -> Self {
        Self {
            blocks: vec![Block::new("10.0.0.0/30".parse().unwrap(), Some("b".into()))],
            pods: Vec::new(),
            nodes: ["a", "b"].map(str::to_owned).into(),
            holdings: Holdings::default(),
            live: BTreeSet::new(),
            now: Duration::ZERO,
        }
    }

    fn look(&self, before: &Observations) -> Collected {
        let identity = me();
        let own = OwnView { identity: &identity, holdings: &self.holdings, live: &self.live };
        let view = View { blocks: &self.blocks, pods: &self.pods, nodes: &self.nodes, own };
        collect(&view, self.now, &GRACE, before)
    }

    fn give(&mut self, last: u8, node: &str, instance: &str, handle: Option<Handle>) {
        let entry = Allocation { node: node.into(), instance: instance.into(), handle };
        self.blocks[0].allocations.insert(ip(last), entry);
    }
}

fn me() -> Identity {
    Identity { node: "a".into(), instance: "1".into() }
}

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn handle(name: &str, uid: &str) -> Handle {
    let namespace = "default".to_owned();
    Handle { kind: HandleKind::Pod, namespace, name: name.into(), uid: uid.into(), ..Handle::tunnel() }
}

fn pod(name: &str, uid: &str, node: &str, ips: &[IpAddr]) -> PodView {
    PodView {
        namespace: "default".into(),
        name: name.into(),
        uid: uid.into(),
        node: node.into(),
        ips: ips.to_vec(),
        finished: false,
    }
}

/// Looks every ten minutes until something is freed; how many minutes that took.
fn until_freed(scene: &mut Scene) -> Option<u64> {
    let mut seen = Observations::default();
    for minutes in (0..600).step_by(10) {
        scene.now = minutes as u32 * MINUTE;
        let found = scene.look(&seen);
        if !found.releases.is_empty() {
            return Some(minutes);
        }
        seen = found.observations;
    }
    None
}

#[test]
fn each_leak_has_its_grace() {
    let mut scene = Scene::new();
    scene.give(1, "gone", "1", Some(handle("p", "u")));
    assert_eq!(until_freed(&mut scene), Some(80));

    let mut scene = Scene::new();
    scene.give(1, "a", "0", None);
    assert_eq!(until_freed(&mut scene), Some(80), "a former machine of our name");

    let mut scene = Scene::new();
    scene.give(1, "a", "1", None);
    assert_eq!(until_freed(&mut scene), Some(10), "ours by an answer that was lost");
}

type Make = fn(&mut Scene);

#[test]
fn what_somebody_may_use_is_never_freed() {
    let cases: [(&str, Make); 8] = [
        ("another node's, which lives", |s| s.give(1, "b", "1", Some(handle("p", "u")))),
        ("kept ready by another node", |s| s.give(1, "b", "1", None)),
        ("kept ready here", |s| {
            s.give(1, "a", "1", None);
            s.holdings.addresses.insert(ip(1), s.blocks[0].cidr);
        }),
        ("in use here", |s| {
            s.give(1, "a", "0", None);
            s.live.insert(ip(1));
        }),
        ("a pod has it, whatever its name", |s| {
            s.give(1, "gone", "1", Some(handle("p", "u")));
            s.pods.push(pod("other", "x", "b", &[ip(1)]));
        }),
        ("its pod has no status yet", |s| {
            s.give(1, "gone", "1", Some(handle("p", "u")));
            s.pods.push(pod("p", "u", "gone", &[]));
        }),
        ("its pod is not known by uid", |s| {
            s.give(1, "gone", "1", Some(handle("p", "")));
            s.pods.push(pod("p", "u", "gone", &[]));
        }),
        ("an unscheduled pod of its name", |s| {
            s.give(1, "gone", "1", Some(handle("p", "u")));
            s.pods.push(pod("p", "u", "", &[]));
        }),
    ];
    for (what, make) in cases {
        let mut scene = Scene::new();
        make(&mut scene);
        assert_eq!(until_freed(&mut scene), None, "{what}");
    }
}

#[test]
fn a_pod_of_the_same_name_elsewhere_or_finished_does_not_keep_it() {
    let restarted = pod("p", "new", "gone", &[]);
    let elsewhere = pod("p", "u", "b", &[]);
    let finished = PodView { finished: true, ..pod("p", "u", "gone", &[ip(1)]) };
    for other in [restarted, elsewhere, finished] {
        let mut scene = Scene::new();
        scene.give(1, "gone", "1", Some(handle("p", "u")));
        scene.pods.push(other.clone());
        assert_eq!(until_freed(&mut scene), Some(80), "{other:?}");
    }
}

#[test]
fn a_clock_that_jumps_ahead_frees_nothing_sooner_than_looks_do() {
    let mut scene = Scene::new();
    scene.give(1, "gone", "1", None);
    let first = scene.look(&Observations::default());
    scene.now = Duration::from_secs(1_000_000);
    let second = scene.look(&first.observations);
    assert!(second.releases.is_empty());
    scene.now = Duration::ZERO;
    assert!(scene.look(&second.observations).releases.is_empty());
}

#[test]
fn a_gone_nodes_block_is_let_go() {
    let mut scene = Scene::new();
    scene.nodes.remove("b");
    let mut seen = Observations::default();
    for minutes in [0, 20, 40, 60] {
        scene.now = minutes * MINUTE;
        let found = scene.look(&seen);
        assert!(found.orphans.is_empty());
        seen = found.observations;
    }
    scene.now = 80 * MINUTE;
    assert_eq!(scene.look(&seen).orphans[0].node, "b");
    scene.nodes.insert("b".into());
    assert!(scene.look(&seen).orphans.is_empty());
}

#[test]
fn each_block_is_looked_after_by_the_same_few() {
    let nodes: BTreeSet<String> = (0..100).map(|at| format!("node-{at}")).collect();
    let mut load: BTreeMap<&str, usize> = BTreeMap::new();
    for third in 0..=255u8 {
        let block = ipnet::IpNet::new(IpAddr::from([10, 0, third, 0]), 24).unwrap();
        let chosen: Vec<&String> =
            nodes.iter().filter(|node| is_responsible(&block, node, &nodes, 3)).collect();
        assert_eq!(chosen.len(), 3);
        for node in chosen {
            *load.entry(node).or_default() += 1;
        }
    }
    // 768 shares over 100 nodes: nobody has a tenth of them.
    assert!(load.values().all(|count| *count < 77), "{load:?}");
    assert!(load.len() > 80);
}

/// The rule in its plainest form, for one address of the last scene.
fn oracle(history: &[Scene], ip: IpAddr) -> bool {
    let last = history.last().unwrap();
    let entry = &last.blocks[0].allocations[&ip];
    let renewals = last.blocks[0].renewals;
    let mut lasted = Duration::ZERO;
    let mut looks = 0;
    let mut needed = None;
    let mut later: Option<Duration> = None;
    for scene in history.iter().rev() {
        let same =
            scene.blocks[0].allocations.get(&ip) == Some(entry) && scene.blocks[0].renewals == renewals;
        let Some(leak) = same.then(|| naive(scene, ip)).flatten() else { break };
        needed.get_or_insert(if leak == Leak::Stray { GRACE.stray } else { GRACE.gone });
        if let Some(later) = later {
            lasted += later.saturating_sub(scene.now).min(GRACE.step);
        }
        later = Some(scene.now);
        looks += 1;
    }
    looks >= 2 && needed.is_some_and(|needed| lasted >= needed)
}

fn naive(scene: &Scene, ip: IpAddr) -> Option<Leak> {
    let entry = &scene.blocks[0].allocations[&ip];
    for pod in scene.pods.iter().filter(|pod| !pod.finished) {
        if pod.ips.contains(&ip) {
            return None;
        }
        if let Some(handle) = &entry.handle {
            let uid = handle.uid.is_empty() || pod.uid.is_empty() || handle.uid == pod.uid;
            let place = pod.node.is_empty() || pod.node == entry.node;
            if uid && place && pod.name == handle.name && pod.namespace == handle.namespace {
                return None;
            }
        }
    }
    if scene.live.contains(&ip) {
        return None;
    }
    match (entry.node.as_str(), entry.instance.as_str()) {
        ("a", "1") if scene.holdings.addresses.contains_key(&ip) => None,
        ("a", "1") => Some(Leak::Stray),
        ("a", _) => Some(Leak::Rebuilt),
        (node, _) if scene.nodes.contains(node) => None,
        _ => Some(Leak::NodeGone),
    }
}

/// Something happens between two looks.
#[derive(Debug, Clone)]
enum Event {
    Give(u8, &'static str, &'static str, Option<(&'static str, &'static str)>),
    Free(u8),
    Pod(&'static str, &'static str, &'static str),
    Status(&'static str, u8),
    Finished(&'static str),
    PodGone(&'static str),
    Node(&'static str, bool),
    Hold(u8, bool),
    Live(u8, bool),
    Renew,
    Clock(i32),
}

fn event() -> impl Strategy<Value = Event> {
    let at = 0u8..4;
    let node = prop::sample::select(vec!["a", "b", "c"]);
    let name = prop::sample::select(vec!["p", "q"]);
    let uid = prop::sample::select(vec!["", "u", "v"]);
    let instance = prop::sample::select(vec!["0", "1"]);
    let handle = prop::option::of((name.clone(), uid.clone()));
    prop_oneof![
        2 => (at.clone(), node.clone(), instance, handle).prop_map(|(a, n, i, h)| Event::Give(a, n, i, h)),
        1 => at.clone().prop_map(Event::Free),
        2 => (name.clone(), uid, node.clone()).prop_map(|(n, u, o)| Event::Pod(n, u, o)),
        1 => (name.clone(), at.clone()).prop_map(|(n, a)| Event::Status(n, a)),
        1 => name.clone().prop_map(Event::Finished),
        1 => name.prop_map(Event::PodGone),
        2 => (node, any::<bool>()).prop_map(|(n, there)| Event::Node(n, there)),
        1 => (at.clone(), any::<bool>()).prop_map(|(a, held)| Event::Hold(a, held)),
        1 => (at, any::<bool>()).prop_map(|(a, live)| Event::Live(a, live)),
        1 => Just(Event::Renew),
        12 => (-5i32..40).prop_map(Event::Clock),
        1 => (-500i32..5000).prop_map(Event::Clock),
    ]
}

fn apply(scene: &mut Scene, event: &Event) {
    match event {
        Event::Give(at, node, instance, what) => {
            scene.give(*at, node, instance, what.map(|(name, uid)| handle(name, uid)));
        }
        Event::Free(at) => drop(scene.blocks[0].allocations.remove(&ip(*at))),
        Event::Pod(name, uid, node) => {
            scene.pods.retain(|old| old.name != *name);
            scene.pods.push(pod(name, uid, node, &[]));
        }
        Event::Status(name, at) => {
            scene.pods.iter_mut().filter(|pod| pod.name == *name).for_each(|pod| pod.ips = vec![ip(*at)]);
        }
        Event::Finished(name) => {
            scene.pods.iter_mut().filter(|pod| pod.name == *name).for_each(|pod| pod.finished = true);
        }
        Event::PodGone(name) => scene.pods.retain(|pod| pod.name != *name),
        Event::Node(name, true) => drop(scene.nodes.insert((*name).to_owned())),
        Event::Node(name, false) => drop(scene.nodes.remove(*name)),
        Event::Hold(at, true) => drop(scene.holdings.addresses.insert(ip(*at), scene.blocks[0].cidr)),
        Event::Hold(at, false) => drop(scene.holdings.addresses.remove(&ip(*at))),
        Event::Live(at, true) => drop(scene.live.insert(ip(*at))),
        Event::Live(at, false) => drop(scene.live.remove(&ip(*at))),
        Event::Renew => scene.blocks[0].renewals += 1,
        Event::Clock(minutes) if *minutes < 0 => {
            scene.now = scene.now.saturating_sub(minutes.unsigned_abs() * MINUTE);
        }
        Event::Clock(minutes) => scene.now += minutes.unsigned_abs() * MINUTE,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn an_address_is_freed_exactly_when_every_look_said_so_for_long_enough(
        rounds in prop::collection::vec((prop::collection::vec(event(), 0..4), any::<bool>()), 1..40)
    ) {
        let mut scene = Scene::new();
        let mut seen = Observations::default();
        let mut history = Vec::new();
        for (events, outage) in rounds {
            for event in &events {
                apply(&mut scene, event);
            }
            // The API server is out: nobody looks.
            if outage && events.len() == 3 {
                continue;
            }
            history.push(scene.clone());
            let found = scene.look(&seen);
            seen = found.observations;
            let freed: BTreeSet<IpAddr> = found.releases.iter().map(|release| release.ip).collect();
            let naive: BTreeSet<IpAddr> = scene.blocks[0]
                .allocations
                .keys()
                .copied()
                .filter(|ip| oracle(&history, *ip))
                .collect();
            prop_assert_eq!(freed, naive);
        }
    }
}
