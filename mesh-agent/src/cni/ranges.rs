//! From the cluster's objects to what IPAM may hand out.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::ipam::Ranges;
use crate::plan::tunnel_address;
use crate::snapshot::{ObjectRef, Snapshot};

/// What this node may give from `cidrs`, the prefixes the plan left it, to `pod`, whose own former addresses
/// do not stand in its way.
pub fn ranges(snapshot: &Snapshot, cidrs: &[IpNet], pod: Option<&ObjectRef>) -> Ranges {
    let cluster = &snapshot.cluster;
    let everyones = cluster.nodes.values().flat_map(|node| &node.pod_cidrs).chain(cidrs);
    let mut reserved: std::collections::BTreeSet<IpAddr> = everyones.flat_map(special).collect();
    for node in cluster.nodes.values() {
        reserved.extend(node.internal_ips.iter().chain(&node.external_ips));
    }
    reserved.extend(&snapshot.local.addresses);
    let others = cluster
        .pods
        .iter()
        .filter(|(name, object)| Some(*name) != pod && !object.host_network && !object.finished);
    let taken =
        others.flat_map(|(name, object)| object.ips.iter().map(move |ip| (*ip, format!("pod {name}"))));
    Ranges { taken: taken.collect(), pools: cluster.mesh.pools.clone(), reserved, cidrs: cidrs.to_vec() }
}

/// The network, the node's end of the tunnel, and IPv4's broadcast. A prefix too small for the second has none.
fn special(cidr: &IpNet) -> Vec<IpAddr> {
    let Some(tunnel) = tunnel_address(cidr) else { return Vec::new() };
    let broadcast = Some(cidr.broadcast()).filter(IpAddr::is_ipv4);
    [cidr.network(), tunnel].into_iter().chain(broadcast).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::snapshot::{Cluster, Local, Node, Pod};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn snapshot() -> Snapshot {
        let node = |cidr: &str, address: &str| Node {
            pod_cidrs: vec![cidr.parse().unwrap()],
            internal_ips: vec![ip(address)],
            ..Node::default()
        };
        let pod = |address: &str, finished| Pod { ips: vec![ip(address)], finished, ..Pod::default() };
        let name = |name: &str| ObjectRef { namespace: "default".into(), name: name.into() };
        let cluster = Cluster {
            nodes: [
                ("a".to_owned(), node("10.1.1.0/24", "192.0.2.1").into()),
                ("b".to_owned(), node("10.1.2.0/24", "192.0.2.2").into()),
            ]
            .into(),
            pods: [("live", "10.1.1.9", false), ("done", "10.1.1.8", true)]
                .map(|(of, address, finished)| (name(of), pod(address, finished).into()))
                .into(),
            ..Cluster::default()
        };
        let local = Local { node_name: "a".into(), ..Local::default() };
        Snapshot { cluster: Arc::new(cluster), local, ..Snapshot::default() }
    }

    #[test]
    fn every_nodes_special_addresses_are_reserved_and_every_running_pods_taken() {
        let ranges = ranges(&snapshot(), &["10.1.1.0/24".parse().unwrap()], None);
        for reserved in ["10.1.1.0", "10.1.1.1", "10.1.1.255", "10.1.2.1", "192.0.2.1", "192.0.2.2"] {
            assert!(ranges.reserved.contains(&ip(reserved)), "{reserved}");
        }
        assert_eq!(
            ranges.taken.into_iter().collect::<Vec<_>>(),
            [(ip("10.1.1.9"), "pod default/live".into())]
        );
    }

    #[test]
    fn a_pod_may_have_its_own_address_again() {
        let own = ObjectRef { namespace: "default".into(), name: "live".into() };
        assert!(ranges(&snapshot(), &[], Some(&own)).taken.is_empty());
    }

    #[test]
    fn a_node_without_prefix_may_give_nothing_of_its_own_accord() {
        assert!(ranges(&snapshot(), &[], None).cidrs.is_empty());
    }

    #[test]
    fn a_prefix_that_no_node_object_names_has_its_special_addresses_too() {
        assert!(
            ranges(&snapshot(), &["10.1.3.0/24".parse().unwrap()], None).reserved.contains(&ip("10.1.3.1"))
        );
    }
}
