#![allow(clippy::unwrap_used)]

use super::*;
use crate::reconcile::laws;
use crate::snapshot::Reach;
use crate::wireguard::memory::{MemoryDatapath, MemoryDatapaths, carry_out};
use keyservice::PrivateKey;
use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;

fn own() -> PrivateKey {
    PrivateKey::from_bytes(&[7; 32])
}

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n; 32])
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], port))
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
}

fn peer(prefixes: &[&str], endpoint: u16) -> WireguardPeer {
    WireguardPeer {
        name: "b".into(),
        endpoint: Some(at(endpoint)),
        allowed_ips: prefixes.iter().map(|prefix| net(prefix)).collect(),
        persistent_keepalive: 0,
        learned: false,
        reach: Reach::default(),
        connect: false,
    }
}

fn device(peers: impl IntoIterator<Item = (u8, WireguardPeer)>) -> WireguardDevice {
    WireguardDevice {
        public_key: own().public(),
        listen_port: 51820,
        fwmark: 0,
        preshared: false,
        peers: peers.into_iter().map(|(n, peer)| (key(n), peer)).collect(),
    }
}

fn desired(device: WireguardDevice) -> Desired {
    Desired { prune: true, wireguard: [("margay0".to_owned(), device)].into(), ..Desired::default() }
}

fn reconciler(datapath: &MemoryDatapath) -> WireguardReconciler {
    let datapaths = MemoryDatapaths([("margay0".to_owned(), datapath.clone())].into());
    WireguardReconciler::new(Box::new(datapaths), KeyRing::new([own()]))
}

async fn pass(reconciler: &mut WireguardReconciler, desired: &Desired) -> u64 {
    let report = reconciler.reconcile(desired).await.unwrap();
    assert!(report.errors.is_empty(), "{report:?}");
    report.operations
}

#[tokio::test]
async fn a_new_agent_takes_a_running_device_over_without_an_operation() {
    let datapath = MemoryDatapath::default();
    let desired = desired(device([(1, peer(&["10.1.0.0/24"], 1)), (2, peer(&["10.2.0.0/24"], 2))]));
    assert!(pass(&mut reconciler(&datapath), &desired).await > 0);
    datapath.take_applied();
    assert_eq!(pass(&mut reconciler(&datapath), &desired).await, 0);
    assert!(datapath.take_applied().is_empty());
}

#[tokio::test]
async fn a_roamed_endpoint_survives_until_the_desired_one_changes() {
    let datapath = MemoryDatapath::default();
    let mut agent = reconciler(&datapath);
    let wish = desired(device([(1, peer(&["10.1.0.0/24"], 1))]));
    pass(&mut agent, &wish).await;
    datapath.change(|device| device.peers.get_mut(&key(1)).unwrap().endpoint = Some(at(999)));
    assert_eq!(pass(&mut agent, &wish).await, 0);
    let moved = desired(device([(1, peer(&["10.1.0.0/24"], 2))]));
    assert_eq!(pass(&mut agent, &moved).await, 1);
    let seen = crate::wireguard::Datapath::read(&datapath).await.unwrap();
    assert_eq!(seen.peers[&key(1)].endpoint, Some(at(2)));
}

#[tokio::test]
async fn a_peer_to_be_tried_afresh_is_once_and_leaves_a_failed_endpoint() {
    let datapath = MemoryDatapath::default();
    let mut agent = reconciler(&datapath);
    let mut wish = peer(&["10.1.0.0/24"], 1);
    pass(&mut agent, &desired(device([(1, wish.clone()), (2, peer(&["10.2.0.0/24"], 2))]))).await;
    datapath.take_applied();
    // Another handshake where it is.
    datapath.change(|device| device.peers.get_mut(&key(1)).unwrap().endpoint = Some(at(999)));
    wish.reach = Reach { attempt: 1, failed: Vec::new() };
    let retry = desired(device([(1, wish.clone()), (2, peer(&["10.2.0.0/24"], 2))]));
    assert_eq!(pass(&mut agent, &retry).await, 1);
    let ops = datapath.take_applied();
    let [Op::SetPeer(who, update)] = ops.as_slice() else { panic!("{ops:?}") };
    assert_eq!((*who, update.initiate, update.endpoint), (key(1), true, None));
    assert_eq!(pass(&mut agent, &retry).await, 0, "once");
    // From where it failed back to what is desired, though that did not change.
    wish.reach = Reach { attempt: 2, failed: vec![at(999)] };
    let retry = desired(device([(1, wish), (2, peer(&["10.2.0.0/24"], 2))]));
    assert_eq!(pass(&mut agent, &retry).await, 1);
    let seen = crate::wireguard::Datapath::read(&datapath).await.unwrap();
    assert_eq!(seen.peers[&key(1)].endpoint, Some(at(1)));
}

