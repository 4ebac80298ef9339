//! Admission, rule by rule.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Cluster, OWN, addr, announcement, backed, key, net, nets, plain};
use keyservice::admission::{Admission, Incumbents, Rules, admit, reason};
use keyservice::{AnnouncementKey, Authority, Claim, PrivateKey, PublicKey, Refusal, SigningKey};

fn decide(claims: &[Claim], memory: &Admission) -> Admission {
    admit(claims, &memory.incumbents, &Cluster::default().rules())
}

fn cold(claims: &[Claim]) -> Admission {
    decide(claims, &Admission::default())
}

fn names(admission: &Admission) -> Vec<&str> {
    admission.admitted.iter().map(|node| node.name.as_str()).collect()
}

fn reasons(refusals: &[Refusal]) -> Vec<(&str, &str)> {
    refusals.iter().map(|refusal| (refusal.name.as_str(), refusal.reason)).collect()
}

fn with_addresses(mut claim: Claim, addresses: &[&str]) -> Claim {
    claim.authority.addresses = addresses.iter().map(|text| addr(text)).collect();
    claim
}

fn with_uid(mut claim: Claim, uid: &str) -> Claim {
    claim.authority.uid = Some(uid.to_owned());
    claim
}

#[test]
fn nodes_without_conflict_are_admitted_in_name_order() {
    let result =
        cold(&[plain("b", &[2], &["10.42.2.0/24"]), backed("a", &[1], &["10.42.1.0/24", "fd42:0:0:1::/64"])]);
    assert_eq!(names(&result), ["a", "b"]);
    assert_eq!(result.admitted[0].pod_cidrs, nets(&["10.42.1.0/24", "fd42:0:0:1::/64"]));
    assert!(result.refused.is_empty() && result.notices.is_empty());
}

#[test]
fn the_newest_key_comes_first_whatever_the_claim_says() {
    let mut claim = plain("a", &[1, 2], &[]);
    claim.announcement.keys.reverse();
    let result = cold(&[claim]);
    assert_eq!(result.admitted[0].keys.iter().map(|k| k.public_key).collect::<Vec<_>>(), [key(1), key(2)]);
}

#[test]
fn a_node_without_prefixes_is_admitted() {
    let result = cold(&[plain("a", &[1], &[])]);
    assert_eq!(names(&result), ["a"]);
    assert!(result.admitted[0].pod_cidrs.is_empty());
}

#[test]
fn a_key_held_by_an_incumbent_is_refused_to_a_newcomer() {
    let memory = cold(&[plain("b", &[1], &[])]);
    let result = decide(&[plain("a", &[1], &[]), plain("b", &[1], &[])], &memory);
    assert_eq!(names(&result), ["b"]);
    assert_eq!(reasons(&result.refused), [("a", reason::DUPLICATE_KEY)]);
    assert!(result.refused[0].message.contains("node b"), "{}", result.refused[0].message);
}

#[test]
fn two_newcomers_with_one_key_are_both_refused() {
    let result = cold(&[plain("a", &[1], &[]), plain("b", &[2, 1], &[])]);
    assert!(names(&result).is_empty());
    assert_eq!(reasons(&result.refused), [("a", reason::DUPLICATE_KEY), ("b", reason::DUPLICATE_KEY)]);
}

#[test]
fn a_claim_with_one_key_twice_is_refused() {
    let result = cold(&[plain("a", &[1, 1], &[]), plain("b", &[], &[]), plain("c", &[1, 2, 3], &[])]);
    let invalid = reason::INVALID_KEYS;
    assert_eq!(reasons(&result.refused), [("a", invalid), ("b", invalid), ("c", invalid)]);
}

#[test]
fn this_nodes_own_key_under_another_name_is_refused() {
    let result = cold(&[plain(OWN, &[100], &[]), plain("a", &[1, 100], &[])]);
    assert_eq!(reasons(&result.refused), [("a", reason::DUPLICATE_KEY)]);
    assert!(result.own.is_some());
}

#[test]
fn this_nodes_own_name_with_another_key_is_refused_and_never_admitted() {
    let result = cold(&[plain(OWN, &[1], &["10.42.1.0/24"])]);
    assert!(names(&result).is_empty());
    assert_eq!(reasons(&result.refused), [(OWN, reason::NAME_TAKEN)]);
}

