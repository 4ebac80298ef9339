//! Routes with our protocol number in our tables.
//!
//! The unreachable ones over the cluster's pod ranges are the ground everything stands on: first in and
//! last out, so that a packet for a pod has a route into the tunnel or none, never one into the clear.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use futures::future::BoxFuture;
use ipnet::IpNet;
use mesh_api::defaults::{TABLE, TABLE_FROM_PODS};
use netlink_packet_route::route::RouteMessage;

use super::links::absent;
use super::netlink::{Links, Netlink, settle};
use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::{Desired, Route, RouteTarget};

mod message;

/// The tables that are ours.
const TABLES: [u32; 2] = [TABLE, TABLE_FROM_PODS];
/// What the kernel makes of IPv6 metric 0 (`IP6_RT_PRIO_USER`, include/uapi/linux/ipv6_route.h).
const IPV6_DEFAULT_METRIC: u32 = 1024;

/// The routes that bear our protocol number.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Actual {
    /// Of a form that a desired route can have.
    pub routes: BTreeSet<Route>,
    /// Of any other form (a gateway, several next hops …): not made by us, or tampered with.
    pub odd: Vec<RouteMessage>,
}

/// One change to the routes.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// Remove a route of a form we never make.
    RemoveOdd(RouteMessage),
    /// Add; somebody else's route with the same key is an error, not overwritten.
    Add(Route),
    /// Put in the place of ours with the same table, prefix and metric, atomically.
    Replace(Route),
    /// Remove.
    Remove(Route),
}

type Key = (u32, IpNet, u32);

fn key(route: &Route) -> Key {
    (route.table, route.dst, route.metric)
}

/// As the kernel will show it.
fn canonical(route: &Route) -> Route {
    let mut route = route.clone();
    route.dst = route.dst.trunc();
    if route.metric == 0 && matches!(route.dst, IpNet::V6(_)) {
        route.metric = IPV6_DEFAULT_METRIC;
    }
    route
}

/// What to change, in the order that keeps pod traffic from ever leaving in the clear.
pub fn diff(actual: &Actual, desired: &Desired) -> Vec<Op> {
    // By key, since the kernel has one route for each; of two, the unreachable one (it sorts last) wins.
    let wish: BTreeMap<Key, Route> =
        desired.routes.iter().map(canonical).map(|route| (key(&route), route)).collect();
    let wanted = |route: &Route| wish.get(&key(route)) == Some(route);
    let withheld = |route: &Route| match &route.target {
        RouteTarget::Device { name, .. } => desired.withhold.contains(name),
        RouteTarget::Throw | RouteTarget::Unreachable => false,
    };
    let taken: BTreeSet<Key> = actual.routes.iter().map(key).collect();

    let missing = wish.values().filter(|route| !actual.routes.contains(*route) && !withheld(route));
    let (grounds, ways): (Vec<_>, Vec<_>) =
        missing.partition(|route| route.target == RouteTarget::Unreachable);
    let put = |route: &Route| match taken.contains(&key(route)) {
        true => Op::Replace(route.clone()),
        false => Op::Add(route.clone()),
    };
    let mut ops: Vec<Op> = Vec::new();
    if desired.prune {
        ops.extend(actual.odd.iter().cloned().map(Op::RemoveOdd));
    }
    ops.extend(grounds.into_iter().map(put));
    ops.extend(ways.into_iter().map(put));
    if desired.prune {
        // What is replaced is not removed; a withheld route that would replace another leaves it to go.
        let replaced: BTreeSet<Key> = wish.values().filter(|route| !withheld(route)).map(key).collect();
        let stale = actual.routes.iter().filter(|route| !wanted(route) && !replaced.contains(&key(route)));
        let (grounds, ways): (Vec<_>, Vec<_>) =
            stale.cloned().partition(|route| route.target == RouteTarget::Unreachable);
        ops.extend(ways.into_iter().map(Op::Remove));
        ops.extend(grounds.into_iter().map(Op::Remove));
    }
    ops
}

