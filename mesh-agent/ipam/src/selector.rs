//! Kubernetes' label selectors: which nodes and namespaces a pool is for.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Labels of a node or namespace.
pub type Labels = BTreeMap<String, String>;

/// Longest name part of a key, and longest value.
const LONGEST: usize = 63;
/// Longest DNS subdomain before a key's `/`.
const LONGEST_PREFIX: usize = 253;

/// A label selector. All of it must hold; the empty one selects everything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels with exactly these values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: Labels,
    /// Requirements on single labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
}

/// A requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// How it relates to the values.
    pub operator: Operator,
    /// For `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a label relates to values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub enum Operator {
    /// The label is there, with one of the values.
    In,
    /// The label is not there, or has another value.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether it selects what has these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|requirement| requirement.holds(labels))
    }

    /// What the API server would refuse in a selector found at `field`: (field, message).
    pub fn check(&self, field: &str) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        for (key, value) in &self.match_labels {
            let field = format!("{field}.matchLabels");
            if !is_key(key) {
                wrong.push((field.clone(), format!("{key:?} is not a qualified name")));
            }
            if !is_value(value) {
                wrong.push((field, format!("{value:?} is not a label value")));
            }
        }
        for (index, requirement) in self.match_expressions.iter().enumerate() {
            let field = format!("{field}.matchExpressions[{index}]");
            if !is_key(&requirement.key) {
                let message = format!("{:?} is not a qualified name", requirement.key);
                wrong.push((format!("{field}.key"), message));
            }
            let listed = matches!(requirement.operator, Operator::In | Operator::NotIn);
            let field = format!("{field}.values");
            if listed && requirement.values.is_empty() {
                wrong.push((field.clone(), format!("{:?} needs a value", requirement.operator)));
            }
            if !listed && !requirement.values.is_empty() {
                wrong.push((field.clone(), format!("{:?} takes no values", requirement.operator)));
            }
            for value in requirement.values.iter().filter(|value| !is_value(value)) {
                wrong.push((field.clone(), format!("{value:?} is not a label value")));
            }
        }
        wrong
    }
}

impl Requirement {
    fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

fn is_key(text: &str) -> bool {
    let name = match text.split_once('/') {
        Some((prefix, name)) if is_subdomain(prefix) => name,
        Some(_) => return false,
        None => text,
    };
    !name.is_empty() && is_value(name)
}

fn is_value(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let edge = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= LONGEST && bytes.iter().all(|b| inner(*b)) && edge(bytes.first()) && edge(bytes.last())
}

/// A DNS subdomain (RFC 1123): what objects are named by.
pub(crate) fn is_subdomain(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.iter().all(|b| inner(*b)) && edge(bytes.first()) && edge(bytes.last())
    };
    text.len() <= LONGEST_PREFIX && text.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(json: &str) -> LabelSelector {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn each_operator_means_what_kubernetes_says() {
        let labels: Labels = [("zone".to_owned(), "a".to_owned())].into();
        let expression = |operator: &str, values: &str| {
            selector(&format!(
                r#"{{"matchExpressions":[{{"key":"zone","operator":"{operator}","values":{values}}}]}}"#
            ))
        };
        for (operator, values, with, without) in [
            ("In", r#"["a","b"]"#, true, false),
            ("In", r#"["b"]"#, false, false),
            ("NotIn", r#"["a"]"#, false, true),
            ("NotIn", r#"["b"]"#, true, true),
            ("Exists", "[]", true, false),
            ("DoesNotExist", "[]", false, true),
        ] {
            let selector = expression(operator, values);
            assert_eq!(selector.matches(&labels), with, "{operator} {values}");
            assert_eq!(selector.matches(&Labels::new()), without, "{operator} {values} without the label");
            assert!(selector.check("s").is_empty());
        }
        assert!(LabelSelector::default().matches(&Labels::new()));
        assert!(!selector(r#"{"matchLabels":{"zone":"b"}}"#).matches(&labels));
    }

    #[test]
    fn what_the_api_server_refuses_is_named() {
        let bad = selector(
            r#"{"matchLabels":{"-":"x","ok":"not ok"},"matchExpressions":[
                {"key":"k","operator":"In"},{"key":"k","operator":"Exists","values":["v"]},
                {"key":"X/","operator":"In","values":["_"]}]}"#,
        );
        let fields: Vec<String> = bad.check("spec.s").into_iter().map(|(field, _)| field).collect();
        assert_eq!(
            fields,
            [
                "spec.s.matchLabels",
                "spec.s.matchLabels",
                "spec.s.matchExpressions[0].values",
                "spec.s.matchExpressions[1].values",
                "spec.s.matchExpressions[2].key",
                "spec.s.matchExpressions[2].values",
            ]
        );
    }
}
