//! Bad manifests, each with what the agent says of it; and that no text at all brings the reader down.
//!
//! `tests/manifests/*.yaml` open with comments: `#! Object | field | reason` for each issue expected, and
//! `#! closed namespace/name` for a policy that must be there, allowing nothing it should not.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use mesh_agent::snapshot::{Cluster, ObjectRef};
use mesh_agent::source::assemble::{Entry, assemble};
use mesh_agent::source::directory::file::FileObjects;
use proptest::prelude::*;
use zeroize::Zeroizing;

fn read(place: &str, text: &[u8]) -> Cluster {
    let json = place.ends_with(".json");
    let objects = FileObjects::parse(&FileObjects::default(), json, Zeroizing::new(text.to_vec()));
    assemble(&[Entry { place, objects: &objects }], "a").0
}

fn files(below: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(below)];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "json") {
            found.push(path);
        }
    }
    found.sort();
    assert!(!found.is_empty(), "nothing in {below}");
    found
}

#[test]
fn every_bad_manifest_gets_its_issue_and_fails_closed() {
    for path in files("tests/manifests") {
        let name = path.file_name().unwrap().to_str().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let cluster = read(name, text.as_bytes());
        let wanted: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("#! ")).collect();
        let mut expected: Vec<String> = Vec::new();
        for line in wanted {
            match line.strip_prefix("closed ") {
                Some(reference) => assert_closed(&cluster, reference, name),
                None => expected.push(line.trim().to_owned()),
            }
        }
        let mut told: Vec<String> = cluster
            .issues
            .iter()
            // "Refused" sums up the field's own issue.
            .filter(|issue| issue.reason != "Refused")
            .map(|issue| format!("{} | {} | {}", issue.object, issue.field, issue.reason))
            .collect();
        expected.sort();
        told.sort();
        assert_eq!(told, expected, "{name}: {:#?}", cluster.issues);
        for issue in &cluster.issues {
            assert!(issue.object.contains(name) || issue.message.starts_with(name), "no file in {issue:?}");
        }
    }
}

/// There, and invalid as a whole or in a rule.
fn assert_closed(cluster: &Cluster, reference: &str, file: &str) {
    let (namespace, name) = reference.trim().split_once('/').unwrap();
    let key = ObjectRef { namespace: namespace.into(), name: name.into() };
    let policy = cluster.policies.get(&key).unwrap_or_else(|| panic!("{file}: no policy {key}"));
    let rules = policy.ingress.iter().chain(&policy.egress).flatten();
    let broken = rules.filter(|rule| rule.invalid.is_some()).count();
    assert!(policy.invalid.is_some() || broken > 0, "{file}: {policy:?}");
    assert!(policy.ingress.is_some() || policy.egress.is_some(), "{file}: isolates nothing");
}

#[test]
fn the_samples_have_nothing_wrong() {
    for path in files("../manifests/samples") {
        let name = path.file_name().unwrap().to_str().unwrap();
        let cluster = read(name, &fs::read(&path).unwrap());
        assert_eq!(cluster.issues, [], "{}", path.display());
        assert!(cluster != Cluster::default(), "{} holds nothing", path.display());
    }
}

/// Text that looks enough like a manifest to get far.
fn fragments() -> impl Strategy<Value = String> {
    let line = prop_oneof![
        Just("apiVersion: v1".to_owned()),
        Just("apiVersion: networking.k8s.io/v1".to_owned()),
        Just("apiVersion: margay.io/v1alpha1".to_owned()),
        Just("kind: Pod".to_owned()),
        Just("kind: Node".to_owned()),
        Just("kind: NetworkPolicy".to_owned()),
        Just("kind: MeshConfiguration".to_owned()),
        Just("kind: List".to_owned()),
        Just("metadata: {name: default, namespace: n, labels: {a: b}}".to_owned()),
        Just(
            "spec: {podCIDRs: [10.0.0.0/8], podSelector: {}, ingress: [{from: [{}]}], pools: [{cidr: x}]}"
                .to_owned()
        ),
        Just("status: {podIPs: [{ip: 1.2.3.4}], addresses: [{type: InternalIP, address: x}]}".to_owned()),
        Just("items: [&a {kind: Pod, apiVersion: v1, metadata: {name: p}}, *a, *a]".to_owned()),
        Just("---".to_owned()),
        Just("...".to_owned()),
        "[ \\-a-z&*:{}\\[\\]|>'\"#!%,0-9]{0,30}",
    ];
    proptest::collection::vec(line, 0..12).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_bring_the_reader_down(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        read("x.yaml", &bytes);
        read("x.json", &bytes);
    }

    #[test]
    fn no_manifest_like_text_brings_the_reader_down(text in fragments()) {
        read("x.yaml", text.as_bytes());
        read("nodes/a.margay.yaml", text.as_bytes());
    }

    #[test]
    fn a_file_cut_short_anywhere_loses_no_object_to_a_broken_end(cut in 0usize..400) {
        let document = |name: &str| format!("apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nspec:\n  podCIDRs: [10.0.0.0/24]\n");
        let whole = format!("{}---\n{}---\n{}", document("a"), document("b"), document("c"));
        let before = FileObjects::parse(&FileObjects::default(), false, Zeroizing::new(whole.clone().into_bytes()));
        let cut = cut.min(whole.len());
        let after = FileObjects::parse(&before, false, Zeroizing::new(whole.as_bytes()[..cut].to_vec()));
        let complete = after.problems.is_empty();
        prop_assert!(complete || after.objects.iter().filter(|o| o.object.is_some()).count() >= 3);
    }
}

#[test]
fn bombs_are_refused_quickly() {
    let mut aliases = String::from("apiVersion: v1\nkind: Pod\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for level in 1..30 {
        let below = format!("*a{},", level - 1).repeat(10);
        aliases.push_str(&format!("a{level}: &a{level} [{below}]\n"));
    }
    let deep = format!("apiVersion: v1\nkind: Pod\nspec: {}", "[".repeat(200_000));
    let deep_json = format!("{{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"spec\":{}", "[".repeat(200_000));
    for (place, text) in [("x.yaml", aliases), ("x.yaml", deep), ("x.json", deep_json)] {
        let cluster = read(place, text.as_bytes());
        assert!(cluster.issues.iter().any(|issue| issue.reason == "Unparsable"), "{:?}", cluster.issues);
    }
}

#[test]
fn a_list_in_place_of_an_object_is_told() {
    // serde reads a struct from a list of its fields, too.
    let cluster = read("x.json", br#"["networking.k8s.io/v1beta1", "NetworkPolicy"]"#);
    assert!(cluster.issues.iter().any(|issue| issue.reason == "UnknownVersion"), "{:?}", cluster.issues);
    assert!(read("x.json", br#"["v1", "Pod"]"#).pods.is_empty());
}

#[test]
fn nothing_of_a_secret_is_in_any_issue() {
    let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {password: hunter2}\n---\n\
                apiVersion: v1\nkind: Secret\nstringData: {password: hunter2, b: [\n";
    let cluster = read("s.yaml", text.as_bytes());
    assert_eq!(cluster.issues.len(), 1);
    assert!(!format!("{cluster:?}").contains("hunter2"), "{:?}", cluster.issues);
}
