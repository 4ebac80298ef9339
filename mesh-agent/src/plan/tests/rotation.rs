//! A node on its way from one key to the next.

use keyservice::announcement::{ANNOTATION_ENDPOINTS, ANNOTATION_KEYS};

use super::*;

/// Node `a` of three on the way from epoch 4 to epoch 5, with keys 1 and 11.
fn moving() -> (Cluster, Snapshot) {
    let (mut cluster, mut snapshot) = three_nodes();
    for (name, seed) in [("b", 2), ("c", 3)] {
        announce(node_mut(&mut cluster, name), &[(4, seed)]);
    }
    snapshot.local.rotation = State { slots: vec![slot(5, 11), slot(4, 1)], ..State::default() };
    snapshot.local.devices = defaults::DEVICES.map(str::to_owned).into();
    (cluster, snapshot)
}

/// (epoch, key), newest first.
fn announce(node: &mut Node, keys: &[(u64, u8)]) {
    let claim = |(epoch, seed): &(u64, u8)| KeyClaim {
        public_key: key(*seed),
        port: defaults::PORT + (*epoch % 2) as u16,
        epoch: *epoch,
    };
    let keys: Vec<_> = keys.iter().map(claim).collect();
    node.annotations.insert(ANNOTATION_KEYS.into(), serde_json::to_string(&keys).unwrap());
}

/// Of peer `name` on `device`: (key, endpoint, connect).
fn peer(planned: &Planned, device: &str, name: &str) -> Option<(PublicKey, String, bool)> {
    let peers = &planned.desired.wireguard[device].peers;
    let (key, peer) = peers.iter().find(|(_, peer)| peer.name == name)?;
    Some((*key, peer.endpoint.unwrap().to_string(), peer.connect))
}

fn way(planned: &Planned, address: &str) -> String {
    leads_to(planned, defaults::TABLE, ip(address)).unwrap()
}

#[test]
fn a_peer_is_sent_to_by_the_old_key_until_it_is_moved() {
    let (mut cluster, mut snapshot) = moving();
    announce(node_mut(&mut cluster, "b"), &[(5, 12), (4, 2)]);
    let planned = plan_of(cluster.clone(), snapshot.clone());
    assert_eq!(planned.issues, []);
    let at = |port: u16, node: u8| format!("192.0.2.{node}:{port}");
    assert_eq!(peer(&planned, "margay0", "b"), Some((key(2), at(51820, 2), false)));
    assert_eq!(peer(&planned, "margay1", "b"), Some((key(12), at(51821, 2), true)));
    assert_eq!(peer(&planned, "margay0", "c"), Some((key(3), at(51820, 3), false)));
    assert_eq!(peer(&planned, "margay1", "c"), None);
    for address in ["10.244.2.9", "fd00:10:2::9", "10.244.3.9"] {
        assert_eq!(way(&planned, address), "margay0", "{address}");
    }
    snapshot.local.rotation.moved.insert("b".into());
    let planned = plan_of(cluster, snapshot);
    assert_eq!(
        (way(&planned, "10.244.2.9"), way(&planned, "10.244.3.9")),
        ("margay1".into(), "margay0".into())
    );
    assert_eq!(leads_to(&planned, defaults::TABLE_FROM_PODS, ip("192.0.2.2")).unwrap(), "margay1");
    assert!(!peer(&planned, "margay1", "b").unwrap().2, "it has its session");
    assert_eq!(planned.claims["b"].len(), 2);
}

#[test]
fn both_devices_are_ready_and_the_announcement_has_both_keys() {
    let (cluster, snapshot) = moving();
    let planned = plan_of(cluster, snapshot);
    let desired = &planned.desired;
    for device in defaults::DEVICES {
        assert!(desired.links[device].up && desired.policy.tunnels.contains(device));
        assert_eq!(desired.addresses[device].len(), 2, "the tunnel addresses are on both");
        assert_eq!(desired.sysctls[&format!("net/ipv4/conf/{device}/rp_filter")], "2");
    }
    let announced = planned.announcement.unwrap();
    let keys: Vec<_> = announced.keys.iter().map(|key| (key.public_key, key.epoch, key.port)).collect();
    assert_eq!(keys, [(key(11), 5, 51821), (key(1), 4, 51820)]);
    assert_eq!(announced.endpoints, [socket("192.0.2.1:51821")], "the ports are those of the newest key");
}

#[test]
fn a_key_is_ready_before_it_is_announced_and_receives_after_it_is_no_more() {
    let (cluster, mut snapshot) = moving();
    snapshot.local.rotation.slots[0].announced = false;
    let planned = plan_of(cluster.clone(), snapshot.clone());
    let epochs = |planned: &Planned| {
        let keys = &planned.announcement.as_ref().unwrap().keys;
        keys.iter().map(|key| key.epoch).collect::<Vec<_>>()
    };
    assert_eq!((epochs(&planned), planned.desired.wireguard.len()), (vec![4], 2));
    assert_eq!(planned.announcement.as_ref().unwrap().endpoints, [socket("192.0.2.1:51820")]);
    let slots = &mut snapshot.local.rotation.slots;
    (slots[0].announced, slots[1].announced) = (true, false);
    let planned = plan_of(cluster, snapshot);
    assert_eq!((epochs(&planned), planned.desired.wireguard["margay0"].peers.len()), (vec![5], 2));
}

