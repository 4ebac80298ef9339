//! Announcements as annotations: what is written is read back, and nothing else is believed.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use common::{announcement, key};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use keyservice::announcement::{
    ANNOTATION_CAPABILITIES, ANNOTATION_ENDPOINTS, ANNOTATION_KEYS, ANNOTATION_POD_CIDRS,
    ANNOTATION_SIGNATURE, ANNOTATION_VERSION, ANNOTATIONS, MAX_VALUE_LEN,
};
use keyservice::{Announcement, KeyClaim};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

type Annotations = BTreeMap<String, String>;

fn good() -> Annotations {
    announcement("a", &[1, 2], &["10.42.1.0/24", "fd42::/64"]).to_annotations()
}

fn read(annotations: &Annotations) -> Result<Option<Announcement>, keyservice::AnnouncementError> {
    Announcement::from_annotations("a", annotations)
}

/// Reads the good annotations with one changed; the error must name it.
fn error(annotation: &str, value: &str) -> String {
    let mut annotations = good();
    annotations.insert(annotation.to_owned(), value.to_owned());
    let error = read(&annotations).expect_err(value);
    assert_eq!(error.annotation, annotation, "{value}");
    assert!(
        error.to_string().starts_with(&format!("annotation {annotation}: ")) && error.problem.len() < 400
    );
    error.problem
}

#[test]
fn the_format_is_this() {
    let annotations = good();
    let text = |key: &str| annotations[key].as_str();
    assert_eq!(text("margay.io/announcement-version"), "1");
    let (one, two) = (key(1), key(2));
    assert_eq!(
        text("margay.io/keys"),
        format!(
            r#"[{{"publicKey":"{one}","port":51820,"epoch":10}},{{"publicKey":"{two}","port":51821,"epoch":9}}]"#
        )
    );
    assert_eq!(text("margay.io/endpoints"), "192.0.2.1:51820");
    assert_eq!(text("margay.io/capabilities"), "wireguard");
    assert_eq!(text("margay.io/pod-cidrs"), "10.42.1.0/24,fd42::/64");
}

#[test]
fn every_annotation_is_written_even_when_empty() {
    let mut bare = announcement("a", &[1], &[]);
    bare.endpoints.clear();
    bare.capabilities.clear();
    let annotations = bare.to_annotations();
    // But the signature, which there may be none of.
    let written = ANNOTATIONS.into_iter().filter(|key| *key != ANNOTATION_SIGNATURE);
    assert!(annotations.keys().map(String::as_str).eq(written.collect::<BTreeSet<_>>()));
    assert_eq!(read(&annotations).unwrap(), Some(bare));
}

#[test]
fn a_node_without_our_annotations_announces_nothing() {
    assert_eq!(read(&Annotations::new()).unwrap(), None);
    let foreign =
        Annotations::from([("margay.io/note".to_owned(), "x".to_owned()), ("a".to_owned(), "b".to_owned())]);
    assert_eq!(read(&foreign).unwrap(), None);
}

#[test]
fn a_missing_annotation_is_named() {
    for missing in ANNOTATIONS.into_iter().filter(|key| *key != ANNOTATION_SIGNATURE) {
        let mut annotations = good();
        annotations.remove(missing);
        let error = read(&annotations).unwrap_err();
        assert_eq!(error.annotation, missing);
        assert!(error.problem.contains("missing"));
    }
}

#[test]
fn unknown_versions_are_refused_before_anything_else_is_read() {
    for version in ["2", "0", "", "01", "+1", " 1", "1.0", "one", "99999999999999999999"] {
        let mut annotations = good();
        annotations.insert(ANNOTATION_KEYS.to_owned(), "from the future".to_owned());
        annotations.insert(ANNOTATION_VERSION.to_owned(), version.to_owned());
        assert_eq!(read(&annotations).unwrap_err().annotation, ANNOTATION_VERSION, "{version}");
    }
}

