//! Links: WireGuard devices of the kernel, and MTU and administrative state of all. Other links are made by others: a TUN by
//! its datapath, the veths by CNI.
//!
//! A device that is to be of the other kind is replaced. Its routes go with it, and the unreachable ones behind them take
//! what comes meanwhile; the new one gets its policy, its key and the routes in the next pass.

use std::time::SystemTime;

use futures::future::BoxFuture;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::LinkWireguard;

use super::netlink::{Links as Actual, Netlink, TUN, WIREGUARD, describe, errno, settle};
use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::{Datapath, Desired, Link};
use crate::own;
use crate::wireguard::{Datapaths as _, Live, NodeDatapaths};

mod leftovers;

pub use leftovers::LeftoverReconciler;

/// A datapath that is started again at the wrong moment takes the name: so often it is taken back.
const RACES: usize = 5;

/// One change to a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Delete a device of the wrong kind.
    Remove(String),
    /// Make a kernel WireGuard device with this MTU (bytes), up.
    Make(String, u32),
    /// Set the MTU, bytes.
    SetMtu(String, u32),
    /// Bring up (or down).
    SetUp(String, bool),
}

/// What to change, MTU before up so that no packet leaves with the wrong one; and the links that are
/// not there and are others' to make.
pub fn diff(actual: &Actual, desired: &Desired) -> (Vec<Op>, Vec<ReconcileError>) {
    let mut ops = Vec::new();
    let mut errors = Vec::new();
    for (name, Link { mtu, up }) in &desired.links {
        let kind = actual.get(name).map(|link| link.kind.as_str());
        match (own::is_device(name), desired.datapath, kind) {
            (true, Datapath::Kernel, None | Some(TUN)) => {
                ops.extend(kind.map(|_| Op::Remove(name.clone())));
                ops.push(Op::Make(name.clone(), *mtu));
                continue;
            }
            (true, Datapath::Kernel, Some(kind)) if kind != WIREGUARD => {
                let message = format!("is a link of kind {kind:?}, not of our making");
                errors.push(ReconcileError::new(format_args!("device {name}"), message));
                continue;
            }
            (true, Datapath::Userspace, Some(WIREGUARD)) => {
                ops.push(Op::Remove(name.clone()));
                errors.push(absent(name));
                continue;
            }
            _ => {}
        }
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
    datapaths: NodeDatapaths,
    live: Live,
}

impl LinkReconciler {
    /// Over this connection.
    pub fn new(netlink: Netlink) -> Self {
        let datapaths = NodeDatapaths::new(netlink.clone());
        Self { netlink, datapaths, live: Live::default() }
    }

    /// Notes there who talked through a device that it replaces.
    pub fn with_live(self, live: Live) -> Self {
        Self { live, ..self }
    }

    async fn apply(&self, actual: &Actual, op: &Op) -> Result<(), ReconcileError> {
        let (name, attribute, object) = match op {
            Op::Remove(name) => return self.remove(name).await,
            Op::Make(name, mtu) => return self.make(name, *mtu).await,
            Op::SetMtu(name, mtu) => (name, Some(*mtu), format!("device {name} mtu {mtu}")),
            Op::SetUp(name, up) => (name, None, format!("device {name} {}", if *up { "up" } else { "down" })),
        };
        let mut message = LinkMessage::default();
        message.header.index = actual.get(name).ok_or_else(|| absent(name))?.index;
        if let Op::SetUp(_, up) = op {
            message.header.change_mask = LinkFlags::Up;
            message.header.flags = if *up { LinkFlags::Up } else { LinkFlags::empty() };
        }
        message.attributes.extend(attribute.map(LinkAttribute::Mtu));
        settle(self.netlink.handle().link().set(message).execute().await, &[], object)
    }

    async fn remove(&self, name: &str) -> Result<(), ReconcileError> {
        if let Ok(device) = self.datapaths.open(name).read().await {
            #[allow(clippy::disallowed_methods)] // The edge.
            self.live.note(name, &device, SystemTime::now());
        }
        self.delete(name).await
    }

    async fn delete(&self, name: &str) -> Result<(), ReconcileError> {
        let Some(link) = self.netlink.link(name).await? else { return Ok(()) };
        tracing::info!(device = name, kind = link.kind, "deleted, to be replaced");
        let deleted = self.netlink.handle().link().del(link.index).execute().await;
        settle(deleted, &[libc::ENODEV], format_args!("delete device {name}"))
    }

    async fn make(&self, name: &str, mtu: u32) -> Result<(), ReconcileError> {
        for _ in 0..RACES {
            let message = LinkWireguard::new(name).mtu(mtu).up().build();
            let error = match self.netlink.handle().link().add(message).execute().await {
                Ok(()) => {
                    tracing::info!(device = name, "made in the kernel");
                    return Ok(());
                }
                Err(error) => error,
            };
            if errno(&error) != Some(libc::EEXIST) {
                let hint = match errno(&error) {
                    Some(libc::EOPNOTSUPP) => ": this kernel has no WireGuard",
                    _ => "",
                };
                let message = format!("{}{hint}", describe(&error));
                return Err(ReconcileError::new(format_args!("make device {name} in the kernel"), message));
            }
            match self.netlink.link(name).await? {
                Some(link) if link.kind == TUN => self.delete(name).await?,
                Some(link) if link.kind == WIREGUARD => return Ok(()),
                _ => {}
            }
        }
        let message = "its name is taken again and again";
        Err(ReconcileError::new(format_args!("make device {name} in the kernel"), message))
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
            Op::Remove(name) => drop(actual.remove(name)),
            Op::Make(name, mtu) => {
                let link = LinkState {
                    index: 2,
                    mtu: *mtu,
                    up: true,
                    kind: WIREGUARD.to_owned(),
                    layer: netlink_packet_route::link::LinkLayerType::None,
                };
                actual.insert(name.clone(), link);
            }
            Op::SetMtu(name, mtu) => actual.get_mut(name).unwrap().mtu = *mtu,
            Op::SetUp(name, up) => actual.get_mut(name).unwrap().up = *up,
        }
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof!["[a-d]".prop_map(|letter| format!("mgy{letter}")), "margay[01]"]
    }

    fn kind() -> impl Strategy<Value = String> {
        prop_oneof![Just(TUN), Just(WIREGUARD), Just("veth")].prop_map(str::to_owned)
    }

    proptest! {
        #[test]
        fn present_links_become_as_desired_and_others_stay(
            start in btree_map(name(), (1..4u32, any::<bool>(), kind()), 0..5),
            wish in btree_map(name(), 1..4u32, 0..5),
            kernel in any::<bool>(),
            failures in laws::failures(),
        ) {
            let start: Actual = start.into_iter()
                .map(|(name, (mtu, up, kind))| (name, LinkState { index: 1, mtu, up, kind, layer: netlink_packet_route::link::LinkLayerType::None })).collect();
            let links = wish.into_iter().map(|(name, mtu)| (name, Link { mtu, up: true })).collect();
            let datapath = if kernel { Datapath::Kernel } else { Datapath::Userspace };
            let desired = Desired { links, datapath, ..Desired::default() };
            let end = laws::converge(start.clone(), failures, |actual| diff(actual, &desired).0, carry_out)?;
            for (name, was) in &start {
                let Some(wish) = desired.links.get(name) else {
                    prop_assert_eq!(end.get(name), Some(was));
                    continue;
                };
                match (own::is_device(name), kernel, was.kind.as_str()) {
                    (true, false, WIREGUARD) => prop_assert!(!end.contains_key(name), "not for mesh-datapath"),
                    (true, true, "veth") => prop_assert_eq!(end.get(name), Some(was)),
                    (device, ..) => {
                        let is = &end[name];
                        prop_assert_eq!((is.mtu, is.up), (wish.mtu, true));
                        prop_assert!(!(device && kernel) || is.kind == WIREGUARD);
                    }
                }
            }
            let missing = desired.links.keys().filter(|name| {
                let made = kernel && own::is_device(name);
                match end.get(*name) {
                    None => !made,
                    Some(link) => made && link.kind != WIREGUARD,
                }
            });
            prop_assert_eq!(diff(&end, &desired).1.len(), missing.count());
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
