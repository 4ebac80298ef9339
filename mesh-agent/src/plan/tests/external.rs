//! Another network plugin gives pods their interfaces and addresses.

use super::*;

/// Three nodes whose prefixes mean nothing, with a pod on each of the first two.
fn cluster(pools: &[&str]) -> (Cluster, Snapshot) {
    let (mut cluster, snapshot) = three_nodes();
    cluster.mesh.external = true;
    cluster.mesh.pools = pools.iter().copied().map(net).collect();
    add_pod(&mut cluster, "here", pod("a", &["10.9.0.5", "fd00:9::5"]));
    add_pod(&mut cluster, "there", pod("b", &["10.9.0.6", "fd00:9::6"]));
    (cluster, snapshot)
}

#[test]
fn a_peer_owns_every_address_of_its_pods_and_its_own_and_no_prefix() {
    let (mut cluster, snapshot) = cluster(&["10.9.0.0/16", "fd00:9::/64"]);
    let mut host = pod("b", &["192.0.2.2"]);
    host.host_network = true;
    add_pod(&mut cluster, "host", host);
    add_pod(&mut cluster, "stray", pod("b", &["8.8.8.8"]));
    let planned = plan_of(cluster, snapshot);
    assert_eq!(allowed(&planned, "b"), ["10.9.0.6/32", "192.0.2.2/32", "fd00:9::6/128"]);
    assert_eq!(allowed(&planned, "c"), ["192.0.2.3/32"]);
    assert_eq!(reasons(&planned), [("Pod/default/stray".to_owned(), "AddressOutsidePools".to_owned())]);
}

#[test]
fn the_others_routes_lead_to_pods_here_and_the_tunnel_to_those_elsewhere() {
    let (mut cluster, snapshot) = cluster(&["10.9.0.0/16", "fd00:9::/64"]);
    node_mut(&mut cluster, "a").pod_cidrs = vec![net("10.9.1.0/24"), net("10.44.0.0/24")];
    let planned = plan_of(cluster, snapshot);
    for (address, target) in [
        ("10.9.0.5", Some("throw")),
        ("fd00:9::5", Some("throw")),
        ("10.9.1.77", Some("throw")), // not known yet, and in this node's own prefix
        ("10.44.0.1", None),          // a prefix outside the pools
        ("10.9.0.6", Some("margay0")),
        ("fd00:9::6", Some("margay0")),
        ("10.9.0.7", Some("unreachable")),
    ] {
        assert_eq!(leads_to(&planned, defaults::TABLE, ip(address)).as_deref(), target, "{address}");
    }
    let desired = &planned.desired;
    assert_eq!(desired.masquerade, None);
    assert!(desired.pod_cidrs.is_empty() && desired.addresses["margay0"].is_empty());
    assert!(desired.policy.own_ranges.contains(&net("10.9.0.5/32")), "nobody sends as a pod of ours");
}

#[test]
fn without_ranges_only_what_is_known_goes_into_the_tunnel() {
    let (mut cluster, snapshot) = cluster(&[]);
    cluster.mesh.strict_encryption = false;
    for (name, address) in [("lo", "127.0.0.1"), ("link", "fe80::1"), ("node", "192.0.2.3")] {
        add_pod(&mut cluster, name, pod("b", &[address]));
    }
    let planned = plan_of(cluster, snapshot);
    assert_eq!(allowed(&planned, "b"), ["10.9.0.6/32", "192.0.2.2/32", "fd00:9::6/128"]);
    assert_eq!(leads_to(&planned, defaults::TABLE, ip("10.9.0.7")), None);
    let reasons: Vec<String> = reasons(&planned).into_iter().map(|(_, reason)| reason).collect();
    assert_eq!(reasons, ["AddressOutsidePools", "AddressOutsidePools", "DuplicateAddress"]);
}
