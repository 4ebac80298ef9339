//! MTU and administrative state of links. Links are made by others: the datapath its tunnel, CNI the veths.

use futures::future::BoxFuture;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::netlink::{Links as Actual, Netlink, settle};
use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::{Desired, Link};
use crate::own;

/// One change to a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Set the MTU, bytes.
    SetMtu(String, u32),
    /// Bring up (or down).
    SetUp(String, bool),
}

/// What to change, MTU before up so that no packet leaves with the wrong one; and the links that are
/// not there.
pub fn diff(actual: &Actual, desired: &Desired) -> (Vec<Op>, Vec<ReconcileError>) {
    let mut ops = Vec::new();
    let mut errors = Vec::new();
    for (name, Link { mtu, up }) in &desired.links {
        let Some(link) = actual.get(name) else {
            errors.push(absent(name));
            continue;
        };
        if link.mtu != *mtu {
            ops.push(Op::SetMtu(name.clone(), *mtu));
        }
        if link.up != *up {
            ops.push(Op::SetUp(name.clone(), *up));
        }
    }
    (ops, errors)
}

/// Says that a link is missing, and who should have made it.
pub fn absent(name: &str) -> ReconcileError {
    let message = match own::is_device(name) {
        true => format!("absent: is mesh-datapath@{name} running?"),
        false => "absent".to_owned(),
    };
    ReconcileError::new(format_args!("device {name}"), message)
}

/// Keeps [`Desired::links`].
pub struct LinkReconciler {
    netlink: Netlink,
}

impl LinkReconciler {
    /// Over this connection.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    async fn apply(&self, actual: &Actual, op: &Op) -> Result<(), ReconcileError> {
        let (Op::SetMtu(name, _) | Op::SetUp(name, _)) = op;
        let mut message = LinkMessage::default();
        message.header.index = actual.get(name).ok_or_else(|| absent(name))?.index;
        let object = match op {
            Op::SetMtu(_, mtu) => {
                message.attributes.push(LinkAttribute::Mtu(*mtu));
                format!("device {name} mtu {mtu}")
            }
            Op::SetUp(_, up) => {
                message.header.change_mask = LinkFlags::Up;
                message.header.flags = if *up { LinkFlags::Up } else { LinkFlags::empty() };
                format!("device {name} {}", if *up { "up" } else { "down" })
            }
        };
        settle(self.netlink.handle().link().set(message).execute().await, &[], object)
    }
}

impl Reconciler for LinkReconciler {
    fn name(&self) -> &'static str {
        "links"
    }

    fn stage(&self) -> Stage {
        Stage::Links
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let actual = self.netlink.links().await?;
            let (ops, errors) = diff(&actual, desired);
            let mut report = Report { errors, ..Report::default() };
            for op in &ops {
                report.record(self.apply(&actual, op).await);
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
    use crate::reconcile::netlink::LinkState;
    use proptest::collection::btree_map;
    use proptest::prelude::*;

    fn carry_out(actual: &mut Actual, op: &Op) {
        match op {
            Op::SetMtu(name, mtu) => actual.get_mut(name).unwrap().mtu = *mtu,
            Op::SetUp(name, up) => actual.get_mut(name).unwrap().up = *up,
        }
    }

    fn name() -> impl Strategy<Value = String> {
        "[a-d]".prop_map(|letter| format!("mgy{letter}"))
    }

    proptest! {
        #[test]
        fn present_links_become_as_desired_and_others_stay(
            start in btree_map(name(), (1..4u32, any::<bool>()), 0..4),
            wish in btree_map(name(), (1..4u32, any::<bool>()), 0..4),
            failures in laws::failures(),
        ) {
            let start: Actual = start.into_iter()
                .map(|(name, (mtu, up))| (name, LinkState { index: 1, mtu, up })).collect();
            let links = wish.into_iter().map(|(name, (mtu, up))| (name, Link { mtu, up })).collect();
            let desired = Desired { links, ..Desired::default() };
            let end = laws::converge(start.clone(), failures, |actual| diff(actual, &desired).0, carry_out)?;
            for (name, link) in &end {
                match desired.links.get(name) {
                    Some(wish) => prop_assert_eq!((link.mtu, link.up), (wish.mtu, wish.up)),
                    None => prop_assert_eq!(Some(link), start.get(name)),
                }
            }
            let missing = desired.links.keys().filter(|name| !start.contains_key(*name)).count();
            prop_assert_eq!(diff(&end, &desired).1.len(), missing);
        }
    }

    #[test]
    fn a_missing_tunnel_names_the_unit_that_makes_it() {
        assert_eq!(
            absent("margay0").to_string(),
            "device margay0: absent: is mesh-datapath@margay0 running?"
        );
        assert_eq!(absent("mgy0123456789").to_string(), "device mgy0123456789: absent");
    }
}
