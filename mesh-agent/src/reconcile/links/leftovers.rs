//! Kernel WireGuard devices of ours that nobody wants any more: after a rotation of keys, or at the clean-up.

use futures::future::BoxFuture;

use crate::desired::Desired;
use crate::own;
use crate::reconcile::netlink::{Links, Netlink, WIREGUARD, settle};
use crate::reconcile::{ReconcileError, Reconciler, Report, Stage};

/// Deletes them, once routes lead elsewhere.
pub struct LeftoverReconciler {
    netlink: Netlink,
}

impl LeftoverReconciler {
    /// Over this connection.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }
}

/// Name and index of each.
fn leftovers<'a>(actual: &'a Links, desired: &Desired) -> Vec<(&'a str, u32)> {
    let ours = actual.iter().filter(|(name, link)| own::is_device(name) && link.kind == WIREGUARD);
    let left = ours.filter(|(name, _)| desired.prune && !desired.links.contains_key(*name));
    left.map(|(name, link)| (name.as_str(), link.index)).collect()
}

impl Reconciler for LeftoverReconciler {
    fn name(&self) -> &'static str {
        "leftovers"
    }

    fn stage(&self) -> Stage {
        Stage::Leftovers
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let actual = self.netlink.links().await?;
            let mut report = Report::default();
            for (name, index) in leftovers(&actual, desired) {
                let deleted = self.netlink.handle().link().del(index).execute().await;
                report.record(settle(deleted, &[libc::ENODEV], format_args!("delete device {name}")));
            }
            Ok(report)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::Link;
    use crate::reconcile::netlink::LinkState;

    #[test]
    fn only_unwanted_kernel_devices_of_our_name_go() {
        let link = |index, kind: &str| LinkState {
            index,
            mtu: 1420,
            up: true,
            kind: kind.to_owned(),
            layer: netlink_packet_route::link::LinkLayerType::None,
        };
        let actual: Links =
            [("margay0", "wireguard"), ("margay1", "wireguard"), ("margay2", "tun"), ("wg0", "wireguard")]
                .into_iter()
                .zip(1..)
                .map(|((name, kind), index)| (name.to_owned(), link(index, kind)))
                .collect();
        let wanted = [("margay0".to_owned(), Link { mtu: 1420, up: true })].into();
        let mut desired = Desired { prune: true, links: wanted, ..Desired::default() };
        assert_eq!(leftovers(&actual, &desired), [("margay1", 2)]);
        desired.prune = false;
        assert!(leftovers(&actual, &desired).is_empty());
    }
}
