//! Which objects count, and which pools a pod gets.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn object(name: &str, created: i64, spec: Value) -> Object {
    Object { name: name.into(), created, spec }
}

fn labels(key: &str, value: &str) -> Labels {
    [(key.to_owned(), value.to_owned())].into()
}

fn names(pools: Option<Vec<&Pool>>) -> Vec<&str> {
    pools.into_iter().flatten().map(|pool| pool.name.as_str()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_wrong_pool_is_named_by_field_and_stops_no_other() {
    let bad = [
        ("spec", json!({"cidr": 7})),
        ("spec", json!({"cidr": "10.0.0.0/16", "blocksize": 26})),
        ("spec.cidr", json!({"cidr": "10.0.0.1/16"})),
        ("spec.cidr", json!({"cidr": "ten"})),
        ("spec.cidr", json!({"cidr": "::ffff:10.0.0.0/112"})),
        ("spec.cidr", json!({"cidr": "169.254.0.0/16"})),
        ("spec.cidr", json!({"cidr": "fe80::/64"})),
        ("spec.cidr", json!({"cidr": "10.9.0.0/24"})),
        ("spec.blockSize", json!({"cidr": "10.0.0.0/16", "blockSize": 19})),
        ("spec.blockSize", json!({"cidr": "10.0.0.0/28", "blockSize": 26})),
        (
            "spec.nodeSelector.matchLabels",
            json!({"cidr": "10.0.0.0/16", "nodeSelector": {"matchLabels": {"": ""}}}),
        ),
        ("metadata.name", json!({"cidr": "10.0.0.0/16"})),
    ];
    for (field, spec) in bad {
        let name = if field == "metadata.name" { "Bad_" } else { "bad" };
        let objects = [object(name, 5, spec.clone()), object("good", 1, json!({"cidr": "10.9.0.0/16"}))];
        let (catalogue, issues) = Catalogue::read(&objects, &[]);
        assert_eq!(catalogue.pools.len(), 1, "{spec}");
        let [issue] = issues.as_slice() else { panic!("{issues:?}") };
        assert_eq!(
            (issue.object.as_str(), issue.field.as_str()),
            (&*format!("IPPool/{name}"), field),
            "{spec}"
        );
    }
}

#[test]
fn of_two_pools_that_overlap_the_older_stays() {
    let objects =
        [object("a", 9, json!({"cidr": "10.0.0.0/16"})), object("b", 3, json!({"cidr": "10.0.4.0/24"}))];
    let (catalogue, issues) = Catalogue::read(&objects, &[]);
    assert_eq!(catalogue.pools[0].name, "b");
    assert_eq!(issues[0].reason, "PoolOverlap");
    assert!(issues[0].message.contains("overlaps IPPool b (10.0.4.0/24)"), "{}", issues[0].message);
}

#[test]
fn a_small_pool_is_one_block_and_the_usual_sizes_are_26_and_122() {
    let objects = [
        object("four", 0, json!({"cidr": "10.0.0.0/16"})),
        object("six", 0, json!({"cidr": "fd00::/64"})),
        object("small", 0, json!({"cidr": "10.1.0.0/30"})),
    ];
    let (catalogue, issues) = Catalogue::read(&objects, &[]);
    assert!(issues.is_empty());
    assert_eq!(catalogue.pools.iter().map(|pool| pool.block_size).collect::<Vec<_>>(), [26, 122, 30]);
    assert!(!catalogue.is_usable(ip("10.0.0.0")) && !catalogue.is_usable(ip("10.0.255.255")));
    assert!(catalogue.is_usable(ip("10.0.0.63")) && catalogue.is_usable(ip("fd00::ffff:ffff:ffff:ffff")));
    assert!(!catalogue.is_usable(ip("10.2.0.1")));
}

#[test]
fn a_reservations_readable_prefixes_count() {
    let pool = object("p", 0, json!({"cidr": "10.0.0.0/16"}));
    let reservation = object("r", 0, json!({"reservedCIDRs": ["10.0.1.0/24", "10.0.2.5", "10.0.3.3/32"]}));
    let (catalogue, issues) = Catalogue::read(&[pool], &[reservation, object("s", 0, json!([]))]);
    assert_eq!(issues[0].field, "spec.reservedCIDRs[1]");
    assert_eq!(issues[1].object, "IPReservation/s");
    assert!(!catalogue.is_usable(ip("10.0.1.200")) && !catalogue.is_usable(ip("10.0.3.3")));
    assert!(catalogue.is_usable(ip("10.0.3.4")));
}

#[test]
fn selectors_and_annotations_choose_the_pools() {
    let objects = [
        object("any", 0, json!({"cidr": "10.0.0.0/24"})),
        object("off", 0, json!({"cidr": "10.1.0.0/24", "disabled": true})),
        object("rack", 0, json!({"cidr": "10.2.0.0/24", "nodeSelector": {"matchLabels": {"rack": "7"}}})),
        object(
            "team",
            0,
            json!({"cidr": "10.3.0.0/24", "namespaceSelector": {"matchLabels": {"team": "x"}}}),
        ),
        object("six", 0, json!({"cidr": "fd00::/64", "nodeSelector": {"matchLabels": {"rack": "7"}}})),
    ];
    let (catalogue, issues) = Catalogue::read(&objects, &[]);
    assert!(issues.is_empty());
    let plain = Ask::default();
    let team = Ask { namespace_labels: labels("team", "x"), ..Ask::default() };
    let none = Labels::new();
    let rack = labels("rack", "7");
    assert_eq!(names(catalogue.candidates(Family::V4, &none, &plain).unwrap()), ["any"]);
    assert_eq!(names(catalogue.candidates(Family::V4, &rack, &plain).unwrap()), ["any", "rack"]);
    assert_eq!(names(catalogue.candidates(Family::V4, &none, &team).unwrap()), ["any", "team"]);
    assert_eq!(catalogue.candidates(Family::V6, &none, &plain).unwrap(), None);

    let asks = |pools: &[&str]| Ask {
        ipv4_pools: pools.iter().map(ToString::to_string).collect(),
        ..Ask::default()
    };
    let asked = asks(&["10.2.0.0/24", "any"]);
    assert_eq!(names(catalogue.candidates(Family::V4, &none, &asked).unwrap()), ["rack", "any"]);
    let refused = |pool: &str| catalogue.candidates(Family::V4, &none, &asks(&[pool])).unwrap_err();
    assert_eq!(refused("off"), Refusal::Disabled("off".into()));
    assert_eq!(refused("team"), Refusal::NotForNamespace("team".into()));
    assert_eq!(refused("six"), Refusal::UnknownPool("six".into(), Family::V4));

    let exact = |ips: &[&str]| {
        catalogue.check_exact(&Ask { ips: ips.iter().map(|text| ip(text)).collect(), ..Ask::default() })
    };
    assert_eq!(exact(&["10.0.0.5", "fd00::5"]), Ok(()));
    assert_eq!(exact(&["10.0.0.255"]), Err(Refusal::Reserved(ip("10.0.0.255"))));
    assert_eq!(exact(&["10.9.0.5"]), Err(Refusal::NotInPool(ip("10.9.0.5"))));
    assert_eq!(exact(&["10.3.0.5"]), Err(Refusal::NotForNamespace("team".into())));
    assert_eq!(exact(&["10.0.0.5", "10.0.0.6"]), Err(Refusal::TwoOfFamily(ip("10.0.0.5"), ip("10.0.0.6"))));
}

fn any_json() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        "[ -~]{0,12}",
        Just("10.0.0.0/24".to_owned()),
        Just("fd00::/64".to_owned()),
        Just("::/0".to_owned()),
        Just("In".to_owned())
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u8..=255).prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        let key = prop::sample::select(vec![
            "cidr",
            "blockSize",
            "nodeSelector",
            "namespaceSelector",
            "matchLabels",
            "matchExpressions",
            "key",
            "operator",
            "values",
            "reservedCIDRs",
            "affinity",
            "allocations",
            "renewals",
            "disabled",
            "0",
            "node",
            "instance",
            "handle",
            "kind",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_objects_have_an_answer(specs in prop::collection::vec((any_json(), "[a-z./-]{0,8}"), 0..4)) {
        let objects: Vec<Object> = specs.into_iter().map(|(spec, name)| Object { name, created: 0, spec }).collect();
        let (catalogue, issues) = Catalogue::read(&objects, &objects);
        for (at, pool) in catalogue.pools.iter().enumerate() {
            prop_assert!(pool.block_size >= pool.cidr.prefix_len());
            for other in &catalogue.pools[..at] {
                prop_assert!(!overlap(&pool.cidr, &other.cidr));
            }
        }
        prop_assert!(catalogue.pools.len() + issues.len() >= objects.len());
        for object in &objects {
            let _ = crate::block::Block::decode(&object.name, &object.spec);
            let _ = crate::block::Block::decode("10-0-0-0-24", &object.spec);
        }
    }
}
