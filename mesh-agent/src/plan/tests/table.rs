//! Case by case.

use super::*;
use crate::plan::ANNOTATION_ENDPOINT_OVERRIDE;

#[test]
fn three_nodes_make_a_mesh() {
    let (cluster, snapshot) = three_nodes();
    let planned = plan_of(cluster, snapshot);
    assert_eq!(planned.issues, []);
    assert_eq!(planned.own.tunnel_addresses, [ip("10.244.1.1"), ip("fd00:10:1::1")]);
    assert_eq!(allowed(&planned, "b"), ["10.244.2.0/24", "192.0.2.2/32", "fd00:10:2::/64"]);
    assert_eq!(peers(&planned)["c"].endpoint, Some(socket("192.0.2.3:51820")));
    let table = defaults::TABLE;
    for (address, target) in [
        ("10.244.2.9", Some("margay0")),
        ("fd00:10:3::9", Some("margay0")),
        ("10.244.1.9", Some("unreachable")),
        ("10.244.200.1", Some("unreachable")),
        ("192.0.2.2", None),
        ("8.8.8.8", None),
    ] {
        assert_eq!(leads_to(&planned, table, ip(address)).as_deref(), target, "{address}");
    }
    assert_eq!(leads_to(&planned, defaults::TABLE_FROM_PODS, ip("192.0.2.2")).unwrap(), "margay0");
    let src = |address| match lookup(&planned, table, ip(address)).unwrap().target.clone() {
        RouteTarget::Device { src, .. } => src,
        RouteTarget::Throw | RouteTarget::Unreachable => None,
    };
    assert_eq!(src("10.244.2.9"), Some(ip("192.0.2.1")));
    assert_eq!(src("fd00:10:2::9"), Some(ip("fd00:10:1::1")), "no InternalIP of this family");
    let rules: Vec<_> = planned.desired.rules.iter().map(|r| (r.priority, r.ipv6, r.from, r.table)).collect();
    assert_eq!(
        rules,
        [
            (30000, false, None, 4207),
            (30000, true, None, 4207),
            (30001, false, Some(net("10.244.0.0/16")), 4208),
            (30001, true, Some(net("fd00:10::/32")), 4208),
        ]
    );
    let announced = planned.announcement.unwrap();
    assert_eq!(announced.endpoints, [socket("192.0.2.1:51820")]);
    assert!(planned.desired.prune && planned.desired.generation == 7);
    assert_eq!(planned.desired.sysctls["net/ipv6/conf/all/forwarding"], "1");
}

#[test]
fn a_peer_that_leaves_becomes_unreachable_and_not_clear_text() {
    let (mut cluster, snapshot) = three_nodes();
    node_mut(&mut cluster, "b").annotations.clear();
    let planned = plan_of(cluster, snapshot);
    assert!(peers(&planned).keys().eq(["c"]));
    assert_eq!(leads_to(&planned, defaults::TABLE, ip("10.244.2.9")).unwrap(), "unreachable");
    assert_eq!(leads_to(&planned, defaults::TABLE_FROM_PODS, ip("192.0.2.2")).unwrap(), "unreachable");
}

#[test]
fn without_strict_encryption_only_our_own_prefixes_are_backed() {
    let (mut cluster, snapshot) = three_nodes();
    cluster.mesh.strict_encryption = false;
    node_mut(&mut cluster, "b").annotations.clear();
    let planned = plan_of(cluster, snapshot);
    assert_eq!(leads_to(&planned, defaults::TABLE, ip("10.244.2.9")), None);
    assert_eq!(leads_to(&planned, defaults::TABLE_FROM_PODS, ip("192.0.2.2")), None);
    assert_eq!(leads_to(&planned, defaults::TABLE, ip("10.244.1.9")).unwrap(), "unreachable");
}

