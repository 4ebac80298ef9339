//! Fields that a type does not know, found by comparing what was read with what the type says back.

use serde_json::Value;

use super::problem::Problems;

/// Reports the fields of `given` that are not in `known`, the same object after a round trip.
pub(super) fn compare(given: &Value, known: &Value, path: &str, problems: &mut Problems) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (name, value) in given {
                let field = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match known.get(name) {
                    Some(known) => compare(value, known, &field, problems),
                    // null stands for "not given", which is not said back.
                    None if value.is_null() => {}
                    None => problems.unknown(field),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (index, (value, known)) in given.iter().zip(known).enumerate() {
                compare(value, known, &format!("{path}[{index}]"), problems);
            }
        }
        _ => {}
    }
}
