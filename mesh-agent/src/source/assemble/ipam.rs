//! Pools, reservations and blocks as the cluster's IPAM, and their ranges as the cluster's.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_api::status::Issue;
use mesh_ipam::block::name;
use mesh_ipam::catalogue::{Catalogue, Object};

use crate::snapshot::ipam::{BlockView, Ipam, WantedPools};
use crate::snapshot::{Cluster, ObjectRef};

/// What has been found so far.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) pools: Vec<Object>,
    pub(super) reservations: Vec<Object>,
    pub(super) blocks: Vec<(IpNet, BlockView)>,
    pub(super) incomplete: bool,
    pub(super) wanted: BTreeMap<ObjectRef, WantedPools>,
}

impl Parts {
    /// Where another plugin gives addresses there is nothing to give. What may be a pod's is a range of the mesh,
    /// whether or not the MeshConfiguration says so too: it must not leave in clear text.
    pub(super) fn finish(self, cluster: &mut Cluster) -> Vec<Issue> {
        if cluster.mesh.external {
            return Vec::new();
        }
        let (catalogue, mut issues) = Catalogue::read(&self.pools, &self.reservations);
        let in_use = !self.pools.is_empty();
        let mut blocks: BTreeMap<IpNet, BlockView> = self.blocks.into_iter().collect();
        let all: Vec<IpNet> = blocks.keys().copied().collect();
        for (cidr, block) in &mut blocks {
            block.counts = counts(cidr, &catalogue, &cluster.mesh.pools, &all);
            if !block.counts {
                issues.push(Issue {
                    object: format!("IPBlock/{}", name(cidr)),
                    field: "spec.cidr".to_owned(),
                    reason: "BlockOutsidePools".to_owned(),
                    message: format!("{cidr} is no block of an IPPool, so nothing is routed by it"),
                });
            }
        }
        cluster.ipam = Ipam { in_use, catalogue, incomplete: self.incomplete, wanted: self.wanted, blocks };
        for range in cluster.ipam.catalogue.pools.iter().map(|pool| pool.cidr) {
            let pools = &mut cluster.mesh.pools;
            if !pools.iter().any(|pool| pool.contains(&range)) {
                pools.retain(|pool| !range.contains(pool));
                pools.push(range);
            }
        }
        issues
    }
}

/// A block of a pool has the pool's size. What is left of a pool that is gone must be in a declared range, and within no other
/// block, whose packets it would draw.
fn counts(cidr: &IpNet, catalogue: &Catalogue, ranges: &[IpNet], blocks: &[IpNet]) -> bool {
    match catalogue.pools.iter().find(|pool| pool.cidr.contains(cidr)) {
        Some(pool) => pool.block_size == cidr.prefix_len(),
        None => {
            ranges.iter().any(|range| range.contains(cidr))
                && !blocks.iter().any(|other| other != cidr && other.contains(cidr))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn pool(name: &str, cidr: &str) -> Object {
        Object { name: name.into(), created: 0, spec: json!({ "cidr": cidr }) }
    }

    #[test]
    fn pools_are_ranges_of_the_mesh_and_none_overlap() {
        let mut cluster = Cluster::default();
        cluster.mesh.pools = vec!["10.1.0.0/24".parse().unwrap(), "10.2.0.0/16".parse().unwrap()];
        let parts = Parts {
            pools: vec![pool("a", "10.1.0.0/16"), pool("b", "10.2.3.0/24"), pool("c", "10.2.3.128/25")],
            blocks: ["10.1.0.0/26", "10.1.0.0/28", "10.2.9.0/26", "10.2.9.0/28", "192.0.2.0/28"]
                .map(|cidr| (cidr.parse().unwrap(), BlockView::default()))
                .into(),
            ..Parts::default()
        };
        let issues = parts.finish(&mut cluster);
        let object = issues.iter().map(|issue| (issue.object.as_str(), issue.reason.as_str()));
        assert_eq!(
            object.collect::<Vec<_>>(),
            [
                ("IPPool/c", "PoolOverlap"),
                ("IPBlock/10-1-0-0-28", "BlockOutsidePools"),
                ("IPBlock/10-2-9-0-28", "BlockOutsidePools"),
                ("IPBlock/192-0-2-0-28", "BlockOutsidePools"),
            ]
        );
        let pools: Vec<String> = cluster.mesh.pools.iter().map(IpNet::to_string).collect();
        assert_eq!(pools, ["10.2.0.0/16", "10.1.0.0/16"]);
        assert!(cluster.ipam.in_use);
    }

    #[test]
    fn a_pool_that_is_invalid_keeps_nodes_from_their_own_prefixes_and_another_plugin_from_nothing() {
        let parts = || Parts { pools: vec![pool("a", "10.1.0.1/16")], ..Parts::default() };
        let mut cluster = Cluster::default();
        assert_eq!(parts().finish(&mut cluster).len(), 1);
        assert!(cluster.ipam.in_use && cluster.mesh.pools.is_empty());
        let mut cluster = Cluster::default();
        cluster.mesh.external = true;
        assert!(parts().finish(&mut cluster).is_empty() && !cluster.ipam.in_use);
    }
}
