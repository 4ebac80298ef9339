//! Addresses of our own links: exactly the desired ones on tunnel devices and none on pods' veths.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use futures::future::BoxFuture;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};

use super::links::absent;
use super::netlink::{Links, Netlink, settle};
use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::Desired;
use crate::own;

/// Addresses by link name; a link without any is there with an empty set. IPv6 link-local ones, which the
/// kernel makes, are left out.
pub type Actual = BTreeMap<String, BTreeSet<IpNet>>;

/// One change to a link's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Put on.
    Add(String, IpNet),
    /// Take off.
    Remove(String, IpNet),
}

/// What to change, additions first so that a link is not left bare in between; and the links that are
/// not there.
pub fn diff(actual: &Actual, desired: &Desired) -> (Vec<Op>, Vec<ReconcileError>) {
    let none = BTreeSet::new();
    let mut ops = Vec::new();
    let mut errors = Vec::new();
    for (link, wish) in &desired.addresses {
        let Some(have) = actual.get(link) else {
            errors.push(absent(link));
            continue;
        };
        ops.extend(wish.difference(have).map(|address| Op::Add(link.clone(), *address)));
    }
    if desired.prune {
        let ours =
            |link: &str| desired.addresses.contains_key(link) || own::is_device(link) || own::is_veth(link);
        for (link, have) in actual.iter().filter(|(link, _)| ours(link)) {
            let wish = desired.addresses.get(link).unwrap_or(&none);
            ops.extend(have.difference(wish).map(|address| Op::Remove(link.clone(), *address)));
        }
    }
    (ops, errors)
}

/// Keeps [`Desired::addresses`].
pub struct AddressReconciler {
    netlink: Netlink,
}

impl AddressReconciler {
    /// Over this connection.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    async fn read(&self, links: &Links) -> Result<Actual, ReconcileError> {
        let dump = self.netlink.dump("addresses", self.netlink.handle().address().get().execute()).await?;
        let names: BTreeMap<u32, &String> = links.iter().map(|(name, link)| (link.index, name)).collect();
        let mut actual: Actual = links.keys().map(|name| (name.clone(), BTreeSet::new())).collect();
        for message in &dump {
            let set = names.get(&message.header.index).and_then(|name| actual.get_mut(*name));
            if let (Some(set), Some(address)) = (set, parse(message)) {
                set.insert(address);
            }
        }
        Ok(actual)
    }

    async fn apply(&self, links: &Links, op: &Op) -> Result<(), ReconcileError> {
        let (Op::Add(name, address) | Op::Remove(name, address)) = op;
        let message = render(links.get(name).ok_or_else(|| absent(name))?.index, *address);
        let object = format!("address {address} on {name}");
        match op {
            Op::Add(..) => {
                let mut request = self.netlink.handle().address().add(0, address.addr(), 0);
                *request.message_mut() = message;
                // Our addresses are ours alone: waiting for duplicate detection would only delay the
                // routes that prefer them as source.
                request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
                settle(request.execute().await, &[libc::EEXIST], object)
            }
            Op::Remove(..) => {
                let request = self.netlink.handle().address().del(message);
                settle(request.execute().await, &[libc::EADDRNOTAVAIL, libc::ENODEV], object)
            }
        }
    }
}

fn parse(message: &AddressMessage) -> Option<IpNet> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link IFA_ADDRESS is the far end; IFA_LOCAL is always the near one.
            AddressAttribute::Local(ip) => address = Some(*ip),
            AddressAttribute::Address(ip) => address = address.or(Some(*ip)),
            _ => {}
        }
    }
    match address? {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => None,
        ip => IpNet::new(ip, message.header.prefix_len).ok(),
    }
}

fn render(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix_len();
    message.header.family = match address {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message
}

impl Reconciler for AddressReconciler {
    fn name(&self) -> &'static str {
        "addresses"
    }

    fn stage(&self) -> Stage {
        Stage::Addresses
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let links = self.netlink.links().await?;
            let actual = self.read(&links).await?;
            let (ops, errors) = diff(&actual, desired);
            let mut report = Report { errors, ..Report::default() };
            for op in &ops {
                report.record(self.apply(&links, op).await);
            }
            Ok(report)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::reconcile::laws;
    use proptest::collection::{btree_map, btree_set};
    use proptest::prelude::*;

    fn carry_out(actual: &mut Actual, op: &Op) {
        match op {
            Op::Add(link, address) => actual.get_mut(link).unwrap().insert(*address),
            Op::Remove(link, address) => actual.get_mut(link).unwrap().remove(address),
        };
    }

    fn by_link() -> impl Strategy<Value = Actual> {
        let link = prop_oneof![Just("margay0"), Just("margay1"), Just("mgy0123456789"), Just("eth0")];
        let address = (0..4u8).prop_map(|n| IpNet::new([10, 0, 0, n].into(), 32).unwrap());
        btree_map(link.prop_map(str::to_owned), btree_set(address, 0..4), 0..4)
    }

    proptest! {
        #[test]
        fn own_links_have_exactly_ours_and_foreign_links_theirs(
            start in by_link(), mut wish in by_link(), prune: bool, failures in laws::failures(),
        ) {
            wish.remove("eth0");
            let desired = Desired { addresses: wish, prune, ..Desired::default() };
            let end = laws::converge(start.clone(), failures, |actual| diff(actual, &desired).0, carry_out)?;
            prop_assert_eq!(end.get("eth0"), start.get("eth0"));
            for (link, have) in end.iter().filter(|(link, _)| *link != "eth0") {
                let wish = desired.addresses.get(link).cloned().unwrap_or_default();
                match prune {
                    true => prop_assert_eq!(have, &wish),
                    false => prop_assert!(have.is_superset(&wish) && have.is_superset(&start[link])),
                }
            }
        }
    }
}
