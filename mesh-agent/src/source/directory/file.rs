//! What one file said, and still says after it was broken.

use std::collections::{BTreeMap, BTreeSet};

use zeroize::Zeroizing;

use crate::source::decode::{Decoded, ObjectKey};
use crate::source::manifest::{self, FileProblem, Manifests};

/// Largest file read, bytes.
pub const MAX_FILE: u64 = 8 * 1024 * 1024;

/// The objects of a file, as they count, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FileObjects {
    /// Its objects. Of one refused, the version accepted before stays.
    pub objects: Vec<Decoded>,
    /// What is wrong with the file itself.
    pub problems: Vec<FileProblem>,
}

impl FileObjects {
    /// What a file with this text holds, given what it held before.
    pub fn parse(before: &Self, json: bool, bytes: Zeroizing<Vec<u8>>) -> Self {
        if bytes.is_empty() {
            return if before.objects.is_empty() {
                Self::default()
            } else {
                before.broken("Empty", "the file is empty; delete it to delete its objects".into())
            };
        }
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(error) => {
                return before.broken("Unparsable", format!("not UTF-8 at byte {}", error.valid_up_to()));
            }
        };
        let manifests = if json { manifest::read_json(text) } else { manifest::read_yaml(text) };
        Self::merge(before, manifests)
    }

    /// The file cannot be read (now): what it held before stays.
    pub fn broken(&self, reason: &'static str, message: String) -> Self {
        let problem = FileProblem { line: 0, reason, message, incomplete: true };
        Self::merge(self, Manifests { objects: Vec::new(), problems: vec![problem] })
    }

    fn merge(before: &Self, now: Manifests) -> Self {
        let Manifests { mut objects, problems } = now;
        let accepted = before.objects.iter().filter(|old| old.object.is_some());
        let accepted: BTreeMap<&ObjectKey, &Decoded> = accepted.map(|old| (&old.key, old)).collect();
        for decoded in &mut objects {
            if let Some(old) = accepted.get(&decoded.key) {
                decoded.go_on_from(old);
            }
        }
        if problems.iter().any(|problem| problem.incomplete) {
            let said: BTreeSet<ObjectKey> = objects.iter().map(|new| new.key.clone()).collect();
            objects.extend(accepted.into_values().filter(|old| !said.contains(&old.key)).cloned());
        }
        Self { objects, problems }
    }
}
