//! Admission, for any claims: what must hold, checked against naive pairwise rules.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Cluster, OWN, addr, key, nets};
use ipnet::IpNet;
use keyservice::admission::{Admission, Incumbents, Rules, admit};
use keyservice::{Announcement, Authority, Claim, KeyClaim, PublicKey};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", OWN];
const PREFIXES: [&str; 12] = [
    "10.42.0.0/16",
    "10.42.0.0/20",
    "10.42.1.0/24",
    "10.42.1.128/25",
    "10.42.2.0/24",
    "10.42.2.0/25",
    "10.42.3.0/24",
    "fd42::/48",
    "fd42:0:0:1::/64",
    "fd42:0:0:2::/64",
    "10.43.0.0/24",
    "10.0.0.0/8",
];

fn any_key() -> impl Strategy<Value = PublicKey> {
    prop_oneof![
        30 => (1u8..8).prop_map(key),
        1 => Just(PublicKey::from_bytes([0; 32])),
        4 => Just(key(100)),
    ]
}

fn prefixes() -> impl Strategy<Value = Vec<IpNet>> {
    subsequence(PREFIXES.to_vec(), 0..3).prop_map(|texts| nets(&texts))
}

fn authority() -> impl Strategy<Value = Authority> {
    let addresses = subsequence(vec!["192.0.2.1", "192.0.2.2", "192.0.2.3", "10.42.9.9", "::1"], 0..3);
    let uid = option::of(select(vec!["u1".to_owned(), "u2".to_owned()]));
    (uid, prop_oneof![2 => Just(Vec::new()), 3 => prefixes()], addresses).prop_map(
        |(uid, pod_cidrs, texts)| Authority {
            uid,
            pod_cidrs,
            addresses: texts.into_iter().map(addr).collect(),
        },
    )
}

fn claim(name: &'static str) -> impl Strategy<Value = Claim> {
    let keys = if name == OWN { vec(Just(key(100)), 1).boxed() } else { vec(any_key(), 0..=3).boxed() };
    (keys, prefixes(), authority()).prop_map(move |(keys, pod_cidrs, authority)| {
        let claim = |(i, public_key)| KeyClaim { public_key, port: 51820 + i as u16, epoch: i as u64 };
        let keys = keys.into_iter().enumerate().map(claim).collect();
        let endpoints = vec!["192.0.2.1:51820".parse().unwrap()];
        let name = name.to_owned();
        Claim {
            announcement: Announcement {
                name,
                keys,
                endpoints,
                capabilities: BTreeSet::new(),
                pod_cidrs,
                signature: None,
            },
            authority,
            signer: None,
        }
    })
}

fn claims() -> impl Strategy<Value = Vec<Claim>> {
    let some = NAMES.map(|name| option::weighted(0.8, claim(name)));
    some.prop_map(|claims| claims.into_iter().flatten().collect())
}

/// Now and then one name with several claims, which no source yields.
fn odd_claims() -> impl Strategy<Value = Vec<Claim>> {
    (claims(), vec(select(NAMES.to_vec()).prop_flat_map(claim), 0..2)).prop_map(|(mut claims, more)| {
        claims.extend(more);
        claims
    })
}

fn silent() -> impl Strategy<Value = BTreeMap<String, Authority>> {
    option::of(authority())
        .prop_map(|one| one.map(|authority| ("quiet".to_owned(), authority)).into_iter().collect())
}

