//! What this node itself and the cluster's objects say of addresses, for the allocator of IPPools.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_ipam::node::Local;
use mesh_ipam::object::{Handle, HandleKind};

use super::{Ipam, Lease};
use crate::snapshot::{ObjectRef, Snapshot};

/// See [`Local`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// In use here, and by whom.
    pub leases: BTreeMap<IpAddr, Handle>,
    /// Not to be given for another reason.
    pub blocked: BTreeSet<IpAddr>,
    /// Given back, the longest free first.
    pub freed: Vec<IpAddr>,
}

impl Known {
    /// From the journal, the interfaces and the snapshot. Former addresses of `pod` do not stand in its own way.
    pub fn of(ipam: &Ipam, snapshot: &Snapshot, pod: Option<&ObjectRef>) -> Self {
        let of_lease = |lease: &Lease| Handle {
            kind: HandleKind::Pod,
            namespace: lease.pod.namespace.clone(),
            name: lease.pod.name.clone(),
            uid: lease.pod_uid.clone(),
            container_id: lease.container_id.clone(),
            ifname: lease.ifname.clone(),
            allocated_at: 0,
        };
        let strays = ipam.stray_links().flat_map(|(name, ips)| {
            let handle = Handle { kind: HandleKind::Pod, ifname: name.clone(), ..Handle::tunnel() };
            ips.iter().map(move |ip| (*ip, handle.clone()))
        });
        let mut leases: BTreeMap<IpAddr, Handle> = strays.collect();
        for lease in ipam.leases() {
            leases.extend(lease.ips.iter().map(|ip| (*ip, of_lease(lease))));
        }
        let cluster = &snapshot.cluster;
        let others = cluster
            .pods
            .iter()
            .filter(|(name, object)| Some(*name) != pod && !object.host_network && !object.finished)
            .flat_map(|(_, object)| &object.ips);
        let nodes =
            cluster.nodes.values().flat_map(|node| node.internal_ips.iter().chain(&node.external_ips));
        let blocked = others.chain(nodes).chain(&snapshot.local.addresses).copied().collect();
        Self { leases, blocked, freed: ipam.freed().collect() }
    }

    /// As the allocator takes it.
    pub fn local(&self) -> Local<'_> {
        Local { leases: &self.leases, blocked: &self.blocked, freed: &self.freed }
    }
}