/// A key ring whose key has this secret.
fn ring(secret: &[u8]) -> KeyRing {
    let ring = KeyRing::default();
    put(&ring, secret);
    ring
}

fn put(ring: &KeyRing, secret: &[u8]) {
    let secret = Some(keyservice::rotation::Secret::new(secret).unwrap());
    ring.put(0, &keyservice::rotation::SlotKey { private: own(), secret });
}

#[tokio::test]
async fn preshared_keys_are_written_once_again_after_a_start_and_when_they_change() {
    let datapath = MemoryDatapath::default();
    let datapaths = MemoryDatapaths([("margay0".to_owned(), datapath.clone())].into());
    let agent = |ring: &KeyRing| WireguardReconciler::new(Box::new(datapaths.clone()), ring.clone());
    let ring = ring(b"a secret of sixteen bytes");
    let peers = || device([(1, peer(&["10.1.0.0/24"], 1)), (2, peer(&["10.2.0.0/24"], 2))]);
    let wish = desired(WireguardDevice { preshared: true, ..peers() });
    let written = |ops: Vec<Op>| {
        let key = |op| match op {
            Op::SetPeer(key, PeerUpdate { preshared_key: Some(preshared), .. }) => Some((key, preshared)),
            _ => None,
        };
        ops.into_iter().filter_map(key).collect::<Vec<_>>()
    };
    let mut first = agent(&ring);
    assert!(pass(&mut first, &wish).await > 0);
    let keys = written(datapath.take_applied());
    assert_eq!(keys.len(), 2);
    assert!(
        keys.iter()
            .all(|(peer, preshared)| ring.preshared(&own().public(), peer).as_ref() == Some(preshared))
    );
    assert_eq!(pass(&mut first, &wish).await, 0);
    // Nobody can tell what another agent wrote.
    let mut second = agent(&ring);
    assert_eq!((pass(&mut second, &wish).await, pass(&mut second, &wish).await), (2, 0));
    assert!(written(datapath.take_applied()) == keys);
    put(&ring, b"another secret of many bytes");
    assert_eq!((pass(&mut second, &wish).await, pass(&mut second, &wish).await), (2, 0));
    assert!(written(datapath.take_applied()).iter().all(|new| !keys.contains(new)));
    // A datapath that lost everything gets them with its peers.
    datapath.change(|device| *device = Device::default());
    pass(&mut second, &wish).await;
    assert_eq!(written(datapath.take_applied()).len(), 2);
    assert_eq!(
        (pass(&mut second, &desired(peers())).await, pass(&mut second, &desired(peers())).await),
        (2, 0)
    );
    assert!(written(datapath.take_applied()).iter().all(|(_, preshared)| preshared.is_none()));
}

#[tokio::test]
async fn without_its_secret_a_device_is_left_alone() {
    let datapath = MemoryDatapath::default();
    let wish = WireguardDevice { preshared: true, ..device([(1, peer(&["10.1.0.0/24"], 1))]) };
    let report = reconciler(&datapath).reconcile(&desired(wish)).await.unwrap();
    assert!(report.errors[0].to_string().contains("the secret of"), "{report:?}");
    assert!(datapath.take_applied().is_empty());
}

#[test]
fn a_session_that_is_wanted_is_asked_for_until_it_is_there_and_not_all_the_time() {
    let wish = device([(1, WireguardPeer { connect: true, ..peer(&["10.1.0.0/24"], 1) }), (2, peer(&[], 2))]);
    let mut actual = Device::default();
    assert!(connections(&actual, &wish, &BTreeMap::new(), now()).is_empty(), "it is added with the wish");
    let ops = diff(&actual, &wish, true, &Endpoints::new(), &KeyRing::new([own()]), now());
    let initiates = |op: &&Op| matches!(op, Op::SetPeer(_, update) if update.initiate);
    assert_eq!(ops.iter().filter(initiates).count(), 1);
    ops.iter().for_each(|op| carry_out(&mut actual, op));
    let ago = |seconds| now() - Duration::from_secs(seconds);
    let begun = |seconds| BTreeMap::from([(key(1), ago(seconds))]);
    assert_eq!(connections(&actual, &wish, &BTreeMap::new(), now()), [key(1)]);
    assert!(connections(&actual, &wish, &begun(2), now()).is_empty());
    assert_eq!(connections(&actual, &wish, &begun(6), now()), [key(1)]);
    actual.peers.get_mut(&key(1)).unwrap().last_handshake = Some(ago(1));
    assert!(connections(&actual, &wish, &begun(6), now()).is_empty());
}

