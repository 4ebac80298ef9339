//! Addresses from IPPools: blocks in place of nodes' prefixes, and what is borrowed goes to who borrowed it.

use super::*;
use crate::snapshot::ipam::BlockView;

fn block(node: Option<&str>, guests: &[(&str, &str)], tunnels: &[(&str, &str)]) -> BlockView {
    let map = |list: &[(&str, &str)]| list.iter().map(|(at, node)| (ip(at), (*node).to_owned())).collect();
    BlockView {
        affinity: node.map(str::to_owned),
        guests: map(guests),
        tunnels: map(tunnels),
        holders: guests.iter().map(|(_, node)| (*node).to_owned()).collect(),
        counts: true,
    }
}

fn cluster() -> (Cluster, Snapshot) {
    let (mut cluster, mut snapshot) = three_nodes();
    cluster.mesh.pools.push(net("10.50.0.0/24"));
    cluster.ipam.in_use = true;
    let blocks = [
        ("10.50.0.0/28", block(Some("a"), &[("10.50.0.3", "b")], &[("10.50.0.1", "a")])),
        (
            "10.50.0.16/28",
            block(Some("b"), &[("10.50.0.20", "a"), ("10.50.0.21", "c")], &[("10.50.0.17", "b")]),
        ),
        ("10.50.0.32/28", block(None, &[("10.50.0.33", "c")], &[])),
        ("10.50.0.48/28", BlockView { counts: false, ..block(Some("c"), &[("10.50.0.50", "b")], &[]) }),
    ];
    cluster.ipam.blocks.extend(blocks.map(|(cidr, block)| (net(cidr), block)));
    snapshot.local.tunnel_addresses = vec![ip("10.50.0.1")];
    snapshot.endpoints.insert("mgy1".into(), endpoint("guest", &["10.50.0.20"]));
    (cluster, snapshot)
}

#[test]
fn a_peer_owns_its_blocks_and_what_it_borrowed_and_no_prefix() {
    let (cluster, snapshot) = cluster();
    let planned = plan_of(cluster, snapshot);
    assert_eq!(allowed(&planned, "b"), ["10.50.0.3/32", "10.50.0.16/28", "192.0.2.2/32"]);
    assert_eq!(allowed(&planned, "c"), ["10.50.0.21/32", "10.50.0.33/32", "192.0.2.3/32"]);
    for (address, target) in [
        ("10.50.0.3", "margay0"),      // lent to b
        ("10.50.0.18", "margay0"),     // of b's block
        ("10.50.0.20", "mgy1"),        // borrowed from b
        ("10.50.0.4", "unreachable"),  // ours, and nobody's yet
        ("10.50.0.50", "unreachable"), // of a block that does not count
        ("10.244.2.9", "unreachable"), // of what was a prefix
    ] {
        assert_eq!(leads_to(&planned, defaults::TABLE, ip(address)).as_deref(), Some(target), "{address}");
    }
    let desired = &planned.desired;
    assert_eq!(desired.addresses["margay0"], [net("10.50.0.1/32")].into());
    assert!(
        desired.policy.own_ranges.contains(&net("10.50.0.20/32")),
        "borrowed, so nobody else sends as it"
    );
    assert!(desired.policy.remote_ranges.contains(&net("10.50.0.3/32")), "lent, so b sends as it");
    assert_eq!(planned.announcement.unwrap().pod_cidrs, []);
    assert!(planned.issues.is_empty(), "{:?}", planned.issues);
}

#[test]
fn an_end_of_the_tunnel_is_no_pods() {
    let (mut cluster, snapshot) = cluster();
    cluster.pods.insert(pod_name("thief"), pod("c", &["10.50.0.17"]).into());
    let planned = plan_of(cluster, snapshot);
    assert_eq!(reasons(&planned), [("Pod/default/thief".to_owned(), "DuplicateAddress".to_owned())]);
}
