//! What holds for every snapshot, however contradictory.

use std::collections::BTreeSet;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::plan::is_reachable;

/// A small world, so that everything collides with everything.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u8..4, 0u8..6).prop_map(|(c, d)| IpAddr::from([10, 244, c, d])),
        (0u8..4).prop_map(|d| IpAddr::from([192, 0, 2, d])),
        (0u16..4, 0u16..4).prop_map(|(c, d)| IpAddr::from([0xfd00, 0x10, c, 0, 0, 0, 0, d])),
        any::<IpAddr>(),
    ]
}

fn prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        4 => (0u8..4, prop_oneof![Just(24u8), Just(25), Just(32), Just(31), Just(22)])
            .prop_map(|(c, len)| IpNet::new(IpAddr::from([10, 244, c, 0]), len).unwrap().trunc()),
        2 => (0u16..4).prop_map(|c| IpNet::new(IpAddr::from([0xfd00, 0x10, c, 0, 0, 0, 0, 0]), 64).unwrap()),
        1 => (any::<IpAddr>(), 0u8..=32).prop_map(|(ip, len)| IpNet::new(ip, len).unwrap()),
    ]
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![Just("a"), Just("b"), Just("c"), Just("d")].prop_map(str::to_owned)
}

/// Where a rotation may be, with memories that may contradict what is announced.
fn some_rotation() -> impl Strategy<Value = State> {
    let held = (name(), 1u8..12, 0u64..4).prop_map(|(name, seed, epoch)| (name, claim(seed, epoch)));
    (0u64..3, 0u8..6, proptest::collection::btree_set(name(), 0..3), vec(held, 0..3)).prop_map(
        |(epoch, phase, moved, held)| {
            let new = |announced| Slot { announced, ..slot(epoch + 1, 10) };
            let old = |announced| Slot { announced, ..slot(epoch, 1) };
            let slots = match phase {
                0 | 1 => vec![old(phase == 0)],
                2 => vec![new(false), old(true)],
                3 => vec![new(true), old(true)],
                _ => vec![new(true), old(false)],
            };
            State { slots, moved, held: held.into_iter().collect(), ..State::default() }
        },
    )
}

fn claim(seed: u8, epoch: u64) -> KeyClaim {
    KeyClaim { public_key: key(seed), port: defaults::PORT + (epoch % 2) as u16, epoch }
}

prop_compose! {
    fn some_node()(
        seed in 1u8..6,
        (epoch, second_key) in (0u64..4, any::<bool>()),
        announces in 0u8..8,
        prefixes in vec(prefix(), 0..3),
        announced in vec(prefix(), 0..2),
        internal_ips in vec(address(), 0..3),
        external_ips in vec(address(), 0..2),
        endpoints in vec((address(), 0u16..3), 0..3),
        over in proptest::option::of(".{0,20}"),
        uid in proptest::option::of(Just("u".to_owned())),
    ) -> Node {
        let mut node = node("", seed, &[], &[]);
        let mut announcement = Announcement::from_annotations("x", &node.annotations).unwrap().unwrap();
        announcement.pod_cidrs = announced;
        announcement.keys = vec![claim(seed, epoch)];
        if second_key {
            announcement.keys.insert(0, claim(seed + 5, epoch + 1));
        }
        announcement.endpoints = endpoints.into_iter().map(|(ip, port)| SocketAddr::new(ip, port)).collect();
        node.annotations = announcement.to_annotations();
        match announces {
            0 => node.annotations.clear(),
            1 => drop(node.annotations.insert(keyservice::announcement::ANNOTATION_KEYS.into(), "[".into())),
            _ => {}
        }
        node.annotations.extend(over.map(|text| (crate::plan::ANNOTATION_ENDPOINT_OVERRIDE.to_owned(), text)));
        Node { pod_cidrs: prefixes, internal_ips, external_ips, uid, ..node }
    }
}

