//! Namespace.

use k8s_openapi::api::core::v1;

use super::meta;
use super::problem::Problems;
use crate::names;
use crate::snapshot::Labels;

/// The label the API server puts on every namespace.
pub const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// The labels a namespace has without anybody's doing.
pub fn implied_labels(name: &str) -> Labels {
    Labels::from([(NAME_LABEL.to_owned(), name.to_owned())])
}

/// A Namespace's labels, with the one that always tells its name.
pub fn decode(namespace: &v1::Namespace, problems: &mut Problems) -> Labels {
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    if !names::is_dns_label(name) {
        problems.invalid("metadata.name", format!("{name:?} is not a DNS-1123 label"));
    }
    meta::check(&namespace.metadata, problems);
    let mut labels = namespace.metadata.labels.clone().unwrap_or_default();
    labels.extend(implied_labels(name));
    labels
}
