//! Label selectors, with the meaning of apimachinery's `labels.Requirement`.

use crate::model::{LabelSelector, Labels, Operator, Requirement};

impl LabelSelector {
    /// Whether the selector matches these labels. The empty selector matches everything.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|requirement| requirement.matches(labels))
    }
}

impl Requirement {
    /// Whether the requirement holds. `NotIn` and `DoesNotExist` hold for an absent key, `In` and `Exists` do not.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn requirement(operator: Operator, values: &[&str]) -> Requirement {
        Requirement { key: "app".into(), operator, values: values.iter().map(|v| v.to_string()).collect() }
    }

    #[test]
    fn the_empty_selector_matches_everything() {
        assert!(LabelSelector::default().matches(&labels(&[])));
        assert!(LabelSelector::default().matches(&labels(&[("a", "b")])));
    }

    #[test]
    fn the_empty_string_is_a_value_and_not_an_absent_key() {
        let selector = LabelSelector { match_labels: labels(&[("app", "")]), ..Default::default() };
        assert!(selector.matches(&labels(&[("app", "")])));
        assert!(!selector.matches(&labels(&[])));
        assert!(requirement(Operator::In, &[""]).matches(&labels(&[("app", "")])));
        assert!(!requirement(Operator::In, &[""]).matches(&labels(&[])));
    }

    #[test]
    fn negative_operators_match_an_absent_key() {
        let none = labels(&[]);
        assert!(requirement(Operator::NotIn, &["web"]).matches(&none));
        assert!(requirement(Operator::DoesNotExist, &[]).matches(&none));
        assert!(!requirement(Operator::In, &["web"]).matches(&none));
        assert!(!requirement(Operator::Exists, &[]).matches(&none));
    }

    #[test]
    fn operators_compare_the_value() {
        let web = labels(&[("app", "web")]);
        assert!(requirement(Operator::In, &["db", "web"]).matches(&web));
        assert!(!requirement(Operator::NotIn, &["db", "web"]).matches(&web));
        assert!(requirement(Operator::NotIn, &["db"]).matches(&web));
        assert!(requirement(Operator::Exists, &[]).matches(&web));
        assert!(!requirement(Operator::DoesNotExist, &[]).matches(&web));
    }

    #[test]
    fn labels_and_expressions_must_both_match() {
        let selector = LabelSelector {
            match_labels: labels(&[("tier", "front")]),
            match_expressions: vec![requirement(Operator::In, &["web"])],
        };
        assert!(selector.matches(&labels(&[("tier", "front"), ("app", "web")])));
        assert!(!selector.matches(&labels(&[("tier", "front")])));
        assert!(!selector.matches(&labels(&[("app", "web")])));
    }
}
