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

prop_compose! {
    fn some_node()(
        seed in 1u8..6,
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
            node,
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
    ) -> Snapshot {
        let mut cluster = Cluster { nodes, ..Cluster::default() };
        cluster.pods = pods.into_iter().map(|(name, pod)| (pod_name(&name), pod)).collect();
        cluster.mesh.pools = pools.iter().map(IpNet::trunc).collect();
        cluster.mesh.strict_encryption = strict;
        let endpoints = endpoints.into_iter().enumerate().map(|(index, (ip, pod, ifindex))| {
            (format!("mgy{index}"), Endpoint { ips: vec![ip], ifindex, ..endpoint(&pod, &[]) })
        });
        let local = Local {
            node_name: "a".into(),
            public_key: has_key.then(|| key(1)),
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
    fn no_prefix_is_in_two_peers_and_none_of_ours_in_any(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        let mut seen = BTreeSet::new();
        let own = planned.own.addresses.iter().chain(&planned.own.tunnel_addresses).copied().map(IpNet::from);
        let own: BTreeSet<IpNet> = own.chain(planned.own.pod_cidrs.iter().copied()).collect();
        for peer in all_peers(&planned) {
            for prefix in &peer.allowed_ips {
                prop_assert!(seen.insert(*prefix), "{prefix} is in two peers");
                prop_assert!(!own.contains(prefix), "{prefix} is ours and in {}", peer.name);
                prop_assert_eq!(*prefix, prefix.trunc());
            }
            prop_assert!(peer.name != "a");
        }
    }

    #[test]
    fn every_route_into_the_tunnel_is_exactly_one_peers(snapshot in some_snapshot()) {
        let planned = plan(&snapshot);
        for route in &planned.desired.routes {
            if let RouteTarget::Device { name, .. } = &route.target && name == defaults::DEVICE && snapshot.local.public_key.is_some() {
                let owners = all_peers(&planned).iter().filter(|peer| peer.allowed_ips.contains(&route.dst)).count();
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