#[test]
fn low_order_keys_are_refused() {
    for bytes in [[0; 32], {
        let mut one = [0; 32];
        one[0] = 1;
        one
    }] {
        let mut claim = plain("a", &[1], &[]);
        claim.announcement.keys[0].public_key = PublicKey::from_bytes(bytes);
        assert_eq!(reasons(&cold(&[claim]).refused), [("a", reason::LOW_ORDER_KEY)]);
    }
}

#[test]
fn a_prefix_outside_the_pools_is_foreign_whoever_says_so() {
    for prefix in ["10.43.0.0/24", "10.42.0.0/15", "192.168.0.0/24", "0.0.0.0/0", "fd43::/64"] {
        assert_eq!(
            reasons(&cold(&[plain("a", &[1], &[prefix])]).refused),
            [("a", reason::FOREIGN_PREFIX)],
            "{prefix}"
        );
        assert_eq!(
            reasons(&cold(&[backed("a", &[1], &[prefix])]).refused),
            [("a", reason::FOREIGN_PREFIX)],
            "{prefix}"
        );
    }
}

#[test]
fn announced_prefixes_count_for_nothing_beside_an_authority() {
    let mut claim = backed("a", &[1], &["10.42.1.0/24"]);
    claim.announcement.pod_cidrs = nets(&["0.0.0.0/0"]);
    assert_eq!(cold(&[claim]).admitted[0].pod_cidrs, nets(&["10.42.1.0/24"]));
}

#[test]
fn an_incumbents_prefix_is_refused_to_a_newcomer_of_the_same_backing() {
    for make in [plain, backed] {
        let a = make("a", &[1], &["10.42.1.0/24"]);
        let memory = cold(std::slice::from_ref(&a));
        for grab in ["10.42.1.0/24", "10.42.1.128/25", "10.42.0.0/16"] {
            let result = decide(&[make("b", &[2], &["fd42::/64", grab]), a.clone()], &memory);
            assert_eq!(names(&result), ["a"], "{grab}");
            assert_eq!(reasons(&result.refused), [("b", reason::OVERLAPPING_PREFIX)]);
        }
    }
}

#[test]
fn a_tie_at_a_cold_start_closes_both_and_blocks_the_rest() {
    for make in [plain, backed] {
        let result = cold(&[
            make("a", &[1], &["10.42.1.0/24"]),
            make("b", &[2], &["10.42.0.0/20"]),
            make("c", &[3], &["10.42.64.0/24"]),
        ]);
        assert_eq!(names(&result), ["c"]);
        assert_eq!(
            reasons(&result.refused),
            [("a", reason::OVERLAPPING_PREFIX), ("b", reason::OVERLAPPING_PREFIX)]
        );
    }
    // What two authorities quarrel over is not for a third to announce.
    let result = cold(&[
        backed("a", &[1], &["10.42.1.0/24"]),
        backed("b", &[2], &["10.42.1.0/24"]),
        plain("c", &[3], &["10.42.1.0/24"]),
    ]);
    assert!(names(&result).is_empty());
}

#[test]
fn an_authority_beats_an_announcement_even_of_an_incumbent() {
    let mine = plain("a", &[1], &["10.42.1.0/24"]);
    let theirs = backed("b", &[2], &["10.42.1.0/24"]);
    assert_eq!(names(&cold(&[mine.clone(), theirs.clone()])), ["b"]);
    let memory = cold(std::slice::from_ref(&mine));
    let result = decide(&[mine, theirs], &memory);
    assert_eq!(names(&result), ["b"]);
    assert_eq!(reasons(&result.refused), [("a", reason::OVERLAPPING_PREFIX)]);
}

#[test]
fn the_authority_of_a_silent_node_beats_an_announcement() {
    let cluster = Cluster::default();
    let mut rules = cluster.rules();
    let authority = Authority { pod_cidrs: nets(&["10.42.1.0/24"]), ..Authority::default() };
    rules.silent.insert("quiet".to_owned(), authority);
    let result = admit(&[plain("a", &[1], &["10.42.1.0/24"])], &Incumbents::default(), &rules);
    assert!(names(&result).is_empty());
    assert!(result.refused[0].message.contains("quiet"), "{}", result.refused[0].message);
}

