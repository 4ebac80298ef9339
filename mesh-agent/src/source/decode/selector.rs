//! Label selectors.

use ebpf_policy::model::{self, Operator, Requirement};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::meta;
use super::problem::Problems;
use crate::names;

/// Converts a selector found at `field`; `None` when the API server would refuse it.
pub fn decode(
    selector: &LabelSelector,
    field: &str,
    problems: &mut Problems,
) -> Option<model::LabelSelector> {
    let before = problems.0.len();
    meta::check_labels(selector.match_labels.as_ref(), &format!("{field}.matchLabels"), problems);
    let mut match_expressions = Vec::new();
    for (index, expression) in selector.match_expressions.iter().flatten().enumerate() {
        let field = format!("{field}.matchExpressions[{index}]");
        if !names::is_qualified_name(&expression.key) {
            problems.invalid(format!("{field}.key"), format!("{:?} is not a qualified name", expression.key));
        }
        let values = expression.values.clone().unwrap_or_default();
        let operator = match expression.operator.as_str() {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => {
                problems.invalid(
                    format!("{field}.operator"),
                    format!("{other:?} is none of In, NotIn, Exists, DoesNotExist"),
                );
                continue;
            }
        };
        let listed = matches!(operator, Operator::In | Operator::NotIn);
        if listed && values.is_empty() {
            problems.invalid(format!("{field}.values"), format!("{} needs a value", expression.operator));
        }
        if !listed && !values.is_empty() {
            problems.invalid(format!("{field}.values"), format!("{} takes no values", expression.operator));
        }
        for value in values.iter().filter(|value| !names::is_label_value(value)) {
            problems.invalid(format!("{field}.values"), format!("{value:?} is not a label value"));
        }
        match_expressions.push(Requirement { key: expression.key.clone(), operator, values });
    }
    let selector = model::LabelSelector {
        match_labels: selector.match_labels.clone().unwrap_or_default(),
        match_expressions,
    };
    (problems.0.len() == before).then_some(selector)
}