#[tokio::test]
async fn a_device_that_nobody_needs_gives_up_a_port_that_another_needs() {
    let (busy, idle) = (MemoryDatapath::default(), MemoryDatapath::default());
    idle.change(|device| device.listen_port = 51820);
    let datapaths = [("margay0".to_owned(), busy.clone()), ("margay1".to_owned(), idle.clone())];
    let mut agent =
        WireguardReconciler::new(Box::new(MemoryDatapaths(datapaths.into())), KeyRing::new([own()]));
    pass(&mut agent, &desired(device([]))).await;
    assert_eq!(crate::wireguard::Datapath::read(&idle).await.unwrap().listen_port, 0);
    idle.change(|device| device.listen_port = 51821);
    assert_eq!(pass(&mut agent, &desired(device([]))).await, 0);
}

#[tokio::test]
async fn an_endpoint_that_was_only_learned_is_not_forced_on_a_live_session() {
    let datapath = MemoryDatapath::default();
    let mut agent = reconciler(&datapath);
    let learned =
        |port| desired(device([(1, WireguardPeer { learned: true, ..peer(&["10.1.0.0/24"], port) })]));
    pass(&mut agent, &learned(1)).await;
    let change = |port, handshake| {
        datapath.change(|device| {
            let peer = device.peers.get_mut(&key(1)).unwrap();
            (peer.endpoint, peer.last_handshake) = (Some(at(port)), handshake);
        });
    };
    #[allow(clippy::disallowed_methods)]
    change(3, Some(SystemTime::now()));
    assert_eq!(pass(&mut agent, &learned(2)).await, 0, "it has moved on since");
    change(3, None);
    assert_eq!(pass(&mut agent, &learned(4)).await, 1);
}

#[test]
fn at_takeover_a_live_session_keeps_its_endpoint_and_a_dead_one_gets_ours() {
    let wish = device([(1, peer(&["10.1.0.0/24"], 1))]);
    let mut actual = Device::default();
    let none = Endpoints::new();
    for op in diff(&actual, &wish, true, &none, &KeyRing::new([own()]), now()) {
        carry_out(&mut actual, &op);
    }
    let mut case = |handshake: Option<u64>| {
        let peer = actual.peers.get_mut(&key(1)).unwrap();
        peer.endpoint = Some(at(999));
        peer.last_handshake = handshake.map(|age| now() - Duration::from_secs(age));
        diff(&actual, &wish, true, &none, &KeyRing::default(), now()).len()
    };
    assert_eq!((case(Some(10)), case(Some(500)), case(None)), (0, 1, 1));
}

#[test]
fn a_prefix_that_moves_is_one_operation_on_its_new_owner() {
    let keys = KeyRing::new([own()]);
    let none = Endpoints::new();
    let mut actual = Device::default();
    let before = device([(1, peer(&["10.1.0.0/24", "10.9.0.0/24"], 1)), (2, peer(&["10.2.0.0/24"], 2))]);
    for op in diff(&actual, &before, true, &none, &keys, now()) {
        carry_out(&mut actual, &op);
    }
    let after = device([(1, peer(&["10.1.0.0/24"], 1)), (2, peer(&["10.2.0.0/24", "10.9.0.0/24"], 2))]);
    let ops = diff(&actual, &after, true, &none, &keys, now());
    let [Op::SetPeer(owner, update)] = ops.as_slice() else { panic!("{ops:?}") };
    assert_eq!((*owner, &update.add_allowed_ips), (key(2), &BTreeSet::from([net("10.9.0.0/24")])));
    assert!(update.remove_allowed_ips.is_empty() && !update.replace_allowed_ips);
    carry_out(&mut actual, &ops[0]);
    assert!(diff(&actual, &after, true, &none, &keys, now()).is_empty());
}

#[tokio::test]
async fn a_restarted_datapath_gets_everything_again() {
    let datapath = MemoryDatapath::default();
    let mut agent = reconciler(&datapath);
    let wish = desired(device([(1, peer(&["10.1.0.0/24"], 1))]));
    pass(&mut agent, &wish).await;
    datapath.change(|device| *device = Device::default());
    pass(&mut agent, &wish).await;
    let seen = crate::wireguard::Datapath::read(&datapath).await.unwrap();
    assert_eq!((seen.public_key, seen.peers[&key(1)].endpoint), (Some(own().public()), Some(at(1))));
}