#[test]
fn bad_keys_are_refused() {
    let claim = |n: u8, port: u16, epoch: u64| {
        format!(r#"{{"publicKey":"{}","port":{port},"epoch":{epoch}}}"#, key(n))
    };
    let list = |claims: &[String]| format!("[{}]", claims.join(","));
    assert!(error(ANNOTATION_KEYS, "[]").contains("0 keys"));
    assert!(
        error(ANNOTATION_KEYS, &list(&[claim(1, 1, 3), claim(2, 2, 2), claim(3, 3, 1)])).contains("3 keys")
    );
    assert!(error(ANNOTATION_KEYS, &list(&[claim(1, 1, 2), claim(1, 2, 1)])).contains("twice"));
    assert!(error(ANNOTATION_KEYS, &list(&[claim(1, 1, 1), claim(2, 2, 1)])).contains("epoch 1"));
    assert!(error(ANNOTATION_KEYS, &list(&[claim(1, 7, 2), claim(2, 7, 1)])).contains("port 7"));
    assert!(error(ANNOTATION_KEYS, &list(&[claim(1, 0, 1)])).contains("port 0"));
    for text in [
        "",
        "{}",
        "null",
        "[1]",
        "[{}]",
        r#"[{"publicKey":"AAAA","port":1,"epoch":1}]"#,
        r#"[{"publicKey":"x","port":1,"epoch":1}]"#,
        r#"[{"publicKey":1,"port":1,"epoch":1}]"#,
        &list(&[claim(1, 1, 1).replace("\"port\":1", "\"port\":65536")]),
        &list(&[claim(1, 1, 1).replace("\"epoch\":1", "\"epoch\":-1")]),
        &list(&[claim(1, 1, 1).replace("\"epoch\":1", "\"epoch\":1,\"x\":1")]),
        &list(&[claim(1, 1, 1).replace("\"epoch\":1", "\"epoch\":1,\"epoch\":1")]),
        &"[".repeat(10_000),
    ] {
        error(ANNOTATION_KEYS, text);
    }
}

#[test]
fn keys_in_another_order_are_sorted() {
    let mut annotations = good();
    let mut keys: Vec<KeyClaim> = serde_json::from_str(&annotations[ANNOTATION_KEYS]).unwrap();
    keys.reverse();
    annotations.insert(ANNOTATION_KEYS.to_owned(), serde_json::to_string(&keys).unwrap());
    assert_eq!(read(&annotations).unwrap(), read(&good()).unwrap());
}

#[test]
fn endpoints_no_other_host_can_send_to_are_refused() {
    for endpoint in [
        "0.0.0.0:1",
        "[::]:1",
        "224.0.0.1:1",
        "255.255.255.255:1",
        "[ff02::1]:1",
        "127.0.0.1:1",
        "[::1]:1",
        "[::ffff:192.0.2.1]:1",
        "[fe80::1]:1",
        "[fe80::1%2]:1",
        "[2001:db8::1%2]:1",
        "192.0.2.1:0",
        "[2001:db8::1]:0",
    ] {
        assert!(
            error(ANNOTATION_ENDPOINTS, endpoint).contains(endpoint.trim_end_matches("%2]:1")),
            "{endpoint}"
        );
    }
}

#[test]
fn malformed_lists_are_refused() {
    for text in [
        ",",
        "192.0.2.1",
        "192.0.2.1:",
        "192.0.2.1:65536",
        "2001:db8::1:51820",
        "[2001:db8::1]",
        "host:1",
        " 192.0.2.1:1",
        "192.0.2.1:1,",
        "192.0.2.1:1,192.0.2.1:1",
        "192.0.2.1:1 192.0.2.2:1",
    ] {
        error(ANNOTATION_ENDPOINTS, text);
    }
    for text in ["a,,b", "a,a", "a b", "é", "a,\n", &"x".repeat(65)] {
        error(ANNOTATION_CAPABILITIES, text);
    }
    for text in [
        "10.42.1.0",
        "10.42.1.0/33",
        "10.42.1.0/-1",
        "fd42::/129",
        "10.42.1.0/24,10.42.1.0/24",
        "10.42.0.0/16,10.42.1.0/24",
        "x",
    ] {
        error(ANNOTATION_POD_CIDRS, text);
    }
    assert!(error(ANNOTATION_POD_CIDRS, "10.42.1.7/24").contains("10.42.1.0/24"));
}

#[test]
fn huge_values_are_refused() {
    let many = |text: &str, n: usize| vec![text; n].join(",");
    assert!(error(ANNOTATION_ENDPOINTS, &many("192.0.2.1:1", 17)).contains("17 entries"));
    assert!(error(ANNOTATION_POD_CIDRS, &many("10.42.1.0/24", 17)).contains("17 entries"));
    assert!(error(ANNOTATION_CAPABILITIES, &many("a", 65)).contains("65 entries"));
    for annotation in &ANNOTATIONS[..] {
        let problem = error(annotation, &"1".repeat(MAX_VALUE_LEN + 1));
        assert!(problem.contains("16385 bytes"), "{problem}");
    }
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    let ip = prop_oneof![
        any::<[u8; 4]>().prop_map(|b| IpAddr::from(Ipv4Addr::new(b[0] % 100 + 1, b[1], b[2], b[3]))),
        any::<u128>().prop_map(|bits| IpAddr::from(Ipv6Addr::from(bits >> 3 | 1 << 125))),
    ];
    (ip, 1u16..).prop_map(|(ip, port)| SocketAddr::new(ip, port))
}

fn prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<u32>(), 0..=32u8).prop_map(|(a, len)| IpNet::V4(Ipv4Net::new(a.into(), len).unwrap().trunc())),
        (any::<u128>(), 0..=128u8)
            .prop_map(|(a, len)| IpNet::V6(Ipv6Net::new(a.into(), len).unwrap().trunc())),
    ]
}