#[test]
fn pods_away_from_their_nodes_prefix_are_exceptions_and_no_address_has_two_holders() {
    let (mut cluster, mut snapshot) = three_nodes();
    for (name, on, address) in [
        ("at-home", "b", "10.244.2.5"),
        ("guest", "b", "10.244.3.7"),
        ("here-by-status", "b", "10.244.1.77"),
        ("dup-1", "b", "10.244.99.1"),
        ("dup-2", "c", "10.244.99.1"),
        ("thief-of-tunnel", "b", "10.244.3.1"),
        ("thief-of-node", "b", "192.0.2.3"),
        ("thief-of-local", "b", "10.244.1.5"),
        ("outside", "b", "172.16.0.1"),
        ("nowhere", "", "10.244.98.1"),
        ("unknown-node", "z", "10.244.98.2"),
    ] {
        add_pod(&mut cluster, name, pod(on, &[address]));
    }
    let done = Pod { finished: true, ..pod("b", &["10.244.97.1"]) };
    let host = Pod { host_network: true, ..pod("b", &["192.0.2.2"]) };
    add_pod(&mut cluster, "done", done);
    add_pod(&mut cluster, "host", host);
    snapshot.endpoints.insert("mgy1".into(), endpoint("local", &["10.244.1.5", "10.244.2.200"]));
    let planned = plan_of(cluster, snapshot);
    assert_eq!(
        allowed(&planned, "b"),
        [
            "10.244.1.77/32",
            "10.244.2.0/24",
            "10.244.3.7/32",
            "10.244.99.1/32",
            "192.0.2.2/32",
            "fd00:10:2::/64"
        ]
    );
    assert_eq!(allowed(&planned, "c"), ["10.244.3.0/24", "192.0.2.3/32", "fd00:10:3::/64"]);
    assert_eq!(leads_to(&planned, defaults::TABLE, ip("10.244.2.200")).unwrap(), "mgy1");
    assert_eq!(leads_to(&planned, defaults::TABLE, ip("10.244.1.77")).unwrap(), "margay0");
    let mut told: Vec<_> = reasons(&planned);
    told.sort();
    let expected = [
        ("Pod/default/dup-2", "DuplicateAddress"),
        ("Pod/default/outside", "AddressOutsidePools"),
        ("Pod/default/thief-of-local", "DuplicateAddress"),
        ("Pod/default/thief-of-node", "DuplicateAddress"),
        ("Pod/default/thief-of-tunnel", "DuplicateAddress"),
    ];
    assert_eq!(told, expected.map(|(object, reason)| (object.to_owned(), reason.to_owned())));
    let seen = |name: &str| {
        let pods = &planned.desired.policy.view.pods;
        pods.iter().find(|pod| pod.name == name).unwrap().ips.clone()
    };
    assert_eq!(seen("dup-1"), [ip("10.244.99.1")]);
    assert!(seen("dup-2").is_empty(), "policy must not take one pod's packets for another's");
}

#[test]
fn a_running_pod_wins_an_address_over_a_terminating_one() {
    let (mut cluster, snapshot) = three_nodes();
    let old = Pod { terminating: true, ..pod("b", &["10.244.99.1"]) };
    add_pod(&mut cluster, "a-old", old);
    add_pod(&mut cluster, "b-new", pod("c", &["10.244.99.1"]));
    let planned = plan_of(cluster, snapshot);
    assert!(allowed(&planned, "c").contains(&"10.244.99.1/32".to_owned()));
    assert!(!allowed(&planned, "b").contains(&"10.244.99.1/32".to_owned()));
}

#[test]
fn endpoints_come_from_the_operator_then_the_peer_within_its_authority_then_its_node() {
    let endpoint_of_b = |change: &dyn Fn(&mut Node, &mut Local)| {
        let (mut cluster, mut snapshot) = three_nodes();
        change(node_mut(&mut cluster, "b"), &mut snapshot.local);
        let planned = plan_of(cluster, snapshot);
        let told: Vec<_> = reasons(&planned).into_iter().map(|(_, reason)| reason).collect();
        (peers(&planned)["b"].endpoint.map(|e| e.to_string()), told.join(","))
    };
    let announce = |node: &mut Node, endpoints: &str| {
        node.annotations.insert(keyservice::announcement::ANNOTATION_ENDPOINTS.into(), endpoints.into());
    };
    let overridden = |node: &mut Node, text: &str| {
        node.annotations.insert(ANNOTATION_ENDPOINT_OVERRIDE.into(), text.into());
    };
    let some = |text: &str| (Some(text.to_owned()), String::new());
    assert_eq!(endpoint_of_b(&|_, _| {}), some("192.0.2.2:51820"));
    assert_eq!(endpoint_of_b(&|b, _| announce(b, "192.0.2.2:4000")), some("192.0.2.2:4000"));
    assert_eq!(
        endpoint_of_b(&|b, _| announce(b, "198.51.100.9:4000")),
        some("192.0.2.2:51820"),
        "no authority for it"
    );
    let without_authority = |b: &mut Node, _: &mut Local| {
        b.internal_ips.clear();
        announce(b, "198.51.100.9:4000");
    };
    assert_eq!(endpoint_of_b(&without_authority), some("198.51.100.9:4000"));
    assert_eq!(endpoint_of_b(&|b, _| overridden(b, "198.51.100.1:7")), some("198.51.100.1:7"));
    assert_eq!(endpoint_of_b(&|b, _| overridden(b, "198.51.100.1")), some("198.51.100.1:51820"));
    for bad in ["b.example:7", "10.244.2.1:7", "192.0.2.1:51820", "198.51.100.1:0", ""] {
        let expected = (Some("192.0.2.2:51820".to_owned()), "InvalidEndpoint".to_owned());
        assert_eq!(endpoint_of_b(&|b, _| overridden(b, bad)), expected, "{bad:?}");
    }
    let learned = |b: &mut Node, local: &mut Local| {
        b.internal_ips.clear();
        local.learned_endpoints.insert(key(2), socket("203.0.113.5:9"));
    };
    assert_eq!(endpoint_of_b(&learned), some("203.0.113.5:9"));
    assert_eq!(endpoint_of_b(&|b, _| b.internal_ips.clear()), (None, String::new()));
    let other_family = |b: &mut Node, local: &mut Local| {
        local.addresses = vec![ip("2001:db8::1")];
        b.internal_ips.push(ip("2001:db8::2"));
    };
    assert_eq!(endpoint_of_b(&other_family), some("[2001:db8::2]:51820"));
}

