//! The secret that preshared keys are made from, as the operator's file has it now.

use std::path::PathBuf;

use keyservice::PublicKey;
use keyservice::rotation::{Secret, SecretSeen};
use mesh_api::status::Issue;

use crate::wireguard::KeyRing;

/// The operator's file, if one is configured.
#[derive(Debug, Default)]
pub struct SecretFile {
    path: Option<PathBuf>,
    secret: Option<Secret>,
    trouble: Option<String>,
}

impl SecretFile {
    /// The secret in `path`; none without a path.
    pub fn new(path: Option<PathBuf>) -> Self {
        let mut file = Self { path, ..Self::default() };
        file.read_again();
        file
    }

    /// Follows the file. One that cannot be read is never taken for none.
    pub(super) fn read_again(&mut self) {
        let Some(path) = &self.path else { return };
        match Secret::read(path) {
            Ok(secret) => (self.secret, self.trouble) = (Some(secret), None),
            Err(error) => (self.secret, self.trouble) = (None, Some(error.to_string())),
        }
    }

    /// For a new key.
    pub(super) fn configured(&self) -> Option<Secret> {
        self.secret.clone()
    }

    /// Against that of our key `newest`.
    pub(super) fn against(&self, ring: &KeyRing, newest: Option<&PublicKey>) -> SecretSeen {
        match newest {
            _ if self.trouble.is_some() => SecretSeen::Trouble,
            Some(newest) if !ring.has_secret(newest, self.secret.as_ref()) => SecretSeen::Changed,
            _ => SecretSeen::Same,
        }
    }

    /// Why it cannot be had.
    pub(super) fn trouble(&self) -> Option<Issue> {
        let (path, message) = (self.path.as_ref()?, self.trouble.clone()?);
        Some(Issue {
            object: format!("file {}", path.display()),
            field: String::new(),
            reason: "SecretUnreadable".to_owned(),
            message,
        })
    }
}
