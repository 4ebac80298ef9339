//! Preshared keys: one for each pair of keys in each epoch, made from one secret that all nodes are given.
//!
//! HKDF (RFC 5869) with SHA-256. The extracted key is what a node keeps of the secret; a pair's key is expanded from
//! it with the epoch and both public keys, the smaller first, so both sides come to the same one and no two pairs do.

use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::file::{self, Access, FileProblem, Temp};
use crate::key::{KEY_LEN, PresharedKey, PublicKey};

/// HKDF's salt, and the beginning of its info: this use and its version.
const CONTEXT: &[u8] = b"margay preshared key 1";
/// A shorter secret can be guessed from one recorded handshake.
const SHORTEST: usize = 16;
/// Longer than any secret.
const LIMIT: u64 = 4096;

/// A secret file was refused or could not be kept. Never holds the file's content.
#[derive(Debug, thiserror::Error)]
#[error("secret file {}: {problem}", path.display())]
pub struct SecretError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: SecretProblem,
}

/// What is wrong with a secret file.
#[derive(Debug, thiserror::Error)]
pub enum SecretProblem {
    /// It cannot be read or written, or others could have.
    #[error(transparent)]
    File(#[from] FileProblem),
    /// There is none.
    #[error("is not there")]
    Missing,
    /// Too few bytes to be one.
    #[error(
        "is {0} bytes long; at least {SHORTEST} are needed, best made by `head -c 32 /dev/urandom | base64`"
    )]
    TooShort(usize),
    /// A kept one that is not what we wrote.
    #[error("is damaged")]
    Damaged,
}

/// The secret that preshared keys are made from. Wiped on drop, and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<[u8; KEY_LEN]>);

impl Secret {
    /// From what an operator wrote; one newline at the end does not count.
    pub fn new(content: &[u8]) -> Result<Self, SecretProblem> {
        let content = content.strip_suffix(b"\n").unwrap_or(content);
        if content.len() < SHORTEST {
            return Err(SecretProblem::TooShort(content.len()));
        }
        let (extracted, _) = Hkdf::<Sha256>::extract(Some(CONTEXT), content);
        let mut kept = Zeroizing::new([0; KEY_LEN]);
        kept.copy_from_slice(&extracted);
        Ok(Self(kept))
    }

    /// From the operator's file, which must be ours alone (mode 0600).
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let read = || match file::read(path, LIMIT, Access::Private)? {
            Some(content) => Self::new(&content),
            None => Err(SecretProblem::Missing),
        };
        read().map_err(|problem| SecretError { path: path.to_owned(), problem })
    }

    /// The key of the pair of `one` and `other` in `epoch`.
    pub fn derive(&self, epoch: u64, one: &PublicKey, other: &PublicKey) -> PresharedKey {
        let (first, second) = if one < other { (one, other) } else { (other, one) };
        let info: [&[u8]; 4] = [CONTEXT, &epoch.to_be_bytes(), first.as_bytes(), second.as_bytes()];
        let mut key = Zeroizing::new([0; KEY_LEN]);
        // Neither can fail: the key is as long as the hash, and so is what is asked for.
        if let Ok(expander) = Hkdf::<Sha256>::from_prk(self.0.as_slice()) {
            let _ = expander.expand_multi_info(&info, key.as_mut_slice());
        }
        PresharedKey::from_bytes(*key)
    }

    /// Reads what [`Self::keep`] wrote.
    pub(super) fn load(path: &Path) -> Result<Self, SecretError> {
        let read = || {
            let content = file::read(path, LIMIT, Access::Private)?.ok_or(SecretProblem::Missing)?;
            let line = content.strip_suffix(b"\n").unwrap_or(&content);
            let bytes = Zeroizing::new(STANDARD.decode(line).map_err(|_| SecretProblem::Damaged)?);
            let bytes: [u8; KEY_LEN] = bytes.as_slice().try_into().map_err(|_| SecretProblem::Damaged)?;
            Ok(Self(Zeroizing::new(bytes)))
        };
        read().map_err(|problem| SecretError { path: path.to_owned(), problem })
    }

    /// Keeps it at `path`, mode 0600, in the place of another.
    pub(super) fn keep(&self, path: &Path) -> Result<(), FileProblem> {
        let mut text = Zeroizing::new(STANDARD.encode(self.0.as_slice()));
        text.push('\n');
        Temp::write(path, text.as_bytes(), 0o600)?.replace(path)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}