#[test]
fn what_is_missing_of_this_node_is_told_and_harms_nobody() {
    let (mut cluster, mut snapshot) = three_nodes();
    cluster.nodes.remove("a");
    let planned = plan_of(cluster.clone(), snapshot.clone());
    let told: Vec<_> = reasons(&planned).into_iter().map(|(_, reason)| reason).collect();
    assert_eq!(told, ["NodeMissing", "NoPrefix"]);
    assert!(peers(&planned).keys().eq(["b", "c"]));
    snapshot.local.pod_cidrs = vec![net("10.244.1.0/24")];
    let planned = plan_of(cluster.clone(), snapshot.clone());
    assert_eq!(planned.own.pod_cidrs, [net("10.244.1.0/24")], "announced, since no authority names any");
    snapshot.local.rotation = State::default();
    let planned = plan_of(cluster, snapshot.clone());
    assert!(planned.desired.wireguard.is_empty() && !planned.desired.prune && planned.announcement.is_none());
    let planned = plan_of(Cluster::default(), snapshot);
    assert!(reasons(&planned).iter().any(|(_, reason)| reason == "NoPools"));
}

#[test]
fn a_peer_with_our_key_or_our_prefix_is_refused_by_name() {
    let (mut cluster, snapshot) = three_nodes();
    cluster.nodes.insert("b".into(), node("b", 1, &["10.244.2.0/24"], &["192.0.2.2"]).into());
    cluster.nodes.insert("d".into(), node("d", 4, &["10.245.0.0/24"], &["192.0.2.4"]).into());
    let planned = plan_of(cluster, snapshot);
    assert!(peers(&planned).keys().eq(["c"]));
    let told: Vec<_> = reasons(&planned);
    assert!(told.contains(&("Node/b".into(), "DuplicateKey".into())), "{told:?}");
    assert!(told.contains(&("Node/d".into(), "ForeignPrefix".into())), "{told:?}");
}

#[test]
fn an_illegible_announcement_is_told_and_its_node_is_no_peer() {
    let (mut cluster, snapshot) = three_nodes();
    let b = node_mut(&mut cluster, "b");
    b.annotations.insert(keyservice::announcement::ANNOTATION_KEYS.into(), "no json".into());
    let planned = plan_of(cluster, snapshot);
    assert_eq!(reasons(&planned), [("Node/b".into(), "InvalidAnnouncement".into())]);
    assert_eq!(planned.issues[0].field, keyservice::announcement::ANNOTATION_KEYS);
}

#[test]
fn local_pods_get_routes_neighbours_and_policy() {
    let (cluster, mut snapshot) = three_nodes();
    snapshot.endpoints.insert("mgy1".into(), endpoint("p", &["10.244.1.5", "fd00:10:1::5"]));
    let gone = Endpoint { ifindex: 0, ..endpoint("q", &["10.244.1.6"]) };
    snapshot.endpoints.insert("mgy2".into(), gone);
    let planned = plan_of(cluster, snapshot);
    let desired = &planned.desired;
    assert_eq!(leads_to(&planned, defaults::TABLE, ip("fd00:10:1::5")).unwrap(), "mgy1");
    assert_eq!(
        leads_to(&planned, defaults::TABLE, ip("10.244.1.6")).unwrap(),
        "unreachable",
        "its link is gone"
    );
    assert_eq!(desired.neighbours[&("mgy1".to_owned(), ip("10.244.1.5"))], [2, 0, 0, 0, 0, 1]);
    assert!(desired.links.contains_key("mgy1") && !desired.links.contains_key("mgy2"));
    assert_eq!(desired.sysctls["net/ipv4/conf/mgy1/rp_filter"], "2");
    assert!(desired.policy.endpoints.contains_key("mgy1"));
    let own: Vec<_> = desired.policy.own_ranges.iter().map(IpNet::to_string).collect();
    assert!(own.contains(&"10.244.1.0/24".to_owned()) && own.contains(&"192.0.2.1/32".to_owned()));
    assert!(desired.policy.remote_ranges.contains(&net("10.244.2.0/24")));
}

#[test]
fn masquerade_spares_pools_nodes_and_exceptions() {
    let (mut cluster, snapshot) = three_nodes();
    cluster.mesh.masquerade_exceptions = vec![net("192.0.2.0/24"), net("172.16.0.0/12")];
    let masquerade = plan_of(cluster.clone(), snapshot.clone()).desired.masquerade.unwrap();
    let spared: Vec<_> = masquerade.exceptions.iter().map(IpNet::to_string).collect();
    assert_eq!(
        spared,
        ["10.244.0.0/16", "172.16.0.0/12", "192.0.2.0/24", "fd00:10::/32"],
        "without overlaps"
    );
    assert!(masquerade.internal_links.iter().eq(["margay0", "margay1", "mgy*"]));
    cluster.mesh.masquerade = false;
    assert_eq!(plan_of(cluster, snapshot).desired.masquerade, None);
}