#[test]
fn a_known_node_may_change_its_keys() {
    let memory = cold(&[plain("a", &[1], &["10.42.1.0/24"])]);
    let result = decide(&[plain("a", &[2], &["10.42.1.0/24"])], &memory);
    assert_eq!(result.admitted[0].keys[0].public_key, key(2));
    // The old key is free again.
    assert_eq!(
        names(&decide(&[plain("a", &[2], &["10.42.1.0/24"]), plain("b", &[1], &[])], &result)),
        ["a", "b"]
    );
}

#[test]
fn an_incumbent_rotating_keeps_its_key_when_the_next_one_is_contested() {
    let memory = cold(&[plain("a", &[1], &[]), plain("b", &[2], &[])]);
    let mut rotating = plain("a", &[3, 1], &[]);
    rotating.announcement.endpoints =
        vec!["192.0.2.1:51820".parse().unwrap(), "192.0.2.9:7".parse().unwrap()];
    // A newcomer cannot contest it, another incumbent can.
    let result = decide(&[rotating.clone(), plain("c", &[3], &[])], &memory);
    assert_eq!(result.admitted[0].keys.len(), 2);
    assert_eq!(reasons(&result.refused), [("c", reason::DUPLICATE_KEY)]);
    let result = decide(&[rotating, plain("b", &[3, 2], &[])], &memory);
    assert_eq!(result.admitted.iter().map(|n| n.keys[0].public_key).collect::<Vec<_>>(), [key(1), key(2)]);
    assert_eq!(reasons(&result.notices), [("a", reason::DUPLICATE_KEY), ("b", reason::DUPLICATE_KEY)]);
    // Endpoints follow the key that is left, except those with a port of their own (a NAT's).
    assert_eq!(
        result.admitted[0].endpoints,
        ["192.0.2.1:51821".parse().unwrap(), "192.0.2.9:7".parse().unwrap()]
    );
}

#[test]
fn an_incumbent_loses_only_the_contested_part() {
    let memory = cold(&[plain("a", &[1], &["10.42.1.0/24"]), plain("b", &[2], &["10.42.2.0/24"])]);
    let result = decide(
        &[plain("a", &[1], &["10.42.1.0/24", "10.42.2.0/24"]), plain("b", &[2], &["10.42.2.0/24"])],
        &memory,
    );
    assert_eq!(names(&result), ["a", "b"]);
    assert_eq!(result.admitted[0].pod_cidrs, nets(&["10.42.1.0/24"]));
    assert_eq!(reasons(&result.notices), [("a", reason::OVERLAPPING_PREFIX)]);
}

#[test]
fn a_rebuilt_node_is_a_newcomer() {
    let memory = cold(&[with_uid(plain("a", &[1], &["10.42.1.0/24"]), "u1")]);
    let rebuilt = with_uid(plain("a", &[2], &["10.42.1.0/24"]), "u2");
    assert_eq!(names(&decide(std::slice::from_ref(&rebuilt), &memory)), ["a"]);
    assert!(names(&decide(&[rebuilt, plain("b", &[1], &["10.42.1.0/24"])], &memory)).is_empty());
}

#[test]
fn a_bad_claim_does_not_cost_an_incumbent_what_it_holds() {
    let memory = cold(&[plain("a", &[1], &["10.42.1.0/24"])]);
    let result = decide(
        &[plain("a", &[1], &["10.9.0.0/16"]), plain("b", &[2], &["10.42.1.0/24"]), plain("c", &[1], &[])],
        &memory,
    );
    assert!(names(&result).is_empty());
    assert_eq!(
        reasons(&result.refused),
        [("a", reason::FOREIGN_PREFIX), ("b", reason::OVERLAPPING_PREFIX), ("c", reason::DUPLICATE_KEY)]
    );
    let healed = decide(&[plain("a", &[1], &["10.42.1.0/24"]), plain("b", &[2], &["10.42.1.0/24"])], &result);
    assert_eq!(names(&healed), ["a"]);
}

