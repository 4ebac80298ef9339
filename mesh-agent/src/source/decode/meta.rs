//! Metadata common to all objects: names, labels, annotations.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::problem::Problems;
use crate::names;
use crate::snapshot::Labels;

/// The prefix of annotations that are ours.
pub const ANNOTATION_PREFIX: &str = "margay.io/";

/// Longest annotations in total, bytes (`TotalAnnotationSizeLimitB` of Kubernetes).
const MAX_ANNOTATIONS: usize = 256 * 1024;

/// Checks names, labels and annotations as the API server does.
pub fn check(meta: &ObjectMeta, problems: &mut Problems) {
    check_labels(meta.labels.as_ref(), "metadata.labels", problems);
    let mut total = 0;
    for (key, value) in meta.annotations.iter().flatten() {
        total += key.len() + value.len();
        // The API server checks annotation keys in lower case.
        if !names::is_qualified_name(&key.to_lowercase()) {
            problems.invalid(format!("metadata.annotations[{key}]"), "the key is not a qualified name");
        }
    }
    if total > MAX_ANNOTATIONS {
        problems.invalid("metadata.annotations", format!("{total} bytes, at most {MAX_ANNOTATIONS} may be"));
    }
}

/// Checks a map of labels; `field` is where it stands.
pub fn check_labels(labels: Option<&Labels>, field: &str, problems: &mut Problems) {
    for (key, value) in labels.into_iter().flatten() {
        if !names::is_qualified_name(key) {
            problems.invalid(format!("{field}[{key}]"), "the key is not a qualified name");
        }
        if !names::is_label_value(value) {
            problems.invalid(format!("{field}[{key}]"), format!("{value:?} is not a label value"));
        }
    }
}

/// The annotations that are ours.
pub fn own_annotations(meta: &ObjectMeta) -> Labels {
    meta.annotations
        .iter()
        .flatten()
        .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// The UID, where there is one that says something.
pub fn uid(meta: &ObjectMeta) -> Option<String> {
    meta.uid.clone().filter(|uid| !uid.is_empty())
}
