//! What is said over the serial line: one JSON object a line, replies in any order.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Name of the serial port.
pub const PORT: &str = "margay.lab";

/// To the guest.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Comes back with the reply. 0 is the guest's word that it is up.
    pub id: u64,
    /// What to do.
    pub what: What,
}

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum What {
    /// Run a command to its end: `[code, stdout, stderr]`.
    Run {
        /// Program and arguments.
        argv: Vec<String>,
        /// Added to its environment.
        env: Vec<(String, String)>,
        /// Its standard input.
        stdin: String,
    },
    /// Keep a program running.
    StartUnit {
        /// Name, also of its log.
        name: String,
        /// Program and arguments.
        argv: Vec<String>,
    },
    /// End it for good (SIGTERM).
    StopUnit {
        /// Name.
        name: String,
    },
    /// Kill it (SIGKILL); it is started again.
    KillUnit {
        /// Name.
        name: String,
    },
    /// How is it? `[pid or null, restarts]`.
    QueryUnit {
        /// Name.
        name: String,
    },
    /// Write a file, atomically.
    Write {
        /// Path.
        path: String,
        /// Text.
        content: String,
    },
}

/// From the guest.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// The request's.
    pub id: u64,
    /// What came of it.
    pub result: Result<Value, String>,
}
