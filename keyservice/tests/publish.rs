//! Announcing: in a manifest directory, and over a bus that is as bad as asked for.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use common::announcement;
use keyservice::Announcement;
use keyservice::publish::directory::DirectoryPublisher;
use keyservice::publish::memory::{Impairment, MemoryBus};
use keyservice::publish::{Publish, PublishError, Published};
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::Value;

fn node(path: &Path) -> Value {
    serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn read_back(path: &Path) -> Announcement {
    let annotations: BTreeMap<String, String> =
        serde_json::from_value(node(path)["metadata"]["annotations"].clone()).unwrap();
    Announcement::from_annotations(node(path)["metadata"]["name"].as_str().unwrap(), &annotations)
        .unwrap()
        .unwrap()
}

fn manifests() -> (tempfile::TempDir, DirectoryPublisher) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = DirectoryPublisher::new(dir.path().join("manifests"));
    (dir, publisher)
}

#[test]
fn an_announcement_is_a_node_manifest_written_only_when_it_changes() {
    let (_dir, mut publisher) = manifests();
    let one = announcement("host-1.example", &[1], &["10.42.1.0/24"]);
    let path = publisher.path(&one.name).unwrap();
    assert!(path.ends_with("manifests/nodes/host-1.example.margay.yaml"));
    assert_eq!(publisher.publish(&one).unwrap(), Published::Changed);
    assert_eq!(read_back(&path), one);
    assert_eq!(
        (node(&path)["apiVersion"].as_str(), node(&path)["kind"].as_str()),
        (Some("v1"), Some("Node"))
    );
    let before = fs::metadata(&path).unwrap();
    assert_eq!(before.mode() & 0o7777, 0o644);
    assert_eq!(publisher.publish(&one).unwrap(), Published::Unchanged);
    assert_eq!(fs::metadata(&path).unwrap().ino(), before.ino());
    let two = announcement("host-1.example", &[2, 1], &[]);
    assert_eq!(publisher.publish(&two).unwrap(), Published::Changed);
    assert_eq!(read_back(&path), two);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn what_others_put_into_the_file_stays() {
    let (_dir, mut publisher) = manifests();
    let path = publisher.path("a").unwrap();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let text = "apiVersion: v1\nkind: Node\nmetadata:\n  name: a\n  labels: {zone: \"1\"}\n  annotations:\n    note: \"yes\"\n    margay.io/keys: old\nspec:\n  podCIDRs: [10.42.1.0/24]\n";
    fs::write(&path, text).unwrap();
    let one = announcement("a", &[1], &[]);
    assert_eq!(publisher.publish(&one).unwrap(), Published::Changed);
    assert_eq!(read_back(&path), one);
    assert_eq!(publisher.withdraw("a").unwrap(), Published::Changed);
    let mut expected: Value = serde_saphyr::from_str(text).unwrap();
    expected["metadata"]["annotations"] = serde_json::json!({ "note": "yes" });
    assert_eq!(node(&path), expected);
    assert_eq!(publisher.withdraw("a").unwrap(), Published::Unchanged);
}

#[test]
fn withdrawing_removes_a_file_that_says_nothing_else() {
    let (_dir, mut publisher) = manifests();
    assert_eq!(publisher.withdraw("a").unwrap(), Published::Unchanged);
    publisher.publish(&announcement("a", &[1], &[])).unwrap();
    publisher.publish(&announcement("b", &[2], &[])).unwrap();
    assert_eq!(publisher.withdraw("a").unwrap(), Published::Changed);
    assert!(!publisher.path("a").unwrap().exists() && publisher.path("b").unwrap().exists());
}

#[test]
fn names_that_are_not_node_names_are_refused() {
    let (dir, mut publisher) = manifests();
    let long = "a".repeat(254);
    for name in [
        "", ".", "..", "../a", "a/b", "/a", "A", "-a", "a-", "a..b", ".a", "a.", "a_b", "a\0", "é", "a b",
        "a\n", &long,
    ] {
        let bad = announcement(name, &[1], &[]);
        assert!(matches!(publisher.publish(&bad), Err(PublishError::Name(_))), "{name:?}");
        assert!(matches!(publisher.withdraw(name), Err(PublishError::Name(_))), "{name:?}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_no_reader_would_accept_is_not_written() {
    let (_dir, mut publisher) = manifests();
    let error = publisher.publish(&announcement("a", &[], &[])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "announcement of node a: annotation margay.io/keys: has 0 keys, not 1 to 2"
    );
    assert!(!publisher.path("a").unwrap().exists());
}

#[test]
fn a_file_that_is_not_this_node_is_named_and_left_alone() {
    let (_dir, mut publisher) = manifests();
    let path = publisher.path("a").unwrap();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    for (text, field) in [
        ("", "apiVersion is no string"),
        ("a: [", ""),
        ("[]", "apiVersion is no string"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n", "kind is \"Pod\", not \"Node\""),
        ("apiVersion: v1\nkind: Node\nmetadata: {name: b}\n", "metadata.name is \"b\", not \"a\""),
        (
            "apiVersion: v1\nkind: Node\nmetadata: {name: a, annotations: [x]}\n",
            "metadata.annotations is not a mapping",
        ),
        (
            "apiVersion: v1\nkind: Node\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: b}\n",
            "",
        ),
    ] {
        fs::write(&path, text).unwrap();
        let error = publisher.publish(&announcement("a", &[1], &[])).unwrap_err();
        assert!(matches!(error, PublishError::Content { .. }), "{text:?}: {error}");
        assert!(
            error.to_string().contains(field) && error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    fs::remove_file(&path).unwrap();
    symlink("/dev/null", &path).unwrap();
    let error = publisher.publish(&announcement("a", &[1], &[])).unwrap_err().to_string();
    assert!(error.contains("symbolic link"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_foreign_annotation_survives(key in "[a-z]{1,8}/[a-z]{1,8}", value in "\\PC{0,120}|[ -~\n\t]{0,40}|(yes|no|null|~|0x1|1e3|2001-01-01|- a|a: b|#)") {
        let (_dir, mut publisher) = manifests();
        let one = announcement("a", &[1], &[]);
        let path = publisher.path("a").unwrap();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = serde_json::json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "a", "annotations": { &key: &value } } });
        fs::write(&path, text.to_string()).unwrap();
        publisher.publish(&one).unwrap();
        let kept = node(&path)["metadata"]["annotations"][&key].clone();
        prop_assert_eq!(kept, Value::String(value));
        prop_assert_eq!(read_back(&path), one.clone());
        prop_assert_eq!(publisher.publish(&one).unwrap(), Published::Unchanged);
    }
}

fn bus(impairment: Impairment) -> MemoryBus {
    let bus = MemoryBus::new(impairment, StdRng::seed_from_u64(7));
    bus.join("x");
    bus.join("y");
    bus
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn the_bus_delivers_after_the_delay_and_to_late_joiners() {
    let mut bus = bus(Impairment { delay: 5 * MS..=5 * MS, ..Impairment::default() });
    let one = announcement("a", &[1], &[]);
    assert_eq!(bus.publish(&one).unwrap(), Published::Changed);
    assert_eq!(bus.publish(&one).unwrap(), Published::Unchanged);
    bus.advance(4 * MS);
    assert!(bus.view("x").is_empty() && bus.in_flight() == 2);
    bus.advance(5 * MS);
    assert_eq!(bus.view("x")["a"], one.to_annotations());
    assert_eq!(bus.view("x"), bus.view("y"));
    bus.join("z");
    bus.advance(10 * MS);
    assert_eq!(bus.view("z"), bus.view("x"));
    bus.withdraw("a").unwrap();
    bus.advance(15 * MS);
    assert!(bus.view("x").is_empty());
}

#[test]
fn the_bus_loses_what_it_is_told_to_and_a_resend_heals_it() {
    let mut bus = bus(Impairment { loss: 1.0, ..Impairment::default() });
    bus.publish(&announcement("a", &[1], &[])).unwrap();
    bus.advance(MS);
    assert!(bus.view("x").is_empty() && bus.in_flight() == 0);
    bus.impair(Impairment::default());
    bus.resend();
    bus.advance(MS);
    assert!(bus.view("x").contains_key("a"));
}

#[test]
fn the_bus_reorders_only_when_told_to() {
    let stale = |reorder| {
        let mut bus = bus(Impairment { delay: Duration::ZERO..=100 * MS, reorder, ..Impairment::default() });
        let mut stale = 0;
        for round in 0..100u8 {
            bus.publish(&announcement("a", &[2 * round + 1], &[])).unwrap();
            let last = announcement("a", &[2 * round + 2], &[]);
            bus.publish(&last).unwrap();
            bus.advance(MS * 1000 * (u32::from(round) + 1));
            stale += usize::from(bus.view("x")["a"] != last.to_annotations());
        }
        stale
    };
    assert_eq!(stale(false), 0);
    assert!((20..80).contains(&stale(true)), "{}", stale(true));
}