/// Memory as it comes to be: by an admission.
fn memory() -> impl Strategy<Value = Incumbents> {
    claims().prop_map(|claims| admit(&claims, &Incumbents::default(), &Cluster::default().rules()).incumbents)
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn effective(claim: &Claim) -> Vec<IpNet> {
    let named = &claim.authority.pod_cidrs;
    if named.is_empty() { claim.announcement.pod_cidrs.clone() } else { named.clone() }
}

fn keys(claim: &Claim) -> Vec<PublicKey> {
    claim.announcement.keys.iter().map(|key| key.public_key).collect()
}

fn is_admitted(admission: &Admission, name: &str) -> bool {
    admission.admitted.iter().any(|node| node.name == name)
}

fn check_exclusive(result: &Admission, rules: &Rules<'_>) {
    let everyone: Vec<_> = result.admitted.iter().chain(&result.own).collect();
    for (i, a) in everyone.iter().enumerate() {
        for b in &everyone[i + 1..] {
            assert!(
                !a.keys.iter().any(|k| b.keys.iter().any(|l| k.public_key == l.public_key)),
                "{a:?} {b:?}"
            );
            assert!(!a.pod_cidrs.iter().any(|p| b.pod_cidrs.iter().any(|q| overlap(p, q))), "{a:?} {b:?}");
            assert!(!a.addresses.iter().any(|x| b.addresses.contains(x)), "{a:?} {b:?}");
        }
        assert!(a.pod_cidrs.iter().all(|p| rules.pools.iter().any(|pool| pool.contains(p))));
        assert!(
            !a.addresses.iter().any(|x| x.is_loopback() || rules.pools.iter().any(|pool| pool.contains(x)))
        );
    }
    for node in &result.admitted {
        assert!(node.name != rules.own_name && !node.keys.is_empty() && node.keys.len() <= 2);
        assert!(
            node.keys.iter().all(|k| !k.public_key.is_low_order() && !rules.own_keys.contains(&k.public_key))
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_given_to_two(claims in odd_claims(), memory in memory(), silent in silent(), synced: bool) {
        let cluster = Cluster::default();
        let rules = Rules { silent, synced, ..cluster.rules() };
        check_exclusive(&admit(&claims, &memory, &rules), &rules);
    }

    #[test]
    fn every_claim_ends_admitted_or_refused_or_own(claims in claims(), memory in memory(), silent in silent()) {
        let cluster = Cluster::default();
        let result = admit(&claims, &memory, &Rules { silent, ..cluster.rules() });
        for claim in &claims {
            let name = claim.announcement.name.as_str();
            if name == OWN {
                prop_assert!(result.own.is_some());
                continue;
            }
            let refused = result.refused.iter().filter(|refusal| refusal.name == name).count();
            prop_assert_eq!(refused + usize::from(is_admitted(&result, name)), 1, "{}", name);
        }
        prop_assert!(result.admitted.is_sorted_by_key(|node| &node.name));
        prop_assert!(result.refused.is_sorted() && result.notices.is_sorted());
        prop_assert!(result.notices.iter().all(|n| n.name == OWN || is_admitted(&result, &n.name)));
    }

    #[test]
    fn order_does_not_matter(
        (claims, shuffled) in odd_claims().prop_flat_map(|claims| (Just(claims.clone()), Just(claims).prop_shuffle())),
        memory in memory(), silent in silent(), synced: bool,
    ) {
        let cluster = Cluster::default();
        let rules = Rules { silent, synced, ..cluster.rules() };
        prop_assert_eq!(admit(&claims, &memory, &rules), admit(&shuffled, &memory, &rules));
    }

    #[test]
    fn deciding_again_changes_nothing(claims in odd_claims(), memory in memory(), silent in silent(), synced: bool) {
        // No source has two objects of one name; which of two such claims is believed depends on what is remembered.
        let mut names = BTreeSet::new();
        let claims: Vec<_> =
            claims.into_iter().filter(|claim| names.insert(claim.announcement.name.clone())).collect();
        let cluster = Cluster::default();
        let rules = Rules { silent, synced, ..cluster.rules() };
        let once = admit(&claims, &memory, &rules);
        let again = admit(&claims, &once.incumbents, &rules);
        // Which of several lost prefixes, or of several nodes it is lost to, a message names may change.
        let plainly = |mut result: Admission| {
            let told = result.refused.iter_mut().chain(&mut result.notices);
            told.for_each(|refusal| refusal.message.clear());
            result.refused.sort();
            result.notices.sort();
            result
        };
        prop_assert_eq!(plainly(again), plainly(once));
    }

    #[test]
    fn the_memory_is_always_one_that_loads(claims in odd_claims(), memory in memory(), silent in silent(), synced: bool) {
        let cluster = Cluster::default();
        let result = admit(&claims, &memory, &Rules { silent, synced, ..cluster.rules() });
        let bytes = serde_json::to_vec(&serde_json::json!({ "version": 1, "nodes": result.incumbents })).unwrap();
        prop_assert_eq!(Incumbents::parse(&bytes).unwrap(), result.incumbents);
    }

    /// Whoever was admitted with this very claim stays, whatever newcomers say (short of an authority).
    #[test]
    fn no_newcomer_harms_an_incumbent(settled in claims(), newcomers in vec(claim("z"), 1), more in vec(claim("y"), 1)) {
        let cluster = Cluster::default();
        let before = admit(&settled, &Incumbents::default(), &cluster.rules());
        let mut crowd = settled.clone();
        for mut newcomer in newcomers.into_iter().chain(more) {
            // Whatever the authority of a newcomer says is an authority's change.
            newcomer.authority = Authority::default();
            crowd.push(newcomer);
        }
        let after = admit(&crowd, &before.incumbents, &cluster.rules());
        for node in &before.admitted {
            prop_assert!(after.admitted.contains(node), "{:?} was harmed: {:?}", node, after);
        }
        if !before.refused.iter().any(|refusal| refusal.name == OWN) {
            prop_assert_eq!(before.own, after.own);
        }
    }

    /// A claim is admitted whole when no pair of claims, and no memory, is in any conflict with it.
    #[test]
    fn whoever_is_in_no_conflict_is_admitted_whole(claims in claims(), memory in memory()) {
        let cluster = Cluster::default();
        let rules = cluster.rules();
        let result = admit(&claims, &memory, &rules);
        for claim in claims.iter().filter(|claim| claim.announcement.name != OWN) {
            let (own_keys, own_prefixes) = (keys(claim), effective(claim));
            let distinct: BTreeSet<_> = own_keys.iter().collect();
            let sound = (1..=2).contains(&own_keys.len())
                && distinct.len() == own_keys.len()
                && !own_keys.iter().any(|key| key.is_low_order() || rules.own_keys.contains(key))
                && own_prefixes.iter().all(|p| rules.pools.iter().any(|pool| pool.contains(p)));
            let name = &claim.announcement.name;
            let others = claims.iter().filter(|other| other.announcement.name != *name);
            let claimed = others.clone().all(|other| {
                !keys(other).iter().any(|key| own_keys.contains(key))
                    && !effective(other).iter().any(|p| own_prefixes.iter().any(|q| overlap(p, q)))
            });
            let present: BTreeSet<&String> = others.map(|other| &other.announcement.name).collect();
            let remembered = memory.0.iter().filter(|(other, _)| *other != name && present.contains(other)).all(|(_, held)| {
                !held.keys.iter().any(|key| own_keys.contains(key))
                    && !held.pod_cidrs.iter().any(|p| own_prefixes.iter().any(|q| overlap(p, q)))
            });
            let found = result.admitted.iter().find(|node| node.name == *name);
            if sound && claimed && remembered {
                let found = found.expect("is in no conflict");
                prop_assert_eq!(found.keys.len(), own_keys.len());
                prop_assert!(own_prefixes.iter().all(|p| found.pod_cidrs.iter().any(|q| q.contains(p))));
            }
            if !sound {
                prop_assert!(found.is_none());
            }
        }
    }

    /// At a cold start without partial claims the outcome of a prefix is that of the plain pairwise rule.
    #[test]
    fn single_prefixes_at_a_cold_start_follow_the_pairwise_rule(
        picks in vec((select(PREFIXES[..10].to_vec()), any::<bool>()), 1..6),
    ) {
        let cluster = Cluster::default();
        let make = |(i, (prefix, backed)): (usize, &(&str, bool))| {
            let make = if *backed { common::backed } else { common::plain };
            make(NAMES[i], &[i as u8 + 1], &[prefix])
        };
        let claims: Vec<Claim> = picks.iter().take(5).enumerate().map(make).collect();
        let result = admit(&claims, &Incumbents::default(), &cluster.rules());
        // The oracle: of those backed, whoever overlaps no other backed one; of the rest, whoever overlaps
        // no backed one and no other of the rest that does not overlap a backed one either.
        let hits = |i: usize, j: usize| i != j && overlap(&effective(&claims[i])[0], &effective(&claims[j])[0]);
        let backed = |i: &usize| picks[*i].1;
        let all = 0..claims.len();
        let clear = |i: usize| !all.clone().filter(backed).any(|j| hits(i, j));
        for i in all.clone() {
            let expected = clear(i) && (backed(&i) || !all.clone().any(|j| !backed(&j) && clear(j) && hits(i, j)));
            prop_assert_eq!(is_admitted(&result, NAMES[i]), expected, "{}: {:?}", NAMES[i], result);
        }
    }
}
