//! What is wrong with an object, field by field.

use mesh_api::status::Issue;

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The object counts, as it does for an API server that warns.
    Warning,
    /// The object is refused, as by an API server.
    Refusal,
}

/// One thing wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field in the object, or empty.
    pub field: String,
    /// A CamelCase word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
    /// Whether the object counts nevertheless.
    pub severity: Severity,
}

/// Everything wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// A value the API server refuses.
    pub fn invalid(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.push(field.into(), "InvalidField", message.into(), Severity::Refusal);
    }

    /// A field the API server drops with a warning.
    pub fn unknown(&mut self, field: impl Into<String>) {
        let field = field.into();
        self.push(
            field,
            "UnknownField",
            "this field is not known and has no effect".into(),
            Severity::Warning,
        );
    }

    /// For kinds whose meaning a dropped field would change: unknown fields below `path` refuse the object.
    pub fn refuse_unknown(&mut self, path: &str) {
        let unknown = |problem: &&mut Problem| problem.reason == "UnknownField";
        for problem in self.0.iter_mut().filter(unknown).filter(|problem| problem.field.starts_with(path)) {
            problem.severity = Severity::Refusal;
            problem.message = "this field is not known".into();
        }
    }

    /// Something else that does not stop the object.
    pub fn warn(&mut self, field: impl Into<String>, reason: &'static str, message: impl Into<String>) {
        self.push(field.into(), reason, message.into(), Severity::Warning);
    }

    /// Something else that stops the object.
    pub fn refuse(&mut self, field: impl Into<String>, reason: &'static str, message: impl Into<String>) {
        self.push(field.into(), reason, message.into(), Severity::Refusal);
    }

    fn push(&mut self, field: String, reason: &'static str, message: String, severity: Severity) {
        self.0.push(Problem { field, reason, message, severity });
    }

    /// Whether the object is refused.
    pub fn is_refused(&self) -> bool {
        self.first_refusal().is_some()
    }

    /// The first problem that refuses the object.
    pub fn first_refusal(&self) -> Option<&Problem> {
        self.0.iter().find(|problem| problem.severity == Severity::Refusal)
    }
}

impl Problem {
    /// As status shows it: `object` with the place it was read from in front of the message.
    pub fn issue(&self, object: &str, place: &str) -> Issue {
        Issue {
            object: object.to_owned(),
            field: self.field.clone(),
            reason: self.reason.to_owned(),
            message: if place.is_empty() {
                self.message.clone()
            } else {
                format!("{place}: {}", self.message)
            },
        }
    }
}
