//! Policy-routing rules with our protocol number in our priority range.

use std::collections::BTreeSet;
use std::net::IpAddr;

use futures::future::BoxFuture;
use ipnet::IpNet;
use mesh_api::defaults::{ROUTE_PROTOCOL, RULE_PRIORITY};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::IpVersion;

use super::netlink::{Netlink, settle};
use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::{Desired, Rule};

const PROTOCOL: RouteProtocol = RouteProtocol::Other(ROUTE_PROTOCOL);
/// How many priorities from [`RULE_PRIORITY`] on are ours.
const PRIORITIES: u32 = 10;

/// The rules in our priority range.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Actual {
    /// Ours.
    pub rules: BTreeSet<Rule>,
    /// With our protocol number but of a form we never make.
    pub odd: Vec<RuleMessage>,
    /// Without it: (priority, IPv6).
    pub foreign: BTreeSet<(u32, bool)>,
}

/// One change to the rules.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// Add.
    Add(Rule),
    /// Remove.
    Remove(Rule),
    /// Remove a rule of a form we never make.
    RemoveOdd(RuleMessage),
}

/// What to change, additions first so that traffic always meets one of ours.
pub fn diff(actual: &Actual, desired: &Desired) -> Vec<Op> {
    let mut ops: Vec<Op> = desired.rules.difference(&actual.rules).cloned().map(Op::Add).collect();
    if desired.prune {
        ops.extend(actual.rules.difference(&desired.rules).cloned().map(Op::Remove));
        ops.extend(actual.odd.iter().cloned().map(Op::RemoveOdd));
    }
    ops
}

/// Rules of others on priorities that we use. They are left alone; whoever made them has to move.
pub fn clashes(actual: &Actual, desired: &Desired) -> Vec<ReconcileError> {
    let used: BTreeSet<(u32, bool)> = desired.rules.iter().map(|rule| (rule.priority, rule.ipv6)).collect();
    let clash = |(priority, ipv6): &(u32, bool)| {
        let family = if *ipv6 { "IPv6" } else { "IPv4" };
        let message = format!(
            "another program's {family} rule has this priority, which is Margay's ({RULE_PRIORITY}-{}); \
             it was left alone, and may send pod traffic elsewhere",
            RULE_PRIORITY + PRIORITIES - 1
        );
        ReconcileError::new(format_args!("rule priority {priority}"), message)
    };
    actual.foreign.intersection(&used).map(clash).collect()
}

/// Keeps [`Desired::rules`].
pub struct RuleReconciler {
    netlink: Netlink,
}

impl RuleReconciler {
    /// Over this connection.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    async fn read(&self) -> Result<Actual, ReconcileError> {
        let mut actual = Actual::default();
        for family in [IpVersion::V4, IpVersion::V6] {
            let stream = self.netlink.handle().rule().get(family).execute();
            for message in self.netlink.dump("rules", stream).await? {
                read_one(&mut actual, message);
            }
        }
        Ok(actual)
    }

    async fn apply(&self, op: &Op) -> Result<(), ReconcileError> {
        let rules = self.netlink.handle().rule();
        match op {
            Op::Add(rule) => {
                let mut request = rules.add();
                *request.message_mut() = render(rule);
                settle(request.execute().await, &[libc::EEXIST], object(rule))
            }
            Op::Remove(rule) => {
                settle(rules.del(render(rule)).execute().await, &[libc::ENOENT], object(rule))
            }
            Op::RemoveOdd(message) => {
                settle(rules.del(message.clone()).execute().await, &[libc::ENOENT], "rule not of our making")
            }
        }
    }
}

fn object(rule: &Rule) -> String {
    let family = if rule.ipv6 { "IPv6" } else { "IPv4" };
    format!("{family} rule {} lookup {}", rule.priority, rule.table)
}

