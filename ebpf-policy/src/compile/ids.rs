//! Ids: 64 bits of a hash over what they stand for.

use std::collections::HashMap;

use serde::Serialize;
use sha2::{Digest, Sha256};

/// Hands out ids and makes sure that two things never share one.
#[derive(Debug, Default)]
pub(super) struct Ids {
    taken: HashMap<u64, [u8; 32]>,
}

impl Ids {
    /// The id of `content`, never 0. Labels are anyone's to choose, so a collision may be somebody's work: whoever comes later
    /// gets another id.
    pub(super) fn id(&mut self, kind: &str, content: &impl Serialize) -> u64 {
        // Our own types with string keys: serialising them cannot fail, and an empty text would only cost sharing.
        let text = serde_json::to_string(&(kind, content)).unwrap_or_default();
        let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        let mut id = digest.iter().take(8).fold(0, |id, byte| id << 8 | u64::from(*byte));
        loop {
            if id != 0 && *self.taken.entry(id).or_insert(digest) == digest {
                return id;
            }
            id = id.wrapping_add(1);
        }
    }
}