/// Keeps [`Desired::routes`].
pub struct RouteReconciler {
    netlink: Netlink,
}

impl RouteReconciler {
    /// Over this connection.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    async fn read(&self, links: &Links) -> Result<Actual, ReconcileError> {
        let names: BTreeMap<u32, &str> =
            links.iter().map(|(name, link)| (link.index, name.as_str())).collect();
        let mut actual = Actual::default();
        for table in TABLES {
            for filter in message::filters(table) {
                let stream = self.netlink.handle().route().get(filter).execute();
                for found in self.netlink.dump("routes", stream).await? {
                    match message::parse(&found, &names) {
                        message::Parsed::Ours(route) => drop(actual.routes.insert(route)),
                        message::Parsed::Odd(message) => actual.odd.push(message),
                        message::Parsed::Foreign => {}
                    }
                }
            }
        }
        Ok(actual)
    }

    async fn apply(&self, links: &Links, op: &Op) -> Result<(), ReconcileError> {
        let routes = self.netlink.handle().route();
        let render = |route: &Route| -> Result<RouteMessage, ReconcileError> {
            let index = match &route.target {
                RouteTarget::Device { name, .. } => match links.get(name) {
                    Some(link) => Some(link.index),
                    None => return Err(ReconcileError::new(object(route), absent(name))),
                },
                RouteTarget::Throw | RouteTarget::Unreachable => None,
            };
            Ok(message::render(route, index))
        };
        match op {
            Op::RemoveOdd(found) => {
                settle(routes.del(found.clone()).execute().await, &[libc::ESRCH], "route not of our making")
            }
            Op::Add(route) => settle(routes.add(render(route)?).execute().await, &[], object(route)),
            Op::Replace(route) => {
                settle(routes.add(render(route)?).replace().execute().await, &[], object(route))
            }
            Op::Remove(route) => {
                let request = routes.del(message::for_removal(render(route)?));
                settle(request.execute().await, &[libc::ESRCH, libc::ENODEV], object(route))
            }
        }
    }
}

/// The first route of each withheld link that is not there yet, and why.
fn waiting(actual: &Actual, links: &Links, desired: &Desired) -> Vec<ReconcileError> {
    let wait = |name: &String| {
        let to_it = |route: &Route| {
            matches!(&route.target, RouteTarget::Device { name: to, .. } if to == name)
                && !actual.routes.contains(route)
        };
        let route = desired.routes.iter().map(canonical).find(to_it)?;
        let reason = match links.contains_key(name) {
            true => "withheld until its policy is in place".to_owned(),
            false => absent(name).to_string(),
        };
        Some(ReconcileError::new(object(&route), reason))
    };
    desired.withhold.iter().filter_map(wait).collect()
}

fn object(route: &Route) -> String {
    let Route { table, dst, target, .. } = route;
    match target {
        RouteTarget::Device { name, .. } => format!("route {dst} dev {name} table {table}"),
        RouteTarget::Throw => format!("route throw {dst} table {table}"),
        RouteTarget::Unreachable => format!("route unreachable {dst} table {table}"),
    }
}

impl Reconciler for RouteReconciler {
    fn name(&self) -> &'static str {
        "routes"
    }

    fn stage(&self) -> Stage {
        Stage::Routes
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let links = self.netlink.links().await?;
            let actual = self.read(&links).await?;
            let mut report = Report::default();
            for op in &diff(&actual, desired) {
                report.record(self.apply(&links, op).await);
            }
            report.errors.extend(waiting(&actual, &links, desired));
            Ok(report)
        })
    }
}

/// The address family's name for a prefix's host address, for `src`.
fn same_family(dst: &IpNet, src: &IpAddr) -> bool {
    matches!((dst, src), (IpNet::V4(_), IpAddr::V4(_)) | (IpNet::V6(_), IpAddr::V6(_)))
}

#[cfg(test)]
mod tests;