fn read_one(actual: &mut Actual, message: RuleMessage) {
    let (mut priority, mut ours) = (0, false);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Protocol(value) => ours = *value == PROTOCOL,
            _ => {}
        }
    }
    if !(RULE_PRIORITY..RULE_PRIORITY + PRIORITIES).contains(&priority) {
        return;
    }
    let ipv6 = message.header.family == AddressFamily::Inet6;
    match (ours, parse(&message, priority, ipv6)) {
        (false, _) => drop(actual.foreign.insert((priority, ipv6))),
        (true, Some(rule)) => drop(actual.rules.insert(rule)),
        (true, None) => actual.odd.push(message),
    }
}

/// The rule, unless it has a condition or an action that ours never have.
fn parse(message: &RuleMessage, priority: u32, ipv6: bool) -> Option<Rule> {
    let header = &message.header;
    if header.action != RuleAction::ToTable
        || header.dst_len != 0
        || header.tos != 0
        || header.flags.contains(RuleFlags::Invert)
    {
        return None;
    }
    let mut table = u32::from(header.table);
    let mut from = None;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(_) | RuleAttribute::Protocol(_) => {}
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Source(ip) => from = Some(IpNet::new(*ip, header.src_len).ok()?),
            // What the kernel shows for "not set".
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => return None,
        }
    }
    Some(Rule { priority, ipv6, from, table })
}

fn render(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message.attributes.push(RuleAttribute::Table(rule.table));
    message.attributes.push(RuleAttribute::Protocol(PROTOCOL));
    if let Some(from) = &rule.from {
        let source: IpAddr = from.network();
        message.header.src_len = from.prefix_len();
        message.attributes.push(RuleAttribute::Source(source));
    }
    message
}

impl Reconciler for RuleReconciler {
    fn name(&self) -> &'static str {
        "rules"
    }

    fn stage(&self) -> Stage {
        Stage::Rules
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let actual = self.read().await?;
            let mut report = Report { errors: clashes(&actual, desired), ..Report::default() };
            for op in &diff(&actual, desired) {
                report.record(self.apply(op).await);
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
    use proptest::collection::btree_set;
    use proptest::prelude::*;

    fn carry_out(actual: &mut Actual, op: &Op) {
        match op {
            Op::Add(rule) => assert!(actual.rules.insert(rule.clone())),
            Op::Remove(rule) => assert!(actual.rules.remove(rule)),
            Op::RemoveOdd(message) => actual.odd.retain(|odd| odd != message),
        }
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let from = (0..3u8).prop_map(|n| (n > 0).then(|| IpNet::new([10, n, 0, 0].into(), 16).unwrap()));
        (RULE_PRIORITY..RULE_PRIORITY + 3, from, any::<bool>()).prop_map(|(priority, from, ipv6)| Rule {
            priority,
            ipv6: ipv6 && from.is_none(),
            from,
            table: 4207,
        })
    }

    proptest! {
        #[test]
        fn our_rules_become_as_desired_and_foreign_ones_stay(
            rules in btree_set(rule(), 0..5), odd in 0..3usize,
            foreign in btree_set((RULE_PRIORITY..RULE_PRIORITY + 3, any::<bool>()), 0..3),
            wish in btree_set(rule(), 0..5), prune: bool, failures in laws::failures(),
        ) {
            let start = Actual { rules, odd: vec![RuleMessage::default(); odd], foreign };
            let desired = Desired { rules: wish, prune, ..Desired::default() };
            let end = laws::converge(start.clone(), failures, |actual| diff(actual, &desired), carry_out)?;
            prop_assert_eq!(&end.foreign, &start.foreign);
            let expected = match prune {
                true => desired.rules.clone(),
                false => &desired.rules | &start.rules,
            };
            prop_assert_eq!(&end.rules, &expected);
            for (priority, ipv6) in &start.foreign {
                let used = desired.rules.iter().any(|rule| (rule.priority, rule.ipv6) == (*priority, *ipv6));
                let name = format!("rule priority {priority}");
                let named = clashes(&end, &desired).iter().any(|clash| clash.object == name);
                prop_assert!(!used || named);
            }
        }

        #[test]
        fn a_rule_survives_the_wire(rule in rule()) {
            let mut actual = Actual::default();
            read_one(&mut actual, render(&rule));
            prop_assert_eq!(actual.rules, BTreeSet::from([rule]));
        }
    }
}
