//! Which field makes an object unreadable.
//!
//! Found by leaving out one field after the other. A deserialiser that keeps its path would say it at once,
//! but doubles the code made from Kubernetes' thousands of types for the sake of an error message.

use serde_json::Value;

/// Attempts before the search is given up and the field found so far has to do.
const MAX_ATTEMPTS: usize = 500;

/// The path of the innermost field without which `reads` succeeds; empty when no single one is at fault.
pub(super) fn find(value: &Value, reads: &dyn Fn(&Value) -> bool) -> String {
    let mut search = Search { value, reads, attempts: 0 };
    let found = search.below(&[]).unwrap_or_default();
    let mut path = String::new();
    for step in found {
        match step {
            Step::Field(name) if path.is_empty() => path.push_str(&name),
            Step::Field(name) => path.push_str(&format!(".{name}")),
            Step::Index(index) => path.push_str(&format!("[{index}]")),
        }
    }
    path
}

struct Search<'a> {
    value: &'a Value,
    reads: &'a dyn Fn(&Value) -> bool,
    attempts: usize,
}

impl Search<'_> {
    /// The culprit below `path`. A field that must be there hides it, so those are looked into as well.
    fn below(&mut self, path: &[Step]) -> Option<Vec<Step>> {
        let children: Vec<Vec<Step>> =
            children(at(self.value, path)).map(|step| [path, &[step]].concat()).collect();
        for child in &children {
            self.attempts += 1;
            if self.attempts > MAX_ATTEMPTS {
                return None;
            }
            if (self.reads)(&without(self.value, child)) {
                return self.below(child).or(Some(child.clone()));
            }
        }
        children.iter().find_map(|child| self.below(child))
    }
}

#[derive(Clone)]
enum Step {
    Field(String),
    Index(usize),
}

fn children(value: &Value) -> impl Iterator<Item = Step> {
    let names: Vec<String> =
        value.as_object().map(|fields| fields.keys().cloned().collect()).unwrap_or_default();
    let items = value.as_array().map_or(0, Vec::len);
    names.into_iter().map(Step::Field).chain((0..items).map(Step::Index))
}

fn at<'a>(value: &'a Value, pointer: &[Step]) -> &'a Value {
    pointer.iter().fold(value, |value, step| match step {
        Step::Field(name) => value.get(name).unwrap_or(&Value::Null),
        Step::Index(index) => value.get(index).unwrap_or(&Value::Null),
    })
}

fn without(value: &Value, pointer: &[Step]) -> Value {
    let mut copy = value.clone();
    let Some((last, parents)) = pointer.split_last() else { return copy };
    let parent = parents.iter().try_fold(&mut copy, |value, step| match step {
        Step::Field(name) => value.get_mut(name),
        Step::Index(index) => value.get_mut(index),
    });
    match (parent, last) {
        (Some(Value::Object(fields)), Step::Field(name)) => drop(fields.remove(name)),
        (Some(Value::Array(items)), Step::Index(index)) if *index < items.len() => drop(items.remove(*index)),
        _ => {}
    }
    copy
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use k8s_openapi::api::core::v1::Pod;
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    fn culprit(value: Value) -> String {
        assert!(Pod::deserialize(&value).is_err());
        find(&value, &|value| Pod::deserialize(value).is_ok())
    }

    #[test]
    fn the_innermost_field_at_fault_is_named() {
        let pod =
            |spec: Value| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec});
        assert_eq!(culprit(pod(json!({"nodeName": 1}))), "spec.nodeName");
        assert_eq!(culprit(pod(json!(7))), "spec");
        let port = json!({"containers": [{"ports": [{"containerPort": 1}, {"containerPort": "x"}]}]});
        assert_eq!(culprit(pod(port)), "spec.containers[0].ports[1].containerPort");
        assert_eq!(culprit(pod(json!({"nodeName": 1, "hostNetwork": 2}))), "spec");
        assert_eq!(
            culprit(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": 1}})),
            "metadata.name"
        );
        assert_eq!(culprit(json!([])), "");
    }
}