prop_compose! {
    fn any_announcement()(
        keys in vec(any::<[u8; 32]>(), 1..=2),
        ports in btree_set(1u16.., 2), epochs in btree_set(any::<u64>(), 2),
        endpoints in vec(endpoint(), 0..=16), prefixes in vec(prefix(), 0..=16),
        capabilities in btree_set("[!-+.-~]{1,64}", 0..=8),
    ) -> Announcement {
        let claims = keys.iter().zip(ports).zip(epochs.into_iter().rev());
        let unique = |all: Vec<SocketAddr>| all.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let mut pod_cidrs: Vec<IpNet> = Vec::new();
        for prefix in prefixes {
            if !pod_cidrs.iter().any(|p| p.contains(&prefix) || prefix.contains(p)) {
                pod_cidrs.push(prefix);
            }
        }
        Announcement {
            name: "a".to_owned(),
            keys: claims.map(|((key, port), epoch)| KeyClaim {
                public_key: keyservice::PublicKey::from_bytes(*key), port, epoch,
            }).collect(),
            endpoints: unique(endpoints), capabilities, pod_cidrs, signature: None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read_back(announcement in any_announcement()) {
        prop_assume!(announcement.keys.len() < 2 || announcement.keys[0].public_key != announcement.keys[1].public_key);
        prop_assert_eq!(read(&announcement.to_annotations()).unwrap(), Some(announcement));
    }

    #[test]
    fn any_text_is_read_or_refused(values in vec(proptest::option::weighted(0.9, "\\PC{0,80}|[0-9a-f:./,\\[\\]%]{0,60}"), 5), sound in vec(any::<bool>(), 5)) {
        let mut annotations = good();
        for ((key, value), sound) in ANNOTATIONS.iter().zip(values).zip(sound) {
            match value {
                _ if sound => None,
                Some(value) => annotations.insert((*key).to_owned(), value),
                None => annotations.remove(*key),
            };
        }
        if let Ok(Some(announcement)) = read(&annotations) {
            prop_assert_eq!(announcement.validate(), Ok(()));
            prop_assert_eq!(read(&announcement.to_annotations()).unwrap(), Some(announcement));
        }
    }
}