prop_compose! {
    fn some_pod()(
        node in prop_oneof![name(), Just(String::new())],
        ips in vec(address(), 0..3),
        flags in 0u8..32,
    ) -> Pod {
        Pod {
            node: Some(node).filter(|node| !node.is_empty()),
            ips,
            host_network: flags == 1,
            finished: flags == 2,
            terminating: flags % 4 == 3,
            ..Pod::default()
        }
    }
}

prop_compose! {
    fn some_snapshot()(
        nodes in btree_map(name(), some_node(), 0..5),
        pods in btree_map("[a-e]", some_pod(), 0..8),
        endpoints in vec((address(), "[a-e]", 0u32..3), 0..3),
        pools in vec(prop_oneof![
            4 => Just(net("10.244.0.0/16")), 2 => Just(net("fd00:10::/32")), 1 => prefix()
        ], 0..3),
        (has_key, synced, strict) in (prop::bool::weighted(0.9), any::<bool>(), any::<bool>()),
        announced in vec(prefix(), 0..2),
        host in vec(address(), 0..3),
        (rotation, second) in (some_rotation(), any::<bool>()),
    ) -> Snapshot {
        let nodes = nodes.into_iter().map(|(name, node)| (name, node.into())).collect();
        let mut cluster = Cluster { nodes, ..Cluster::default() };
        pods.into_iter().for_each(|(name, pod)| add_pod(&mut cluster, &name, pod));
        cluster.mesh.pools = pools.iter().map(IpNet::trunc).collect();
        cluster.mesh.strict_encryption = strict;
        let endpoints = endpoints.into_iter().enumerate().map(|(index, (ip, pod, ifindex))| {
            (format!("mgy{index}"), Endpoint { ips: vec![ip], ifindex, ..endpoint(&pod, &[]) })
        });
        let local = Local {
            node_name: "a".into(),
            rotation: if has_key { rotation } else { State::default() },
            devices: if second { ["margay0".to_owned(), "margay1".to_owned()].into() } else { Default::default() },
            pod_cidrs: announced,
            addresses: host,
            ..Local::default()
        };
        Snapshot {
            generation: 1,
            synced,
            cluster: Arc::new(cluster),
            endpoints: endpoints.collect(),
            local,
            sources: Vec::new(),
        }
    }
}

