//! What the node should look like: the output of [`crate::plan`], and the only input of the reconcilers.
//!
//! It holds no secret: keys appear by their public half, and the WireGuard reconciler keeps the private
//! ones beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use keyservice::PublicKey;

use crate::snapshot::Reach;

/// The whole wish for one node. The default value is "nothing of ours", which is what `cleanup` applies.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Desired {
    /// The snapshot it was planned from.
    pub generation: u64,
    /// Take away what is ours and not in here; false until every source has synced.
    pub prune: bool,
    /// Links that no route may be opened to yet, though routes already there stay: the runner puts those
    /// here whose policy is not in place. The plan leaves it empty.
    pub withhold: BTreeSet<String>,
    /// Prefixes IPAM hands addresses out from: those the admission left this node.
    pub pod_cidrs: Vec<IpNet>,
    /// Links to be up with this MTU, by name. Pods' are made by CNI, WireGuard devices as `datapath` says.
    pub links: BTreeMap<String, Link>,
    /// What the WireGuard devices among the links are.
    pub datapath: Datapath,
    /// Addresses by link name: exactly these on our own devices.
    pub addresses: BTreeMap<String, BTreeSet<IpNet>>,
    /// Permanent neighbours of our pods: (link, address) to MAC.
    pub neighbours: BTreeMap<(String, IpAddr), [u8; 6]>,
    /// Routes in our tables, all with our protocol number.
    pub routes: BTreeSet<Route>,
    /// Policy rules in our priority range.
    pub rules: BTreeSet<Rule>,
    /// `net/ipv4/ip_forward` → `1` …, paths below /proc/sys.
    pub sysctls: BTreeMap<String, String>,
    /// WireGuard devices by name.
    pub wireguard: BTreeMap<String, WireguardDevice>,
    /// Source NAT for pods leaving the cluster; `None` for none.
    pub masquerade: Option<Masquerade>,
    /// What policy is to be enforced and where.
    pub policy: Arc<Policy>,
}

/// Who carries the packets of a WireGuard device, and so who makes its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Datapath {
    /// mesh-datapath, or another program that makes a TUN and answers on its UAPI socket.
    #[default]
    Userspace,
    /// The kernel; the agent makes the link.
    Kernel,
}

/// A link's attributes that are ours to set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Routing table.
    pub table: u32,
    /// Destination.
    pub dst: IpNet,
    /// What happens to a packet that matches.
    pub target: RouteTarget,
    /// Priority among equal prefixes; the smaller wins.
    pub metric: u32,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteTarget {
    /// Out of a device, link scope.
    Device {
        /// Its name.
        name: String,
        /// Preferred source address of locally made packets.
        src: Option<IpAddr>,
    },
    /// Back to the rules: the tables behind ours know the way.
    Throw,
    /// An ICMP unreachable: the fall-back that keeps pod traffic from leaving in clear text.
    Unreachable,
}

/// One policy-routing rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// In 30000–30009.
    pub priority: u32,
    /// True for IPv6.
    pub ipv6: bool,
    /// Source prefix, or any.
    pub from: Option<IpNet>,
    /// Table to look up.
    pub table: u32,
}

/// A WireGuard device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardDevice {
    /// Which of the node's keys it uses.
    pub public_key: PublicKey,
    /// UDP port.
    pub listen_port: u16,
    /// Mark on its own packets; 0 for none.
    pub fwmark: u32,
    /// Every peer has a preshared key, which the reconciler has beside the plan.
    pub preshared: bool,
    /// Its peers.
    pub peers: BTreeMap<PublicKey, WireguardPeer>,
}

/// A peer of a WireGuard device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardPeer {
    /// The Node's name, for messages.
    pub name: String,
    /// Where to reach it; `None` leaves the initiative to it.
    pub endpoint: Option<SocketAddr>,
    /// What it owns. No prefix is in two peers.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Seconds; 0 for off.
    pub persistent_keepalive: u16,
    /// `endpoint` is only where the peer was last heard: a device that hears it now knows better.
    pub learned: bool,
    /// Where it did not answer, and whether it is to be tried afresh.
    pub reach: Reach,
    /// A session with it is wanted though nothing is sent to it here yet.
    pub connect: bool,
}

/// Source NAT for packets from `sources` that leave by none of `internal_links` to none of `exceptions`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Masquerade {
    /// The pools.
    pub sources: BTreeSet<IpNet>,
    /// Pools, node addresses and configured exceptions.
    pub exceptions: BTreeSet<IpNet>,
    /// The mesh devices and pods' veths (a trailing `*` matches a prefix).
    pub internal_links: BTreeSet<String>,
}

/// The policy engine's input, and the devices it is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Pods, namespaces and policies of the cluster.
    pub view: ebpf_policy::model::ClusterView,
    /// Local pods' interfaces by name.
    pub endpoints: BTreeMap<String, crate::snapshot::Endpoint>,
    /// The tunnel devices.
    pub tunnels: BTreeSet<String>,
    /// Remote nodes' ranges: what may come out of the tunnel.
    pub remote_ranges: BTreeSet<IpNet>,
    /// Our own ranges: what may never come out of it.
    pub own_ranges: BTreeSet<IpNet>,
}
