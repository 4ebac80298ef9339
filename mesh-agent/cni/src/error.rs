//! What the runtime is told when a call fails (specification section 5, "Error").

use serde_json::{Value, json};

/// The configuration's version is not one we speak.
pub(crate) const VERSION: u32 = 1;
/// An environment variable is missing or wrong.
pub(crate) const ENVIRONMENT: u32 = 4;
/// Reading or writing failed.
pub(crate) const IO: u32 = 5;
/// The configuration is not JSON of the right shape.
pub(crate) const DECODE: u32 = 6;
/// The configuration says something impossible.
pub(crate) const CONFIG: u32 = 7;
/// Not now: the runtime should call again.
pub(crate) const TRY_AGAIN: u32 = 11;
/// STATUS: an ADD would not work now.
pub(crate) const NOT_AVAILABLE: u32 = 50;
/// CHECK: the pod's network is not as ADD left it (ours; below 100 is the specification's).
pub(crate) const CHANGED: u32 = 100;

/// A failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CniError {
    pub(crate) code: u32,
    pub(crate) message: String,
    pub(crate) details: String,
}

impl CniError {
    pub(crate) fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    /// As the runtime reads it, in the version it speaks.
    pub(crate) fn to_json(&self, version: &str) -> Value {
        let mut out = json!({"cniVersion": version, "code": self.code, "msg": self.message});
        if !self.details.is_empty() {
            out["details"] = json!(self.details);
        }
        out
    }
}