#[tokio::test]
async fn cleanup_leaves_neither_key_nor_peer() {
    let datapath = MemoryDatapath::default();
    let mut agent = reconciler(&datapath);
    pass(&mut agent, &desired(device([(1, peer(&["10.1.0.0/24"], 1))]))).await;
    let nothing = Desired { prune: true, ..Desired::default() };
    assert_eq!(pass(&mut agent, &nothing).await, 2);
    let seen = crate::wireguard::Datapath::read(&datapath).await.unwrap();
    assert!(seen.public_key.is_none() && seen.peers.is_empty());
    assert_eq!(pass(&mut agent, &nothing).await, 0);
}

#[tokio::test]
async fn an_absent_device_names_its_unit_and_a_foreign_key_its_public_half() {
    let mut agent = WireguardReconciler::new(Box::new(MemoryDatapaths::default()), KeyRing::new([own()]));
    let report = agent.reconcile(&desired(device([]))).await.unwrap();
    assert!(report.errors[0].to_string().contains("is mesh-datapath@margay0 running?"), "{report:?}");

    let mut agent = reconciler(&MemoryDatapath::default());
    let stranger = WireguardDevice { public_key: key(9), ..device([]) };
    let report = agent.reconcile(&desired(stranger)).await.unwrap();
    assert!(report.errors[0].to_string().contains(&key(9).to_string()), "{report:?}");
    assert_eq!(format!("{:?}", KeyRing::new([own()])), format!("{{{:?}}}", own().public()));
}

fn prefixes() -> impl Strategy<Value = BTreeSet<IpNet>> {
    btree_set((0..6u8).prop_map(|n| IpNet::new([10, n, 0, 0].into(), 24).unwrap()), 0..4)
}

prop_compose! {
    fn wish()(peers in btree_map(1..5u8, (prefixes(), 0..3u16, 0..2u16), 0..4)) -> WireguardDevice {
        let mut taken = BTreeSet::new();
        let peers = peers.into_iter().map(|(n, (mut prefixes, endpoint, keepalive))| {
            prefixes.retain(|prefix| taken.insert(*prefix));
            (n, WireguardPeer {
                name: String::new(),
                endpoint: (endpoint > 0).then(|| at(endpoint)),
                allowed_ips: prefixes,
                persistent_keepalive: keepalive,
                learned: false,
                reach: Reach::default(), connect: false,
            })
        });
        device(peers)
    }
}

prop_compose! {
    fn state()(
        keyed: bool, port: bool,
        peers in btree_map(1..5u8, (prefixes(), 0..3u16, any::<bool>()), 0..4),
    ) -> Device {
        let mut start = Device {
            public_key: keyed.then(|| own().public()),
            listen_port: if port { 51820 } else { 0 },
            ..Device::default()
        };
        for (n, (add_allowed_ips, endpoint, preshared)) in peers {
            carry_out(&mut start, &Op::SetPeer(key(n), PeerUpdate {
                add_allowed_ips,
                endpoint: (endpoint > 0).then(|| at(endpoint)),
                preshared_key: Some(PresharedKey::from_bytes([u8::from(preshared); 32])),
                ..PeerUpdate::default()
            }));
        }
        start
    }
}

proptest! {
    #[test]
    fn a_device_becomes_as_desired(
        start in state(), wish in wish(), prune: bool, failures in laws::failures(),
    ) {
        let keys = KeyRing::new([own()]);
        let none = Endpoints::new();
        let step = |actual: &Device| diff(actual, &wish, prune, &none, &keys, now());
        let end = laws::converge(start.clone(), failures, step, carry_out)?;
        prop_assert_eq!(end.public_key, Some(wish.public_key));
        prop_assert_eq!(end.listen_port, wish.listen_port);
        for (key, wish) in &wish.peers {
            let peer = &end.peers[key];
            prop_assert!(!peer.has_preshared_key);
            prop_assert!(wish.endpoint.is_none() || peer.endpoint == wish.endpoint);
            prop_assert_eq!(peer.persistent_keepalive, wish.persistent_keepalive);
            match prune {
                true => prop_assert_eq!(&peer.allowed_ips, &wish.allowed_ips),
                false => prop_assert!(peer.allowed_ips.is_superset(&wish.allowed_ips)),
            }
        }
        let strangers: Vec<_> = end.peers.keys().filter(|key| !wish.peers.contains_key(*key)).collect();
        match prune {
            true => prop_assert!(strangers.is_empty()),
            false => prop_assert!(start.peers.keys().all(|key| end.peers.contains_key(key))),
        }
    }
}