fn all_peers(planned: &Planned) -> Vec<&WireguardPeer> {
    planned.desired.wireguard.values().flat_map(|device| device.peers.values()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_prefix_is_in_two_peers_of_a_device_and_none_of_ours_in_any(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        let own = planned.own.addresses.iter().chain(&planned.own.tunnel_addresses).copied().map(IpNet::from);
        let own: BTreeSet<IpNet> = own.chain(planned.own.pod_cidrs.iter().copied()).collect();
        for device in planned.desired.wireguard.values() {
            let mut seen = BTreeSet::new();
            for peer in device.peers.values() {
                for prefix in &peer.allowed_ips {
                    prop_assert!(seen.insert(*prefix), "{prefix} is in two peers");
                    prop_assert!(!own.contains(prefix), "{prefix} is ours and in {}", peer.name);
                    prop_assert_eq!(*prefix, prefix.trunc());
                }
                prop_assert!(peer.name != "a");
            }
        }
    }

    #[test]
    fn what_a_peer_owns_is_the_same_on_every_device(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        for one in all_peers(&planned) {
            for other in all_peers(&planned).into_iter().filter(|other| other.name == one.name) {
                prop_assert_eq!(&one.allowed_ips, &other.allowed_ips);
            }
        }
    }

    #[test]
    fn the_announced_keys_are_in_their_devices_and_no_other_key_is(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        let slots = &snapshot.local.rotation.slots;
        prop_assert_eq!(planned.desired.wireguard.len(), slots.len());
        for slot in slots {
            let device = &planned.desired.wireguard[defaults::DEVICES[(slot.epoch % 2) as usize]];
            prop_assert_eq!(device.public_key, slot.public_key);
            prop_assert!(!device.peers.keys().any(|key| slots.iter().any(|slot| slot.public_key == *key)));
        }
        let Some(announced) = planned.announcement else { return Ok(()) };
        let wanted: Vec<_> = slots.iter().filter(|slot| slot.announced).map(|slot| slot.public_key).collect();
        prop_assert_eq!(announced.keys.iter().map(|key| key.public_key).collect::<Vec<_>>(), wanted);
        for key in &announced.keys {
            let device = &planned.desired.wireguard[defaults::DEVICES[(key.epoch % 2) as usize]];
            prop_assert_eq!((device.public_key, device.listen_port), (key.public_key, key.port));
        }
        prop_assert!(announced.endpoints.iter().all(|endpoint| endpoint.port() == announced.keys[0].port));
    }

    #[test]
    fn every_route_into_the_tunnel_is_exactly_one_peers(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        for route in &planned.desired.routes {
            if let RouteTarget::Device { name, .. } = &route.target && name.starts_with("margay") {
                let peers = planned.desired.wireguard[name].peers.values();
                let owners = peers.filter(|peer| peer.allowed_ips.contains(&route.dst)).count();
                prop_assert_eq!(owners, 1, "{:?}", route);
            }
        }
    }

    #[test]
    fn no_address_of_the_pools_leaves_by_another_table(snapshot in some_snapshot(), ip in address()) {
        let planned = plan(&snapshot);
        let mesh = &snapshot.cluster.mesh;
        let backed = if mesh.strict_encryption { &mesh.pools } else { &planned.own.pod_cidrs };
        if backed.iter().any(|prefix| prefix.contains(&ip)) {
            prop_assert!(lookup(&planned, defaults::TABLE, ip).is_some(), "{ip} would leave in clear text");
        }
    }

    #[test]
    fn without_its_peer_a_prefix_is_unreachable(snapshot in some_snapshot(), gone in name()) {
        let mut snapshot = snapshot;
        let cluster = Arc::make_mut(&mut snapshot.cluster);
        cluster.mesh.strict_encryption = true;
        let before = plan(&snapshot);
        Arc::make_mut(&mut snapshot.cluster).nodes.remove(&gone);
        snapshot.local.incumbents = before.incumbents.clone();
        let after = plan(&snapshot);
        for peer in all_peers(&before).into_iter().filter(|peer| peer.name == gone) {
            for prefix in peer.allowed_ips.iter().filter(|p| in_pools(&snapshot, p)) {
                let there = lookup(&after, defaults::TABLE, prefix.network());
                prop_assert!(there.is_some(), "{prefix} of {gone}");
            }
        }
    }

    #[test]
    fn a_local_pod_is_reached_by_its_own_link_only(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        for endpoint in snapshot.endpoints.values().filter(|endpoint| endpoint.ifindex != 0) {
            for ip in &endpoint.ips {
                let route = lookup(&planned, defaults::TABLE, *ip).unwrap();
                let RouteTarget::Device { name, .. } = &route.target else { panic!("{route:?}") };
                prop_assert!(name.starts_with("mgy"), "{ip} via {name}");
            }
        }
    }

    #[test]
    fn endpoints_can_be_sent_to_and_lie_outside_the_tunnel(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        for peer in all_peers(&planned) {
            if let Some(endpoint) = peer.endpoint {
                prop_assert!(is_reachable(endpoint.ip()) && endpoint.port() != 0);
                prop_assert!(!in_pools(&snapshot, &IpNet::from(endpoint.ip())));
            }
        }
    }

    #[test]
    fn planning_again_with_what_was_remembered_changes_nothing(snapshot in some_snapshot()) {
        let first = plan(&snapshot);
        prop_assert_eq!(&first, &plan(&snapshot));
        let mut again = snapshot.clone();
        again.local.incumbents = first.incumbents.clone();
        let second = plan(&again);
        prop_assert_eq!(&first.desired.wireguard, &second.desired.wireguard);
        prop_assert_eq!(&first.desired.routes, &second.desired.routes);
        prop_assert_eq!(&first.incumbents, &second.incumbents);
    }
}

fn in_pools(snapshot: &Snapshot, prefix: &IpNet) -> bool {
    snapshot.cluster.mesh.pools.iter().any(|pool| pool.contains(prefix))
}