#[test]
fn a_peer_that_announces_its_old_key_no_more_is_still_received_from() {
    let (mut cluster, mut snapshot) = moving();
    announce(node_mut(&mut cluster, "b"), &[(5, 12)]);
    let held = KeyClaim { public_key: key(2), port: 51820, epoch: 4 };
    snapshot.local.rotation.held.insert("b".into(), held.clone());
    let planned = plan_of(cluster.clone(), snapshot.clone());
    assert_eq!(peer(&planned, "margay0", "b"), Some((key(2), "192.0.2.2:51820".into(), false)));
    assert_eq!(way(&planned, "10.244.2.9"), "margay0", "no handshake has shown that the new one works");
    // Somebody else may have it now: it is theirs.
    announce(node_mut(&mut cluster, "c"), &[(4, 2)]);
    snapshot.local.rotation.held.insert("b".into(), held);
    let planned = plan_of(cluster, snapshot);
    assert_eq!(peer(&planned, "margay0", "c").unwrap().0, key(2));
    assert_eq!((peer(&planned, "margay0", "b"), way(&planned, "10.244.2.9")), (None, "margay1".into()));
}

#[test]
fn a_peer_in_no_common_epoch_is_unreachable_and_told() {
    let (mut cluster, snapshot) = moving();
    announce(node_mut(&mut cluster, "b"), &[(8, 12)]);
    let planned = plan_of(cluster, snapshot);
    assert_eq!(reasons(&planned), [("Node/b".into(), "NoCommonEpoch".into())]);
    assert!(planned.issues[0].message.contains("epoch 8 and this node's of 5 and 4"), "{:?}", planned.issues);
    assert_eq!(way(&planned, "10.244.2.9"), "unreachable");
    assert_eq!(leads_to(&planned, defaults::TABLE_FROM_PODS, ip("192.0.2.2")).unwrap(), "unreachable");
}

#[test]
fn forwarded_ports_come_in_pairs() {
    let (mut cluster, mut snapshot) = moving();
    snapshot.local.endpoints = vec![socket("198.51.100.1:4000")];
    let b = node_mut(&mut cluster, "b");
    announce(b, &[(5, 12), (4, 2)]);
    b.internal_ips.clear();
    b.annotations.insert(ANNOTATION_ENDPOINTS.into(), "198.51.100.2:7001".into());
    let planned = plan_of(cluster.clone(), snapshot.clone());
    assert_eq!(planned.announcement.as_ref().unwrap().endpoints, [socket("198.51.100.1:4001")]);
    let endpoint = |planned: &Planned, device: &str| peer(planned, device, "b").unwrap().1;
    assert_eq!(endpoint(&planned, "margay1"), "198.51.100.2:7001");
    assert_eq!(endpoint(&planned, "margay0"), "198.51.100.2:7000");
    let b = node_mut(&mut cluster, "b");
    b.annotations.insert(crate::plan::ANNOTATION_ENDPOINT_OVERRIDE.into(), "198.51.100.3:80".into());
    let planned = plan_of(cluster, snapshot);
    assert_eq!(endpoint(&planned, "margay1"), "198.51.100.3:81");
    assert_eq!(endpoint(&planned, "margay0"), "198.51.100.3:80");
}

#[test]
fn an_idle_device_is_ready_and_has_nothing_and_one_that_is_not_there_is_not_missed() {
    let (cluster, mut snapshot) = three_nodes();
    snapshot.local.devices = defaults::DEVICES.map(str::to_owned).into();
    let planned = plan_of(cluster.clone(), snapshot.clone());
    let desired = &planned.desired;
    assert!(desired.links.contains_key("margay1") && desired.policy.tunnels.contains("margay1"));
    assert!(!desired.wireguard.contains_key("margay1") && !desired.addresses.contains_key("margay1"));
    snapshot.local.devices.remove("margay1");
    let desired = plan_of(cluster, snapshot).desired;
    assert!(!desired.links.contains_key("margay1") && !desired.policy.tunnels.contains("margay1"));
}

#[test]
fn what_came_back_of_a_former_key_is_no_other_node() {
    let (mut cluster, mut snapshot) = three_nodes();
    snapshot.local.rotation.slots = vec![Slot { announced: false, ..slot(9, 11) }];
    let before = plan_of(cluster.clone(), snapshot.clone());
    assert!(reasons(&before).contains(&("Node/a".into(), "NameTaken".into())));
    snapshot.local.former_keys.insert(key(1));
    let planned = plan_of(cluster.clone(), snapshot.clone());
    assert_eq!((planned.announcement, planned.own.pod_cidrs.len()), (None, 2));
    assert!(!planned.issues.iter().any(|issue| issue.reason == "NameTaken"), "{:?}", planned.issues);
    announce(node_mut(&mut cluster, "a"), &[(0, 9)]);
    assert!(reasons(&plan_of(cluster, snapshot)).contains(&("Node/a".into(), "NameTaken".into())));
}
