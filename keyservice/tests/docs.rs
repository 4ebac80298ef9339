//! docs/announcements.md says what the code does.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use keyservice::Announcement;
use keyservice::admission::reason;
use keyservice::announcement::ANNOTATIONS;

const DOCS: &str = include_str!("../../docs/announcements.md");

#[test]
fn the_example_is_an_announcement() {
    let yaml = DOCS.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let node: serde_json::Value = serde_saphyr::from_str(yaml).unwrap();
    let annotations: BTreeMap<String, String> =
        serde_json::from_value(node["metadata"]["annotations"].clone()).unwrap();
    let read = Announcement::from_annotations("host-1", &annotations).unwrap().unwrap();
    assert_eq!(read.to_annotations(), annotations);
}

#[test]
fn every_annotation_and_reason_is_explained() {
    let reasons = [
        reason::NAME_TAKEN,
        reason::INVALID_KEYS,
        reason::LOW_ORDER_KEY,
        reason::DUPLICATE_KEY,
        reason::FOREIGN_PREFIX,
        reason::OVERLAPPING_PREFIX,
        reason::DUPLICATE_ADDRESS,
        reason::ADDRESS_IN_POOL,
        reason::INVALID_ADDRESS,
    ];
    for word in ANNOTATIONS.iter().chain(&reasons) {
        assert!(
            DOCS.lines().any(|line| line.starts_with("| ") && line.contains(&format!("`{word}`"))),
            "{word}"
        );
    }
}

/// The keys below `margay.io/` that a text names in single quotes, as CEL has them.
fn quoted(text: &str) -> BTreeSet<&str> {
    text.split('\'').filter(|word| word.starts_with("margay.io/")).collect()
}

#[test]
fn the_admission_policies_are_about_the_announcements_annotations() {
    for policy in [
        include_str!("../../manifests/base/admission/own-node.yaml"),
        include_str!("../../manifests/base/admission/announcements.yaml"),
    ] {
        assert_eq!(quoted(policy), ANNOTATIONS.into_iter().collect());
    }
    let documented = include_str!("../../docs/kubernetes.md");
    for annotation in ANNOTATIONS {
        assert!(documented.contains(&format!("| `{annotation}` | agent |")), "{annotation}");
    }
}
