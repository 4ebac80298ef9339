//! Permanent neighbours of our pods: the host never asks a pod who it is.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures::future::BoxFuture;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteType;

use super::links::absent;
use super::netlink::{Links, Netlink, settle};
use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::Desired;
use crate::own;

/// Permanent neighbours: (link, address) to MAC.
pub type Actual = BTreeMap<(String, IpAddr), [u8; 6]>;

/// One change to the neighbour tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Add, or replace whatever is there for the address.
    Set(String, IpAddr, [u8; 6]),
    /// Remove.
    Remove(String, IpAddr),
}

/// What to change. Only permanent entries on links that are ours by name, or desired, are ours.
pub fn diff(actual: &Actual, desired: &Desired) -> Vec<Op> {
    let mut ops = Vec::new();
    if desired.prune {
        let gone = actual.keys().filter(|key| !desired.neighbours.contains_key(*key));
        let ours = gone.filter(|(link, _)| own::is_veth(link));
        ops.extend(ours.map(|(link, ip)| Op::Remove(link.clone(), *ip)));
    }
    let wrong = desired.neighbours.iter().filter(|(key, mac)| actual.get(*key) != Some(*mac));
    ops.extend(wrong.map(|((link, ip), mac)| Op::Set(link.clone(), *ip, *mac)));
    ops
}

/// Keeps [`Desired::neighbours`].
pub struct NeighbourReconciler {
    netlink: Netlink,
}

impl NeighbourReconciler {
    /// Over this connection.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    async fn read(&self, links: &Links) -> Result<Actual, ReconcileError> {
        let names: BTreeMap<u32, &String> = links.iter().map(|(name, link)| (link.index, name)).collect();
        let dump =
            self.netlink.dump("neighbours", self.netlink.handle().neighbours().get().execute()).await?;
        let mut actual = Actual::new();
        for message in dump.iter().filter(|message| message.header.state == NeighbourState::Permanent) {
            if let (Some(name), Some((ip, mac))) = (names.get(&message.header.ifindex), parse(message)) {
                actual.insert(((*name).clone(), ip), mac);
            }
        }
        Ok(actual)
    }

    async fn apply(&self, links: &Links, op: &Op) -> Result<(), ReconcileError> {
        let (Op::Set(name, ip, _) | Op::Remove(name, ip)) = op;
        let index = links.get(name).ok_or_else(|| absent(name))?.index;
        let object = format!("neighbour {ip} on {name}");
        let neighbours = self.netlink.handle().neighbours();
        match op {
            Op::Set(_, ip, mac) => {
                let request = neighbours.add(index, *ip).link_layer_address(mac).replace();
                settle(request.execute().await, &[], object)
            }
            Op::Remove(..) => {
                let request = neighbours.del(render(index, *ip));
                settle(request.execute().await, &[libc::ENOENT, libc::ENODEV], object)
            }
        }
    }
}

fn parse(message: &NeighbourMessage) -> Option<(IpAddr, [u8; 6])> {
    let mut ip = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::V6(*v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some((ip?, mac?))
}

fn render(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = index;
    message.header.kind = RouteType::Unspec;
    let (family, destination) = match ip {
        IpAddr::V4(v4) => (AddressFamily::Inet, NeighbourAddress::Inet(v4)),
        IpAddr::V6(v6) => (AddressFamily::Inet6, NeighbourAddress::Inet6(v6)),
    };
    message.header.family = family;
    message.attributes.push(NeighbourAttribute::Destination(destination));
    message
}

impl Reconciler for NeighbourReconciler {
    fn name(&self) -> &'static str {
        "neighbours"
    }

    fn stage(&self) -> Stage {
        Stage::Addresses
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let links = self.netlink.links().await?;
            let actual = self.read(&links).await?;
            let mut report = Report::default();
            for op in &diff(&actual, desired) {
                report.record(self.apply(&links, op).await);
            }
            Ok(report)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::laws;
    use proptest::collection::btree_map;
    use proptest::prelude::*;

    fn carry_out(actual: &mut Actual, op: &Op) {
        match op {
            Op::Set(link, ip, mac) => actual.insert((link.clone(), *ip), *mac),
            Op::Remove(link, ip) => actual.remove(&(link.clone(), *ip)),
        };
    }

    fn neighbours() -> impl Strategy<Value = Actual> {
        let link = prop_oneof![Just("mgy0123456789"), Just("mgyaaaaaaaaaa"), Just("eth0")];
        let key = (link.prop_map(str::to_owned), (0..3u8).prop_map(|n| IpAddr::from([10, 0, 0, n])));
        btree_map(key, (0..3u8).prop_map(|n| [2, 0, 0, 0, 0, n]), 0..6)
    }

    proptest! {
        #[test]
        fn own_neighbours_are_as_desired_and_foreign_ones_stay(
            start in neighbours(), mut wish in neighbours(), prune: bool, failures in laws::failures(),
        ) {
            wish.retain(|(link, _), _| link != "eth0");
            let desired = Desired { neighbours: wish.clone(), prune, ..Desired::default() };
            let end = laws::converge(start.clone(), failures, |actual| diff(actual, &desired), carry_out)?;
            let keep = |(link, _): &(String, IpAddr)| !prune || link == "eth0";
            let mut expected: Actual = start.into_iter().filter(|(key, _)| keep(key)).collect();
            expected.extend(wish);
            prop_assert_eq!(end, expected);
        }
    }
}