#[test]
fn a_vanished_node_is_forgotten_only_once_all_sources_are_read() {
    let memory = cold(&[plain("a", &[1], &["10.42.1.0/24"])]).incumbents;
    let cluster = Cluster::default();
    let newcomer = [backed("b", &[1], &["10.42.1.0/24"])];
    let waiting = admit(&newcomer, &memory, &Rules { synced: false, ..cluster.rules() });
    assert!(names(&waiting).is_empty());
    assert_eq!(waiting.incumbents, memory);
    let synced = admit(&newcomer, &waiting.incumbents, &cluster.rules());
    assert_eq!(names(&synced), ["b"]);
    assert!(!synced.incumbents.0.contains_key("a"));
}

#[test]
fn this_nodes_prefixes_are_protected_like_anyones() {
    let own = plain(OWN, &[100], &["10.42.1.0/24"]);
    let thief = plain("a", &[1], &["10.42.1.0/24"]);
    // Known before: the thief loses.
    let memory = cold(std::slice::from_ref(&own));
    let result = decide(&[own.clone(), thief.clone()], &memory);
    assert_eq!(reasons(&result.refused), [("a", reason::OVERLAPPING_PREFIX)]);
    assert_eq!(result.own.unwrap().pod_cidrs, nets(&["10.42.1.0/24"]));
    // A tie at a cold start: this node must not use the prefix either.
    let result = cold(&[own, thief]);
    assert_eq!(
        reasons(&result.refused),
        [("a", reason::OVERLAPPING_PREFIX), (OWN, reason::OVERLAPPING_PREFIX)]
    );
    assert!(result.own.unwrap().pod_cidrs.is_empty());
}

#[test]
fn an_address_of_two_nodes_stays_with_the_incumbent_and_kills_nobody() {
    let a = with_addresses(plain("a", &[1], &[]), &["192.0.2.1", "2001:db8::1"]);
    let memory = cold(std::slice::from_ref(&a));
    let b = with_addresses(plain("b", &[2], &[]), &["192.0.2.1", "192.0.2.2"]);
    let result = decide(&[b.clone(), a.clone()], &memory);
    assert_eq!(names(&result), ["a", "b"]);
    assert_eq!(result.admitted[0].addresses, [addr("192.0.2.1"), addr("2001:db8::1")]);
    assert_eq!(result.admitted[1].addresses, [addr("192.0.2.2")]);
    assert_eq!(reasons(&result.notices), [("b", reason::DUPLICATE_ADDRESS)]);
    let tie = cold(&[a, b]);
    assert_eq!(tie.admitted[0].addresses, [addr("2001:db8::1")]);
    assert_eq!(reasons(&tie.notices), [("a", reason::DUPLICATE_ADDRESS), ("b", reason::DUPLICATE_ADDRESS)]);
}

#[test]
fn this_nodes_addresses_are_never_a_peers() {
    let own = with_addresses(plain(OWN, &[100], &[]), &["192.0.2.1"]);
    let thief = with_addresses(plain("a", &[1], &[]), &["192.0.2.1"]);
    let result = decide(&[thief.clone(), own], &cold(&[thief]));
    assert!(result.admitted[0].addresses.is_empty());
    assert_eq!(result.own.unwrap().addresses, [addr("192.0.2.1")]);
}

#[test]
fn addresses_and_endpoints_in_the_pools_are_left_out() {
    let mut claim = with_addresses(plain("a", &[1], &[]), &["10.42.7.7", "127.0.0.1", "192.0.2.1"]);
    claim.announcement.endpoints =
        vec!["10.42.7.7:51820".parse().unwrap(), "192.0.2.1:51820".parse().unwrap()];
    let result = cold(&[claim]);
    assert_eq!(result.admitted[0].addresses, [addr("192.0.2.1")]);
    assert_eq!(result.admitted[0].endpoints, ["192.0.2.1:51820".parse().unwrap()]);
    assert_eq!(
        reasons(&result.notices),
        [("a", reason::ADDRESS_IN_POOL), ("a", reason::ADDRESS_IN_POOL), ("a", reason::INVALID_ADDRESS)]
    );
}

