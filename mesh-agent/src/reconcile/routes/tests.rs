#![allow(clippy::unwrap_used)]

use super::*;
use crate::reconcile::laws;
use proptest::collection::btree_set;
use proptest::prelude::*;

fn carry_out(actual: &mut Actual, op: &Op) {
    match op {
        Op::RemoveOdd(message) => actual.odd.retain(|odd| odd != message),
        Op::Add(route) => {
            assert!(!actual.routes.iter().any(|other| key(other) == key(route)), "added over another");
            actual.routes.insert(route.clone());
        }
        Op::Replace(route) => {
            actual.routes.retain(|other| key(other) != key(route));
            actual.routes.insert(route.clone());
        }
        Op::Remove(route) => assert!(actual.routes.remove(route)),
    }
}

fn route() -> impl Strategy<Value = Route> {
    let v4 = (0..3u8, prop_oneof![Just(16u8), Just(24)])
        .prop_map(|(n, len)| IpNet::new([10, n, 0, 0].into(), len).unwrap().trunc());
    let v6 = (0..3u16).prop_map(|n| IpNet::new([0xfd00, n, 0, 0, 0, 0, 0, 0].into(), 64).unwrap());
    let src = prop_oneof![Just(None), Just(Some(IpAddr::from([10, 0, 0, 1])))];
    let device = (prop_oneof![Just("margay0"), Just("mgy0123456789")], src)
        .prop_map(|(name, src)| RouteTarget::Device { name: name.into(), src });
    let target = prop_oneof![device, Just(RouteTarget::Throw), Just(RouteTarget::Unreachable)];
    let metric = prop_oneof![Just(0u32), Just(1024), Just(u32::MAX)];
    (prop_oneof![Just(TABLE), Just(TABLE_FROM_PODS)], prop_oneof![v4, v6], target, metric)
        .prop_map(|(table, dst, target, metric)| Route { table, dst, target, metric })
}

fn actual() -> impl Strategy<Value = Actual> {
    (btree_set(route(), 0..8), 0..3usize).prop_map(|(routes, odd)| {
        let by_key: BTreeMap<Key, Route> =
            routes.iter().map(canonical).map(|route| (key(&route), route)).collect();
        Actual { routes: by_key.into_values().collect(), odd: vec![RouteMessage::default(); odd] }
    })
}

fn position(ops: &[Op], test: impl Fn(&Op) -> bool) -> Vec<usize> {
    ops.iter().enumerate().filter(|(_, op)| test(op)).map(|(at, _)| at).collect()
}

proptest! {
    #[test]
    fn our_routes_become_as_desired(
        start in actual(), routes in btree_set(route(), 0..8), prune: bool, failures in laws::failures(),
    ) {
        let desired = Desired { routes, prune, ..Desired::default() };
        let end = laws::converge(start.clone(), failures, |actual| diff(actual, &desired), carry_out)?;
        let wish: BTreeMap<Key, Route> =
            desired.routes.iter().map(canonical).map(|route| (key(&route), route)).collect();
        let mut expected = wish.clone();
        if !prune {
            for route in start.routes {
                expected.entry(key(&route)).or_insert(route);
            }
            prop_assert_eq!(end.odd, start.odd);
        } else {
            prop_assert!(end.odd.is_empty());
        }
        prop_assert_eq!(end.routes, expected.into_values().collect::<BTreeSet<_>>());
    }

    #[test]
    fn unreachable_is_first_in_and_last_out(start in actual(), routes in btree_set(route(), 0..8)) {
        let ops = diff(&start, &Desired { routes, prune: true, ..Desired::default() });
        let ground = |route: &Route| route.target == RouteTarget::Unreachable;
        let put_ground = position(&ops, |op| matches!(op, Op::Add(r) | Op::Replace(r) if ground(r)));
        let put_way = position(&ops, |op| matches!(op, Op::Add(r) | Op::Replace(r) if !ground(r)));
        let remove_way = position(&ops, |op| matches!(op, Op::Remove(r) if !ground(r)));
        let remove_ground = position(&ops, |op| matches!(op, Op::Remove(r) if ground(r)));
        let phases = [put_ground, put_way, remove_way, remove_ground].concat();
        prop_assert!(phases.is_sorted(), "{ops:?}");
    }

    #[test]
    fn withheld_links_get_no_new_route_and_keep_their_old_ones(
        start in actual(), routes in btree_set(route(), 0..8), prune: bool,
    ) {
        let withhold = BTreeSet::from(["mgy0123456789".to_owned()]);
        let to_withheld = |route: &Route| {
            matches!(&route.target, RouteTarget::Device { name, .. } if withhold.contains(name))
        };
        let desired = Desired { routes, prune, withhold: withhold.clone(), ..Desired::default() };
        let mut end = start.clone();
        for op in &diff(&start, &desired) {
            if let Op::Add(route) | Op::Replace(route) = op {
                prop_assert!(!to_withheld(route));
            }
            carry_out(&mut end, op);
        }
        prop_assert!(diff(&end, &desired).is_empty());
        let kept = start.routes.iter().filter(|route| to_withheld(route) && desired.routes.iter()
            .map(canonical).filter(|wish| key(wish) == key(route)).all(|wish| wish == **route)
            && desired.routes.iter().any(|wish| canonical(wish) == **route));
        for route in kept {
            prop_assert!(end.routes.contains(route));
        }
    }
}

#[test]
fn a_prefix_that_changes_its_device_is_replaced_and_never_gone() {
    let to = |name: &str| Route {
        table: TABLE,
        dst: "10.1.0.0/24".parse().unwrap(),
        target: RouteTarget::Device { name: name.into(), src: None },
        metric: 0,
    };
    let actual = Actual { routes: BTreeSet::from([to("margay0")]), odd: vec![] };
    let desired = Desired { routes: BTreeSet::from([to("margay1")]), prune: true, ..Desired::default() };
    assert_eq!(diff(&actual, &desired), [Op::Replace(to("margay1"))]);
}