#[test]
fn several_claims_under_one_name_leave_only_the_remembered_one() {
    let memory = cold(&[plain("a", &[1], &[])]);
    let result = decide(&[plain("a", &[2], &[]), plain("a", &[1], &[])], &memory);
    assert_eq!(result.admitted[0].keys[0].public_key, key(1));
    assert_eq!(reasons(&result.refused), [("a", reason::NAME_TAKEN)]);
    let result = cold(&[plain("a", &[2], &[]), plain("a", &[1], &[])]);
    assert!(names(&result).is_empty());
    assert_eq!(result.refused.len(), 2);
}

#[test]
fn host_bits_in_an_authoritys_prefix_are_masked() {
    let mut claim =
        Claim { announcement: announcement("a", &[1], &[]), authority: Authority::default(), signer: None };
    claim.authority.pod_cidrs = nets(&["10.42.1.7/24", "10.42.1.0/25"]);
    assert_eq!(cold(&[claim]).admitted[0].pod_cidrs, [net("10.42.1.0/24")]);
}

fn signer(byte: u8) -> AnnouncementKey {
    SigningKey::derive(&PrivateKey::from_bytes(&[byte; 32])).unwrap().public()
}

/// Node `name` of this UID, with a WireGuard key, its announcement signed by `by`.
fn signed(name: &str, uid: &str, key: u8, by: Option<u8>) -> Claim {
    Claim { signer: by.map(signer), ..with_uid(plain(name, &[key], &[]), uid) }
}

fn on_first_use(claims: &[Claim], memory: &Admission, trusted: &[(&str, u8)]) -> Admission {
    let trusted = trusted.iter().map(|(name, by)| ((*name).to_owned(), signer(*by))).collect();
    let cluster = Cluster::default();
    admit(claims, &memory.incumbents, &Rules { first_use: Some(&trusted), ..cluster.rules() })
}

#[test]
fn on_first_use_the_first_signer_of_a_node_is_believed_and_no_other() {
    let first =
        on_first_use(&[signed("a", "u", 1, Some(1)), signed("b", "v", 2, None)], &Admission::default(), &[]);
    assert_eq!(names(&first), ["a"]);
    assert_eq!(reasons(&first.refused), [("b", reason::UNSIGNED)]);
    // It may say something new, under the same key only; what it holds stays its own.
    let same = on_first_use(&[signed("a", "u", 3, Some(1))], &first, &[]);
    assert_eq!(same.admitted[0].keys[0].public_key, key(3));
    for (by, why) in [(Some(2), reason::KEY_CHANGED), (None, reason::UNSIGNED)] {
        let other = on_first_use(&[signed("a", "u", 4, by), signed("c", "w", 1, Some(9))], &first, &[]);
        assert_eq!(reasons(&other.refused), [("a", why), ("c", reason::DUPLICATE_KEY)]);
        assert_eq!(other.incumbents.0["a"], first.incumbents.0["a"]);
    }
}

#[test]
fn another_signer_is_believed_once_somebody_says_so_and_from_then_on() {
    let first = on_first_use(&[signed("a", "u", 1, Some(1))], &Admission::default(), &[]);
    let claim = [signed("a", "u", 1, Some(2))];
    assert!(on_first_use(&claim, &first, &[("a", 3), ("b", 2)]).admitted.is_empty());
    let trusted = on_first_use(&claim, &first, &[("a", 2)]);
    assert_eq!(names(&trusted), ["a"]);
    assert_eq!(names(&on_first_use(&claim, &trusted, &[])), ["a"], "it is pinned now");
    assert!(on_first_use(&[signed("a", "u", 1, Some(1))], &trusted, &[]).admitted.is_empty());
}

#[test]
fn a_rebuilt_node_is_seen_for_the_first_time() {
    let first = on_first_use(&[signed("a", "u", 1, Some(1))], &Admission::default(), &[]);
    assert_eq!(names(&on_first_use(&[signed("a", "u2", 1, Some(2))], &first, &[])), ["a"]);
}

#[test]
fn pins_are_kept_where_the_api_server_sees_to_it_and_do_not_count_there() {
    let first = on_first_use(&[signed("a", "u", 1, Some(1))], &Admission::default(), &[]);
    let other = decide(&[signed("a", "u", 1, None)], &first);
    assert_eq!(names(&other), ["a"]);
    assert!(on_first_use(&[signed("a", "u", 1, Some(2))], &other, &[]).admitted.is_empty());
}
